/*! Measurements over any model that can run: perplexity, accuracy on tasks, and integrity. */

mod beginnings;
#[cfg(test)]
mod family_tests;
mod inspect;
mod kernels;
mod likelihood;
mod perplexity;
mod runnable;
mod tasks;
mod verify;

pub use inspect::{CheckpointKind, InspectOutcome, InspectedLinear, inspect};
pub(crate) use kernels::{code_fault, product_error};
pub use perplexity::{PerplexityOutcome, atom_perplexity, source_perplexity, windows};
pub use tasks::{Sample, TaskOutcome, TasksOutcome, check_accuracies, tasks};
pub use verify::{Check, KernelCheck, Limits, VerifyOutcome, verify};

use std::path::Path;

use crate::backend::Backend;
use crate::checkpoint::{AtomCheckpoint, Source, Tensors, is_atom};
use crate::hub::{self, Hub, Resolved};
use crate::model::Architecture;
use crate::pipeline::{Evaluation, caution, network};
use crate::progress::Progress;
use crate::{Error, Result};

/// What can be evaluated.
pub enum Model {
    /// A Hugging Face checkpoint.
    Source(Source),
    /// An Atom checkpoint.
    Atom(AtomCheckpoint),
}

impl Model {
    /// Opens a directory of either kind, or a model by its name.
    pub fn open(hub: &Hub<'_>, model: &str, revision: Option<&str>) -> Result<Self> {
        match hub::resolve(hub, model, revision)? {
            Resolved::Directory(dir) | Resolved::Repository(dir, _) if is_atom(&dir) => {
                Ok(Self::Atom(AtomCheckpoint::open(&dir)?))
            }
            Resolved::Directory(dir) => Ok(Self::Source(Source::open(&dir)?)),
            Resolved::Repository(dir, place) => {
                Ok(Self::Source(Source::open(&dir)?.from_hub(place)))
            }
            Resolved::Bundled => Ok(Self::Source(hub::tiny_llama()?)),
        }
    }

    /// Its directory, unless it is bundled.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            Self::Source(source) => source.dir(),
            Self::Atom(checkpoint) => checkpoint.dir(),
        }
    }
}

/// Perplexity of a model: a source in full precision, an Atom checkpoint on the integer path. Warns of what makes it
/// say little.
pub fn perplexity<B: Backend>(
    backend: &B,
    model: &Model,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityOutcome> {
    let (tensors, architecture): (&dyn Tensors, _) = match model {
        Model::Source(source) => (source, network(source, progress)?.architecture),
        Model::Atom(checkpoint) => {
            (checkpoint, Architecture::read(checkpoint.config(), &checkpoint.config_file())?)
        }
    };
    caution(tensors, &architecture, evaluation.seq_len, progress);
    perplexity_of(backend, model, evaluation, progress)
}

fn perplexity_of<B: Backend>(
    backend: &B,
    model: &Model,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityOutcome> {
    match model {
        Model::Source(source) => source_perplexity(backend, source, evaluation, progress),
        Model::Atom(checkpoint) => atom_perplexity(backend, checkpoint, evaluation, progress),
    }
}

/// Refuses to measure a checkpoint whose configuration, tokenizer or manifest is not what was written: the figures
/// would be another model's.
pub(crate) fn check_files(checkpoint: &AtomCheckpoint) -> Result<()> {
    checkpoint.covered_files().into_iter().try_for_each(|name| {
        checkpoint.verify_file(name).map_err(|error| {
            let hint = error.hint_text().unwrap_or_default().to_owned();
            Error::input(error.to_string()).hint(hint)
        })
    })
}
