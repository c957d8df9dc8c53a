/*! A `tokenizer.json` as the keys of a GGUF file: `tokenizer.ggml.*`.

llama.cpp has its own tokenizers, and two of them serve these networks. A file that neither applies exactly is refused by name: a model that
reads other tokens than it was trained on gives bad text without a warning. */

mod byte_level;
mod file;
mod sentence_piece;
mod special;
mod vocabulary;

use serde_json::Value;

use self::file::TokenizerFile;
use self::special::{SpecialTokens, chat_templates};
use self::vocabulary::{TokenKind, Vocabulary};
use super::container::{Metadata, Value as GgufValue};
use crate::Result;
use crate::text::{Tokenizer, check_tokens};

/// What of a checkpoint says how text becomes tokens.
pub(super) struct TokenizerFiles<'a> {
    /// The content of `tokenizer.json`.
    pub(super) tokenizer: &'a [u8],
    /// Its name in messages.
    pub(super) path: &'a str,
    /// The content of `config.json`.
    pub(super) config: &'a Value,
    /// The content of `tokenizer_config.json`.
    pub(super) settings: Option<&'a Value>,
    /// The content of `generation_config.json`.
    pub(super) generation: Option<&'a Value>,
    /// The content of `chat_template.jinja`.
    pub(super) chat_template: Option<&'a str>,
}

/// The keys of a tokenizer for a model of `rows` embeddings. What llama.cpp does a little differently is added to `cautions`.
///
/// # Errors
/// Input: no tokenizer, one that llama.cpp does not have, or one of another model.
pub(super) fn metadata(
    files: &TokenizerFiles<'_>,
    rows: usize,
    cautions: &mut Vec<String>,
) -> Result<Metadata> {
    let path = files.path;
    let tokenizer = Tokenizer::from_bytes(files.tokenizer, path)?;
    let file = TokenizerFile::parse(files.tokenizer, path)?;
    let mut vocabulary = Vocabulary::new(&file, rows, path)?;
    let mut metadata = match file.model.byte_fallback {
        true => sentence_piece::metadata(&file, &mut vocabulary, path, cautions)?,
        false => byte_level::metadata(&file, path, cautions)?,
    };
    if let Some(token) =
        file.added_tokens.iter().find(|token| token.lstrip || token.rstrip || token.single_word)
    {
        cautions.push(format!(
            "token {:?} of tokenizer.json takes the spaces around it, or no part of a word; llama.cpp finds it \
             everywhere and leaves spaces",
            token.content
        ));
    }
    let special = SpecialTokens::find(files, &vocabulary.ids(path)?);
    for id in [special.beginning, special.end, special.padding].into_iter().flatten() {
        if vocabulary.0[id].kind == TokenKind::Normal {
            vocabulary.0[id].kind = TokenKind::Control;
        }
    }
    let around = [tokenizer.before(), tokenizer.after()];
    around.iter().try_for_each(|added| check_tokens(added, rows, path))?;
    let special = special.metadata(around, files)?;
    let kinds = vocabulary.0.iter().map(|token| token.kind as i32).collect();
    let texts = vocabulary.0.into_iter().map(|token| token.text).collect();
    metadata.add("tokenizer.ggml.tokens", GgufValue::Texts(texts));
    metadata.add("tokenizer.ggml.token_type", GgufValue::Ints(kinds));
    metadata.append(special);
    metadata.append(chat_templates(files));
    Ok(metadata)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
