/*! Continuous batching: in each step newcomers' prompts pass the network together with one token of each sequence that is
being decoded.

A sequence is admitted, first come, first served, when pages for all the tokens that it may get are free, so none is ever
put out again. A step takes `step_tokens` tokens at most: decoding sequences come first, and a prompt that does not fit into
the rest goes on in the next step. */

use std::collections::{HashMap, VecDeque};

use super::pages::Pages;
use super::sampling::Choice;
use super::sequence::{Kept, Produced, Request, Sequence, SequenceId};
use crate::backend::{Backend, Decode, DecodeStep, GreedyToken, SequenceStep};
use crate::network::{Caches, Decoder};
use crate::{Error, Result};

/// What a scheduler may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences in a step at most.
    pub batch: usize,
    /// Tokens in a step at most.
    pub step_tokens: usize,
    /// Tokens of a sequence at most.
    pub longest: usize,
    /// Pages of the cache.
    pub pages: usize,
}

/// Decodes sequences.
pub struct Scheduler<'a, 'm, B: Backend + Decode> {
    decoder: &'a Decoder<'m, B>,
    caches: Caches<B>,
    pages: Pages,
    limits: Limits,
    queue: VecDeque<Sequence>,
    running: Vec<Sequence>,
    kept: HashMap<SequenceId, Kept>,
    next_id: u64,
}

impl<'a, 'm, B: Backend + Decode> Scheduler<'a, 'm, B> {
    /// An idle scheduler with caches of its own.
    ///
    /// # Errors
    /// Memory does not suffice, or the backend has no cache for the network.
    pub fn new(decoder: &'a Decoder<'m, B>, limits: Limits) -> Result<Self> {
        let page_tokens = decoder.backend().page_tokens();
        Ok(Self {
            decoder,
            caches: decoder.caches(limits.longest, limits.pages)?,
            pages: Pages::new(limits.pages, page_tokens),
            limits,
            queue: VecDeque::new(),
            running: Vec::new(),
            kept: HashMap::new(),
            next_id: 0,
        })
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// Input: it has no tokens, or more than the cache could ever hold.
    pub fn submit(&mut self, request: Request) -> Result<SequenceId> {
        self.enqueue(request, None)
    }

    /// The same for a request that continues a sequence that was kept: what its prompt has in common with that one's tokens
    /// is not computed again.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    ///
    /// # Panics
    /// If no such sequence was kept.
    pub fn resume(&mut self, kept: SequenceId, request: Request) -> Result<SequenceId> {
        self.check(&request)?;
        let kept = self.kept.remove(&kept).expect("the sequence was kept");
        self.enqueue(request, Some(kept))
    }

    /// Sequences that are queued or running.
    pub fn unfinished(&self) -> usize {
        self.queue.len() + self.running.len()
    }

    /// Sequences that are running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Runs a step: new tokens, none of a sequence whose prompt goes on. Does nothing where nothing is left to do.
    ///
    /// # Errors
    /// The network's. Sequences stay as they were before the step.
    pub fn step(&mut self) -> Result<Vec<Produced>> {
        self.admit();
        let Planned { step, tokens, taken, wanted } = self.plan();
        if taken.is_empty() {
            return Ok(Vec::new());
        }
        let mut produced = Vec::new();
        if taken.iter().all(|(index, _)| self.running[*index].is_greedy()) {
            let found = self.decoder.greedy(&mut self.caches, &step, &tokens)?;
            for ((index, count), GreedyToken { token, log_probability }) in
                taken.into_iter().zip(found)
            {
                let sequence = &mut self.running[index];
                sequence.held += count;
                if sequence.pending() == 0 {
                    produced.push(sequence.extend(Choice { token, log_probability }, Vec::new()));
                }
            }
        } else {
            let logits = self.decoder.forward(&mut self.caches, &step, &tokens, &wanted)?;
            let mut logits = logits.data.chunks_exact(logits.columns.max(1));
            for (index, count) in taken {
                let sequence = &mut self.running[index];
                sequence.held += count;
                if sequence.pending() == 0 {
                    let logits = logits.next().expect("a row for each last token");
                    produced.push(sequence.produce(logits)?);
                }
            }
        }
        self.retire(&produced);
        Ok(produced)
    }

    fn check(&self, request: &Request) -> Result<()> {
        if request.prompt.is_empty() || request.most_new == 0 {
            return Err(Error::input("there is no token to continue, or none to produce"));
        }
        let tokens = request.prompt.len() + request.most_new;
        let Limits { longest, pages, .. } = self.limits;
        // The last token's keys and values are never needed.
        if tokens > longest || self.pages.needed(tokens - 1) > pages {
            return Err(Error::input(format!(
                "a sequence of {} tokens and {} new ones does not fit the cache, which has {pages} pages for sequences of up \
                 to {longest} tokens",
                request.prompt.len(),
                request.most_new
            ))
            .hint("ask for fewer new tokens, give a shorter prompt, or more memory to the cache"));
        }
        Ok(())
    }

    fn enqueue(&mut self, request: Request, kept: Option<Kept>) -> Result<SequenceId> {
        self.check(&request)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.queue.push_back(Sequence::new(id, request, kept));
        Ok(id)
    }

    /// Moves sequences from the queue to those that run, while there is room.
    fn admit(&mut self) {
        while self.running.len() < self.limits.batch
            && let Some(next) = self.queue.front_mut()
            && self.pages.reserve(&mut next.pages, next.longest - 1)
        {
            self.running.extend(self.queue.pop_front());
        }
    }

    /// What passes the network next.
    fn plan(&self) -> Planned {
        // Decoding sequences, then prompts.
        let mut left = self.limits.step_tokens;
        let mut counts = vec![0; self.running.len()];
        for decoding in [true, false] {
            for (sequence, count) in self.running.iter().zip(&mut counts) {
                if (sequence.pending() == 1) == decoding {
                    *count = sequence.pending().min(left);
                    left -= *count;
                }
            }
        }
        let mut planned = Planned::default();
        for (index, (sequence, added)) in self.running.iter().zip(counts).enumerate() {
            if added == 0 {
                continue;
            }
            let held = sequence.held;
            planned.tokens.extend_from_slice(&sequence.tokens[held..held + added]);
            if added == sequence.pending() {
                planned.wanted.push(planned.tokens.len() as u32 - 1);
            }
            let pages = sequence.pages.clone();
            planned.step.sequences.push(SequenceStep { pages, held, added });
            planned.taken.push((index, added));
        }
        planned
    }

    /// Takes sequences that have ended out of those that run.
    fn retire(&mut self, produced: &[Produced]) {
        let ended = |id: SequenceId| {
            produced.iter().any(|produced| produced.sequence == id && produced.end.is_some())
        };
        let (done, running) =
            std::mem::take(&mut self.running).into_iter().partition(|own| ended(own.id));
        self.running = running;
        for mut sequence in done {
            if sequence.keep {
                let Sequence { id, tokens, held, pages, .. } = sequence;
                self.kept.insert(id, Kept { tokens, held, pages });
            } else {
                self.pages.release(&mut sequence.pages);
            }
        }
    }
}

/// A step, and which running sequences have how many tokens in it.
#[derive(Default)]
struct Planned {
    step: DecodeStep,
    tokens: Vec<u32>,
    /// Index among the running sequences, and count.
    taken: Vec<(usize, usize)>,
    /// Rows whose logits are wanted.
    wanted: Vec<u32>,
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
