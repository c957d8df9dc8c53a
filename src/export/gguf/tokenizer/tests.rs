use serde_json::json;

use super::*;

const TINY_LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama");

fn tiny_llama() -> Value {
    let bytes = fs_err::read(format!("{TINY_LLAMA}/tokenizer.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn convert(tokenizer: &Value, rows: usize) -> Result<(Metadata, Vec<String>)> {
    let (tokenizer, config) = (tokenizer.to_string(), json!({ "eos_token_id": 1 }));
    let files = TokenizerFiles {
        tokenizer: tokenizer.as_bytes(),
        path: "tokenizer.json",
        config: &config,
        settings: None,
        generation: None,
        chat_template: None,
    };
    let mut cautions = Vec::new();
    let metadata = metadata(&files, rows, &mut cautions)?;
    Ok((metadata, cautions))
}

#[test]
fn every_row_of_the_embedding_has_a_token() {
    let (metadata, cautions) = convert(&tiny_llama(), 4100).unwrap();
    let Some(GgufValue::Texts(tokens)) = metadata.get("tokenizer.ggml.tokens") else { panic!() };
    let Some(GgufValue::Ints(kinds)) = metadata.get("tokenizer.ggml.token_type") else { panic!() };
    assert_eq!((tokens.len(), kinds.len()), (4100, 4100));
    assert_eq!((&tokens[0][..], kinds[0]), ("<s>", 3));
    assert_eq!((&tokens[2][..], kinds[2]), ("!", 1));
    assert_eq!((&tokens[4099][..], kinds[4099]), ("[PAD4099]", 5));
    assert_eq!(metadata.get("tokenizer.ggml.pre"), Some(&GgufValue::Text("gpt-2".into())));
    assert_eq!(metadata.get("tokenizer.ggml.bos_token_id"), Some(&GgufValue::U32(0)));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&GgufValue::Bool(true)));
    assert!(cautions.is_empty());
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let error = convert(&tiny_llama(), 4000).unwrap_err();
    assert!(error.message().contains("but the model has 4000 embeddings"), "{error}");
}

#[test]
fn another_kind_of_tokenizer_is_refused() {
    let mut tokenizer = tiny_llama();
    tokenizer["model"] = json!({
        "type": "WordLevel", "vocab": { "<s>": 0, "</s>": 1 }, "unk_token": "<s>"
    });
    let error = convert(&tokenizer, 4096).unwrap_err();
    assert!(error.message().contains("its model is WordLevel, and not BPE"), "{error}");
    assert_eq!(error.kind(), crate::Kind::Input);
}

#[test]
fn added_tokens_are_what_they_look_like() {
    let mut tokenizer = tiny_llama();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    for (id, content, lstrip) in
        [(4096, "<tool>", false), (4097, "<|end|>", false), (4098, "<mask>", true)]
    {
        added.push(json!({
            "id": id, "content": content, "special": false, "lstrip": lstrip, "rstrip": false,
            "single_word": false, "normalized": false
        }));
    }
    let (metadata, cautions) = convert(&tokenizer, 4099).unwrap();
    let Some(GgufValue::Ints(kinds)) = metadata.get("tokenizer.ggml.token_type") else { panic!() };
    assert_eq!(kinds[4096..], [4, 3, 4]);
    assert!(cautions[0].contains("\"<mask>\""), "{cautions:?}");
}
