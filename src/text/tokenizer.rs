/*! A model's `tokenizer.json`, applied as the perplexity protocol asks: to the whole text at once.

The special tokens that the file's own post-processor adds are added, so a Llama-like model gets one
beginning-of-sequence id at the very start and none at the windows cut later. Truncation and padding,
which some published files leave switched on, would silently shorten the text and are switched off. */

use crate::{Error, Result};

/// Turns text into a model's ids.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    whence: String,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`; `whence` names the file in errors.
    ///
    /// # Errors
    /// If the bytes are not a tokenizer of a known kind.
    pub fn from_bytes(tokenizer_json: &[u8], whence: &str) -> Result<Self> {
        let unreadable = |cause: tokenizers::Error| {
            Error::input(cause.to_string())
                .context(format!("{whence} is not a readable tokenizer"))
                .hint("fetch the model's `tokenizer.json` again; older formats are not read")
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(unreadable)?;
        inner.with_truncation(None).map_err(unreadable)?;
        inner.with_padding(None);
        Ok(Self { inner, whence: whence.to_owned() })
    }

    /// The ids of the whole text, special tokens of the tokenizer's post-processor included.
    ///
    /// # Errors
    /// If the tokenizer has no id for some part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // The fast variant skips the character offsets, which nobody here asks for.
        let encoding = self.inner.encode_fast(text, true).map_err(|cause| {
            Error::input(cause.to_string())
                .context(format!("{} cannot tokenize the text", self.whence))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// How many ids there are, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY_LLAMA: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-llama/tokenizer.json");

    fn tiny_llama() -> Vec<u8> {
        fs_err::read(TINY_LLAMA).unwrap()
    }

    #[test]
    fn puts_one_beginning_of_sequence_before_the_whole_text() {
        let tokenizer = Tokenizer::from_bytes(&tiny_llama(), TINY_LLAMA).unwrap();
        let ids = tokenizer.encode("The first line .\n\n The second line .\n").unwrap();
        assert_eq!(ids[0], 0);
        assert!(!ids[1..].contains(&0));
        assert!(ids.len() > 8, "{ids:?}");
        assert_eq!(tokenizer.encode("").unwrap(), [0]);
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
        assert_eq!(cut.encode(text).unwrap(), plain.encode(text).unwrap());
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
