/*! The CPU backend: f32 products and integer kernels whose results do not depend on the instruction
set or the number of threads. Its integer path is the specification of what a checkpoint means. */

pub mod attention;
mod cached_head;
mod calibration;
mod cholesky;
mod code_rows;
mod cross_covariance;
mod decode;
pub mod elementwise;
mod exchange;
mod factor;
mod forward;
pub mod gemm;
mod gemm_kernels;
pub mod gemm_pack;
mod gptq;
pub mod gram;
mod head;
mod hessian;
pub mod integer;
pub mod isa;
mod measurement;
mod memory;
mod new_tokens;
mod paged;
mod quantization;
pub mod quantize;
mod tensor;
mod train;
mod weights;

use std::sync::Arc;

use super::{AccumulatedError, Matrix};
use crate::Result;
use crate::ranks::{Alone, Collectives};
pub use factor::Factor;
pub use head::Head;
pub use hessian::Hessian;
use isa::Isa;
pub use paged::PagedCache;
pub use tensor::HostTensor;
use tensor::Pool;

/// Rows of a task.
const ROWS: usize = 64;
/// Values of a task.
const CHUNK: usize = 1 << 15;

/// Host memory and this machine's instruction set.
pub struct Cpu {
    isa: Isa,
    pool: Arc<Pool>,
    ranks: Arc<dyn Collectives>,
}

impl Cpu {
    /// The best instruction set this machine has, or the one `ATOM_ISA` names.
    pub fn new() -> Result<Self> {
        Ok(Self::with_isa(Isa::detect()?))
    }

    /// A given instruction set.
    pub fn with_isa(isa: Isa) -> Self {
        Self { isa, pool: Arc::default(), ranks: Arc::new(Alone) }
    }

    /// Corrects permuted weights for the accumulated error, with the factor of the damped Hessian.
    pub(crate) fn correct(
        &self,
        weights: &mut Matrix,
        error: &AccumulatedError<Matrix>,
        gram: &Hessian,
        factor: &[f32],
    ) {
        cross_covariance::correct(self.isa, weights, error, gram, factor);
    }

    fn tensor(&self, rows: usize, columns: usize) -> HostTensor {
        HostTensor::unwritten(&self.pool, rows, columns)
    }
}
