/*! What several benchmarks measure with: a product's sizes, a plain site, random values. */

use crate::quant::levels::Levels;
use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::site::{SiteFormat, Transform};

/// The sizes of a product `[m, k] x [n, k]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Tokens.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
}

/// All channels in their own order, the last of them outliers: integers of 4 bits.
pub(super) fn identity_site(
    channels: usize,
    group_size: usize,
    outlier_channels: usize,
) -> SiteFormat {
    let order = channel_order(&vec![0.0; channels], false, outlier_channels, group_size);
    let row = RowFormat {
        numbers: NumberFormat { bits: 4, levels: Levels::Int, group_size, scale: ScaleFormat::F16 },
        groups: (channels - outlier_channels).div_ceil(group_size),
        outlier_channels,
        outlier_format: OutlierFormat::Int8,
    };
    SiteFormat { channels, order, row, clip: 1.0, transform: Transform::None }
}

/// Values in -1..1, the same in every run.
pub(super) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            // Knuth's 64-bit linear congruence; its high bits are good enough for timing.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
