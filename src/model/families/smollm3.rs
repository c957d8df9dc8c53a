//! SmolLM3: every fourth block without positions, biases by two flags, a tied head.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, PLAIN, PLAIN_ROPE, RopeDefaults};

pub(super) const SMOLLM3: Family = Family {
    name: "smollm3",
    class: "SmolLM3",
    kv_heads: Some(4),
    rope: RopeDefaults { theta: 2_000_000.0, ..PLAIN_ROPE },
    tied: true,
    differences: |config, network| {
        const RIGHT: &str = "a list of 1 for each block with RoPE and 0 for each without";
        let interval = config.count("no_rope_layer_interval", 1..=usize::MAX)?.unwrap_or(4);
        let mut positions: Vec<bool> =
            (1..=network.blocks).map(|block| !block.is_multiple_of(interval)).collect();
        if let Some(listed) = config.list("no_rope_layers", RIGHT)? {
            let known = listed.iter().map(|entry| entry.as_u64().filter(|flag| *flag <= 1));
            let known: Option<Vec<u64>> = known.collect();
            let known = known.filter(|known| known.len() >= network.blocks);
            let known = known.ok_or_else(|| config.wrong("no_rope_layers", RIGHT))?;
            positions = known.into_iter().map(|flag| flag == 1).collect();
        }
        let window = window::field(config, None)?;
        let window = if config.flag("use_sliding_window")? { window } else { None };
        let slides = |block: usize| window.is_some() && !positions[block];
        let windows = window::of_layer_types(config, network.blocks, window, slides)?;
        network.set_windows(windows);
        network.biases = Biases::by_flags(config, Some("attention_bias"), Some("mlp_bias"))?;
        network.drop_positions(|block| !positions[block]);
        Ok(())
    },
    ..PLAIN
};
