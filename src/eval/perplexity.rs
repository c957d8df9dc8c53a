/*! Perplexity by the reference's protocol (eval.py `llama_eval`): the text tokenized once, windows that
do not overlap, the tail dropped, each window on its own; the mean over windows of each window's mean
negative log likelihood of its tokens but the first, exponentiated. */

use std::time::Instant;

use serde::Serialize;

use crate::backend::{Backend, Tensor};
use crate::checkpoint::{AtomCheckpoint, Source, sha256_hex};
use crate::machine::cpu_seconds;
use crate::model::AttentionSpecs;
use crate::network::memory::Windows;
use crate::network::{OutputHead, Runnable, Stream, prefetch};
use crate::progress::Progress;
use crate::ranks::Collectives;
use crate::text::Evaluation;
use crate::{Error, Result};

/// The result of `atom eval-ppl`.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityOutcome {
    /// Name of the model.
    pub model: String,
    /// Name of the text set.
    pub dataset: String,
    /// `exp` of the mean negative log likelihood of a token.
    pub perplexity: f64,
    /// Standard error of the estimate, from the spread of the windows' means; NaN (in JSON `null`)
    /// for a single window, which has none.
    pub standard_error: f64,
    /// Windows measured.
    pub windows: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Tokens in all windows.
    pub tokens: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// `tokens / seconds`.
    pub tokens_per_second: f64,
    /// CPU seconds of the process in the meantime.
    pub cpu_seconds: f64,
    /// What it ran on.
    pub device: String,
}

/// Perplexity of a source checkpoint in full precision.
pub fn source_perplexity<B: Backend>(
    backend: &B,
    source: &Source,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityOutcome> {
    let tokens = evaluation.tokens(&source.tokenizer()?, &source.tokenizer_path(), progress)?;
    Run { model: Runnable::source(backend, source, progress)?, evaluation, progress }
        .measure(&tokens)
}

/// Perplexity of an Atom checkpoint on the integer path.
pub fn atom_perplexity<B: Backend>(
    backend: &B,
    checkpoint: &AtomCheckpoint,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityOutcome> {
    let model = Runnable::atom(backend, checkpoint)?;
    let tokens =
        evaluation.tokens(&checkpoint.tokenizer()?, &checkpoint.tokenizer_path(), progress)?;
    Run { model, evaluation, progress }.measure(&tokens)
}

/// Refuses ranks that would measure on other tokens than the first.
fn agree(ranks: &dyn Collectives, tokens: &[u32]) -> Result<()> {
    let hash = sha256_hex(bytemuck::cast_slice(tokens));
    let first = ranks.broadcast(0, hash.clone().into_bytes())?;
    if first == hash.as_bytes() {
        return Ok(());
    }
    let rank = ranks.rank();
    let first = String::from_utf8_lossy(&first);
    Err(Error::input(format!(
        "rank {rank} has other tokens to measure on than rank 0: their SHA-256 is {hash} and not {first}"
    ))
    .hint("give all ranks the same model, text and settings"))
}

/// This rank's part of the tokens, in entire batches.
fn own_tokens<'t>(ranks: &dyn Collectives, tokens: &'t [u32], batch: usize) -> &'t [u32] {
    let batches = tokens.len().div_ceil(batch);
    let first = |rank: usize| (rank * batches / ranks.ranks() * batch).min(tokens.len());
    &tokens[first(ranks.rank())..first(ranks.rank() + 1)]
}

struct Run<'a, B: Backend> {
    model: Runnable<'a, B>,
    evaluation: &'a Evaluation,
    progress: &'a dyn Progress,
}

impl<B: Backend> Run<'_, B> {
    /// Streams the windows through the blocks, in parts whose hidden states fit in memory.
    fn measure(&self, tokens: &[u32]) -> Result<PerplexityOutcome> {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let Self { model, progress, .. } = self;
        let Runnable { backend, architecture, name, .. } = model;
        let seq_len = self.evaluation.seq_len;
        // The memory of the text is free before that of the blocks is taken.
        backend.trim();
        model.check_memory(Windows { tokens: tokens.len(), seq_len }, *progress)?;
        agree(backend.ranks(), tokens)?;
        let attention = AttentionSpecs::of(architecture, model.kv, seq_len);
        let window_bytes = 4 * seq_len * architecture.hidden;
        // Of entire batches, so that these are the same for any number of ranks.
        let batch = Stream::batch_windows(*backend, architecture, seq_len);
        let part = (backend.stream_bytes() / window_bytes / batch).max(1) * batch * seq_len;
        let own = own_tokens(backend.ranks(), tokens, batch * seq_len);
        let parts = own.len().div_ceil(part);
        progress.begin(&format!("evaluate {name}"), parts * (architecture.blocks + 1));
        let mut means = Vec::with_capacity(own.len() / seq_len);
        for tokens in own.chunks(part) {
            let mut stream =
                Stream::embed(*backend, model.tensors, architecture, tokens, seq_len, 0)?;
            let load = |index| model.load(index);
            prefetch(0..architecture.blocks, load, |_, next| {
                let block = model.block(next()?)?;
                stream.advance(*backend, &attention, &block, || progress.check_stop())?;
                progress.advance("");
                Ok(())
            })?;
            // The memory of the blocks is free before that of the head is taken.
            backend.trim();
            self.window_means(stream, tokens, &mut means)?;
            progress.advance("");
        }
        progress.end();
        backend.trim();
        model.tensors.check_unchanged()?;
        let means = backend.ranks().gather_all(bytemuck::cast_slice(&means).to_vec())?.concat();
        let means: Vec<f64> =
            means.as_chunks().0.iter().map(|bytes| f64::from_ne_bytes(*bytes)).collect();
        if let Some(window) = means.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::input(format!(
                "{name} gives no finite loss on window {window} of {}",
                self.evaluation.text.name
            ))
            .hint("the weights overflow f32 on this text: is the checkpoint sound?"));
        }
        let windows = means.len() as f64;
        let mean = means.iter().sum::<f64>() / windows;
        self.warn_of_guessing(mean.exp());
        let variance =
            means.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / (windows - 1.0);
        let seconds = start.elapsed().as_secs_f64();
        Ok(PerplexityOutcome {
            model: (*name).to_owned(),
            dataset: self.evaluation.text.name.clone(),
            perplexity: mean.exp(),
            standard_error: mean.exp() * (variance / windows).sqrt(),
            windows: means.len(),
            seq_len,
            tokens: tokens.len(),
            seconds,
            tokens_per_second: tokens.len() as f64 / seconds,
            cpu_seconds: cpu_seconds() - cpu_start,
            device: backend.device(),
        })
    }

    /// Warns of a perplexity that equal chances for all tokens would have, but for rounding, or of a worse one.
    fn warn_of_guessing(&self, perplexity: f64) {
        let vocabulary = self.model.architecture.vocabulary;
        if perplexity >= 0.999 * vocabulary as f64 {
            self.progress.warn(&format!(
                "{} has a perplexity of {perplexity:.2}, no better than guessing among the {vocabulary} tokens of its \
                 vocabulary: do weights, config.json and tokenizer belong together?",
                self.model.name
            ));
        }
    }

    /// Final norm, output head and cross entropy: each window's mean loss.
    fn window_means(&self, stream: Stream<B>, tokens: &[u32], means: &mut Vec<f64>) -> Result<()> {
        let Runnable { backend, architecture, tensors, .. } = &self.model;
        let seq_len = self.evaluation.seq_len;
        let head = OutputHead::load(*backend, *tensors, architecture)?;
        let mut first = 0;
        for mut batch in stream.batches {
            self.progress.check_stop()?;
            backend.reload(&mut batch)?;
            let normed = head.normed(*backend, &batch)?;
            drop(batch);
            let end = first + normed.rows();
            let losses =
                backend.cross_entropy(&normed, &head.weight, &tokens[first..end], seq_len)?;
            means.extend(
                losses
                    .chunks(seq_len - 1)
                    .map(|window| window.iter().sum::<f64>() / window.len() as f64),
            );
            first = end;
        }
        Ok(())
    }
}
