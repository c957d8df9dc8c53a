//! OLMo 3: OLMo 2 with a sliding window in three of four blocks, and RoPE that is scaled in the others alone.

use super::super::architecture::{Biases, QkNorm};
use super::super::rope_settings::OuterThetas;
use super::super::window;
use super::olmo2::OLMO2;
use super::{Family, PLAIN_ROPE, RopeDefaults};

const THETA: f64 = 500_000.0;

pub(super) const OLMO3: Family = Family {
    name: "olmo3",
    class: "Olmo3",
    rope: RopeDefaults { theta: THETA, ..PLAIN_ROPE },
    // The other blocks' is set below.
    reads_rope: |rope| Ok(rope.read_by_layer_type(&THETAS)?.full),
    differences: |config, network| {
        let window = window::field(config, Some(4096))?;
        let slides = |block: usize| !(block + 1).is_multiple_of(4);
        network.set_windows(window::of_layer_types(config, network.blocks, window, slides)?);
        network.set_sliding_rope(config, &OLMO3.rope, &THETAS)?;
        network.qk_norm = QkNorm::AllHeads;
        network.biases = Biases::by_flags(config, Some("attention_bias"), None)?;
        Ok(())
    },
    ..OLMO2
};

/// transformers reads the file's own base for the blocks without a window alone.
const THETAS: OuterThetas =
    OuterThetas { full: (Some("rope_theta"), THETA), sliding: (None, THETA) };
