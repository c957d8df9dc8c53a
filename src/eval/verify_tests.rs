//! What is held against which limit.

use std::path::Path;

use super::*;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{Destination, Inputs};
use crate::hub;
use crate::pipeline::{Calibration, Output, Quantization, quantize};
use crate::progress::Silent;
use crate::recipe::{Group, Outliers, Recipe};
use crate::text::{Split, TextSet};

fn measured(perplexity: f64) -> PerplexityOutcome {
    PerplexityOutcome {
        model: "m".into(),
        dataset: "d".into(),
        perplexity,
        standard_error: 0.0,
        windows: 1,
        seq_len: 2,
        tokens: 2,
        seconds: 1.0,
        tokens_per_second: 2.0,
        cpu_seconds: 1.0,
        device: "cpu".into(),
    }
}

fn outcome(reference: Option<f64>, increase: Option<f64>) -> VerifyOutcome {
    VerifyOutcome {
        model: "m".into(),
        ok: true,
        checks: Vec::new(),
        perplexity: None,
        reference_perplexity: reference,
        increase,
        kernels_unchecked: None,
        device: "cpu".into(),
    }
}

fn found(checks: &[Check]) -> Vec<(&str, bool)> {
    checks.iter().map(|check| (check.name.as_str(), check.ok)).collect()
}

#[test]
fn a_limit_itself_is_kept() {
    let limits = Limits { max_ppl: Some(8.0), max_ppl_increase: Some(0.25) };
    let at = |perplexity: f64, increase| {
        perplexity_checks(&measured(perplexity), &outcome(Some(4.0), Some(increase)), limits)
    };
    let names = ["perplexity", "max-ppl", "max-ppl-increase"];
    let expected = |held: [bool; 3]| names.into_iter().zip(held).collect::<Vec<_>>();
    assert_eq!(found(&at(8.0, 0.25)), expected([true, true, true]));
    assert_eq!(found(&at(8.1, 0.25)), expected([true, false, true]));
    assert_eq!(found(&at(8.0, 0.26)), expected([true, true, false]));
    assert_eq!(found(&at(f64::NAN, f64::NAN)), expected([false, false, false]));
    let alone = perplexity_checks(&measured(8.0), &outcome(None, None), Limits::default());
    assert_eq!(found(&alone), [("perplexity", true)]);
    assert_eq!(alone[0].detail, "8.0000 on 1 window of d");
    let against = perplexity_checks(&measured(5.0), &outcome(Some(4.0), None), limits);
    assert_eq!(against[0].detail, "5.0000 on 1 window of d, reference 4.0000 (+25.00 %)");
}

#[test]
fn one_failed_check_fails_the_outcome() {
    let check = |ok| Check { name: "c".into(), ok, detail: String::new() };
    let mut all = outcome(None, None);
    all.add(vec![check(true)]);
    assert!(all.ok);
    all.add(vec![check(false), check(true)]);
    assert!(!all.ok && all.checks.len() == 3);
}

/// tiny-llama by rounding, in `out`.
fn checkpoint(out: &Path) -> AtomCheckpoint {
    let source = hub::tiny_llama().unwrap();
    let text = TextSet::sample(Split::Calibration);
    let calibration = Calibration { text, samples: 1, seq_len: 16, seed: 0 };
    let destination =
        Destination { out: out.to_owned(), overwrite: false, inputs: Inputs::default() };
    let quantization = Quantization {
        source: &source,
        calibration: &calibration,
        recipe: &Recipe {
            group: Group::Size(32),
            outliers: Outliers::Count(16),
            gptq: false,
            ..Recipe::default_recipe()
        },
        output: &Output { destination, resume: false },
        evaluation: None,
    };
    quantize(&Cpu::new().unwrap(), &quantization, &Silent).unwrap();
    AtomCheckpoint::open(out).unwrap()
}

fn verified(checkpoint: &AtomCheckpoint, kernels: &KernelCheck) -> VerifyOutcome {
    let verification = Verification {
        checkpoint,
        kernels,
        evaluation: None,
        reference: None,
        limits: Limits::default(),
    };
    verify(&Cpu::new().unwrap(), &verification, &Silent).unwrap()
}

#[test]
fn kernels_are_compared_where_that_is_asked_for_and_the_checkpoint_is_sound() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let on = KernelCheck::On(Evaluation {
        text: TextSet::sample(Split::Evaluation),
        seq_len: 16,
        windows: Some(1),
    });
    let kernels = |outcome: &VerifyOutcome| {
        let check = outcome.checks.iter().find(|check| check.name == "kernels");
        check.map(|check| (check.ok, check.detail.clone()))
    };
    let sound = checkpoint(&out);
    let outcome = verified(&sound, &on);
    assert!(outcome.ok && outcome.kernels_unchecked.is_none());
    let (ok, detail) = kernels(&outcome).unwrap();
    assert!(ok);
    assert!(
        detail.starts_with("4 blocks on 16 tokens: codes of 16 sites identical, 28 products"),
        "{detail}"
    );

    let outcome = verified(&sound, &KernelCheck::Off("not wanted".to_owned()));
    assert!(outcome.ok && kernels(&outcome).is_none());
    assert_eq!(outcome.kernels_unchecked.as_deref(), Some("not wanted"));

    // What a damaged checkpoint computes says nothing.
    drop(sound);
    let shard = out.join("model.safetensors");
    let mut bytes = fs_err::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs_err::write(&shard, bytes).unwrap();
    let outcome = verified(&AtomCheckpoint::open(&out).unwrap(), &on);
    assert!(!outcome.ok && kernels(&outcome).is_none());
    assert_eq!(outcome.kernels_unchecked.as_deref(), Some("the checkpoint is not sound"));
}
