//! ERNIE 4.5, dense: RoPE of neighbouring channels, biases of all linears by one flag, a tied head.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

pub(super) const ERNIE4_5: Family = Family {
    name: "ernie4_5",
    class: "Ernie4_5",
    kv_heads: Some(2),
    head_dim: Some(128),
    max_positions: 131_072,
    norm_epsilon: 1e-5,
    tied: true,
    rope: RopeDefaults { theta: 500_000.0, interleaved: true, ..PLAIN_ROPE },
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        network.biases = Biases::by_flags(config, Some("use_bias"), Some("use_bias"))?;
        Ok(())
    },
    ..PLAIN
};
