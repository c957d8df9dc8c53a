/*! What the program is given and cannot use: each is refused with a sentence that says what and where,
a hint, the exit code of whose fault it is, and nothing left on the disk. */

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Dtype, Home, RandomModel, Run, SMALL, names, skipped};
use fs_err as fs;
use serde_json::{Value, json};

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

/// Runs `quantize` on `model`, which must be refused with nothing left behind.
#[track_caller]
fn refused(home: &Home, flags: &str, code: i32, parts: &[&str]) -> Run {
    let before = home.names();
    let run = home.run(&format!("quantize --model model {SMALL} --out out {flags}"));
    let run = run.fails(code, parts);
    assert_eq!(home.names(), before, "something was left behind: {}", run.stderr);
    assert!(run.stdout.is_empty());
    run
}

/// A home whose model was spoiled before it was written.
fn home_of(dtype: Dtype, shards: usize, spoil: impl FnOnce(&mut RandomModel)) -> Home {
    let home = Home::new();
    let mut model = RandomModel::new(2);
    spoil(&mut model);
    model.write(&home.path("model"), dtype, shards);
    home
}

/// Rewrites a JSON file.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// What a JSON file says.
fn json_in(path: &Path, read: impl FnOnce(&Value) -> Value) -> Value {
    read(&serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
}

#[test]
fn a_missing_shard() {
    let home = home_of(Dtype::F16, 3, |_| ());
    fs::remove_file(home.path("model/model-00002-of-00003.safetensors")).unwrap();
    let parts =
        ["1 of the 3 shards", "model-00002-of-00003.safetensors", "hint: finish the download"];
    refused(&home, "", 3, &parts);
    home.run("eval-ppl --model model").fails(3, &parts);
    home.run("inspect model").fails(3, &parts);
}

#[test]
fn a_truncated_shard() {
    let home = home_of(Dtype::F16, 2, |_| ());
    let shard = home.path("model/model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    for (length, part) in [
        (bytes.len() - 1, "header describes"),
        (100, "its header alone needs"),
        (5, "fewer than a header"),
        (0, "fewer than a header"),
    ] {
        fs::write(&shard, &bytes[..length]).unwrap();
        let parts = [
            "model-00002-of-00002.safetensors is truncated",
            part,
            "hint: download the file again",
        ];
        refused(&home, "", 3, &parts);
    }
    fs::write(&shard, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    refused(&home, "", 3, &["is a Git LFS pointer", "hint: run `git lfs pull`"]);
}

#[test]
fn an_index_that_names_an_absent_tensor() {
    let home = home_of(Dtype::F16, 2, |_| ());
    let index = home.path("model/model.safetensors.index.json");
    let shard = "model-00001-of-00002.safetensors";
    // The index only decides which shard holds a tensor; entries of unused tensors are ignored.
    let line = format!("quantize --model model {SMALL} --no-eval --overwrite --out atom");
    edit(&index, |index| index["weight_map"]["model.layers.9.ghost"] = shard.into());
    home.run(&line).done();
    edit(&index, |index| index["weight_map"]["ghost"] = "absent.safetensors".into());
    home.run(&line).done();
    let map = |index: &mut Value, shard: &str| index["weight_map"][Q_PROJ] = shard.into();
    let holder = json_in(&index, |index| index["weight_map"][Q_PROJ].clone());
    let other = match holder.as_str().unwrap() {
        "model-00001-of-00002.safetensors" => "model-00002-of-00002.safetensors",
        _ => shard,
    };
    edit(&index, |index| map(index, other));
    let parts = ["index.json", &format!("`{Q_PROJ}`"), other, "does not hold it", "hint: "];
    refused(&home, "", 3, &parts);
    edit(&index, |index| map(index, "absent.safetensors"));
    refused(&home, "", 3, &["1 of the 3 shards", "the first is absent.safetensors", "hint: "]);
    // A tensor that the index forgot is read like the others of its shard.
    edit(&index, |index| {
        index["weight_map"].as_object_mut().unwrap().remove(Q_PROJ);
        index["weight_map"].as_object_mut().unwrap().remove("ghost");
    });
    home.run(&line).done();
    fs::write(&index, "{").unwrap();
    refused(&home, "", 3, &["index.json is not valid JSON", "hint: "]);
}

#[test]
fn a_tensor_of_a_wrong_shape() {
    let home = home_of(Dtype::F16, 1, |model| model.tensor(Q_PROJ).shape = vec![32, 128]);
    let parts = [Q_PROJ, "has shape [32, 128]", "[64, 64]", "hint: config.json and the weights"];
    refused(&home, "", 3, &parts);
    refused(&home, "--dry-run", 3, &parts);
    home.run("eval-ppl --model model --seq-len 64").fails(3, &parts);
}

#[test]
fn a_weight_that_is_no_number() {
    for (name, at, value, shown) in [
        (Q_PROJ, 70, f32::NAN, "holds NaN at [1, 6]"),
        ("model.layers.1.input_layernorm.weight", 3, f32::NAN, "holds NaN at [3]"),
        ("model.norm.weight", 63, f32::INFINITY, "holds inf at [63]"),
        ("model.embed_tokens.weight", 4095 * 64 + 1, f32::NAN, "holds NaN at [4095, 1]"),
    ] {
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let home = home_of(dtype, 1, |model| model.tensor(name).values[at] = value);
            let parts = [name, shown, "hint: the weights are damaged"];
            refused(&home, "", 3, &parts);
            refused(&home, "--no-gptq --no-eval", 3, &parts);
        }
    }
}

/// The first block is finished by then, and a repaired file can be gone on with.
#[test]
fn a_weight_that_is_no_number_in_a_later_block() {
    let name = "model.layers.1.mlp.down_proj.weight";
    let home = home_of(Dtype::F32, 1, |model| {
        // In the middle, where the fingerprint does not look.
        model.tensor(name).values[32 * 172 + 5] = f32::NAN;
    });
    let line = format!("quantize --model model {SMALL} --no-eval --out out");
    let run = home.run(&line).fails(3, &[name, "holds NaN at [32, 5]"]);
    assert!(run.stderr.contains("the same command, or --resume, continues"), "{}", run.stderr);
    assert_eq!(home.names(), [".out.atom-work", "model"]);
    RandomModel::new(2).write(&home.path("model"), Dtype::F32, 1);
    let outcome = home.json(&format!("{line} --resume"));
    assert_eq!(outcome["resumed_blocks"], 1);
    home.run(&format!("{line} --overwrite")).done();
}

/// Weights that F32 holds and that a scale, which is an f16, cannot be made for.
#[test]
fn a_weight_too_great_for_its_scale() {
    for flags in ["", "--no-gptq", "--outlier-format fp16", "--outliers 0 --act-bits 16"] {
        let home = home_of(Dtype::F32, 1, |model| {
            model.tensor(Q_PROJ).values.fill(1e7);
        });
        refused(&home, flags, 3, &["model.layers.0.self_attn.q_proj", "f16"]);
    }
}

#[test]
fn activations_that_overflow() {
    let home = home_of(Dtype::F32, 1, |model| {
        let gate = model.tensor("model.layers.0.mlp.gate_proj.weight");
        gate.values.iter_mut().for_each(|value| *value *= 1e25);
        let up = model.tensor("model.layers.0.mlp.up_proj.weight");
        up.values.iter_mut().for_each(|value| *value *= 1e25);
    });
    let parts = ["model.layers.0.mlp", "is not finite in full precision", "hint: "];
    refused(&home, "", 3, &parts);
    refused(&home, "--no-gptq --no-eval", 3, &parts);
    let before = home.names();
    home.run("calibrate --model model --samples 2 --seq-len 64 --out c").fails(3, &parts);
    assert_eq!(home.names(), before);
    let eval = home.run("eval-ppl --model model --seq-len 64 --windows 2");
    let eval = eval.fails(3, &["model gives no finite loss on window 0 of sample", "hint: "]);
    assert!(eval.stdout.is_empty());
}

#[test]
fn an_architecture_that_is_not_known() {
    for (key, value, parts) in [
        ("model_type", json!("gpt2"), &["unknown architecture", "`gpt2`", "hint: ", "llama"][..]),
        ("model_type", Value::Null, &["unknown architecture", "(none)"]),
        ("attention_bias", json!(true), &["no tensor `model.layers.0.self_attn.q_proj.bias`"]),
        ("hidden_act", json!("gelu"), &["model/config.json: `hidden_act` is \"gelu\"", "`silu`"]),
        ("num_hidden_layers", json!("two"), &["`num_hidden_layers` is \"two\"", "whole number"]),
        ("num_attention_heads", json!(0), &["`num_attention_heads` is 0", "whole number"]),
        ("num_hidden_layers", json!(3), &["no tensor `model.layers.2."]),
        ("vocab_size", json!(4000), &["model.embed_tokens.weight", "[4000, 64]"]),
        ("tie_word_embeddings", json!(false), &["no tensor `lm_head.weight`"]),
    ] {
        let home = home_of(Dtype::F16, 1, |model| model.config[key] = value);
        refused(&home, "", 3, parts);
        home.run("eval-ppl --model model --seq-len 64 --windows 1").fails(3, parts);
    }
}

#[test]
fn a_directory_that_lacks_a_file() {
    let home = Home::with_model();
    let model = home.path("model");
    fs::rename(model.join("tokenizer.json"), home.path("tokenizer.json")).unwrap();
    let parts = ["model has no tokenizer.json", "hint: ", "AutoTokenizer"];
    refused(&home, "", 3, &parts);
    home.run("eval-ppl --model model --seq-len 64").fails(3, &parts);
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    refused(&home, "", 3, &["is not a readable tokenizer", "hint: "]);
    fs::rename(home.path("tokenizer.json"), model.join("tokenizer.json")).unwrap();

    fs::rename(model.join("model.safetensors"), model.join("pytorch_model.bin")).unwrap();
    let parts = ["PyTorch weights (pytorch_model.bin)", "no safetensors", "safe_serialization"];
    refused(&home, "", 3, &parts);
    fs::remove_file(model.join("pytorch_model.bin")).unwrap();
    refused(&home, "", 3, &["model has no *.safetensors", "hint: "]);
    fs::remove_file(model.join("config.json")).unwrap();
    refused(&home, "", 3, &["model has no config.json", "hint: "]);
    fs::remove_dir_all(&model).unwrap();
    refused(&home, "", 3, &["there is no model or directory named `model`", "hint: "]);
    fs::write(&model, "").unwrap();
    refused(&home, "", 3, &["model is a file, not a directory", "hint: "]);
}

/// A tokenizer with more ids than the model has embeddings.
#[test]
fn a_tokenizer_of_another_model() {
    let home = Home::new();
    let mut model = RandomModel::new(1);
    model.config["vocab_size"] = json!(100);
    let embedding = model.tensor("model.embed_tokens.weight");
    embedding.shape[0] = 100;
    embedding.values.truncate(100 * 64);
    model.write(&home.path("model"), Dtype::F16, 1);
    let parts = ["the tokenizer gives token", "100 embeddings", "hint: tokenizer.json does not"];
    refused(&home, "", 3, &parts);
    refused(&home, "--no-gptq", 3, &parts);
    home.run("eval-ppl --model model --seq-len 64").fails(3, &parts);
}

#[test]
fn groups_and_outliers_that_do_not_fit() {
    let home = Home::with_model();
    for (flags, code, parts) in [
        ("--group 0", 2, &["group must be a multiple of 16", "hint: "][..]),
        (
            "--group 80",
            3,
            &["a group of 80", "64 channels of model.layers.0", "hint: choose --group"],
        ),
        (
            "--outliers 64",
            3,
            &["64 outlier channels", "model.layers.0", "hint: choose --outliers below 64"],
        ),
        ("--outliers 4000000000", 3, &["4000000000 outlier channels", "hint: "]),
    ] {
        refused(&home, flags, code, parts);
        refused(&home, &format!("{flags} --dry-run"), code, parts);
    }
}

#[test]
fn a_text_shorter_than_a_window() {
    let home = Home::with_model();
    fs::write(home.path("short.txt"), "A few words, no more than that.\n").unwrap();
    fs::write(home.path("empty.jsonl"), "").unwrap();
    let short =
        ["short.txt", "tokens, but windows of 64 need at least", "hint: use a smaller --seq-len"];
    refused(&home, "--calib short.txt", 3, &short);
    // Found before the first block, not after the last.
    let run = refused(&home, "--dataset short.txt", 3, &short);
    assert!(!run.stderr.contains("quantize 1/"), "{}", run.stderr);
    refused(&home, "--dataset short.txt --dry-run", 3, &short);
    refused(&home, "--calib empty.jsonl", 3, &["empty.jsonl holds no text", "hint: "]);
    home.run("eval-ppl --model model --seq-len 64 --dataset short.txt").fails(3, &short);

    home.run(&format!("quantize --model model {SMALL} --no-eval --out atom")).done();
    let run = home.run("verify --model atom --seq-len 64 --dataset short.txt").fails(3, &short);
    assert!(!run.stderr.contains("verify 1/"), "{}", run.stderr);
    home.run("calibrate --model model --seq-len 64 --samples 2 --out c").done();
    home.run("plan c --group 32 --outliers 16 --out p").done();
    let before = home.names();
    let run = home.run("pack --model model --plan p --seq-len 64 --dataset short.txt --out out");
    let run = run.fails(3, &short);
    assert!(!run.stderr.contains("quantize 1/"), "{}", run.stderr);
    assert_eq!(home.names(), before);
}

#[test]
fn a_text_that_cannot_be_read() {
    let home = Home::with_model();
    fs::write(home.path("latin1.txt"), b"na\xefve").unwrap();
    fs::write(home.path("rows.jsonl"), "{\"text\": \"a\"}\n{\"body\": \"b\"}\n").unwrap();
    for flag in ["--calib", "--dataset"] {
        for (text, parts) in [
            ("latin1.txt", &["latin1.txt is not UTF-8", "offset 2", "hint: "][..]),
            ("rows.jsonl", &["rows.jsonl, line 2", "`text`", "hint: "]),
            ("absent.txt", &["`absent.txt` is neither a known text set nor a file", "hint: "]),
        ] {
            refused(&home, &format!("{flag} {text}"), 3, parts);
        }
        let parts = ["`wikitext2` cannot be fetched", "HF_HUB_OFFLINE", "`wikitext2=FILE`"];
        refused(&home, &format!("{flag} wikitext2"), 4, &parts);
    }
}

#[test]
fn a_recipe_file_that_is_none() {
    let home = Home::with_model();
    for (text, parts) in [
        ("grup = 64", &["unknown recipe key `grup`", "recipe.toml", "hint: the keys are"][..]),
        ("group 64", &["recipe recipe.toml is not TOML"]),
        ("base = \"papr\"", &["unknown base", "hint: "]),
        ("bits = \"four\"", &["recipe key `bits` in recipe.toml"]),
    ] {
        fs::write(home.path("recipe.toml"), text).unwrap();
        refused(&home, "--recipe recipe.toml", 3, parts);
    }
}

#[test]
fn an_output_that_cannot_be_made() {
    let home = Home::with_model();
    fs::write(home.path("file"), "precious").unwrap();
    refused(&home, "--out file", 2, &["file", "not a directory", "hint: "]);
    refused(&home, "--out file --overwrite", 2, &["file", "not a directory", "hint: "]);
    refused(&home, "--out file/out", 3, &["file/", "hint: "]);
    refused(&home, "--out ..", 2, &["hint: "]);
    assert_eq!(fs::read(home.path("file")).unwrap(), b"precious");

    fs::create_dir(home.path("locked")).unwrap();
    fs::set_permissions(home.path("locked"), PermissionsExt::from_mode(0o555)).unwrap();
    if fs::write(home.path("locked/probe"), "").is_ok() {
        // Permissions do not bind the administrator; a file system without files binds everyone.
        refused(&home, "--out /proc/out", 3, &["/proc/", "hint: "]);
    } else {
        refused(&home, "--out locked/out", 3, &["locked", "hint: "]);
        assert!(names(&home.path("locked")).is_empty());
    }
}

#[test]
fn an_output_whose_parents_are_not_there_yet() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --no-eval --out a/b/out");
    let dry = home.json(&format!("{line} --dry-run"));
    assert!(dry["free_disk_bytes"].as_u64().unwrap() < u64::MAX / 2, "{dry}");
    assert_eq!(home.names(), ["model"]);
    home.run(&line).done();
    assert_eq!(names(&home.path("a/b")), ["out"]);
}

/// A file system of its own, unmounted at the end.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, kibibytes: usize) -> Option<Self> {
        let size = format!("size={kibibytes}k");
        fs::create_dir(at).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        mount.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk() {
    let home = Home::with_model();
    let mount = home.path("disk");
    let Some(disk) = SmallDisk::mount(&mount, 64) else {
        return skipped("a_full_disk", "no tmpfs can be mounted here");
    };
    let line = format!("quantize --model model {SMALL} --no-eval --out disk/out");
    for flags in ["", "--dry-run", "--resume"] {
        let run = home.run(&format!("{line} {flags}"));
        run.fails(4, &["disk", "bytes", "free", "hint: free some disk space", "--out"]);
        assert!(names(disk.0).is_empty(), "{:?}", names(disk.0));
    }
    // Full to the last page: neither the work directory's files nor a calibration can be written.
    fs::write(disk.0.join("filler"), vec![1; 64 << 10]).unwrap();
    home.run(&line).fails(4, &["disk", "hint: free some disk space"]);
    let calibrate = home.run("calibrate --model model --samples 2 --seq-len 64 --out disk/c");
    calibrate.fails(4, &["cannot write disk/c", "hint: free some disk space"]);
    assert_eq!(names(disk.0), ["filler"]);
}

/// The reader of stdout is gone; the work is done all the same.
#[test]
fn a_reader_that_went_away() {
    let home = Home::with_model();
    let commands = [
        format!("quantize --model model {SMALL} --out out"),
        "eval-ppl --model out --seq-len 64 --windows 1 --json".to_owned(),
        "inspect out".to_owned(),
        "verify --model out --no-eval".to_owned(),
    ];
    for line in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = home.command(&line).stdout(writer).output().unwrap();
        Run::new(&line, output).done();
    }
    // A disk that is full below stdout is no reader: then the result is lost, and that is said.
    if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
        let output = home.command("inspect out").stdout(full.into_file()).output().unwrap();
        Run::new("inspect out", output).fails(4, &["cannot write the result to stdout"]);
    }
}

#[test]
fn a_stderr_that_went_away() {
    let home = Home::with_model();
    let line = format!("quantize --model model {SMALL} --out out --json");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = home.command(&line).stderr(writer).output().unwrap();
    assert!(Run::new(&line, output).done().json()["perplexity"]["after"].is_f64());
}

#[test]
fn a_device_that_is_not_there() {
    let home = Home::with_model();
    // No machine has so many; many have none, nor the driver's library.
    refused(&home, "--device cuda:999", 4, &["hint: "]);
    home.run("eval-ppl --model model --device cuda:999").fails(4, &["hint: "]);
    let run = home.run_on("sse9", "eval-ppl --model model");
    run.fails(2, &["ATOM_ISA is `sse9`", "hint: use one of plain"]);
}

/// A model, its calibration `c` and a plan `p` from it.
fn home_with_plan() -> Home {
    let home = Home::with_model();
    home.run("calibrate --model model --samples 2 --seq-len 64 --out c").done();
    home.run("plan c --group 32 --outliers 16 --out p").done();
    home
}

#[track_caller]
fn pack_refused(home: &Home, flags: &str, parts: &[&str]) {
    let before = home.names();
    home.run(&format!("pack --no-eval --out out --plan p --model {flags}")).fails(3, parts);
    assert_eq!(home.names(), before);
}

#[test]
fn a_plan_that_does_not_fit() {
    let home = home_with_plan();
    let plan = fs::read(home.path("p")).unwrap();
    type Change = fn(&mut Value);
    let changes: [(Change, &[&str]); 9] = [
        (
            |plan| plan["blocks"][0][0]["group_size"] = 24.into(),
            &["a group of 24", "model.layers.0"],
        ),
        (
            |plan| plan["blocks"][1][3]["channels"] = 170.into(),
            &["model.layers.1", "does not match"],
        ),
        (|plan| plan["blocks"][1][3]["outlier_channels"] = 172.into(), &["172 outlier channels"]),
        (|plan| plan["blocks"][0][2]["linears"][1]["bits"] = 5.into(), &["up_proj: 5 bits"]),
        (|plan| plan["blocks"][0][2]["clip"] = 0.into(), &["clip ratio 0"]),
        (|plan| plan["blocks"][0][1]["colour"] = "red".into(), &["p is not a plan", "`colour`"]),
        (|plan| drop(plan["blocks"].as_array_mut().unwrap().pop()), &["1 blocks, the model 2"]),
        (|plan| plan["plan_version"] = 2.into(), &["plan version 2", "version 1"]),
        (|plan| plan["recipe"]["clip_kv"] = 7.into(), &["clip_kv is 7"]),
    ];
    for (change, parts) in changes {
        fs::write(home.path("p"), &plan).unwrap();
        edit(&home.path("p"), change);
        pack_refused(&home, "model", parts);
    }
    fs::write(home.path("p"), &plan[..plan.len() / 2]).unwrap();
    pack_refused(&home, "model", &["p is not a plan", "hint: "]);

    // What may be edited: a linear left as it is, another with more bits.
    fs::write(home.path("p"), &plan).unwrap();
    edit(&home.path("p"), |plan| {
        plan["blocks"][0][2]["linears"][1]["bits"] = 16.into();
        plan["blocks"][1][3]["linears"][0]["bits"] = 8.into();
    });
    let outcome = home.json("pack --model model --plan p --out out --seq-len 64 --windows 2");
    assert_eq!(outcome["linears"].as_array().unwrap().len(), 13);
    assert!(outcome["perplexity"]["after"].as_f64().unwrap().is_finite());
    home.run("verify --model out --seq-len 64 --windows 1").done();
}

#[test]
fn a_plan_whose_calibration_changed() {
    let home = home_with_plan();
    home.run("calibrate --model model --samples 3 --seq-len 64 --out c --overwrite").done();
    let parts = ["c is not the calibration that p was made from", "hint: make the plan again"];
    pack_refused(&home, "model", &parts);
    fs::write(home.path("c"), "no calibration").unwrap();
    pack_refused(&home, "model", &["c is not a calibration file", "hint: "]);
    fs::remove_file(home.path("c")).unwrap();
    pack_refused(&home, "model", &["failed to open file `c`"]);
    home.run("plan absent --out q").fails(3, &["absent"]);
    home.run("plan model/model.safetensors --out q")
        .fails(3, &["is not a calibration file", "hint: "]);
}

#[test]
fn a_plan_of_another_model() {
    let home = home_with_plan();
    RandomModel::new(3).write(&home.path("longer"), Dtype::F16, 1);
    let mut changed = RandomModel::new(2);
    changed.tensor(Q_PROJ).values[0] = 0.5;
    changed.write(&home.path("changed"), Dtype::F16, 1);
    for model in ["longer", "changed", "tiny-llama"] {
        pack_refused(
            &home,
            model,
            &["calibrated on another model", "`model`", "hint: calibrate this"],
        );
    }
}

#[test]
fn files_of_the_stages_are_replaced_only_when_asked() {
    let home = home_with_plan();
    let files = || (fs::read(home.path("c")).unwrap(), fs::read(home.path("p")).unwrap());
    let (before, found) = (files(), home.names());
    for line in ["calibrate --model model --samples 2 --seq-len 64 --out c", "plan c --out p"] {
        home.run(line).fails(2, &["exists already", "--overwrite"]);
    }
    assert!(files() == before);
    assert_eq!(home.names(), found);
}

#[test]
fn an_atom_checkpoint_is_not_quantized_again() {
    let home = Home::with_model();
    home.run(&format!("quantize --model model {SMALL} --no-eval --out atom")).done();
    let run = home.run(&format!("quantize --model atom {SMALL} --out again"));
    run.fails(3, &["atom is an Atom checkpoint, already quantized", "hint: "]);
    home.run("verify --model model --no-eval").fails(3, &["model has no atom.json", "hint: "]);
    assert_eq!(home.names(), ["atom", "model"]);
}
