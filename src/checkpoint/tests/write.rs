use super::*;
use crate::Kind;
use crate::checkpoint::{AtomCheckpoint, Options, SideFile, Writer};
use serde_json::json;

/// Writes a whole checkpoint; `b_first` says which block goes first.
fn complete(out: &Path, overwrite: bool, options: Options, b_first: bool) -> u64 {
    let destination = to(out, overwrite);
    let mut writer =
        Writer::create(&destination, specs(), &json!({"bits": 4}), options, &|| Ok(())).unwrap();
    let mut blocks = vec![("a", block_a()), ("b", block_b())];
    if b_first {
        blocks.reverse();
    }
    for (name, tensors) in blocks {
        writer.write_block(name, tensors, Value::Null).unwrap();
    }
    assert!(!out.join("atom.json").exists() || overwrite);
    let side_files = [SideFile::in_memory("tokenizer.json", "{}")];
    let config = json!({"model_type": "llama", "quantization_config": {"quant_method": "atom"}});
    writer.finish(&config, &manifest(), &side_files).unwrap()
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| (name.clone(), fs_err::read(dir.join(name)).unwrap());
    names_in(dir).into_iter().map(read).collect()
}

#[test]
fn what_is_written_is_read_by_us_and_by_the_safetensors_crate() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let bytes = complete(&out, false, Options::default(), false);
    assert_eq!(names_in(home.path()), ["out"]);
    assert_eq!(names_in(&out), ["atom.json", "config.json", "model.safetensors", "tokenizer.json"]);
    let on_disk: usize = contents(&out).iter().map(|(_, content)| content.len()).sum();
    assert_eq!(bytes, on_disk as u64);

    let file = fs_err::read(out.join("model.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(theirs.len(), 3);
    let checkpoint = AtomCheckpoint::open(&out).unwrap();
    for (name, expected) in block_a().into_iter().chain(block_b()) {
        assert_eq!(theirs.tensor(&name).unwrap().data(), expected);
        let tensor = checkpoint.tensor(&name).unwrap();
        assert_eq!(tensor.bytes, expected);
        let spec = specs().into_iter().find(|spec| spec.name == name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape), (spec.dtype, &spec.shape[..]));
        checkpoint.verify_tensor(&name, &|| Ok(())).unwrap();
    }
    assert_eq!(checkpoint.config()["model_type"], "llama");
    assert_eq!(&*checkpoint.tokenizer().unwrap(), b"{}");
    assert_eq!(checkpoint.name(), "out");
}

#[test]
fn bytes_do_not_depend_on_the_order_of_blocks() {
    let home = tempfile::tempdir().unwrap();
    for limit in [5, 1000] {
        let options = Options { max_shard_bytes: limit, ..Options::default() };
        let [one, two] = ["one", "two"].map(|name| home.path().join(format!("{name}-{limit}")));
        complete(&one, false, options, false);
        complete(&two, false, options, true);
        assert_eq!(contents(&one), contents(&two));
    }
}

#[test]
fn a_limit_of_five_bytes_gives_several_shards_and_an_index() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    complete(&out, false, Options { max_shard_bytes: 5, ..Options::default() }, true);
    let names = names_in(&out);
    assert!(names.contains(&"model-00003-of-00003.safetensors".to_string()));
    assert!(names.contains(&"model.safetensors.index.json".to_string()));
    let checkpoint = AtomCheckpoint::open(&out).unwrap();
    for (name, expected) in block_a().into_iter().chain(block_b()) {
        assert_eq!(checkpoint.tensor(&name).unwrap().bytes, expected);
    }
}

#[test]
fn an_existing_output_is_replaced_only_when_asked() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    complete(&out, false, Options::default(), false);
    let again =
        || Writer::create(&to(&out, false), specs(), &json!({}), Options::default(), &|| Ok(()));
    let error = error_of(again());
    assert_eq!(error.kind(), Kind::Usage);
    assert_eq!(error.message(), format!("output directory {} exists", out.display()));
    assert!(error.hint_text().unwrap().contains("--overwrite"));
    complete(&out, true, Options::default(), false);
    assert_eq!(names_in(home.path()), ["out"]);

    // What is put next to the checkpoint while the run works is found at the end, and nothing is lost.
    let mut writer =
        Writer::create(&to(&out, true), specs(), &json!({}), Options::default(), &|| Ok(()))
            .unwrap();
    writer.write_block("a", block_a(), Value::Null).unwrap();
    writer.write_block("b", block_b(), Value::Null).unwrap();
    write(&out.join("thesis.tex"), "mine");
    let before = contents(&out);
    let error = error_of(writer.finish(&json!({}), &manifest(), &[]));
    assert!(error.message().contains("holds thesis.tex"), "{error}");
    assert_eq!(contents(&out), before);
    fs_err::remove_file(out.join("thesis.tex")).unwrap();
    let writer =
        Writer::create(&to(&out, true), specs(), &json!({}), Options::default(), &|| Ok(()))
            .unwrap();
    assert_eq!(writer.done().len(), 2);
    writer.finish(&json!({}), &manifest(), &[]).unwrap();
    assert_eq!(names_in(home.path()), ["out"]);
}

#[test]
fn wrong_blocks_are_refused_and_an_unfinished_output_does_not_appear() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let mut writer =
        Writer::create(&to(&out, false), specs(), &json!({}), Options::default(), &|| Ok(()))
            .unwrap();
    let mut write = |block: &str, name: &str, bytes: usize| {
        let tensors = vec![(name.to_string(), vec![0; bytes])];
        writer.write_block(block, tensors, Value::Null).map_err(|e| e.message().to_string())
    };
    assert_eq!(
        write("b", "b.order", 15).unwrap_err(),
        "tensor `b.order` is I32 [4] and needs 16 bytes, but block `b` gives 15"
    );
    assert!(write("b", "c", 1).unwrap_err().starts_with("tensor `c` is not part of"));
    write("b", "b.order", 16).unwrap();
    assert_eq!(write("b", "a.weight_codes", 3).unwrap_err(), "block `b` is written already");
    assert_eq!(write("c", "b.order", 16).unwrap_err(), "tensor `b.order` is written already");
    let error = error_of(writer.finish(&json!({}), &manifest(), &[]));
    assert_eq!(error.message(), "2 of 3 tensors were not written, the first is `a.weight_codes`");
    assert!(!out.exists());
}

#[test]
fn a_model_larger_than_the_disk_is_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let huge = vec![TensorSpec::new("w", Dtype::F16, [1 << 25, 1 << 35])];
    let error = error_of(Writer::create(
        &to(&out, false),
        huge,
        &json!({}),
        Options::default(),
        &|| Ok(()),
    ));
    assert_eq!(error.kind(), Kind::Machine);
    let message = error.message();
    let needed = message.split("needs ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(needed.parse::<u64>().unwrap() > 1 << 61);
    assert!(message.ends_with("bytes free"));
    assert!(names_in(home.path()).is_empty());
}

#[test]
fn two_runs_cannot_write_the_same_output() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let first =
        Writer::create(&to(&out, false), specs(), &json!({}), Options::default(), &|| Ok(()))
            .unwrap();
    for resume in [false, true] {
        let options = Options { resume, ..Options::default() };
        let error =
            error_of(Writer::create(&to(&out, false), specs(), &json!({}), options, &|| Ok(())));
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.message().starts_with("another atom run is writing"));
    }
    drop(first);
    assert!(
        Writer::create(&to(&out, false), specs(), &json!({}), Options::default(), &|| Ok(()))
            .is_ok()
    );
}

#[test]
fn a_damaged_or_foreign_checkpoint_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    complete(&out, false, Options::default(), false);
    let shard = out.join("model.safetensors");
    let mut bytes = fs_err::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1; // the shard's last tensor: the narrowest elements
    write(&shard, &bytes);
    let checkpoint = AtomCheckpoint::open(&out).unwrap();
    assert!(checkpoint.verify_tensor("b.order", &|| Ok(())).is_ok());
    let error = checkpoint.verify_tensor("a.weight_codes", &|| Ok(())).unwrap_err();
    assert_eq!(error.kind(), Kind::Check);
    assert!(error.message().starts_with("tensor `a.weight_codes` has SHA-256 "));
    assert_eq!(checkpoint.covered_files(), ["atom.json", "config.json", "tokenizer.json"]);
    for name in checkpoint.covered_files() {
        checkpoint.verify_file(name).unwrap();
        let bytes = fs_err::read(out.join(name)).unwrap();
        write(&out.join(name), [&bytes[..], b" "].concat());
        assert_eq!(checkpoint.verify_file(name).unwrap_err().kind(), Kind::Check, "{name}");
        write(&out.join(name), bytes);
    }

    let path = out.join("atom.json");
    let atom: Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    let refusal = |change: fn(&mut Value)| {
        let mut changed = atom.clone();
        change(&mut changed);
        write(&path, changed.to_string());
        let error = error_of(AtomCheckpoint::open(&out));
        assert_eq!(error.kind(), Kind::Input);
        assert!(error.hint_text().is_some());
        error.message().replace(&path.display().to_string(), "ATOM")
    };
    assert_eq!(
        refusal(|atom| atom["format_version"] = json!(2)),
        "ATOM has format version 2, this program reads up to 1"
    );
    assert_eq!(
        refusal(|atom| atom["format_version"] = json!("1")),
        "ATOM has no valid `format_version`"
    );
    assert_eq!(
        refusal(|atom| atom["tensors"]["x"] = json!({"sha256": "0".repeat(64)})),
        "ATOM lists tensor `x`, which no shard holds"
    );
    assert_eq!(
        refusal(|atom| drop(atom["tensors"].as_object_mut().unwrap().remove("b.order"))),
        "ATOM does not list tensor `b.order` of the shards"
    );
    assert_eq!(refusal(|atom| atom["tensors"] = json!(null)), "ATOM has no `tensors`");
    fs_err::remove_file(&path).unwrap();
    assert!(error_of(AtomCheckpoint::open(&out)).message().ends_with("has no atom.json"));
}
