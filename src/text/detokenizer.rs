/*! Text out of ids, as it comes.

A token may be a part of a character, and what it stands for may depend on the tokens before it, so ids are decoded
together with the last few before them. An unfinished character decodes to one to three U+FFFD at the end: text is returned
up to them, and they follow when they are finished or nothing more comes. */

use super::Tokenizer;
use crate::Result;

/// Ids that are decoded again for the sake of those after them.
const CONTEXT: usize = 6;
/// Ids that wait for the end of a character at most. Random bytes may never end one.
const MOST_WAITING: usize = 32;
/// U+FFFD that an unfinished character leaves at most: one for each of its bytes.
const UNFINISHED: usize = 3;

/// Turns ids into text, one by one.
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    /// Ids that the next text depends on.
    ids: Vec<u32>,
    /// Bytes of their text that were returned.
    returned: usize,
}

impl<'t> Detokenizer<'t> {
    /// For ids that follow `before`, whose text is not returned.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn after(tokenizer: &'t Tokenizer, before: &[u32]) -> Result<Self> {
        let ids = before[before.len().saturating_sub(CONTEXT)..].to_vec();
        let returned = tokenizer.decode(&ids)?.len();
        Ok(Self { tokenizer, ids, returned })
    }

    /// The text that is complete with `id`.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        let waits = self.ids.len() < CONTEXT + MOST_WAITING;
        let end = if waits { complete(&text) } else { text.len() };
        let new = text.get(self.returned..end).unwrap_or_default().to_owned();
        self.returned = self.returned.max(end);
        if end == text.len() && self.ids.len() > 2 * CONTEXT {
            self.ids.drain(..self.ids.len() - CONTEXT);
            self.returned = self.tokenizer.decode(&self.ids)?.len();
        }
        Ok(new)
    }

    /// What is left when no more ids come.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(text.get(self.returned..).unwrap_or_default().to_owned())
    }
}

/// Bytes of the text without an unfinished character at its end.
fn complete(text: &str) -> usize {
    let unfinished = text.chars().rev().take(UNFINISHED).take_while(|c| *c == '\u{fffd}').count();
    text.len() - unfinished * '\u{fffd}'.len_utf8()
}

#[cfg(test)]
#[path = "detokenizer_tests.rs"]
mod tests;
