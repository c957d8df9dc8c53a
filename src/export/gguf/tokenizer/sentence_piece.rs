/*! SentencePiece's BPE, the tokenizer of Llama 2 and Mistral 7B: llama.cpp's tokenizer `llama`, which merges by the tokens' scores.

A `tokenizer.json` has merges instead of scores. SentencePiece merges the two neighbours whose union is the token of the greatest score,
whatever the two are. A list of merges says the same if it has every pair whose union is a token, those of one token after
those of another; then the place of its merges is a token's score. Both are checked here. */

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::file::{Merge, TokenizerFile, cannot, steps};
use super::vocabulary::{TokenKind, Vocabulary};
use crate::Result;
use crate::export::gguf::container::{Metadata, Value as GgufValue};

/// What stands for a space.
const SPACE: char = '\u{2581}';

/// Sets the kinds of bytes and of the unknown token, and returns the keys of the tokenizer besides its tokens.
///
/// # Errors
/// Input: a tokenizer that llama.cpp would apply differently.
pub(super) fn metadata(
    file: &TokenizerFile,
    vocabulary: &mut Vocabulary,
    path: &str,
    cautions: &mut Vec<String>,
) -> Result<Metadata> {
    let prefix = space_prefix(file, path, cautions)?;
    for token in &mut vocabulary.0 {
        if is_byte(&token.text) {
            token.kind = TokenKind::Byte;
        } else if Some(&token.text) == file.model.unk_token.as_ref() {
            token.kind = TokenKind::Unknown;
        } else if token.kind == TokenKind::UserDefined {
            // Found in the text as the user writes it.
            token.text = token.text.replace(SPACE, " ");
        }
    }
    let ids = vocabulary.ids(path)?;
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ids.contains_key(byte_token(*byte).as_str())) {
        return Err(cannot(path, &format!("it has no token {}", byte_token(byte))));
    }
    let scores = scores(file, vocabulary, &ids).map_err(|why| cannot(path, &why))?;
    let mut metadata = Metadata::default();
    metadata.text("tokenizer.ggml.model", "llama");
    metadata.text("tokenizer.ggml.pre", "default");
    metadata.add("tokenizer.ggml.scores", GgufValue::Floats(scores));
    metadata.add("tokenizer.ggml.add_space_prefix", GgufValue::Bool(prefix));
    Ok(metadata)
}

fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Whether a space is put before a text.
fn space_prefix(file: &TokenizerFile, path: &str, cautions: &mut Vec<String>) -> Result<bool> {
    let space = SPACE.to_string();
    let normalizers = steps(&file.normalizer, "normalizers");
    let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == *space;
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == *space
    };
    let pre_tokenizers = steps(&file.pre_tokenizer, "pretokenizers");
    match (&normalizers[..], &pre_tokenizers[..]) {
        ([first, second], []) if prepends(first) && replaces(second) => Ok(true),
        ([only], []) if replaces(only) => Ok(false),
        ([], [only]) if only["type"] == "Metaspace" && only["replacement"] == *space => {
            metaspace(only, file, path, cautions)
        }
        _ => {
            let why = format!(
                "its normalizer is {} and its pre-tokenizer {}",
                file.normalizer, file.pre_tokenizer
            );
            Err(cannot(path, &why))
        }
    }
}

/// The same of the pre-tokenizer `Metaspace`.
fn metaspace(
    settings: &Value,
    file: &TokenizerFile,
    path: &str,
    cautions: &mut Vec<String>,
) -> Result<bool> {
    // Words begin with a space. llama.cpp does not split text, which is the same where no token has one inside.
    if settings["split"] != false {
        let inside = |text: &&String| text.chars().skip(1).any(|c| c == SPACE);
        if let Some(token) = file.model.vocab.keys().find(inside) {
            let why = format!("it splits text into words, and token {token:?} has a space inside");
            return Err(cannot(path, &why));
        }
    }
    let older = settings["add_prefix_space"].as_bool().unwrap_or(true);
    let scheme = settings["prepend_scheme"].as_str();
    match scheme.unwrap_or(if older { "always" } else { "never" }) {
        "never" => Ok(false),
        scheme => {
            cautions.push(format!(
                "llama.cpp puts a space before every text, also before one that begins with a space{}: such text gets \
                 other tokens than tokenizer.json gives it",
                if scheme == "first" { " or follows a control token" } else { "" }
            ));
            Ok(true)
        }
    }
}

/// The score of each token: 0, -1, -2 and so on in the order in which the merges make them, then the tokens that nothing
/// is merged to. An error says why there are no such scores.
fn scores(
    file: &TokenizerFile,
    vocabulary: &Vocabulary,
    ids: &HashMap<&str, usize>,
) -> std::result::Result<Vec<f32>, String> {
    let mut places: HashMap<usize, usize> = HashMap::new();
    let mut pairs = HashSet::with_capacity(file.model.merges.len());
    let mut last = None;
    for merge in &file.model.merges {
        let made = merge.tokens().and_then(|(left, right)| {
            let made = ids.get(format!("{left}{right}").as_str())?;
            Some((*made, *ids.get(left)?, *ids.get(right)?))
        });
        let (made, left, right) = made.ok_or_else(|| {
            let (Merge::Pair(first, _) | Merge::Joined(first)) = merge;
            format!("a merge of {first:?} is none of its tokens")
        })?;
        pairs.insert((left, right));
        if last == Some(made) {
            continue;
        }
        last = Some(made);
        let place = places.len();
        if places.insert(made, place).is_some() {
            let text = &vocabulary.0[made].text;
            return Err(format!("its merges to {text:?} are at two places of their order"));
        }
    }
    let normal = vocabulary.0.iter().enumerate();
    let normal = normal.filter(|(_, token)| token.kind == TokenKind::Normal);
    let mut scores = vec![0.0; vocabulary.0.len()];
    let mut others = places.len();
    for (id, token) in normal {
        let text = &token.text;
        for (at, _) in text.char_indices().skip(1) {
            let halves = (ids.get(&text[..at]), ids.get(&text[at..]));
            if let (Some(&left), Some(&right)) = halves
                && !pairs.contains(&(left, right))
            {
                let (left, right) = text.split_at(at);
                return Err(format!(
                    "it does not merge {left:?} and {right:?} to its token {text:?}"
                ));
            }
        }
        let place = places.get(&id).copied().unwrap_or_else(|| {
            others += 1;
            others - 1
        });
        scores[id] = -(place as f32);
    }
    Ok(scores)
}

#[cfg(test)]
#[path = "sentence_piece_tests.rs"]
mod tests;
