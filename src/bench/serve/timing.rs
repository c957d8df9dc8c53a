//! Times of requests, and what is made of them.

use std::collections::HashMap;
use std::time::Instant;

use serde::Serialize;

use super::workload::{Lengths, Policy};
use crate::Result;
use crate::backend::{Backend, Decode};
use crate::progress::Progress;
use crate::serve::{Request, Sampling, Scheduler, SequenceId};

/// Mean, median and 99th percentile of milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Spread {
    fn of(mut seconds: Vec<f64>) -> Self {
        if seconds.is_empty() {
            return Self::default();
        }
        seconds.sort_by(f64::total_cmp);
        // The nearest rank.
        let rank =
            |share: f64| seconds[((share * seconds.len() as f64).ceil() as usize).max(1) - 1];
        Self {
            mean: 1e3 * seconds.iter().sum::<f64>() / seconds.len() as f64,
            median: 1e3 * rank(0.5),
            p99: 1e3 * rank(0.99),
        }
    }
}

/// One run over a workload.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    /// Seconds from the first request to the last token.
    pub seconds: f64,
    /// Prompt and new tokens a second (the reference's throughput).
    pub total_tokens_per_second: f64,
    /// New tokens a second (vLLM's).
    pub output_tokens_per_second: f64,
    /// Milliseconds from sending a request to its first token.
    pub ttft_ms: Spread,
    /// Milliseconds of each token after a request's first one, by request.
    pub tpot_ms: Spread,
    /// Milliseconds from sending a request to its last token, divided by its new tokens (the reference's latency).
    pub latency_ms: f64,
    /// Share of the time before as many sequences ran as fit.
    pub ramp: f64,
    /// Share of the time after the last request was admitted and fewer ran.
    pub drain: f64,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// New tokens.
    pub output_tokens: usize,
}

/// What is known of a request that was sent.
struct Sent {
    at: f64,
    first: f64,
    last: f64,
    tokens: usize,
}

/// Serves requests to their end.
pub(super) fn run<B: Backend + Decode>(
    scheduler: &mut Scheduler<'_, '_, B>,
    requests: &[Lengths],
    policy: Policy,
    (batch, vocabulary): (usize, usize),
    progress: &dyn Progress,
) -> Result<Run> {
    let mut sent: HashMap<SequenceId, Sent> = HashMap::new();
    let mut left = requests.iter().enumerate();
    let most = batch.min(requests.len());
    let start = Instant::now();
    let now = || start.elapsed().as_secs_f64();
    let (mut full, mut draining) = (None, None);
    loop {
        while policy == Policy::AllAtStart || scheduler.unfinished() < batch {
            let Some((number, lengths)) = left.next() else { break };
            let id = scheduler.submit(request(*lengths, number, vocabulary))?;
            sent.insert(id, Sent { at: now(), first: 0.0, last: 0.0, tokens: 0 });
        }
        if scheduler.unfinished() == 0 {
            break;
        }
        progress.check_stop()?;
        let produced = scheduler.step()?;
        let after = now();
        if full.is_none() && scheduler.running() + ended(&produced) >= most {
            full = Some(after);
        }
        if full.is_some() && left.len() == 0 && scheduler.unfinished() < most && draining.is_none()
        {
            draining = Some(after);
        }
        for token in produced {
            let own = sent.get_mut(&token.sequence).expect("what was sent");
            if own.tokens == 0 {
                own.first = after;
            }
            own.tokens += 1;
            own.last = after;
            if token.end.is_some() {
                progress.advance("");
            }
        }
    }
    let seconds = now();
    let all = || sent.values();
    let prompt_tokens = requests.iter().map(|own| own.prompt).sum::<usize>();
    let output_tokens = all().map(|own| own.tokens).sum::<usize>();
    let latencies = all().map(|own| 1e3 * (own.last - own.at) / own.tokens as f64).sum::<f64>();
    let later = all().filter(|own| own.tokens > 1);
    Ok(Run {
        seconds,
        total_tokens_per_second: (prompt_tokens + output_tokens) as f64 / seconds,
        output_tokens_per_second: output_tokens as f64 / seconds,
        ttft_ms: Spread::of(all().map(|own| own.first - own.at).collect()),
        tpot_ms: Spread::of(
            later.map(|own| (own.last - own.first) / (own.tokens - 1) as f64).collect(),
        ),
        latency_ms: latencies / sent.len().max(1) as f64,
        ramp: full.unwrap_or(seconds) / seconds,
        drain: draining.map_or(0.0, |at| (seconds - at) / seconds),
        prompt_tokens,
        output_tokens,
    })
}

fn ended(produced: &[crate::serve::Produced]) -> usize {
    produced.iter().filter(|token| token.end.is_some()).count()
}

/// Steps that are timed.
const STEPS: usize = 32;
/// Steps before them: the first ones are issued and recorded.
const WARM_STEPS: usize = 4;

/// Tokens that each of `batch` sequences gets after a prompt of `context`, so that [`steps`] are timed when the last prompt is
/// done.
pub(super) fn step_outputs(batch: usize, context: usize, step_tokens: usize) -> usize {
    STEPS + WARM_STEPS + 2 + (batch * context).div_ceil(step_tokens - batch.min(step_tokens / 2))
}

/// Milliseconds of each step in which `batch` sequences, whose prompts had `context` tokens, get a token each.
pub(super) fn steps<B: Backend + Decode>(
    scheduler: &mut Scheduler<'_, '_, B>,
    (batch, lengths, vocabulary): (usize, Lengths, usize),
    progress: &dyn Progress,
) -> Result<Vec<f64>> {
    for number in 0..batch {
        scheduler.submit(request(lengths, number, vocabulary))?;
    }
    let mut milliseconds = Vec::new();
    while scheduler.unfinished() > 0 {
        progress.check_stop()?;
        let running = scheduler.running();
        let start = Instant::now();
        let produced = scheduler.step()?;
        let took = start.elapsed().as_secs_f64();
        // Those that were admitted in this step have their first token of it, too.
        let prompts_done = running == batch && produced.len() == batch;
        if prompts_done && milliseconds.len() < STEPS + WARM_STEPS {
            milliseconds.push(1e3 * took);
        }
    }
    Ok(milliseconds.split_off(WARM_STEPS.min(milliseconds.len())))
}

/// A request of random tokens that is as long as it says.
fn request(Lengths { prompt, output }: Lengths, number: usize, vocabulary: usize) -> Request {
    let token = |at: usize| ((number * 7919 + at * 104_729 + at * at * 31) % vocabulary) as u32;
    Request {
        prompt: (0..prompt).map(token).collect(),
        most_new: output,
        stop: Vec::new(),
        sampling: Sampling::GREEDY,
        seed: 0,
        keep: false,
        scored: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_nearest_rank() {
        let spread = Spread::of((1..=100).rev().map(|n| f64::from(n) / 1e3).collect());
        assert_eq!((spread.median, spread.p99), (50.0, 99.0));
        assert!((spread.mean - 50.5).abs() < 1e-9);
        assert_eq!(Spread::of(vec![0.002]), Spread { mean: 2.0, median: 2.0, p99: 2.0 });
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
