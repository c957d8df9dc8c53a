/*! The report of `atom generate`. */

use serde::Serialize;

use super::Report;
use crate::serve::{Comparison, Difference, Finish, Generation};
use crate::units;

/// What `atom generate --json` prints.
#[derive(Debug, Serialize)]
pub struct GenerateOutcome {
    /// Name of the model.
    pub model: String,
    /// What it ran on.
    pub device: String,
    /// Bits of keys and values in the cache.
    pub kv_bits: u8,
    /// Seed of the draws.
    pub seed: u64,
    /// The continuation.
    #[serde(flatten)]
    pub generation: Generation,
    /// Most resident memory so far.
    pub peak_rss_bytes: u64,
    /// Most GPU memory so far.
    pub peak_gpu_bytes: Option<u64>,
}

/// `prompt of 12 tokens in 0.10 s (120 tokens/s); 128 new tokens in 2.1 s (60.3 tokens/s)`.
pub fn speed(generation: &Generation) -> String {
    let rate =
        |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(" ({rate:.1} tokens/s)"));
    let cached = match generation.cached_tokens {
        0 => String::new(),
        cached => format!(", {} of them cached,", units::count(cached)),
    };
    let end = match generation.finish {
        Finish::Context => ", the context is full",
        _ => "",
    };
    format!(
        "prompt of {}{cached} in {}{}; {} in {}{}{end}",
        units::counted(generation.prompt_tokens, "token"),
        units::seconds(generation.prefill_seconds),
        rate(generation.prefill_tokens_per_second),
        units::counted(generation.tokens.len(), "new token"),
        units::seconds(generation.decode_seconds),
        rate(generation.decode_tokens_per_second),
    )
}

impl Report for Comparison {
    fn text(&self) -> String {
        let [first, second] = &self.models;
        let Some(difference) = &self.difference else {
            let tokens = first.generation.tokens.len().min(second.generation.tokens.len());
            return format!("--- the same {}\n", units::counted(tokens, "token"));
        };
        let Difference { same_tokens, tokens, log_probabilities } = difference;
        let mut text = format!(
            "--- the first difference comes after {}\n",
            units::counted(*same_tokens, "token")
        );
        for (model, own) in self.models.iter().zip(log_probabilities) {
            let shown = |at: usize| {
                let (_, token) = &tokens[at];
                format!("{token:?} {:.3}", own[at])
            };
            text += &format!("{}: log-probability of {}, of {}\n", model.model, shown(0), shown(1));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::{ComparedModel, GeneratedToken};

    fn generation(tokens: usize) -> Generation {
        Generation {
            prompt_tokens: 12,
            cached_tokens: 0,
            tokens: vec![GeneratedToken { token: 7, log_probability: -0.5 }; tokens],
            text: "x".into(),
            finish: Finish::Length,
            prefill_seconds: 0.1,
            prefill_tokens_per_second: Some(120.0),
            decode_seconds: 2.0,
            decode_tokens_per_second: (tokens > 1).then_some(63.5),
        }
    }

    #[test]
    fn speeds_are_of_prompt_and_text() {
        assert_eq!(
            speed(&generation(128)),
            "prompt of 12 tokens in 0.10 s (120.0 tokens/s); 128 new tokens in 2.0 s (63.5 tokens/s)"
        );
        let cached = Generation { cached_tokens: 10, finish: Finish::Context, ..generation(1) };
        assert_eq!(
            speed(&cached),
            "prompt of 12 tokens, 10 of them cached, in 0.10 s (120.0 tokens/s); 1 new token in 2.0 s, the context is full"
        );
    }

    #[test]
    fn a_comparison_names_both_tokens_with_what_both_models_say_of_them() {
        let model = |name: &str| ComparedModel { model: name.into(), generation: generation(3) };
        let mut comparison = Comparison { models: [model("q"), model("s")], difference: None };
        assert_eq!(comparison.text(), "--- the same 3 tokens\n");
        comparison.difference = Some(Difference {
            same_tokens: 1,
            tokens: [(7, " a".into()), (8, "\n".into())],
            log_probabilities: [[-0.5, -0.75], [-1.25, -0.25]],
        });
        assert_eq!(
            comparison.text(),
            "--- the first difference comes after 1 token\n\
             q: log-probability of \" a\" -0.500, of \"\\n\" -0.750\n\
             s: log-probability of \" a\" -1.250, of \"\\n\" -0.250\n"
        );
    }
}
