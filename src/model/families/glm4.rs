//! GLM-4: norms before and after attention and MLP, RoPE of neighbouring channels of half of each head, gate and up in one
//! tensor.

use super::super::architecture::{Biases, Norms};
use super::super::parts::FUSED_GATE_UP;
use super::super::window;
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

pub(super) const GLM4: Family = Family {
    name: "glm4",
    class: "Glm4",
    kv_heads: Some(2),
    head_dim: Some(128),
    max_positions: 131_072,
    norm_epsilon: 1.5625e-7,
    rope: RopeDefaults { share: Some(0.5), interleaved: true, ..PLAIN_ROPE },
    norms: Norms {
        after: Some(["post_self_attn_layernorm", "post_mlp_layernorm"]),
        ..Norms::LLAMA
    },
    fused: &[FUSED_GATE_UP],
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        let flags = Biases::by_flags(config, Some("attention_bias"), None)?;
        let attn_in = config.flag_or("attention_bias", true)?;
        network.biases = Biases { attn_in, attn_out: false, ..flags };
        Ok(())
    },
    ..PLAIN
};
