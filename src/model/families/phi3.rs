//! Phi-3 and Phi-4-mini: q, k and v in one tensor, gate and up in another, LongRoPE over a share of each head.

use super::super::parts::{FUSED_GATE_UP, FUSED_QKV};
use super::super::window;
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

pub(super) const PHI3: Family = Family {
    name: "phi3",
    class: "Phi3",
    max_positions: 4096,
    norm_epsilon: 1e-5,
    rope: RopeDefaults {
        share: Some(1.0),
        original: Some(4096.0),
        longrope_alone: true,
        ..PLAIN_ROPE
    },
    fused: &[FUSED_QKV, FUSED_GATE_UP],
    differences: |config, network| {
        config.count("original_max_position_embeddings", 1..=usize::MAX)?;
        let window = window::field(config, None)?;
        network.set_windows(window::of_all(config, network.blocks, window)?);
        Ok(())
    },
    ..PLAIN
};
