/*! Memory of recorded work. A graph has the addresses of its buffers in it, so these are taken once and stay as long as the
graph. While work is recorded, buffers of the main stream come from here and return here: taken from the driver's pool, each
would become two nodes of the graph, and programmatic dependent launch does not reach over them. */

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use cudarc::driver::sys::CUdeviceptr;

use super::Gpu;

/// Buffers of the main stream that are free, by their bytes. One stream uses them all, in order, so one can follow
/// another in the same memory.
pub(in crate::backend::cuda) struct Scratch {
    gpu: Arc<Gpu>,
    free: HashMap<usize, Vec<CUdeviceptr>>,
}

impl Scratch {
    pub(super) fn take(&mut self, bytes: usize) -> Option<CUdeviceptr> {
        self.free.get_mut(&bytes)?.pop()
    }

    pub(super) fn put(&mut self, bytes: usize, pointer: CUdeviceptr) -> Option<()> {
        self.free.entry(bytes).or_default().push(pointer);
        Some(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for (bytes, pointers) in self.free.drain() {
            pointers.into_iter().for_each(|pointer| self.gpu.free(pointer, bytes));
        }
    }
}

impl Gpu {
    /// Has buffers of the main stream come from and return to a scratch memory, until [`end_recording`](Self::end_recording).
    pub(in crate::backend::cuda) fn begin_recording(self: &Arc<Self>) {
        let scratch = Scratch { gpu: Arc::clone(self), free: HashMap::new() };
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(scratch);
    }

    /// The scratch memory of what was recorded, which has to live as long as the record; none if nothing was begun.
    pub(in crate::backend::cuda) fn end_recording(&self) -> Option<Scratch> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What `work` finds in the scratch memory; none where nothing is recorded.
    pub(super) fn recorded<T>(&self, work: impl FnOnce(&mut Scratch) -> Option<T>) -> Option<T> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(work)
    }
}
