/*! What quantization costs, measured on models that say something. */

mod common;

use common::{Home, directory_from};

/// The perplexity that a run of `quantize` ends with, before and after.
#[track_caller]
fn change(home: &Home, line: &str) -> (f64, f64) {
    let outcome = home.json(&format!("{line} --overwrite --out atom"));
    let perplexity = |key: &str| outcome["perplexity"][key].as_f64().unwrap();
    (perplexity("before"), perplexity("after"))
}

/// Rounding to nearest with one scale a row: no groups, no order, no outliers, no transform.
const NAIVE: &str = "--recipe paper --group row --outliers 0 --no-order --no-gptq";

#[test]
fn the_method_is_what_keeps_the_bundled_model_alive() {
    let home = Home::new();
    let common = "quantize --model tiny-llama --samples 8 --seq-len 256 --windows 8";
    let (before, default) = change(&home, common);
    let (_, paper) = change(&home, &format!("{common} --recipe paper"));
    let (_, eight) = change(&home, &format!("{common} --bits 8 --act-bits 8 --kv-bits 8"));
    let (_, naive) = change(&home, &format!("{common} {NAIVE}"));
    let found =
        format!("{before} -> default {default}, paper {paper}, W8A8 {eight}, naive {naive}");
    eprintln!("{found}");
    assert!(default < paper, "{found}");
}

#[test]
fn the_bundled_model_has_the_references_perplexity() {
    let test = "the_bundled_model_has_the_references_perplexity";
    let Some(data) = directory_from("ATOM_DATA", test) else { return };
    let text = data.join("wikitext2/test.jsonl");
    let line = format!("eval-ppl --model tiny-llama --windows 20 --dataset {}", text.display());
    let found = Home::new().json(&line)["perplexity"].as_f64().unwrap();
    assert!((found - 80.27).abs() < 0.05, "{found}");
}

#[test]
fn a_model_with_experts_has_the_references_perplexity_and_keeps_it() {
    let test = "a_model_with_experts_has_the_references_perplexity_and_keeps_it";
    let Some(data) = directory_from("ATOM_DATA", test) else { return };
    let text = |name: &str| data.join("wikitext2").join(name).display().to_string();
    let (calib, dataset) = (text("train-first-1mb.jsonl"), text("test.jsonl"));
    let mixtral = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-mixtral");
    let home = Home::new();
    let line = format!("eval-ppl --model {mixtral} --windows 20 --dataset {dataset}");
    let found = home.json(&line)["perplexity"].as_f64().unwrap();
    assert!((found - 83.20).abs() < 0.01, "{found}");
    let ratio_of = |model: &str| {
        let line = format!(
            "quantize --model {model} --calib {calib} --dataset {dataset} --group 64 --outliers 32 --samples 8 \
             --seq-len 512 --windows 8"
        );
        let (before, after) = change(&home, &line);
        after / before
    };
    let (dense, sparse) = (ratio_of("tiny-llama"), ratio_of(mixtral));
    // On the CPU 1.0209 without experts and 1.0254 with them. Hessians that differ in their last bits give other
    // draws: over 20 of them both lose 0.024 on average, with standard deviations of 0.006 each and of 0.0083 of the
    // difference, which this bound allows above the measured one.
    assert!(sparse - dense < 0.013, "{sparse} with experts, {dense} without");
}

/// SmolLM2 is the smallest real model whose activations have outlier channels.
#[test]
fn the_method_is_what_keeps_smollm2_alive() {
    let test = "the_method_is_what_keeps_smollm2_alive";
    let Some(model) = directory_from("ATOM_SMOLLM2", test) else { return };
    let Some(data) = directory_from("ATOM_DATA", test) else { return };
    let text = |name: &str| data.join("wikitext2").join(name).display().to_string();
    let (calib, dataset) = (text("train-first-1mb.jsonl"), text("test.jsonl"));
    let home = Home::new();
    let perplexity = |model: &str, windows: usize| {
        let line = format!("eval-ppl --model {model} --windows {windows} --dataset {dataset}");
        home.json(&line)["perplexity"].as_f64().unwrap()
    };
    let quantized = |flags: &str, windows: usize| {
        let line = format!(
            "quantize --model {} --calib {calib} --samples 2 --seq-len 512 --no-eval {flags} \
             --out atom --overwrite",
            model.display()
        );
        home.run(&line).done();
        perplexity("atom", windows)
    };
    let before = perplexity(&model.display().to_string(), 2);
    let paper = quantized("--recipe paper --group 64 --outliers 64 --no-gptq", 2);
    let naive = quantized(NAIVE, 1);
    let found = format!("{before} -> paper {paper}, naive {naive}");
    // Measured on two windows: 18.8381, 29.99 and 11501.
    assert!((before - 18.8381).abs() < 0.02, "{found}");
    assert!((1.2..2.0).contains(&(paper / before)), "{found}");
    assert!(naive > 1000.0, "{found}");
}
