//! Mixtral: Mistral with experts in every block.

use super::super::architecture::{ExpertNames, Experts};
use super::super::{bounds, window};
use super::{Family, no_biases};

const NAMES: ExpertNames = ExpertNames { part: "block_sparse_moe", linears: ["w1", "w3", "w2"] };

pub(super) const MIXTRAL: Family = Family {
    name: "mixtral",
    class: "Mixtral",
    kv_heads: Some(8),
    head_dim: None,
    max_positions: 131_072,
    norm_epsilon: 1e-5,
    rope_theta: 1_000_000.0,
    head_norms: false,
    biases: no_biases,
    sliding_window: |config, blocks| window::of_all(config, blocks, window::field(config, None)?),
    experts: |config, _| {
        Ok(Some(Experts {
            count: Experts::count_field(config, 8)?,
            per_token: config.count("num_experts_per_tok", bounds::EXPERTS)?.unwrap_or(2),
            intermediate: config.required_count("intermediate_size", bounds::CHANNELS)?,
            normalized: true,
            dense_blocks: Vec::new(),
            names: NAMES,
        }))
    },
};
