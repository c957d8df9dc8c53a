//! OLMo 2: norms after attention and MLP alone, and one over all heads of queries and of keys.

use super::super::architecture::{Biases, Norms, QkNorm};
use super::super::window;
use super::{Family, PLAIN};

pub(super) const OLMO2: Family = Family {
    name: "olmo2",
    class: "Olmo2",
    max_positions: 2048,
    norm_epsilon: 1e-5,
    norms: Norms::OLMO,
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        network.qk_norm = QkNorm::AllHeads;
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        Ok(())
    },
    ..PLAIN
};
