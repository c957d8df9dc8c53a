/*! Log likelihoods of many short texts, all of them carried through the blocks together. */

use super::prefix_sharing::{Batch, batches};
use crate::backend::Backend;
use crate::model::{Architecture, AttentionSpecs};
use crate::network::{OutputHead, Runnable, Stream, prefetch};
use crate::progress::Progress;
use crate::ranks::Collectives;
use crate::text::tasks::ScoredText;
use crate::{Error, Result};

/// What a model says of a text's continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Likelihood {
    /// The sum of its tokens' log likelihoods, in nats; at most 0.
    pub(super) log: f64,
    /// Whether each of its tokens is the argmax there.
    pub(super) greedy: bool,
}

/// The likelihood of each text of each question, and how many tokens were computed for them: a common prefix counts once.
///
/// # Errors
/// Besides the backend's, if a likelihood is not finite.
pub(super) fn likelihoods<B: Backend>(
    model: &Runnable<'_, B>,
    questions: &[Vec<ScoredText>],
    progress: &dyn Progress,
) -> Result<(Vec<Likelihood>, usize)> {
    let Runnable { backend, architecture, .. } = model;
    let batches = batches(questions, |rows, positions| {
        batch_bytes(architecture, rows, positions) >= backend.batch_bytes()
    });
    let own = own_batches(backend.ranks(), &batches);
    let parts = parts(own, backend.stream_bytes() / (4 * architecture.hidden));
    progress.begin(&format!("evaluate {}", model.name), parts.len() * (architecture.blocks + 1));
    let mut found =
        vec![Likelihood { log: f64::NAN, greedy: false }; questions.iter().map(Vec::len).sum()];
    for part in parts {
        score(model, part, &mut found, progress)?;
    }
    progress.end();
    backend.trim();
    share(backend.ranks(), own, &mut found)?;
    if found.iter().any(|likelihood| !likelihood.log.is_finite()) {
        return Err(Error::input(format!("{} gives no finite likelihood", model.name))
            .hint("the weights overflow f32 on these texts: is the checkpoint sound?"));
    }
    Ok((found, batches.iter().map(|batch| batch.tokens.len()).sum()))
}

/// This rank's part of the batches: about as many tokens as the others'.
fn own_batches<'b>(ranks: &dyn Collectives, batches: &'b [Batch]) -> &'b [Batch] {
    let all: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let mut before = 0;
    let mut rank_of = |batch: &Batch| {
        // The rank in whose part the middle of the batch lies.
        let middle = before + batch.tokens.len() / 2;
        before += batch.tokens.len();
        middle * ranks.ranks() / all.max(1)
    };
    let rank_of: Vec<usize> = batches.iter().map(&mut rank_of).collect();
    let first = |rank: usize| rank_of.partition_point(|own| *own < rank);
    &batches[first(ranks.rank())..first(ranks.rank() + 1)]
}

/// Has every rank know what each found of its batches.
fn share(ranks: &dyn Collectives, own: &[Batch], found: &mut [Likelihood]) -> Result<()> {
    let texts = own.iter().flat_map(|batch| &batch.texts).map(|(text, _)| *text);
    let message = texts.flat_map(|text| {
        let Likelihood { log, greedy } = found[text];
        let mut bytes = (text as u64).to_ne_bytes().to_vec();
        bytes.extend(log.to_ne_bytes());
        bytes.push(u8::from(greedy));
        bytes
    });
    let all = ranks.gather_all(message.collect())?.concat();
    for bytes in all.as_chunks::<17>().0 {
        let number = |first: usize| bytes[first..first + 8].try_into().expect("8 bytes");
        let log = f64::from_ne_bytes(number(8));
        found[u64::from_ne_bytes(number(0)) as usize] = Likelihood { log, greedy: bytes[16] == 1 };
    }
    Ok(())
}

/// What activations inside a block take, counted as f32.
fn batch_bytes(architecture: &Architecture, rows: usize, positions: usize) -> usize {
    let heads = (architecture.heads + architecture.kv_heads) * architecture.head_dim;
    let channels = 4 * architecture.hidden + 2 * heads + 2 * architecture.intermediate;
    4 * (rows * channels + positions * 2 * heads)
}

/// Runs of batches whose hidden states fit in memory: of at most `rows` rows, and of one batch at least.
fn parts(mut batches: &[Batch], rows: usize) -> Vec<&[Batch]> {
    let mut parts = Vec::new();
    while !batches.is_empty() {
        let mut sum = 0;
        let fit = batches.iter().take_while(|batch| {
            sum += batch.tokens.len();
            sum <= rows
        });
        let (part, rest) = batches.split_at(fit.count().max(1));
        parts.push(part);
        batches = rest;
    }
    parts
}

/// Carries a part through the blocks, and scores it.
fn score<B: Backend>(
    model: &Runnable<'_, B>,
    part: &[Batch],
    found: &mut [Likelihood],
    progress: &dyn Progress,
) -> Result<()> {
    let Runnable { backend, architecture, tensors, .. } = model;
    let attention: Vec<AttentionSpecs> = part
        .iter()
        .map(|batch| AttentionSpecs::of(architecture, model.kv, batch.seq_len))
        .collect();
    let windows =
        part.iter().map(|batch| batch_bytes(architecture, 0, batch.placement.windows.len()));
    let window_bytes = windows.max().unwrap_or(0) as u64;
    let tokens = part.iter().map(|batch| &batch.tokens[..]);
    let mut stream = Stream::embed_batches(*backend, *tensors, architecture, tokens, window_bytes)?;
    let load = |index| model.load(index);
    prefetch(0..architecture.blocks, load, |index, next| {
        let block = model.block(next()?)?;
        for ((x, batch), attention) in stream.batches.iter_mut().zip(part).zip(&attention) {
            progress.check_stop()?;
            backend.reload(x)?;
            let wanted = (index + 1 == architecture.blocks).then_some(&batch.from[..]);
            block.forward_placed(*backend, attention, &batch.placement, wanted, x)?;
            backend.offload(x)?;
        }
        progress.advance("");
        Ok(())
    })?;
    let head = OutputHead::load(*backend, *tensors, architecture)?;
    for (mut x, batch) in stream.batches.into_iter().zip(part) {
        progress.check_stop()?;
        backend.reload(&mut x)?;
        let normed = head.normed(*backend, &x)?;
        let predictions = backend.predict(&normed, &head.weight, &batch.targets)?;
        for (text, own) in &batch.texts {
            let own = &predictions[own.clone()];
            let nats: f64 = own.iter().map(|prediction| prediction.nats).sum();
            let greedy = own.iter().all(|prediction| prediction.argmax);
            found[*text] = Likelihood { log: -nats, greedy };
        }
    }
    progress.advance("");
    Ok(())
}
