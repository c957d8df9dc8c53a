use serde_json::json;

use super::*;

/// A tokenizer of all bytes, these tokens and merges of them.
fn file(tokens: &[&str], merges: &[[&str; 2]]) -> Value {
    let mut vocab = serde_json::Map::new();
    let own = ["<unk>", "<s>", "</s>"].into_iter().map(str::to_owned);
    let all = own.chain((0..=u8::MAX).map(byte_token)).chain(tokens.iter().map(|t| (*t).into()));
    all.enumerate().for_each(|(id, token)| drop(vocab.insert(token, id.into())));
    json!({
        "added_tokens": [
            { "id": 0, "content": "<unk>", "special": true },
            { "id": 1, "content": "<s>", "special": true },
            { "id": 2, "content": "</s>", "special": true },
        ],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ] },
        "model": {
            "type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": vocab, "merges": merges
        },
    })
}

fn convert(file: &Value) -> Result<(Metadata, Vocabulary, Vec<String>)> {
    let path = "tokenizer.json";
    let file = TokenizerFile::parse(file.to_string().as_bytes(), path)?;
    let rows = file.model.vocab.len() + 1;
    let mut vocabulary = Vocabulary::new(&file, rows, path)?;
    let mut cautions = Vec::new();
    let metadata = metadata(&file, &mut vocabulary, path, &mut cautions)?;
    Ok((metadata, vocabulary, cautions))
}

/// The merges of `abc` from either side, then `▁a`.
const TOKENS: [&str; 7] = ["a", "b", "c", "▁", "ab", "bc", "abc"];
const MERGES: [[&str; 2]; 4] = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]];

#[test]
fn scores_are_the_places_of_the_merges() {
    let (metadata, vocabulary, cautions) = convert(&file(&TOKENS, &MERGES)).unwrap();
    let Some(GgufValue::Floats(scores)) = metadata.get("tokenizer.ggml.scores") else { panic!() };
    // ab, bc and abc, then the four that nothing is merged to.
    assert_eq!(scores[259..], [-3.0, -4.0, -5.0, -6.0, 0.0, -1.0, -2.0, 0.0]);
    assert!(scores[..259].iter().all(|score| *score == 0.0));
    let kinds: Vec<_> = vocabulary.0.iter().map(|token| token.kind).collect();
    assert_eq!(kinds[..3], [TokenKind::Unknown, TokenKind::Control, TokenKind::Control]);
    assert!(kinds[3..259].iter().all(|kind| *kind == TokenKind::Byte));
    assert_eq!(kinds[265..], [TokenKind::Normal, TokenKind::Unused]);
    assert_eq!(metadata.get("tokenizer.ggml.add_space_prefix"), Some(&GgufValue::Bool(true)));
    assert_eq!(metadata.get("tokenizer.ggml.model"), Some(&GgufValue::Text("llama".into())));
    assert!(cautions.is_empty());
}

#[test]
fn merges_that_are_no_scores_are_refused() {
    let refused = |tokens: &[&str], merges: &[[&str; 2]], what: &str| {
        let error = convert(&file(tokens, merges)).unwrap_err();
        assert!(error.message().contains(what), "{error}");
    };
    refused(&TOKENS, &MERGES[..3], r#"does not merge "ab" and "c""#);
    let [ab, bc, a_bc, ab_c] = MERGES;
    refused(&TOKENS, &[ab, a_bc, bc, ab_c], r#"merges to "abc" are at two places"#);
    refused(&TOKENS, &[ab, bc, a_bc, ab_c, ["c", "c"]], "is none of its tokens");
}

#[test]
fn a_tokenizer_without_all_bytes_is_refused() {
    let mut file = file(&TOKENS, &MERGES);
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("<0x0A>").unwrap();
    vocab.insert("other".into(), id);
    let error = convert(&file).unwrap_err();
    assert!(error.message().contains("no token <0x0A>"), "{error}");
}

#[test]
fn spaces_before_a_text_follow_the_settings() {
    let prefix = |normalizer: Value, pre_tokenizer: Value, tokens: &[&str]| -> Result<_> {
        let mut file = file(tokens, &MERGES);
        file["normalizer"] = normalizer;
        file["pre_tokenizer"] = pre_tokenizer;
        let (metadata, _, cautions) = convert(&file)?;
        match metadata.get("tokenizer.ggml.add_space_prefix") {
            Some(GgufValue::Bool(prefix)) => Ok((*prefix, cautions.len())),
            other => panic!("{other:?}"),
        }
    };
    let metaspace = |scheme: &str, split: bool| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    assert_eq!(prefix(replace, json!(null), &TOKENS).unwrap(), (false, 0));
    assert_eq!(prefix(json!(null), metaspace("first", false), &TOKENS).unwrap(), (true, 1));
    assert_eq!(prefix(json!(null), metaspace("always", true), &TOKENS).unwrap(), (true, 1));
    assert_eq!(prefix(json!(null), metaspace("never", false), &TOKENS).unwrap(), (false, 0));
    let with_inner_space = [&TOKENS[..], &["a▁"]].concat();
    let error = prefix(json!(null), metaspace("always", true), &with_inner_space).unwrap_err();
    assert!(error.message().contains(r#"token "a▁" has a space inside"#), "{error}");
    let error = prefix(json!({ "type": "NFKC" }), json!(null), &TOKENS).unwrap_err();
    assert!(error.message().contains("its normalizer is"), "{error}");
}
