/*! The choice of a token by its logits.

With logits l, temperature T and probabilities p = softmax(l / T), tokens are left out in this order, as transformers does:
all but the `top_k` most probable; those after the first ones, by probability, that reach `top_p` together, of what is left;
those less probable than `min_p` times the most probable. One of the others is drawn. Of equal logits the lower id comes
first. */

use crate::text::PythonRandom;
use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; at 0 the most probable token is taken (greedy).
    pub temperature: f64,
    /// Tokens to draw among at most; 0 for all.
    pub top_k: usize,
    /// The probability that the tokens to draw among have together, in (0, 1]; 1 for all.
    pub top_p: f64,
    /// The least probability of a token, as a share of the most probable one's, in [0, 1).
    pub min_p: f64,
}

impl Sampling {
    /// The most probable token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Whether no random number is used.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// The logarithm of its probability by the network alone, temperature 1 and nothing left out.
    pub log_probability: f64,
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: PythonRandom,
}

impl Sampler {
    /// A sampler with random numbers of its own.
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, random: PythonRandom::new(seed) }
    }

    /// Whether it takes the argmax.
    pub fn is_greedy(&self) -> bool {
        self.sampling.is_greedy()
    }

    /// Chooses a token.
    ///
    /// # Errors
    /// Input: logits that are not finite.
    pub fn choose(&mut self, logits: &[f32]) -> Result<Choice> {
        let greatest = argmax(logits)?;
        let token = match self.sampling.is_greedy() {
            true => greatest,
            false => self.draw(logits, logits[greatest as usize]),
        };
        Ok(Choice { token, log_probability: log_probability(logits, token) })
    }

    fn draw(&mut self, logits: &[f32], greatest: f32) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p } = self.sampling;
        let weight = |logit: f32| ((f64::from(logit) - f64::from(greatest)) / temperature).exp();
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        let by_rank =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top_k > 0 && top_k < tokens.len() {
            tokens.select_nth_unstable_by(top_k - 1, by_rank);
            tokens.truncate(top_k);
        }
        if top_k > 0 || top_p < 1.0 {
            tokens.sort_unstable_by(by_rank);
        }
        let mut weights: Vec<f64> =
            tokens.iter().map(|token| weight(logits[*token as usize])).collect();
        if top_p < 1.0 {
            let enough = top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let reached = weights.iter().position(|weight| {
                sum += weight;
                sum >= enough
            });
            tokens.truncate(reached.map_or(tokens.len(), |last| last + 1));
            weights.truncate(tokens.len());
        }
        if min_p > 0.0 {
            // The most probable token's weight is 1.
            let mut kept = weights.iter().map(|weight| *weight >= min_p);
            tokens.retain(|_| kept.next().unwrap_or(false));
            weights.retain(|weight| *weight >= min_p);
        }
        let mut left = self.random.random() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a little after the last one.
        tokens[drawn.unwrap_or(tokens.len() - 1)]
    }
}

/// The token of the greatest logit, of equal ones the first.
///
/// # Errors
/// Input: logits that are not finite.
fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return Err(Error::input(format!("the logit of token {token} is {logit}"))
                .hint("the weights overflow on this prompt: is the checkpoint sound?"));
        }
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    Ok(best.0 as u32)
}

/// `l - ln(sum(exp(l)))` of one token, sums in f64.
pub(super) fn log_probability(logits: &[f32], token: u32) -> f64 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - greatest).exp())).sum();
    f64::from(logits[token as usize] - greatest) - sum.ln()
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
