/*! One GPU: its context, its streams, its memory.

Work goes to one stream, `main`, in the order of the calls; memory comes from the driver's pool in
that order too, so a buffer that is dropped can be reused by what comes after without waiting. Two
more streams copy: `up` for weights that are read ahead, `down` for results that are written back. */

mod buffer;
mod scratch;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cudarc::driver::result::{self, mem_pool};
use cudarc::driver::sys::{self, CUdevice_attribute, CUmemPool_attribute, CUresult, CUstream};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};

pub(super) use buffer::PendingCopy;
pub use buffer::{Buffer, Pinned};
pub(super) use scratch::Scratch;

use super::deferred_errors::DeferredErrors;
use super::driver_error::failed;
use super::libraries::Device;
use super::slice::Out;
use crate::{Error, Result};

/// A GPU that was opened.
pub struct Gpu {
    /// What it is.
    pub device: Device,
    deferred: DeferredErrors,
    /// Its multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a thread block may take.
    pub block_shared_bytes: usize,
    context: Arc<CudaContext>,
    main: Arc<CudaStream>,
    up: Arc<CudaStream>,
    down: Arc<CudaStream>,
    pool: Pool,
    /// Bytes that buffers may take together.
    limit_bytes: AtomicU64,
    /// Where buffers of the main stream come from and go to while work is recorded; none otherwise.
    recording: Mutex<Option<Scratch>>,
    used_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    /// Seconds of each kernel, where they are timed.
    trace: Option<Mutex<BTreeMap<String, f64>>>,
}

/// The environment variable that has every kernel timed. Each is synchronized, so that all is slower.
pub const TRACE_VARIABLE: &str = "ATOM_GPU_TRACE";

/// The device's memory pool.
#[derive(Clone, Copy)]
struct Pool(sys::CUmemoryPool);

// SAFETY: a handle of the driver, whose calls may come from any thread; the pool lives as long as the device.
unsafe impl Send for Pool {}
// SAFETY: the handle is only read; the driver's calls on a pool may come from several threads.
unsafe impl Sync for Pool {}

/// A position in the main stream's work.
pub struct Mark(CudaEvent);

/// Which stream a copy goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Where kernels run.
    Main,
    /// To the device, at the same time as kernels.
    Up,
    /// From the device, at the same time as kernels.
    Down,
}

impl Gpu {
    /// Opens a device. `limit_bytes` bounds what buffers may take; none for all that is free.
    ///
    /// # Errors
    /// A machine error if the context cannot be made or the limit is more than what is free.
    pub fn open(device: Device, limit_bytes: Option<u64>) -> Result<Arc<Self>> {
        let failed = |what: &str, error| failed(what, error);
        let context = CudaContext::new(device.ordinal)
            .map_err(|error| failed("opening the device", error))?;
        // SAFETY: buffers are ordered by streams and events of our own.
        unsafe { context.disable_event_tracking() };
        let stream = || context.new_stream().map_err(|error| failed("cuStreamCreate", error));
        let (main, up, down) = (stream()?, stream()?, stream()?);
        // SAFETY: the device is the context's.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }
            .map_err(|error| failed("cuDeviceGetDefaultMemPool", error))?;
        let set = |attribute, value: *mut c_void| {
            // SAFETY: each attribute is given as the number it is.
            unsafe { sys::cuMemPoolSetAttribute(pool, attribute, value) }
                .result()
                .map_err(|error| failed("cuMemPoolSetAttribute", error))
        };
        // Memory stays in the pool until it is trimmed.
        let mut keep = u64::MAX;
        set(CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut keep).cast())?;
        // A copy does not reuse memory that kernels may still use: it would wait for them.
        let mut wait = 0i32;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;
        set(attribute, (&raw mut wait).cast())?;
        let attribute = |attribute| {
            let value = context.attribute(attribute);
            value.map(|value| value as usize).map_err(|error| failed("cuDeviceGetAttribute", error))
        };
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let block_shared_bytes =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let (free, _) = result::mem_get_info().map_err(|error| failed("cuMemGetInfo", error))?;
        let free = free as u64;
        if let Some(limit) = limit_bytes.filter(|limit| *limit > free) {
            return Err(Error::machine(format!(
                "{} was to use {limit} bytes of its memory, but {free} are free",
                device.name
            ))
            .hint("ask for less with --gpu-memory, or end what else uses the GPU"));
        }
        Ok(Arc::new(Self {
            device,
            deferred: DeferredErrors::new()?,
            multiprocessors,
            block_shared_bytes,
            context,
            main,
            up,
            down,
            pool: Pool(pool),
            limit_bytes: AtomicU64::new(limit_bytes.unwrap_or(free)),
            recording: Mutex::new(None),
            used_bytes: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            trace: std::env::var_os(TRACE_VARIABLE).map(|_| Mutex::default()),
        }))
    }

    /// Makes the calling thread use this GPU.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| failed("cuCtxSetCurrent", error))
    }

    fn own(&self, stream: Stream) -> &CudaStream {
        match stream {
            Stream::Main => &self.main,
            Stream::Up => &self.up,
            Stream::Down => &self.down,
        }
    }

    /// The stream of the kernels.
    pub(super) fn main(&self) -> &Arc<CudaStream> {
        &self.main
    }

    /// A stream's handle.
    pub fn stream(&self, stream: Stream) -> CUstream {
        self.own(stream).cu_stream()
    }

    /// Returns when all work of a stream is done.
    ///
    /// # Errors
    /// The driver's; where kernels are done, an input error if one has found activations that are not finite.
    pub fn wait(&self, stream: Stream) -> Result<()> {
        if stream != Stream::Main {
            return self.synchronize(stream);
        }
        // What another thread issues from now on may not be done when the stream is.
        let done = self.deferred.take();
        self.synchronize(stream)?;
        self.deferred.settle(done)
    }

    /// Where a kernel of the main stream that quantizes a site's activations stores which row is not finite; [`wait`](Self::wait)
    /// returns it as an error.
    pub(super) fn error_flag(&self, site: &str) -> Result<Out<'_, u32>> {
        loop {
            if let Some(flag) = self.deferred.flag(site) {
                return Ok(flag);
            }
            self.wait(Stream::Main)?;
        }
    }

    /// The deferred errors of kernels that were issued since the main stream was waited for: the owner of a record takes their
    /// errors alone.
    pub(super) fn deferred(&self) -> &DeferredErrors {
        &self.deferred
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`, whose context is current.
        unsafe { result::stream::synchronize(self.stream(stream)) }
            .map_err(|error| failed("a kernel or copy", error))
    }

    /// A mark after all work of the main stream so far.
    pub fn mark(&self) -> Result<Mark> {
        self.main.record_event(None).map(Mark).map_err(|error| failed("cuEventRecord", error))
    }

    /// Work of `stream` from now on comes after the mark.
    pub fn after(&self, mark: &Mark, stream: Stream) -> Result<()> {
        self.own(stream).wait(&mark.0).map_err(|error| failed("cuStreamWaitEvent", error))
    }

    /// Issues work to the main stream; where kernels are timed, waits for it and adds its seconds.
    pub fn traced(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(trace) = &self.trace else { return work() };
        self.wait(Stream::Main)?;
        let start = Instant::now();
        work()?;
        self.wait(Stream::Main)?;
        let mut trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
        *trace.entry(name()).or_default() += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Whether every kernel is synchronized.
    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// Seconds of each kernel so far, where they are timed.
    pub fn kernel_seconds(&self) -> Vec<(String, f64)> {
        let Some(trace) = &self.trace else { return Vec::new() };
        let trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
        trace.iter().map(|(name, seconds)| (name.clone(), *seconds)).collect()
    }

    /// Bytes that buffers may take together.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// Bounds what buffers may take together from now on.
    pub fn bound(&self, bytes: u64) {
        self.limit_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Most bytes that buffers took together.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that buffers take together.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Has [`peak_bytes`](Self::peak_bytes) begin again at what is in use.
    pub fn restart_peak(&self) {
        self.peak_bytes.store(self.used_bytes(), Ordering::Relaxed);
    }

    /// Uninitialized memory for the main stream, at least 16 bytes.
    ///
    /// # Errors
    /// A machine error with what was needed and what was there.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        self.alloc_on(Stream::Main, bytes)
    }

    /// Uninitialized memory that a stream uses first; the main stream may use it when that is done.
    pub fn alloc_on(self: &Arc<Self>, stream: Stream, bytes: usize) -> Result<Buffer> {
        self.bind()?;
        let bytes = bytes.next_multiple_of(16).max(16);
        if stream == Stream::Main
            && let Some(pointer) = self.recorded(|scratch| scratch.take(bytes))
        {
            return Ok(Buffer { gpu: Arc::clone(self), pointer, bytes });
        }
        let used = self.used_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let allocated = if used > self.limit_bytes() {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        } else {
            // SAFETY: the stream lives as long as `self`, whose context is current.
            unsafe { result::malloc_async(self.stream(stream), bytes) }.or_else(|_| {
                // Memory that other sizes have left in the pool may suffice in one piece.
                self.trim();
                // SAFETY: the stream lives as long as `self`, whose context is current.
                unsafe { result::malloc_async(self.stream(stream), bytes) }
            })
        };
        match allocated {
            Ok(pointer) => {
                self.peak_bytes.fetch_max(used, Ordering::Relaxed);
                let buffer = Buffer { gpu: Arc::clone(self), pointer, bytes };
                // NaN in every format: what a kernel forgets to write shows in its test.
                if cfg!(test) {
                    buffer.fill(0xff, stream)?;
                }
                Ok(buffer)
            }
            Err(error) => {
                self.used_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
                Err(self.no_memory(bytes as u64, used - bytes as u64, error))
            }
        }
    }

    fn no_memory(&self, needed: u64, used: u64, error: DriverError) -> Error {
        if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return failed("cuMemAllocAsync", error);
        }
        Error::machine(format!(
            "{} has too little memory: {needed} bytes were needed in addition to {used} in use, {} may be used",
            self.device.name,
            self.limit_bytes()
        ))
        .hint("use fewer --samples, end what else uses the GPU, or run with --device cpu")
    }

    /// Returns unused memory to the driver.
    pub fn trim(&self) {
        if self.synchronize(Stream::Main).is_ok() {
            // SAFETY: the pool is the device's. A failure leaves the pool as it was.
            let _ = unsafe { mem_pool::trim_to(self.pool.0, 0) };
        }
    }

    /// Memory of zeros.
    pub fn zeros(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let buffer = self.alloc(bytes)?;
        buffer.fill(0, Stream::Main)?;
        Ok(buffer)
    }

    /// A copy of host values. Returns when they may be changed.
    pub fn upload<T: bytemuck::Pod>(self: &Arc<Self>, values: &[T]) -> Result<Buffer> {
        let buffer = self.alloc(size_of_val(values))?;
        if !values.is_empty() {
            // SAFETY: the buffer is as large, and pageable memory is staged before the call returns.
            unsafe { result::memcpy_htod_async(buffer.pointer, values, self.main.cu_stream()) }
                .map_err(|error| failed("cuMemcpyHtoDAsync", error))?;
        }
        Ok(buffer)
    }

    /// Pinned host memory, nothing of it written.
    pub fn pinned(self: &Arc<Self>, bytes: usize) -> Result<Pinned> {
        self.bind()?;
        // SAFETY: the context is current.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| {
            failed(&format!("allocating {bytes} bytes of pinned host memory"), error)
        })?;
        Ok(Pinned { gpu: Arc::clone(self), pointer: pointer.cast(), bytes, written: 0 })
    }
}
