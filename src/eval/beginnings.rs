/*! Texts that begin alike, in batches: each token stands once, and only attention sees the texts whole.

A batch's texts are paths from the roots of a forest: two that begin with the same tokens share the nodes of these. A
node is a row of the hidden states. What a token's row holds depends on the tokens before it only, so whatever is computed
row by row is computed once; attention gets a window for each leaf, gathered from the rows. */

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
    /// The tokens predicted, each with the place in `from` that it is predicted from.
    pub(super) targets: Vec<(u32, u32)>,
    /// The texts' numbers, and which of the predictions are theirs.
    pub(super) texts: Vec<(usize, Range<usize>)>,
}

/// Puts each question's texts into one batch, the questions with the longest texts first. `full` is told a batch's rows
/// and the places of its windows, and says when it is large enough. Texts are numbered question by question.
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
    // Windows are as long as the longest of their batch. Among questions of one length, those that begin alike stand
    // together.
    order.sort_by_cached_key(|(_, texts)| {
        let longest = texts.iter().map(|text| text.tokens.len()).max();
        (Reverse(longest), texts.first().map(|text| &text.tokens[..]))
    });
    let mut batches = Vec::new();
    let mut forest = Forest::default();
    for (first, texts) in order {
        for (number, text) in texts.iter().enumerate() {
            forest.add(first + number, text);
        }
        if full(forest.tokens.len(), forest.leaves * forest.seq_len) {
            batches.push(std::mem::take(&mut forest).batch());
        }
    }
    if !forest.texts.is_empty() {
        batches.push(forest.batch());
    }
    batches
}

/// A batch that grows.
#[derive(Default)]
struct Forest {
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
    /// A node's place in `from`.
    asked: HashMap<u32, u32>,
    targets: Vec<(u32, u32)>,
    texts: Vec<(usize, Range<usize>)>,
}

impl Forest {
    fn add(&mut self, number: usize, text: &ScoredText) {
        let inputs = &text.tokens[..text.tokens.len() - 1];
        self.seq_len = self.seq_len.max(inputs.len());
        let first_scored = inputs.len() - text.scored;
        let first = self.targets.len();
        let mut before = None;
        for (position, token) in inputs.iter().enumerate() {
            let node = self.child(before, *token);
            if position >= first_scored {
                let place = *self.asked.entry(node).or_insert_with(|| {
                    self.from.push(node);
                    self.from.len() as u32 - 1
                });
                self.targets.push((place, text.tokens[position + 1]));
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
            for (place, row) in windows[first..].iter().enumerate() {
                rows[*row as usize] = (first + place) as u32;
            }
            windows.resize(first + seq_len, end as u32);
        }
        Batch { tokens, seq_len, placement: Placement { windows, rows }, from, targets, texts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: &[u32], scored: usize) -> ScoredText {
        ScoredText { tokens: tokens.to_vec(), scored }
    }

    /// The tokens that stand in each window, up to and with those of `len`.
    fn window(batch: &Batch, number: usize, len: usize) -> Vec<u32> {
        let rows = &batch.placement.windows[number * batch.seq_len..][..len];
        rows.iter().map(|row| batch.tokens[*row as usize]).collect()
    }

    #[test]
    fn what_begins_alike_stands_once() {
        // Two choices behind 1 2 3, one choice that another begins with, and a text of its own.
        let texts =
            vec![text(&[1, 2, 3, 4, 5, 6], 3), text(&[1, 2, 3, 7, 8], 2), text(&[1, 2, 3, 4], 1)];
        let batch = &batches(&[texts], |_, _| false)[0];
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 7]);
        assert_eq!((batch.seq_len, batch.placement.windows.len()), (5, 10));
        assert_eq!(window(batch, 0, 5), [1, 2, 3, 4, 5]);
        assert_eq!(window(batch, 1, 4), [1, 2, 3, 7]);
        for (row, place) in batch.placement.rows.iter().enumerate() {
            assert_eq!(batch.placement.windows[*place as usize], row as u32);
        }
        assert_eq!(batch.texts, [(0, 0..3), (1, 3..5), (2, 5..6)]);
        assert_eq!(batch.targets, [(0, 4), (1, 5), (2, 6), (0, 7), (3, 8), (0, 4)]);
        let from: Vec<u32> = batch.from.iter().map(|row| batch.tokens[*row as usize]).collect();
        assert_eq!(from, [3, 4, 5, 7]);
    }

    #[test]
    fn batches_are_cut_where_they_are_full_and_begin_with_the_longest() {
        let questions =
            [vec![text(&[1, 2], 1)], vec![text(&[3, 4, 5, 6], 1)], vec![text(&[7, 8, 9], 2)]];
        let cut = batches(&questions, |rows, places| rows > 3 || places > 5);
        let numbers: Vec<Vec<usize>> =
            cut.iter().map(|batch| batch.texts.iter().map(|text| text.0).collect()).collect();
        assert_eq!(numbers, [vec![1, 2], vec![0]]);
        // A question's texts stay together, whatever their lengths.
        let questions =
            [vec![text(&[1, 2], 1), text(&[1, 2, 3, 4, 5], 1)], vec![text(&[6, 7, 8], 1)]];
        let together = batches(&questions, |_, _| true);
        let numbers: Vec<usize> = together[0].texts.iter().map(|text| text.0).collect();
        assert_eq!((numbers, together.len()), (vec![0, 1], 2));
        assert_eq!(cut[0].seq_len, 3);
        // Behind the shorter text's own two tokens its last row stands again.
        assert_eq!(cut[0].placement.windows[3..], [3, 4, 4]);
    }
}
