/*! `atom bench prefill`: the blocks of a model over one window, on the integer kernels and in full precision.

Weights are random, of a known model's shapes; everything between the embedding and the last norm runs, as in
evaluation. Two blocks with weights of their own take turns for as many as the model has, so that neither's weights
are in a cache when it comes; the two paths take turns as well, each run after a rest: it would otherwise be measured at the
clock that the run before has brought a GPU down to. */

use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::cpu::{identity_site, random};
use super::device::SETTLE;
use super::random_block::{BlockValues, dense_block, quantized_block};
use super::{BenchOutcome, median};
use crate::backend::{Backend, Matrix};
use crate::model::block::{Block, Observer};
use crate::model::{Architecture, AttentionSpecs};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::quant::number::ScaleFormat;
use crate::quant::site::{SiteFormat, Transform};
use crate::{Error, Result};

/// Blocks with weights of their own.
const DISTINCT: usize = 2;

/// What is measured.
#[derive(Clone, Debug)]
pub struct PrefillSettings {
    /// The model's name.
    pub shape: String,
    /// Its shapes and blocks.
    pub architecture: Architecture,
    /// Tokens of the window.
    pub tokens: usize,
    /// Channels that share a scale.
    pub group_size: usize,
    /// Outlier channels in INT8.
    pub outliers: usize,
    /// Bits of a key's or value's code.
    pub kv_bits: u8,
    /// Runs of each path that the median is taken of.
    pub repeats: usize,
}

impl PrefillSettings {
    /// Checks the formats for every site.
    fn check(&self) -> Result<()> {
        if let Some(what) = self.architecture.not_plain() {
            return Err(Error::usage(format!("{} has {what}", self.shape))
                .hint("this measures dense blocks: choose another --shape"));
        }
        for site in self.architecture.sites(0) {
            let usage = |what: String| {
                Error::usage(what).hint("`atom bench prefill --help` shows the flags")
            };
            if self.outliers >= site.channels {
                let (outliers, channels) = (self.outliers, site.channels);
                return Err(usage(format!(
                    "{outliers} outliers leave nothing of {channels} channels"
                )));
            }
            self.format(site.channels).check().map_err(|error| usage(error.to_string()))?;
        }
        Ok(())
    }

    /// A site of the default recipe's kind.
    fn format(&self, channels: usize) -> SiteFormat {
        let mut site = identity_site(channels, self.group_size, self.outliers);
        site.transform = Transform::Hadamard;
        site.row.numbers.scale = ScaleFormat::SIGNED_F16;
        site
    }
}

/// One path.
#[derive(Serialize)]
struct Path {
    path: String,
    milliseconds: f64,
    tokens_per_second: f64,
    /// How many times as fast as full precision.
    speedup: f64,
}

/// Measures both paths.
///
/// # Errors
/// A usage error where the formats do not fit the shape; the device's.
pub fn prefill<B: Backend>(
    backend: &B,
    settings: &PrefillSettings,
    progress: &dyn Progress,
) -> Result<BenchOutcome> {
    settings.check()?;
    let PrefillSettings { architecture, tokens, .. } = settings;
    let (tokens, blocks) = (*tokens, architecture.blocks);
    let kv = KvFormat { bits: settings.kv_bits, rotate: settings.kv_bits < 16, ..KvFormat::FULL };
    progress.info(&format!("making random blocks of {}", settings.shape));
    let (mut dense, mut quantized) = (Vec::new(), Vec::new());
    for seed in 0..DISTINCT as u64 {
        progress.check_stop()?;
        let weights = BlockValues::new(architecture, seed);
        dense.push(dense_block(backend, architecture, &weights)?);
        let format = |channels| settings.format(channels);
        quantized.push(quantized_block(backend, architecture, &weights, (&format, 4))?);
    }
    let full = AttentionSpecs::of(architecture, KvFormat::FULL, tokens);
    let cached = full.with_kv(kv);
    let paths = [(full, dense), (cached, quantized)];
    let data = random(tokens * architecture.hidden, 99);
    let x = backend.upload(Matrix { rows: tokens, columns: architecture.hidden, data })?;

    progress.begin("bench prefill", settings.repeats + 1);
    let mut seconds = [const { Vec::new() }; 2];
    for repeat in 0..=settings.repeats {
        for ((attention, path), seconds) in paths.iter().zip(&mut seconds) {
            progress.check_stop()?;
            let took = run(backend, attention, path, blocks, &x)?;
            // The first one compiles and warms up.
            if repeat > 0 {
                seconds.push(took);
            }
        }
        progress.advance("");
    }
    progress.end();
    let [dense, quantized] = seconds.each_mut().map(|seconds| median(seconds));
    let path = |name: &str, seconds: f64| Path {
        path: name.to_owned(),
        milliseconds: 1e3 * seconds,
        tokens_per_second: tokens as f64 / seconds,
        speedup: dense / seconds,
    };
    let name =
        format!("w4a4kv{} g{} o{}", settings.kv_bits, settings.group_size, settings.outliers);
    let mut outcome = BenchOutcome::of(&[path("full precision", dense), path(&name, quantized)]);
    let facts = [
        ("device", json!(backend.device())),
        ("shape", json!(settings.shape)),
        ("blocks", json!(blocks)),
        ("tokens", json!(tokens)),
    ];
    outcome.facts = facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Ok(outcome)
}

/// Seconds of all blocks, after a rest.
fn run<B: Backend>(
    backend: &B,
    attention: &AttentionSpecs,
    path: &[Block<B>],
    blocks: usize,
    x: &B::Hidden,
) -> Result<f64> {
    let mut x = backend.duplicate(x)?;
    backend.wait()?;
    std::thread::sleep(SETTLE);
    let start = Instant::now();
    for block in path.iter().cycle().take(blocks) {
        block.forward(backend, attention, &mut x, &mut Observer::none())?;
    }
    backend.wait()?;
    Ok(start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::progress::Silent;

    #[test]
    fn both_paths_run_and_are_compared() {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "vocab_size": 100,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
        });
        let settings = PrefillSettings {
            shape: "small".to_owned(),
            architecture: Architecture::from_config(&config).unwrap(),
            tokens: 16,
            group_size: 32,
            outliers: 32,
            kv_bits: 4,
            repeats: 1,
        };
        let outcome = prefill(&Cpu::new().unwrap(), &settings, &Silent).unwrap();
        let names: Vec<_> = outcome.rows.iter().map(|row| row["path"].as_str().unwrap()).collect();
        assert_eq!(names, ["full precision", "w4a4kv4 g32 o32"]);
        assert_eq!(outcome.rows[0]["speedup"], 1.0);
        assert!(outcome.rows[1]["speedup"].as_f64().unwrap() > 0.0);
        assert_eq!(outcome.facts["blocks"], 3);
        for (group_size, outliers) in [(32, 96), (32, 200), (17, 32)] {
            let settings = PrefillSettings { group_size, outliers, ..settings.clone() };
            let error = prefill(&Cpu::new().unwrap(), &settings, &Silent).err().unwrap();
            assert_eq!(error.kind(), crate::Kind::Usage, "{error}");
        }
    }
}
