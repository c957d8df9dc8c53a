use serde_json::json;

use super::*;

/// The outcome for a tokenizer with these settings.
fn name(pre_tokenizer: Value, ignore_merges: bool) -> Result<String> {
    with(json!({ "pre_tokenizer": pre_tokenizer }), ignore_merges).map(|found| found.0)
}

fn with(mut file: Value, ignore_merges: bool) -> Result<(String, Vec<String>)> {
    file["model"] = json!({
        "type": "BPE", "ignore_merges": ignore_merges,
        "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]]
    });
    let file = TokenizerFile::parse(file.to_string().as_bytes(), "tokenizer.json")?;
    let mut cautions = Vec::new();
    let metadata = metadata(&file, "tokenizer.json", &mut cautions)?;
    assert_eq!(metadata.get("tokenizer.ggml.merges"), Some(&GgufValue::Texts(vec!["a b".into()])));
    match metadata.get("tokenizer.ggml.pre") {
        Some(GgufValue::Text(name)) => Ok((name.clone(), cautions)),
        other => panic!("{other:?}"),
    }
}

fn bytes(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn sequence(parts: &[Value]) -> Value {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

fn split(regex: &str) -> Value {
    json!({
        "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false
    })
}

#[test]
fn pre_tokenizers_have_llama_cpps_names() {
    let digits = json!({ "type": "Digits", "individual_digits": true });
    assert_eq!(name(bytes(true), false).unwrap(), "gpt-2");
    assert_eq!(name(sequence(&[digits, bytes(true)]), false).unwrap(), "smollm");
    let after = |regex| sequence(&[split(regex), bytes(false)]);
    assert_eq!(name(after(LLAMA_3), true).unwrap(), "llama-bpe");
    assert_eq!(name(after(LLAMA_3), false).unwrap(), "smaug-bpe");
    assert_eq!(name(after(QWEN_2), false).unwrap(), "qwen2");
    assert_eq!(name(after(TEKKEN), true).unwrap(), "tekken");
}

#[test]
fn what_llama_cpp_splits_otherwise_is_refused() {
    let after = |regex: &str| sequence(&[split(regex), bytes(false)]);
    let mut prefixed = bytes(true);
    prefixed["add_prefix_space"] = true.into();
    let mut removing = split(QWEN_2);
    removing["behavior"] = "Removed".into();
    let all_digits = json!({ "type": "Digits", "individual_digits": false });
    for (pre_tokenizer, ignore_merges) in [
        (after(r"\p{N}{1,3}"), false),
        (after(QWEN_2), true),
        (after(TEKKEN), false),
        (bytes(true), true),
        (bytes(false), false),
        (prefixed, false),
        (sequence(&[removing, bytes(false)]), false),
        (sequence(&[all_digits, bytes(true)]), false),
        (sequence(&[split(LLAMA_3), bytes(true)]), true),
        (json!(null), false),
    ] {
        let error = name(pre_tokenizer.clone(), ignore_merges).unwrap_err();
        assert!(error.message().contains("its pre-tokenizer is"), "{pre_tokenizer}: {error}");
        assert!(error.hint_text().unwrap().contains("smaug-bpe"), "{error}");
    }
}

#[test]
fn normalizers_are_said_or_refused() {
    let file = |normalizer| json!({ "pre_tokenizer": bytes(true), "normalizer": normalizer });
    let (_, cautions) = with(file(json!({ "type": "NFC" })), false).unwrap();
    assert!(cautions[0].contains("normal form C"), "{cautions:?}");
    let error = with(file(json!({ "type": "Lowercase" })), false).unwrap_err();
    assert!(error.message().contains("a normalizer of type Lowercase"), "{error}");
}
