//! Every kind of network through the entire program on the CPU: quantized, verified, and compared with its source.
//! Its logits are compared with transformers in src/network/family_tests.rs.

mod common;

use common::families::home;
use fs_err as fs;
use serde_json::Value;

const QUANTIZE: &str = "--calib calibration.txt --seq-len 32 --group 16 --outliers 8 --no-eval";

#[test]
fn every_family_is_quantized_and_keeps_its_loss_at_eight_bits() {
    let (home, names) = home();
    assert!(names.len() >= 10, "{names:?}");
    for name in names {
        let loss = |model: &str| {
            let line = format!("eval-ppl --model {model} --dataset evaluation.txt --seq-len 40");
            home.json(&line)["perplexity"].as_f64().unwrap().ln()
        };
        let source = loss(&format!("./{name}"));
        for (bits, allowed) in [(8, 0.01), (4, 0.25)] {
            let line = format!(
                "quantize --model ./{name} {QUANTIZE} --samples 32 --bits {bits} --act-bits {bits} --kv-bits {bits} \
                 --out {name}-{bits}"
            );
            let made = home.json(&line);
            let verified =
                home.json(&format!("verify --model {name}-{bits} --no-eval --device cpu"));
            assert_eq!(verified["ok"], true, "{name}: {verified}");
            let own = loss(&format!("{name}-{bits}"));
            assert!((own / source - 1.0).abs() < allowed, "{name} at {bits} bits: {own}, {source}");
            // Every linear of every block was, experts' among them.
            let atom: Value = serde_json::from_slice(
                &fs::read(home.path(&format!("{name}-{bits}")).join("atom.json")).unwrap(),
            )
            .unwrap();
            let planned: usize = atom["blocks"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|block| block.as_array().unwrap())
                .map(|site| site["linears"].as_array().unwrap().len())
                .sum();
            assert_eq!(made["linears"].as_array().unwrap().len(), planned, "{name}");
        }
    }
}

/// The recipe's ways to a checkpoint differ in what passes through a block; experts go all of them.
#[test]
fn experts_are_quantized_by_every_road() {
    let (home, _) = home();
    for flags in ["--recipe paper", "--no-gptq", "--set correction=0", "--act-bits 16 --kv-bits 16"]
    {
        let line =
            format!("quantize --model ./mixtral {QUANTIZE} --samples 32 {flags} --overwrite");
        home.run(&format!("{line} --out m")).done();
        home.run("verify --model m --no-eval --device cpu").done();
    }
    // In stages, the same bytes.
    let line = format!("quantize --model ./qwen3-moe {QUANTIZE} --samples 32 --out one");
    home.run(&line).done();
    let calibrate =
        "calibrate --model ./qwen3-moe --calib calibration.txt --seq-len 32 --samples 32 --out c";
    home.run(calibrate).done();
    home.run("plan c --group 16 --outliers 8 --out p").done();
    home.run("pack --model ./qwen3-moe --plan p --no-eval --out three").done();
    let weights = |name: &str| fs::read(home.path(name).join("model.safetensors")).unwrap();
    assert!(weights("one") == weights("three"));
    // Bits where they matter.
    let line =
        format!("quantize --model ./mixtral {QUANTIZE} --samples 16 --target-bits 6 --overwrite");
    let made = home.json(&format!("{line} --out t"));
    assert!(made["bits_per_weight"].as_f64().unwrap() <= 6.0, "{made}");
}

#[test]
fn experts_that_few_tokens_come_to_are_named_and_rounded() {
    let (home, _) = home();
    let line = format!("quantize --model ./mixtral {QUANTIZE} --samples 4 --out few");
    let run = home.run(&line).done();
    // One warning for all of them, which says how many there are and names the first.
    let warnings: Vec<&str> =
        run.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 1, "{}", run.stderr);
    assert!(warnings[0].contains("8 experts rounded to nearest"), "{}", run.stderr);
    assert!(warnings[0].contains("block_sparse_moe.experts.0.mlp_act: "), "{}", run.stderr);
    let run = home.run(&format!("{line} --overwrite --set expert_tokens=1")).done();
    assert!(!run.stderr.contains("rounded to nearest"), "{}", run.stderr);
}
