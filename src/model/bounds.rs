/*! Bounds on the counts of `config.json`, so that an absurd number is refused before anything is allocated for it. They
are far beyond any existing network. */

use std::ops::RangeInclusive;

use super::architecture::Architecture;
use crate::{Error, Result};

/// Decoder blocks.
pub(super) const BLOCKS: RangeInclusive<usize> = 1..=10_000;
/// Channels of the residual stream, and between the projections of an MLP.
pub(super) const CHANNELS: RangeInclusive<usize> = 1..=1 << 24;
/// Query heads, and key and value heads.
pub(super) const HEADS: RangeInclusive<usize> = 1..=1 << 16;
/// Channels of a head.
pub(super) const HEAD_DIM: RangeInclusive<usize> = 1..=1 << 16;
/// Rows of the embedding.
pub(super) const VOCABULARY: RangeInclusive<usize> = 1..=1 << 31;
/// Experts of a block.
pub(super) const EXPERTS: RangeInclusive<usize> = 1..=1 << 16;
/// Experts of all blocks.
const ALL_EXPERTS: usize = 1 << 18;
/// Weights of all linears and the embedding. Below it no product of counts overflows.
const WEIGHTS: u128 = 1 << 50;

impl Architecture {
    /// Refuses counts whose products are too large.
    pub(super) fn check_size(&self, file: &str) -> Result<()> {
        let experts = self.experts.as_ref().map_or(0, |experts| experts.count);
        if experts.saturating_mul(self.blocks) > ALL_EXPERTS {
            return Err(too_large(
                file,
                &format!(
                    "{} blocks of {experts} experts (`num_hidden_layers`, `num_experts`) are more",
                    self.blocks
                ),
            ));
        }
        let weights = self.weights();
        if weights > WEIGHTS {
            let message = format!(
                "a network of {weights} weights (`num_hidden_layers`, `hidden_size`, `intermediate_size`, \
                 `num_attention_heads`, `head_dim`, `vocab_size`) is larger"
            );
            return Err(too_large(file, &message));
        }
        Ok(())
    }

    /// Weights of all linears and the embedding, as if every block of a sparse network had experts.
    fn weights(&self) -> u128 {
        let [hidden, heads, kv_heads, head_dim] =
            [self.hidden, self.heads, self.kv_heads, self.head_dim].map(|count| count as u128);
        let attention = 2 * (heads + kv_heads) * head_dim * hidden;
        let dense = 3 * self.intermediate as u128 * hidden;
        let experts = self.experts.as_ref().map_or(0, |experts| {
            let shared = experts.shared.map_or(0, |shared| shared.intermediate as u128);
            let own = experts.count as u128 * (3 * experts.intermediate as u128 + 1);
            (own + 3 * shared) * hidden
        });
        let ends = 2 * self.vocabulary as u128 * hidden;
        ends + self.blocks as u128 * (attention + dense.max(experts))
    }

    /// Compares the number of blocks with the names of a checkpoint's tensors, without listing the tensors that the
    /// network would have.
    ///
    /// # Errors
    /// If the last block has no tensors, or there are blocks after it.
    pub fn check_blocks<'a>(&self, names: impl Iterator<Item = &'a str>, file: &str) -> Result<()> {
        let stored = names.filter_map(block_of).max().map_or(0, |last| last.saturating_add(1));
        if (self.blocks..=self.blocks + self.prediction_blocks).contains(&stored) {
            return Ok(());
        }
        Err(Error::input(format!(
            "{file}: `num_hidden_layers` is {}, but the weights are those of {stored} blocks",
            self.blocks
        ))
        .hint("config.json and the weights do not belong together, or the download is incomplete"))
    }
}

/// The block number in a tensor's name, e.g. 3 in `model.layers.3.mlp.up_proj.weight`.
fn block_of(name: &str) -> Option<usize> {
    let name = name.strip_prefix("model.").unwrap_or(name);
    name.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

fn too_large(file: &str, what: &str) -> Error {
    Error::input(format!("{file}: {what} than this version reads"))
        .hint("correct the numbers, or download the file again")
}

#[cfg(test)]
#[path = "bounds_tests.rs"]
mod tests;
