//! GLM-4.5 to 4.7: experts after the first blocks, chosen by sigmoids with a bias, a shared one, RoPE over half of each head.

use super::super::architecture::{Biases, ExpertNames, Experts, QkNorm, RouterKind, SharedExpert};
use super::super::config::Config;
use super::super::{bounds, window};
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};
use crate::Result;

pub(super) const GLM4_MOE: Family = Family {
    name: "glm4_moe",
    class: "Glm4Moe",
    kv_heads: Some(8),
    max_positions: 131_072,
    norm_epsilon: 1e-5,
    rope: RopeDefaults { share: Some(0.5), ..PLAIN_ROPE },
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        let flags = Biases::by_flags(config, Some("attention_bias"), None)?;
        network.biases = Biases { attn_out: false, ..flags };
        if config.flag("use_qk_norm")? {
            network.qk_norm = QkNorm::PerHead;
        }
        let defaults = SigmoidDefaults {
            count: Some(128),
            per_token: Some(8),
            shared: Some(1),
            dense: 1,
            normalized: true,
        };
        network.prediction_blocks = prediction_blocks(config, 1)?;
        network.experts = Some(sigmoid_experts(config, network.blocks, defaults)?);
        Ok(())
    },
    ..PLAIN
};

/// Blocks that predict further tokens.
pub(super) fn prediction_blocks(config: &Config, default: usize) -> Result<usize> {
    let blocks = config.count("num_nextn_predict_layers", 0..=*bounds::BLOCKS.end())?;
    Ok(blocks.unwrap_or(default))
}

/// What a family has where config.json is silent; none where it must say so.
pub(super) struct SigmoidDefaults {
    pub count: Option<usize>,
    pub per_token: Option<usize>,
    pub shared: Option<usize>,
    pub dense: usize,
    pub normalized: bool,
}

/// Experts by a router of sigmoids, and dense first blocks.
pub(super) fn sigmoid_experts(
    config: &Config,
    blocks: usize,
    defaults: SigmoidDefaults,
) -> Result<Experts> {
    for groups in ["n_group", "topk_group"] {
        if config.count(groups, 1..=usize::MAX)?.is_some_and(|count| count != 1) {
            return Err(
                config.unsupported(groups, "this version chooses among all experts, in one group")
            );
        }
    }
    let count = |key, range, default: Option<usize>| {
        let given: Option<usize> = config.count(key, range)?;
        given.or(default).ok_or_else(|| config.wrong(key, "a whole number"))
    };
    let intermediate = count("moe_intermediate_size", bounds::CHANNELS, Some(1408))?;
    let shared = count("n_shared_experts", bounds::EXPERTS, defaults.shared)?;
    let dense = count("first_k_dense_replace", 0..=usize::MAX, Some(defaults.dense))?;
    Ok(Experts {
        count: count("n_routed_experts", bounds::EXPERTS, defaults.count)?,
        per_token: count("num_experts_per_tok", bounds::EXPERTS, defaults.per_token)?,
        intermediate,
        normalized: config.flag_or("norm_topk_prob", defaults.normalized)?,
        router: RouterKind::SigmoidWithBias,
        scale: config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        shared: Some(SharedExpert { intermediate: shared * intermediate, gated: false }),
        dense_blocks: (0..dense.min(blocks)).collect(),
        names: ExpertNames::USUAL,
    })
}
