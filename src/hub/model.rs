/*! Models: which files of a repository a checkpoint needs, and a commit's directory that holds them. */

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::cache::Repository;
use super::client::{At, RepoKind, is_commit};
use super::download::{self, Wanted};
use super::{Hub, cache_of};
use crate::checkpoint::is_side_file;
use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model's commit on this machine.
pub(super) struct Snapshot {
    pub(super) dir: PathBuf,
    pub(super) commit: String,
}

/// Brings what a checkpoint needs of a model's revision into the cache.
pub(super) fn fetch(hub: &Hub<'_>, repo: &str, revision: &str) -> Result<Snapshot> {
    let at = At { kind: RepoKind::Model, repo, revision };
    let cache = cache_of(hub, at)?;
    let cached = cache
        .commit(revision)
        .map(|commit| Snapshot { dir: cache.snapshot(&commit), commit })
        .filter(|snapshot| is_whole(&snapshot.dir));
    if is_commit(revision) && cached.is_some() || hub.settings.offline.is_some() {
        return cached.ok_or_else(|| not_here(hub, repo, revision));
    }
    let listing = match hub.client.list(at) {
        Ok(listing) => listing,
        Err(error) => return hub.cached_instead(cached, error),
    };
    let commit = At { revision: &listing.commit, ..at };
    if needed(&listing.files, None).is_none() {
        bring(hub, commit, &cache, [INDEX])?;
    }
    let index = cache.file(&listing.commit, INDEX);
    let index = index.map(fs_err::read_to_string).transpose()?;
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
    bring(hub, commit, &cache, files.iter().map(String::as_str))?;
    cache.note(revision, &listing.commit)?;
    Ok(Snapshot { dir: cache.snapshot(&listing.commit), commit: listing.commit })
}

/// Asks for those files of a commit that are not in the cache, then fetches them.
fn bring<'f>(
    hub: &Hub<'_>,
    at: At<'_>,
    cache: &Repository,
    files: impl IntoIterator<Item = &'f str>,
) -> Result<()> {
    let mut wanted = Vec::new();
    for file in files {
        if cache.file(at.revision, file).is_none() {
            hub.progress.check_stop()?;
            let metadata = hub.client.metadata(at, file)?;
            wanted.push(Wanted { file: file.to_owned(), metadata });
        }
    }
    download::fetch(hub, at, cache, &wanted)
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

/// Whether a commit's directory holds all that a checkpoint cannot do without.
fn is_whole(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).is_file();
    let weights = if has(SINGLE) {
        true
    } else if has(INDEX) {
        let index = fs_err::read_to_string(dir.join(INDEX)).unwrap_or_default();
        let shards = shards(&index);
        !shards.is_empty() && shards.iter().all(|shard| has(shard))
    } else {
        let entries = fs_err::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).any(|path| {
            path.is_file() && path.extension().is_some_and(|extension| extension == "safetensors")
        })
    };
    has("config.json") && has("tokenizer.json") && weights
}

fn not_here(hub: &Hub<'_>, repo: &str, revision: &str) -> Error {
    let download = format!("`hf download {repo} --revision {revision}`");
    let here = format!("{repo} at revision `{revision}` is not whole in the Hub's cache");
    match hub.settings.offline {
        Some(what) if !what.starts_with("atom ") => {
            Error::machine(format!("{here}, and {what} keeps it from being fetched"))
                .hint(format!("run once without {what}, or {download} where there is a network"))
        }
        command => {
            let command = command.unwrap_or("this command");
            Error::machine(format!("{here}, and {command} fetches nothing"))
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
        assert!(!is_whole(dir.path()));
        write(INDEX, r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#);
        write("a.safetensors", "");
        assert!(!is_whole(dir.path()));
        write("b.safetensors", "");
        assert!(is_whole(dir.path()));
        fs_err::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(!is_whole(dir.path()));
    }
}
