/*! The recipes that are built in.

`paper` repeats the reference's headline run setting by setting (scripts/run_atom_ppl.sh of efeslab/Atom); `default` has
the same bits, on wide sites the same groups and outlier channels, and adds what makes it more accurate. The others hold exactly what an engine
represents, so that an export copies codes and scales: channels in the source's order, nothing transformed, no outliers. */

use super::{Group, Order, Outliers, Recipe, expert_tokens};
use crate::quant::codebook::Codebook;
use crate::quant::number::OutlierFormat;
use crate::quant::scale::ScaleGrid;
use crate::quant::site::Transform;

/// Names of the built-in recipes.
pub(super) const NAMES: [&str; 6] = ["default", "paper", "w4a16", "q4_0", "nvfp4", "mxfp4"];

/// The built-in recipe of that name.
pub(super) fn built_in(name: &str) -> Option<Recipe> {
    Some(match name {
        "default" => Recipe::default_recipe(),
        "paper" => Recipe::paper(),
        "w4a16" => Recipe::w4a16(),
        "q4_0" => Recipe::q4_0(),
        "nvfp4" => Recipe::nvfp4(),
        "mxfp4" => Recipe::mxfp4(),
        _ => return None,
    })
}

/// The names for a person: "`default`, `paper` and `w4a16`".
pub(super) fn built_in_names() -> String {
    let (last, others) = NAMES.split_last().expect("there are built-in recipes");
    let others: Vec<String> = others.iter().map(|name| format!("`{name}`")).collect();
    format!("{} and `{last}`", others.join(", "))
}

impl Recipe {
    /// The reference's headline recipe (method.md section 0).
    pub fn paper() -> Self {
        Self {
            bits: 4,
            act_bits: 4,
            kv_bits: 4,
            format: Codebook::Int,
            group: Group::Size(128),
            pad_groups: true,
            outliers: Outliers::Count(128),
            outlier_format: OutlierFormat::Int8,
            order: Order::Energy,
            clip_act: 0.9,
            clip_weight: 0.85,
            signed_scales: false,
            scales: ScaleGrid::F16,
            search_scales: false,
            clip_kv: 1.0,
            rows_per_scale: 2,
            transform: Transform::None,
            rotate_kv: false,
            kv_after_rope: false,
            center_keys: false,
            gptq: true,
            sequential: false,
            correction: 0.0,
            damping: 0.01,
            expert_tokens: expert_tokens(),
        }
    }

    /// The default: the paper's bits, its groups where a site is wide, and its share of outliers. A Hadamard transform in each
    /// group, a signed scale for every output row, rotated K and V heads, centred keys, and sites quantized
    /// sequentially towards the output of the source.
    pub fn default_recipe() -> Self {
        Self {
            group: Group::Auto,
            outliers: Outliers::Auto,
            clip_act: 0.95,
            clip_weight: 0.95,
            signed_scales: true,
            rows_per_scale: 1,
            transform: Transform::Hadamard,
            rotate_kv: true,
            kv_after_rope: true,
            center_keys: true,
            sequential: true,
            correction: 0.5,
            ..Self::paper()
        }
    }

    /// Weights that the W4A16 kernels of vLLM, SGLang and transformers load: compressed-tensors `pack-quantized`, GPTQ,
    /// AWQ. Scales are numbers of bf16 and of f16, whichever the engine loads them as.
    pub fn w4a16() -> Self {
        Self {
            act_bits: 16,
            kv_bits: 16,
            group: Group::Size(128),
            outliers: Outliers::Count(0),
            order: Order::None,
            scales: ScaleGrid::Bf16,
            search_scales: true,
            clip_weight: 1.0,
            transform: Transform::None,
            rotate_kv: false,
            kv_after_rope: false,
            center_keys: false,
            pad_groups: false,
            ..Self::default_recipe()
        }
    }

    /// GGUF's Q4_0, for llama.cpp: groups of 32, whose value of the greatest magnitude is code -8.
    pub fn q4_0() -> Self {
        Self { group: Group::Size(32), scales: ScaleGrid::F16, ..Self::w4a16() }
    }

    /// NVFP4: E2M1 in groups of 16 with scales of E4M3, in weights and activations.
    pub fn nvfp4() -> Self {
        Self {
            act_bits: 4,
            format: Codebook::Fp4,
            group: Group::Size(16),
            clip_act: 1.0,
            signed_scales: false,
            scales: ScaleGrid::E4m3,
            correction: 0.3,
            ..Self::w4a16()
        }
    }

    /// MXFP4 (OCP Microscaling Formats 1.0): E2M1 in groups of 32 with powers of two as scales.
    pub fn mxfp4() -> Self {
        Self { group: Group::Size(32), scales: ScaleGrid::PowerOfTwo, ..Self::nvfp4() }
    }
}
