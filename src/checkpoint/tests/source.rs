use super::*;
use crate::checkpoint::Source;
use crate::{Kind, hub};

/// A directory with one good shard that holds `w`, F32 [2, 2].
fn good() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    write(&home.path().join("config.json"), r#"{"model_type":"llama"}"#);
    write(&home.path().join("tokenizer.json"), "{}");
    write(&home.path().join("model.safetensors"), shard("w"));
    home
}

fn shard(name: &str) -> Vec<u8> {
    let bytes: Vec<u8> = [1f32, 2.0, -3.0, 0.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    safetensors(&[(name, "F32", &[2, 2], &bytes)])
}

/// Replaces the single shard by an index over `(tensor, shard)`.
fn index(home: &Path, map: &[(&str, &str)]) {
    fs_err::remove_file(home.join("model.safetensors")).unwrap();
    let map: serde_json::Map<String, Value> =
        map.iter().map(|(tensor, shard)| ((*tensor).to_string(), Value::from(*shard))).collect();
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    write(&home.join("model.safetensors.index.json"), index.to_string());
}

/// Asserts that opening fails as the user's input, with a hint, and returns the message without
/// the directory.
#[track_caller]
fn refusal(home: &Path) -> String {
    let error = error_of(Source::open(home));
    assert_eq!(error.kind(), Kind::Input);
    assert!(error.hint_text().is_some(), "no hint: {error}");
    error.message().replace(&home.display().to_string(), "DIR")
}

#[test]
fn a_single_shard_is_read() {
    let home = good();
    let source = Source::open(home.path()).unwrap();
    assert_eq!(source.dir(), Some(home.path()));
    assert_eq!(source.names().collect::<Vec<_>>(), ["w"]);
    assert_eq!(source.total_bytes(), 16);
    let w = source.tensor("w").unwrap();
    assert_eq!((w.dtype, w.shape), (Dtype::F32, &[2, 2][..]));
    assert_eq!(w.to_f32().unwrap(), [1.0, 2.0, -3.0, 0.5]);
    w.release();
    assert_eq!(w.rows_f32(1..2).unwrap(), [-3.0, 0.5]);
    let error = source.tensor("v").unwrap_err();
    assert!(error.message().ends_with("has no tensor `v`"));
}

#[test]
fn an_index_leads_to_its_shards_and_hides_other_files() {
    let home = good();
    index(home.path(), &[("w", "one.safetensors"), ("v", "two.safetensors")]);
    write(&home.path().join("one.safetensors"), shard("w"));
    write(&home.path().join("two.safetensors"), shard("v"));
    write(&home.path().join("consolidated.safetensors"), "not read");
    let source = Source::open(home.path()).unwrap();
    assert_eq!(source.names().collect::<Vec<_>>(), ["v", "w"]);
    assert_eq!(source.tensor("v").unwrap().to_f32().unwrap(), [1.0, 2.0, -3.0, 0.5]);
}

#[test]
fn shards_without_an_index_are_all_read_but_must_not_overlap() {
    let home = good();
    fs_err::remove_file(home.path().join("model.safetensors")).unwrap();
    write(&home.path().join("x1.safetensors"), shard("w"));
    write(&home.path().join("x2.safetensors"), shard("v"));
    assert_eq!(Source::open(home.path()).unwrap().names().count(), 2);
    write(&home.path().join("x3.safetensors"), shard("w"));
    assert_eq!(
        refusal(home.path()),
        "DIR holds tensor `w` twice: in x1.safetensors and in x3.safetensors"
    );
}

#[test]
fn a_missing_directory_or_configuration_is_said() {
    let home = good();
    assert_eq!(refusal(&home.path().join("none")), "directory DIR does not exist");
    assert_eq!(refusal(&home.path().join("config.json")), "DIR is a file, not a directory");
    write(&home.path().join("config.json"), "[1]");
    assert_eq!(refusal(home.path()), "DIR/config.json is not a JSON object");
    write(&home.path().join("config.json"), "{");
    assert!(refusal(home.path()).starts_with("DIR/config.json is not valid JSON: EOF"));
    fs_err::remove_file(home.path().join("config.json")).unwrap();
    assert_eq!(refusal(home.path()), "DIR has no config.json");
}

#[test]
fn a_tokenizer_is_asked_for_only_when_needed() {
    let home = good();
    fs_err::remove_file(home.path().join("tokenizer.json")).unwrap();
    let error = Source::open(home.path()).unwrap().tokenizer().unwrap_err();
    assert!(error.message().ends_with("has no tokenizer.json"));
    assert!(error.hint_text().unwrap().contains("tokenizer.model"));
}

#[test]
fn pytorch_weights_come_with_the_conversion() {
    let home = good();
    fs_err::remove_file(home.path().join("model.safetensors")).unwrap();
    assert_eq!(refusal(home.path()), "DIR has no *.safetensors");
    write(&home.path().join("pytorch_model-00001-of-00002.bin"), "x");
    let message = refusal(home.path());
    let expected =
        "DIR holds PyTorch weights (pytorch_model-00001-of-00002.bin) and no safetensors";
    assert_eq!(message, expected);
    let error = error_of(Source::open(home.path()));
    assert!(error.hint_text().unwrap().contains("safe_serialization=True"));
}

#[test]
fn a_truncated_shard_is_named_with_both_lengths() {
    let home = good();
    let path = home.path().join("model.safetensors");
    let whole = shard("w");
    let length = whole.len();
    write(&path, &whole[..length - 5]);
    let found = length - 5;
    assert_eq!(
        refusal(home.path()),
        format!(
            "DIR/model.safetensors is truncated: its header describes {length} bytes, \
             the file has {found}"
        )
    );
    write(&path, [&whole[..], b"more"].concat());
    assert!(refusal(home.path()).starts_with("DIR/model.safetensors has a wrong length"));
    write(&path, &whole[..20]);
    let header = length - 16;
    assert_eq!(
        refusal(home.path()),
        format!(
            "DIR/model.safetensors is truncated: its header alone needs {header} bytes, \
             the file has 20"
        )
    );
    for short in [0, 7] {
        write(&path, &whole[..short]);
        let expected = format!("is truncated: it has {short} bytes, fewer than a header");
        assert!(refusal(home.path()).ends_with(&expected));
    }
}

#[test]
fn a_damaged_header_is_an_error_and_no_panic() {
    let home = good();
    let path = home.path().join("model.safetensors");
    let whole = shard("w");
    let mut damaged = whole.clone();
    damaged[9] = b'#';
    write(&path, &damaged);
    assert!(refusal(home.path()).starts_with("DIR/model.safetensors has a damaged safetensors"));
    write(&path, [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat());
    refusal(home.path());
    write(&path, safetensors(&[("w", "F32", &[2, 3], &[0; 16])]));
    refusal(home.path());
    write(&path, safetensors(&[("w", "F32", &[usize::MAX, 3], &[0; 16])]));
    refusal(home.path());
    write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
    assert!(refusal(home.path()).ends_with("is a Git LFS pointer, not the weights"));
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let home = good();
    index(home.path(), &[("w", "one.safetensors"), ("v", "two.safetensors")]);
    write(&home.path().join("one.safetensors"), shard("w"));
    // An error of what nobody needs is none; what is asked for says why it is not there.
    let lost = |name: &str| {
        let source = Source::open(home.path()).unwrap();
        assert!(source.lacks(name) && !source.contains(name));
        let error = source.tensor(name).unwrap_err();
        assert_eq!(source.check_index().unwrap_err().message(), error.message());
        assert!(error.hint_text().is_some());
        error.message().replace(&home.path().display().to_string(), "DIR")
    };
    assert_eq!(
        lost("v"),
        "1 of the 2 shards that DIR/model.safetensors.index.json lists are missing, \
         the first is two.safetensors"
    );
    write(&home.path().join("two.safetensors"), shard("u"));
    assert_eq!(
        lost("v"),
        "DIR/model.safetensors.index.json maps tensor `v` to two.safetensors, \
         which does not hold it"
    );
    // transformers reads whatever a shard holds, whether the index names it or not.
    let source = Source::open(home.path()).unwrap();
    assert_eq!(source.names().collect::<Vec<_>>(), ["u", "w"]);
    fs_err::remove_file(home.path().join("one.safetensors")).unwrap();
    fs_err::remove_file(home.path().join("two.safetensors")).unwrap();
    assert!(refusal(home.path()).starts_with("2 of the 2 shards"));
    let index = home.path().join("model.safetensors.index.json");
    write(&index, r#"{"weight_map": {"w": "../../etc/passwd"}}"#);
    assert!(refusal(home.path()).ends_with("which is no file name"));
    write(&index, r#"{"weight_map": {"w": 3}}"#);
    assert!(refusal(home.path()).ends_with("to 3, which is no file name"));
    for empty in ["{}", "[]", r#"{"weight_map": {}}"#] {
        write(&index, empty);
        assert!(refusal(home.path()).ends_with("has no `weight_map` that names tensors"));
    }
    write(&index, "{");
    assert!(refusal(home.path()).contains("index.json is not valid JSON"));
}

#[test]
fn only_floating_point_weights_are_a_source() {
    let home = good();
    let file = safetensors(&[
        ("codes", "I32", &[1], &[0; 4]),
        ("e4m3", "F8_E4M3", &[4], &[0; 4]),
        ("e5m2", "F8_E5M2", &[4], &[0; 4]),
        ("w", "BF16", &[1], &[0x80, 0x3f]),
    ]);
    write(&home.path().join("model.safetensors"), file);
    let source = Source::open(home.path()).unwrap();
    assert_eq!(source.tensor("w").unwrap().to_f32().unwrap(), [1.0]);
    let error = source.tensor("codes").unwrap_err();
    assert!(error.message().ends_with("is I32, not F16, BF16 or F32"));
    let error = source.tensor("e4m3").unwrap_err();
    assert!(error.message().ends_with("is F8_E4M3, not F16, BF16 or F32"));
    assert!(error.hint_text().is_some());
    let error = source.tensor("e5m2").unwrap_err();
    let shown = format!("tensor `e5m2` of {}", home.path().join("model.safetensors").display());
    assert_eq!(error.message(), format!("{shown} is F8_E5M2 [4], a type that atom does not read"));
    assert!(error.hint_text().is_some());
}

#[test]
fn an_atom_checkpoint_is_not_a_source() {
    let home = good();
    write(&home.path().join("atom.json"), "{}");
    assert_eq!(refusal(home.path()), "DIR is an Atom checkpoint, already quantized");
}

#[test]
fn side_files_are_what_a_consumer_needs() {
    let home = good();
    for name in ["README.md", "LICENSE.txt", "tokenizer.model", "generation_config.json", "x.py"] {
        write(&home.path().join(name), name);
    }
    fs_err::create_dir(home.path().join("tokenizer_files")).unwrap();
    let side_files = Source::open(home.path()).unwrap().side_files().unwrap();
    let names: Vec<&str> = side_files.copied.iter().map(|file| file.name.as_str()).collect();
    let expected = ["LICENSE.txt", "generation_config.json", "tokenizer.json", "tokenizer.model"];
    assert_eq!(names, expected);
    assert!(side_files.left_out.is_empty(), "{:?}", side_files.left_out);
    let copy = home.path().join("copy");
    write(&copy, "an interrupted copy");
    side_files.copied[0].copy_to(&copy).unwrap();
    assert_eq!(fs_err::read(&copy).unwrap(), b"LICENSE.txt");
    assert_eq!(side_files.copied[0].bytes(), 11);
}

#[test]
fn the_fingerprint_knows_the_content_and_not_the_place() {
    let tiny = hub::tiny_llama().unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
        fs_err::copy(bundled.join(file), copy.path().join(file)).unwrap();
    }
    let fingerprint = || Source::open(copy.path()).unwrap().fingerprint().unwrap();
    let original = fingerprint();
    assert_eq!(original.len(), 64);
    assert_eq!(original, tiny.fingerprint().unwrap());

    // The last byte of the last tensor.
    let path = copy.path().join("model.safetensors");
    let mut bytes = fs_err::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    write(&path, &bytes);
    assert_ne!(fingerprint(), original);
    *bytes.last_mut().unwrap() ^= 1;
    write(&path, &bytes);
    assert_eq!(fingerprint(), original);
    write(&copy.path().join("tokenizer.json"), "{}");
    assert_ne!(fingerprint(), original);
}

#[test]
fn every_tensor_of_the_bundled_model_is_finite() {
    let tiny = hub::tiny_llama().unwrap();
    let total: usize =
        tiny.names().map(|name| tiny.tensor(name).unwrap().to_f32().unwrap().len()).sum();
    assert_eq!(2 * total as u64, tiny.total_bytes());
}

#[test]
fn a_snapshot_in_the_hubs_cache_is_called_by_its_repository() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("models--meta-llama--Llama-2-7b-hf/snapshots/0123abcd");
    fs_err::create_dir_all(snapshot.parent().unwrap()).unwrap();
    fs_err::rename(good().keep(), &snapshot).unwrap();
    assert_eq!(Source::open(&snapshot).unwrap().name(), "Llama-2-7b-hf");
}

/// A header of one entry more, whatever it says.
fn with_entry(name: &str, entry: &str) -> Vec<u8> {
    let header = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}},\"{name}\":{entry}}}"
    );
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat()
}

#[test]
fn strange_shapes_are_read_or_refused_and_never_computed_with() {
    let home = good();
    let path = home.path().join("model.safetensors");
    for shape in [
        "[]",
        "[0]",
        "[0,18446744073709551615]",
        "[18446744073709551615,0]",
        "[4611686018427387904,4]",
    ] {
        let entry = format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[16,16]}}"#);
        write(&path, with_entry("v", &entry));
        let Ok(source) = Source::open(home.path()) else {
            refusal(home.path());
            continue;
        };
        let tensor = source.tensor("v").unwrap();
        assert!(tensor.is_empty() && tensor.to_f32().unwrap().is_empty(), "{shape}");
        tensor.read_ahead();
        tensor.release();
        source.fingerprint().unwrap();
    }
    let scalar = safetensors(&[("w", "F32", &[], &1f32.to_le_bytes())]);
    write(&path, scalar);
    assert_eq!(Source::open(home.path()).unwrap().tensor("w").unwrap().to_f32().unwrap(), [1.0]);
    for entry in ["[]", "3", "null", r#"{"dtype":"F32","shape":[1],"data_offsets":[16]}"#] {
        write(&path, with_entry("v", entry));
        refusal(home.path());
    }
}

#[test]
fn a_header_longer_than_any_models_is_not_parsed() {
    let home = good();
    let path = home.path().join("model.safetensors");
    let file = fs_err::File::create(&path).unwrap();
    file.set_len(80 << 20).unwrap();
    drop(file);
    let file = fs_err::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(file.file(), &(70u64 << 20).to_le_bytes(), 0).unwrap();
    let expected = "DIR/model.safetensors has a header of 73400320 bytes, more than 33554432";
    assert_eq!(refusal(home.path()), expected);
}

#[test]
fn weights_that_change_during_a_run_are_noticed() {
    let home = good();
    let path = home.path().join("model.safetensors");
    let source = Source::open(home.path()).unwrap();
    source.check_unchanged().unwrap();
    let file = fs_err::OpenOptions::new().write(true).open(&path).unwrap();
    let past = std::time::SystemTime::UNIX_EPOCH;
    file.file().set_modified(past).unwrap();
    let error = source.check_unchanged().unwrap_err();
    assert_eq!(error.message(), format!("{} changed during the run", path.display()));
    fs_err::remove_file(&path).unwrap();
    assert_eq!(source.check_unchanged().unwrap_err().kind(), Kind::Input);
    hub::tiny_llama().unwrap().check_unchanged().unwrap();
}

#[test]
fn heads_are_compared_value_by_value() {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let halves: Vec<u8> =
        [1.0, 2.0, -3.0, 0.5].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let equal = bytes(&[1.0, 2.0, -3.0, 0.5]);
    let other = bytes(&[1.0, 2.0, -3.0, 0.25]);
    for (dtype, shape, head, expected) in [
        ("F32", &[2, 2][..], &equal, true),
        ("F32", &[2, 2], &other, false),
        ("F16", &[2, 2], &halves, true),
        ("F32", &[4, 1], &equal, false),
    ] {
        let home = good();
        let file = safetensors(&[
            ("model.embed_tokens.weight", "F32", &[2, 2], &equal),
            ("lm_head.weight", dtype, shape, head),
        ]);
        write(&home.path().join("model.safetensors"), file);
        let source = Source::open(home.path()).unwrap();
        assert_eq!(source.head_is_embedding(&|| Ok(())).unwrap(), expected, "{dtype} {shape:?}");
        assert_eq!(source.head_is_embedding(&|| Ok(())).unwrap(), expected);
    }
}
