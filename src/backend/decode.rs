//! Attention of sequences that grow: keys and values stay in pages of a cache, and each step adds tokens.

use super::{AttentionSpec, Forward, Matrix, Qkv};
use crate::Result;

/// The new tokens of several sequences that pass a network together. Their rows follow one another, those of the first
/// sequence first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecodeStep {
    /// The sequences that have new tokens.
    pub sequences: Vec<SequenceStep>,
}

/// One sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceStep {
    /// The pages of its tokens in their order, the same numbers in the cache of every block. They have room for the new
    /// tokens, and no other sequence has one of them.
    pub pages: Vec<u32>,
    /// Tokens that the cache holds: the position of the first new one.
    pub held: usize,
    /// New tokens, one or more.
    pub added: usize,
}

impl DecodeStep {
    /// New tokens of all sequences: rows of a step's activations.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.added).sum()
    }

    /// The row of each sequence's last token.
    pub fn last_rows(&self) -> Vec<u32> {
        let ends = self.sequences.iter().scan(0, |end, sequence| {
            *end += sequence.added;
            Some(*end as u32 - 1)
        });
        ends.collect()
    }
}

/// What a network needs to decode besides its blocks.
///
/// A token's result depends on its own sequence alone. On the CPU it does so bit by bit: which sequences share a step, how
/// a prompt is divided among steps and which pages hold it changes nothing. A GPU's products may take other kernels for
/// another number of rows.
pub trait Decode: Forward {
    /// Keys and values of one block.
    type Cache: Send;
    /// A step as attention reads it.
    type Step: Send;
    /// The output head, laid out for products with few rows.
    type Head: Send + Sync;
    /// The argmax of logits, and its probability.
    type Argmax;
    /// The recorded work of a step.
    type Replay: Default + Send;

    /// Tokens of a page.
    fn page_tokens(&self) -> usize;
    /// Bytes of a page of one block.
    ///
    /// # Errors
    /// A machine error where the backend has no cache for such heads or such a format, with another way.
    fn page_bytes(&self, spec: &AttentionSpec) -> Result<u64>;
    /// A cache of `pages` pages for sequences of up to `spec.seq_len` tokens.
    ///
    /// # Errors
    /// As [`page_bytes`](Self::page_bytes), or memory does not suffice.
    fn cache(&self, spec: &AttentionSpec, pages: usize) -> Result<Self::Cache>;
    /// Prepares a step of these tokens, a row each, for the embedding and the attention of every block.
    fn begin_step(&self, step: &DecodeStep, tokens: &[u32]) -> Result<Self::Step>;
    /// The rows of `table` that the step's tokens name, `[tokens, hidden]`. Every token is less than its rows.
    fn embed_step(&self, table: &Self::Weight<'_>, step: &Self::Step) -> Result<Self::Hidden>;
    /// Adds the keys and values of a step to the cache, then attends causally: each new token to its own sequence.
    /// `qkv` are before the rotary embedding; `key_mean` `[1, kv_heads * head_dim]` is subtracted from the embedded keys.
    fn cached_attention(
        &self,
        spec: &AttentionSpec,
        cache: &mut Self::Cache,
        step: &Self::Step,
        qkv: Qkv<Self::Activation>,
        key_mean: Option<&Self::Hidden>,
    ) -> Result<Self::Activation>;
    /// Lays the output head `[vocabulary, hidden]` out.
    fn head(&self, weight: &Self::Weight<'_>) -> Result<Self::Head>;
    /// The logits of normed hidden states, `[rows, vocabulary]` in f32.
    fn logits(&self, x: &Self::Activation, head: &Self::Head) -> Result<Matrix>;
    /// The argmax of each row of the logits of normed hidden states, left where they are.
    fn argmax(&self, x: &Self::Activation, head: &Self::Head) -> Result<Self::Argmax>;
    /// Runs `work`, which carries a step through a network to the argmax of its tokens, and returns it. A backend may record
    /// the work of a step that adds one token to each sequence, and replay it for a later step of as many sequences; so
    /// `work` does the same for both, and depends on nothing but the step. `replay` is where it stores the record.
    ///
    /// # Errors
    /// Those of `work`, and input where a logit is not finite.
    fn greedy_step(
        &self,
        replay: &mut Self::Replay,
        step: &DecodeStep,
        tokens: &[u32],
        work: &mut dyn FnMut(&Self::Step) -> Result<Self::Argmax>,
    ) -> Result<Vec<GreedyToken>>;
}

/// A token of the greatest logit, of equal ones the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GreedyToken {
    /// Its id.
    pub token: u32,
    /// The logarithm of its probability.
    pub log_probability: f64,
}
