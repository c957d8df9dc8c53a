//! Llama: biases by two flags, attention to all tokens.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, no_experts};

pub(super) const LLAMA: Family = Family {
    name: "llama",
    class: "Llama",
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    norm_epsilon: 1e-6,
    rope_theta: 10_000.0,
    head_norms: false,
    biases: |config| {
        let attention = config.flag("attention_bias")?;
        Ok(Biases { attn_in: attention, attn_out: attention, mlp: config.flag("mlp_bias")? })
    },
    sliding_window: |config, blocks| window::of_all(config, blocks, None),
    experts: no_experts,
};
