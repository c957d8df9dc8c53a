//! Ministral 3: Mistral with YaRN, and queries that grow with their position.

use super::super::architecture::QueryScaling;
use super::super::rope::RopeScaling;
use super::super::window;
use super::{Family, PLAIN};

pub(super) const MINISTRAL3: Family = Family {
    name: "ministral3",
    class: "Ministral3",
    kv_heads: Some(8),
    head_dim: Some(128),
    max_positions: 262_144,
    norm_epsilon: 1e-5,
    reads_rope: |rope| {
        const RIGHT: &str = "given: this version has no default for networks of this type";
        let config = rope.config;
        match (config.object("rope_scaling")?, config.object("rope_parameters")?) {
            (None, None) => Err(config.wrong("rope_parameters", RIGHT)),
            _ => rope.read(),
        }
    },
    differences: |config, network| {
        const BETA: &str = "llama_4_scaling_beta";
        let window = window::field(config, None)?;
        network.set_windows(window::of_all(config, network.blocks, window)?);
        let settings = match config.object("rope_scaling")? {
            None => config.object("rope_parameters")?,
            settings => settings,
        };
        let Some(settings) = settings else { return Ok(()) };
        let original = match network.common_rope().map(|rope| &rope.scaling) {
            Some(RopeScaling::Yarn { original, .. }) => *original as usize,
            _ => {
                let known = "this version runs networks of this type with RoPE of the type `yarn`";
                return Err(settings.unsupported("rope_type", known));
            }
        };
        let beta = settings.number(BETA)?.ok_or_else(|| settings.wrong(BETA, "a number"))?;
        network.query_scaling = Some(QueryScaling { beta, original });
        Ok(())
    },
    ..PLAIN
};
