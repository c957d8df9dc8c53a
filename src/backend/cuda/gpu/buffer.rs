//! Device memory, pinned host memory, and copies between them.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr};
use rayon::prelude::*;

use super::{Gpu, Stream, failed};
use crate::Result;

/// Device memory, returned to the pool when dropped.
pub struct Buffer {
    pub(super) gpu: Arc<Gpu>,
    pub(super) pointer: CUdeviceptr,
    pub(super) bytes: usize,
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
        // SAFETY: the pointer is that of `self.bytes` bytes, which are freed in stream order, so after this.
        unsafe { result::memset_d8_async(self.pointer, byte, self.bytes, self.gpu.stream(stream)) }
            .map_err(|error| failed("cuMemsetD8Async", error))
    }

    /// The values in a range of bytes, after all work of the main stream so far.
    pub fn download<T: bytemuck::Pod>(&self, range: Range<usize>) -> Result<Vec<T>> {
        self.download_on(Stream::Main, range)
    }

    /// The values in a range of bytes, after all work of a stream so far.
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

    /// Overwrites its first bytes, after all work of the main stream so far. Returns when the values may be changed.
    pub(in crate::backend::cuda) fn write<T: bytemuck::Pod>(&self, values: &[T]) -> Result<()> {
        self.write_at(0, values)
    }

    /// Overwrites the bytes from `offset` on, as [`write`](Self::write) does the first.
    pub(in crate::backend::cuda) fn write_at<T: bytemuck::Pod>(
        &self,
        offset: usize,
        values: &[T],
    ) -> Result<()> {
        self.gpu.bind()?;
        assert!(offset + size_of_val(values) <= self.bytes);
        if values.is_empty() {
            return Ok(());
        }
        let to = self.pointer + offset as u64;
        // SAFETY: the buffer is as large, and pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(to, values, self.gpu.main.cu_stream()) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", error))
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
    pub(in crate::backend::cuda) fn copy_up(
        &self,
        offset: usize,
        from: Pinned,
        stream: Stream,
    ) -> Result<PendingCopy<'_>> {
        self.start_up(offset, &from, stream)?;
        Ok(PendingCopy { pinned: Some(from), written: None, stream, buffer: self })
    }

    /// Copies what is written of pinned memory to `offset`, on the main stream, and returns when that is done.
    pub(in crate::backend::cuda) fn copy_all_up(&self, offset: usize, from: &Pinned) -> Result<()> {
        let started = self.start_up(offset, from, Stream::Main);
        // Also after a failure: the driver may read `from` until then.
        self.gpu.wait(Stream::Main).and(started)
    }

    fn start_up(&self, offset: usize, from: &Pinned, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        let from = from.as_slice();
        assert!(offset + from.len() <= self.bytes);
        let to = self.pointer + offset as u64;
        // SAFETY: the buffer holds so many bytes after the offset; the callers keep `from` until the copy is done.
        unsafe { result::memcpy_htod_async(to, from, self.gpu.stream(stream)) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", error))
    }

    /// Starts a copy of `bytes` from `offset` to pinned memory, on a stream.
    pub(in crate::backend::cuda) fn copy_down(
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
pub(in crate::backend::cuda) struct PendingCopy<'a> {
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
    pub(in crate::backend::cuda) fn wait(mut self) -> Result<Pinned> {
        self.buffer.gpu.wait(self.stream)?;
        let mut pinned = self.pinned.take().expect("taken here alone");
        pinned.written = self.written.unwrap_or(pinned.written);
        Ok(pinned)
    }
}

impl Drop for PendingCopy<'_> {
    fn drop(&mut self) {
        if self.pinned.is_some() {
            // A failure means that the device is lost, or that a kernel found an error: the copy is no longer in flight.
            let _ = self.buffer.gpu.synchronize(self.stream);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.recorded(|scratch| scratch.put(self.bytes, self.pointer)).is_some() {
            return;
        }
        self.gpu.free(self.pointer, self.bytes);
    }
}

impl Gpu {
    /// Returns memory to the pool after all work of the main stream so far.
    pub(super) fn free(&self, pointer: CUdeviceptr, bytes: usize) {
        self.used_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
        if self.bind().is_ok() {
            // SAFETY: the memory is the caller's, and work on it was issued to this stream before. A failure
            // shows at the next call, since the device is lost then.
            let _ = unsafe { result::free_async(pointer, self.main.cu_stream()) };
        }
    }
}

/// Pinned host memory: copies between it and the device are asynchronous.
pub struct Pinned {
    pub(super) gpu: Arc<Gpu>,
    pub(super) pointer: *mut u8,
    pub(super) bytes: usize,
    /// Bytes from the first on that were written.
    pub(super) written: usize,
}

// SAFETY: pinned memory belongs to the process, not to a thread, and this is its only owner.
unsafe impl Send for Pinned {}
// SAFETY: shared references cannot write.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Bytes of a task.
    const PART_BYTES: usize = 1 << 20;

    /// Writes its first bytes, which are then all that is written.
    pub(in crate::backend::cuda) fn write(&mut self, from: &[u8]) {
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
    pub(in crate::backend::cuda) fn read(&self, to: &mut [u8]) {
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
