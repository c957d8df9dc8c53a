//! Gram matrices, cross-covariances and other sums over the calibration tokens.

use super::{AttentionSpec, Forward};
use crate::Result;

/// The quantization error that has accumulated up to a site: what its linears' targets are corrected by.
///
/// A linear's input is `x` after the quantized blocks and was `x0` after the source's. The weights that come
/// closest to the source's output on `x` are `W + (W sum d x^T + sum r x^T) H^-1`, with `H = sum x x^T`, `d = x0 - x` and, for
/// a linear that adds to the hidden states, `r` the error of these so far (least squares; GPTAQ, arXiv 2504.02692, and
/// Qronos, arXiv 2505.11695, correct the first part). They are `W + (sum y x^T - W H) H^-1` too, with `y = W x0 + r` the
/// output that the linear should have.
pub struct AccumulatedError<C> {
    /// A sum over the calibration tokens.
    pub cross: C,
    /// What it is a sum of.
    pub kind: ErrorKind,
    /// How much of the correction is made, 0 to 1.
    pub share: f32,
}

/// The sum that weights are corrected by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// `sum d x^T`, `[channels, channels]`: one sum for all linears of a site.
    Inputs,
    /// `sum y x^T`, `[outputs, channels]`, of a site with one linear: smaller where outputs are fewer than channels, and
    /// `y` is a difference of hidden states that needs no product.
    Outputs,
}

/// What calibration measures of activations. Tokens are added in order, so that batches do not show in the sums.
pub trait Calibration: Forward {
    /// A running sum of `x^T x`, `[channels, channels]`: GPTQ's Hessian.
    type Gram: Send;
    /// A running sum of `y^T x` for two activations.
    type CrossCovariance: Send;

    /// Adds each channel's sum of squares over the tokens to `energy`.
    fn add_energy(&self, x: &Self::Activation, energy: &mut [f64]) -> Result<()>;
    /// Adds each channel's sum over the tokens of the embedded keys to `sums`.
    fn add_key_sums(
        &self,
        spec: &AttentionSpec,
        k: &Self::Activation,
        sums: &mut [f64],
    ) -> Result<()>;
    /// A Gram matrix of zeros.
    fn gram(&self, channels: usize) -> Result<Self::Gram>;
    /// `H += x^T x`.
    fn add_gram(&self, gram: &mut Self::Gram, x: &Self::Activation) -> Result<()>;
    /// `H += H'`, the Gram matrix of other tokens.
    fn join_gram(&self, gram: &mut Self::Gram, other: &Self::Gram) -> Result<()>;
    /// Zeros, `[rows, columns]`.
    fn cross_covariance(&self, rows: usize, columns: usize) -> Result<Self::CrossCovariance>;
    /// `C += y^T x`.
    fn add_cross_covariance(
        &self,
        cross: &mut Self::CrossCovariance,
        y: &Self::Activation,
        x: &Self::Activation,
    ) -> Result<()>;
    /// `H += x^T x` and `C += y^T x`, which have an operand in common.
    fn add_gram_and_cross(
        &self,
        gram: &mut Self::Gram,
        cross: &mut Self::CrossCovariance,
        y: &Self::Activation,
        x: &Self::Activation,
    ) -> Result<()> {
        self.add_gram(gram, x)?;
        self.add_cross_covariance(cross, y, x)
    }
    /// `C += C'`, the cross-covariance of other tokens.
    fn join_cross_covariance(
        &self,
        cross: &mut Self::CrossCovariance,
        other: &Self::CrossCovariance,
    ) -> Result<()>;
    /// `x - y`.
    fn difference(&self, x: &Self::Activation, y: &Self::Activation) -> Result<Self::Activation>;
    /// `x - y` of hidden states.
    fn hidden_difference(&self, x: &Self::Hidden, y: &Self::Hidden) -> Result<Self::Activation>;
    /// Multiplies each row by its weight.
    fn scale_rows(&self, x: &mut Self::Activation, weights: &[f32]) -> Result<()>;
}
