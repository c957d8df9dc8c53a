/*! The Hub's cache on disk, as `hf` and transformers lay it out and share it.

```text
models--org--name/            datasets--org--name/ likewise
    blobs/HASH                a file's content under its hash; HASH.incomplete while it comes
    snapshots/COMMIT/FILE     a link to the blob
    refs/REVISION             the commit that a branch or tag meant when it was last asked for
.locks/models--org--name/HASH.lock
```

A reference is written when all that was asked for is there, so a cut download leaves the former
commit in use. Modes are those that the umask leaves, since users share a cache. What is written is
never a link's target: somebody else may have put the link there. */

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt;
use fs_err::{File, OpenOptions};

use super::client::{At, RepoKind, is_commit};
use super::content::{self, Condition, Expected, is_hash};
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// Bytes of a reference that are read; a commit has 40.
const REFERENCE_BYTES: u64 = 1024;

/// One repository's directory in the cache.
pub(super) struct Repository {
    dir: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, at: At<'_>) -> Self {
        let kind = match at.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        let name = format!("{kind}--{}", at.repo.replace('/', "--"));
        Self { locks: cache.join(".locks").join(&name), dir: cache.join(name) }
    }

    /// The commit that a revision means as far as the cache knows.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        // Opening a pipe would wait for its other end.
        let path = inside(&self.dir.join("refs"), revision).filter(|path| path.is_file())?;
        let mut commit = String::new();
        File::open(path).ok()?.take(REFERENCE_BYTES).read_to_string(&mut commit).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// The directory of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// Where a file of a commit lies, if it is there.
    pub(super) fn file(&self, commit: &str, file: &str) -> Option<PathBuf> {
        inside(&self.snapshot(commit), file).filter(|path| path.is_file())
    }

    /// Where the content of this hash lies or will lie.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(etag)
    }

    /// The file that whoever fetches this content holds locked.
    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// What lies where a file of a commit should. Links lead to contents named by their hashes; of a
    /// file of another kind only the user knows what it is.
    ///
    /// # Errors
    /// If it cannot be read, or is a directory; an interruption.
    pub(super) fn condition(
        &self,
        commit: &str,
        file: &str,
        thorough: bool,
        progress: &dyn Progress,
    ) -> Result<Condition> {
        let Some(path) = inside(&self.snapshot(commit), file) else { return Ok(Condition::Absent) };
        let etag = self.etag(commit, file).unwrap_or_default();
        let weights = is_weights(file);
        let expected = Expected { etag: &etag, bytes: None, weights, thorough };
        content::condition(&path, expected, progress)
    }

    /// The hash by which a commit's file is linked to its content.
    pub(super) fn etag(&self, commit: &str, file: &str) -> Option<String> {
        let path = inside(&self.snapshot(commit), file)?;
        let content = std::fs::read_link(path).ok()?;
        let etag = content.file_name()?.to_str()?;
        is_hash(etag).then(|| etag.to_owned())
    }

    /// Links a commit's file to its content and returns where it lies.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let path = inside(&self.snapshot(commit), file).ok_or_else(|| strange_name(file))?;
        let parent = path.parent().expect("a file in a snapshot has a directory");
        fs_err::create_dir_all(parent).map_err(unwritable)?;
        let up = "../".repeat(file.split('/').count() + 1);
        let content = format!("{up}blobs/{etag}");
        match fs_err::read_link(&path) {
            Ok(known) if known == Path::new(&content) => return Ok(path),
            // A link to something else, or to nothing.
            Ok(_) => fs_err::remove_file(&path).map_err(unwritable)?,
            Err(_) if path.is_file() => return Ok(path),
            Err(_) => {}
        }
        match fs_err::os::unix::fs::symlink(content, &path) {
            // Another process may have been as quick.
            Err(error) if !path.is_file() => Err(unwritable(error)),
            _ => Ok(path),
        }
    }

    /// Notes which commit a revision meant.
    pub(super) fn note(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path =
            inside(&self.dir.join("refs"), revision).ok_or_else(|| strange_name(revision))?;
        let parent = path.parent().expect("a reference has a directory");
        fs_err::create_dir_all(parent).map_err(unwritable)?;
        let readable = std::fs::Permissions::from_mode(0o666);
        let mut part = tempfile::Builder::new()
            .permissions(readable)
            .tempfile_in(parent)
            .map_err(unwritable)?;
        part.write_all(commit.as_bytes()).map_err(unwritable)?;
        part.persist(&path).map_err(|error| unwritable(error.error))?;
        Ok(())
    }
}

/// Whether a name is one of safetensors.
pub(super) fn is_weights(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// Opens a file of the cache itself for reading and writing, and makes it if it is not there.
///
/// # Errors
/// A machine error, also if a link or something else than a file lies there.
pub(super) fn open_own(path: &Path) -> Result<File> {
    open(path, OpenOptions::new().read(true).write(true).create(true).truncate(false))?
        .map_err(unwritable)
}

/// Opens the file that is held locked; one that another user made need not be written.
///
/// # Errors
/// As [`open_own`].
pub(super) fn open_lock(path: &Path) -> Result<File> {
    match open(path, OpenOptions::new().read(true).write(true).create(true).truncate(false))? {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            open(path, OpenOptions::new().read(true))?.map_err(|_| unwritable(error))
        }
        lock => lock.map_err(unwritable),
    }
}

/// Opens what must be a file itself. The inner error is the system's.
fn open(path: &Path, options: &mut OpenOptions) -> Result<std::io::Result<File>> {
    let strange = |what: &str| {
        Error::machine(format!("{} is {what}, and the Hub's cache has none there", path.display()))
            .hint("remove it, and look at who may write to the cache")
    };
    if path.is_symlink() {
        return Err(strange("a link"));
    }
    // Without O_NONBLOCK, a pipe that nobody reads would be waited for.
    let file = match options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(strange("a link")),
        Err(error) => return Ok(Err(error)),
        Ok(file) => file,
    };
    match file.metadata().map_err(unwritable)?.is_file() {
        true => Ok(Ok(file)),
        false => Err(strange("a pipe or device")),
    }
}

/// Whatever keeps the cache from being written is the machine's.
pub(super) fn unwritable(error: std::io::Error) -> Error {
    Error::of(Kind::Machine, error)
        .context("the Hub's cache cannot be written")
        .hint("free some disk space, or set HF_HUB_CACHE to a place with room that you may write")
}

/// Refuses names of the Hub that cannot be files of one repository side by side.
///
/// # Errors
/// A machine error: the server is not the Hub.
pub(super) fn check_names<'f>(files: impl IntoIterator<Item = &'f str>) -> Result<()> {
    let files: std::collections::BTreeSet<&str> = files.into_iter().collect();
    for file in &files {
        if inside(Path::new(""), file).is_none() {
            return Err(strange_name(file));
        }
        let above = file.match_indices('/').map(|(end, _)| &file[..end]);
        if let Some(both) = above.into_iter().find(|above| files.contains(above)) {
            return Err(Error::machine(format!("`{both}` is a file and a directory on the Hub"))
                .hint(super::failure::ANOTHER_SERVER));
        }
    }
    Ok(())
}

/// `relative` under `dir`, unless it would lead out of it or is no name for a file.
fn inside(dir: &Path, relative: &str) -> Option<PathBuf> {
    let plain = Path::new(relative).components().all(|part| matches!(part, Component::Normal(_)));
    let parts = relative.split('/').all(|part| (1..=255).contains(&part.len()) && part != ".");
    let printable = !relative.chars().any(char::is_control);
    (plain && parts && printable).then(|| dir.join(relative))
}

fn strange_name(name: &str) -> Error {
    let shown: String = name.chars().take(100).flat_map(char::escape_debug).collect();
    Error::machine(format!("`{shown}` is no name of a file in a repository"))
        .hint(format!("{}: the Hub has no such names", super::failure::ANOTHER_SERVER))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn repository(cache: &Path) -> Repository {
        let at = At { kind: RepoKind::Dataset, repo: "org/name", revision: "main" };
        Repository::new(cache, at)
    }

    #[test]
    fn files_are_links_to_their_content_at_any_depth() {
        let cache = tempfile::tempdir().unwrap();
        let repository = repository(cache.path());
        let dir = cache.path().join("datasets--org--name");
        fs_err::create_dir_all(dir.join("blobs")).unwrap();
        fs_err::write(repository.blob("abc"), "content").unwrap();
        for file in ["a.json", "en/deep/b.json"] {
            assert_eq!(repository.file(COMMIT, file), None);
            let path = repository.link(COMMIT, file, "abc").unwrap();
            assert_eq!(path, dir.join("snapshots").join(COMMIT).join(file));
            assert_eq!(fs_err::read_to_string(&path).unwrap(), "content");
            assert!(fs_err::read_link(&path).unwrap().is_relative());
            assert_eq!(repository.file(COMMIT, file), Some(path.clone()));
            assert_eq!(repository.link(COMMIT, file, "abc").unwrap(), path);
        }
    }

    #[test]
    fn a_revision_is_looked_up_and_a_commit_is_itself() {
        let cache = tempfile::tempdir().unwrap();
        let repository = repository(cache.path());
        assert_eq!(repository.commit(COMMIT).as_deref(), Some(COMMIT));
        for revision in ["main", "refs/convert/parquet"] {
            assert_eq!(repository.commit(revision), None);
            repository.note(revision, COMMIT).unwrap();
            assert_eq!(repository.commit(revision).as_deref(), Some(COMMIT));
            let path = cache.path().join("datasets--org--name/refs").join(revision);
            assert_eq!(fs_err::read_to_string(path).unwrap(), COMMIT);
        }
    }

    #[test]
    fn no_name_leads_out_of_the_repository() {
        let cache = tempfile::tempdir().unwrap();
        let repository = repository(cache.path());
        let long = "x".repeat(256);
        for name in ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a/", "a\u{1b}[2J", &long]
        {
            assert!(repository.link(COMMIT, name, "abc").is_err(), "{name}");
            assert!(repository.note(name, COMMIT).is_err(), "{name}");
            assert_eq!(repository.file(COMMIT, name), None);
            let error = check_names(["config.json", name]).unwrap_err();
            assert!(!error.message().contains(char::is_control), "{error:?}");
        }
        assert!(common_files(cache.path()).is_empty(), "nothing was made");
        check_names(["a.json", "a/b.json", "c"]).unwrap();
        let error = check_names(["a", "a-b", "a/b.json"]).unwrap_err();
        assert_eq!(error.message(), "`a` is a file and a directory on the Hub");
    }

    fn common_files(dir: &Path) -> Vec<PathBuf> {
        fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn a_link_that_leads_elsewhere_is_replaced_and_its_target_left_alone() {
        let cache = tempfile::tempdir().unwrap();
        let repository = repository(cache.path());
        fs_err::create_dir_all(repository.blob("")).unwrap();
        fs_err::write(repository.blob("abc"), "content").unwrap();
        let other = cache.path().join("other");
        fs_err::write(&other, "mine").unwrap();
        let path = repository.link(COMMIT, "a.json", "gone").unwrap();
        for target in [Some(other.clone()), None] {
            if let Some(target) = target {
                fs_err::remove_file(&path).unwrap();
                fs_err::os::unix::fs::symlink(target, &path).unwrap();
            }
            repository.link(COMMIT, "a.json", "abc").unwrap();
            assert_eq!(fs_err::read_to_string(&path).unwrap(), "content");
        }
        assert_eq!(fs_err::read_to_string(other).unwrap(), "mine");
    }

    #[test]
    fn what_the_cache_writes_is_no_link_pipe_or_directory() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs_err::write(&target, "mine").unwrap();
        for (name, to) in [("link", &target), ("dangling", &dir.path().join("absent"))] {
            let path = dir.path().join(name);
            fs_err::os::unix::fs::symlink(to, &path).unwrap();
            let error = open_own(&path).unwrap_err();
            assert!(error.message().contains("is a link"), "{error}");
        }
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(open_own(&pipe).unwrap_err().message().contains("is a pipe"));
        assert_eq!(open_own(dir.path()).unwrap_err().kind(), Kind::Machine);
        assert_eq!(fs_err::read_to_string(target).unwrap(), "mine");
        assert!(!dir.path().join("absent").exists());
        open_own(&dir.path().join("new")).unwrap();
    }
}
