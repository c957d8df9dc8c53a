//! Gemma 3, text: norms before and after whose weights are stored less one, GELU, an embedding times `sqrt(hidden)`, a sliding
//! window and another RoPE in five of six blocks.

use super::super::architecture::{Activation, Biases, Mlp, Multipliers, Norms, QkNorm};
use super::super::rope_settings::OuterThetas;
use super::super::window;
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

pub(super) const GEMMA3: Family = Family {
    name: "gemma3_text",
    class: "Gemma3",
    kv_heads: Some(4),
    head_dim: Some(256),
    max_positions: 131_072,
    tied: true,
    reads_hidden_act: false,
    rope: RopeDefaults { theta: 1_000_000.0, ..PLAIN_ROPE },
    // The other blocks' is set below.
    reads_rope: |rope| Ok(rope.read_by_layer_type(&THETAS)?.full),
    norms: Norms {
        before: Some(["input_layernorm", "pre_feedforward_layernorm"]),
        after: Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
        unit_offset: true,
    },
    differences: |config, network| {
        let act = config.text("hidden_activation")?.unwrap_or("gelu_pytorch_tanh");
        if act != "gelu_pytorch_tanh" {
            let known = "this version runs networks of this type with `gelu_pytorch_tanh`";
            return Err(config.unsupported("hidden_activation", known));
        }
        for cap in ["final_logit_softcapping", "attn_logit_softcapping"] {
            if config.given(cap).is_some() {
                let known = "this version runs networks whose logits and scores have no soft cap";
                return Err(config.unsupported(cap, known));
            }
        }
        if config.flag("use_bidirectional_attention")? {
            let known =
                "this version runs networks that predict the next token from those before it";
            return Err(config.unsupported("use_bidirectional_attention", known));
        }
        let window = window::field(config, Some(4096))?;
        let pattern = config.count("sliding_window_pattern", 1..=usize::MAX)?.unwrap_or(6);
        let slides = |block: usize| !(block + 1).is_multiple_of(pattern);
        network.set_windows(window::of_layer_types(config, network.blocks, window, slides)?);
        network.set_sliding_rope(config, &GEMMA3.rope, &THETAS)?;
        network.qk_norm = QkNorm::PerHead;
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        let scalar = config.count("query_pre_attn_scalar", 1..=usize::MAX)?.unwrap_or(256);
        network.attention_scale = Some((scalar as f64).powf(-0.5) as f32);
        network.mlp = Mlp { activation: Activation::GeluTanh, gated: true };
        let embedding = (network.hidden as f64).sqrt() as f32;
        network.multipliers = Multipliers { embedding, ..Multipliers::default() };
        Ok(())
    },
    ..PLAIN
};

const THETAS: OuterThetas = OuterThetas {
    full: (Some("rope_theta"), 1_000_000.0),
    sliding: (Some("rope_local_base_freq"), 10_000.0),
};
