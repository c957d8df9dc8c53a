/*! Disks: how much is free, and whether this user may write there. */

use std::path::Path;

use super::Check;
use crate::checkpoint::free_bytes;
use crate::units;
use crate::{Error, Kind, Result, hub};

/// Below this a checkpoint of a small model may not fit.
const LITTLE_BYTES: u64 = 1_000_000_000;

/// The current directory, where results go unless `--out` says otherwise.
pub(super) fn here() -> Check {
    match std::env::current_dir() {
        Ok(directory) => place("disk", &directory, "choose another place with --out"),
        Err(error) => Check::note("disk", format!("there is no current directory: {error}"))
            .hint("change to a directory that exists, or give --out an absolute path"),
    }
}

/// Where the Hub's tools keep models.
pub(super) fn hub_cache() -> Check {
    match hub::cache_directory() {
        Err(error) => Check::fault("hub cache", error.to_string())
            .hint(error.hint_text().unwrap_or("look at the variables that begin with HF_")),
        Ok(Some(directory)) => {
            place("hub cache", &directory, "name another place in HF_HOME or HF_HUB_CACHE")
        }
        Ok(None) => Check::note("hub cache", "no variable says where it would be")
            .hint("set HOME, HF_HOME or HF_HUB_CACHE"),
    }
}

/// Free room, and whether a file can be made there.
fn place(name: &str, directory: &Path, elsewhere: &str) -> Check {
    let shown = directory.display();
    let absent = if directory.exists() { "" } else { ", not made yet" };
    let Some(there) = existing(directory) else {
        return Check::note(name, format!("{shown} has no directory above it")).hint(elsewhere);
    };
    let Some(free) = free_bytes(there) else {
        return Check::note(
            name,
            format!("{shown}{absent}: the system does not tell what is free"),
        );
    };
    let detail = format!("{} free at {shown}{absent}", units::bytes(free));
    if let Err(error) = try_to_write(there) {
        return Check::note(name, format!("{detail}, which cannot be written: {error}"))
            .hint(format!("{elsewhere}; reading needs no more"));
    }
    if free < LITTLE_BYTES {
        return Check::note(name, detail).hint(format!("free some disk space, or {elsewhere}"));
    }
    Check::ok(name, detail)
}

/// The directory, or the nearest above it that is there.
pub(super) fn existing(directory: &Path) -> Option<&Path> {
    directory.ancestors().find(|place| place.is_dir())
}

/// Makes a file without a name, which is gone when it is closed.
pub(super) fn try_to_write(directory: &Path) -> Result<()> {
    tempfile::tempfile_in(directory).map(drop).map_err(|error| Error::of(Kind::Machine, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn a_directory_that_is_not_there_yet_stands_on_the_one_above_it() {
        let home = tempfile::tempdir().unwrap();
        let absent = home.path().join("a/b");
        assert_eq!(existing(&absent), Some(home.path()));
        let check = place("disk", &absent, "elsewhere");
        assert!(check.detail.ends_with("a/b, not made yet"), "{check:?}");
        assert!(!home.path().join("a").exists(), "looking makes nothing");
        assert_eq!(fs_err::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_a_note_with_another_way() {
        // A file of the system's own, in which no file can be made whoever asks.
        let check = place("disk", Path::new("/proc"), "choose another");
        assert_eq!(check.status, Status::Note, "{check:?}");
        assert!(check.hint.is_some());
    }
}
