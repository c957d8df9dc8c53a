/*! `measure.cu`: plain reads and copies, and random operands. */

use super::{Defines, Family, THREADS, declared, defines, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Loads of 16 bytes that a thread has in flight.
pub(in crate::backend::cuda) const LOADS: usize = 8;

pub(super) const FAMILY: Family = Family {
    name: "measure",
    source: source!("measure"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| vec![constants()],
    kernels: declared![ReadMemory, CopyMemory, RandomValues],
};

fn constants() -> Defines {
    defines! { "LOADS": LOADS }
}

kernel! {
    /// Reads `count` times 16 bytes.
    ReadMemory<'a> = ["read"] {
        from: In<'a, [u32; 4]>[count as usize],
        count: i64,
        sums: Out<'a, u32>[geometry.grid.0],
    }
    launch { geometry: Geometry }
}

impl Launch for ReadMemory<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        constants()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

kernel! {
    /// Copies `count` times 16 bytes.
    CopyMemory<'a> = ["copy"] {
        from: In<'a, [u32; 4]>[count as usize],
        count: i64,
        to: Out<'a, [u32; 4]>[count as usize],
    }
    launch { geometry: Geometry }
}

impl Launch for CopyMemory<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        constants()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

kernel! {
    /// Random values.
    RandomValues<'a> = ["random_half", "random_int8", "random_fp8"] {
        to: Out<'a, u32>[words],
        words: usize,
        seed: u32,
    }
    launch { entry: usize }
}

impl Launch for RandomValues<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        self.entry
    }

    fn constants(&self) -> Defines {
        constants()
    }

    fn geometry(&self) -> Geometry {
        Geometry::over(self.words, THREADS)
    }
}
