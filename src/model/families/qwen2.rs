//! Qwen2 and Qwen2.5: biases of q, k and v, and a sliding window over the later blocks.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, PLAIN};

pub(super) const QWEN2: Family = Family {
    name: "qwen2",
    class: "Qwen2",
    kv_heads: Some(32),
    differences: |config, network| {
        network.set_windows(window::of_later_blocks(config, network.blocks)?);
        network.biases = Biases { attn_in: true, ..Biases::default() };
        Ok(())
    },
    ..PLAIN
};
