//! One conversation: a prompt, its continuation as it comes, and what may follow.

use std::time::Instant;

use serde::Serialize;

use super::sampling::Sampling;
use super::scheduler::{Limits, Scheduler};
use super::sequence::{End, Produced, Request, SequenceId};
use crate::backend::{Backend, Decode};
use crate::network::{Decoder, Model, Runnable, page_bytes};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::text::{Detokenizer, Tokenizer};
use crate::{Error, Result};

/// Tokens of a prompt that pass the network together: enough that products are as fast as they get.
const STEP_TOKENS: usize = 1024;

/// How texts are continued.
#[derive(Clone, Debug)]
pub struct GenerationSettings {
    /// New tokens at most.
    pub most_new: usize,
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// By a token that ends texts.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The user stopped it.
    Interrupted,
    /// Nobody reads it any more.
    Unread,
}

/// A token of a continuation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GeneratedToken {
    /// Its id.
    pub token: u32,
    /// The logarithm of its probability by the network, at temperature 1.
    pub log_probability: f64,
}

/// A continuation.
#[derive(Clone, Debug, Serialize)]
pub struct Generation {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were in the cache already.
    pub cached_tokens: usize,
    /// The continuation; a token that ended it is its last.
    pub tokens: Vec<GeneratedToken>,
    /// Its text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds until the first token.
    pub prefill_seconds: f64,
    /// Prompt tokens a second.
    pub prefill_tokens_per_second: Option<f64>,
    /// Seconds of the other tokens.
    pub decode_seconds: f64,
    /// New tokens a second after the first one; none where there is no second one.
    pub decode_tokens_per_second: Option<f64>,
}

/// Loads a model for conversations of up to `longest` tokens. `kv` replaces how a source's keys and values are held.
///
/// # Errors
/// Input: a damaged model. A machine error where memory does not suffice, before anything is loaded.
pub fn decoder<'a, B: Backend + Decode>(
    backend: &'a B,
    model: &'a Model,
    kv: Option<KvFormat>,
    longest: usize,
    progress: &dyn Progress,
) -> Result<Decoder<'a, B>> {
    let mut runnable = Runnable::new(backend, model, progress)?;
    runnable.kv = kv.unwrap_or(runnable.kv);
    let pages = longest.div_ceil(backend.page_tokens()) as u64;
    let cache = pages * page_bytes(backend, &runnable.architecture, runnable.kv)?;
    let step = STEP_TOKENS.min(longest);
    runnable.check_decoding_memory([step, longest], cache, progress)?;
    Decoder::load(runnable, progress)
}

/// Continues texts, one after another. What a text has in common with the one before stays in the cache.
pub struct Generator<'a, 'm, B: Backend + Decode> {
    scheduler: Scheduler<'a, 'm, B>,
    tokenizer: &'a Tokenizer,
    settings: GenerationSettings,
    longest: usize,
    kept: Option<SequenceId>,
    /// The tokens of the text before: its prompt and its continuation.
    tokens: Vec<u32>,
}

impl<'a, 'm, B: Backend + Decode> Generator<'a, 'm, B> {
    /// For texts of up to `longest` tokens, continuations included.
    pub fn new(
        decoder: &'a Decoder<'m, B>,
        tokenizer: &'a Tokenizer,
        settings: GenerationSettings,
        longest: usize,
    ) -> Result<Self> {
        let pages = longest.div_ceil(decoder.backend().page_tokens());
        let limits = Limits { batch: 1, step_tokens: STEP_TOKENS, longest, pages };
        let scheduler = Scheduler::new(decoder, limits)?;
        Ok(Self { scheduler, tokenizer, settings, longest, kept: None, tokens: Vec::new() })
    }

    /// The tokens of the text before, its continuation included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Continues a text of these tokens. `write` gets its text as it comes, never a part of a character, and returns
    /// whether anybody still reads it.
    ///
    /// # Errors
    /// Input: no tokens, or no room in the context for a new one. Those of the network and of `write`. That the user
    /// stopped it is none: the text so far is returned.
    pub fn generate(
        &mut self,
        prompt: Vec<u32>,
        write: &mut dyn FnMut(&str) -> Result<bool>,
        progress: &dyn Progress,
    ) -> Result<Generation> {
        let room = self.room(&prompt)?;
        let most_new = self.settings.most_new.min(room);
        let mut detokenizer = Detokenizer::after(self.tokenizer, &prompt)?;
        let before = std::mem::replace(&mut self.tokens, prompt.clone());
        let cached_tokens = match self.kept {
            Some(_) => common(&before[..before.len().saturating_sub(1)], &prompt),
            None => 0,
        };
        let mut made = Generation {
            prompt_tokens: prompt.len(),
            cached_tokens: cached_tokens.min(prompt.len() - 1),
            tokens: Vec::new(),
            text: String::new(),
            finish: Finish::Interrupted,
            prefill_seconds: 0.0,
            prefill_tokens_per_second: None,
            decode_seconds: 0.0,
            decode_tokens_per_second: None,
        };
        let id = self.submit(self.request(prompt, most_new))?;
        let start = Instant::now();
        let mut first = None;
        while !progress.stop_requested() {
            for Produced { choice, end, .. } in self.scheduler.step()? {
                first.get_or_insert_with(Instant::now);
                let (token, log_probability) = (choice.token, choice.log_probability);
                made.tokens.push(GeneratedToken { token, log_probability });
                self.tokens.push(token);
                let text = detokenizer.push(token)?;
                made.text += &text;
                let is_read = text.is_empty() || write(&text)?;
                made.finish = match end {
                    Some(End::Stop) => Finish::Stop,
                    Some(End::Length) if most_new < self.settings.most_new => Finish::Context,
                    Some(End::Length) => Finish::Length,
                    None if !is_read => Finish::Unread,
                    None => continue,
                };
                self.kept = end.map(|_| id);
            }
            if made.finish != Finish::Interrupted {
                break;
            }
        }
        let rest = detokenizer.finish()?;
        if !rest.is_empty() {
            made.text += &rest;
            write(&rest)?;
        }
        made.time(start, first);
        Ok(made)
    }

    /// The logarithms of the probabilities of tokens `of` after a text, by the network alone.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn log_probabilities(&mut self, text: Vec<u32>, of: &[u32]) -> Result<Vec<f64>> {
        self.room(&text)?;
        self.tokens = text.clone();
        let request = Request { scored: of.to_vec(), ..self.request(text, 1) };
        let id = self.submit(request)?;
        // A long text takes several steps.
        loop {
            if let Some(produced) = self.scheduler.step()?.pop() {
                self.kept = Some(id);
                return Ok(produced.scored);
            }
        }
    }

    fn submit(&mut self, request: Request) -> Result<SequenceId> {
        match self.kept.take() {
            Some(kept) => self.scheduler.resume(kept, request),
            None => self.scheduler.submit(request),
        }
    }

    fn request(&self, prompt: Vec<u32>, most_new: usize) -> Request {
        let GenerationSettings { ref stop, sampling, seed, .. } = self.settings;
        Request {
            prompt,
            most_new,
            stop: stop.clone(),
            sampling,
            seed,
            keep: true,
            scored: Vec::new(),
        }
    }

    /// New tokens that the context has room for after a text.
    fn room(&self, text: &[u32]) -> Result<usize> {
        if text.is_empty() {
            return Err(Error::input(
                "the prompt is empty, and the tokenizer begins texts with no token of its own",
            )
            .hint("give some text to continue"));
        }
        match self.longest.saturating_sub(text.len()) {
            0 => Err(Error::input(format!(
                "the text has {} tokens, and the context has room for {} with at least one new",
                text.len(),
                self.longest
            ))
            .hint("give a shorter prompt or begin a new conversation, or raise --context up to the network's positions")),
            room => Ok(room),
        }
    }
}

impl Generation {
    /// Notes the times of a run that began at `start` and had its first token at `first`.
    fn time(&mut self, start: Instant, first: Option<Instant>) {
        let Some(first) = first else {
            self.prefill_seconds = start.elapsed().as_secs_f64();
            return;
        };
        let rate = |tokens: usize, seconds: f64| (tokens > 0).then(|| tokens as f64 / seconds);
        self.prefill_seconds = (first - start).as_secs_f64();
        let computed = self.prompt_tokens - self.cached_tokens;
        self.prefill_tokens_per_second = rate(computed, self.prefill_seconds);
        self.decode_seconds = first.elapsed().as_secs_f64();
        self.decode_tokens_per_second = rate(self.tokens.len() - 1, self.decode_seconds);
    }
}

/// Tokens that two texts begin with alike.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
