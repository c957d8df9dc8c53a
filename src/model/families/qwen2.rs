//! Qwen2 and Qwen2.5: biases of q, k and v, and a sliding window over the later blocks.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, no_experts};

pub(super) const QWEN2: Family = Family {
    name: "qwen2",
    class: "Qwen2",
    kv_heads: Some(32),
    head_dim: None,
    max_positions: 32_768,
    norm_epsilon: 1e-6,
    rope_theta: 10_000.0,
    head_norms: false,
    biases: |_| Ok(Biases { attn_in: true, attn_out: false, mlp: false }),
    sliding_window: window::of_later_blocks,
    experts: no_experts,
};
