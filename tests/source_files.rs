/*! The files of a source as people find them: links, pipes, other encodings, other forms of a model, and
files of any length. Each is read, or refused with the file's path and what to do. */

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use common::{Dtype, Home, RandomModel, Run, SMALL, StoredModel, StoredTensor, names};
use fs_err as fs;
use serde_json::Value;

const EVAL: &str = "eval-ppl --seq-len 64 --windows 1 --device cpu --model";

fn quantize(home: &Home, flags: &str) -> Run {
    home.run(&format!("quantize {SMALL} --no-eval --out out {flags} --model model"))
}

/// Every command that opens the model refuses it, and changes nothing on the disk.
#[track_caller]
fn refused(home: &Home, parts: &[&str]) {
    let before = home.names();
    for line in [
        format!("{EVAL} model"),
        format!("quantize {SMALL} --no-eval --out out --model model"),
        format!("quantize {SMALL} --no-eval --out out --model model --dry-run"),
        "calibrate --samples 1 --seq-len 64 --out c --model model".to_owned(),
    ] {
        let run = home.run(&line).fails(3, parts);
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert_eq!(home.names(), before, "{line}");
    }
}

fn warnings(run: &Run) -> Vec<&str> {
    run.stderr.lines().filter(|line| line.starts_with("warning:")).collect()
}

/// A file of so many bytes that takes no room.
fn sparse(path: &Path, bytes: u64) {
    fs::File::create(path).unwrap().set_len(bytes).unwrap();
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn a_byte_order_mark_and_pythons_numbers_are_read() {
    let home = Home::new();
    RandomModel::new(2).write(&home.path("model"), Dtype::F16, 2);
    let expected = home.json(&format!("{EVAL} model"))["perplexity"].clone();
    for name in ["config.json", "model.safetensors.index.json", "tokenizer.json"] {
        let path = home.path("model").join(name);
        let text = fs::read(&path).unwrap();
        fs::write(&path, [&b"\xef\xbb\xbf"[..], &text].concat()).unwrap();
    }
    let config = fs::read_to_string(home.path("model/config.json")).unwrap();
    let numbers = r#"{"initializer_range": NaN, "a": [Infinity, -Infinity], "#;
    fs::write(home.path("model/config.json"), config.replacen('{', numbers, 1)).unwrap();
    assert_eq!(home.json(&format!("{EVAL} model"))["perplexity"], expected);
    quantize(&home, "").done();
    assert_eq!(home.json(&format!("{EVAL} out"))["windows"], 1);
    // Where a number is needed, it is none.
    fs::write(
        home.path("model/config.json"),
        config.replacen("\"hidden_size\":64", "\"hidden_size\":NaN", 1),
    )
    .unwrap();
    home.run(&format!("{EVAL} model")).fails(3, &["config.json", "hidden_size"]);
    quantize(&home, "--overwrite").fails(3, &["config.json", "hidden_size"]);
}

#[test]
fn text_that_is_not_utf_8_is_called_so() {
    for name in ["config.json", "model.safetensors.index.json", "tokenizer.json"] {
        let home = Home::new();
        RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
        let path = home.path("model").join(name);
        let text = fs::read_to_string(&path).unwrap();
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        fs::write(&path, [&b"\xff\xfe"[..], &wide].concat()).unwrap();
        refused(&home, &[&format!("model/{name} is UTF-16"), "hint: save it as UTF-8"]);
        fs::write(&path, &wide).unwrap();
        refused(&home, &[&format!("model/{name} is UTF-16")]);
    }
}

#[test]
fn other_forms_of_a_model_are_called_by_their_names() {
    for (files, parts) in [
        (
            &["model-Q4_K_M.gguf"][..],
            &["GGUF files of llama.cpp (model-Q4_K_M.gguf)", "hint: give the repository"][..],
        ),
        (&["model.onnx"], &["ONNX files (model.onnx)", "exported from"]),
        (
            &["pytorch_model.bin"],
            &["PyTorch weights (pytorch_model.bin)", "safe_serialization=True"],
        ),
        (&["weights.pt"], &["PyTorch weights (weights.pt)"]),
        (&["flax_model.msgpack"], &["Flax weights"]),
        (&["tf_model.h5"], &["TensorFlow weights"]),
        (
            &["consolidated.00.pth", "params.json"],
            &["Meta's own checkpoint files", "convert_llama_weights_to_hf.py"],
        ),
    ] {
        for with_config in [true, false] {
            let home = Home::with_model();
            fs::remove_file(home.path("model/model.safetensors")).unwrap();
            if !with_config {
                fs::remove_file(home.path("model/config.json")).unwrap();
            }
            files.iter().for_each(|file| fs::write(home.path("model").join(file), "x").unwrap());
            refused(&home, &[parts, &["model holds", "and no safetensors"]].concat());
        }
    }
    let home = Home::with_model();
    fs::remove_file(home.path("model/config.json")).unwrap();
    fs::write(home.path("model/params.json"), "{}").unwrap();
    refused(&home, &["Meta's or Mistral's own format (params.json)", "no config.json"]);
}

#[test]
fn an_adapter_is_merged_first() {
    for keep_base in [true, false] {
        let home = Home::with_model();
        fs::write(home.path("model/adapter_config.json"), "{}").unwrap();
        if !keep_base {
            fs::rename(
                home.path("model/model.safetensors"),
                home.path("model/adapter_model.safetensors"),
            )
            .unwrap();
            fs::remove_file(home.path("model/config.json")).unwrap();
        }
        refused(&home, &["model holds an adapter (adapter_config.json)", "hint: merge it first"]);
    }
}

#[test]
fn a_directory_above_the_model_names_it() {
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model/inner"), Dtype::F16, 1);
    refused(&home, &["model has no config.json", "hint: give --model model/inner, which has one"]);
    home.run(&format!("{EVAL} model/inner/config.json"))
        .fails(3, &["is a file, not a directory", "hint: "]);
}

/// A repository in the Hub's cache that holds the random model; its snapshot.
fn cached(home: &Home, commit: &str) -> std::path::PathBuf {
    let repository = home.path("models--org--name");
    let snapshot = repository.join("snapshots").join(commit);
    RandomModel::new(1).write(&snapshot, Dtype::F16, 1);
    fs::write(snapshot.join("LICENSE"), "free").unwrap();
    fs::create_dir_all(repository.join("blobs")).unwrap();
    for name in names(&snapshot) {
        let blob = repository.join("blobs").join(format!("{commit}-{name}"));
        fs::rename(snapshot.join(&name), &blob).unwrap();
        symlink(format!("../../blobs/{commit}-{name}"), snapshot.join(&name)).unwrap();
    }
    snapshot
}

#[test]
fn a_repository_of_the_cache_stands_for_its_snapshot() {
    let home = Home::new();
    cached(&home, "aaaa");
    let line = format!("{EVAL} models--org--name");
    assert_eq!(home.json(&line)["model"], "name");
    let second = cached(&home, "bbbb");
    home.run(&line).fails(
        3,
        &["2 snapshots", "refs/main names none", "hint: give --model one of them", "aaaa"],
    );
    fs::create_dir(home.path("models--org--name/refs")).unwrap();
    fs::write(home.path("models--org--name/refs/main"), "bbbb").unwrap();
    fs::write(second.join("config.json"), "{}").unwrap();
    home.run(&line).fails(3, &["unknown architecture"]);
    fs::write(home.path("models--org--name/refs/main"), "../../..").unwrap();
    home.run(&line).fails(3, &["2 snapshots"]);
    fs::remove_dir_all(home.path("models--org--name/snapshots")).unwrap();
    fs::create_dir(home.path("models--org--name/snapshots")).unwrap();
    home.run(&line).fails(3, &["holds no snapshot", "hf download"]);
}

#[test]
fn links_of_the_cache_are_followed_and_dangling_ones_named() {
    let home = Home::new();
    let snapshot = cached(&home, "aaaa");
    let line = format!("quantize {SMALL} --no-eval --out out --model {}", snapshot.display());
    let run = home.run(&line).done();
    assert!(warnings(&run).is_empty(), "{}", run.stderr);
    assert_eq!(fs::read(home.path("out/LICENSE")).unwrap(), b"free");
    assert!(!home.path("out/LICENSE").is_symlink());
    fs::remove_dir_all(home.path("out")).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let blob = home.path("models--org--name/blobs").join(format!("aaaa-{name}"));
        fs::rename(&blob, home.path("set-aside")).unwrap();
        let before = home.names();
        let parts = [
            name,
            "is a link to ../../blobs/aaaa-",
            "which does not exist",
            "hint: ",
            "hf download",
        ];
        home.run(&line).fails(3, &parts);
        home.run(&format!("{EVAL} {}", snapshot.display())).fails(3, &parts);
        assert_eq!(home.names(), before);
        fs::rename(home.path("set-aside"), &blob).unwrap();
    }
}

#[test]
fn a_dangling_shard_is_named_with_its_target() {
    let home = Home::new();
    RandomModel::new(2).write(&home.path("model"), Dtype::F16, 3);
    let shard = home.path("model/model-00002-of-00003.safetensors");
    fs::remove_file(&shard).unwrap();
    symlink("../blobs/gone", &shard).unwrap();
    let parts = [
        "model-00002-of-00003.safetensors is a link to ../blobs/gone, which does not exist",
        "hf download",
    ];
    refused(&home, &parts);
    fs::remove_file(home.path("model/model.safetensors.index.json")).unwrap();
    refused(&home, &parts);
}

#[test]
fn side_files_are_never_taken_from_elsewhere() {
    let home = Home::with_model();
    fs::write(home.path("secret"), "precious").unwrap();
    fs::create_dir(home.path("elsewhere")).unwrap();
    fs::write(home.path("elsewhere/vocab.json"), "precious").unwrap();
    fs::write(home.path("model/own-licence"), "free").unwrap();
    let link = |to: &str, name: &str| symlink(to, home.path("model").join(name)).unwrap();
    link("../secret", "LICENSE");
    link("/etc/passwd", "NOTICE");
    link("../elsewhere/vocab.json", "vocab.json");
    link("gone", "merges.txt");
    link("/dev/zero", "chat_template.jinja");
    link("own-licence", "LICENSE.txt");
    pipe(&home.path("model/tokenizer.model"));
    fs::create_dir(home.path("model/tokenizer_files")).unwrap();
    let run = quantize(&home, "").done();
    let found = warnings(&run);
    assert_eq!(found.len(), 6, "{}", run.stderr);
    for (name, why) in [
        ("LICENSE", "outside the model"),
        ("NOTICE", "it is a link to /etc/passwd, outside the model"),
        ("vocab.json", "outside the model"),
        ("merges.txt", "it is a link that leads to no file"),
        ("chat_template.jinja", "it is not a regular file"),
        ("tokenizer.model", "it is not a regular file"),
    ] {
        let start = format!("warning: model/{name} is not copied: ");
        assert!(
            found.iter().any(|line| line.starts_with(&start) && line.contains(why)),
            "{name}: {found:?}"
        );
    }
    let expected = [
        "LICENSE.txt",
        "README.md",
        "atom.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(names(&home.path("out")), expected);
    assert_eq!(fs::read(home.path("out/LICENSE.txt")).unwrap(), b"free");
    assert_eq!(fs::read(home.path("secret")).unwrap(), b"precious");
}

/// The tokenizer is read by the run itself, which refuses what is none: a link to it is a link to a tokenizer.
#[test]
fn a_tokenizer_may_lie_elsewhere() {
    let home = Home::with_model();
    fs::rename(home.path("model/tokenizer.json"), home.path("shared.json")).unwrap();
    symlink("../shared.json", home.path("model/tokenizer.json")).unwrap();
    let run = quantize(&home, "").done();
    assert!(warnings(&run).is_empty(), "{}", run.stderr);
    assert!(!home.path("out/tokenizer.json").is_symlink());
    home.run(&format!("{EVAL} out")).done();
}

#[test]
fn pipes_devices_and_directories_are_no_files_of_a_model() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let home = Home::with_model();
        let path = home.path("model").join(name);
        fs::remove_file(&path).unwrap();
        let shown = format!("model/{name} is");
        pipe(&path);
        refused(&home, &[&shown, "a named pipe, not a regular file"]);
        fs::remove_file(&path).unwrap();
        symlink("/dev/zero", &path).unwrap();
        refused(&home, &[&shown, "a device, not a regular file"]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused(&home, &[&shown, "a directory, not a regular file"]);
    }
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
    let index = home.path("model/model.safetensors.index.json");
    fs::remove_file(&index).unwrap();
    pipe(&index);
    refused(&home, &["index.json is a named pipe"]);
    // One of the shards.
    fs::remove_file(&index).unwrap();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
    let shard = home.path("model/model-00002-of-00002.safetensors");
    fs::remove_file(&shard).unwrap();
    pipe(&shard);
    refused(&home, &["model-00002-of-00002.safetensors is a named pipe"]);
}

#[test]
fn files_of_any_length_are_bounded() {
    const GIB: u64 = 1 << 30;
    for (name, limit) in [("config.json", 16), ("tokenizer.json", 512)] {
        let home = Home::with_model();
        sparse(&home.path("model").join(name), 50 * GIB);
        let parts =
            format!("model/{name} is {} bytes long; such a file has at most {limit} MiB", 50 * GIB);
        refused(&home, &[&parts, "hint: "]);
    }
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
    sparse(&home.path("model/model.safetensors.index.json"), 50 * GIB);
    refused(&home, &["index.json is 53687091200 bytes long"]);
    sparse(&home.path("model/model.safetensors"), 50 * GIB);
    refused(&home, &["model/model.safetensors"]);

    // Beside the model: left out where it is no side file any more, and streamed up to there.
    let home = Home::with_model();
    sparse(&home.path("model/LICENSE"), 50 * GIB);
    sparse(&home.path("model/NOTICE"), 300 << 20);
    let run = quantize(&home, "--json").done();
    assert_eq!(warnings(&run).len(), 1, "{}", run.stderr);
    assert!(
        run.stderr.contains("model/LICENSE is not copied: it is 53687091200 bytes long"),
        "{}",
        run.stderr
    );
    assert_eq!(fs::metadata(home.path("out/NOTICE")).unwrap().len(), 300 << 20);
    assert!(!home.path("out/LICENSE").exists());
    let peak = run.json()["peak_rss_bytes"].as_u64().unwrap();
    assert!(peak < 250 << 20, "{peak} bytes for a file of 300 MiB");
}

#[test]
fn stages_files_of_any_length_are_bounded() {
    let home = Home::with_model();
    for name in ["long", "directory"] {
        match name {
            "long" => sparse(&home.path(name), 50 << 30),
            _ => fs::create_dir(home.path(name)).unwrap(),
        }
        let parts = [name, "hint: make one with `atom "];
        home.run(&format!("plan {name} --out p")).fails(3, &parts);
        home.run(&format!("pack --model model --plan {name} --out out --no-eval")).fails(3, &parts);
        home.run(&format!("pack --model model --plan {name} --no-eval")).fails(3, &parts);
    }
    home.run("plan /dev/zero --out p").fails(3, &["/dev/zero", "hint: "]);
    home.run("pack --model model --plan /dev/zero --no-eval").fails(3, &["/dev/zero", "hint: "]);
    assert_eq!(home.names(), ["directory", "long", "model"]);
}

#[test]
fn the_file_of_a_tensor_is_named() {
    let home = Home::new();
    let mut model = RandomModel::new(2);
    model.tensor("model.layers.1.mlp.up_proj.weight").values[7] = f32::NAN;
    model.write(&home.path("model"), Dtype::F16, 3);
    let index: Value =
        serde_json::from_slice(&fs::read(home.path("model/model.safetensors.index.json")).unwrap())
            .unwrap();
    let shard = index["weight_map"]["model.layers.1.mlp.up_proj.weight"].as_str().unwrap();
    let part =
        format!("tensor `model.layers.1.mlp.up_proj.weight` of model/{shard} holds NaN at [0, 7]");
    quantize(&home, "--no-gptq").fails(3, &[&part]);

    let home = Home::new();
    let mut model = StoredModel::tiny_llama();
    let up = model.tensor("model.layers.0.mlp.up_proj.weight");
    (up.dtype, up.shape) = ("I8".to_owned(), vec![768, 512]);
    model.write(&home.path("model"));
    refused(
        &home,
        &["tensor `model.layers.0.mlp.up_proj.weight` of model/model.safetensors is I8"],
    );
}

/// Other weights of the model, or unrelated ones, next to those that are read.
#[test]
fn other_shards_beside_the_model_are_not_read() {
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
    let expected = home.json(&format!("{EVAL} model"))["perplexity"].clone();
    fs::write(home.path("model/consolidated.safetensors"), "not read").unwrap();
    fs::write(home.path("model/other.safetensors"), "not read").unwrap();
    assert_eq!(home.json(&format!("{EVAL} model"))["perplexity"], expected);
    fs::remove_file(home.path("model/model.safetensors.index.json")).unwrap();
    fs::remove_file(home.path("model/other.safetensors")).unwrap();
    assert_eq!(home.json(&format!("{EVAL} model"))["perplexity"], expected);
}

/// A tensor of one of the shards that the index does not name is stored all the same.
#[test]
fn tensors_that_the_index_does_not_name_are_accounted_for() {
    let home = Home::new();
    RandomModel::new(1).write(&home.path("model"), Dtype::F16, 2);
    let shard = home.path("model/model-00001-of-00002.safetensors");
    let inner = home.path("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("config.json"), "{}").unwrap();
    fs::rename(&shard, inner.join("model.safetensors")).unwrap();
    let model = StoredModel::read(&inner);
    let model = model.with(StoredTensor::f16("model.layers.0.mlp.up_proj.bias", &[172], |_| 1.0));
    model.write(&inner);
    fs::rename(inner.join("model.safetensors"), &shard).unwrap();
    fs::remove_dir_all(&inner).unwrap();
    refused(&home, &["biases of up_proj", "of model/model-00001-of-00002.safetensors"]);
}

/// Of a key that occurs twice the last value counts, as for Python.
#[test]
fn of_a_key_that_occurs_twice_the_last_counts() {
    let home = Home::with_model();
    let config = fs::read_to_string(home.path("model/config.json")).unwrap();
    fs::write(home.path("model/config.json"), config.replacen('{', "{\"hidden_size\": 1, ", 1))
        .unwrap();
    home.run(&format!("{EVAL} model")).done();
    let config = config.trim_end().strip_suffix('}').unwrap();
    fs::write(home.path("model/config.json"), format!("{config}, \"hidden_size\": 1}}")).unwrap();
    refused(&home, &["`hidden_size` 1 is no multiple"]);
}
