/*! Which tensor goes where: the shards of a checkpoint, planned before any tensor exists.

All shapes are known from the configuration and the recipe, so the headers can be written first
and every tensor goes straight to its place, in whatever order the blocks are finished. */

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::dtype::TensorSpec;
use super::shards::SINGLE;
use crate::{Error, Result};

/// What an output's tensors are stored in.
pub enum TensorFiles {
    /// Shards of safetensors, filled in this order.
    Shards(Vec<TensorSpec>),
    /// One file of another format.
    Single(SingleFile),
}

/// One file of another format than safetensors.
pub struct SingleFile {
    /// Its name in the output's directory.
    pub name: String,
    /// Everything before the tensors.
    pub header: Vec<u8>,
    /// Each tensor, or part of one, with its first byte in the file. What lies between them is zero.
    pub tensors: Vec<(TensorSpec, u64)>,
    /// Length of the file in bytes.
    pub bytes: u64,
}

impl From<Vec<TensorSpec>> for TensorFiles {
    fn from(specs: Vec<TensorSpec>) -> Self {
        Self::Shards(specs)
    }
}

impl TensorFiles {
    /// All tensors, in the order they are stored.
    pub fn specs(&self) -> Box<dyn Iterator<Item = &TensorSpec> + '_> {
        match self {
            Self::Shards(specs) => Box::new(specs.iter()),
            Self::Single(file) => Box::new(file.tensors.iter().map(|(spec, _)| spec)),
        }
    }
}

/// One file to be written.
pub(super) struct ShardPlan {
    /// The file's name.
    pub(super) name: String,
    /// The 8 length bytes and the header.
    pub(super) header: Vec<u8>,
    /// Bytes of the whole file.
    pub(super) file_bytes: u64,
}

/// Where one tensor goes.
pub(super) struct Place {
    /// Index into [`Layout::shards`].
    pub(super) shard: usize,
    /// First byte in the file.
    pub(super) offset: u64,
    /// What it is.
    pub(super) spec: TensorSpec,
}

/// The shards of a checkpoint and the place of each tensor.
pub(super) struct Layout {
    pub(super) shards: Vec<ShardPlan>,
    pub(super) places: HashMap<String, Place>,
}

impl Layout {
    /// Fills shards of at most `max_shard_bytes` of tensors in the given order; a tensor larger
    /// than that gets a shard of its own.
    pub(super) fn new(files: impl Into<TensorFiles>, max_shard_bytes: u64) -> Result<Self> {
        let specs = match files.into() {
            TensorFiles::Shards(specs) => specs,
            TensorFiles::Single(file) => return Self::single(file),
        };
        let mut shards: Vec<Vec<TensorSpec>> = Vec::new();
        let mut filled = u64::MAX;
        for spec in specs {
            let bytes = spec.bytes();
            if filled.saturating_add(bytes) > max_shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled = filled.saturating_add(bytes);
            if let Some(shard) = shards.last_mut() {
                shard.push(spec);
            }
        }
        let count = shards.len();
        let mut layout = Self { shards: Vec::new(), places: HashMap::new() };
        for (index, mut shard) in shards.into_iter().enumerate() {
            // The widest elements first (a stable sort): then every tensor starts at a multiple
            // of its element size, as the format's own writer has it, and can be used in place.
            shard.sort_by_key(|spec| Reverse(spec.dtype.size_bytes()));
            let name = if count == 1 {
                SINGLE.to_string()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", index + 1)
            };
            layout.add(name, shard)?;
        }
        Ok(layout)
    }

    fn single(file: SingleFile) -> Result<Self> {
        let SingleFile { name, header, tensors, bytes } = file;
        let mut layout = Self { shards: Vec::new(), places: HashMap::new() };
        tensors.into_iter().try_for_each(|(spec, offset)| layout.place(spec, offset))?;
        layout.shards.push(ShardPlan { name, header, file_bytes: bytes });
        Ok(layout)
    }

    /// Gives a tensor its place in the next shard.
    fn place(&mut self, spec: TensorSpec, offset: u64) -> Result<()> {
        let place = Place { shard: self.shards.len(), offset, spec };
        match self.places.insert(place.spec.name.clone(), place) {
            None => Ok(()),
            Some(twice) => {
                Err(Error::input(format!("tensor `{}` is planned twice", twice.spec.name)))
            }
        }
    }

    fn add(&mut self, name: String, specs: Vec<TensorSpec>) -> Result<()> {
        let header = header(&specs)?;
        let mut offset = header.len() as u64;
        for spec in specs {
            let bytes = spec.bytes();
            self.place(spec, offset)?;
            offset = offset.saturating_add(bytes);
        }
        self.shards.push(ShardPlan { name, header, file_bytes: offset });
        Ok(())
    }

    /// Bytes of all shards.
    pub(super) fn file_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.file_bytes))
    }

    /// The index of several shards; `None` for a single one, which needs no index.
    pub(super) fn index(&self) -> Option<Value> {
        if self.shards.len() == 1 {
            return None;
        }
        let mut names: Vec<&String> = self.places.keys().collect();
        names.sort();
        let total: u64 = self.places.values().map(|place| place.spec.bytes()).sum();
        let weight_map: Map<String, Value> = names
            .into_iter()
            .map(|name| {
                let shard = self.places[name].shard;
                (name.clone(), Value::from(self.shards[shard].name.as_str()))
            })
            .collect();
        Some(json!({ "metadata": { "total_size": total }, "weight_map": weight_map }))
    }
}

/// The length bytes and the header, padded with spaces so that the tensors begin at a multiple of
/// 8. Its bytes depend on nothing but `specs`.
fn header(specs: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_string(), json!({ "format": "pt" }));
    let mut offset = 0u64;
    for spec in specs {
        let end = offset.saturating_add(spec.bytes());
        let entry = json!({
            "dtype": spec.dtype.name(),
            "shape": spec.shape,
            "data_offsets": [offset, end],
        });
        if entries.insert(spec.name.clone(), entry).is_some() {
            return Err(Error::input(format!("tensor `{}` is planned twice", spec.name)));
        }
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
