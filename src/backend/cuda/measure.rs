/*! Random operands on the device, and plain reads and copies of memory, none of which allocates. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::measure::{CopyMemory, LOADS, RandomValues, ReadMemory};
use super::launch::Geometry;
use super::slice::{In, Out};
use super::tensor::{Activation, Weight};
use crate::Result;
use crate::checkpoint::Dtype;

/// How a read or a copy is spread over the device. The best differs with what is read, so that a rate is that of
/// the fastest.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Threads of a block.
    threads: usize,
    /// Blocks per SM; none for as many as it takes that each thread loads 8 times 16 bytes.
    blocks_per_sm: Option<usize>,
}

/// Spreads to choose from.
pub const SPREADS: [Spread; 6] = [
    Spread { threads: 256, blocks_per_sm: None },
    Spread { threads: 512, blocks_per_sm: None },
    Spread { threads: 1024, blocks_per_sm: None },
    Spread { threads: 256, blocks_per_sm: Some(4) },
    Spread { threads: 512, blocks_per_sm: Some(2) },
    Spread { threads: 512, blocks_per_sm: Some(4) },
];

/// Kinds of random values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Random {
    /// f16, even in -1..1.
    Half,
    /// INT8, even.
    Int8,
    /// E4M3 below 4, even within each power of two.
    Fp8,
}

impl Cuda {
    /// Random values of so many bytes, the same for the same seed.
    pub fn random(&self, kind: Random, bytes: usize, seed: usize) -> Result<Buffer> {
        let buffer = self.gpu.alloc(bytes)?;
        let words = buffer.bytes() / 4;
        let seed = u32::try_from(seed).expect("a seed of 32 bits");
        let entry = kind as usize;
        self.kernels.launch(&RandomValues { to: (&buffer).into(), words, seed, entry })?;
        Ok(buffer)
    }

    /// Random activations in f16.
    pub fn random_activations(
        &self,
        rows: usize,
        columns: usize,
        seed: usize,
    ) -> Result<Activation> {
        let data = self.random(Random::Half, 2 * rows * columns, seed)?;
        Ok(Activation::new(rows, columns, data))
    }

    /// A random weight in f16.
    pub fn random_weight(&self, rows: usize, columns: usize, seed: usize) -> Result<Weight> {
        let data = self.random(Random::Half, 2 * rows * columns, seed)?.into();
        Ok(Weight { rows, columns, dtype: Dtype::F16, data })
    }

    /// Reads `bytes` of `from` at `offset`, both multiples of 16; `sums` holds a word for each block.
    pub fn read(
        &self,
        from: &Buffer,
        offset: usize,
        bytes: usize,
        spread: Spread,
        sums: &Buffer,
    ) -> Result<()> {
        let geometry = self.spread(spread, bytes)?;
        assert!(offset + bytes <= from.bytes() && 4 * geometry.grid.0 <= sums.bytes());
        let from = In::from(from).skip(offset / 16);
        self.kernels.launch(&ReadMemory {
            from,
            count: (bytes / 16) as i64,
            sums: sums.into(),
            geometry,
        })
    }

    /// Copies `bytes` of `from` at `offset`, both multiples of 16, to the same offset of `to`.
    pub fn copy(
        &self,
        from: &Buffer,
        offset: usize,
        bytes: usize,
        spread: Spread,
        to: &Buffer,
    ) -> Result<()> {
        let geometry = self.spread(spread, bytes)?;
        assert!(offset + bytes <= from.bytes().min(to.bytes()));
        let from = In::from(from).skip(offset / 16);
        let to = Out::from(to).skip(offset / 16);
        self.kernels.launch(&CopyMemory { from, count: (bytes / 16) as i64, to, geometry })
    }

    fn spread(&self, spread: Spread, bytes: usize) -> Result<Geometry> {
        let Spread { threads, blocks_per_sm } = spread;
        let needed = (bytes / 16).div_ceil(threads * LOADS).max(1);
        let blocks = match blocks_per_sm {
            Some(blocks) => (blocks * self.gpu.multiprocessors).min(needed),
            None => needed,
        };
        Ok(Geometry::line(blocks, threads))
    }
}
