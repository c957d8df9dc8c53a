/*! The names under which a file stores a language model's tensors.

transformers calls them `model.layers.0...` and `lm_head.weight`. A base model that was saved alone has
no `model.`; the text part of a larger model has a prefix such as `language_model.`; wrappers of a
training run put theirs in front. The embedding's stored name shows which. Some families store several linears as one
tensor: each is a range of its rows. */

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use super::shards::Shards;
use super::tensor::Tensor;
use crate::Result;

/// The embedding's name.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head's name.
pub(super) const HEAD: &str = "lm_head.weight";
const BODY: &str = "model.";
const EMBEDDING_END: &str = "embed_tokens.weight";

/// A tensor of the network that is a range of rows of a stored one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowRange {
    /// What the network calls it.
    name: String,
    /// What the network would call the stored tensor.
    stored: String,
    /// The shape that the stored tensor must have.
    stored_shape: Vec<usize>,
    /// The first row.
    first: usize,
    /// The shape of the range.
    shape: Vec<usize>,
}

impl RowRange {
    /// `name` as the `rows` of `stored`, a tensor of `stored_shape`.
    ///
    /// # Panics
    /// If the stored tensor has no such rows.
    pub fn new(name: String, stored: String, stored_shape: Vec<usize>, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= stored_shape[0], "{name}: rows {rows:?}");
        let shape = [&[rows.len()], &stored_shape[1..]].concat();
        Self { name, stored, stored_shape, first: rows.start, shape }
    }

    /// The range of the stored tensor, where that lies.
    pub(super) fn of<'a>(&'a self, stored: Tensor<'a>) -> Result<Tensor<'a>> {
        stored.check_shape(&self.stored_shape)?;
        Ok(stored.row_range(self.first, &self.shape))
    }
}

/// How a checkpoint's stored names differ from the usual ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Naming {
    /// What stands in the place of `model.`.
    body: String,
    /// The output head.
    head: String,
    /// The tensors that are ranges of stored ones, by name.
    ranges: BTreeMap<String, RowRange>,
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
        let (body, head, ranges) = (BODY.to_owned(), HEAD.to_owned(), BTreeMap::new());
        let usual = Self { body, head, ranges };
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
        Self { body: body.to_owned(), head, ..usual }
    }

    /// Knows tensors as ranges of stored ones; those that the file stores by themselves stay as they are.
    pub(super) fn add_ranges(&mut self, shards: &Shards, ranges: Vec<RowRange>) {
        let is_stored = |name: &str| {
            let stored = self.stored(name);
            shards.contains(&stored) || shards.lacks(&stored)
        };
        let ranges = ranges.into_iter();
        let ranges = ranges.filter(|range| !is_stored(&range.name) && is_stored(&range.stored));
        self.ranges = ranges.map(|range| (range.name.clone(), range)).collect();
    }

    /// The range of a stored tensor that `name` is, if it is one.
    pub(super) fn range(&self, name: &str) -> Option<&RowRange> {
        self.ranges.get(name)
    }

    /// The stored name of the tensor that is usually called `name`, or of the one that it is a range of.
    pub(super) fn stored<'a>(&'a self, name: &'a str) -> Cow<'a, str> {
        let name = self.range(name).map_or(name, |range| &range.stored);
        match name.strip_prefix(BODY) {
            _ if name == HEAD => Cow::Borrowed(&self.head),
            Some(rest) if self.body != BODY => Cow::Owned(format!("{}{rest}", self.body)),
            _ => Cow::Borrowed(name),
        }
    }
}

#[cfg(test)]
#[path = "naming_tests.rs"]
mod tests;
