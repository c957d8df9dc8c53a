//! Qwen3-MoE: Qwen3 with experts in some or all blocks, and one window for all of them.

use std::collections::HashSet;

use super::super::architecture::{Biases, ExpertNames, Experts, QkNorm, RouterKind};
use super::super::config::Config;
use super::super::{bounds, window};
use super::{Family, PLAIN};
use crate::Result;

pub(super) const QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    class: "Qwen3Moe",
    kv_heads: Some(4),
    differences: |config, network| {
        network.qk_norm = QkNorm::PerHead;
        let used = config.flag("use_sliding_window")?;
        let window = window::field(config, Some(4096))?.filter(|_| used);
        network.set_windows(window::of_all(config, network.blocks, window)?);
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        network.experts = Some(experts(config, network.blocks)?);
        Ok(())
    },
    ..PLAIN
};

fn experts(config: &Config, blocks: usize) -> Result<Experts> {
    let per_token = config.count("num_experts_per_tok", bounds::EXPERTS)?;
    let intermediate = config.count("moe_intermediate_size", bounds::CHANNELS)?;
    Ok(Experts {
        count: Experts::count_field(config, 128)?,
        per_token: per_token.unwrap_or(8),
        intermediate: intermediate.unwrap_or(768),
        normalized: config.flag("norm_topk_prob")?,
        router: RouterKind::Softmax,
        scale: 1.0,
        shared: None,
        dense_blocks: dense_blocks(config, blocks)?,
        names: ExpertNames::USUAL,
    })
}

/// Blocks without experts: those in `mlp_only_layers`, and all but every `decoder_sparse_step`th.
pub(super) fn dense_blocks(config: &Config, blocks: usize) -> Result<Vec<usize>> {
    const RIGHT: &str = "a list of numbers of blocks";
    let step = config.count("decoder_sparse_step", 1..=usize::MAX)?.unwrap_or(1);
    let listed = config.list("mlp_only_layers", RIGHT)?.unwrap_or_default();
    let listed: Option<HashSet<i64>> = listed.iter().map(|block| block.as_i64()).collect();
    let listed = listed.ok_or_else(|| config.wrong("mlp_only_layers", RIGHT))?;
    let dense =
        |block: &usize| listed.contains(&(*block as i64)) || !(block + 1).is_multiple_of(step);
    Ok((0..blocks).filter(dense).collect())
}
