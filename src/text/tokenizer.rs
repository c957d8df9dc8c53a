/*! A model's `tokenizer.json`, applied as the perplexity protocol requires: to the entire text.

The special tokens that the file's own post-processor adds are added, so a Llama-like model gets one
beginning-of-sequence id at the start of the text and none at the start of later windows. Truncation and padding,
which some published files enable, would silently shorten the text and are disabled. */

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokenizers::{Encoding, PostProcessorWrapper};

use super::guarded::{Allowance, caught, watched};
use super::pieces::{PIECE_BYTES, Pieces, Token};
use super::reach::Reach;
use crate::checkpoint::sha256_hex;
use crate::progress::Progress;
use crate::{Error, Result};

/// Memory of a tokenizer per byte of its file: its vocabulary and merges, by id and by text.
const MEMORY_PER_BYTE: u64 = 15;

/// Turns text into a model's ids.
pub struct Tokenizer {
    /// Without its post-processor, whose tokens are `before` and `after`.
    inner: Arc<tokenizers::Tokenizer>,
    path: String,
    sha256: String,
    before: Vec<u32>,
    after: Vec<u32>,
    reach: Option<Reach>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`; `path` names the file in errors.
    ///
    /// # Errors
    /// If the bytes are not a tokenizer of a known kind.
    pub fn from_bytes(tokenizer_json: &[u8], path: &str) -> Result<Self> {
        let unreadable = |cause: String| {
            Error::input(cause)
                .context(format!("{path} is not a readable tokenizer"))
                .hint("fetch the model's `tokenizer.json` again; older formats are not read")
        };
        let read = || -> tokenizers::Result<_> {
            let mut inner = tokenizers::Tokenizer::from_bytes(tokenizer_json)?;
            inner.with_truncation(None)?;
            inner.with_padding(None);
            let (before, after) = around(&inner)?;
            inner.with_post_processor(None::<PostProcessorWrapper>);
            let reach = Reach::of(&inner);
            Ok((inner, before, after, reach))
        };
        let read = caught(read).map_err(unreadable)?;
        let (inner, before, after, reach) = read.map_err(|error| unreadable(error.to_string()))?;
        let growth = growth(&inner);
        if growth > MOST_GROWTH {
            return Err(unreadable(format!(
                "its normalizer may make a text {growth} times as long, more than {MOST_GROWTH} times"
            )));
        }
        let (inner, path) = (Arc::new(inner), path.to_owned());
        Ok(Self { inner, path, sha256: sha256_hex(tokenizer_json), before, after, reach })
    }

    /// Memory of the tokenizer of a file of `bytes`.
    pub fn memory_bytes(bytes: usize) -> u64 {
        (bytes as u64).saturating_mul(MEMORY_PER_BYTE)
    }

    /// The ids of the text, special tokens of the tokenizer's post-processor included.
    ///
    /// # Errors
    /// If the tokenizer has no id for some part of the text, or the user asked the run to stop.
    pub fn encode(&self, text: &str, progress: &dyn Progress) -> Result<Vec<u32>> {
        self.encode_in_pieces(text, PIECE_BYTES, progress)
    }

    /// The ids of a text in which special tokens stand already: none is added.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_as_it_is(&self, text: &str, progress: &dyn Progress) -> Result<Vec<u32>> {
        self.ids(text.to_owned(), progress)
    }

    /// The text of ids, without special tokens. Bytes that are no UTF-8 become U+FFFD; so do those of a character
    /// that is not complete.
    ///
    /// # Errors
    /// If the file's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, true)
    }

    /// The same with the special tokens.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, false)
    }

    fn decoded(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let decoded = caught(|| self.inner.decode(ids, skip_special));
        decoded.and_then(|text| text.map_err(|error| error.to_string())).map_err(|cause| {
            Error::input(cause)
                .context(format!("{} cannot turn tokens into text", self.path))
                .hint("fetch the model's `tokenizer.json` again")
        })
    }

    /// The same ids, by pieces of `piece` bytes.
    pub(super) fn encode_in_pieces(
        &self,
        text: &str,
        piece: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut sink = |some: &[u32]| {
            ids.extend_from_slice(some);
            Ok(ControlFlow::Continue(()))
        };
        let mut pieces = Pieces::begin(self, piece, progress, &mut sink)?;
        let _ = pieces.push(text)?;
        pieces.finish()?;
        Ok(ids)
    }

    /// The number of ids, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The file's name in errors.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// SHA-256 of the file.
    pub(super) fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Ids before every text.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// Ids after every text.
    pub fn after(&self) -> &[u32] {
        &self.after
    }

    /// Its reach, if it is known.
    pub(super) fn reach(&self) -> Option<&Reach> {
        self.reach.as_ref()
    }

    /// The ids of a text by itself.
    pub(super) fn ids(&self, text: String, progress: &dyn Progress) -> Result<Vec<u32>> {
        // The fast variant computes no offsets.
        self.run(text, progress, |tokenizer, text| {
            Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec())
        })
    }

    /// The tokens of a text by itself, with their offsets.
    pub(super) fn tokens(&self, text: &str, progress: &dyn Progress) -> Result<Vec<Token>> {
        self.run(text.to_owned(), progress, |tokenizer, text| {
            Ok(tokens(&tokenizer.encode(text, false)?))
        })
    }

    /// Calls the tokenizer under guard: damaged files make it panic, hang or take too much memory.
    fn run<T: Send + 'static>(
        &self,
        text: String,
        progress: &dyn Progress,
        encode: impl FnOnce(&tokenizers::Tokenizer, &str) -> tokenizers::Result<T> + Send + 'static,
    ) -> Result<T> {
        let bytes = text.len() as u64;
        let inner = Arc::clone(&self.inner);
        let work = move || encode(&inner, &text).map_err(|error| error.to_string());
        let result = if bytes <= UNWATCHED_BYTES {
            caught(work)
        } else {
            // Usual are 2 MB a second and 150 bytes a byte.
            let time = Duration::from_secs(60 + bytes / 10_000);
            let allowance = Allowance { time, bytes: (1 << 30) + 600 * bytes };
            watched(allowance, &|| progress.stop_requested(), work)
        };
        progress.check_stop()?;
        result.and_then(|encoded| encoded).map_err(|cause| {
            Error::input(cause)
                .context(format!("{} cannot tokenize the text", self.path))
                .hint("fetch the model's `tokenizer.json` again, or try another text")
        })
    }
}

/// Checks that all tokens are below the rows of a model's embedding. `tokenizer` names the file that they come from.
///
/// # Errors
/// Bad input that names a token without a row.
pub fn check_tokens(tokens: &[u32], rows: usize, tokenizer: &str) -> Result<()> {
    match tokens.iter().find(|token| **token as usize >= rows) {
        None => Ok(()),
        Some(token) => Err(Error::input(format!(
            "{tokenizer}: the tokenizer gives token {token}, but the model has {rows} embeddings"
        ))
        .hint("tokenizer.json does not belong to this model")),
    }
}

/// Texts up to this length are tokenized without an extra thread.
const UNWATCHED_BYTES: u64 = 4 << 10;

/// The largest factor by which a normalizer's replacements may lengthen a text.
const MOST_GROWTH: u64 = 100;

fn tokens(encoding: &Encoding) -> Vec<Token> {
    let (words, offsets) = (encoding.get_word_ids(), encoding.get_offsets());
    let mut before = None;
    let token = |((id, word), (start, end)): ((&u32, &Option<u32>), &(usize, usize))| {
        let begins_word = before != Some(*word);
        before = Some(*word);
        Token { id: *id, begins_word, start: *start, end: *end }
    };
    encoding.get_ids().iter().zip(words).zip(offsets).map(token).collect()
}

/// The ids that the post-processor puts before and after a text.
fn around(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    /// Stands for the text; no vocabulary is so large.
    const TEXT: u32 = u32::MAX;
    let text = tokenizers::Token::new(TEXT, String::new(), (0, 0));
    let all = tokenizer.post_process(Encoding::from_tokens(vec![text], 0), None, true)?;
    let ids: Vec<&[u32]> = all.get_ids().split(|id| *id == TEXT).collect();
    match ids[..] {
        [before, after] => Ok((before.to_vec(), after.to_vec())),
        _ => Err(format!("its post-processor has the text {} times", ids.len() - 1).into()),
    }
}

/// An upper bound of the factor by which the normalizer's replacements lengthen a text.
fn growth(tokenizer: &tokenizers::Tokenizer) -> u64 {
    fn of(normalizer: &serde_json::Value) -> u64 {
        let length = |value: &serde_json::Value| value.as_str().map_or(0, str::len) as u64;
        match normalizer["type"].as_str() {
            Some("Sequence") => {
                let parts = normalizer["normalizers"].as_array().into_iter().flatten();
                parts.map(of).fold(1, u64::saturating_mul)
            }
            Some("Replace") => {
                let pattern = length(&normalizer["pattern"]["String"]).max(1);
                length(&normalizer["content"]).div_ceil(pattern).max(1)
            }
            Some("Prepend") => 1 + length(&normalizer["prepend"]) / 64,
            _ => 1,
        }
    }
    let normalizer = tokenizer.get_normalizer().map(serde_json::to_value);
    normalizer.and_then(Result::ok).map_or(1, |normalizer| of(&normalizer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    const TINY_LLAMA: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");

    fn tiny_llama() -> Vec<u8> {
        fs_err::read(TINY_LLAMA).unwrap()
    }

    #[test]
    fn puts_one_beginning_of_sequence_before_the_entire_text() {
        let tokenizer = Tokenizer::from_bytes(&tiny_llama(), TINY_LLAMA).unwrap();
        let ids = tokenizer.encode("The first line .\n\n The second line .\n", &Silent).unwrap();
        assert_eq!(ids[0], 0);
        assert!(!ids[1..].contains(&0));
        assert!(ids.len() > 8, "{ids:?}");
        assert_eq!(tokenizer.encode("", &Silent).unwrap(), [0]);
        assert_eq!(tokenizer.vocab_size(), 4096);
    }

    #[test]
    fn ignores_truncation_and_padding_of_the_file() {
        let plain = Tokenizer::from_bytes(&tiny_llama(), TINY_LLAMA).unwrap();
        let mut json: serde_json::Value = serde_json::from_slice(&tiny_llama()).unwrap();
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = serde_json::json!({
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"
        });
        let cut = Tokenizer::from_bytes(json.to_string().as_bytes(), "cut.json").unwrap();
        let text = "Ten or so short words that make more than four ids .";
        assert_eq!(cut.encode(text, &Silent).unwrap(), plain.encode(text, &Silent).unwrap());
    }

    #[test]
    fn says_which_file_is_no_tokenizer() {
        for bytes in [&b"{}"[..], b"\xff\xfe", b""] {
            let error = Tokenizer::from_bytes(bytes, "models/x/tokenizer.json").err().unwrap();
            assert_eq!(error.message(), "models/x/tokenizer.json is not a readable tokenizer");
            assert_eq!(error.kind(), crate::Kind::Input);
            assert!(error.hint_text().is_some());
        }
    }
}
