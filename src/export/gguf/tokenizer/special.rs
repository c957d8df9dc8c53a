/*! Tokens with a meaning of their own, and chat templates: from `tokenizer_config.json`, `generation_config.json` and `config.json`. */

use std::collections::HashMap;

use serde_json::Value;

use super::TokenizerFiles;
use crate::export::gguf::container::{Metadata, Value as GgufValue};
use crate::{Error, Result};

/// The ids of tokens with a meaning of their own.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub(super) beginning: Option<usize>,
    pub(super) end: Option<usize>,
    pub(super) unknown: Option<usize>,
    pub(super) padding: Option<usize>,
}

impl SpecialTokens {
    /// Finds them; `tokens` are the ids by text. What `tokenizer_config.json` names comes before the ids of the others.
    pub(super) fn find(files: &TokenizerFiles<'_>, tokens: &HashMap<&str, usize>) -> Self {
        let named = |name: &str| {
            let value = files.settings?.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            tokens.get(text).copied()
        };
        let numbered = |name: &str| {
            let value = [Some(files.config), files.generation].into_iter().flatten();
            let mut ids = value.filter_map(|value| {
                let value = value.get(name)?;
                let first = value.as_array().map_or(Some(value), |ids| ids.first())?;
                usize::try_from(first.as_u64()?).ok()
            });
            ids.find(|id| *id < tokens.len())
        };
        let found = |kind: &str| {
            named(&format!("{kind}_token")).or_else(|| numbered(&format!("{kind}_token_id")))
        };
        Self {
            beginning: found("bos"),
            end: found("eos"),
            unknown: found("unk"),
            padding: found("pad"),
        }
    }

    /// Their keys, with the tokens that the tokenizer itself puts before and after a text.
    ///
    /// # Errors
    /// Input: more than one token before or after a text, or no token that ends one.
    pub(super) fn metadata(
        mut self,
        [before, after]: [&[u32]; 2],
        files: &TokenizerFiles<'_>,
    ) -> Result<Metadata> {
        for (own, added, where_) in
            [(&mut self.beginning, before, "before"), (&mut self.end, after, "after")]
        {
            match added {
                [] => {}
                [token] => *own = Some(*token as usize),
                _ => {
                    return Err(Error::input(format!(
                        "{} puts {} tokens {where_} every text; llama.cpp puts at most one there",
                        files.path,
                        added.len()
                    ))
                    .hint("export with another format"));
                }
            }
        }
        if self.end.is_none() {
            return Err(Error::input(format!(
                "no file of the checkpoint says which token of {} ends a text, and llama.cpp would take token 11",
                files.path
            ))
            .hint("set `eos_token_id` in the source's config.json and quantize again"));
        }
        let mut metadata = Metadata::default();
        let ids = [
            ("bos", self.beginning),
            ("eos", self.end),
            ("unknown", self.unknown),
            ("padding", self.padding),
        ];
        for (name, id) in ids {
            if let Some(id) = id {
                metadata.count(format!("tokenizer.ggml.{name}_token_id"), id);
            }
        }
        metadata.add("tokenizer.ggml.add_bos_token", GgufValue::Bool(!before.is_empty()));
        metadata.add("tokenizer.ggml.add_eos_token", GgufValue::Bool(!after.is_empty()));
        Ok(metadata)
    }
}

/// The keys of chat templates. `chat_template.jinja` comes before the `chat_template` of `tokenizer_config.json`, of which there may
/// be several, with names.
pub(super) fn chat_templates(files: &TokenizerFiles<'_>) -> Metadata {
    let mut metadata = Metadata::default();
    let setting = files.settings.and_then(|settings| settings.get("chat_template"));
    let mut default = setting.and_then(Value::as_str).map(str::to_owned);
    let mut names = Vec::new();
    for named in setting.and_then(Value::as_array).into_iter().flatten() {
        let (Some(name), Some(text)) = (named["name"].as_str(), named["template"].as_str()) else {
            continue;
        };
        if name == "default" {
            default = Some(text.to_owned());
        } else if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            names.push(name.to_owned());
            metadata.text(format!("tokenizer.chat_template.{name}"), text);
        }
    }
    if let Some(template) = files.chat_template.map(str::to_owned).or(default) {
        metadata.text("tokenizer.chat_template", template);
    }
    if !names.is_empty() {
        metadata.add("tokenizer.chat_templates", GgufValue::Texts(names));
    }
    metadata
}

#[cfg(test)]
#[path = "special_tests.rs"]
mod tests;
