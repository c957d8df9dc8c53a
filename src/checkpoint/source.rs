/*! A Hugging Face checkpoint as it was published: configuration, tokenizer, weights.

[`Source::open`] does all the checks that need no weights, in milliseconds, so that a long run
does not end hours later at a missing shard. Tensors are asked for by the names that a language
model of transformers gives them, whatever prefix the file has ([`Naming`]). */

use std::borrow::Cow;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use super::atom::is_atom;
use super::dtype::Dtype;
use super::files::Files;
use super::fingerprint::fingerprint;
use super::foreign;
use super::naming::{EMBEDDING, HEAD, Naming, RowRange};
use super::origin::HubOrigin;
use super::pattern::fits;
use super::shards::Shards;
use super::side_files::{self, SideFiles};
use super::tensor::Tensor;
use crate::{Error, Result};

/// An opened source checkpoint. Weights stay in their files until a tensor is converted.
pub struct Source {
    files: Files,
    name: String,
    config: Value,
    /// Whether the configuration is that of the text part of a larger model.
    part: bool,
    shards: Shards,
    naming: Naming,
    ignored: Vec<String>,
    place: Option<HubOrigin>,
    /// Whether the head is a copy of the embedding, once they were compared.
    head_is_embedding: OnceLock<bool>,
}

impl Source {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// Bad input, each with a hint: no such directory, no `config.json`, an adapter or another form of
    /// weights, missing, truncated or damaged shards, a damaged index, an Atom checkpoint.
    pub fn open(dir: &Path) -> Result<Self> {
        let files = Files::directory(dir)?;
        if files.dir().is_some_and(is_atom) {
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
        foreign::refuse_adapter(&files)?;
        let config = files.config()?;
        let shards = Shards::open(&files)?;
        let (config, part) = match text_part(&config) {
            Some(text) => (text, true),
            None => (config, false),
        };
        Ok(Self {
            name: files.name(),
            naming: Naming::of(&shards),
            files,
            config,
            part,
            shards,
            ignored: Vec::new(),
            place: None,
            head_is_embedding: OnceLock::new(),
        })
    }

    /// The same checkpoint, known to come from this place on the Hub.
    pub fn from_hub(self, place: HubOrigin) -> Self {
        Self { place: Some(place), ..self }
    }

    /// The same checkpoint without the tensors whose stored names match one of the patterns, in which
    /// `*` stands for any characters. What the network needs is never ignored.
    pub fn ignoring(self, patterns: Vec<String>) -> Self {
        Self { ignored: patterns, ..self }
    }

    /// The same checkpoint, in which tensors of the network may be ranges of rows of stored ones. Where the file stores
    /// such a tensor by itself, it is that one.
    pub fn with_row_ranges(mut self, ranges: Vec<RowRange>) -> Self {
        self.naming.add_ranges(&self.shards, ranges);
        self
    }

    /// The patterns of ignored tensors.
    pub fn ignored_patterns(&self) -> &[String] {
        &self.ignored
    }

    /// Whether a pattern asks to ignore the tensor stored under this name.
    pub fn ignores(&self, stored: &str) -> bool {
        self.ignored.iter().any(|own| fits(own, stored))
    }

    /// Where on the Hub it came from, if it was named so.
    pub fn place(&self) -> Option<&HubOrigin> {
        self.place.as_ref()
    }

    /// A short name: the directory's, or the bundled model's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The content of `config.json`, an object; of a larger model's the part that describes its text
    /// network.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What messages call its `config.json`: the path, or the bundled model's.
    pub fn config_file(&self) -> String {
        self.files.path_of("config.json")
    }

    /// The directory, unless the checkpoint is bundled.
    pub fn dir(&self) -> Option<&Path> {
        self.files.dir()
    }

    /// Whether the text network is part of a larger model, whose other tensors are nobody's here.
    pub fn is_part(&self) -> bool {
        self.part
    }

    /// What messages call the checkpoint: its directory.
    pub fn title(&self) -> String {
        self.files.place()
    }

    /// The tensor of this name, which must be F16, BF16 or F32.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let tensor = self.shards.tensor(&self.naming.stored(name))?;
        match tensor.dtype {
            Dtype::F16 | Dtype::BF16 | Dtype::F32 => match self.naming.range(name) {
                Some(range) => range.of(tensor),
                None => Ok(tensor),
            },
            other => {
                let message = format!("{} is {other}, not F16, BF16 or F32", tensor.title());
                Err(Error::input(message).hint("give an unquantized checkpoint of the model"))
            }
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shards.contains(&self.naming.stored(name))
    }

    /// Whether the index names a tensor of this name that no shard holds.
    pub fn lacks(&self, name: &str) -> bool {
        self.shards.lacks(&self.naming.stored(name))
    }

    /// The name in the file of the tensor that a language model calls `name`, or of the one that it is a range of.
    pub fn stored_name(&self, name: &str) -> String {
        self.naming.stored(name).into_owned()
    }

    /// The stored names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.names()
    }

    /// Type and shape of the tensor stored under this name as messages show them, and its file's path.
    pub fn described(&self, stored: &str) -> Option<(String, &str)> {
        self.shards.described(stored)
    }

    /// The shape of the tensor stored under this name.
    pub fn shape(&self, stored: &str) -> Option<&[usize]> {
        self.shards.shape(stored)
    }

    /// Whether the tensor stored under this name holds numbers, and every one is zero.
    pub fn is_zero(&self, stored: &str) -> bool {
        let zero = |tensor: Tensor<'_>| {
            let values = tensor.to_f32();
            tensor.release();
            values.is_ok_and(|values| values.iter().all(|value| *value == 0.0))
        };
        self.shards.tensor(stored).is_ok_and(zero)
    }

    /// Whether the stored output head is the embedding again, value by value. It is read once, a part at
    /// a time, and `check_stop` is asked between parts.
    ///
    /// # Errors
    /// As [`Source::tensor`] of both, a NaN or infinity where their types differ, and those of `check_stop`.
    pub fn head_is_embedding(&self, check_stop: &dyn Fn() -> Result<()>) -> Result<bool> {
        if let Some(known) = self.head_is_embedding.get() {
            return Ok(*known);
        }
        let (head, embedding) = (self.tensor(HEAD)?, self.tensor(EMBEDDING)?);
        let same = head.same_values(&embedding, check_stop)?;
        head.release();
        embedding.release();
        Ok(*self.head_is_embedding.get_or_init(|| same))
    }

    /// Refuses an index with entries that its shards do not have.
    pub fn check_index(&self) -> Result<()> {
        self.shards.check_index()
    }

    /// Refuses weights that were written to since the checkpoint was opened: for the end of a run.
    ///
    /// # Errors
    /// Bad input that names the file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.check_unchanged(&self.files)
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

    /// The content of one of its files, if there is one of this name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        self.files.read(name)
    }

    /// What messages call one of its files.
    pub fn path_of(&self, name: &str) -> String {
        self.files.path_of(name)
    }

    /// What a user of the model needs besides configuration and weights: tokenizer, generation
    /// settings, chat template, licence.
    pub fn side_files(&self) -> Result<SideFiles> {
        side_files::find(&self.files)
    }

    /// The content of the model card, if there is one; or why it cannot be read. It is never needed.
    pub fn readme(&self) -> std::result::Result<Option<Vec<u8>>, String> {
        side_files::readme(&self.files)
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

/// The configuration of the text network in that of a larger model, `text_config`.
fn text_part(config: &Value) -> Option<Value> {
    let text = config.get("text_config").filter(|text| text.is_object())?;
    if config.get("num_hidden_layers").is_some() {
        return None;
    }
    let mut text = text.clone();
    for key in ["tie_word_embeddings", "quantization_config"] {
        if let (None, Some(value)) = (text.get(key), config.get(key)) {
            text[key] = value.clone();
        }
    }
    Some(text)
}
