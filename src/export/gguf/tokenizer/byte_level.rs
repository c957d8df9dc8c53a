/*! Byte-level BPE, GPT-2's: llama.cpp's tokenizer `gpt2`, whose pre-tokenizer has a name, `tokenizer.ggml.pre`.

llama.cpp's converter recognizes a pre-tokenizer by a hash of the ids of one text. The settings themselves stand in `tokenizer.json`, and
here they are compared with those that llama.cpp has under each name (llama-vocab.cpp, `llm_tokenizer_bpe`). */

use serde_json::Value;

use super::file::{Merge, TokenizerFile, cannot, steps};
use crate::Result;
use crate::export::gguf::container::{Metadata, Value as GgufValue};

/// GPT-4's splitting, with 1 to 3 digits together.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with every digit by itself.
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's, which also splits where a capital letter follows a small one.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A step of a pre-tokenizer.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    /// Every digit by itself.
    Digits,
    /// The matches of a regular expression, and what lies between them.
    Split(&'a str),
    /// Bytes as characters, after GPT-2's own splitting where it is set.
    Bytes { splits: bool },
    /// Anything else.
    Other,
}

impl<'a> Step<'a> {
    fn of(step: &'a Value) -> Self {
        match step["type"].as_str() {
            Some("Digits") if step["individual_digits"] == true => Self::Digits,
            Some("Split") => {
                let way = (step["behavior"].as_str(), step["invert"].as_bool());
                let covers = matches!(
                    way,
                    (Some("Isolated"), Some(false) | None) | (Some("Removed"), Some(true))
                );
                step["pattern"]["Regex"]
                    .as_str()
                    .filter(|_| covers)
                    .map_or(Self::Other, Self::Split)
            }
            Some("ByteLevel") if step["add_prefix_space"] == false => {
                // True where the file is silent.
                Self::Bytes { splits: step["use_regex"] != false }
            }
            _ => Self::Other,
        }
    }
}

/// llama.cpp's name of a pre-tokenizer.
fn pre_tokenizer(steps: &[Step<'_>], ignore_merges: bool) -> Option<&'static str> {
    // Under each name llama.cpp also decides whether a word that is a token is merged.
    let (name, ignores) = match steps {
        [Step::Bytes { splits: true }] => ("gpt-2", false),
        [Step::Digits, Step::Bytes { splits: true }] => ("smollm", false),
        [Step::Split(QWEN_2), Step::Bytes { splits: false }] => ("qwen2", false),
        [Step::Split(TEKKEN), Step::Bytes { splits: false }] => ("tekken", true),
        [Step::Split(LLAMA_3), Step::Bytes { splits: false }] if ignore_merges => {
            ("llama-bpe", true)
        }
        [Step::Split(LLAMA_3), Step::Bytes { splits: false }] => ("smaug-bpe", false),
        _ => return None,
    };
    (ignores == ignore_merges).then_some(name)
}

/// The keys of a byte-level tokenizer, besides its tokens.
///
/// # Errors
/// Input: a normalizer or pre-tokenizer that llama.cpp does not have.
pub(super) fn metadata(
    file: &TokenizerFile,
    path: &str,
    cautions: &mut Vec<String>,
) -> Result<Metadata> {
    for step in steps(&file.normalizer, "normalizers") {
        match step["type"].as_str() {
            Some("NFC") => cautions.push(
                "llama.cpp does not bring text into Unicode's normal form C before it tokenizes, as this model's \
                 tokenizer does: text that is not in it gets other tokens"
                    .to_owned(),
            ),
            other => {
                let name = other.unwrap_or("unknown");
                return Err(cannot(path, &format!("it has a normalizer of type {name}")));
            }
        }
    }
    let found = steps(&file.pre_tokenizer, "pretokenizers");
    let steps: Vec<Step<'_>> = found.iter().map(|step| Step::of(step)).collect();
    let name = pre_tokenizer(&steps, file.model.ignore_merges).ok_or_else(|| {
        let merges = if file.model.ignore_merges { " with ignore_merges" } else { "" };
        let why = format!("its pre-tokenizer is {}{merges}", file.pre_tokenizer);
        cannot(path, &why).hint(
            "known are the pre-tokenizers that llama.cpp calls gpt-2, smollm, llama-bpe, smaug-bpe, qwen2 and tekken; \
             export with another format, or take the tokenizer.json that was published with the model",
        )
    })?;
    if name == "tekken" {
        cautions.push(
            "llama.cpp splits text a little differently than this model's pre-tokenizer (tekken) in scripts with combining \
             marks, such as vocalized Arabic and Devanagari: such text gets other tokens"
                .to_owned(),
        );
    }
    let mut metadata = Metadata::default();
    metadata.text("tokenizer.ggml.model", "gpt2");
    metadata.text("tokenizer.ggml.pre", name);
    let merges = file.model.merges.iter().map(|merge| match merge {
        Merge::Pair(left, right) => format!("{left} {right}"),
        Merge::Joined(both) => both.clone(),
    });
    metadata.add("tokenizer.ggml.merges", GgufValue::Texts(merges.collect()));
    Ok(metadata)
}

#[cfg(test)]
#[path = "byte_level_tests.rs"]
mod tests;
