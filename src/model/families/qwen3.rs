//! Qwen3: QK-norm, heads of 128 channels, attention biases by a flag.

use super::super::architecture::{Biases, QkNorm};
use super::super::window;
use super::{Family, PLAIN};

pub(super) const QWEN3: Family = Family {
    name: "qwen3",
    class: "Qwen3",
    kv_heads: Some(32),
    head_dim: Some(128),
    differences: |config, network| {
        network.qk_norm = QkNorm::PerHead;
        network.set_windows(window::of_later_blocks(config, network.blocks)?);
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        Ok(())
    },
    ..PLAIN
};
