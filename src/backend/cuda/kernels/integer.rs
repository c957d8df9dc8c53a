/*! `integer.cu`: the integer product on `mma.sync`, for every device and every format. */

use super::{Defines, Family, THREADS, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};
use crate::backend::cuda::tensor::SCALE_MULTIPLE;

/// Tokens and rows of a tile.
const TILE: usize = 128;
/// The same of the kernel for floating-point outliers.
const FLOAT_TILE: usize = 64;
/// Bytes of a row that a stage holds.
const STAGE_WIDTH: usize = 128;

pub(super) const FAMILY: Family = Family {
    name: "integer",
    source: source!("integer"),
    only: None,
    tensor_core: Some("IMMA"),
    pdl: false,
    variants: |_| {
        [
            (128, true, false),
            (64, true, false),
            (16, false, false),
            (48, false, false),
            (176, true, false),
            (10880, false, false),
            (128, true, true),
            (32, false, true),
            (96, false, true),
            (10880, true, true),
        ]
        .map(|(group, half, nibbles)| IntegerProgram { group, half, nibbles }.defines())
        .to_vec()
    },
    kernels: declared![IntegerProduct, AddFloatOutliers, PackNibbles, UnpackNibbles],
};

/// What the file is compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct IntegerProgram {
    pub(in crate::backend::cuda) group: usize,
    /// Whether results are f16 instead of f32.
    pub(in crate::backend::cuda) half: bool,
    /// Whether codes are two a byte.
    pub(in crate::backend::cuda) nibbles: bool,
}

impl IntegerProgram {
    /// Bytes of a group.
    fn unit(&self) -> usize {
        self.group / if self.nibbles { 2 } else { 1 }
    }

    /// A stage holds several groups where they are short.
    fn groups_a_stage(&self) -> usize {
        (STAGE_WIDTH / self.unit()).max(1)
    }

    /// Codes and scales of a tile of tokens and a tile of rows.
    fn stage_bytes(&self) -> usize {
        2 * TILE * STAGE_WIDTH + 2 * self.groups_a_stage() * TILE * 4
    }

    fn stages(&self) -> usize {
        if self.unit() > 64 { 3 } else { 2 }
    }

    fn defines(&self) -> Defines {
        defines! {
            "GROUP": self.group,
            "OUT_HALF": flag(self.half),
            "NIBBLES": flag(self.nibbles),
            "THREADS": THREADS,
            "TILE": TILE,
            "FLOAT_TILE": FLOAT_TILE,
            "UNIT": self.unit(),
            "GROUPS_A_STAGE": self.groups_a_stage(),
            "STAGE_BYTES": self.stage_bytes(),
            "STAGES": self.stages(),
            "SCALE_MULTIPLE": SCALE_MULTIPLE,
        }
    }
}

/// Any program of this file: kernels that are the same in all.
const NIBBLES: IntegerProgram = IntegerProgram { group: 32, half: false, nibbles: true };

kernel! {
    /// `y = x w^T` in the bits of the specification.
    IntegerProduct<'a> = ["integer_product"] {
        x: In<'a, i8>[tokens * groups * program.unit()],
        sx: In<'a, f32>[groups * tokens.next_multiple_of(SCALE_MULTIPLE)],
        xo: Option<In<'a, i8>>[tokens * op],
        sxo: Option<In<'a, f32>>[tokens],
        w: In<'a, i8>[rows * groups * program.unit()],
        sw: In<'a, f32>[groups * rows.next_multiple_of(SCALE_MULTIPLE)],
        wo: Option<In<'a, i8>>[rows * op],
        swo: Option<In<'a, f32>>[rows],
        y: Out<'a, Any>[tokens * rows * if program.half { 2 } else { 4 }],
        tokens: usize,
        rows: usize,
        groups: usize,
        op: usize,
    }
    launch { program: IntegerProgram }
}

impl Launch for IntegerProduct<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        let tiles = self.tokens.div_ceil(TILE) * self.rows.div_ceil(TILE);
        let shared_bytes = self.program.stages() * self.program.stage_bytes();
        Geometry { shared_bytes, ..Geometry::line(tiles, THREADS) }
    }
}

kernel! {
    /// Adds the products of outliers in f16 or FP8.
    AddFloatOutliers<'a> = ["add_float_outliers"] {
        xo: In<'a, f32>[tokens * o],
        wo: Option<In<'a, f32>>[rows * o],
        y: Out<'a, f32>[tokens * rows],
        tokens: usize,
        rows: usize,
        o: usize,
    }
    launch { program: IntegerProgram }
}

impl Launch for AddFloatOutliers<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        let grid = (self.rows.div_ceil(FLOAT_TILE), self.tokens.div_ceil(FLOAT_TILE), 1);
        Geometry::grid(grid, THREADS)
    }
}

kernel! {
    /// Codes two a byte, from bytes.
    PackNibbles<'a> = ["pack_nibbles"] {
        codes: In<'a, [u32; 2]>[words as usize],
        words: i64,
        to: Out<'a, u32>[words as usize],
    }
}

impl Launch for PackNibbles<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        NIBBLES.defines()
    }

    fn geometry(&self) -> Geometry {
        Geometry::over(self.words as usize, THREADS)
    }
}

kernel! {
    /// The way back.
    UnpackNibbles<'a> = ["unpack_nibbles"] {
        from: In<'a, u32>[words as usize],
        words: i64,
        codes: Out<'a, [u32; 2]>[words as usize],
    }
}

impl Launch for UnpackNibbles<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        NIBBLES.defines()
    }

    fn geometry(&self) -> Geometry {
        Geometry::over(self.words as usize, THREADS)
    }
}
