//! EXAONE 4: norms after attention and MLP, QK-norm, and in the hybrid a sliding window and RoPE in three of four blocks, neither
//! in the others.

use super::super::architecture::{Norms, QkNorm};
use super::super::window;
use super::{Family, PLAIN};

pub(super) const EXAONE4: Family = Family {
    name: "exaone4",
    class: "Exaone4",
    kv_heads: Some(32),
    max_positions: 2048,
    norm_epsilon: 1e-5,
    norms: Norms::OLMO,
    differences: |config, network| {
        const PATTERN: &str = "sliding_window_pattern";
        network.qk_norm = QkNorm::PerHead;
        let window = window::field(config, Some(4096))?;
        // A text such as `LLLG` comes with `layer_types`.
        let listed = config.given("layer_types").is_some();
        let pattern = match config.given(PATTERN) {
            None if !config.has(PATTERN) || listed || window.is_none() => None,
            Some(value) if listed && value.is_string() => None,
            _ => config.count(PATTERN, 1..=usize::MAX)?,
        };
        let pattern = pattern.unwrap_or(4);
        let slides = |block: usize| window.is_some() && !(block + 1).is_multiple_of(pattern);
        let windows = window::of_layer_types(config, network.blocks, window, slides)?;
        network.set_windows(windows.clone());
        // Without a window all blocks have positions.
        network.drop_positions(|block| window.is_some() && windows[block].is_none());
        Ok(())
    },
    ..PLAIN
};
