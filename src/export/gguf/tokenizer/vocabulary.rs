/*! The tokens of a model, one for each row of its embedding, with the kinds that llama.cpp distinguishes. */

use std::collections::HashMap;

use super::file::{TokenizerFile, cannot};
use crate::{Error, Result};

/// What a token is to llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    Normal = 1,
    Unknown = 2,
    /// Not part of a text: found in prompts, and not printed.
    Control = 3,
    /// Found in every text before anything else.
    UserDefined = 4,
    /// A row of the embedding without a token.
    Unused = 5,
    /// A byte of a character that is no token.
    Byte = 6,
}

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub(super) text: String,
    pub(super) kind: TokenKind,
}

/// All tokens by id.
#[derive(Debug)]
pub(super) struct Vocabulary(pub(super) Vec<Token>);

impl Vocabulary {
    /// The tokens of `file` for an embedding of `rows` rows. Rows without a token get one that no text has.
    ///
    /// # Errors
    /// Input: a token without a row, or two with the same id.
    pub(super) fn new(file: &TokenizerFile, rows: usize, path: &str) -> Result<Self> {
        let mut tokens: Vec<Option<Token>> = vec![None; rows];
        let mut place = |id: usize, token: Token| {
            let slot = tokens.get_mut(id).ok_or_else(|| {
                Error::input(format!(
                    "{path}: token {:?} has id {id}, but the model has {rows} embeddings",
                    token.text
                ))
                .hint("tokenizer.json does not belong to this model")
            })?;
            match slot {
                Some(other) if other.text != token.text => Err(Error::input(format!(
                    "{path}: tokens {:?} and {:?} have the same id, {id}",
                    other.text, token.text
                ))
                .hint("fetch the model's `tokenizer.json` again")),
                _ => {
                    *slot = Some(token);
                    Ok(())
                }
            }
        };
        for (text, &id) in &file.model.vocab {
            place(id, Token { text: text.clone(), kind: TokenKind::Normal })?;
        }
        for added in &file.added_tokens {
            let control = added.special || looks_special(&added.content);
            let kind = if control { TokenKind::Control } else { TokenKind::UserDefined };
            place(added.id, Token { text: added.content.clone(), kind })?;
        }
        let named = |(id, token): (usize, Option<Token>)| {
            token.unwrap_or_else(|| Token { text: format!("[PAD{id}]"), kind: TokenKind::Unused })
        };
        Ok(Self(tokens.into_iter().enumerate().map(named).collect()))
    }

    /// The id of each text.
    ///
    /// # Errors
    /// Input: two tokens of the same text, which llama.cpp does not load.
    pub(super) fn ids(&self, path: &str) -> Result<HashMap<&str, usize>> {
        let mut ids = HashMap::with_capacity(self.0.len());
        for (id, token) in self.0.iter().enumerate() {
            if token.text.is_empty() {
                return Err(cannot(path, &format!("token {id} is empty")));
            }
            if let Some(other) = ids.insert(token.text.as_str(), id) {
                let why = format!("tokens {other} and {id} are both {:?}", token.text);
                return Err(cannot(path, &why));
            }
        }
        Ok(ids)
    }
}

/// Whether a token is written like one that is not part of a text. Published files do not mark all of them as special, and
/// llama.cpp treats those of this form as control tokens.
fn looks_special(text: &str) -> bool {
    let between = |open, close| text.starts_with(open) && text.ends_with(close);
    between("<|", "|>") || between("<｜", "｜>") || text == "<pad>"
}
