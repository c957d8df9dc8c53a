/*! A quantized linear layer in its neutral form: one signed code a byte, in no device's layout.

GPTQ and rounding produce it, the checkpoint packs it, and a backend lays it out for its kernels. */

use half::f16;

use super::number::LinearFormat;

/// The outlier channels of a linear: the last columns of the site's channel order.
#[derive(Clone, Debug, PartialEq)]
pub enum OutlierBlock {
    /// No outlier channels.
    None,
    /// INT8 codes `[out, outliers]` in -127..=127 and one scale a row, `[out]`.
    Int8 { codes: Vec<i8>, scales: Vec<f16> },
    /// FP8 codes (the bits of E4M3) `[out, outliers]` and one scale a row, `[out]`.
    Fp8 { codes: Vec<u8>, scales: Vec<f16> },
    /// Values `[out, outliers]`, rounded to f16 only.
    F16(Vec<f16>),
}

/// A weight matrix `[out, channels]` in a site's channel order: groups of low-bit codes with one
/// scale each, then the outlier block.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLinear {
    /// Output features.
    pub rows: usize,
    /// How weights are held.
    pub format: LinearFormat,
    /// Codes `[rows, groups * group_size]`, each in `-2^(bits-1)..2^(bits-1)`, or one of
    /// FP4's (see [`Codebook`](super::codebook::Codebook)).
    pub codes: Vec<i8>,
    /// Scales `[rows.div_ceil(rows_per_scale), groups]`.
    pub scales: Vec<f16>,
    /// The outlier block.
    pub outliers: OutlierBlock,
}

impl QuantizedLinear {
    /// The scale of `row`'s group `group`.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[row / self.format.rows_per_scale * self.format.row.groups + group].to_f32()
    }
}
