use std::time::{SystemTime, UNIX_EPOCH};

use super::*;
use crate::Kind;
use crate::backend::cuda::skipped;

const SOURCE: &str = "extern \"C\" __global__ void scale(float *x) { x[threadIdx.x] *= FACTOR; }";

fn factor(value: &str) -> Vec<(&'static str, String)> {
    vec![("FACTOR", value.to_owned())]
}

/// A compiler with its cache in a directory that does not exist yet; none without NVRTC.
fn compiler(test: &str) -> Option<(Compiler, tempfile::TempDir)> {
    let directory = tempfile::tempdir().unwrap();
    match Compiler::for_architecture("sm_80") {
        Ok(compiler) => {
            Some((compiler.with_cache(Some(directory.path().join("a/kernels"))), directory))
        }
        Err(error) => {
            skipped(test, &error.to_string());
            None
        }
    }
}

/// The only file of the cache.
fn only_file(compiler: &Compiler) -> PathBuf {
    let entries = fs::read_dir(compiler.cache.as_ref().unwrap()).unwrap();
    let paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(paths.len(), 1, "{paths:?}");
    paths.into_iter().next().unwrap()
}

#[test]
fn the_cache_gives_back_what_was_compiled() {
    let Some((compiler, _home)) = compiler("the_cache_gives_back_what_was_compiled") else {
        return;
    };
    let made = compiler.cubin("scale", SOURCE, &factor("2.0f")).unwrap();
    assert!(made.starts_with(b"\x7fELF"));
    let path = only_file(&compiler);
    // What is read is the file and nothing else: another content, with its hash, is believed.
    let other = [&Sha256::digest(b"other")[..], b"other"].concat();
    fs::write(&path, other).unwrap();
    assert_eq!(compiler.cubin("scale", SOURCE, &factor("2.0f")).unwrap(), b"other");
    assert_eq!(compiler.compile("scale", SOURCE, &factor("2.0f")).unwrap().0, made);
}

#[test]
fn a_damaged_file_of_the_cache_is_made_again() {
    let Some((compiler, _home)) = compiler("a_damaged_file_of_the_cache_is_made_again") else {
        return;
    };
    let made = compiler.cubin("scale", SOURCE, &factor("2.0f")).unwrap();
    let path = only_file(&compiler);
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[DIGEST_BYTES + 100] ^= 1;
    for damaged in [&flipped[..], &good[..good.len() / 2], &good[..DIGEST_BYTES], b""] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(compiler.cubin("scale", SOURCE, &factor("2.0f")).unwrap(), made);
        assert_eq!(fs::read(&path).unwrap(), good);
    }
    assert_eq!(only_file(&compiler), path);
}

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let Some((compiler, home)) = compiler("a_cache_that_cannot_be_written_is_done_without") else {
        return;
    };
    // A file where the directory should be: refused to root as well.
    fs::write(home.path().join("a"), "").unwrap();
    assert!(compiler.cubin("scale", SOURCE, &factor("2.0f")).unwrap().starts_with(b"\x7fELF"));
    assert!(compiler.with_cache(None).cubin("scale", SOURCE, &factor("2.0f")).is_ok());
}

#[test]
fn an_error_shows_the_compilers_log() {
    let Some((compiler, _home)) = compiler("an_error_shows_the_compilers_log") else { return };
    let error = compiler.cubin("scale", SOURCE, &factor("nonsense")).unwrap_err();
    assert_eq!(error.kind(), Kind::Machine);
    assert_eq!(error.message(), "internal error: the kernel `scale` does not compile");
    for part in ["scale.cu(1)", "\"nonsense\" is undefined", "-DFACTOR=nonsense", "sm_80"] {
        assert!(error.causes()[0].contains(part), "{error}");
    }
    assert!(!compiler.cache.unwrap().exists());
}

#[test]
fn the_log_reports_registers_and_spills() {
    let Some((compiler, _home)) = compiler("the_log_reports_registers_and_spills") else { return };
    // A program that was never compiled: NVRTC may recognize one, even from an earlier run, and then reports nothing.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    let (_, log) = compiler.compile("scale", SOURCE, &factor(&format!("{now}.0f"))).unwrap();
    assert!(log.contains("0 bytes spill stores") && log.contains("registers"), "{log}");
}

#[test]
fn everything_that_decides_the_code_is_in_the_key() {
    let version = |minor| Version { major: 13, minor };
    let compiler = |minor, architecture: &str| Compiler {
        version: version(minor),
        architecture: architecture.to_owned(),
        cache: None,
    };
    let plain = compiler(0, "sm_80");
    let keys = [
        plain.key(SOURCE, &factor("2")),
        plain.key(SOURCE, &factor("3")),
        plain.key(SOURCE, &[]),
        plain.key("", &factor("2")),
        compiler(1, "sm_80").key(SOURCE, &factor("2")),
        compiler(0, "sm_90a").key(SOURCE, &factor("2")),
    ];
    for (at, key) in keys.iter().enumerate() {
        assert!(!keys[..at].contains(key));
    }
    assert_eq!(keys[0], plain.key(SOURCE, &factor("2")));
}

#[test]
fn the_architecture_is_the_devices_own_or_the_next_older_of_its_generation() {
    let known = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
    let of = |major, minor| architecture(Version { major, minor }, &known);
    assert_eq!(of(8, 0).as_deref(), Some("sm_80"));
    assert_eq!(of(9, 0).as_deref(), Some("sm_90a"));
    assert_eq!(of(10, 0).as_deref(), Some("sm_100"));
    assert_eq!(of(12, 3).as_deref(), Some("sm_121"));
    assert_eq!(of(13, 0), None);
}
