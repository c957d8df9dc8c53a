/*! Measurements over any model that can run: perplexity, accuracy on tasks, and integrity. */

mod inspect;
mod integrity;
mod kernels;
mod likelihood;
mod perplexity;
mod prefix_sharing;
mod tasks;
#[cfg(test)]
mod unchanged_tests;
mod verify;

pub use inspect::{CheckpointKind, InspectOutcome, InspectedLinear, inspect};
pub(crate) use kernels::{code_fault, product_error};
pub use perplexity::{PerplexityOutcome, atom_perplexity, source_perplexity};
pub use tasks::{Sample, TaskOutcome, TasksOutcome, check_accuracies, tasks};
pub use verify::{Check, KernelCheck, Limits, Verification, VerifyOutcome, verify};

use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::Tensors;
use crate::model::Architecture;
use crate::network::{Model, caution, network};
use crate::progress::Progress;
use crate::text::Evaluation;

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
