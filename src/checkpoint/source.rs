/*! A Hugging Face checkpoint as it was published: configuration, tokenizer, weights.

[`Source::open`] does all the checks that need no weights, in milliseconds, so that a long run
does not end hours later at a missing shard. */

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use super::atom::is_atom;
use super::dtype::Dtype;
use super::files::Files;
use super::fingerprint::fingerprint;
use super::shards::Shards;
use super::tensor::Tensor;
use crate::hub::Place;
use crate::{Error, Result};

/// An opened source checkpoint. Weights stay in their files until a tensor is converted.
pub struct Source {
    files: Files,
    name: String,
    config: Value,
    shards: Shards,
    place: Option<Place>,
}

impl Source {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// Bad input, each with a hint: no such directory, no `config.json`, PyTorch weights only,
    /// missing, truncated or damaged shards, an index that does not fit them, an Atom checkpoint.
    pub fn open(dir: &Path) -> Result<Self> {
        let files = Files::directory(dir)?;
        if is_atom(dir) {
            let message = format!("{} is an Atom checkpoint, already quantized", dir.display());
            return Err(Error::input(message).hint("give the checkpoint that it was made from"));
        }
        Self::from_files(files)
    }

    /// Opens a checkpoint that is part of the program: `(file name, bytes)` for each of its files.
    pub fn embedded(
        name: &'static str,
        files: &'static [(&'static str, &'static [u8])],
    ) -> Result<Self> {
        Self::from_files(Files::Embedded { name, files })
    }

    fn from_files(files: Files) -> Result<Self> {
        let config = files.config()?;
        let shards = Shards::open(&files)?;
        Ok(Self { name: files.name(), files, config, shards, place: None })
    }

    /// The same checkpoint, known to come from this place on the Hub.
    pub fn from_hub(self, place: Place) -> Self {
        Self { place: Some(place), ..self }
    }

    /// Where on the Hub it came from, if it was named so.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// A short name: the directory's, or the bundled model's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The content of `config.json`, an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The directory, unless the checkpoint is bundled.
    pub fn dir(&self) -> Option<&Path> {
        self.files.dir()
    }

    /// The tensor of this name, which must be F16, BF16 or F32.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let tensor = self.shards.tensor(name)?;
        match tensor.dtype {
            Dtype::F16 | Dtype::BF16 | Dtype::F32 => Ok(tensor),
            other => Err(Error::input(format!(
                "tensor `{name}` of {} is {other}, not F16, BF16 or F32",
                self.files.place()
            ))
            .hint("give an unquantized checkpoint of the model")),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shards.contains(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.shards.total_bytes()
    }

    /// The content of `tokenizer.json`; without that file an error that says how to get it.
    pub fn tokenizer(&self) -> Result<Cow<'_, [u8]>> {
        self.files.tokenizer()
    }

    /// What errors call the file that [`Source::tokenizer`] reads.
    pub fn tokenizer_path(&self) -> String {
        self.files.path_of("tokenizer.json")
    }

    /// What a user of the model needs besides configuration and weights: tokenizer, generation
    /// settings, chat template, licence. `(file name, content)`, sorted by name.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut side_files = Vec::new();
        for name in self.files.names()?.into_iter().filter(|name| is_side_file(name)) {
            if let Some(content) = self.files.read(&name)? {
                side_files.push((name, content.into_owned()));
            }
        }
        Ok(side_files)
    }

    /// A SHA-256 in hexadecimal that tells this checkpoint from others without reading all of
    /// it: over `config.json`, `tokenizer.json`, and of each shard in name order its name, its
    /// length, its header, and the first and last 4 KiB of each tensor.
    pub fn fingerprint(&self) -> Result<String> {
        let config = self.files.read("config.json")?.unwrap_or_default();
        let tokenizer = self.files.read("tokenizer.json")?;
        Ok(fingerprint(&config, tokenizer.as_deref(), &self.shards.files))
    }
}

/// Whether a user of the model needs this file besides configuration and weights.
pub(crate) fn is_side_file(name: &str) -> bool {
    const NAMES: [&str; 5] = [
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ];
    const PREFIXES: [&str; 5] = ["tokenizer", "chat_template", "LICENSE", "NOTICE", "USE_POLICY"];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}
