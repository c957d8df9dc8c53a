//! Qwen3: QK-norm, heads of 128 channels, attention biases by a flag.

use super::super::architecture::Biases;
use super::super::config::Config;
use super::super::window;
use super::{Family, no_experts};
use crate::Result;

pub(super) const QWEN3: Family = Family {
    name: "qwen3",
    class: "Qwen3",
    kv_heads: Some(32),
    head_dim: Some(128),
    max_positions: 32_768,
    norm_epsilon: 1e-6,
    rope_theta: 10_000.0,
    head_norms: true,
    biases: attention_biases,
    sliding_window: window::of_later_blocks,
    experts: no_experts,
};

pub(super) fn attention_biases(config: &Config) -> Result<Biases> {
    let attention = config.flag("attention_bias")?;
    Ok(Biases { attn_in: attention, attn_out: attention, mlp: false })
}
