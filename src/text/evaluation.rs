/*! The windows of an evaluation. */

use super::{TextSet, Tokenizer};
use crate::Result;
use crate::progress::Progress;

/// Text on which perplexity is measured.
pub struct Evaluation {
    /// The text.
    pub text: TextSet,
    /// Tokens in a window.
    pub seq_len: usize,
    /// At most this many windows.
    pub windows: Option<usize>,
}

impl Evaluation {
    /// The windows in a model's tokens, joined; `path` names its tokenizer's file in errors.
    pub fn tokens(
        &self,
        tokenizer: &[u8],
        path: &str,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        let tokenizer = Tokenizer::from_bytes(tokenizer, path)?;
        self.text.evaluation_windows(&tokenizer, self.seq_len, self.windows, progress)
    }
}
