//! Llama: biases by two flags, attention to all tokens.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, PLAIN};

pub(super) const LLAMA: Family = Family {
    name: "llama",
    class: "Llama",
    max_positions: 2048,
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        network.biases = Biases::by_flags(config, Some("attention_bias"), Some("mlp_bias"))?;
        Ok(())
    },
    ..PLAIN
};
