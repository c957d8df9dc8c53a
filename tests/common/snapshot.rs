/*! Text that is pinned in a file below `tests/snapshots`.

`ATOM_BLESS=1 cargo test --release --test help` writes what there is now; the difference is then read in
the commit. */

use std::path::{Path, PathBuf};

/// The environment variable that has the files written instead of compared.
const VARIABLE: &str = "ATOM_BLESS";

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots")
}

fn blessing() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// What is different between the text and the file of that name; nothing once it is written.
pub(crate) fn difference(name: &str, text: &str) -> Option<String> {
    let path = directory().join(name);
    if blessing() {
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, text).unwrap();
        return None;
    }
    let pinned = fs_err::read_to_string(&path).unwrap_or_default();
    if pinned == text {
        return None;
    }
    let mut lines = (0..).zip(pinned.lines().map(Some).chain(std::iter::repeat(None)));
    let mut new = text.lines();
    let (at, old, new) = loop {
        let (at, old) = lines.next().unwrap();
        let new = new.next();
        if old != new || old.is_none() {
            break (at + 1, old, new);
        }
    };
    let shown = |line: Option<&str>| line.map_or("the end".to_owned(), |line| format!("`{line}`"));
    Some(format!(
        "{} line {at}: {} is pinned, {} is there now\n\
         rewrite it with {VARIABLE}=1 cargo test --release --test help",
        path.display(),
        shown(old),
        shown(new)
    ))
}

/// Fails on the first line that differs from the file of that name.
#[track_caller]
pub(crate) fn assert_pinned(name: &str, text: &str) {
    if let Some(difference) = difference(name, text) {
        panic!("{difference}");
    }
}

/// Files of a folder that none of `names` is: removed when blessing, returned otherwise.
pub(crate) fn strays(folder: &str, names: &[String]) -> Vec<String> {
    let folder = directory().join(folder);
    let mut strays = super::names(&folder);
    strays.retain(|name| !names.contains(name));
    if blessing() {
        strays.drain(..).for_each(|name| fs_err::remove_file(folder.join(name)).unwrap());
    }
    strays
}
