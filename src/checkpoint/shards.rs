/*! The safetensors files of a checkpoint, mapped, and where each tensor lies in them.

Everything that can be wrong with the files is found when they are opened, from the headers and
the file lengths alone: no tensor is touched. */

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError};
use serde_json::Value;

use super::dtype::{Dtype, form};
use super::files::{Bytes, Files};
use super::tensor::Tensor;
use crate::{Error, Result};

/// The file that holds all tensors of a checkpoint of one shard.
pub(super) const SINGLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

const DOWNLOAD_AGAIN: &str = "download the file again";

/// One mapped file.
pub(super) struct Shard {
    /// The file's name in its directory.
    pub(super) name: String,
    /// The whole file.
    pub(super) bytes: Bytes,
    /// Where the header ends and the tensors begin, in bytes.
    pub(super) data_start: usize,
    /// Each tensor's bytes in the file, in the file's order.
    pub(super) ranges: Vec<Range<usize>>,
}

struct Location {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// All shards of a checkpoint.
pub(super) struct Shards {
    /// The files, in name order.
    pub(super) files: Vec<Shard>,
    tensors: BTreeMap<String, Location>,
    place: String,
}

impl Shards {
    /// Maps `model.safetensors`, or else the shards that the index names, or else every
    /// `*.safetensors`: the order in which `transformers` looks.
    pub(super) fn open(files: &Files) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new(), place: files.place() };
        if files.contains(SINGLE) {
            shards.add_all(files, &[SINGLE.to_string()])?;
        } else if let Some(index) = files.json(INDEX)? {
            shards.add_indexed(files, &index)?;
        } else {
            let names = files.names()?;
            let (shard_names, rest): (Vec<_>, Vec<_>) =
                names.into_iter().partition(|name| name.ends_with(".safetensors"));
            if shard_names.is_empty() {
                return Err(no_weights(files, &rest));
            }
            shards.add_all(files, &shard_names)?;
        }
        Ok(shards)
    }

    /// Adds whole files; no two of them may hold the same tensor.
    fn add_all(&mut self, files: &Files, names: &[String]) -> Result<()> {
        for name in names {
            for (tensor, location) in self.add(files, name)? {
                if let Some(first) = self.tensors.get(&tensor) {
                    let first = &self.files[first.shard].name;
                    let message = format!(
                        "{} holds tensor `{tensor}` twice: in {first} and in {name}",
                        self.place
                    );
                    return Err(Error::input(message).hint(format!(
                        "remove the files that do not belong to the model, or add {INDEX}"
                    )));
                }
                self.tensors.insert(tensor, location);
            }
        }
        Ok(())
    }

    /// Adds the tensors that the index names, and no others.
    fn add_indexed(&mut self, files: &Files, index: &Value) -> Result<()> {
        let index_path = files.path_of(INDEX);
        let damaged =
            |what: String| Error::input(format!("{index_path} {what}")).hint(DOWNLOAD_AGAIN);
        let map = index["weight_map"]
            .as_object()
            .filter(|map| !map.is_empty())
            .ok_or_else(|| damaged("has no `weight_map` that names tensors".to_string()))?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in map {
            let shard =
                shard.as_str().filter(|name| is_plain_file_name(name)).ok_or_else(|| {
                    damaged(format!("maps tensor `{tensor}` to {shard}, which is no file name"))
                })?;
            by_shard.entry(shard).or_default().push(tensor);
        }
        let missing: Vec<&str> =
            by_shard.keys().copied().filter(|shard| !files.contains(shard)).collect();
        if let Some(first) = missing.first() {
            let message = format!(
                "{} of the {} shards that {index_path} lists are missing, the first is {first}",
                missing.len(),
                by_shard.len()
            );
            return Err(Error::input(message).hint("finish the download, then run again"));
        }
        for (shard, tensors) in by_shard {
            let mut found = self.add(files, shard)?;
            for tensor in tensors {
                let location = found.remove(tensor).ok_or_else(|| {
                    damaged(format!("maps tensor `{tensor}` to {shard}, which does not hold it"))
                })?;
                self.tensors.insert(tensor.to_string(), location);
            }
        }
        Ok(())
    }

    /// Maps one file and reads its header.
    fn add(&mut self, files: &Files, name: &str) -> Result<BTreeMap<String, Location>> {
        let bytes = files.map(name)?;
        let (data_start, metadata) = header(&bytes, &files.path_of(name))?;
        let mut ranges = Vec::new();
        let mut locations = BTreeMap::new();
        for tensor in metadata.offset_keys() {
            let Some(info) = metadata.info(&tensor) else { continue };
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            ranges.push(range.clone());
            let (dtype, shape) = (info.dtype, info.shape.clone());
            locations.insert(tensor, Location { shard: self.files.len(), dtype, shape, range });
        }
        self.files.push(Shard { name: name.to_string(), bytes, data_start, ranges });
        Ok(locations)
    }

    /// The tensor of this name.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let Some((name, location)) = self.tensors.get_key_value(name) else {
            return Err(Error::input(format!("{} has no tensor `{name}`", self.place)).hint(
                "config.json and the weights do not belong together, or the download is incomplete",
            ));
        };
        let dtype = Dtype::from_safetensors(location.dtype).ok_or_else(|| {
            let found = form(&format!("{:?}", location.dtype), &location.shape);
            Error::input(format!("tensor `{name}` is {found}, a type that atom does not read"))
                .hint("convert the checkpoint to F16, BF16 or F32")
        })?;
        let shard = &self.files[location.shard];
        let map = match &shard.bytes {
            Bytes::Mapped { map, .. } => Some(map),
            Bytes::Static(_) => None,
        };
        let bytes = &shard.bytes[location.range.clone()];
        Ok(Tensor { name, dtype, shape: &location.shape, bytes, map })
    }

    /// Whether there is a tensor of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, sorted.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    pub(super) fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|location| location.range.len() as u64).sum()
    }
}

/// Whether `name` stays inside its directory: an index is downloaded text, and must not reach
/// other files.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\'])
}

/// Reads a file's header: where the tensors begin, and what they are.
fn header(bytes: &[u8], path: &str) -> Result<(usize, Metadata)> {
    match SafeTensors::read_metadata(bytes) {
        Ok((length, metadata)) => Ok((8 + length, metadata)),
        Err(_) if bytes.starts_with(b"version https://git-lfs") => {
            Err(Error::input(format!("{path} is a Git LFS pointer, not the weights"))
                .hint("run `git lfs pull` in that directory"))
        }
        Err(error) => Err(match wrong_length(bytes, &error) {
            Some(what) => Error::input(format!("{path} {what}")),
            None => Error::input(format!("{path} has a damaged safetensors header: {error}")),
        }
        .hint(DOWNLOAD_AGAIN)),
    }
}

/// Says how the file's length and its header disagree, if that is what is wrong.
fn wrong_length(bytes: &[u8], error: &SafeTensorError) -> Option<String> {
    let found = bytes.len();
    let length = match bytes.first_chunk() {
        Some(length) => u64::from_le_bytes(*length),
        None => return Some(format!("is truncated: it has {found} bytes, fewer than a header")),
    };
    match error {
        SafeTensorError::InvalidHeaderLength => Some(format!(
            "is truncated: its header alone needs {} bytes, the file has {found}",
            length.saturating_add(8)
        )),
        SafeTensorError::MetadataIncompleteBuffer => {
            let start = 8 + usize::try_from(length).ok()?;
            let metadata: Metadata = serde_json::from_slice(&bytes[8..start]).ok()?;
            let expected = start + metadata.data_len();
            let what = if found < expected { "is truncated" } else { "has a wrong length" };
            Some(format!("{what}: its header describes {expected} bytes, the file has {found}"))
        }
        _ => None,
    }
}

/// Why a directory without safetensors cannot be read.
fn no_weights(files: &Files, names: &[String]) -> Error {
    let place = files.place();
    let bin = names.iter().find(|n| n.starts_with("pytorch_model") && n.ends_with(".bin"));
    match bin {
        Some(bin) => {
            Error::input(format!("{place} holds PyTorch weights ({bin}) and no safetensors")).hint(
                "convert it: python -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('DIR', torch_dtype='auto')\
             .save_pretrained('OUT', safe_serialization=True)\"; \
             then copy tokenizer.json as well",
            )
        }
        None => Error::input(format!("{place} has no *.safetensors"))
            .hint("give --model the directory of a Hugging Face checkpoint with its weights"),
    }
}
