/*! The report of `atom eval-ppl`. */

use super::Report;
use super::layout::Facts;
use crate::eval::PerplexityOutcome;
use crate::units;

impl Report for PerplexityOutcome {
    fn text(&self) -> String {
        let per_cpu_second = self.tokens as f64 / self.cpu_seconds;
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        facts.add("dataset", &self.dataset);
        let error = match self.standard_error {
            error if error.is_finite() => format!(" +- {error:.4}"),
            _ => String::new(),
        };
        facts.add("perplexity", format!("{:.4}{error}", self.perplexity));
        facts.add(
            "windows",
            format!(
                "{} of {} tokens, {} tokens in all",
                units::count(self.windows),
                self.seq_len,
                units::count(self.tokens)
            ),
        );
        facts.add(
            "speed",
            format!(
                "{:.1} tokens/s, {per_cpu_second:.1} tokens per CPU-second",
                self.tokens_per_second
            ),
        );
        facts.add("time", units::seconds(self.seconds));
        facts.add("device", &self.device);
        facts.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> PerplexityOutcome {
        PerplexityOutcome {
            model: "SmolLM2".into(),
            dataset: "wikitext2".into(),
            perplexity: 21.6312,
            standard_error: 0.2134,
            windows: 148,
            seq_len: 2048,
            tokens: 303_104,
            seconds: 1010.0,
            tokens_per_second: 300.1,
            cpu_seconds: 2000.0,
            device: "cpu (avx512)".into(),
        }
    }

    #[test]
    fn a_single_window_has_no_error() {
        let single = PerplexityOutcome { windows: 1, standard_error: f64::NAN, ..outcome() };
        assert!(single.text().contains("perplexity  21.6312\n"), "{}", single.text());
        assert!(serde_json::to_value(single).unwrap()["standard_error"].is_null());
    }

    #[test]
    fn a_perplexity_comes_with_its_error_and_its_speed() {
        assert_eq!(
            outcome().text(),
            "\
model       SmolLM2
dataset     wikitext2
perplexity  21.6312 +- 0.2134
windows     148 of 2048 tokens, 303 104 tokens in all
speed       300.1 tokens/s, 151.6 tokens per CPU-second
time        16 m 50 s
device      cpu (avx512)
"
        );
    }
}
