//! Seed-OSS: biases of q, k and v unless a flag says otherwise, of o by a flag of its own.

use super::super::architecture::Biases;
use super::super::window;
use super::{Family, PLAIN};

pub(super) const SEED_OSS: Family = Family {
    name: "seed_oss",
    class: "SeedOss",
    kv_heads: Some(8),
    head_dim: Some(128),
    max_positions: 524_288,
    differences: |config, network| {
        network.set_windows(window::of_all(config, network.blocks, None)?);
        let flags = Biases::by_flags(config, Some("attention_bias"), Some("mlp_bias"))?;
        let attn_in = config.flag_or("attention_bias", true)?;
        let attn_out = config.flag("attention_out_bias")?;
        network.biases = Biases { attn_in, attn_out, ..flags };
        Ok(())
    },
    ..PLAIN
};
