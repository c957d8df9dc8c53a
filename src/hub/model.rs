/*! Models: which files of a repository a checkpoint needs, and a commit's directory that holds them. */

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::cache::{Repository, check_names};
use super::client::{At, RepoKind, is_commit};
use super::content::Condition;
use super::download::{self, Wanted};
use super::{Hub, cache_of};
use crate::checkpoint::{CARD, is_side_file};
use crate::{Error, Kind, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of an index that are read: a line a tensor, of which large models have tens of thousands.
const INDEX_BYTES: u64 = 64 << 20;

/// A model's commit on this machine.
pub(super) struct Snapshot {
    pub(super) dir: PathBuf,
    pub(super) commit: String,
}

/// Brings what a checkpoint needs of a model's revision into the cache.
pub(super) fn fetch(hub: &Hub<'_>, repo: &str, revision: &str) -> Result<Snapshot> {
    let at = At { kind: RepoKind::Model, repo, revision };
    let cache = cache_of(hub, at)?;
    let cached = || cached(hub, &cache, revision);
    if is_commit(revision) || hub.settings.offline.is_some() {
        match (cached()?, hub.settings.offline) {
            (Ok(snapshot), _) => return Ok(snapshot),
            (Err(why), Some(_)) => return Err(not_here(hub, repo, revision, why)),
            (Err(_), None) => {}
        }
    }
    let listing = match hub.client.list(at, hub.progress) {
        Ok(listing) => listing,
        Err(failure) => return hub.cached_instead(|| Ok(cached()?.ok()), failure),
    };
    let commit = At { revision: &listing.commit, ..at };
    if needed(&listing.files, None).is_none() {
        bring(hub, commit, &cache, &[INDEX])?;
    }
    let index = cache.file(&listing.commit, INDEX).map(|path| read_index(&path)).transpose()?;
    let files = needed(&listing.files, index.as_deref()).unwrap_or_default();
    if !files.iter().any(|file| file.ends_with(".safetensors")) {
        return Err(Error::input(format!("{repo} holds no safetensors at revision `{revision}`"))
            .hint(match files.is_empty() && index.is_some() {
                true => "its index names no shards: choose another --revision",
                false => "choose a repository or a --revision of the model with safetensors; PyTorch files are not read",
            }));
    }
    if let Some(absent) = files.iter().find(|file| !listing.files.contains(file)) {
        return Err(Error::input(format!("{repo} lacks {absent}, which its {INDEX} names"))
            .hint("choose another --revision"));
    }
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    bring(hub, commit, &cache, &files)?;
    bring_card(hub, commit, &cache, &listing.files)?;
    if let Err(error) = cache.note(revision, &listing.commit) {
        // The files are there; only the next run without network would not know them by this name.
        hub.progress.warn(&format!("`{revision}` of {repo} is not noted in the cache: {error}"));
    }
    Ok(Snapshot { dir: cache.snapshot(&listing.commit), commit: listing.commit })
}

/// What the cache holds of a revision: a snapshot that a checkpoint can be read from, or why there is none.
fn cached(
    hub: &Hub<'_>,
    cache: &Repository,
    revision: &str,
) -> Result<Result<Snapshot, Option<Error>>> {
    let Some(commit) = cache.commit(revision) else { return Ok(Err(None)) };
    let dir = cache.snapshot(&commit);
    if !dir.is_dir() {
        return Ok(Err(None));
    }
    // Small files first: what is absent is only known from an index that is sound.
    for file in present(&dir)? {
        match cache.condition(&commit, &file, false, hub.progress)? {
            Condition::Sound => {}
            Condition::Damaged(why) => {
                let path = dir.join(&file);
                let error = Error::machine(format!("{} is damaged: {why}", path.display()));
                return Ok(Err(Some(error)));
            }
            Condition::Absent => {
                let path = dir.join(&file);
                let what = "is a link to a content that is not there";
                return Ok(Err(Some(Error::machine(format!("{} {what}", path.display())))));
            }
        }
    }
    Ok(match absent(&dir) {
        None => Ok(Snapshot { dir, commit }),
        Some(file) => Err(Some(Error::machine(format!("{} lacks {file}", dir.display())))),
    })
}

/// The files of a commit's directory that a checkpoint is read from, dangling links among them.
fn present(dir: &Path) -> Result<Vec<String>> {
    let entries = fs_err::read_dir(dir)?.flatten();
    let names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let index = read_index(&dir.join(INDEX)).unwrap_or_default();
    let mut files = needed(&names, Some(&index)).unwrap_or_default();
    files.retain(|file| dir.join(file).symlink_metadata().is_ok());
    Ok(files)
}

/// Asks for those files of a commit that are not in the cache, or damaged, then fetches them.
fn bring(hub: &Hub<'_>, at: At<'_>, cache: &Repository, files: &[&str]) -> Result<()> {
    check_names(files.iter().copied())?;
    let mut wanted = Vec::new();
    for file in files {
        if cache.condition(at.revision, file, false, hub.progress)? == Condition::Sound {
            continue;
        }
        let metadata = hub.client.metadata(at, file, hub.progress)?;
        if *file == INDEX && metadata.bytes > INDEX_BYTES {
            return Err(Error::input(format!(
                "{INDEX} of {} has {} bytes, and {INDEX_BYTES} are read",
                at.repo, metadata.bytes
            ))
            .hint("choose another --revision"));
        }
        wanted.push(Wanted { file: (*file).to_owned(), metadata, thorough: false });
    }
    download::fetch(hub, at, cache, &wanted)
}

/// Brings the model card, if the repository has one. It names the licence, and nothing else needs it: without it
/// the run goes on with a warning.
fn bring_card(hub: &Hub<'_>, at: At<'_>, cache: &Repository, files: &[String]) -> Result<()> {
    if !files.iter().any(|file| file == CARD) {
        return Ok(());
    }
    match bring(hub, at, cache, &[CARD]) {
        Err(error) if error.kind() != Kind::Interrupted => {
            hub.progress.warn(&format!("{CARD} of {} was not fetched: {error}", at.repo));
            Ok(())
        }
        brought => brought,
    }
}

/// The text of an index.
///
/// # Errors
/// Bad input if it is too long or no text.
fn read_index(path: &Path) -> Result<String> {
    let mut index = String::new();
    if !path.is_file() {
        return Err(Error::input(format!("{} is no file", path.display())));
    }
    let file = fs_err::File::open(path)?;
    file.take(INDEX_BYTES + 1).read_to_string(&mut index).map_err(|error| {
        Error::input(format!("{} cannot be read: {error}", path.display()))
            .hint("choose another --revision")
    })?;
    if index.len() as u64 > INDEX_BYTES {
        return Err(Error::input(format!("{} has over {INDEX_BYTES} bytes", path.display()))
            .hint("choose another --revision"));
    }
    Ok(index)
}

/// Which files of a repository make a checkpoint; `None` if it is `index`, the content of the index of
/// shards, that has to say it. Other forms of the same weights (`.bin`, `.pth`, `consolidated.*`) and
/// directories inside the repository are never among them.
fn needed(files: &[String], index: Option<&str>) -> Option<Vec<String>> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let mut needed: BTreeSet<String> = files
        .iter()
        .filter(|file| !file.contains('/'))
        .filter(|file| ["config.json", "atom.json"].contains(&&***file) || is_side_file(file))
        .cloned()
        .collect();
    // The order in which `Source` and transformers look.
    if has(SINGLE) {
        needed.insert(SINGLE.to_owned());
    } else if has(INDEX) {
        needed.insert(INDEX.to_owned());
        needed.extend(shards(index?));
    } else {
        let plain = |file: &&String| {
            file.ends_with(".safetensors")
                && !file.contains('/')
                && !file.starts_with("consolidated")
        };
        needed.extend(files.iter().filter(plain).cloned());
    }
    Some(needed.into_iter().collect())
}

/// The shards that an index names; none if it is damaged, which is found when it is opened.
fn shards(index: &str) -> BTreeSet<String> {
    let index: serde_json::Value = serde_json::from_str(index).unwrap_or_default();
    let map = index["weight_map"].as_object();
    let shards = map.into_iter().flat_map(|map| map.values());
    shards.filter_map(|shard| shard.as_str().map(str::to_owned)).collect()
}

/// The first file that a commit's directory lacks and a checkpoint cannot do without.
fn absent(dir: &Path) -> Option<String> {
    let lacks = |name: &&str| !dir.join(name).is_file();
    if let Some(name) = ["config.json", "tokenizer.json"].iter().find(|name| lacks(name)) {
        return Some((*name).to_owned());
    }
    if !lacks(&SINGLE) {
        return None;
    }
    if !lacks(&INDEX) {
        let shards = read_index(&dir.join(INDEX)).map(|index| shards(&index)).unwrap_or_default();
        if shards.is_empty() {
            return Some(format!("the shards that {INDEX} should name"));
        }
        return shards.into_iter().find(|shard| lacks(&shard.as_str()));
    }
    let entries = fs_err::read_dir(dir).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    let weights =
        paths.any(|path| path.is_file() && path.extension() == Some("safetensors".as_ref()));
    (!weights).then(|| SINGLE.to_owned())
}

fn not_here(hub: &Hub<'_>, repo: &str, revision: &str, why: Option<Error>) -> Error {
    let download = format!("`hf download {repo} --revision {revision}`");
    let here = format!("{repo} at revision `{revision}` is not whole in the Hub's cache");
    let because = |message: String| match why {
        Some(why) => why.context(message),
        None => Error::machine(message),
    };
    match hub.settings.offline {
        Some(what) if !what.starts_with("atom ") => {
            because(format!("{here}, and {what} keeps it from being fetched"))
                .hint(format!("run once without {what}, or {download} where there is a network"))
        }
        command => {
            let command = command.unwrap_or("this command");
            because(format!("{here}, and {command} fetches nothing"))
                .hint(format!("fetch it with {download}, or by quantizing it"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str]) -> Vec<String> {
        files.iter().map(|file| (*file).to_owned()).collect()
    }

    #[test]
    fn only_one_form_of_the_weights_is_fetched() {
        let files = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "generation_config.json",
            "model.safetensors",
            "onnx/model.safetensors",
            "original/tokenizer.model",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer.model",
            "tf_model.h5",
        ]);
        let wanted = [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer.model",
        ];
        assert_eq!(needed(&files, None).unwrap(), wanted);
    }

    #[test]
    fn shards_are_those_that_the_index_names() {
        let files =
            names(&["config.json", INDEX, "a.safetensors", "b.safetensors", "c.safetensors"]);
        assert_eq!(needed(&files, None), None);
        let index =
            r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        let wanted = ["a.safetensors", "b.safetensors", "config.json", INDEX];
        assert_eq!(needed(&files, Some(index)).unwrap(), wanted);
    }

    #[test]
    fn a_snapshot_is_whole_with_every_shard() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, content: &str| fs_err::write(dir.path().join(name), content).unwrap();
        write("config.json", "{}");
        write("tokenizer.json", "{}");
        assert!(absent(dir.path()).is_some());
        write(INDEX, r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#);
        write("a.safetensors", "");
        assert!(absent(dir.path()).is_some());
        write("b.safetensors", "");
        assert_eq!(absent(dir.path()), None);
        fs_err::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(absent(dir.path()).is_some());
    }
}
