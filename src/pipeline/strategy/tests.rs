//! Both strategies on the bundled model, and the guards between them.

use std::path::Path;
use std::sync::Mutex;

use half::f16;
use safetensors::tensor::{SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};

use super::sequential::corrects;
use super::*;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{AtomCheckpoint, Destination, Inputs, Source};
use crate::hub;
use crate::pipeline::outcome::QuantizeOutcome;
use crate::pipeline::plan::plan_network;
use crate::pipeline::{Calibration, Output, Quantization, quantize};
use crate::progress::Progress;
use crate::recipe::{Group, Outliers};
use crate::text::{Split, TextSet};

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Progress for Warnings {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {}
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn stop_requested(&self) -> bool {
        false
    }
}

fn recipe() -> Recipe {
    Recipe { group: Group::Size(32), outliers: Outliers::Count(16), ..Recipe::default_recipe() }
}

/// The outcome for `tiny-llama` and the warnings on the way.
fn quantized(recipe: &Recipe, seq_len: usize) -> (QuantizeOutcome, Vec<String>) {
    quantized_of(&hub::tiny_llama().unwrap(), recipe, seq_len)
}

/// The same of another source.
fn quantized_of(
    source: &Source,
    recipe: &Recipe,
    seq_len: usize,
) -> (QuantizeOutcome, Vec<String>) {
    let home = tempfile::tempdir().unwrap();
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 1, seq_len, seed: 0 };
    let out = home.path().join("out");
    let destination = Destination { out, overwrite: false, inputs: Inputs::default() };
    let output = Output { destination, resume: false };
    let quantization = Quantization {
        source,
        calibration: &calibration,
        recipe,
        output: &output,
        evaluation: None,
    };
    let warnings = Warnings::default();
    let outcome = quantize(&Cpu::new().unwrap(), &quantization, &warnings).unwrap();
    AtomCheckpoint::open(&outcome.out).unwrap();
    (outcome, warnings.0.into_inner().unwrap())
}

fn stages(outcome: &QuantizeOutcome) -> Vec<&str> {
    outcome.stage_seconds.iter().map(|stage| stage.stage.as_str()).collect()
}

#[test]
fn only_gptq_is_sequential() {
    for (gptq, sequential, expected) in [
        (true, true, Strategy::Sequential),
        (true, false, Strategy::Simultaneous),
        (false, true, Strategy::Simultaneous),
        (false, false, Strategy::Simultaneous),
    ] {
        assert_eq!(Strategy::of(&Recipe { gptq, sequential, ..recipe() }), expected);
    }
    assert!(Strategy::Sequential.needs_source() && !Strategy::Simultaneous.needs_source());
}

#[test]
fn errors_are_corrected_from_as_many_tokens_as_channels_on() {
    assert!(corrects(0.5, 64, 64) && corrects(1.0, 65, 64));
    assert!(!corrects(0.5, 63, 64) && !corrects(0.5, 0, 64));
    assert!(!corrects(0.0, 64, 64) && !corrects(-0.5, 64, 64));
}

#[test]
fn too_few_tokens_leave_errors_uncorrected_with_a_warning() {
    let few = |recipe: &Recipe| {
        let (outcome, warnings) = quantized(recipe, 16);
        let uncorrected = warnings.iter().any(|warning| warning.contains("without a correction"));
        (outcome, uncorrected)
    };
    let (corrected, warned) = few(&recipe());
    assert!(warned);
    // The same as without any correction, which nobody is warned of.
    let (uncorrected, warned) = few(&Recipe { correction: 0.0, ..recipe() });
    assert!(!warned);
    let errors = |outcome: &QuantizeOutcome| -> Vec<f64> {
        outcome.linears.iter().map(|linear| linear.error).collect()
    };
    assert_eq!(errors(&corrected), errors(&uncorrected));
    // With tokens enough, a correction changes linears.
    let (corrected, warnings) = quantized(&recipe(), 1024);
    assert!(warnings.iter().all(|warning| !warning.contains("without a correction")));
    let (uncorrected, _) = quantized(&Recipe { correction: 0.0, ..recipe() }, 1024);
    assert_ne!(errors(&corrected), errors(&uncorrected));
}

/// As many tokens as a site has channels are enough, one fewer is not: the sites that are wider are warned of.
#[test]
fn a_correction_begins_at_as_many_tokens_as_a_site_is_wide() {
    let source = hub::tiny_llama().unwrap();
    let architecture = Architecture::read(source.config(), &source.config_file()).unwrap();
    let blocks = plan_network(&recipe(), &architecture).unwrap();
    let width = blocks[0][0].width();
    for tokens in [width - 1, width] {
        let wider = || blocks.iter().flatten().filter(|site| site.width() > tokens);
        let first = wider().next().unwrap();
        let (_, warnings) = quantized(&recipe(), tokens);
        let warned: Vec<_> =
            warnings.iter().filter(|w| w.contains("without a correction")).collect();
        let [warning] = warned[..] else { panic!("{warnings:?}") };
        let sites = wider().count();
        assert!(warning.starts_with(&format!("{sites} sites without a correction")), "{warning}");
        let channels = first.width();
        let named = format!("the first is {}: {tokens} tokens for {channels} channels", first.name);
        assert!(warning.ends_with(&named), "{warning}");
    }
    // At the bound, the sites of that width are among those that are corrected.
    assert!(blocks.iter().flatten().any(|site| site.width() > width));
}

#[test]
fn stages_are_those_of_the_strategy() {
    let linears = quantized(&recipe(), 64).0.linears.len();
    let (simultaneous, _) = quantized(&Recipe { sequential: false, ..recipe() }, 64);
    assert!(stages(&simultaneous).contains(&"hessians"));
    let (rounded, _) = quantized(&Recipe { gptq: false, ..recipe() }, 64);
    assert!(stages(&rounded).contains(&"round"));
    for missing in ["hessians", "gptq", "propagate"] {
        assert!(!stages(&rounded).contains(&missing), "{missing}");
    }
    for outcome in [&simultaneous, &rounded] {
        assert_eq!(outcome.linears.len(), linears);
        assert!(outcome.linears.iter().all(|linear| linear.error > 0.0 && linear.error < 1.0));
        assert_eq!(outcome.resumed_blocks, 0);
    }
}

/// `tiny-llama` with a bias of every linear in `directory`: all zero, but that of the last block's down.
fn with_bias(directory: &Path, last: f32) -> Source {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    fs_err::create_dir(directory).unwrap();
    let config = fs_err::read(tiny.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["attention_bias"] = json!(true);
    config["mlp_bias"] = json!(true);
    fs_err::write(directory.join("config.json"), config.to_string()).unwrap();
    fs_err::copy(tiny.join("tokenizer.json"), directory.join("tokenizer.json")).unwrap();
    let bytes = fs_err::read(tiny.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let linears = file.iter().filter(|(name, _)| name.ends_with("_proj.weight"));
    let biases: Vec<(String, usize, Vec<u8>)> = linears
        .map(|(name, weight)| {
            let value = if name.contains("layers.3.mlp.down") { last } else { 0.0 };
            let rows = weight.shape()[0];
            let bytes = f16::from_f32(value).to_le_bytes().repeat(rows);
            (name.replace(".weight", ".bias"), rows, bytes)
        })
        .collect();
    let biases = biases.iter().map(|(name, rows, bytes)| {
        let view = TensorView::new(safetensors::Dtype::F16, vec![*rows], bytes).unwrap();
        (name.as_str(), view)
    });
    let tensors = file.iter().chain(biases);
    serialize_to_file(tensors, None, &directory.join("model.safetensors")).unwrap();
    Source::open(directory).unwrap()
}

/// A bias adds the same to the source's and to the quantized block's output, so no weight makes up for it.
#[test]
fn a_bias_is_no_error_of_a_linear() {
    let home = tempfile::tempdir().unwrap();
    let errors = |name: &str, bias: f32| -> Vec<f64> {
        let source = with_bias(&home.path().join(name), bias);
        let (outcome, _) = quantized_of(&source, &recipe(), 1024);
        outcome.linears.iter().map(|linear| linear.error).collect()
    };
    let (without, with) = (errors("without", 0.0), errors("with", 4.0));
    let (last, others) = without.split_last().unwrap();
    assert_eq!(others, &with[..others.len()]);
    let found = with[others.len()];
    assert!((found / last - 1.0).abs() < 0.01, "{found} and without a bias {last}");
}
