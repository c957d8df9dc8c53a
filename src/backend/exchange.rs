//! What a backend hands to other ranks: sums over calibration windows, and quantized linears.

use std::sync::Arc;

use super::Quantization;
use crate::Result;
use crate::quant::number::LinearFormat;
use crate::ranks::Collectives;

/// A backend among those of a run's ranks, which are of one kind. Who sends and who receives know the shapes.
pub trait Exchange: Quantization {
    /// The ranks that share the run, and which of them this is; one alone before [`join`](Self::join).
    fn ranks(&self) -> &dyn Collectives;
    /// Takes a place among the ranks of a run; called by all of them, once.
    ///
    /// # Errors
    /// A machine error that says what is missing.
    fn join(&mut self, ranks: Arc<dyn Collectives>) -> Result<()>;
    /// Sends a Gram matrix.
    fn send_gram(&self, to: usize, gram: &Self::Gram) -> Result<()>;
    /// Overwrites a Gram matrix with what another rank sends.
    fn receive_gram(&self, from: usize, gram: &mut Self::Gram) -> Result<()>;
    /// Sends a cross-covariance.
    fn send_cross_covariance(&self, to: usize, cross: &Self::CrossCovariance) -> Result<()>;
    /// Overwrites a cross-covariance with what another rank sends.
    fn receive_cross_covariance(
        &self,
        from: usize,
        cross: &mut Self::CrossCovariance,
    ) -> Result<()>;
    /// The quantized linear of rank `root`, which has it as `own`, on all ranks.
    fn broadcast_quantized(
        &self,
        root: usize,
        own: Option<Self::Quantized>,
        shape: (usize, LinearFormat),
    ) -> Result<Self::Quantized>;
}
