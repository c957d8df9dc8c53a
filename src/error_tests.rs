use std::error::Error as _;

use super::*;

#[test]
fn what_an_io_error_was_stays_below_the_sentences_about_it() {
    let error = Error::from(io::Error::new(ErrorKind::NotFound, "no such file"));
    assert_eq!((error.message().as_str(), error.causes().len()), ("no such file", 0));
    let error = error.context("cannot read block 3").context("cannot quantize");
    assert_eq!(error.message(), "cannot quantize");
    assert_eq!(error.causes(), ["cannot read block 3", "no such file"]);
    assert_eq!(error.to_string(), "cannot quantize: cannot read block 3: no such file");
    let nearest = error.source().unwrap();
    assert_eq!(nearest.to_string(), "cannot read block 3");
    let root = nearest.source().unwrap().downcast_ref::<io::Error>().unwrap();
    assert_eq!(root.kind(), ErrorKind::NotFound);
}

#[test]
fn what_a_file_system_says_is_said_once() {
    let error = Error::from(fs_err::File::open("/no/such/file").unwrap_err());
    assert_eq!((error.causes(), error.source().is_none()), (Vec::<String>::new(), true));
    assert!(error.message().starts_with("failed to open file `/no/such/file`: No such file"));
}

#[test]
fn only_a_full_disk_a_limit_and_memory_are_the_machines() {
    for kind in [
        ErrorKind::StorageFull,
        ErrorKind::QuotaExceeded,
        ErrorKind::FileTooLarge,
        ErrorKind::OutOfMemory,
    ] {
        let error = Error::from(io::Error::from(kind)).context("cannot write");
        assert_eq!((error.kind(), error.hint_text().is_some()), (Kind::Machine, true), "{kind}");
    }
    let error = Error::from(io::Error::from(ErrorKind::PermissionDenied));
    assert_eq!((error.kind(), error.hint_text()), (Kind::Input, None));
}
