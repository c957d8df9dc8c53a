//! A sequence: what is asked of it, and what it produces.

use super::sampling::{Choice, Sampler, Sampling, log_probability};
use crate::Result;

/// The name of a sequence in its scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

/// A sequence that is to be decoded.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens to continue, one or more.
    pub prompt: Vec<u32>,
    /// New tokens at most, one or more.
    pub most_new: usize,
    /// Tokens that end the sequence; none where it is as long as `most_new` whatever comes (forced length).
    pub stop: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Whether its keys and values stay for a request that continues it.
    pub keep: bool,
    /// Tokens whose log-probabilities are reported with each new token.
    pub scored: Vec<u32>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a stop token, its last one.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
}

/// A new token of a sequence.
#[derive(Clone, Debug)]
pub struct Produced {
    /// The sequence.
    pub sequence: SequenceId,
    /// Its token.
    pub choice: Choice,
    /// Why it ends with it, if it does.
    pub end: Option<End>,
    /// The log-probabilities that were asked for.
    pub scored: Vec<f64>,
}

/// A sequence that has pages.
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// The prompt and what was produced.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(super) held: usize,
    /// With room for all tokens that it may get.
    pub(super) pages: Vec<u32>,
    pub(super) sampler: Sampler,
    /// Tokens after which it ends.
    pub(super) longest: usize,
    pub(super) stop: Vec<u32>,
    pub(super) keep: bool,
    pub(super) scored: Vec<u32>,
}

impl Sequence {
    /// For a request, with what an earlier one left: its tokens and their pages. What both begin with stays in the cache.
    pub(super) fn new(id: SequenceId, request: Request, kept: Option<Kept>) -> Self {
        let Request { prompt, most_new, stop, sampling, seed, keep, scored } = request;
        let Kept { tokens, held, pages } = kept.unwrap_or_default();
        let common = tokens[..held].iter().zip(&prompt).take_while(|(a, b)| a == b).count();
        Self {
            id,
            // The last token's logits are wanted, so it is always computed.
            held: common.min(prompt.len() - 1),
            pages,
            sampler: Sampler::new(sampling, seed),
            longest: prompt.len() + most_new,
            tokens: prompt,
            stop,
            keep,
            scored,
        }
    }

    /// Tokens that are not in the cache.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.held
    }

    /// Chooses the next token by its logits.
    pub(super) fn produce(&mut self, logits: &[f32]) -> Result<Produced> {
        let choice = self.sampler.choose(logits)?;
        let scored = self.scored.iter().map(|token| log_probability(logits, *token)).collect();
        Ok(self.extend(choice, scored))
    }

    /// Whether it needs nothing of its logits but their argmax.
    pub(super) fn is_greedy(&self) -> bool {
        self.sampler.is_greedy() && self.scored.is_empty()
    }

    /// Takes a token as its next.
    pub(super) fn extend(&mut self, choice: Choice, scored: Vec<f64>) -> Produced {
        self.tokens.push(choice.token);
        let end = if self.stop.contains(&choice.token) {
            Some(End::Stop)
        } else {
            (self.tokens.len() == self.longest).then_some(End::Length)
        };
        Produced { sequence: self.id, choice, end, scored }
    }
}

/// What a sequence leaves for one that continues it.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) tokens: Vec<u32>,
    pub(super) held: usize,
    pub(super) pages: Vec<u32>,
}
