/*! What `atom.json` says of the files next to it: the format's version and hashes of every tensor, of every other file and of itself.

The rest of `atom.json` is the manifest, which is read when it is needed. The hash of `atom.json` covers its bytes with
the 64 digits of the hash replaced by zeros, so that any program can compare it. */

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FORMAT_VERSION;
use super::card::{self, CARD};
use super::fingerprint::sha256_hex;
use super::shards::{INDEX, SINGLE};
use super::side_files::is_side_file;
use crate::{Error, Result};

/// The file that makes a directory an Atom checkpoint.
pub(super) const ATOM: &str = "atom.json";

/// The file that makes a directory an export, which other programs read.
pub(super) const EXPORT: &str = "atom-export.json";

/// What a directory that the program writes is. Both kinds have a file that lists and hashes the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectoryKind {
    /// An Atom checkpoint, with `atom.json`.
    #[default]
    Checkpoint,
    /// An Atom checkpoint in another program's format, with `atom-export.json`.
    Export,
}

impl DirectoryKind {
    /// What a directory is that has been written; none where neither file is there.
    pub(super) fn of(dir: &Path) -> Option<Self> {
        [Self::Checkpoint, Self::Export].into_iter().find(|kind| dir.join(kind.record()).is_file())
    }

    /// The file that lists and hashes the rest.
    pub(super) fn record(self) -> &'static str {
        match self {
            Self::Checkpoint => ATOM,
            Self::Export => EXPORT,
        }
    }

    /// What messages call it.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Checkpoint => "an Atom checkpoint",
            Self::Export => "an export of atom",
        }
    }
}

const OWN_HASH: &str = "sha256";
const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// A content's hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hash {
    /// SHA-256, lower-case hexadecimal.
    pub(super) sha256: String,
}

/// The hashes in `atom.json`, next to the [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Envelope {
    /// Of every tensor, by name.
    pub(super) tensors: BTreeMap<String, Hash>,
    /// Of `config.json`, the tokenizer and every other file next to the shards and `atom.json`, by name.
    /// Checkpoints written before there were such hashes have none.
    #[serde(default)]
    pub(super) files: BTreeMap<String, Hash>,
    /// Of `atom.json` itself; likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sha256: Option<String>,
}

impl Envelope {
    /// Reads the content of the `atom.json` at `path`.
    ///
    /// # Errors
    /// Another format version, or fields of other types.
    pub(super) fn read(atom: &Value, path: &str) -> Result<Self> {
        match atom["format_version"].as_u64() {
            Some(FORMAT_VERSION) => {}
            Some(version) if version > FORMAT_VERSION => {
                let message = format!(
                    "{path} has format version {version}, this program reads up to {FORMAT_VERSION}"
                );
                return Err(Error::input(message).hint("use a newer version of atom"));
            }
            _ => {
                let message = format!("{path} has no valid `format_version`");
                return Err(Error::input(message).hint("quantize the model again"));
            }
        }
        let damaged = |what: String| {
            Error::input(format!("{path} {what}"))
                .hint("copy the checkpoint again, all of its files, or quantize the model again")
        };
        if !atom["tensors"].is_object() {
            return Err(damaged("has no `tensors`".to_owned()));
        }
        let envelope =
            Self::deserialize(atom).map_err(|error| damaged(format!("is damaged: {error}")))?;
        let hashes = envelope.tensors.iter().chain(&envelope.files);
        if let Some((name, _)) = hashes.clone().find(|(_, hash)| !is_sha256(&hash.sha256)) {
            return Err(damaged(format!("has no valid SHA-256 of `{name}`")));
        }
        if envelope.sha256.as_deref().is_some_and(|hash| !is_sha256(hash)) {
            return Err(damaged("has no valid SHA-256 of itself".to_owned()));
        }
        Ok(envelope)
    }

    /// Whether there are hashes of `atom.json` and of the files next to the shards.
    pub(super) fn covers_files(&self) -> bool {
        self.sha256.is_some() && !self.files.is_empty()
    }
}

/// The whole `atom.json` or `atom-export.json`.
#[derive(Serialize)]
struct RecordFile<'a, M> {
    #[serde(flatten)]
    manifest: &'a M,
    #[serde(flatten)]
    envelope: &'a Envelope,
}

/// The text of an `atom.json` or `atom-export.json`: the manifest, the hashes, and its own hash as the last field.
pub(super) fn record_text(manifest: &impl Serialize, envelope: &Envelope) -> String {
    let file = RecordFile { manifest, envelope };
    with_own_hash(serde_json::to_value(file).expect("a manifest has only JSON types"))
}

/// The text of an `atom.json` of this content, which gets its own hash as the last field.
fn with_own_hash(mut atom: Value) -> String {
    atom[OWN_HASH] = NO_HASH.into();
    let text = format!("{atom:#}\n");
    let hash = sha256_hex(text.as_bytes());
    let at = text.rfind(NO_HASH).expect("it was written as the last field");
    format!("{}{hash}{}", &text[..at], &text[at + NO_HASH.len()..])
}

/// Whether the text of an `atom.json` has the hash `expected`, which stands in it.
pub(super) fn has_own_hash(text: &[u8], expected: &str) -> bool {
    let at = text.windows(expected.len()).rposition(|window| window == expected.as_bytes());
    at.is_some_and(|at| {
        let mut zeroed = text.to_vec();
        zeroed[at..at + expected.len()].copy_from_slice(NO_HASH.as_bytes());
        sha256_hex(&zeroed) == expected
    })
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether a checkpoint may hold a file of this name.
pub(super) fn is_checkpoint_file(name: &str) -> bool {
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let shard = shard.and_then(|numbers| numbers.split_once("-of-"));
    let number = |text: &str| text.len() >= 5 && text.bytes().all(|b| b.is_ascii_digit());
    [ATOM, EXPORT, CARD, "config.json", SINGLE, INDEX].contains(&name)
        || shard.is_some_and(|(one, all)| number(one) && number(all))
        || is_side_file(name)
        || name.ends_with(".gguf")
}

/// Which files of the checkpoint or export in `dir` are its own: `atom.json` or `atom-export.json`, its shards, a model card
/// that was not edited, and the files that it lists; where it was written before there was such a list, those of the names that
/// a checkpoint's files have.
///
/// # Errors
/// If there is no such file that this program has written.
pub(super) fn own_files(dir: &Path, kind: DirectoryKind) -> Result<impl Fn(&str) -> bool + use<>> {
    let record = kind.record();
    let json = |name: &str| -> Result<Value> {
        let path = dir.join(name);
        serde_json::from_slice(&fs_err::read(&path)?)
            .map_err(|error| Error::input(format!("{} is not valid JSON: {error}", path.display())))
    };
    let content = json(record)?;
    let Envelope { files, .. } = Envelope::read(&content, &dir.join(record).display().to_string())?;
    // A format of one file names it.
    let single = content["file"].as_str().filter(|name| name.ends_with(".gguf")).unwrap_or(SINGLE);
    let mut shards = BTreeSet::from([single.to_owned()]);
    if dir.join(INDEX).is_file() {
        let index = json(INDEX)?;
        let map = index["weight_map"].as_object();
        let named = map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
        shards = named.map(str::to_owned).chain([INDEX.to_owned()]).collect();
    }
    let card_is_own = card::is_as_written(&dir.join(CARD));
    Ok(move |name: &str| {
        let listed = match files.is_empty() {
            true => name == "config.json" || is_side_file(name),
            false => files.contains_key(name),
        };
        name == record || shards.contains(name) || listed || name == CARD && card_is_own
    })
}

#[cfg(test)]
#[path = "envelope_tests.rs"]
mod tests;
