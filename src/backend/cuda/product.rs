/*! Matrix products by cuBLASLt.

Everything here is row-major for its callers. The library is column-major, where a row-major matrix
is its own transpose: `y = x w^T` is computed as `y^T = w x^T`. */

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{
    self as lts, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulPreferenceAttributes_t as Preference, cudaDataType_t as DataType,
};

use super::gpu::{Buffer, Gpu, Stream};
use super::slice::In;
use crate::{Error, Result};

/// Memory that cuBLASLt may use; 32 MB is what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A matrix in device memory, column-major: entry (i, j) is element `i + j * stride` of its memory.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Its bytes, from its first entry on. Those of the result are written.
    pub memory: In<'a, u8>,
    /// Elements from column to column.
    pub stride: usize,
    /// Whether the product takes its transpose.
    pub transposed: bool,
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f16 operands, sums in f32, result in f16.
    HalfToHalf,
    /// f16 operands, sums in f32, result in f32.
    HalfToFloat,
    /// f32 operands and sums.
    Float,
    /// f32 operands, rounded to 10 bits of mantissa for the tensor cores, and f32 sums.
    Tensor32,
    /// INT8 operands, sums and result in i32.
    Int8,
    /// FP8 (E4M3) operands of scale 1, sums as fast as the tensor cores can, result in f16.
    Fp8,
}

/// `c = a b`, or `c += a b`: `[m, n]` from `[m, k]` and `[k, n]`, column-major.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Depth of the sums.
    pub k: usize,
    /// The left operand.
    pub a: Operand<'a>,
    /// The right operand.
    pub b: Operand<'a>,
    /// Where the result goes.
    pub c: Operand<'a>,
    /// Whether it is added to what is there.
    pub add: bool,
    /// How it is computed.
    pub precision: Precision,
}

/// An operand as a kernel sees it: its stride, whether it is transposed, and its alignment in bytes.
type OperandForm = (usize, bool, u32);

/// What the choice of cuBLASLt's kernel depends on.
type Key = (usize, usize, usize, [OperandForm; 3], bool, Precision);

impl Product<'_> {
    /// Checks that the operands are as large as the product reads and writes.
    fn check(&self) {
        let Self { m, n, k, a, b, c, precision, .. } = *self;
        let (input, output) = precision.bytes();
        for (operand, rows, columns, bytes) in
            [(a, m, k, input), (b, k, n, input), (c, m, n, output)]
        {
            let (rows, columns) =
                if operand.transposed { (columns, rows) } else { (rows, columns) };
            let last = (columns - 1) * operand.stride + rows;
            assert!(operand.memory.holds(last * bytes), "an operand is too small: {self:?}");
        }
    }

    fn forms(&self) -> [OperandForm; 3] {
        let form = |operand: Operand<'_>, bytes: usize| {
            // The address decides which instructions can load it, and so does the distance of columns.
            let alignment = operand.memory.pointer() | (operand.stride * bytes) as u64 | 256;
            (operand.stride, operand.transposed, 1 << alignment.trailing_zeros())
        };
        let (in_bytes, out_bytes) = self.precision.bytes();
        [form(self.a, in_bytes), form(self.b, in_bytes), form(self.c, out_bytes)]
    }
}

/// A product with the kernels that cuBLASLt has for it, the fastest by its heuristic first.
pub struct Planned {
    description: lts::cublasLtMatmulDesc_t,
    layouts: [lts::cublasLtMatrixLayout_t; 3],
    algorithms: Vec<lts::cublasLtMatmulAlgo_t>,
}

impl Planned {
    /// How many kernels there are to choose from.
    pub fn choices(&self) -> usize {
        self.algorithms.len()
    }
}

// SAFETY: nothing of it changes, and its parts may be used from any thread.
unsafe impl Send for Planned {}
// SAFETY: shared use only reads it, and cuBLASLt's descriptors may be read by several threads.
unsafe impl Sync for Planned {}

impl Drop for Planned {
    fn drop(&mut self) {
        // SAFETY: all was made for this product and is used no more. Nothing can be done about a failure.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.description);
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The library, opened for a device.
pub struct Products {
    gpu: Arc<Gpu>,
    handle: LtHandle,
    workspace: Buffer,
    /// The scale of FP8 operands: 1, in f32.
    one: Buffer,
    planned: Mutex<HashMap<Key, Arc<Planned>>>,
}

/// cuBLASLt's handle, which several threads may use at the same time.
struct LtHandle(lts::cublasLtHandle_t);

// SAFETY: cuBLASLt's manual ties the handle to a context, not to a thread.
unsafe impl Send for LtHandle {}
// SAFETY: cuBLASLt's manual lets several threads use one handle at the same time.
unsafe impl Sync for LtHandle {}

impl Products {
    /// Opens the library, which must be there.
    pub fn new(gpu: Arc<Gpu>) -> Result<Self> {
        gpu.bind()?;
        let handle = lt::create_handle().map_err(|error| failed("cublasLtCreate", error))?;
        let workspace = gpu.alloc(WORKSPACE_BYTES)?;
        let one = gpu.upload(&[1f32])?;
        Ok(Self { gpu, handle: LtHandle(handle), workspace, one, planned: Mutex::default() })
    }

    /// Computes a product on the main stream.
    pub fn run(&self, product: &Product<'_>) -> Result<()> {
        let Product { m, n, k, add, precision, .. } = *product;
        let name =
            || format!("product {m} x {n} x {k} {precision:?}{}", if add { " added" } else { "" });
        self.gpu.traced(name, || self.multiply(product))
    }

    fn multiply(&self, product: &Product<'_>) -> Result<()> {
        let Product { m, n, k, add, precision, .. } = *product;
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        let forms = product.forms();
        let key = (m, n, k, forms, add, precision);
        let known = self.planned().get(&key).cloned();
        let plan = match known {
            Some(plan) => plan,
            None => {
                // No lock is held: two threads may plan the same product, and either plan does.
                let plan = self.plan(product, 1)?;
                if plan.choices() == 0 {
                    let none = lts::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
                    return Err(unplanned(lt::CublasError(none)));
                }
                Arc::clone(self.planned().entry(key).or_insert_with(|| Arc::new(plan)))
            }
        };
        self.run_choice(product, &plan, 0)
    }

    fn planned(&self) -> MutexGuard<'_, HashMap<Key, Arc<Planned>>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes a product on the main stream by one of the kernels that were planned for its shape.
    ///
    /// # Errors
    /// A machine error, also where the kernel does not support the shape.
    pub fn run_choice(&self, product: &Product<'_>, plan: &Planned, choice: usize) -> Result<()> {
        self.gpu.bind()?;
        product.check();
        let Product { a, b, c, add, precision, .. } = *product;
        let floats = [1f32, f32::from(u8::from(add))];
        let integers = [1i32, i32::from(add)];
        let scalar = |at: usize| match precision {
            Precision::Int8 => (&raw const integers[at]).cast::<c_void>(),
            _ => (&raw const floats[at]).cast(),
        };
        // SAFETY: the plan was made for these shapes; the operands are device memory of these sizes.
        unsafe {
            lt::matmul(
                self.handle.0,
                plan.description,
                scalar(0),
                scalar(1),
                a.memory.pointer() as *const c_void,
                plan.layouts[0],
                b.memory.pointer() as *const c_void,
                plan.layouts[1],
                c.memory.pointer() as *const c_void,
                plan.layouts[2],
                c.memory.pointer() as *mut c_void,
                plan.layouts[2],
                &raw const plan.algorithms[choice],
                self.workspace.pointer() as *mut c_void,
                WORKSPACE_BYTES,
                self.gpu.stream(Stream::Main).cast(),
            )
        }
        .map_err(|error| failed("cublasLtMatmul", error))
    }

    /// Up to `most` kernels of cuBLASLt by its heuristic; none where it has none for the shape.
    pub fn plan(&self, product: &Product<'_>, most: usize) -> Result<Planned> {
        self.gpu.bind()?;
        let mut planned = self.described(product)?;
        planned.algorithms = self.heuristic(&planned, product.forms(), most)?;
        Ok(planned)
    }

    /// A product's description and layouts, without kernels.
    fn described(&self, product: &Product<'_>) -> Result<Planned> {
        let Product { m, n, k, a, b, precision, .. } = *product;
        let (input, output, compute, scale) = precision.types();
        let description = lt::create_matmul_desc(compute, scale).map_err(unplanned)?;
        let describe = |attribute, value: *const c_void, bytes| {
            // SAFETY: each attribute is given as the number or the address it is.
            unsafe { lt::set_matmul_desc_attribute(description, attribute, value, bytes) }
                .map_err(unplanned)
        };
        for (attribute, operand) in [
            (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, a),
            (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, b),
        ] {
            let transposed = i32::from(operand.transposed);
            describe(attribute, (&raw const transposed).cast(), size_of::<i32>())?;
        }
        if precision == Precision::Fp8 {
            let (one, fast) = (self.one.pointer(), 1i8);
            for attribute in [
                DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
            ] {
                describe(attribute, (&raw const one).cast(), size_of::<u64>())?;
            }
            let attribute = DescAttribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM;
            describe(attribute, (&raw const fast).cast(), size_of::<i8>())?;
        }
        let forms = product.forms();
        let layout = |data, (rows, columns): (usize, usize), stride: usize, transposed| {
            let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
            lt::create_matrix_layout(data, rows as u64, columns as u64, stride as i64)
        };
        let layouts = [
            layout(input, (m, k), forms[0].0, forms[0].1).map_err(unplanned)?,
            layout(input, (k, n), forms[1].0, forms[1].1).map_err(unplanned)?,
            layout(output, (m, n), forms[2].0, false).map_err(unplanned)?,
        ];
        Ok(Planned { description, layouts, algorithms: Vec::new() })
    }

    /// Up to `most` kernels for operands of these forms.
    fn heuristic(
        &self,
        planned: &Planned,
        forms: [OperandForm; 3],
        most: usize,
    ) -> Result<Vec<lts::cublasLtMatmulAlgo_t>> {
        let preference = lt::create_matmul_pref().map_err(unplanned)?;
        let prefer = |attribute, value: *const c_void, bytes| {
            // SAFETY: each attribute is given as the number it is.
            unsafe { lt::set_matmul_pref_attribute(preference, attribute, value, bytes) }
                .map_err(unplanned)
        };
        let workspace = WORKSPACE_BYTES;
        prefer(
            Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )?;
        for (attribute, (_, _, alignment)) in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ]
        .into_iter()
        .zip([forms[0], forms[1], forms[2], forms[2]])
        {
            prefer(attribute, (&raw const alignment).cast(), size_of::<u32>())?;
        }
        let [a, b, c] = planned.layouts;
        let mut found = Vec::with_capacity(most);
        let mut count = 0;
        // SAFETY: all descriptions are alive, and `found` has room for `most` results.
        let status = unsafe {
            let status = lts::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                planned.description,
                a,
                b,
                c,
                c,
                preference,
                most as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            // Results after `count` were not written, and after a failure none were.
            let written = if status.result().is_ok() { count.max(0) as usize } else { 0 };
            found.set_len(written.min(most));
            status
        };
        // SAFETY: made above, and used no more.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        if status != lts::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            status.result().map_err(unplanned)?;
        }
        let usable = found.into_iter().filter(|found| found.state.result().is_ok());
        Ok(usable.map(|found| found.algo).collect())
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        if self.gpu.wait(Stream::Main).is_err() {
            return;
        }
        self.planned().clear();
        // SAFETY: it was made here and is used no more.
        let _ = unsafe { lt::destroy_handle(self.handle.0) };
    }
}

impl Precision {
    /// Bytes of an operand's and of the result's elements.
    pub fn bytes(self) -> (usize, usize) {
        match self {
            Self::HalfToHalf => (2, 2),
            Self::HalfToFloat => (2, 4),
            Self::Float | Self::Tensor32 => (4, 4),
            Self::Int8 => (1, 4),
            Self::Fp8 => (1, 2),
        }
    }

    /// Types of the operands and of the result, how sums are made, and the type of factors.
    fn types(self) -> (DataType, DataType, Compute, DataType) {
        let (half, float) = (DataType::CUDA_R_16F, DataType::CUDA_R_32F);
        let (input, output, compute) = match self {
            Self::HalfToHalf => (half, half, Compute::CUBLAS_COMPUTE_32F),
            Self::HalfToFloat => (half, float, Compute::CUBLAS_COMPUTE_32F),
            Self::Float => (float, float, Compute::CUBLAS_COMPUTE_32F),
            Self::Tensor32 => (float, float, Compute::CUBLAS_COMPUTE_32F_FAST_TF32),
            Self::Int8 => (DataType::CUDA_R_8I, DataType::CUDA_R_32I, Compute::CUBLAS_COMPUTE_32I),
            Self::Fp8 => (DataType::CUDA_R_8F_E4M3, half, Compute::CUBLAS_COMPUTE_32F),
        };
        let scale = if self == Self::Int8 { output } else { float };
        (input, output, compute, scale)
    }
}

fn unplanned(error: lt::CublasError) -> Error {
    failed("choosing a kernel of cuBLASLt", error)
}

fn failed(call: &str, error: lt::CublasError) -> Error {
    Error::machine(format!("{call} failed: {error}"))
        .hint("`nvidia-smi` says whether the GPU is well; or run with --device cpu")
}
