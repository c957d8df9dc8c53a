/*! Training by distillation, end to end: the scales, norms and clip ratios of a finished checkpoint move so that its predictions
come closer to its source's (docs/distillation.md).

The source runs first, block by block, and its last hidden states are kept; then the checkpoint is trained, all of its codes
on the backend. Windows that are held back choose the step that is kept. Codes, orders and every byte count stay. */

mod adam;
mod after;
mod checks;
mod memory;
mod outcome;
mod parameters;
mod prepared;
mod reference;
mod state;
#[cfg(test)]
mod tests;
mod training;
mod windows;
mod writing;

use std::time::Instant;

pub use self::after::{pack_and_distill, quantize_and_distill};
pub use self::checks::check_trainable;
pub use self::outcome::{DistillDryRun, DistillOutcome};
use self::prepared::{Prepared, TrainedState};
use self::training::Course;
pub use self::training::RATES;
use super::output::Output;
use crate::backend::Train;
use crate::checkpoint::{AtomCheckpoint, DistillationRates, Provenance, Source, Writer};
use crate::machine::peak_rss_bytes;
use crate::network::Runnable;
use crate::progress::Progress;
use crate::text::TextSet;
use crate::{Error, Kind, Result};

/// Tokens that are trained on unless told otherwise.
pub const DEFAULT_TOKENS: usize = 100 * TOKENS_PER_STEP;
/// Tokens of a step, as far as the number of windows allows.
const TOKENS_PER_STEP: usize = 8192;
/// Windows of a step, at least and at most: of short windows fewer tokens will do, and more steps are worth more.
const WINDOWS_PER_STEP: [usize; 2] = [4, 8];

/// What is trained, by what, and where the result goes.
pub struct Distillation<'a> {
    /// The checkpoint.
    pub checkpoint: &'a AtomCheckpoint,
    /// What it was made from.
    pub source: &'a Source,
    /// The windows, of which some are held back.
    pub windows: DistillationWindows<'a>,
    /// Tokens that are trained on, those of repeated windows counted again.
    pub tokens: usize,
    /// Learning rates; [`RATES`] where nothing else is known.
    pub rates: DistillationRates,
    /// Where the distilled checkpoint goes.
    pub output: &'a Output,
    /// Whether a checkpoint that gained nothing is written all the same, as it was.
    pub always_writes: bool,
}

/// Where windows come from.
pub enum DistillationWindows<'a> {
    /// As many as are needed, drawn from a text.
    Drawn {
        /// The text.
        text: &'a TextSet,
        /// Tokens of a window.
        seq_len: usize,
        /// Seed of the draw and of the windows' order.
        seed: u64,
    },
    /// Those of a calibration.
    Given {
        /// `[samples, seq_len]`.
        tokens: &'a [u32],
        /// Where they came from.
        provenance: &'a Provenance,
    },
}

/// Trains a checkpoint.
pub fn distill<B: Train>(
    backend: &B,
    distillation: &Distillation<'_>,
    progress: &dyn Progress,
) -> Result<DistillOutcome> {
    let start = Instant::now();
    let prepared = Prepared::new(backend, distillation, progress)?;
    let model = Runnable::atom(backend, distillation.checkpoint)?;
    let writing = prepared.writing(&prepared.manifest.blocks, None, progress);
    let (specs, identity) = (writing.specs()?, prepared.identity(backend)?);
    let destination = prepared.destination();
    let check_stop = || progress.check_stop();
    let options = prepared.options()?;
    let mut writer = Writer::create(&destination, specs, &identity, options, &check_stop)?;
    let trained = prepared.train(backend, &model, &mut writer, progress);
    let TrainedState { parameters, state, resumed_steps, mut step_seconds } = match trained {
        Ok(trained) => trained,
        Err(error) => {
            if writer.state()?.is_none() {
                writer.discard();
            } else if error.kind() != Kind::Interrupted {
                progress.info("the steps that were made are kept; the same command goes on");
            }
            return Err(error);
        }
    };
    distillation.source.check_unchanged()?;
    distillation.checkpoint.check_unchanged()?;
    let record = prepared.record(&state, parameters.count());
    let improved = record.kept_step > 0;
    let (before, after, kept_step) = (record.before, record.after, record.kept_step);
    let mut out = None;
    if improved || distillation.always_writes {
        out = Some(writer.out().to_owned());
        let values = improved.then(|| parameters.values(&state.best));
        prepared.write(writer, values.as_ref(), record, progress)?;
    } else {
        writer.discard();
    }
    let Course { steps, per_step, seq_len, .. } = prepared.course;
    Ok(DistillOutcome {
        out,
        model: distillation.checkpoint.name().to_owned(),
        parameters: parameters.count(),
        steps,
        windows_per_step: per_step,
        seq_len,
        windows: prepared.division.trained.len(),
        held_out_windows: prepared.division.held.len(),
        before,
        after,
        kept_step,
        curve: state.measured.curve,
        resumed_steps,
        seconds: start.elapsed().as_secs_f64(),
        step_seconds: median(&mut step_seconds),
        peak_rss_bytes: peak_rss_bytes(),
        peak_gpu_bytes: backend.peak_bytes(),
        device: backend.device(),
    })
}

/// The middle value, the lower one of two.
fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

/// Everything `distill` would find out before its first product.
pub fn distill_dry_run<B: Train>(
    backend: &B,
    distillation: &Distillation<'_>,
    progress: &dyn Progress,
) -> Result<DistillDryRun> {
    let prepared = Prepared::new(backend, distillation, progress)?;
    Runnable::atom(backend, distillation.checkpoint)?;
    let specs = prepared.writing(&prepared.manifest.blocks, None, progress).specs()?;
    let destination = prepared.destination();
    let identity = prepared.identity(backend)?;
    let found = Writer::preview(&destination, specs, &identity, prepared.options()?)?;
    let Course { steps, per_step, seq_len, .. } = prepared.course;
    Ok(DistillDryRun {
        out: found.out,
        model: distillation.checkpoint.name().to_owned(),
        steps,
        windows_per_step: per_step,
        seq_len,
        windows: prepared.division.trained.len(),
        held_out_windows: prepared.division.held.len(),
        memory_bytes: prepared.memory_bytes(backend),
        needed_disk_bytes: found.needed_bytes,
        resumes: found.needed_bytes == 0,
    })
}

/// The steps of a training on so many tokens, and the windows of each.
///
/// # Errors
/// Usage: there are fewer tokens than a step has.
pub fn course_of(tokens: usize, seq_len: usize) -> Result<(usize, usize)> {
    let [least, most] = WINDOWS_PER_STEP;
    let per_step = TOKENS_PER_STEP.div_ceil(seq_len).clamp(least, most);
    match tokens / (per_step * seq_len) {
        0 => Err(Error::usage(format!(
            "{tokens} tokens are less than a step of distillation, which has {}",
            per_step * seq_len
        ))
        .hint(format!("give {DEFAULT_TOKENS}, or leave the number out"))),
        steps => Ok((steps, per_step)),
    }
}
