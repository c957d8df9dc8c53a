//! Text that a model writes itself: windows of tokens to calibrate on, for which no data is needed.

use std::collections::HashMap;
use std::time::Instant;

use super::sampling::Sampling;
use super::scheduler::{Limits, Scheduler};
use super::sequence::Request;
use crate::backend::{Backend, Decode};
use crate::checkpoint::Source;
use crate::model::Architecture;
use crate::network::{Decoder, Runnable, page_bytes};
use crate::progress::Progress;
use crate::text::{PythonRandom, Tokenizer, check_tokens};
use crate::{Error, Result, units};

/// Tokens in a step at most: those of all beginnings, a part at a time, and one of each window.
const STEP_TOKENS: usize = 1024;
/// Tokens that are drawn in search of one that is text.
const DRAWS: usize = 1000;

/// The network alone: its own probabilities, nothing left out.
const SAMPLING: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// What a model is to write.
#[derive(Clone, Debug)]
pub struct OwnText {
    /// Windows.
    pub windows: usize,
    /// Tokens of each, its beginning included.
    pub seq_len: usize,
    /// Seed of the first tokens and of all samples.
    pub seed: u64,
    /// What windows begin with, one after another and again; where there is none, each begins with a random token.
    pub beginnings: Vec<String>,
}

impl OwnText {
    /// The windows that a source writes at temperature 1, `[windows, seq_len]` flat. Each begins as the tokenizer begins
    /// texts, goes on with its beginning, and is as long as it should be whatever comes. On the CPU they depend on
    /// the source and these settings alone, on a GPU on its kind and memory as well.
    ///
    /// # Errors
    /// Usage: more tokens than the network has positions. Input: a vocabulary without text, a beginning that fills a window, a
    /// damaged source. Machine: memory does not suffice for the network in full precision.
    pub fn sample<B: Backend + Decode>(
        &self,
        backend: &B,
        source: &Source,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        let Self { windows, seq_len, .. } = *self;
        let runnable = Runnable::source(backend, source, progress)?;
        let architecture = runnable.architecture.clone();
        self.check(&architecture)?;
        let tokenizer = Tokenizer::from_bytes(&source.tokenizer()?, &source.tokenizer_path())?;
        let requests = self.requests(&tokenizer, &architecture, progress)?;
        let pages = seq_len.div_ceil(backend.page_tokens());
        let window_bytes = page_bytes(backend, &architecture, runnable.kv)? * pages as u64;
        let batch = batch(windows, backend.stream_bytes() as u64 / window_bytes.max(1));
        let step = STEP_TOKENS.max(batch);
        let checked = [step.min(batch * seq_len), seq_len];
        runnable.check_decoding_memory(checked, batch as u64 * window_bytes, progress).map_err(
            |error| {
                error.hint(
                    "the entire model is in memory while it writes: calibrate on a text with --calib, such as \
                     `sample`, or take a machine with more memory",
                )
            },
        )?;
        let start = Instant::now();
        let decoder = Decoder::load(runnable, progress)?;
        let limits = Limits { batch, step_tokens: step, longest: seq_len, pages: batch * pages };
        let mut scheduler = Scheduler::new(&decoder, limits)?;
        let steps = windows.div_ceil(batch) * seq_len;
        progress.info(&format!(
            "{} writes {} of {seq_len} tokens to calibrate on, {batch} side by side",
            source.name(),
            units::counted(windows, "window")
        ));
        let tokens = run(&mut scheduler, requests, steps, progress)?;
        let seconds = start.elapsed().as_secs_f64();
        progress.info(&format!(
            "it took {}, {:.0} tokens a second",
            units::seconds(seconds),
            tokens.len() as f64 / seconds
        ));
        Ok(tokens)
    }

    fn check(&self, architecture: &Architecture) -> Result<()> {
        let positions = architecture.positions();
        if self.seq_len > positions {
            let seq_len = self.seq_len;
            return Err(Error::usage(format!(
                "a model cannot write windows of {seq_len} tokens to calibrate on: its network has {positions} positions"
            ))
            .hint(format!("give --seq-len {positions} or less, or another --calib")));
        }
        Ok(())
    }

    /// A request for each window.
    fn requests(
        &self,
        tokenizer: &Tokenizer,
        architecture: &Architecture,
        progress: &dyn Progress,
    ) -> Result<Vec<Request>> {
        let mut random = PythonRandom::new(self.seed);
        let beginnings = self.tokenized(tokenizer, progress)?;
        let request = |window: usize| {
            let beginning = match beginnings.len() {
                0 => vec![random_token(&mut random, tokenizer, architecture.vocabulary)?],
                count => beginnings[window % count].clone(),
            };
            let prompt = [tokenizer.before(), &beginning].concat();
            check_tokens(&prompt, architecture.vocabulary, tokenizer.path())?;
            let most_new = self.seq_len.saturating_sub(prompt.len());
            if most_new == 0 {
                return Err(Error::input(format!(
                    "window {window} begins with {} tokens, which leaves nothing to sample of --seq-len {}",
                    prompt.len(),
                    self.seq_len
                ))
                .hint("give shorter lines, or a longer --seq-len"));
            }
            Ok(Request {
                prompt,
                most_new,
                stop: Vec::new(),
                sampling: SAMPLING,
                seed: random.randint(0, u64::from(u32::MAX)),
                keep: false,
                scored: Vec::new(),
            })
        };
        (0..self.windows).map(request).collect()
    }

    fn tokenized(&self, tokenizer: &Tokenizer, progress: &dyn Progress) -> Result<Vec<Vec<u32>>> {
        let lines = self.beginnings.iter().take(self.windows);
        lines.map(|line| tokenizer.encode_as_it_is(line, progress)).collect()
    }
}

/// How many windows are written side by side, of which `fit`: as many in each wave.
fn batch(windows: usize, fit: u64) -> usize {
    let most = usize::try_from(fit).unwrap_or(usize::MAX).clamp(1, windows.max(1));
    windows.div_ceil(windows.div_ceil(most).max(1)).max(1)
}

/// A token that is some text by itself, each as probable as any other.
fn random_token(
    random: &mut PythonRandom,
    tokenizer: &Tokenizer,
    embeddings: usize,
) -> Result<u32> {
    let tokens = tokenizer.vocab_size().min(embeddings) as u64;
    for _ in 0..if tokens == 0 { 0 } else { DRAWS } {
        let token = random.randint(0, tokens - 1) as u32;
        // A special token is no text, and an id may be of no token.
        if !tokenizer.decode(&[token])?.is_empty() {
            return Ok(token);
        }
    }
    let path = tokenizer.path();
    Err(Error::input(format!("none of {DRAWS} random tokens of {path} is text to begin with"))
        .hint("give lines to begin with as --calib self=FILE, or another --calib"))
}

/// Runs requests to their end; the tokens of all, in the order of the requests.
fn run<B: Backend + Decode>(
    scheduler: &mut Scheduler<'_, '_, B>,
    requests: Vec<Request>,
    steps: usize,
    progress: &dyn Progress,
) -> Result<Vec<u32>> {
    let mut windows: Vec<Vec<u32>> = Vec::with_capacity(requests.len());
    let mut places = HashMap::with_capacity(requests.len());
    for request in requests {
        let prompt = request.prompt.clone();
        places.insert(scheduler.submit(request)?, windows.len());
        windows.push(prompt);
    }
    progress.begin("sample", steps);
    while scheduler.unfinished() > 0 {
        progress.check_stop()?;
        for produced in scheduler.step()? {
            windows[places[&produced.sequence]].push(produced.choice.token);
        }
        progress.advance("");
    }
    progress.end();
    Ok(windows.concat())
}

#[cfg(test)]
#[path = "own_text_tests.rs"]
mod tests;
