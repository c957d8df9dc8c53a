/*! The reach of a tokenizer: how much text around a place decides the ids there.

[`pieces`](super::pieces) cuts texts by it and has the proof. Components are recognized by their names in
`tokenizer.json`. With an unknown component, or a regular expression that cannot be analysed, there is no
[`Reach`], and texts are tokenized in one piece. */

use fancy_regex::Regex;
use serde_json::Value;
use tokenizers::ModelWrapper;

use super::pattern::Pattern;

/// GPT-2's expression, which `ByteLevel` splits by.
const BYTE_LEVEL: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Conditions on the places where the ids of two overlapping pieces may be joined.
pub(super) struct Reach {
    /// Only at the beginning of a word of the pre-tokenizer.
    pub(super) at_words: bool,
    /// Characters that are needed on either side, far ones not counted.
    characters: usize,
    /// Whether several expressions split one after another.
    several: bool,
    /// Characters of which any number may be read beyond a decision.
    far: Vec<Regex>,
    /// Whether the normalizer composes, reorders or maps clusters of characters.
    clusters: bool,
}

/// The conditions of all components.
#[derive(Default)]
struct Survey {
    at_words: bool,
    expressions: usize,
    characters: usize,
    far: Vec<String>,
    clusters: bool,
}

impl Reach {
    /// The reach of a tokenizer, or `None` if it is unknown.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let mut survey = Survey::default();
        if let Some(normalizer) = tokenizer.get_normalizer() {
            survey.normalizer(&serde_json::to_value(normalizer).ok()?)?;
        }
        if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
            survey.pre_tokenizer(&serde_json::to_value(pre_tokenizer).ok()?)?;
        }
        match tokenizer.get_model() {
            ModelWrapper::BPE(model) if model.dropout.is_some_and(|dropout| dropout > 0.0) => {
                return None;
            }
            // Whether a word is in the vocabulary depends on all of it.
            ModelWrapper::BPE(model) => survey.at_words |= model.ignore_merges,
            _ => survey.at_words = true,
        }
        for token in tokenizer.get_added_tokens_decoder().values() {
            // A normalizer may make a token's text somewhat longer.
            survey.characters = survey.characters.max(3 * token.content.chars().count());
            if token.lstrip {
                survey.far.push(r"\s".to_owned());
            }
        }
        survey.reach()
    }

    /// The number of bytes of this stretch that separate its two sides: no decision on one side depends on the
    /// text on the other side.
    pub(super) fn settled_after(&self, stretch: &str) -> Option<usize> {
        let (mut counting, mut spaces) = (0, 0);
        for (at, character) in stretch.char_indices() {
            counting += usize::from(!self.is_far(character));
            spaces += usize::from(character.is_whitespace());
            // A word of the first expression may hold many words of the next one, but no alternation of white space
            // and letters.
            if counting >= self.characters && (!self.several || spaces >= 2) {
                return Some(at + character.len_utf8());
            }
        }
        None
    }

    /// Whether any number of this character may be read beyond a decision.
    fn is_far(&self, character: char) -> bool {
        if self.clusters && !(character.is_ascii() || character.is_alphanumeric()) {
            return true;
        }
        let mut text = [0; 4];
        let text = character.encode_utf8(&mut text);
        self.far.iter().any(|atom| atom.is_match(text).unwrap_or(true))
    }
}

impl Survey {
    fn reach(mut self) -> Option<Reach> {
        self.far.sort();
        self.far.dedup();
        let far = self.far.iter().map(|atom| Regex::new(&format!(r"(?s)\A(?:{atom})\z")).ok());
        Some(Reach {
            at_words: self.at_words,
            characters: 32 + self.characters,
            several: self.expressions > 1,
            far: far.collect::<Option<_>>()?,
            clusters: self.clusters,
        })
    }

    fn normalizer(&mut self, normalizer: &Value) -> Option<()> {
        match normalizer["type"].as_str()? {
            "Sequence" => {
                let parts = normalizer["normalizers"].as_array()?;
                parts.iter().try_for_each(|part| self.normalizer(part))?;
            }
            "Prepend" | "Lowercase" => {}
            "NFC" | "NFD" | "NFKC" | "NFKD" | "StripAccents" | "BertNormalizer" | "Nmt"
            | "Precompiled" | "ByteLevel" => self.clusters = true,
            // White space at the end of a piece is lost, that in the middle of a text is not.
            "Strip" => self.far.push(r"\s".to_owned()),
            "Replace" => match &normalizer["pattern"] {
                Value::Object(pattern) if pattern.contains_key("String") => {
                    // Repeated matches of several characters may begin at any of them.
                    let text = pattern["String"].as_str()?;
                    if text.chars().nth(1).is_some() {
                        self.far.extend(text.chars().map(literal));
                    }
                }
                pattern => {
                    let pattern = Pattern::parse(pattern["Regex"].as_str()?)?;
                    self.characters += pattern.characters;
                    self.far.extend(pattern.unbounded);
                }
            },
            _ => return None,
        }
        Some(())
    }

    fn pre_tokenizer(&mut self, pre_tokenizer: &Value) -> Option<()> {
        match pre_tokenizer["type"].as_str()? {
            "Sequence" => {
                let parts = pre_tokenizer["pretokenizers"].as_array()?;
                parts.iter().try_for_each(|part| self.pre_tokenizer(part))?;
            }
            "ByteLevel" if pre_tokenizer["use_regex"] == Value::Bool(true) => {
                self.expression(BYTE_LEVEL)?;
            }
            // Whether these split at a place depends on the characters next to it.
            "ByteLevel" | "Metaspace" | "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer"
            | "Digits" | "Punctuation" | "CharDelimiterSplit" => {}
            "Split" => match &pre_tokenizer["pattern"] {
                Value::Object(pattern) if pattern.contains_key("String") => {
                    let text = pattern["String"].as_str()?;
                    if text.chars().nth(1).is_some() {
                        let literals = text.chars().map(literal);
                        self.expression(&literals.collect::<String>())?;
                        self.far.extend(text.chars().map(literal));
                    }
                }
                pattern => self.expression(pattern["Regex"].as_str()?)?,
            },
            _ => return None,
        }
        Some(())
    }

    /// A regular expression that makes words.
    fn expression(&mut self, text: &str) -> Option<()> {
        let pattern = Pattern::parse(text)?;
        self.at_words = true;
        self.expressions += 1;
        self.characters += pattern.characters;
        self.far.extend(pattern.far);
        Some(())
    }
}

/// A character as an expression that matches it.
fn literal(character: char) -> String {
    format!(r"\x{{{:x}}}", u32::from(character))
}
