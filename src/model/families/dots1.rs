//! dots.llm1: QK-norm, experts chosen by sigmoids with a bias, shared ones.

use super::super::architecture::{Biases, QkNorm};
use super::super::window;
use super::glm4_moe::{SigmoidDefaults, sigmoid_experts};
use super::{Family, PLAIN};

pub(super) const DOTS1: Family = Family {
    name: "dots1",
    class: "Dots1",
    kv_heads: Some(32),
    max_positions: 2048,
    differences: |config, network| {
        let window = window::field(config, Some(4096))?;
        let first = config.nullable_count("max_window_layers", 0..=usize::MAX)?.flatten();
        let slides = |block: usize| window.is_some() && block >= first.unwrap_or(62);
        network.set_windows(window::of_layer_types(config, network.blocks, window, slides)?);
        network.qk_norm = QkNorm::PerHead;
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        let defaults = SigmoidDefaults {
            count: None,
            per_token: None,
            shared: None,
            dense: 0,
            normalized: false,
        };
        network.experts = Some(sigmoid_experts(config, network.blocks, defaults)?);
        Ok(())
    },
    ..PLAIN
};
