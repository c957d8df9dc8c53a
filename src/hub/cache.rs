/*! The Hub's cache on disk, as `hf` and transformers lay it out and share it.

```text
models--org--name/            datasets--org--name/ likewise
    blobs/HASH                a file's content under its hash; HASH.incomplete while it comes
    snapshots/COMMIT/FILE     a link to the blob
    refs/REVISION             the commit that a branch or tag meant when it was last asked for
.locks/models--org--name/HASH.lock
```

A reference is written when all that was asked for is there, so a cut download leaves the former
commit in use. */

use std::io::Write;
use std::path::{Component, Path, PathBuf};

use super::client::{At, RepoKind, is_commit};
use crate::{Error, Result};

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
        let path = inside(&self.dir.join("refs"), revision)?;
        let commit = fs_err::read_to_string(path).ok()?;
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

    /// Links a commit's file to its content and returns where it lies.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        let path = inside(&self.snapshot(commit), file).ok_or_else(|| strange_name(file))?;
        if path.is_file() {
            return Ok(path);
        }
        let parent = path.parent().expect("a file in a snapshot has a directory");
        fs_err::create_dir_all(parent)?;
        let up = "../".repeat(file.split('/').count() + 1);
        if path.is_symlink() {
            fs_err::remove_file(&path)?;
        }
        match fs_err::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &path) {
            // Another process may have been as quick.
            Err(error) if !path.is_file() => Err(error.into()),
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
        fs_err::create_dir_all(parent)?;
        let mut whole = tempfile::NamedTempFile::new_in(parent)?;
        whole.write_all(commit.as_bytes())?;
        whole.persist(&path).map_err(|error| Error::from(error.error))?;
        Ok(())
    }
}

/// `relative` under `dir`, unless it would lead out of it.
fn inside(dir: &Path, relative: &str) -> Option<PathBuf> {
    let plain = Path::new(relative).components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !relative.is_empty()).then(|| dir.join(relative))
}

fn strange_name(name: &str) -> Error {
    Error::input(format!("`{name}` leads out of its repository"))
        .hint("look at HF_ENDPOINT: the Hub has no such names")
}

#[cfg(test)]
mod tests {
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
        for name in ["../x", "/etc/passwd", "a/../../x", ""] {
            assert!(repository.link(COMMIT, name, "abc").is_err(), "{name}");
            assert!(repository.note(name, COMMIT).is_err(), "{name}");
            assert_eq!(repository.file(COMMIT, name), None);
        }
    }
}
