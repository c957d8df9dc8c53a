/*! Single files of data sets. */

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::client::{At, RepoKind, is_commit};
use super::download::{self, Wanted, hash_of};
use super::{Hub, cache_of};
use crate::{Error, Result};

/// A file of a data set on this machine, and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Where it lies: in the Hub's cache, under its own name.
    #[serde(skip)]
    pub path: PathBuf,
    /// The repository.
    pub repo: String,
    /// Its name in the repository.
    pub file: String,
    /// The revision that was asked for.
    pub revision: String,
    /// The commit that it meant.
    pub commit: String,
    /// SHA-256 of the file, lower-case hexadecimal.
    pub sha256: String,
}

pub(super) fn fetch(hub: &Hub<'_>, repo: &str, revision: &str, file: &str) -> Result<DataFile> {
    let at = At { kind: RepoKind::Dataset, repo, revision };
    let cache = cache_of(hub, at)?;
    let known = cache.commit(revision);
    let cached = known.and_then(|commit| cache.file(&commit, file).map(|path| (commit, path)));
    let found = |(commit, path): (String, PathBuf)| {
        let sha256 = hash_of(&path)?;
        let (repo, file, revision) = (repo.to_owned(), file.to_owned(), revision.to_owned());
        Ok(DataFile { path, repo, file, revision, commit, sha256 })
    };
    if let Some(cached) = &cached
        && (hub.settings.offline.is_some() || is_commit(revision))
    {
        return found(cached.clone());
    }
    if let Some(what) = hub.settings.offline {
        return Err(Error::machine(format!(
            "{file} of the data set {repo} is not in the Hub's cache, and {what} keeps it from being fetched"
        ))
        .hint(format!("run once without {what}")));
    }
    let metadata = match hub.client.metadata(at, file) {
        Ok(metadata) => metadata,
        Err(error) => return hub.cached_instead(cached, error).and_then(found),
    };
    let commit = metadata.commit.clone();
    let wanted = [Wanted { file: file.to_owned(), metadata }];
    download::fetch(hub, at, &cache, &wanted)?;
    cache.note(revision, &commit)?;
    let path = cache.file(&commit, file).expect("it was linked a moment ago");
    found((commit, path))
}
