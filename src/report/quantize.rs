/*! The report of `atom quantize` and `atom pack`. */

use super::layout::Facts;
use super::{Report, allocation, linears};
use crate::pipeline::outcome::QuantizeOutcome;
use crate::printable::printable;
use crate::{recipe, units};

impl Report for QuantizeOutcome {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("model", &self.model).add_lines("recipe", recipe::lines(&self.recipe));
        facts.add("device", &self.device);
        facts.add(
            "size",
            format!(
                "{} -> {} ({:.2} x smaller)",
                units::bytes(self.source_bytes),
                units::bytes(self.out_bytes),
                self.source_bytes as f64 / self.out_bytes as f64
            ),
        );
        facts.add("bits per weight", format!("{:.2}", self.bits_per_weight));
        if let Some(allocated) = &self.allocation {
            allocation::facts(allocated, &mut facts);
        }
        if let Some(distilled) = &self.distillation {
            facts.add("distilled", distilled.line());
        }
        facts.add("perplexity", self.perplexity_line());
        facts.add("time", self.time_line());
        let device_memory = self
            .peak_gpu_bytes
            .map(|bytes| format!(", {} on the GPU", units::bytes(bytes)))
            .unwrap_or_default();
        facts.add("peak memory", units::bytes(self.peak_rss_bytes) + &device_memory);
        if self.resumed_blocks > 0 {
            facts.add(
                "resumed",
                format!("{} found done", units::counted(self.resumed_blocks, "block")),
            );
        }
        let tables = self.allocation.as_ref().map(allocation::tables).unwrap_or_default();
        let out = self.out.display().to_string();
        let out = printable(&out);
        let upload = printable(&self.upload);
        format!(
            "{}\n{tables}{}\nwrote {out}\nnext: atom verify --model {out}\npublish: {upload}\n",
            facts.text(),
            linears::summary(&self.linears)
        )
    }
}

impl QuantizeOutcome {
    fn perplexity_line(&self) -> String {
        match &self.perplexity {
            None => "not measured (--no-eval)".to_owned(),
            Some(change) => format!(
                "{:.2} -> {:.2} ({}), {}, {} of {} tokens",
                change.before,
                change.after,
                units::change(change.after / change.before),
                change.dataset,
                units::counted(change.windows, "window"),
                change.seq_len
            ),
        }
    }

    fn time_line(&self) -> String {
        let stages: Vec<String> = self
            .stage_seconds
            .iter()
            .map(|stage| format!("{} {}", stage.stage, units::seconds(stage.seconds)))
            .collect();
        let total = units::seconds(self.seconds);
        if stages.is_empty() { total } else { format!("{total}: {}", stages.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::outcome::{LinearOutcome, PerplexityChange, StageSeconds};
    use crate::recipe::Recipe;

    fn outcome() -> QuantizeOutcome {
        let stage = |stage: &str, seconds| StageSeconds { stage: stage.into(), seconds };
        QuantizeOutcome {
            out: "./tiny-llama-atom-w4a4-g128".into(),
            model: "tiny-llama".into(),
            recipe: Recipe::paper(),
            samples: 128,
            seq_len: 2048,
            seconds: 134.2,
            stage_seconds: vec![stage("calibrate", 12.5), stage("gptq", 121.7)],
            peak_rss_bytes: 1_234_567_890,
            peak_gpu_bytes: None,
            bits_per_weight: 4.413,
            source_bytes: 269_000_000,
            out_bytes: 99_000_000,
            device: "cpu (avx512)".into(),
            resumed_blocks: 0,
            linears: vec![LinearOutcome {
                name: "model.layers.0.self_attn.q_proj".into(),
                bits: 4,
                error: 0.05,
            }],
            upload: "hf upload ORG/x x".into(),
            worst_sites: Vec::new(),
            perplexity: Some(PerplexityChange {
                dataset: "sample".into(),
                windows: 8,
                seq_len: 2048,
                before: 20.97,
                after: 30.48,
            }),
            allocation: None,
            distillation: None,
        }
    }

    #[test]
    fn the_report_says_what_was_gained_and_what_it_cost() {
        assert_eq!(
            outcome().text(),
            "\
model            tiny-llama
recipe           weights int4, groups of 128, clip 0.85, rows share scales by two, GPTQ (damping 0.01)
                 channels ordered by energy, 128 outliers in int8
                 activations int4, clip 0.9
                 KV cache int4, before RoPE, clip 1
device           cpu (avx512)
size             269.0 MB -> 99.0 MB (2.72 x smaller)
bits per weight  4.41
perplexity       20.97 -> 30.48 (+45.4 %), sample, 8 windows of 2048 tokens
time             2 m 14 s: calibrate 12.5 s, gptq 2 m 02 s
peak memory      1.2 GB

linear  bits  mean error   worst  in block
q_proj     4      0.0500  0.0500         0

worst linears                     error
model.layers.0.self_attn.q_proj  0.0500

wrote ./tiny-llama-atom-w4a4-g128
next: atom verify --model ./tiny-llama-atom-w4a4-g128
publish: hf upload ORG/x x
"
        );
    }

    #[test]
    fn what_was_not_measured_or_was_resumed_is_said() {
        let text = QuantizeOutcome { perplexity: None, resumed_blocks: 1, ..outcome() }.text();
        assert!(text.contains("perplexity       not measured (--no-eval)\n"), "{text}");
        assert!(text.contains("resumed          1 block found done\n"), "{text}");
    }

    #[test]
    fn the_json_object_has_the_fields_that_pipelines_read() {
        let object = serde_json::to_value(outcome()).unwrap();
        let keys: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "out",
                "model",
                "recipe",
                "samples",
                "seq_len",
                "seconds",
                "stage_seconds",
                "peak_rss_bytes",
                "peak_gpu_bytes",
                "bits_per_weight",
                "source_bytes",
                "out_bytes",
                "device",
                "resumed_blocks",
                "linears",
                "perplexity",
                "upload",
                "worst_sites"
            ]
        );
        assert_eq!(object["stage_seconds"]["gptq"], 121.7);
        assert_eq!(object["recipe"]["group"], 128);
    }
}
