/*! Finished checkpoints: what the program says of them, and that it finds what is wrong with them. */

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use atom::Kind;
use atom::backend::cpu::Cpu;
use atom::checkpoint::AtomCheckpoint;
use atom::eval::{KernelCheck, Limits, Verification, verify};
use atom::progress::Progress;
use common::{Dtype, Home, RandomModel, Run, SMALL};
use fs_err as fs;
use serde_json::{Value, json};

/// A home with `model` and the checkpoint `atom` made of it.
fn home_with_atom(flags: &str) -> Home {
    let home = Home::with_model();
    home.run(&format!("quantize --model model {SMALL} {flags} --no-eval --out atom")).done();
    home
}

/// Whether every field of `object` is there with its type: `s`tring, `n`umber, `i`nteger, `b`oolean,
/// `a`rray, `o`bject, or null.
#[track_caller]
fn assert_fields(object: &Value, fields: &str) {
    for field in fields.split_whitespace() {
        let (name, kinds) = field.split_once(':').unwrap();
        let value = object.get(name).unwrap_or_else(|| panic!("no `{name}` in {object:#}"));
        let fits = kinds.chars().any(|kind| match kind {
            's' => value.is_string(),
            'n' => value.is_f64() && value.as_f64().unwrap().is_finite(),
            'i' => value.is_u64(),
            'b' => value.is_boolean(),
            'a' => value.is_array(),
            'o' => value.is_object(),
            '0' => value.is_null(),
            _ => unreachable!("{kind}"),
        });
        assert!(fits, "`{name}` is {value}, not of {kinds}");
    }
}

#[test]
fn json_objects_have_the_fields_that_are_promised() {
    let home = Home::with_model();
    let quantize = format!("quantize --model model {SMALL} --out atom");
    let dry = home.json(&format!("{quantize} --dry-run"));
    assert_fields(
        &dry,
        "out:s model:s recipe:o blocks:i linears:i samples:i seq_len:i source_bytes:i out_bytes:i \
         bits_per_weight:n memory_bytes:i free_disk_bytes:i",
    );
    assert_eq!(home.names(), ["model"], "a dry run writes nothing");

    let done = home.json(&quantize);
    assert_fields(
        &done,
        "out:s model:s recipe:o samples:i seq_len:i seconds:n stage_seconds:o peak_rss_bytes:i peak_gpu_bytes:i0 \
         bits_per_weight:n source_bytes:i out_bytes:i device:s linears:a perplexity:o",
    );
    assert_eq!(done["linears"].as_array().unwrap().len(), 14);
    for linear in done["linears"].as_array().unwrap() {
        assert_fields(linear, "name:s bits:i error:n");
        assert!((0.0..1.0).contains(&linear["error"].as_f64().unwrap()), "{linear}");
    }
    assert!(done["stage_seconds"].as_object().unwrap().values().all(Value::is_f64));
    for key in ["recipe", "samples", "seq_len", "bits_per_weight", "source_bytes", "out_bytes"] {
        assert_eq!(dry[key], done[key], "the dry run foretells `{key}`");
    }

    let eval = home.json("eval-ppl --model atom --seq-len 64 --windows 2");
    assert_fields(
        &eval,
        "model:s dataset:s perplexity:n windows:i seq_len:i tokens:i seconds:n \
         tokens_per_second:n device:s",
    );
    assert_eq!(eval["perplexity"], done["perplexity"]["after"], "the same windows");
    assert_eq!((&eval["windows"], &eval["tokens"]), (&json!(2), &json!(128)));

    let verify = home.json("verify --model atom --reference model --seq-len 64 --windows 2");
    assert_fields(
        &verify,
        "ok:b checks:a perplexity:n reference_perplexity:n increase:n kernels_unchecked:s0 device:s",
    );
    for check in verify["checks"].as_array().unwrap() {
        assert_fields(check, "name:s ok:b detail:s");
        assert_eq!(check["ok"], true, "{check}");
    }
    assert_eq!(verify["ok"], true);
    assert_eq!(verify["perplexity"], done["perplexity"]["after"]);
    assert_eq!(verify["reference_perplexity"], done["perplexity"]["before"]);
    let without = home.json("verify --model atom --no-eval");
    assert_fields(&without, "ok:b checks:a perplexity:0 reference_perplexity:0 increase:0");
    assert_eq!(without["ok"], true);
}

#[test]
fn a_checkpoint_says_what_it_holds() {
    let home = home_with_atom("--bits 3");
    let source = home.json("inspect model");
    assert_eq!((&source["kind"], &source["blocks"]), (&json!("source"), &json!(2)));
    assert_eq!(source["architecture"], "LlamaForCausalLM");
    assert_fields(&source, "tensors:i bytes:i recipe:0 bits_per_weight:0");
    let atom = home.json("inspect atom");
    assert_eq!((&atom["kind"], &atom["source"]), (&json!("atom"), &json!("model")));
    assert_eq!(atom["recipe"]["bits"], 3);
    assert_fields(&atom, "name:s calibration:s tool_version:s bits_per_weight:n linears:a");
    let down = &atom["linears"][6];
    assert_eq!(down["name"], "model.layers.0.mlp.down_proj");
    assert_eq!(
        (&down["rows"], &down["columns"], &down["bits"]),
        (&json!(64), &json!(172), &json!(3))
    );
    assert_fields(down, "format:s group_size:i outliers:i bytes:i error:n");
    for model in ["model", "atom", "tiny-llama"] {
        assert!(home.run(&format!("inspect {model}")).done().stdout.contains("LlamaForCausalLM"));
    }
}

/// Where a tensor's bytes lie in a safetensors file.
fn byte_range(file: &[u8], tensor: &str) -> std::ops::Range<usize> {
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let entries: Value = serde_json::from_slice(&file[8..header]).unwrap();
    let offsets = &entries[tensor]["data_offsets"];
    let offset =
        |at: usize| header + offsets[at].as_u64().unwrap_or_else(|| panic!("{tensor}")) as usize;
    offset(0)..offset(1)
}

/// `verify --no-eval`, which must fail; returns the failed checks joined.
#[track_caller]
fn damage(home: &Home) -> String {
    let run = home.run("verify --model atom --no-eval --json");
    let run = run.fails(1, &["atom failed verification: "]);
    let outcome = run.json();
    assert_eq!(outcome["ok"], false);
    let failed = outcome["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false);
    failed.map(|check| format!("{}: {}\n", check["name"], check["detail"])).collect()
}

#[test]
fn a_changed_byte_is_found_in_every_kind_of_tensor() {
    for (flags, tensors) in [
        (
            "",
            &[
                "model.embed_tokens.weight",
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.self_attn.attn_in.order",
                "model.layers.1.self_attn.v_proj.weight_codes",
                "model.layers.1.mlp.down_proj.weight_scales",
                "model.layers.1.mlp.gate_proj.outlier_codes",
                "model.layers.0.self_attn.o_proj.outlier_scales",
                "model.norm.weight",
            ][..],
        ),
        ("--outlier-format fp16", &["model.layers.0.mlp.up_proj.outlier_weights"]),
    ] {
        let home = home_with_atom(flags);
        let path = home.path("atom/model.safetensors");
        let sound = fs::read(&path).unwrap();
        for tensor in tensors {
            let range = byte_range(&sound, tensor);
            for at in [range.start, range.end - 1] {
                let mut damaged = sound.clone();
                damaged[at] ^= 0x10;
                fs::write(&path, damaged).unwrap();
                let found = damage(&home);
                assert!(found.contains("checksums") && found.contains(tensor), "{tensor}: {found}");
            }
        }
        fs::write(&path, &sound).unwrap();
        home.run("verify --model atom --no-eval").done();
    }
}

/// Someone who can write a tensor can write its hash: what the numbers mean is checked as well.
#[test]
fn a_tensor_that_means_nothing_is_found_behind_a_right_hash() {
    // Signed scales may be negative.
    let home = home_with_atom("--set signed_scales=false");
    let (path, json_path) = (home.path("atom/model.safetensors"), home.path("atom/atom.json"));
    let sound = fs::read(&path).unwrap();
    let sound_json = fs::read(&json_path).unwrap();
    for (tensor, bytes, part) in [
        ("model.layers.0.mlp.mlp_in.order", &[255, 255, 255, 127][..], "64 channels"),
        ("model.layers.0.mlp.mlp_in.order", &[254, 255, 255, 255], "neither a channel nor padding"),
        ("model.layers.0.mlp.gate_proj.weight_scales", &[0, 0x7c], "inf"),
        ("model.layers.0.mlp.gate_proj.weight_scales", &[0, 0xa0], "negative scale"),
        ("model.layers.0.mlp.gate_proj.outlier_codes", &[128], "-128"),
        ("model.layers.0.mlp.gate_proj.outlier_scales", &[1, 0x7c], "NaN"),
        ("model.layers.1.self_attn.key_mean", &[0, 0, 0xc0, 0x7f], "not finite"),
        ("model.norm.weight", &[1, 0x7e], "NaN"),
    ] {
        let range = byte_range(&sound, tensor);
        let mut damaged = sound.clone();
        damaged[range.start..range.start + bytes.len()].copy_from_slice(bytes);
        let hash = atom::checkpoint::sha256_hex(&damaged[range]);
        fs::write(&path, damaged).unwrap();
        edit(&json_path, |atom| atom["tensors"][tensor]["sha256"] = hash.into());
        let found = damage(&home);
        assert!(found.contains(part) && found.contains(tensor), "{tensor}: {found}");
        assert!(!found.contains("checksums"), "{found}");
        fs::write(&json_path, &sound_json).unwrap();
    }
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn an_edited_description_is_found() {
    let home = home_with_atom("");
    let path = home.path("atom/atom.json");
    let sound = fs::read(&path).unwrap();
    type Change = fn(&mut Value);
    let checks: [(Change, &str); 10] = [
        (|atom| atom["blocks"][0][0]["group_size"] = 64.into(), "shapes"),
        (|atom| atom["blocks"][0][0]["outlier_channels"] = 0.into(), "shapes"),
        (|atom| atom["blocks"][0][2]["linears"][0]["bits"] = 3.into(), "shapes"),
        (|atom| atom["blocks"][1][2]["linears"][0]["bits"] = 16.into(), "shapes"),
        (|atom| atom["blocks"][0][0]["name"] = "elsewhere".into(), "plan"),
        (|atom| atom["kv"]["bits"] = "four".into(), "plan"),
        (|atom| atom["kv"]["bits"] = 0.into(), "`kv`: bits is 0"),
        (|atom| atom["kv"]["clip"] = (-1).into(), "`kv`: clip is -1"),
        (|atom| atom["kv"]["rotate"] = false.into(), "`kv` is not what `recipe` says"),
        (|atom| atom["recipe"]["bits"] = 7.into(), "`recipe`: bits is 7"),
    ];
    for (change, name) in checks {
        edit(&path, change);
        let found = damage(&home);
        assert!(found.contains(name), "{name}: {found}");
        fs::write(&path, &sound).unwrap();
    }
    // What cannot be opened at all is bad input.
    let refusals: [(Change, &[&str]); 8] = [
        (|atom| atom["format_version"] = 2.into(), &["format version 2", "hint: use a newer"]),
        (|atom| atom["format_version"] = Value::Null, &["no valid `format_version`", "hint: "]),
        (
            |atom| atom["tensors"]["ghost"] = json!({"sha256": "0".repeat(64)}),
            &["lists tensor `ghost`", "hint: "],
        ),
        (|atom| atom["tensors"]["ghost"] = json!({}), &["atom.json is damaged", "hint: "]),
        (
            |atom| atom["files"]["config.json"]["sha256"] = "f".into(),
            &["no valid SHA-256 of `config.json`", "hint: "],
        ),
        (|atom| atom["sha256"] = 3.into(), &["atom.json is damaged", "hint: "]),
        (
            |atom| drop(atom["tensors"].as_object_mut().unwrap().remove("model.norm.weight")),
            &["does not list tensor `model.norm.weight`", "hint: "],
        ),
        (|atom| *atom = json!([]), &["atom.json"]),
    ];
    for (change, parts) in refusals {
        edit(&path, change);
        for line in
            ["verify --model atom --no-eval", "eval-ppl --model atom --seq-len 64", "inspect atom"]
        {
            home.run(line).fails(3, parts);
        }
        fs::write(&path, &sound).unwrap();
    }
    home.run("verify --model atom --no-eval").done();
}

/// What runs is more than tensors: the configuration, the tokenizer and the manifest count as well.
#[test]
fn a_changed_file_next_to_the_shards_is_found() {
    let home = home_with_atom("");
    let listed = home.json("verify --model atom --no-eval");
    assert_eq!(listed["checks"][0]["name"], "files");
    for name in ["config.json", "tokenizer.json", "atom.json"] {
        assert!(listed["checks"][0]["detail"].as_str().unwrap().contains(name), "{listed}");
    }
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 4] = [
        ("config.json", |config| config["rope_theta"] = 500_000.into()),
        ("config.json", |config| config["model_type"] = "gpt2".into()),
        ("tokenizer.json", |tokenizer| tokenizer["model"]["vocab"]["a"] = 7.into()),
        ("atom.json", |atom| atom["calibration"]["dataset"] = "another".into()),
    ];
    for (name, change) in changes {
        let path = home.path("atom").join(name);
        let sound = fs::read(&path).unwrap();
        edit(&path, change);
        let found = damage(&home);
        assert!(found.contains("files") && found.contains(name), "{name}: {found}");
        // With a text to measure on too: the check fails before the text is looked at.
        home.run("verify --model atom --windows 1 --seq-len 64").fails(1, &["files"]);
        let parts = [name, if found.contains("gpt2") { "gpt2" } else { "is not what was written" }];
        home.run("eval-ppl --model atom --seq-len 64 --windows 1").fails(3, &parts[1..]);
        fs::write(&path, &sound).unwrap();
    }
    let path = home.path("atom/tokenizer.json");
    let sound = fs::read(&path).unwrap();
    fs::write(&path, "garbled").unwrap();
    assert!(damage(&home).contains("tokenizer.json is not what was written"));
    home.run("verify --model atom --windows 1 --seq-len 64").fails(1, &["files"]);
    fs::remove_file(&path).unwrap();
    assert!(damage(&home).contains("tokenizer.json is missing"));
    fs::write(&path, sound).unwrap();
    home.run("verify --model atom --no-eval").done();
}

/// A checkpoint from before there were hashes of files: it is read, with a word on what nothing covers.
#[test]
fn an_older_checkpoint_stays_readable() {
    let home = home_with_atom("");
    let measure = "eval-ppl --model atom --seq-len 64 --windows 2";
    let before = home.json(measure)["perplexity"].clone();
    edit(&home.path("atom/atom.json"), |atom| {
        for field in ["files", "sha256"] {
            atom.as_object_mut().unwrap().remove(field).unwrap();
        }
    });
    let outcome = home.json("verify --model atom --no-eval");
    assert_eq!(outcome["ok"], true);
    let detail = outcome["checks"][0]["detail"].as_str().unwrap();
    assert!(detail.starts_with("not covered"), "{detail}");
    assert_eq!(home.json(measure)["perplexity"], before);
    home.run("inspect atom").done();
}

#[test]
fn a_missing_or_short_file_is_bad_input() {
    let home = home_with_atom("");
    let path = home.path("atom/model.safetensors");
    let sound = fs::read(&path).unwrap();
    fs::write(&path, &sound[..sound.len() - 7]).unwrap();
    home.run("verify --model atom").fails(3, &["model.safetensors is truncated", "hint: "]);
    fs::remove_file(&path).unwrap();
    home.run("verify --model atom").fails(3, &["atom has no *.safetensors", "hint: "]);
    fs::write(&path, sound).unwrap();
    fs::remove_file(home.path("atom/tokenizer.json")).unwrap();
    home.run("verify --model atom").fails(3, &["atom has no tokenizer.json", "hint: "]);
    home.run("verify --model absent").fails(3, &["absent", "hint: "]);
    home.run("verify --model atom --no-eval").fails(1, &["files"]);
}

#[test]
fn a_limit_that_is_exceeded_is_a_failed_check() {
    let home = home_with_atom("");
    let common = "--seq-len 64 --windows 2";
    let measured = home.json(&format!("verify --model atom --reference model {common}"));
    let (found, increase) =
        (measured["perplexity"].as_f64().unwrap(), measured["increase"].as_f64().unwrap().abs());
    let (above, below) = (found + 1.0, found - 1.0);

    home.run(&format!("verify --model atom {common} --max-ppl {above}")).done();
    let run = home.run(&format!("verify --model atom {common} --max-ppl {below} --json"));
    let outcome = run.fails(1, &["atom failed verification: max-ppl"]).json();
    assert_eq!(outcome["ok"], false);
    assert_eq!(outcome["perplexity"], found);
    let line = format!("verify --model atom --reference model {common} --max-ppl-increase");
    home.run(&format!("{line} {}", increase + 0.01)).done();
    // A random model may gain by chance, but not compared with a better reference.
    let run =
        home.run(&format!("{line} 0.0001").replace("--reference model", "--reference tiny-llama"));
    let run = run.fails(1, &["atom failed verification: max-ppl-increase"]);
    assert!(run.stdout.contains("FAILED  max-ppl-increase"), "{}", run.stdout);

    for model in ["model", "atom"] {
        let line = format!("eval-ppl --model {model} {common}");
        home.run(&format!("{line} --max-ppl {}", 2.0 * found)).done();
        let run =
            home.run(&format!("{line} --max-ppl 2 --json")).fails(1, &["exceeds --max-ppl 2"]);
        assert_fields(&run.json(), "perplexity:n windows:i");
    }
    // The checkpoint that fails is there to be looked at.
    let line = format!("quantize --model model {SMALL} --out strict --json --max-ppl 2");
    let run = home.run(&line).fails(1, &["exceeds --max-ppl 2"]);
    assert_fields(&run.json()["perplexity"], "before:n after:n");
    home.run("verify --model strict --no-eval").done();
}

#[test]
fn every_width_and_format_is_quantized_verified_and_run() {
    let home = Home::with_model();
    let mut cases = Vec::new();
    for bits in [2, 3, 4, 8] {
        for act_bits in [4, 8, 16] {
            for kv_bits in [4, 8, 16] {
                cases.push(format!("--bits {bits} --act-bits {act_bits} --kv-bits {kv_bits}"));
            }
        }
    }
    for flags in [
        "--outlier-format fp16",
        "--outlier-format fp16 --act-bits 16 --bits 3",
        "--outliers 0",
        "--outliers 0 --no-order --transform none",
        "--outliers 63 --group 16",
        "--group row",
        "--group row --outliers 0 --bits 8 --act-bits 8",
        "--group 48 --transform hadamard",
        "--group 64 --outliers 1",
        "--no-order",
        "--rows-per-scale 2 --bits 2",
        "--act-bits 2 --kv-bits 2",
        "--act-bits 3 --kv-bits 3 --no-gptq",
        "--format fp4",
        "--format fp4 --act-bits 8 --outlier-format fp8 --group 16",
        "--format fp4 --act-bits 16 --group row --no-gptq",
        "--format fp4 --outliers 63 --group 48 --rows-per-scale 2 --outlier-format fp8",
        "--format fp4-bnb --group 48 --outlier-format fp8",
        "--format fp4-bnb --act-bits 8 --outliers 0",
        "--format fp4-bnb --act-bits 16 --no-gptq",
        "--bits 8 --act-bits 16 --outlier-format fp8",
        "--recipe paper --group 32 --outliers 16",
        "--clip-act 1 --clip-weight 1 --clip-kv 0.9 --damping 0.1",
    ] {
        cases.push(flags.to_owned());
    }
    for flags in cases {
        let line = format!(
            "quantize --model model --group 32 --outliers 16 --samples 2 --seq-len 48 {flags} \
             --windows 1 --out atom --overwrite"
        );
        let outcome = home.json(&line);
        assert_eq!(outcome["linears"].as_array().unwrap().len(), 14, "{flags}");
        let after = outcome["perplexity"]["after"].as_f64();
        assert!(after.is_some_and(f64::is_finite), "{flags}: {outcome}");
        let verified = home.json("verify --model atom --seq-len 48 --windows 1");
        assert_eq!(verified["ok"], true, "{flags}: {verified}");
        assert_eq!(verified["perplexity"].as_f64(), after, "{flags}");
    }
}

/// Untied heads are stored in addition to the embedding; tied ones are not stored twice.
#[test]
fn an_output_head_of_its_own_is_kept() {
    let home = Home::new();
    let mut model = RandomModel::new(1);
    model.config["tie_word_embeddings"] = json!(false);
    let embedding = model.tensor("model.embed_tokens.weight");
    let mut head = common::RandomTensor {
        name: "lm_head.weight".into(),
        shape: embedding.shape.clone(),
        values: embedding.values.clone(),
    };
    head.values.reverse();
    model.tensors.push(head);
    model.write(&home.path("model"), Dtype::BF16, 2);
    home.run(&format!("quantize --model model {SMALL} --out atom")).done();
    home.run("verify --model atom --seq-len 64 --windows 1").done();
    let atom = fs::read(home.path("atom/model.safetensors")).unwrap();
    let bytes: Vec<&[u8]> = ["lm_head.weight", "model.embed_tokens.weight"]
        .map(|name| &atom[byte_range(&atom, name)])
        .to_vec();
    assert!(bytes[0] != bytes[1]);
    assert_eq!(bytes[0].len(), 2 * 4096 * 64, "as the source has it, BF16");
}

/// The table a person reads, in full.
#[test]
fn the_table_names_every_check() {
    let home = home_with_atom("");
    let run: Run = home.run("verify --model atom --seq-len 64 --windows 1").done();
    for check in [
        "files",
        "plan",
        "shapes",
        "checksums",
        "orders",
        "codes",
        "mean keys",
        "kept tensors",
        "perplexity",
    ] {
        assert!(run.stdout.contains(&format!("ok      {check}")), "{}", run.stdout);
    }
    assert!(run.stdout.ends_with("\nok\n"), "{}", run.stdout);
    // The table says what it cannot tell, and does not fail for it.
    let note = "kernels     not checked: --device cpu leaves the GPU out\n";
    assert!(run.stdout.contains(note), "{}", run.stdout);
}

/// Without a GPU, or where there is nothing to compare, the reason stands in the table.
#[test]
fn kernels_that_cannot_be_checked_are_a_note() {
    let home = home_with_atom("");
    let line = "verify --model atom --no-eval --check-tokens 0 --device";
    for (device, why) in [("auto", ["no GPU: ", "--check-tokens 0"]), ("cpu", ["--device cpu"; 2])]
    {
        let outcome = home.json(&format!("{line} {device}"));
        assert_eq!(outcome["ok"], true, "{outcome}");
        let said = outcome["kernels_unchecked"].as_str().unwrap();
        assert!(why.iter().any(|why| said.starts_with(why)), "{said}");
        let names = outcome["checks"].as_array().unwrap().iter().map(|check| &check["name"]);
        assert!(names.into_iter().all(|name| name != "kernels"), "{outcome}");
    }
}

/// Asks to stop once it was asked so many times whether to.
struct StopsAfter(AtomicUsize);

impl Progress for StopsAfter {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {}
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        let left = |left: usize| Some(left.saturating_sub(1));
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) == Ok(0)
    }
}

#[test]
fn a_request_to_stop_is_answered_at_every_tensor_and_is_no_failed_check() {
    let home = home_with_atom("");
    let checkpoint = AtomCheckpoint::open(&home.path("atom")).unwrap();
    let backend = Cpu::new().unwrap();
    let kernels = || KernelCheck::Off("not asked for".to_owned());
    let tensors = checkpoint.names().count();
    let mut asked = 0;
    loop {
        let progress = StopsAfter(AtomicUsize::new(asked));
        let verification = Verification {
            checkpoint: &checkpoint,
            kernels: &kernels(),
            evaluation: None,
            reference: None,
            limits: Limits::default(),
        };
        match verify(&backend, &verification, &progress) {
            Ok(outcome) => break assert!(outcome.ok, "{:?}", outcome.checks),
            Err(error) => assert_eq!(error.kind(), Kind::Interrupted, "{error}"),
        }
        asked += 1;
    }
    // At each tensor for its hash, and again for what is in some.
    assert!(asked > tensors, "{asked} times for {tensors} tensors");
}
