/*! The safetensors files of a checkpoint, mapped, and where each tensor lies in them.

Everything that can be wrong with the files is found when they are opened, from the headers and
the file lengths alone: no tensor is touched. What an index says of tensors that are not there is
an error only where such a tensor is asked for. */

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError};
use serde_json::Value;

use super::dtype::{Dtype, form};
use super::files::{Bytes, Files, Stamp, is_plain_file_name};
use super::foreign;
use super::tensor::Tensor;
use crate::{Error, Result};

/// The file that holds all tensors of a checkpoint of one shard.
pub(super) const SINGLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The longest header that is read, in bytes: that of the largest models has some 10 MB, and the Hub
/// refuses more than 25 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;

const DOWNLOAD_AGAIN: &str = "download the file again";

/// One mapped file.
pub(super) struct Shard {
    /// The file's name in its directory.
    pub(super) name: String,
    /// What messages call it: its path.
    path: String,
    /// As it was when it was opened.
    stamp: Option<Stamp>,
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
    /// Tensors that the index maps to a file that does not hold them, with the error that says so.
    absent: BTreeMap<String, Absent>,
    place: String,
}

/// Why a tensor of the index is not there.
#[derive(Clone)]
struct Absent {
    message: String,
    hint: String,
}

impl Absent {
    fn error(&self) -> Error {
        Error::input(self.message.clone()).hint(self.hint.clone())
    }
}

impl Shards {
    /// Maps `model.safetensors`, or else the shards that the index names, or else every
    /// `*.safetensors`: the order in which `transformers` looks.
    pub(super) fn open(files: &Files) -> Result<Self> {
        let (tensors, absent) = (BTreeMap::new(), BTreeMap::new());
        let mut shards = Self { files: Vec::new(), tensors, absent, place: files.place() };
        if files.contains(SINGLE) {
            shards.add_all(files, &[SINGLE.to_string()])?;
        } else if let Some(index) = files.json(INDEX)? {
            shards.add_indexed(files, &index)?;
        } else {
            foreign::refuse_dangling(files)?;
            let names = files.names()?;
            let mut names: Vec<String> =
                names.into_iter().filter(|name| name.ends_with(".safetensors")).collect();
            // The same weights in Meta's or Mistral's form lie next to those of transformers.
            let consolidated = |name: &String| name.starts_with("consolidated");
            if !names.iter().all(consolidated) {
                names.retain(|name| !consolidated(name));
            }
            if names.is_empty() {
                return Err(foreign::without_weights(files));
            }
            shards.add_all(files, &names)?;
        }
        Ok(shards)
    }

    /// Refuses an index with entries that its shards do not have.
    pub(super) fn check_index(&self) -> Result<()> {
        self.absent.values().next().map_or(Ok(()), |absent| Err(absent.error()))
    }

    /// Refuses shards that were written to since they were opened.
    pub(super) fn check_unchanged(&self, files: &Files) -> Result<()> {
        for shard in &self.files {
            if files.stamp(&shard.name)? != shard.stamp {
                return Err(Error::input(format!("{} changed during the run", shard.path)).hint(
                    "what was computed mixes two versions of the weights: run again once nothing \
                     writes to the model's directory",
                ));
            }
        }
        Ok(())
    }

    /// Adds whole files; no two of them may hold the same tensor.
    fn add_all(&mut self, files: &Files, names: &[String]) -> Result<()> {
        for name in names {
            for (tensor, location) in self.add(files, name)? {
                self.insert(tensor, location)?;
            }
        }
        Ok(())
    }

    /// Adds the shards that the index names, with every tensor that they hold, as transformers reads
    /// them; where two shards hold a tensor, the index says which is meant.
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
        let total = by_shard.len();
        let (present, missing): (BTreeMap<_, _>, BTreeMap<_, _>) =
            by_shard.into_iter().partition(|(shard, _)| files.contains(shard));
        if present.is_empty() {
            return Err(missing_shards(files, missing.keys().copied(), total).error());
        }
        let why = missing_shards(files, missing.keys().copied(), total);
        let lost = missing.into_values().flatten();
        self.absent.extend(lost.map(|tensor| (tensor.to_owned(), why.clone())));
        let mut unlisted = Vec::new();
        for (shard, tensors) in present {
            let mut found = self.add(files, shard)?;
            for tensor in tensors {
                if let Some(location) = found.remove(tensor) {
                    self.tensors.insert(tensor.to_string(), location);
                    continue;
                }
                let message = format!(
                    "{index_path} maps tensor `{tensor}` to {shard}, which does not hold it"
                );
                let absent = Absent { message, hint: DOWNLOAD_AGAIN.to_owned() };
                self.absent.insert(tensor.to_owned(), absent);
            }
            unlisted.extend(found);
        }
        for (tensor, location) in unlisted {
            if !map.contains_key(&tensor) {
                self.insert(tensor, location)?;
            }
        }
        Ok(())
    }

    /// Adds a tensor that no other file may hold.
    fn insert(&mut self, tensor: String, location: Location) -> Result<()> {
        if let Some(first) = self.tensors.get(&tensor) {
            let (first, second) = (&self.files[first.shard].name, &self.files[location.shard].name);
            let message =
                format!("{} holds tensor `{tensor}` twice: in {first} and in {second}", self.place);
            return Err(Error::input(message).hint(format!(
                "remove the files that do not belong to the model, or add {INDEX}"
            )));
        }
        self.tensors.insert(tensor, location);
        Ok(())
    }

    /// Maps one file and reads its header.
    fn add(&mut self, files: &Files, name: &str) -> Result<BTreeMap<String, Location>> {
        let stamp = files.stamp(name)?;
        let bytes = files.map(name)?;
        let path = files.path_of(name);
        let (data_start, metadata) = header(&bytes, &path)?;
        let mut ranges = Vec::new();
        let mut locations = BTreeMap::new();
        for tensor in metadata.offset_keys() {
            let Some(info) = metadata.info(&tensor) else { continue };
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            ranges.push(range.clone());
            let (dtype, shape) = (info.dtype, info.shape.clone());
            locations.insert(tensor, Location { shard: self.files.len(), dtype, shape, range });
        }
        self.files.push(Shard { name: name.to_string(), path, stamp, bytes, data_start, ranges });
        Ok(locations)
    }

    /// The tensor of this name.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let Some((name, location)) = self.tensors.get_key_value(name) else {
            let absent = || {
                Error::input(format!("{} has no tensor `{name}`", self.place)).hint(
                    "take the config.json that was published with the weights, and all shards",
                )
            };
            return Err(self.absent.get(name).map_or_else(absent, Absent::error));
        };
        let shard = &self.files[location.shard];
        let dtype = Dtype::from_safetensors(location.dtype).ok_or_else(|| {
            let found = form(&format!("{:?}", location.dtype), &location.shape);
            let message = format!(
                "tensor `{name}` of {} is {found}, a type that atom does not read",
                shard.path
            );
            Error::input(message).hint("convert the checkpoint to F16, BF16 or F32")
        })?;
        let map = match &shard.bytes {
            Bytes::Mapped { map, .. } => Some(map),
            Bytes::Static(_) => None,
        };
        let bytes = &shard.bytes[location.range.clone()];
        let shape = &location.shape;
        Ok(Tensor { name, dtype, shape, bytes, file: &shard.path, map, first_row: 0 })
    }

    /// Whether the index names a tensor that is not there.
    pub(super) fn lacks(&self, name: &str) -> bool {
        self.absent.contains_key(name)
    }

    /// Type and shape of a tensor as messages show them, and the path of its file.
    pub(super) fn described(&self, name: &str) -> Option<(String, &str)> {
        let location = self.tensors.get(name)?;
        let dtype = format!("{:?}", location.dtype);
        Some((form(&dtype, &location.shape), &self.files[location.shard].path))
    }

    /// The shape of a tensor of any type.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|location| &location.shape[..])
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

/// Shards of the index that are not there.
fn missing_shards<'a>(
    files: &Files,
    missing: impl ExactSizeIterator<Item = &'a str>,
    total: usize,
) -> Absent {
    let count = missing.len();
    let names: Vec<&str> = missing.collect();
    let first = names.first().copied().unwrap_or_default();
    let mut message = format!(
        "{count} of the {total} shards that {} lists are missing, the first is {first}",
        files.path_of(INDEX)
    );
    // A link to nothing, or a directory: its own error says so.
    let why =
        files.dir().map(|dir| dir.join(first)).filter(|path| path.is_symlink() || path.exists());
    match why.and_then(|path| super::regular::open(&path).err()) {
        None => Absent { message, hint: "finish the download, then run again".to_owned() },
        Some(error) => {
            message.push_str(&format!(": {error}"));
            Absent { message, hint: error.hint_text().unwrap_or_default().to_owned() }
        }
    }
}

/// Reads a file's header: where the tensors begin, and what they are.
fn header(bytes: &[u8], path: &str) -> Result<(usize, Metadata)> {
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    if length > MAX_HEADER_BYTES && length < bytes.len() as u64 {
        return Err(Error::input(format!(
            "{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}"
        ))
        .hint(DOWNLOAD_AGAIN));
    }
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
