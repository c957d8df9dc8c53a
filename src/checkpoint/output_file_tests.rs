use std::os::unix::fs::symlink;

use super::*;
use crate::Kind;

const NOTE: FileKind = FileKind {
    name: "a note",
    recognizes: |path| fs_err::read_to_string(path).is_ok_and(|text| text.starts_with("note")),
};

fn check(path: &Path, overwrite: bool) -> Result<OutputFile> {
    OutputFile::check(path, &NOTE, overwrite, Inputs::default())
}

#[track_caller]
fn refused(path: &Path, overwrite: bool, part: &str) {
    let error = check(path, overwrite).err().expect("it is refused");
    assert!(error.to_string().contains(part), "{error}");
    assert!(error.hint_text().is_some());
}

#[test]
fn a_file_is_replaced_by_its_own_kind_only_and_only_when_asked() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("note");
    check(&path, false).unwrap().write(b"note 1").unwrap();
    refused(&path, false, "exists already");
    check(&path, true).unwrap().write(b"note 2").unwrap();
    assert_eq!(fs_err::read_to_string(&path).unwrap(), "note 2");
    fs_err::write(&path, "weights").unwrap();
    refused(&path, true, "is not a note and is not overwritten");
    fs_err::write(&path, "").unwrap();
    assert!(check(&path, true).is_ok(), "an empty file loses nothing");
    refused(home.path(), true, "is a directory");
    refused(&home.path().join("no/note"), false, "does not exist");
}

#[test]
fn what_appears_meanwhile_is_not_replaced() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("note");
    let file = check(&path, true).unwrap();
    fs_err::write(&path, "weights").unwrap();
    let error = file.write(b"note").unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert_eq!(fs_err::read_to_string(&path).unwrap(), "weights");
    assert_eq!(fs_err::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn an_input_is_never_written_and_a_dangling_link_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("note");
    fs_err::write(&path, "note").unwrap();
    let inputs = Inputs::default().with(Some(&path));
    let error = OutputFile::check(&path, &NOTE, true, inputs).err().unwrap();
    assert!(error.to_string().contains("which is read"), "{error}");
    let inside = Inputs::default().with(Some(home.path()));
    assert!(OutputFile::check(&home.path().join("new"), &NOTE, false, inside).is_err());
    let link = home.path().join("link");
    symlink(home.path().join("gone"), &link).unwrap();
    refused(&link, true, "is a link to");
}

#[test]
fn a_link_keeps_leading_to_the_file_that_is_replaced() {
    let home = tempfile::tempdir().unwrap();
    let [path, link] = ["note", "link"].map(|name| home.path().join(name));
    fs_err::write(&path, "note 1").unwrap();
    symlink(&path, &link).unwrap();
    check(&link, true).unwrap().write(b"note 2").unwrap();
    assert!(link.is_symlink());
    assert_eq!(fs_err::read_to_string(&path).unwrap(), "note 2");
}

#[test]
fn a_device_is_written_to_and_stays_a_device() {
    let null = Path::new("/dev/null");
    check(null, false).unwrap().write(b"note").unwrap();
    assert!(fs_err::metadata(null).unwrap().file_type().is_char_device());
    let full = check(Path::new("/dev/full"), false).unwrap().write(b"note").unwrap_err();
    assert_eq!(full.kind(), Kind::Machine, "{full}");
}
