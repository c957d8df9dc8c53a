/*! Tests of contents and their hashes. */

use super::*;
use crate::progress::Silent;

fn hash(etag: &str, content: &[u8]) -> String {
    let mut hash = Hash::new(etag, content.len() as u64);
    hash.add(content);
    hash.finish(etag)
}

#[test]
fn hashes_are_those_of_the_hub() {
    // `git hash-object` and `sha256sum` of the same bytes.
    assert_eq!(hash(&"0".repeat(40), b"abc\n"), "8baef1b4abc478178b004d62031cf7fe6db6f903");
    // `sha1sum`, which a mirror may use.
    let plain = "03cfd743661f07975fa2f1220c5194cbaff48451";
    assert_eq!(hash(plain, b"abc\n"), plain);
    assert_eq!(
        hash(&"0".repeat(64), b"abc\n"),
        "edeaaff3f1774ad2888673770c6d64097e391bc362d7d6fb34982ddf0efd18cb"
    );
}

#[test]
fn hashes_are_told_from_other_etags() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    assert!(is_hash(commit) && is_hash(&commit.repeat(2)[..64]));
    for other in ["", "main", "../../../../home", &format!("{commit}-2"), &commit.to_uppercase()] {
        assert!(!is_hash(other), "{other}");
    }
}

#[test]
fn a_small_content_is_hashed_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    let etag = hash(&"0".repeat(64), b"abc");
    let of = |bytes, thorough| {
        let expected = Expected { etag: &etag, bytes, weights: false, thorough };
        condition(&path, expected, &Silent).unwrap()
    };
    assert_eq!(of(None, false), Condition::Absent);
    fs_err::write(&path, "abc").unwrap();
    assert_eq!(of(None, false), Condition::Sound);
    assert_eq!(of(Some(3), true), Condition::Sound);
    let Condition::Damaged(why) = of(Some(4), false) else { panic!() };
    assert_eq!(why, "it has 3 bytes and the Hub says 4");
    for wrong in ["abd", "ab", ""] {
        fs_err::write(&path, wrong).unwrap();
        let Condition::Damaged(why) = of(None, false) else { panic!("{wrong}") };
        assert!(why.ends_with(&format!("and should be {etag}")), "{why}");
    }
    fs_err::remove_file(&path).unwrap();
    fs_err::create_dir(&path).unwrap();
    let expected = Expected { etag: &etag, bytes: None, weights: false, thorough: false };
    let error = condition(&path, expected, &Silent).unwrap_err();
    assert!(error.message().contains("is a directory"), "{error}");
}

#[test]
fn large_weights_are_measured_by_their_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    let data = SMALL_BYTES + 1024;
    let header = format!(r#"{{"x":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.as_bytes());
    fs_err::write(&path, &start).unwrap();
    let whole = start.len() as u64 + data;
    let file = fs_err::OpenOptions::new().write(true).open(&path).unwrap();
    let etag = "0".repeat(64);
    let of = |weights, thorough| {
        let expected = Expected { etag: &etag, bytes: None, weights, thorough };
        condition(&path, expected, &Silent).unwrap()
    };
    file.set_len(whole).unwrap();
    assert_eq!(of(true, false), Condition::Sound);
    assert!(matches!(of(true, true), Condition::Damaged(_)), "zeros do not have this hash");
    file.set_len(whole - 1).unwrap();
    assert!(matches!(of(true, false), Condition::Damaged(_)));
    assert_eq!(of(false, false), Condition::Sound, "nothing says how long other files are");
}
