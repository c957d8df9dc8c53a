use super::*;
use crate::Kind;

#[test]
fn a_disk_too_small_is_the_machines_fault_and_both_sizes_are_named() {
    let error = check_space(Path::new("out"), 100, Some(99)).unwrap_err();
    assert_eq!(error.kind(), Kind::Machine);
    assert_eq!(error.message(), "out needs 100 bytes and its disk has 99 bytes free");
    assert!(check_space(Path::new("out"), 100, Some(100)).is_ok());
    assert!(check_space(Path::new("out"), 100, None).is_ok());
}

#[test]
#[cfg(target_os = "linux")]
fn a_write_to_a_full_device_is_the_machines_fault() {
    let full = Path::new("/dev/full");
    let error = fs_err::write(full, "x").unwrap_err();
    let error = failed("write", full, &error);
    assert_eq!(error.kind(), Kind::Machine);
    assert!(error.message().starts_with("cannot write /dev/full"));
}

#[test]
fn replace_keeps_the_former_directory_aside() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    for name in ["new", "out"] {
        fs_err::create_dir(path(name)).unwrap();
        fs_err::write(path(name).join("which"), name).unwrap();
    }
    replace(&path("new"), &path("out"), &path("old")).unwrap();
    assert_eq!(fs_err::read_to_string(path("out/which")).unwrap(), "new");
    assert_eq!(fs_err::read_to_string(path("old/which")).unwrap(), "out");
    assert!(!path("new").exists());
}
