//! Granite 3 and 4, dense: factors of the embedding, of the residual stream, of attention and of the logits.

use super::super::architecture::{Biases, Multipliers};
use super::super::window;
use super::{Family, PLAIN};

pub(super) const GRANITE: Family = Family {
    name: "granite",
    class: "Granite",
    max_positions: 2048,
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        network.biases = Biases::by_flags(config, Some("attention_bias"), Some("mlp_bias"))?;
        let factor = |key| Ok::<f32, crate::Error>(config.positive(key)?.unwrap_or(1.0) as f32);
        network.attention_scale = Some(factor("attention_multiplier")?);
        network.multipliers = Multipliers {
            embedding: factor("embedding_multiplier")?,
            residual: factor("residual_multiplier")?,
            logits: 1.0 / factor("logits_scaling")?,
        };
        Ok(())
    },
    ..PLAIN
};
