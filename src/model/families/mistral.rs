//! Mistral: a sliding window over all blocks, of 4096 tokens where config.json is silent.

use super::super::window;
use super::{Family, no_biases, no_experts};

pub(super) const MISTRAL: Family = Family {
    name: "mistral",
    class: "Mistral",
    kv_heads: Some(8),
    head_dim: None,
    max_positions: 131_072,
    norm_epsilon: 1e-6,
    rope_theta: 10_000.0,
    head_norms: false,
    biases: no_biases,
    sliding_window: |config, blocks| {
        window::of_all(config, blocks, window::field(config, Some(4096))?)
    },
    experts: no_experts,
};
