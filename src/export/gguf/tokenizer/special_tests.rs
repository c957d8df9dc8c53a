use serde_json::json;

use super::*;

fn files<'a>(config: &'a Value, settings: Option<&'a Value>) -> TokenizerFiles<'a> {
    TokenizerFiles {
        tokenizer: b"",
        path: "tokenizer.json",
        config,
        settings,
        generation: None,
        chat_template: None,
    }
}

#[test]
fn named_tokens_come_before_numbered_ones() {
    let tokens = HashMap::from([("<s>", 0), ("</s>", 1), ("<pad>", 2), ("x", 3)]);
    let config = json!({ "bos_token_id": 3, "eos_token_id": [3, 1], "pad_token_id": null });
    let settings =
        json!({ "bos_token": { "content": "<s>" }, "pad_token": "<pad>", "unk_token": "?" });
    let found = SpecialTokens::find(&files(&config, Some(&settings)), &tokens);
    let expected =
        SpecialTokens { beginning: Some(0), end: Some(3), unknown: None, padding: Some(2) };
    assert_eq!(found, expected);
    let outside = json!({ "eos_token_id": 4 });
    assert_eq!(SpecialTokens::find(&files(&outside, None), &tokens), SpecialTokens::default());
}

#[test]
fn what_the_tokenizer_adds_is_said() {
    let config = json!({});
    let files = files(&config, None);
    let special = || SpecialTokens { end: Some(1), ..SpecialTokens::default() };
    let metadata = special().metadata([&[0], &[]], &files).unwrap();
    let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}")).cloned();
    assert_eq!(get("bos_token_id"), Some(GgufValue::U32(0)));
    assert_eq!(get("eos_token_id"), Some(GgufValue::U32(1)));
    assert_eq!(get("add_bos_token"), Some(GgufValue::Bool(true)));
    assert_eq!(get("add_eos_token"), Some(GgufValue::Bool(false)));
    assert_eq!(get("padding_token_id"), None);
    let error = special().metadata([&[0, 1], &[]], &files).unwrap_err();
    assert!(error.message().contains("puts 2 tokens before every text"), "{error}");
    let error = SpecialTokens::default().metadata([&[0], &[]], &files).unwrap_err();
    assert!(error.message().contains("which token of tokenizer.json ends a text"), "{error}");
}

#[test]
fn templates_are_kept_by_name() {
    let config = json!({});
    let settings = json!({ "chat_template": [
        { "name": "default", "template": "D" }, { "name": "tool_use", "template": "T" }
    ] });
    let found = chat_templates(&files(&config, Some(&settings)));
    let text = |text: &str| GgufValue::Text(text.into());
    assert_eq!(found.get("tokenizer.chat_template"), Some(&text("D")));
    assert_eq!(found.get("tokenizer.chat_template.tool_use"), Some(&text("T")));
    let names = GgufValue::Texts(vec!["tool_use".into()]);
    assert_eq!(found.get("tokenizer.chat_templates"), Some(&names));
    let single = json!({ "chat_template": "S" });
    let with_file = TokenizerFiles { chat_template: Some("J"), ..files(&config, Some(&single)) };
    assert_eq!(chat_templates(&with_file).get("tokenizer.chat_template"), Some(&text("J")));
    let alone = chat_templates(&files(&config, Some(&single)));
    assert_eq!(alone.get("tokenizer.chat_template"), Some(&text("S")));
}
