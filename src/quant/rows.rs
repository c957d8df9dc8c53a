/*! Quantized activations: the other operand of the integer product with a [`QuantizedLinear`]. */

use super::number::RowFormat;

/// The outlier channels of each token.
#[derive(Clone, Debug, PartialEq)]
pub enum OutlierRows {
    /// No outlier channels.
    None,
    /// INT8 codes `[tokens, outliers]` in -127..=127 and one scale a token, `[tokens]`.
    Int8 { codes: Vec<i8>, scales: Vec<f32> },
    /// Values `[tokens, outliers]`: a number of E4M3 times the token's scale, exact in f32.
    Fp8(Vec<f32>),
    /// Values `[tokens, outliers]`, rounded to f16 and held as f32.
    F16(Vec<f32>),
}

/// Activations `[tokens, channels]` of one site in its channel order, quantized per token and
/// group. Scales are f16 values held as f32.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedRows {
    /// Rows.
    pub tokens: usize,
    /// How a row is held.
    pub format: RowFormat,
    /// Codes `[tokens, groups * group_size]`; 4 or 8 bits wide (2 and 3 as well), -128 never occurs
    /// at 8 bits.
    pub codes: Vec<i8>,
    /// Scales `[tokens, groups]`.
    pub scales: Vec<f32>,
    /// The outlier block.
    pub outliers: OutlierRows,
}
