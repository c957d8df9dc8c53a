/*! The names under which a file stores a language model's tensors.

transformers calls them `model.layers.0...` and `lm_head.weight`. A base model that was saved alone has
no `model.`; the text part of a larger model has a prefix such as `language_model.`; wrappers of a
training run put theirs in front. The embedding's stored name shows which. */

use std::borrow::Cow;

use super::shards::Shards;

/// The embedding's name.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head's name.
pub(super) const HEAD: &str = "lm_head.weight";
const BODY: &str = "model.";
const EMBEDDING_END: &str = "embed_tokens.weight";

/// How a checkpoint's stored names differ from the usual ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Naming {
    /// What stands in the place of `model.`.
    body: String,
    /// The output head.
    head: String,
}

impl Naming {
    /// Finds it out from the stored names.
    pub(super) fn of(shards: &Shards) -> Self {
        Self::from_names(|name| shards.contains(name) || shards.lacks(name), shards.names())
    }

    fn from_names<'a>(
        contains: impl Fn(&str) -> bool,
        names: impl Iterator<Item = &'a str>,
    ) -> Self {
        let usual = Self { body: BODY.to_owned(), head: HEAD.to_owned() };
        if contains(EMBEDDING) {
            return usual;
        }
        let prefixes = names.filter_map(|name| name.strip_suffix(EMBEDDING_END));
        let mut prefixes: Vec<&str> =
            prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')).collect();
        if prefixes.len() > 1 {
            // Other parts of a larger model have embeddings as well.
            prefixes.retain(|prefix| {
                prefix.contains("language_model.") || prefix.contains("text_model.")
            });
        }
        let [body] = prefixes[..] else { return usual };
        let above = body.strip_suffix(BODY).unwrap_or(body);
        let mut heads =
            [HEAD.to_owned(), format!("{above}{HEAD}"), format!("{body}{HEAD}")].into_iter();
        let head = heads.find(|head| contains(head)).unwrap_or_else(|| HEAD.to_owned());
        Self { body: body.to_owned(), head }
    }

    /// The stored name of the tensor that is usually called `name`.
    pub(super) fn stored<'a>(&'a self, name: &'a str) -> Cow<'a, str> {
        match name.strip_prefix(BODY) {
            _ if name == HEAD => Cow::Borrowed(&self.head),
            Some(rest) if self.body != BODY => Cow::Owned(format!("{}{rest}", self.body)),
            _ => Cow::Borrowed(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_found_by_the_embedding() {
        let layer = "model.layers.0.mlp.up_proj.weight";
        for (names, stored_layer, stored_head) in [
            (&["model.embed_tokens.weight", "lm_head.weight"][..], layer, HEAD),
            (&["embed_tokens.weight"], "layers.0.mlp.up_proj.weight", HEAD),
            (
                &["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
                "language_model.model.layers.0.mlp.up_proj.weight",
                "language_model.lm_head.weight",
            ),
            (
                &["model.language_model.embed_tokens.weight", "lm_head.weight"],
                "model.language_model.layers.0.mlp.up_proj.weight",
                HEAD,
            ),
            (
                &["language_model.embed_tokens.weight", "audio.embed_tokens.weight"],
                "language_model.layers.0.mlp.up_proj.weight",
                HEAD,
            ),
            (
                &["_orig_mod.model.embed_tokens.weight", "_orig_mod.lm_head.weight"],
                "_orig_mod.model.layers.0.mlp.up_proj.weight",
                "_orig_mod.lm_head.weight",
            ),
            (&["a.embed_tokens.weight", "b.embed_tokens.weight"], layer, HEAD),
            (&["not_embed_tokens.weight"], layer, HEAD),
        ] {
            let contains = |name: &str| names.contains(&name);
            let naming = Naming::from_names(contains, names.iter().copied());
            assert_eq!(naming.stored(layer), stored_layer, "{names:?}");
            assert_eq!(naming.stored(HEAD), stored_head, "{names:?}");
        }
    }
}
