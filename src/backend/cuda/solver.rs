/*! Cholesky factorizations by cuSOLVER.

Everything here is row-major for its callers; the library is column-major. */

use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cusolver as sys;
use super::gpu::{Buffer, Gpu, Stream};
use super::slice::In;
use crate::{Error, Result};

/// The library, opened for a device.
pub struct Solver {
    gpu: Arc<Gpu>,
    handle: Mutex<SolverHandle>,
}

/// cuSOLVER's handle, which one thread may use at a time.
struct SolverHandle(sys::Handle);

// SAFETY: cuSOLVER's manual ties the handle to a context, not to a thread; the lock keeps uses apart.
unsafe impl Send for SolverHandle {}

impl Solver {
    /// Opens the library, which must be there.
    pub fn new(gpu: Arc<Gpu>) -> Result<Self> {
        gpu.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is there; the call writes one handle.
        let made = unsafe { (sys::calls().create)(&mut handle) };
        solved("cusolverDnCreate", made)?;
        // SAFETY: handle and stream are alive.
        let set = unsafe { (sys::calls().set_stream)(handle, gpu.stream(Stream::Main)) };
        solved("cusolverDnSetStream", set)?;
        Ok(Self { gpu, handle: Mutex::new(SolverHandle(handle)) })
    }

    fn handle(&self) -> MutexGuard<'_, SolverHandle> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the lower triangle of `matrix` `[n, n]` (row-major) by `L`, `L L^T = matrix`; false if
    /// it is not positive definite.
    pub fn cholesky(&self, matrix: &Buffer, n: usize) -> Result<bool> {
        self.gpu.bind()?;
        // Row-major and lower is column-major and upper.
        let upper = sys::UPPER;
        let size = i32::try_from(n)
            .map_err(|_| Error::machine(format!("a Hessian of {n} channels is too large")))?;
        assert!(In::<f32>::from(matrix).holds(n * n), "a matrix of {n} x {n}");
        let pointer = matrix.pointer() as *mut f32;
        let handle = self.handle();
        let mut work = 0;
        // SAFETY: the matrix holds n * n values; the call writes one integer.
        let queried = unsafe {
            (sys::calls().spotrf_buffer_size)(handle.0, upper, size, pointer, size, &mut work)
        };
        solved("cusolverDnSpotrf_bufferSize", queried)?;
        let workspace = self.gpu.alloc(4 * work.max(1) as usize)?;
        let info = self.gpu.zeros(4)?;
        // SAFETY: workspace and info are as large as the library requires.
        let factorize = || unsafe {
            (sys::calls().spotrf)(
                handle.0,
                upper,
                size,
                pointer,
                size,
                workspace.pointer() as *mut f32,
                work,
                info.pointer() as *mut i32,
            )
        };
        let name = || format!("cholesky {n}");
        self.gpu.traced(name, || solved("cusolverDnSpotrf", factorize()))?;
        Ok(info.download::<i32>(0..4)?[0] == 0)
    }

    /// Replaces each row `b` of `right` `[rows, n]` by `(L L^T)^-1 b`, with `L` the lower triangle of
    /// `factor` `[n, n]` as [`cholesky`](Self::cholesky) leaves it.
    pub fn solve(&self, factor: &Buffer, n: usize, right: &Buffer, rows: usize) -> Result<()> {
        self.gpu.bind()?;
        assert!(In::<f32>::from(factor).holds(n * n), "a factor of {n} x {n}");
        assert!(In::<f32>::from(right).holds(rows * n), "{rows} rows of {n}");
        let handle = self.handle();
        let upper = sys::UPPER;
        let size = |n: usize| {
            i32::try_from(n).map_err(|_| Error::machine(format!("{n} channels are too many")))
        };
        let (n, rows) = (size(n)?, size(rows)?);
        let info = self.gpu.zeros(4)?;
        // SAFETY: the buffers hold n * n and rows * n values; the call writes one integer.
        let solve = || unsafe {
            (sys::calls().spotrs)(
                handle.0,
                upper,
                n,
                rows,
                factor.pointer() as *const f32,
                n,
                right.pointer() as *mut f32,
                n,
                info.pointer() as *mut i32,
            )
        };
        let name = || format!("solve {n}");
        self.gpu.traced(name, || solved("cusolverDnSpotrs", solve()))
    }
}

impl Drop for Solver {
    fn drop(&mut self) {
        if self.gpu.wait(Stream::Main).is_ok() {
            // SAFETY: it was made here and is used no more.
            let _ = unsafe { (sys::calls().destroy)(self.handle().0) };
        }
    }
}

fn solved(call: &str, status: sys::Status) -> Result<()> {
    if status == sys::SUCCESS {
        return Ok(());
    }
    Err(Error::machine(format!("{call} failed: {}", sys::status_name(status)))
        .hint("`nvidia-smi` says whether the GPU is well; or run with --device cpu"))
}
