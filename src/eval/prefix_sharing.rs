/*! Prefix sharing: the texts of a batch in a trie, so that a common prefix is computed once.

A text is a path from a root of the trie; texts with a common prefix share its nodes. A node is a row of the hidden
states. A row depends only on the tokens before it, so that every operation by rows runs once per node; attention
receives a window for each leaf, gathered from the rows. */

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use crate::backend::Placement;
use crate::text::tasks::ScoredText;

/// Texts that pass a block together.
#[derive(Debug)]
pub(super) struct Batch {
    /// Each row's token.
    pub(super) tokens: Vec<u32>,
    /// Tokens of the longest text without its last, which nothing is predicted from.
    pub(super) seq_len: usize,
    /// The rows in attention's windows.
    pub(super) placement: Placement,
    /// The rows that tokens are predicted from, each once.
    pub(super) from: Vec<u32>,
    /// The tokens predicted, each with the index in `from` that it is predicted from.
    pub(super) targets: Vec<(u32, u32)>,
    /// The texts' numbers, and which of the predictions are theirs.
    pub(super) texts: Vec<(usize, Range<usize>)>,
}

/// Puts each question's texts into one batch, the questions with the longest texts first. `full` takes a batch's rows and
/// the positions of its windows, and returns whether it is large enough. Texts are numbered question by question.
pub(super) fn batches(
    questions: &[Vec<ScoredText>],
    full: impl Fn(usize, usize) -> bool,
) -> Vec<Batch> {
    let mut first = 0;
    let numbered = questions.iter().map(|texts| {
        first += texts.len();
        (first - texts.len(), texts)
    });
    let mut order: Vec<(usize, &Vec<ScoredText>)> = numbered.collect();
    // Windows are as long as the longest of their batch. Among questions of one length, those with a common
    // prefix are neighbours.
    order.sort_by_cached_key(|(_, texts)| {
        let longest = texts.iter().map(|text| text.tokens.len()).max();
        (Reverse(longest), texts.first().map(|text| &text.tokens[..]))
    });
    let mut batches = Vec::new();
    let mut trie = Trie::default();
    for (first, texts) in order {
        for (number, text) in texts.iter().enumerate() {
            trie.add(first + number, text);
        }
        if full(trie.tokens.len(), trie.leaves * trie.seq_len) {
            batches.push(std::mem::take(&mut trie).batch());
        }
    }
    if !trie.texts.is_empty() {
        batches.push(trie.batch());
    }
    batches
}

/// A batch that grows.
#[derive(Default)]
struct Trie {
    tokens: Vec<u32>,
    /// The node before each; its own number at a root.
    parents: Vec<u32>,
    /// Whether nothing follows.
    leaf: Vec<bool>,
    leaves: usize,
    /// `(node before, token)`; at a root no node.
    children: HashMap<(Option<u32>, u32), u32>,
    seq_len: usize,
    from: Vec<u32>,
    /// A node's index in `from`.
    sources: HashMap<u32, u32>,
    targets: Vec<(u32, u32)>,
    texts: Vec<(usize, Range<usize>)>,
}

impl Trie {
    fn add(&mut self, number: usize, text: &ScoredText) {
        let inputs = &text.tokens[..text.tokens.len() - 1];
        self.seq_len = self.seq_len.max(inputs.len());
        let first_scored = inputs.len() - text.scored;
        let first = self.targets.len();
        let mut before = None;
        for (position, token) in inputs.iter().enumerate() {
            let node = self.child(before, *token);
            if position >= first_scored {
                let source = *self.sources.entry(node).or_insert_with(|| {
                    self.from.push(node);
                    self.from.len() as u32 - 1
                });
                self.targets.push((source, text.tokens[position + 1]));
            }
            before = Some(node);
        }
        self.texts.push((number, first..self.targets.len()));
    }

    fn child(&mut self, before: Option<u32>, token: u32) -> u32 {
        if let Some(node) = self.children.get(&(before, token)) {
            return *node;
        }
        let node = self.tokens.len() as u32;
        self.children.insert((before, token), node);
        self.tokens.push(token);
        self.parents.push(before.unwrap_or(node));
        self.leaf.push(true);
        self.leaves += 1;
        if let Some(before) = before {
            self.leaves -= usize::from(self.leaf[before as usize]);
            self.leaf[before as usize] = false;
        }
        node
    }

    fn batch(self) -> Batch {
        let Self { tokens, parents, leaf, leaves, seq_len, from, targets, texts, .. } = self;
        let mut windows = Vec::with_capacity(leaves * seq_len);
        let mut rows = vec![0; tokens.len()];
        let ends = (0..tokens.len()).filter(|node| leaf[*node]);
        for end in ends {
            let first = windows.len();
            let mut node = end as u32;
            windows.push(node);
            while parents[node as usize] != node {
                node = parents[node as usize];
                windows.push(node);
            }
            windows[first..].reverse();
            for (position, row) in windows[first..].iter().enumerate() {
                rows[*row as usize] = (first + position) as u32;
            }
            windows.resize(first + seq_len, end as u32);
        }
        Batch { tokens, seq_len, placement: Placement { windows, rows }, from, targets, texts }
    }
}

#[cfg(test)]
#[path = "prefix_sharing_tests.rs"]
mod tests;
