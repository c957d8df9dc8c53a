/*! Pinned memory in two halves: while the device copies one, the host fills or empties the other. */

use std::sync::Arc;

use super::gpu::{Buffer, Gpu, Mark, PendingCopy, Pinned, Stream};
use crate::Result;

/// Bytes of a half: long enough that a copy's start costs nothing compared with it.
const HALF_BYTES: usize = 32 << 20;

/// Two halves of pinned memory, and the stream their copies go to.
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    /// Those that no copy owns.
    free: Vec<Pinned>,
    stream: Stream,
}

impl Staging {
    pub(super) fn new(gpu: Arc<Gpu>, stream: Stream) -> Result<Self> {
        let free = vec![gpu.pinned(HALF_BYTES)?, gpu.pinned(HALF_BYTES)?];
        Ok(Self { gpu, free, stream })
    }

    /// A half that no copy owns; a new one after a failure that has cost one.
    fn half(&mut self) -> Result<Pinned> {
        self.free.pop().map_or_else(|| self.gpu.pinned(HALF_BYTES), Ok)
    }

    /// Copies `from`, which may lie in a file's map, to a buffer that was made for this stream; returns
    /// when it is there.
    pub(super) fn upload(&mut self, from: &[u8], to: &Buffer) -> Result<()> {
        let mut pending: Option<PendingCopy<'_>> = None;
        for (index, part) in from.chunks(HALF_BYTES).enumerate() {
            let mut half = self.half()?;
            half.write(part);
            // The former copy, out of the other half, ran while this half was filled.
            if let Some(copy) = pending.take() {
                self.free.push(copy.wait()?);
            }
            pending = Some(to.copy_up(index * HALF_BYTES, half, self.stream)?);
        }
        if let Some(copy) = pending {
            self.free.push(copy.wait()?);
        }
        Ok(())
    }

    /// What is downloaded from now on comes after the mark.
    pub(super) fn after(&self, mark: &Mark) -> Result<()> {
        self.gpu.after(mark, self.stream)
    }

    /// Copies bytes `first..` of `from` to the host.
    pub(super) fn download(&mut self, from: &Buffer, first: usize, to: &mut [u8]) -> Result<()> {
        let mut before: Option<(PendingCopy<'_>, &mut [u8])> = None;
        for (index, part) in to.chunks_mut(HALF_BYTES).enumerate() {
            let filled = match before.take() {
                Some((copy, part)) => Some((copy.wait()?, part)),
                None => None,
            };
            let half = self.half()?;
            let copy = from.copy_down(first + index * HALF_BYTES, half, part.len(), self.stream)?;
            before = Some((copy, part));
            // While the next half is filled.
            if let Some((half, part)) = filled {
                half.read(part);
                self.free.push(half);
            }
        }
        if let Some((copy, part)) = before {
            let half = copy.wait()?;
            half.read(part);
            self.free.push(half);
        }
        Ok(())
    }
}
