/*! The parts of a `tokenizer.json` that a GGUF file states again. */

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// A `tokenizer.json` of byte pair encoding.
#[derive(Deserialize)]
pub(super) struct TokenizerFile {
    /// Tokens that are found in the text before anything else.
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
    /// What is done to the text first.
    #[serde(default)]
    pub(super) normalizer: Value,
    /// How the text is split before tokens are merged.
    #[serde(default)]
    pub(super) pre_tokenizer: Value,
    /// The vocabulary and its merges.
    pub(super) model: Model,
}

/// A token that is found in the text before anything else.
#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: usize,
    pub(super) content: String,
    #[serde(default)]
    pub(super) special: bool,
    #[serde(default)]
    pub(super) single_word: bool,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
}

/// Byte pair encoding.
#[derive(Deserialize)]
pub(super) struct Model {
    /// Ids by token.
    pub(super) vocab: HashMap<String, usize>,
    /// Pairs of tokens, the first to be merged first.
    pub(super) merges: Vec<Merge>,
    #[serde(default)]
    pub(super) unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    /// Whether characters that are no tokens become the tokens of their bytes: SentencePiece's way.
    #[serde(default)]
    pub(super) byte_fallback: bool,
    /// Whether a word that is a token stays one, whatever the merges.
    #[serde(default)]
    pub(super) ignore_merges: bool,
}

/// Two tokens that become one.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Merge {
    Pair(String, String),
    Joined(String),
}

impl Merge {
    /// Both tokens.
    pub(super) fn tokens(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Joined(both) => both.split_once(' '),
        }
    }
}

impl TokenizerFile {
    /// Reads the file; `path` is its name in messages.
    ///
    /// # Errors
    /// Input: no tokenizer, or one of another kind than GGUF's tokenizers for these networks.
    pub(super) fn parse(bytes: &[u8], path: &str) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| Error::input(format!("{path} is not JSON: {error}")))?;
        if let Some(kind) = value["model"]["type"].as_str().filter(|kind| *kind != "BPE") {
            return Err(cannot(path, &format!("its model is {kind}, and not BPE")));
        }
        let file: Self = serde_json::from_value(value)
            .map_err(|error| Error::input(format!("{path} is no tokenizer: {error}")))?;
        let affixes = [&file.model.continuing_subword_prefix, &file.model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return Err(cannot(path, "its tokens have prefixes or suffixes inside of words"));
        }
        Ok(file)
    }
}

/// The refusal of a tokenizer that llama.cpp would apply differently, or not at all.
pub(super) fn cannot(path: &str, why: &str) -> Error {
    Error::input(format!("llama.cpp has no tokenizer like {path}: {why}")).hint(
        "export with another format: GGUF holds the tokenizer, and a model that reads other tokens than it was \
         trained on is a worse model",
    )
}

/// The settings of a pre-tokenizer or normalizer: of a `Sequence` its parts, of null none.
pub(super) fn steps<'a>(value: &'a Value, parts: &str) -> Vec<&'a Value> {
    match value["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => {
            let all = value[parts].as_array().into_iter().flatten();
            all.flat_map(|part| steps(part, parts)).collect()
        }
        Some(_) => vec![value],
    }
}
