/*! Single files of data sets. */

use super::cache::check_names;
use super::client::{At, RepoKind, is_commit};
use super::content::{Condition, sha256_of};
use super::download::{self, Wanted};
use super::{Hub, cache_of};
use crate::checkpoint::DataFile;
use crate::{Error, Result};

pub(super) fn fetch(hub: &Hub<'_>, repo: &str, revision: &str, file: &str) -> Result<DataFile> {
    let at = At { kind: RepoKind::Dataset, repo, revision };
    let cache = cache_of(hub, at)?;
    let found = |commit: String| {
        let path = cache.file(&commit, file).ok_or_else(|| lost(repo, file))?;
        // The content was hashed: the name of a large one is this hash.
        let sha256 = match cache.etag(&commit, file).filter(|etag| etag.len() == 64) {
            Some(etag) => etag,
            None => sha256_of(&path, hub.progress)?,
        };
        let (repo, file, revision) = (repo.to_owned(), file.to_owned(), revision.to_owned());
        Ok(DataFile { path, repo, file, revision, commit, sha256 })
    };
    // The commit that the cache has the file of, or what is wrong with it.
    let cached = || -> Result<Result<String, Option<Error>>> {
        let Some(commit) = cache.commit(revision) else { return Ok(Err(None)) };
        Ok(match cache.condition(&commit, file, true, hub.progress)? {
            Condition::Sound => Ok(commit),
            Condition::Absent => Err(None),
            Condition::Damaged(why) => {
                let path = cache.snapshot(&commit).join(file);
                Err(Some(Error::machine(format!("{} is damaged: {why}", path.display()))))
            }
        })
    };
    if is_commit(revision) || hub.settings.offline.is_some() {
        match (cached()?, hub.settings.offline) {
            (Ok(commit), _) => return found(commit),
            (Err(why), Some(what)) => return Err(not_here(repo, file, what, why)),
            (Err(_), None) => {}
        }
    }
    check_names([file])?;
    let metadata = match hub.client.metadata(at, file, hub.progress) {
        Ok(metadata) => metadata,
        Err(failure) => return hub.cached_instead(|| Ok(cached()?.ok()), failure).and_then(found),
    };
    let commit = metadata.commit.clone();
    let wanted = [Wanted { file: file.to_owned(), metadata, thorough: true }];
    download::fetch(hub, at, &cache, &wanted)?;
    if let Err(error) = cache.note(revision, &commit) {
        // The file is there; only the next run without network would not know it by this name.
        hub.progress.warn(&format!("`{revision}` of {repo} is not noted in the cache: {error}"));
    }
    found(commit)
}

fn not_here(repo: &str, file: &str, what: &str, why: Option<Error>) -> Error {
    match why {
        Some(damage) => damage.context(format!(
            "{file} of the data set {repo} is damaged in the Hub's cache, and {what} keeps it from being fetched again"
        )),
        None => Error::machine(format!(
            "{file} of the data set {repo} is not in the Hub's cache, and {what} keeps it from being fetched"
        )),
    }
    .hint(format!("run once without {what}"))
}

fn lost(repo: &str, file: &str) -> Error {
    Error::machine(format!("{file} of the data set {repo} is gone from the Hub's cache"))
        .hint("run it again; another program may have emptied the cache")
}
