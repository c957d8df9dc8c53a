//! Quantizing weights, and laying weights out for the forward pass.

use super::{AccumulatedError, Calibration};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

/// A linear that is to be quantized.
pub struct Unquantized<'a, W> {
    /// Its name, for errors.
    pub name: &'a str,
    /// Its weight `[out, in]`, as the source has it.
    pub weight: &'a W,
    /// How its weights will be held.
    pub format: LinearFormat,
    /// The factor on a group's absmax before its scale is taken.
    pub scaling: Scaling,
}

/// What a Gram matrix's factorization took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Damping {
    /// Share of the mean diagonal that was added.
    pub share: f32,
    /// How many smaller shares failed before.
    pub failures: usize,
}

/// `sqrt(lost / total)` of two quadratic forms with a Gram matrix: a linear's relative output error.
///
/// # Errors
/// An input error if the Gram matrix was not finite.
pub(crate) fn output_error(lost: f64, total: f64) -> Result<f64> {
    if total > 0.0 && lost.is_finite() {
        Ok((lost.max(0.0) / total).sqrt())
    } else if total == 0.0 {
        Ok(0.0)
    } else {
        Err(Error::input("the calibration activations are not finite"))
    }
}

/// From a source's weights to codes, and from either to what products read.
pub trait Quantization: Calibration {
    /// A quantized weight in neutral form, where the backend made it.
    type Quantized: Send + Sync;
    /// What the GPTQ sweep needs of the damped Gram matrix's Cholesky factor.
    type Factor: Send + Sync;

    /// Refuses codes that the backend cannot compute with; asked before long work.
    ///
    /// # Errors
    /// A machine error that names another way.
    fn check_codebook(&self, _codebook: Codebook) -> Result<()> {
        Ok(())
    }
    /// Prepares a site.
    fn site(&self, format: &SiteFormat) -> Result<Self::Site>;
    /// Lays a weight out for [`product`](super::Forward::product), with a site in the site's order and
    /// transformed.
    fn dense(&self, weight: &Self::Weight<'_>, site: Option<&Self::Site>) -> Result<Self::Dense>;
    /// Lays out what the codes of a quantized weight stand for.
    fn dense_of(&self, weight: &Self::Quantized) -> Result<Self::Dense>;
    /// Lays a quantized weight out for [`integer_product`](super::Forward::integer_product). Of gate and up, `feeds` is the
    /// site that their product enters: a backend may hold their rows, and so their outputs, in its order, which only
    /// [`silu_mul`](super::Forward::silu_mul) and [`silu_quantize`](super::Forward::silu_quantize) accept.
    fn pack(&self, weight: &Self::Quantized, feeds: Option<&Self::Site>) -> Result<Self::Packed>;

    /// The Cholesky factor of the damped Gram matrix, or none if no rung of the damping ladder makes it positive
    /// definite.
    fn cholesky(
        &self,
        gram: &mut Self::Gram,
        damping: f32,
    ) -> Result<Option<(Self::Factor, Damping)>>;
    /// The GPTQ sweep over the weights of a site's linears, permuted and corrected for the accumulated error, as
    /// [`sweep_plain`](crate::quant::gptq::sweep_plain) defines it; each with its relative output error
    /// `sqrt(tr(E H E^T) / tr(W H W^T))`, `E` what is missing to the corrected weights.
    fn gptq(
        &self,
        linears: &[Unquantized<Self::Weight<'_>>],
        site: &Self::Site,
        gram: &Self::Gram,
        factor: &Self::Factor,
        error: Option<&AccumulatedError<Self::CrossCovariance>>,
    ) -> Result<Vec<(Self::Quantized, f64)>>;
    /// Permuted weights rounded to nearest, as
    /// [`round_to_nearest`](crate::quant::weights::round_to_nearest) defines it.
    fn round(
        &self,
        linear: &Unquantized<Self::Weight<'_>>,
        site: &Self::Site,
    ) -> Result<Self::Quantized>;
    /// `sqrt(tr(E H E^T) / tr(W H W^T))` with `E = W - Q`, permuted: the relative output error on
    /// the calibration tokens.
    fn output_error(
        &self,
        gram: &Self::Gram,
        site: &Self::Site,
        weight: &Self::Weight<'_>,
        quantized: &Self::Quantized,
    ) -> Result<f64>;
    /// `sqrt(sum_j s_j |E_j|^2 / sum_j s_j |W_j|^2)` over the source's channels j of energy s_j: the
    /// relative output error if channels were uncorrelated, which is all that is known without a
    /// Gram matrix.
    fn energy_error(
        &self,
        energy: &[f64],
        site: &Self::Site,
        weight: &Self::Weight<'_>,
        quantized: &Self::Quantized,
    ) -> Result<f64>;

    /// A quantized weight on the host. Safe to call from another thread than the one that computes.
    fn fetch(&self, weight: Self::Quantized) -> Result<QuantizedLinear>;
    /// A quantized weight that was stored.
    fn restore(&self, weight: QuantizedLinear) -> Result<Self::Quantized>;
}
