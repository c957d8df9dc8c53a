/*! The CUDA backend: kernels compiled at run time for the device at hand, products by cuBLASLt.

The program links to nothing of CUDA and runs where nothing of it is installed: every library is
opened with a CUDA device, and what is missing then is an error that says so.

Hidden states are f32 and every other activation is f16; products have f32 sums. Codes, scales and the
integer product are those of the CPU, bit for bit, for the same activations. */

mod attention;
pub mod cache;
#[cfg(test)]
mod cache_tests;
mod calibration;
pub mod compile;
mod cross_covariance;
mod cusolver;
mod decode;
#[cfg(test)]
mod decode_tests;
mod deferred_errors;
mod driver_error;
mod exchange;
mod forward;
mod fused;
#[cfg(test)]
mod fused_tests;
mod gptq;
pub mod gpu;
mod hessian;
mod hopper;
#[cfg(test)]
mod hopper_tests;
mod integer;
pub mod kernels;
mod launch;
pub mod libraries;
mod loss;
pub mod measure;
mod measurement;
#[cfg(test)]
mod measurement_tests;
mod memory;
#[cfg(test)]
mod memory_tests;
mod nccl;
mod output_error;
pub mod pages;
pub mod product;
mod quantization;
#[cfg(test)]
mod quantization_tests;
mod quantize;
mod replay;
mod search;
mod slice;
pub mod solver;
mod staging;
pub mod tensor;
#[cfg(test)]
pub(crate) mod tests;
pub mod timing;
mod train;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use crate::Result;
use crate::ranks::{Alone, Collectives};
use attention::RopeTables;
use compile::Compiler;
pub use exchange::NCCL_VARIABLE;
use gpu::{Buffer, Gpu, Stream};
use integer::Narrow;
pub use integer::VARIABLE as NARROW_VARIABLE;
use kernels::elementwise::Convert;
use launch::Kernels;
use nccl::Communicator;
use product::{Operand, Precision, Product, Products};
use slice::In;
use solver::Solver;
use staging::Staging;
use tensor::{Activation, Dense, Weight};

/// A CUDA device.
pub struct Cuda {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    products: Products,
    solver: Solver,
    uploads: Mutex<Staging>,
    downloads: Mutex<Staging>,
    rope: Mutex<Vec<RopeTables>>,
    /// What codes of 4 bits are multiplied by.
    narrow: Narrow,
    /// Bytes that hidden states take on the device while they are offloaded.
    offloaded_bytes: Arc<AtomicU64>,
    /// Bytes that they may take.
    offload_limit_bytes: AtomicU64,
    /// The GPUs that share the run, where there are several.
    communicator: Option<Communicator>,
    /// The ranks that share it.
    ranks: Arc<dyn Collectives>,
}

impl Cuda {
    /// Opens device number `ordinal`. `memory_bytes` bounds what is used of its memory; none for all
    /// that is free.
    ///
    /// # Errors
    /// A machine error that says what is missing: a driver, a library, the device, memory.
    pub fn open(ordinal: usize, memory_bytes: Option<u64>) -> Result<Self> {
        let device = libraries::device(ordinal)?;
        libraries::cublaslt()?;
        libraries::cusolver()?;
        let compiler = Compiler::for_device(&device)?;
        let setting = std::env::var(integer::VARIABLE).ok();
        let narrow = Narrow::chosen(device.capability, setting.as_deref());
        let gpu = Gpu::open(device, memory_bytes)?;
        Ok(Self {
            narrow,
            kernels: Kernels::new(Arc::clone(&gpu), compiler),
            products: Products::new(Arc::clone(&gpu))?,
            solver: Solver::new(Arc::clone(&gpu))?,
            uploads: Mutex::new(Staging::new(Arc::clone(&gpu), Stream::Up)?),
            downloads: Mutex::new(Staging::new(Arc::clone(&gpu), Stream::Down)?),
            rope: Mutex::default(),
            offloaded_bytes: Arc::default(),
            offload_limit_bytes: AtomicU64::new(u64::MAX),
            communicator: None,
            ranks: Arc::new(Alone),
            gpu,
        })
    }

    /// The device and its memory.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Products of full precision.
    pub fn products(&self) -> &Products {
        &self.products
    }

    /// An activation whose values are still to be written.
    fn half(&self, rows: usize, columns: usize) -> Result<Activation> {
        Ok(Activation::new(rows, columns, self.gpu.alloc(2 * rows * columns)?))
    }

    /// Checks a weight for values that are not finite, and with `to` converts it to f16.
    fn convert(&self, weight: &Weight, to: Option<&Buffer>, stream: Stream) -> Result<Option<u64>> {
        let count = weight.rows * weight.columns;
        let bad = self.gpu.alloc_on(stream, 8)?;
        bad.fill(0xff, stream)?;
        let kernel = Convert {
            x: (&*weight.data).into(),
            count: count as i64,
            to: to.map(Into::into),
            bad: (&bad).into(),
            element: weight.element(),
        };
        self.kernels.launch_on(stream, &kernel)?;
        let first = bad.download_on::<u64>(stream, 0..8)?[0];
        Ok((first != u64::MAX).then_some(first))
    }

    /// `x w^T` into `to` `[x's rows, w's rows]`, or added to it.
    fn multiply(
        &self,
        ActivationPart { x, first, count }: ActivationPart<'_>,
        weight: &Dense,
        to: &Buffer,
        precision: Precision,
        add: bool,
    ) -> Result<()> {
        let operand = |memory, transposed| Operand { memory, stride: weight.columns, transposed };
        let x = In::from(x.half()).skip(2 * first * weight.columns);
        self.products.run(&Product {
            m: weight.rows,
            n: count,
            k: weight.columns,
            a: operand((&*weight.data).into(), true),
            b: operand(x, false),
            c: Operand { memory: to.into(), stride: weight.rows, transposed: false },
            add,
            precision,
        })
    }
}

/// Some rows of an activation.
#[derive(Clone, Copy)]
struct ActivationPart<'a> {
    x: &'a Activation,
    first: usize,
    count: usize,
}

impl<'a> ActivationPart<'a> {
    /// Every row.
    fn all(x: &'a Activation) -> Self {
        Self { x, first: 0, count: x.rows }
    }
}

#[cfg(test)]
pub(crate) use tests::device as device_of_tests;

/// Says that a test did not run, past the harness that would swallow it.
#[cfg(test)]
fn skipped(test: &str, why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
