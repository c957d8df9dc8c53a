//! Mixtral: Mistral with experts in every block.

use super::super::architecture::{ExpertNames, Experts, RouterKind};
use super::super::{bounds, window};
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

const NAMES: ExpertNames =
    ExpertNames { part: "block_sparse_moe", linears: ["w1", "w3", "w2"], ..ExpertNames::USUAL };

pub(super) const MIXTRAL: Family = Family {
    name: "mixtral",
    class: "Mixtral",
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_epsilon: 1e-5,
    rope: RopeDefaults { theta: 1_000_000.0, ..PLAIN_ROPE },
    differences: |config, network| {
        let window = window::field(config, None)?;
        network.set_windows(window::of_all(config, network.blocks, window)?);
        network.experts = Some(Experts {
            count: Experts::count_field(config, 8)?,
            per_token: config.count("num_experts_per_tok", bounds::EXPERTS)?.unwrap_or(2),
            intermediate: network.intermediate,
            normalized: true,
            router: RouterKind::Softmax,
            scale: 1.0,
            shared: None,
            dense_blocks: Vec::new(),
            names: NAMES,
        });
        Ok(())
    },
    ..PLAIN
};
