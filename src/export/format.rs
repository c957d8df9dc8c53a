/*! What a format is, and the list of them. */

use std::fmt;

use serde_json::Value;

use super::compressed_tensors::CompressedTensors;
use super::dense::Dense;
use super::gguf::Gguf;
use super::gptq::Gptq;
use super::model::{ExportedModel, Subject};
use super::obstacle::Obstacle;
use crate::Result;
use crate::checkpoint::{TensorBytes, TensorSpec};

/// A format that another program loads.
///
/// To add one: a file with a type that implements this, an entry in [`FORMATS`], its tensors in docs/exports.md with a
/// reader in Python, and tests.
pub trait Format: Sync {
    /// Its name for `--format`.
    fn name(&self) -> &'static str;

    /// Which programs load it, for help and reports: `vLLM, SGLang, transformers`.
    fn loaded_by(&self) -> &'static str;

    /// Built-in recipes whose checkpoints it takes, the best known first; none where it takes all.
    fn recipes(&self) -> &'static [&'static str];

    /// Everything that the format cannot say of such a checkpoint. It depends on the plan alone, so that `atom quantize
    /// --export` can ask before it begins.
    fn obstacles(&self, subject: &Subject<'_>) -> Vec<Obstacle>;

    /// What a user should know of an export of such a checkpoint that is no obstacle: what of the checkpoint is no part
    /// of the export, or which programs cannot load it. A sentence each.
    fn notes(&self, subject: &Subject<'_>) -> Vec<String>;

    /// What the model card says of an export.
    fn published(&self) -> Published;

    /// Everything in the output. No tensor is read here; the closures of the parts read them, one part at a time.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks or has in another form.
    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>>;
}

/// How an export is published and used. `ORG/NAME` stands for its repository.
pub struct Published {
    /// The Hub's `library_name`.
    pub library: &'static str,
    /// Tags for the Hub.
    pub tags: &'static [&'static str],
    /// What a command does, and the command.
    pub usage: &'static [(&'static str, &'static str)],
}

/// The command that loads an export in transformers.
pub(super) const LOAD: (&str, &str) = (
    "Load it in transformers",
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('ORG/NAME')\"",
);

impl fmt::Debug for dyn Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The output of an export.
pub struct Contents<'a> {
    /// Its tensors, in the order they are stored.
    pub parts: Vec<Part<'a>>,
    /// What holds them.
    pub container: Container,
}

/// The files that hold the tensors of an export.
pub enum Container {
    /// A directory of safetensors shards with this `config.json` and the checkpoint's side files: what transformers loads.
    Shards {
        /// The content of `config.json`.
        config: Value,
    },
    /// One file that says everything, next to the licence. Tensors of types that safetensors lacks are U8 `[bytes]`
    /// here, and a long tensor may be several that follow one another.
    File {
        /// The file's name.
        name: String,
        /// Everything before the tensors; it depends on names, types and shapes only.
        header: Vec<u8>,
        /// The first byte of each tensor of the parts, in their order.
        offsets: Vec<u64>,
        /// Length of the file in bytes.
        bytes: u64,
        /// Tensors in the file.
        tensors: usize,
    },
}

/// Tensors that are made together, such as a linear's codes and scales. At most a few parts are in memory at any moment.
pub struct Part<'a> {
    /// Name, type and shape of each tensor.
    pub tensors: Vec<TensorSpec>,
    /// Makes the bytes of the tensors, in the same order. It is called once, from any thread.
    pub make: Box<dyn Fn() -> Result<Vec<TensorBytes<'a>>> + Send + Sync + 'a>,
}

impl Part<'_> {
    /// Bytes of all its tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::bytes).sum()
    }
}

/// All formats, in the order in which help lists them.
pub const FORMATS: &[&dyn Format] = &[&CompressedTensors, &Gptq, &Gguf, &Dense];

/// The format of that name.
pub fn find(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.name() == name)
}
