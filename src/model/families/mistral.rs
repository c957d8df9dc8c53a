//! Mistral: a sliding window over all blocks, of 4096 tokens where config.json is silent.

use super::super::window;
use super::{Family, PLAIN};

pub(super) const MISTRAL: Family = Family {
    name: "mistral",
    class: "Mistral",
    kv_heads: Some(8),
    max_positions: 131_072,
    differences: |config, network| {
        let window = window::field(config, Some(4096))?;
        network.set_windows(window::of_all(config, network.blocks, window)?);
        Ok(())
    },
    ..PLAIN
};
