use super::*;
use serde_json::json;

#[test]
fn any_change_of_atom_json_changes_its_hash() {
    let text = with_own_hash(json!({"format_version": 1, "note": NO_HASH, "tensors": {}}));
    let read: Value = serde_json::from_str(&text).unwrap();
    let hash = read["sha256"].as_str().unwrap();
    assert!(has_own_hash(text.as_bytes(), hash));
    assert_eq!(read["note"], NO_HASH);
    for (from, to) in [("note", "nots"), ("\n}", " \n}"), ("1", "2"), ("000", "001")] {
        let changed = text.replacen(from, to, 1);
        assert!(!has_own_hash(changed.as_bytes(), hash), "{from} -> {to}");
    }
    assert!(!has_own_hash(b"", hash) && !has_own_hash(text.as_bytes(), NO_HASH));
}

#[test]
fn names_of_a_checkpoints_files_are_told_from_others() {
    for name in [
        "atom.json",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "LICENSE",
        "SmolLM2-Q4_0.gguf",
    ] {
        assert!(is_checkpoint_file(name), "{name}");
    }
    for name in [
        "model-1-of-2.safetensors",
        "model-00001-of-00002.safetensors.bak",
        "thesis.tex",
        ".git",
        "plan.json",
        "adapter.safetensors",
        "",
    ] {
        assert!(!is_checkpoint_file(name), "{name}");
    }
}
