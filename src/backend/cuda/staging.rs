/*! Page-locked memory in two halves: while the device copies one, the host fills or empties the other. */

use std::sync::Arc;

use rayon::prelude::*;

use super::gpu::{Buffer, Gpu, Mark, Pinned, Stream};
use crate::Result;

/// Bytes of a half: long enough that a copy's start costs nothing beside it.
const HALF_BYTES: usize = 32 << 20;
/// Bytes that a thread copies at once between ordinary and page-locked memory.
const PART_BYTES: usize = 1 << 20;

/// Two halves of page-locked memory, and the stream their copies go to.
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    halves: [Pinned; 2],
    stream: Stream,
}

impl Staging {
    pub(super) fn new(gpu: Arc<Gpu>, stream: Stream) -> Result<Self> {
        let halves = [gpu.pinned(HALF_BYTES)?, gpu.pinned(HALF_BYTES)?];
        Ok(Self { gpu, halves, stream })
    }

    /// Copies `from`, which may lie in a file's map, to a buffer that was made for this stream; returns
    /// when it is there.
    pub(super) fn upload(&mut self, from: &[u8], to: &Buffer) -> Result<()> {
        for (index, part) in from.chunks(HALF_BYTES).enumerate() {
            let half = &mut self.halves[index % 2];
            half.as_mut_slice()[..part.len()]
                .par_chunks_mut(PART_BYTES)
                .zip(part.par_chunks(PART_BYTES))
                .for_each(|(to, from)| to.copy_from_slice(from));
            // The former copy, out of the other half, ran while this half was filled.
            self.gpu.wait(self.stream)?;
            to.copy_up(index * HALF_BYTES, &self.halves[index % 2], part.len(), self.stream)?;
        }
        self.gpu.wait(self.stream)
    }

    /// What is downloaded from now on comes after the mark.
    pub(super) fn after(&self, mark: &Mark) -> Result<()> {
        self.gpu.after(mark, self.stream)
    }

    /// Copies bytes `first..` of `from` to the host.
    pub(super) fn download(&mut self, from: &Buffer, first: usize, to: &mut [u8]) -> Result<()> {
        let mut before: Option<(usize, &mut [u8])> = None;
        for (index, part) in to.chunks_mut(HALF_BYTES).enumerate() {
            let at = first + index * HALF_BYTES;
            self.gpu.wait(self.stream)?;
            from.copy_down(at, &mut self.halves[index % 2], part.len(), self.stream)?;
            if let Some((half, part)) = before.replace((index % 2, part)) {
                empty(&self.halves[half], part);
            }
        }
        self.gpu.wait(self.stream)?;
        if let Some((half, part)) = before {
            empty(&self.halves[half], part);
        }
        Ok(())
    }
}

fn empty(half: &Pinned, to: &mut [u8]) {
    let from = &half.as_slice()[..to.len()];
    to.par_chunks_mut(PART_BYTES)
        .zip(from.par_chunks(PART_BYTES))
        .for_each(|(to, from)| to.copy_from_slice(from));
}
