/*! One GPU: its context, its streams, its memory.

Work goes to one stream, `main`, in the order it is given; memory comes from the driver's pool in
that order too, so a buffer that is dropped can be reused by what comes after without waiting. Two
more streams copy: `up` for weights that are read ahead, `down` for results that are written behind. */

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cudarc::driver::result::{self, mem_pool};
use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUmemPool_attribute, CUresult, CUstream,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError};
use rayon::prelude::*;

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
    limit_bytes: u64,
    used_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    /// Seconds of each kernel, where they are timed.
    trace: Option<Mutex<BTreeMap<String, f64>>>,
}

/// The environment variable that has every kernel timed. Each is waited for, so the whole is slower.
pub const TRACE_VARIABLE: &str = "ATOM_GPU_TRACE";

/// The device's memory pool.
#[derive(Clone, Copy)]
struct Pool(sys::CUmemoryPool);

// SAFETY: a handle of the driver, whose calls may come from any thread; the pool lives as long as the device.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// A place in the main stream's work.
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
        // Memory that kernels may still use is not given to a copy, which would wait for them.
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
            limit_bytes: limit_bytes.unwrap_or(free),
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

    /// Returns when all that a stream was given is done.
    ///
    /// # Errors
    /// The driver's; where kernels are done, an input error if one has found activations that are not finite.
    pub fn wait(&self, stream: Stream) -> Result<()> {
        if stream != Stream::Main {
            return self.synchronize(stream);
        }
        // What another thread asks for from now on may not be done when the stream is.
        let done = self.deferred.take();
        self.synchronize(stream)?;
        self.deferred.settle(done)
    }

    /// Where a kernel of the main stream that quantizes a site's activations says which row is not finite; who waits is
    /// told.
    pub(super) fn error_flag(&self, site: &str) -> Result<Out<'_, u32>> {
        loop {
            if let Some(flag) = self.deferred.flag(site) {
                return Ok(flag);
            }
            self.wait(Stream::Main)?;
        }
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream(stream)) }
            .map_err(|error| failed("a kernel or copy", error))
    }

    /// A mark behind all that the main stream was given so far.
    pub fn mark(&self) -> Result<Mark> {
        self.main.record_event(None).map(Mark).map_err(|error| failed("cuEventRecord", error))
    }

    /// What `stream` is given from now on comes after the mark.
    pub fn after(&self, mark: &Mark, stream: Stream) -> Result<()> {
        self.own(stream).wait(&mark.0).map_err(|error| failed("cuStreamWaitEvent", error))
    }

    /// Gives work to the main stream; where kernels are timed, waits for it and books its seconds.
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

    /// Whether every kernel is waited for.
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
        self.limit_bytes
    }

    /// Most bytes that buffers took together.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
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
        let used = self.used_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let allocated = if used > self.limit_bytes {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        } else {
            // SAFETY: the stream is alive.
            unsafe { result::malloc_async(self.stream(stream), bytes) }.or_else(|_| {
                // Memory that other sizes have left in the pool may do when it is whole again.
                self.trim();
                // SAFETY: as above.
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
            "{} has too little memory: {needed} bytes were needed beside {used} in use, {} may be used",
            self.device.name, self.limit_bytes
        ))
        .hint("use fewer --samples, end what else uses the GPU, or run with --device cpu")
    }

    /// Gives unused memory back to the driver.
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

/// Device memory, given back to the pool when dropped.
pub struct Buffer {
    gpu: Arc<Gpu>,
    pointer: CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// Where it begins.
    pub fn pointer(&self) -> CUdeviceptr {
        self.pointer
    }

    /// How large it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the memory is ours.
        unsafe { result::memset_d8_async(self.pointer, byte, self.bytes, self.gpu.stream(stream)) }
            .map_err(|error| failed("cuMemsetD8Async", error))
    }

    /// The values in a range of bytes, after all that the main stream was given so far.
    pub fn download<T: bytemuck::Pod>(&self, range: Range<usize>) -> Result<Vec<T>> {
        self.download_on(Stream::Main, range)
    }

    /// The values in a range of bytes, after all that a stream was given so far.
    pub fn download_on<T: bytemuck::Pod>(
        &self,
        stream: Stream,
        range: Range<usize>,
    ) -> Result<Vec<T>> {
        self.gpu.bind()?;
        assert!(range.end <= self.bytes && range.len().is_multiple_of(size_of::<T>()));
        let mut values = vec![T::zeroed(); range.len() / size_of::<T>()];
        if !values.is_empty() {
            let from = self.pointer + range.start as u64;
            // SAFETY: the range lies in the buffer, and the values are not touched before the wait.
            unsafe { result::memcpy_dtoh_async(&mut values, from, self.gpu.stream(stream)) }
                .map_err(|error| failed("cuMemcpyDtoHAsync", error))?;
        }
        self.gpu.wait(stream)?;
        Ok(values)
    }

    /// Copies another buffer's first bytes.
    pub fn copy_from(&self, other: &Self, bytes: usize) -> Result<()> {
        self.gpu.bind()?;
        assert!(bytes <= self.bytes && bytes <= other.bytes);
        // SAFETY: both hold so many bytes.
        unsafe {
            let stream = self.gpu.main.cu_stream();
            result::memcpy_dtod_async(self.pointer, other.pointer, bytes, stream)
        }
        .map_err(|error| failed("cuMemcpyDtoDAsync", error))
    }

    /// Starts a copy of what is written of pinned memory to `offset`, on a stream.
    pub(super) fn copy_up(
        &self,
        offset: usize,
        from: Pinned,
        stream: Stream,
    ) -> Result<PendingCopy<'_>> {
        self.start_up(offset, &from, stream)?;
        Ok(PendingCopy { pinned: Some(from), written: None, stream, buffer: self })
    }

    /// Copies what is written of pinned memory to `offset`, on the main stream, and returns when that is done.
    pub(super) fn copy_all_up(&self, offset: usize, from: &Pinned) -> Result<()> {
        let started = self.start_up(offset, from, Stream::Main);
        // Also after a failure: the driver may read `from` until then.
        self.gpu.wait(Stream::Main).and(started)
    }

    fn start_up(&self, offset: usize, from: &Pinned, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        let from = from.as_slice();
        assert!(offset + from.len() <= self.bytes);
        let to = self.pointer + offset as u64;
        // SAFETY: the buffer holds so many bytes behind the offset; the callers keep `from` until the copy is done.
        unsafe { result::memcpy_htod_async(to, from, self.gpu.stream(stream)) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", error))
    }

    /// Starts a copy of `bytes` from `offset` to pinned memory, on a stream.
    pub(super) fn copy_down(
        &self,
        offset: usize,
        to: Pinned,
        bytes: usize,
        stream: Stream,
    ) -> Result<PendingCopy<'_>> {
        self.gpu.bind()?;
        assert!(bytes <= to.bytes && offset + bytes <= self.bytes);
        let from = self.pointer + offset as u64;
        // SAFETY: both hold so many bytes, and the pending copy keeps both until it is done.
        let started = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.pointer.cast(), from, bytes, self.gpu.stream(stream))
        };
        started.result().map_err(|error| failed("cuMemcpyDtoHAsync", error))?;
        Ok(PendingCopy { pinned: Some(to), written: Some(bytes), stream, buffer: self })
    }
}

/// A copy in flight between a buffer and pinned memory, which it owns. Dropping it waits.
#[must_use]
pub(super) struct PendingCopy<'a> {
    pinned: Option<Pinned>,
    /// Bytes that the copy writes of the pinned memory; none where it reads.
    written: Option<usize>,
    stream: Stream,
    buffer: &'a Buffer,
}

impl PendingCopy<'_> {
    /// Waits for the copy; the pinned memory.
    ///
    /// # Errors
    /// The driver's, and as [`Gpu::wait`].
    pub(super) fn wait(mut self) -> Result<Pinned> {
        self.buffer.gpu.wait(self.stream)?;
        let mut pinned = self.pinned.take().expect("taken here alone");
        pinned.written = self.written.unwrap_or(pinned.written);
        Ok(pinned)
    }
}

impl Drop for PendingCopy<'_> {
    fn drop(&mut self) {
        if self.pinned.is_some() {
            // A failure means that the device is lost, or that a kernel found an error: the copy is not under way any more.
            let _ = self.buffer.gpu.synchronize(self.stream);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.used_bytes.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        if self.gpu.bind().is_ok() {
            // SAFETY: the memory is ours, and work on it was given to this stream before. A failure
            // shows at the next call, since the device is lost then.
            let _ = unsafe { result::free_async(self.pointer, self.gpu.main.cu_stream()) };
        }
    }
}

/// Pinned host memory: copies between it and the device are asynchronous.
pub struct Pinned {
    gpu: Arc<Gpu>,
    pointer: *mut u8,
    bytes: usize,
    /// Bytes from the first on that were written.
    written: usize,
}

// SAFETY: it is plain memory, owned.
unsafe impl Send for Pinned {}
// SAFETY: shared references give no way to write.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Bytes that a thread copies at once.
    const PART_BYTES: usize = 1 << 20;

    /// Writes its first bytes, which are then all that is written.
    pub(super) fn write(&mut self, from: &[u8]) {
        assert!(from.len() <= self.bytes);
        // SAFETY: the memory is ours, and bytes that may be uninitialized are what it holds.
        let to = unsafe {
            std::slice::from_raw_parts_mut(self.pointer.cast::<MaybeUninit<u8>>(), from.len())
        };
        to.par_chunks_mut(Self::PART_BYTES).zip(from.par_chunks(Self::PART_BYTES)).for_each(
            |(to, from)| {
                to.write_copy_of_slice(from);
            },
        );
        self.written = from.len();
    }

    /// What is written.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: so many bytes were written, by the host or by a copy that is done.
        unsafe { std::slice::from_raw_parts(self.pointer, self.written) }
    }

    /// Copies what is written.
    pub(super) fn read(&self, to: &mut [u8]) {
        let from = self.as_slice();
        assert_eq!(from.len(), to.len());
        to.par_chunks_mut(Self::PART_BYTES)
            .zip(from.par_chunks(Self::PART_BYTES))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: the memory is ours, and a copy that uses it owns it.
            let _ = unsafe { result::free_host(self.pointer.cast::<c_void>()) };
        }
    }
}
