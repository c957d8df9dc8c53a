/*! docs/exports.md against the program: its readers, Python programs, must see in an export what docs/format.md's reader sees
in the checkpoint, to the bit. Set `ATOM_TEST_PYTHON` to a Python with NumPy where `python3` has none. */

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use common::families::home;
use common::{Home, assert_same_files};
use fs_err as fs;
use serde_json::Value;

/// Settings of `atom quantize` on tiny-llama, and the formats that take the checkpoint.
const SETTINGS: [(&str, &[&str]); 10] = [
    ("--recipe w4a16", &["compressed-tensors", "gptq", "dense"]),
    ("--recipe w4a16 --bits 8 --group 64 --no-gptq", &["compressed-tensors", "gptq", "dense"]),
    ("--recipe w4a16 --bits 2 --rows-per-scale 2 --no-gptq", &["compressed-tensors"]),
    ("--recipe q4_0 --rows-per-scale 2 --no-gptq", &["compressed-tensors", "gptq"]),
    ("--recipe nvfp4", &["compressed-tensors", "dense"]),
    ("--recipe nvfp4 --act-bits 16 --rows-per-scale 2 --no-gptq", &["compressed-tensors"]),
    ("--recipe mxfp4 --no-gptq", &["compressed-tensors", "dense"]),
    ("--group 64 --outliers 64", &["dense"]),
    ("--recipe paper --group 48 --outliers 20 --outlier-format fp16 --no-gptq", &["dense"]),
    ("--format fp4-bnb --group 48 --outliers 5 --outlier-format fp8 --no-gptq", &["dense"]),
];

const SHORT: &str = "--samples 1 --seq-len 64 --no-eval --quiet";

fn python() -> String {
    std::env::var("ATOM_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// Whether there is NumPy; says so past the test harness where there is none.
fn numpy(test: &str) -> bool {
    let import = Command::new(python())
        .args(["-c", "import numpy"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !import {
        let skipped = format!("\nSKIPPED: {test}: {} has no NumPy\n", python());
        std::io::stderr().write_all(skipped.as_bytes()).unwrap();
    }
    import
}

/// Exports the checkpoint `atom` of `home` to each format, and compares them by the readers.
fn compare(home: &Home, atom: &str, formats: &[&str], what: &str) {
    for format in formats {
        home.run(&format!("export {atom} --format {format} --quiet --overwrite")).done();
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let output =
        Command::new(python())
            .args([&std::ffi::OsString::from("-B"), tests.join("compare_exports.py").as_os_str()])
            .arg(home.path(atom))
            .args(formats.iter().map(|format| {
                format!("{format}={}", home.path(&format!("{atom}-{format}")).display())
            }))
            .output()
            .unwrap();
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8_lossy(&output.stdout).lines().count();
    assert_eq!(lines, formats.len(), "{what}");
}

fn repository(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

#[test]
fn the_readers_in_the_document_are_those_that_are_tested() {
    let (document, readers) = (repository("docs/exports.md"), repository("tests/read_exports.py"));
    assert!(document.contains(&format!("```python\n{readers}```\n")));
    for reader in readers.split("\ndef ") {
        let lines = reader.lines().filter(|line| !line.trim().is_empty()).count();
        assert!(lines <= 16, "a reader has grown to {lines} lines: {reader}");
    }
}

#[test]
fn an_export_holds_the_codes_and_scales_of_its_checkpoint() {
    if !numpy("an_export_holds_the_codes_and_scales_of_its_checkpoint") {
        return;
    }
    let home = Home::new();
    for (number, (settings, formats)) in SETTINGS.iter().enumerate() {
        let line = format!("quantize --model tiny-llama {SHORT} {settings} --out {number}");
        home.run(&line).done();
        compare(&home, &number.to_string(), formats, settings);
    }
}

#[test]
fn every_family_is_exported() {
    if !numpy("every_family_is_exported") {
        return;
    }
    let (home, names) = home();
    assert!(names.len() >= 10, "{names:?}");
    for name in &names {
        let quantize = |recipe: &str| {
            home.run(&format!(
                "quantize --model ./{name} --recipe {recipe} --calib calibration.txt --seq-len 32 --samples 4 \
                 --no-eval --quiet --overwrite --out atom"
            ))
        };
        // Heads of 10 and experts of 24 channels.
        let uneven = ["mistral", "qwen3-moe", "seed-oss", "mimo", "qwen2-moe"];
        // Their programs expect gate and up in one tensor.
        if ["phi3", "phi3-short", "glm4"].contains(&&name[..]) {
            quantize("w4a16").done();
            for format in ["compressed-tensors", "gptq", "gguf", "dense"] {
                let line = format!("export atom --format {format} --out no");
                home.run(&line)
                    .fails(3, &["cannot be exported", "gate_up_proj", "as one tensor each"]);
            }
            continue;
        }
        if uneven.contains(&&name[..]) {
            quantize("w4a16").fails(3, &["are no multiple of 16, and this recipe pads no groups"]);
        } else {
            quantize("w4a16").done();
            compare(&home, "atom", &["compressed-tensors", "gptq", "dense"], name);
            quantize("nvfp4").done();
            compare(&home, "atom", &["compressed-tensors"], name);
        }
        quantize("default --group 16 --outliers 8").done();
        compare(&home, "atom", &["dense"], name);
        // The export is a source like any other, and loses nothing but the quantized activations.
        let exported =
            home.json("eval-ppl --model atom-dense --dataset evaluation.txt --seq-len 40");
        let own = home.json("eval-ppl --model atom --dataset evaluation.txt --seq-len 40");
        let loss = |outcome: &Value| outcome["perplexity"].as_f64().unwrap().ln();
        let (exported, own) = (loss(&exported), loss(&own));
        assert!((exported / own - 1.0).abs() < 0.2, "{name}: {exported} and {own}");
    }
}

#[test]
fn a_mixtral_is_exported_with_its_experts() {
    if !numpy("a_mixtral_is_exported_with_its_experts") {
        return;
    }
    let home = Home::new();
    let mixtral = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-mixtral");
    let line = format!("quantize --model {mixtral} --recipe w4a16 {SHORT} --no-gptq --out atom");
    home.run(&line).done();
    compare(&home, "atom", &["compressed-tensors", "gptq", "dense"], "tiny-mixtral");
    let config = fs::read_to_string(home.path("atom-compressed-tensors/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let ignored = &config["quantization_config"]["ignore"];
    assert!(ignored.as_array().unwrap().contains(&"re:.*gate$".into()), "{ignored}");
}

#[test]
fn a_dense_export_of_weights_alone_has_the_perplexity_of_its_checkpoint() {
    let home = Home::new();
    home.run(&format!("quantize --model tiny-llama --recipe w4a16 {SHORT} --out atom")).done();
    home.run("export atom --format dense").done();
    let perplexity = |model: &str| {
        let line = format!("eval-ppl --model {model} --windows 2 --seq-len 128");
        home.json(&line)["perplexity"].as_f64().unwrap()
    };
    // tiny-llama is of F16, which holds a code times a scale of 8 bits.
    assert_eq!(perplexity("atom"), perplexity("./atom-dense"));
    home.run("export atom --format dense --dtype bf16 --out rounded").done();
    let config: Value =
        serde_json::from_str(&fs::read_to_string(home.path("rounded/config.json")).unwrap())
            .unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    let ratio = perplexity("./rounded") / perplexity("atom");
    assert!(ratio != 1.0 && (ratio - 1.0).abs() < 0.01, "{ratio}");
}

#[test]
fn what_cannot_be_exported_exactly_is_refused_before_any_work() {
    let home = Home::new();
    home.run(&format!("quantize --model tiny-llama {SHORT} --outliers 32 --out atom")).done();
    let before = home.names();
    for (format, recipes) in [
        ("compressed-tensors", "--recipe w4a16 or --recipe nvfp4 or --recipe mxfp4"),
        ("gptq", "--recipe w4a16"),
    ] {
        let parts = [
            "cannot be exported as",
            "order is energy and must be none (model.layers.0.self_attn.attn_in and 15 more)",
            "outliers is 32 and must be 0",
            "transform is hadamard and must be none",
            "act_bits is 4 and must be 16",
            recipes,
            "`atom export --format dense` takes any checkpoint",
        ];
        home.run(&format!("export atom --format {format}")).fails(3, &parts);
        home.run(&format!("export atom --format {format} --dry-run")).fails(3, &parts);
        let json = home.run(&format!("export atom --format {format} --json"));
        assert!(json.json()["error"].is_object(), "{}", json.stdout);
    }
    // Of a source, nothing is known to be exact.
    home.run("export tiny-llama --format dense").fails(3, &["is not an Atom checkpoint"]);
    home.run("export nothing --format dense").fails(3, &[]);
    assert_eq!(home.names(), before);
}

#[test]
fn settings_that_engines_lack_are_named() {
    let home = Home::new();
    for (settings, format, part) in [
        ("--recipe w4a16 --bits 3", "compressed-tensors", "bits is 3 and must be 2, 4 or 8"),
        (
            "--recipe w4a16 --bits 2",
            "gptq",
            "bits is 2 and must be 4 or 8, the same in all linears",
        ),
        ("--recipe nvfp4 --act-bits 8", "compressed-tensors", "act_bits is 8 and must be 4 or 16"),
        ("--recipe nvfp4 --clip-act 0.9", "compressed-tensors", "clip_act is 0.9 and must be 1"),
        (
            "--recipe nvfp4 --group 32",
            "compressed-tensors",
            "group is 32 and must be 16 with scales = \"e4m3\"",
        ),
        (
            "--recipe nvfp4 --set scales=\"f16\"",
            "compressed-tensors",
            "scales is f16 and must be e4m3 or power-of-two",
        ),
        (
            "--recipe w4a16 --group 160 --set pad_groups=true --set search_scales=false",
            "compressed-tensors",
            "group is 160 in 256 channels, which it does not divide and must be a divisor",
        ),
        ("--recipe w4a16 --format fp4-bnb", "compressed-tensors", "format is fp4-bnb and must be"),
        ("--recipe nvfp4", "gptq", "format is fp4 and must be int"),
    ] {
        // `quantize --export` says the same, before it begins.
        let line = format!("quantize --model tiny-llama {SHORT} {settings} --export {format}");
        home.run(&line).fails(3, &["a checkpoint of tiny-llama cannot be exported", part]);
        let line = format!(
            "quantize --model tiny-llama {SHORT} {settings} --no-gptq --overwrite --out atom"
        );
        home.run(&line).done();
        home.run(&format!("export atom --format {format}")).fails(3, &[part]);
    }
    assert_eq!(home.names(), ["atom"]);
}

#[test]
fn scales_of_f16_do_not_survive_a_model_of_bf16() {
    let (home, _) = home();
    let line =
        "quantize --model ./llama-gqa --recipe q4_0 --no-gptq --calib calibration.txt --samples 1";
    home.run(&format!("{line} --seq-len 32 --no-eval -q --out atom")).done();
    let part = "scales is f16 and must be bf16 in a model of BF16, to which engines cast them";
    for format in ["compressed-tensors", "gptq"] {
        home.run(&format!("export atom --format {format}")).fails(3, &[part]);
        home.run(&format!("export atom --format {format} --dtype f16 --dry-run")).done();
    }
}

#[test]
fn quantize_exports_in_the_same_run() {
    let home = Home::new();
    let line = format!("quantize --model tiny-llama --recipe w4a16 {SHORT} --out atom");
    let outcome = home.json(&format!("{line} --export compressed-tensors,gptq"));
    let exports = outcome["exports"].as_array().unwrap();
    let formats: Vec<_> = exports.iter().map(|export| export["format"].as_str().unwrap()).collect();
    assert_eq!(formats, ["compressed-tensors", "gptq"]);
    assert_eq!(home.names(), ["atom", "atom-compressed-tensors", "atom-gptq"]);
    home.run("export atom --format gptq --out again").done();
    assert_same_files(&home.path("again"), &home.path("atom-gptq"));

    // What is in the way of an export is found before the run.
    fs::create_dir(home.path("b-gptq")).unwrap();
    fs::write(home.path("b-gptq/mine"), "").unwrap();
    let line = line.replace("--out atom", "--out b");
    home.run(&format!("{line} --export gptq")).fails(2, &["b-gptq exists"]);
    home.run(&format!("{line} --export gptq --target-bits 4.5"))
        .fails(2, &["--export gptq needs widths and outliers that are known before the run"]);
    assert!(!home.path("b").exists());
}

#[test]
fn an_export_replaces_exports_alone() {
    let home = Home::new();
    let quantize = format!("quantize --model tiny-llama --recipe w4a16 {SHORT} --no-gptq");
    home.run(&format!("{quantize} --out atom")).done();
    home.run(&format!("{quantize} --out other")).done();
    home.run("export atom --format gptq --out gptq").done();
    home.run("export atom --format gptq --out gptq").fails(2, &["exists", "--overwrite"]);
    home.run("export atom --format dense --out gptq --overwrite").done();
    assert!(!home.path("gptq/quantize_config.json").exists());
    home.run("export atom --format gptq --out other --overwrite")
        .fails(2, &["is not an export of atom and is not overwritten"]);
    home.run(&format!("{quantize} --out gptq --overwrite"))
        .fails(2, &["is not an Atom checkpoint and is not overwritten"]);
    home.run("export atom --format gptq --out atom --overwrite").fails(2, &["which is read"]);
    home.run("export atom --format gptq --out atom/inside").fails(2, &["lies inside"]);
    fs::write(home.path("gptq/notes.txt"), "mine").unwrap();
    home.run("export atom --format gptq --out gptq --overwrite").fails(2, &["holds notes.txt"]);
    assert!(home.path("gptq/notes.txt").exists());
    // A weight that was changed is not exported.
    let shard = home.path("atom/model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    home.run("export atom --format gptq --out new").fails(3, &["atom.json says"]);
    assert_eq!(home.names(), ["atom", "gptq", "other"]);
}
