//! Qwen2-MoE: biases of q, k and v, experts, and a shared one whose output a gate of its own weighs.

use super::super::architecture::{Biases, ExpertNames, Experts, RouterKind, SharedExpert};
use super::super::{bounds, window};
use super::qwen3_moe::dense_blocks;
use super::{Family, PLAIN};

pub(super) const QWEN2_MOE: Family = Family {
    name: "qwen2_moe",
    class: "Qwen2Moe",
    kv_heads: Some(16),
    differences: |config, network| {
        if config.flag("use_sliding_window")? {
            let known = "this version runs networks of this type that attend to all tokens";
            return Err(config.unsupported("use_sliding_window", known));
        }
        // Files that transformers writes hold 0.
        config.nullable_count("sliding_window", 0..=usize::MAX)?;
        network.set_windows(window::of_all(config, network.blocks, None)?);
        let attn_in = config.flag_or("qkv_bias", true)?;
        let attention_flag = Some("qkv_bias");
        network.biases = Biases { attn_in, attention_flag, ..Biases::default() };
        let width = |key, default| {
            let width = config.count(key, bounds::CHANNELS)?;
            Ok::<usize, crate::Error>(width.unwrap_or(default))
        };
        network.experts = Some(Experts {
            count: config.count("num_experts", bounds::EXPERTS)?.unwrap_or(60),
            per_token: config.count("num_experts_per_tok", bounds::EXPERTS)?.unwrap_or(4),
            intermediate: width("moe_intermediate_size", 1408)?,
            normalized: config.flag("norm_topk_prob")?,
            router: RouterKind::Softmax,
            scale: 1.0,
            shared: Some(SharedExpert {
                intermediate: width("shared_expert_intermediate_size", 5632)?,
                gated: true,
            }),
            dense_blocks: dense_blocks(config, network.blocks)?,
            names: ExpertNames { shared: "shared_expert", ..ExpertNames::USUAL },
        });
        Ok(())
    },
    ..PLAIN
};
