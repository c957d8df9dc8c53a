//! What quantization cost: perplexity before and after, on the same windows.

use std::path::Path;
use std::time::Instant;

use crate::backend::Backend;
use crate::card::{Card, Form, SourceCard};
use crate::checkpoint::{AtomCheckpoint, Source, replace_card};
use crate::eval::{atom_perplexity, source_perplexity};
use crate::machine::peak_rss_bytes;
use crate::pipeline::outcome::{PerplexityChange, QuantizeOutcome, StageSeconds};
use crate::progress::{Progress, Silent};
use crate::text::Evaluation;
use crate::{Error, Result};

/// The outcome with the change of perplexity on `evaluation`, if it is requested, and with its time and memory.
pub(crate) fn with_perplexity<B: Backend>(
    backend: &B,
    source: &Source,
    mut outcome: QuantizeOutcome,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let Some(evaluation) = evaluation else { return Ok(outcome) };
    let start = Instant::now();
    let change = change(backend, source, &outcome.out, evaluation, progress)
        .map_err(|error| not_measured(error, &outcome.out))?;
    if !backend.ranks().is_first() {
        return Ok(outcome);
    }
    write_card(source, &outcome, &change).unwrap_or_else(|error| {
        progress.warn(&format!("the model card lacks the perplexity: {error}"))
    });
    outcome.perplexity = Some(change);
    let seconds = start.elapsed().as_secs_f64();
    outcome.stage_seconds.push(StageSeconds { stage: "evaluate".to_owned(), seconds });
    outcome.seconds += seconds;
    outcome.peak_rss_bytes = peak_rss_bytes();
    outcome.peak_gpu_bytes = backend.peak_bytes();
    Ok(outcome)
}

fn change<B: Backend>(
    backend: &B,
    source: &Source,
    checkpoint: &Path,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityChange> {
    let before = source_perplexity(backend, source, evaluation, progress)?;
    let checkpoint = AtomCheckpoint::open(checkpoint)?;
    let after = atom_perplexity(backend, &checkpoint, evaluation, progress)?;
    Ok(PerplexityChange {
        dataset: evaluation.text.name.clone(),
        windows: before.windows,
        seq_len: evaluation.seq_len,
        before: before.perplexity,
        after: after.perplexity,
    })
}

/// Writes the model card again, with what was measured.
fn write_card(source: &Source, outcome: &QuantizeOutcome, change: &PerplexityChange) -> Result<()> {
    let perplexities = &[change.measured()];
    let manifest = &AtomCheckpoint::open(&outcome.out)?.manifest()?;
    // The run that wrote the checkpoint has warned of a source's card that cannot be read.
    let source = &SourceCard::of(source.readme(), &Silent);
    let form = &Form::atom(manifest);
    let card = Card { manifest, source, bytes: outcome.out_bytes, perplexities, form };
    replace_card(&outcome.out, &card.text()).map(drop)
}

/// An error of the measurement that follows the work: the work is not lost with it.
fn not_measured(error: Error, out: &Path) -> Error {
    let out = out.display();
    error
        .context(format!("the checkpoint {out} is complete, but its perplexity was not measured"))
        .hint(format!("measure it with `atom eval-ppl --model {out}`"))
}
