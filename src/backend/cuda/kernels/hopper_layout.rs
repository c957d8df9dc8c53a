/*! `hopper_layout.cu`: what the products for Hopper read, from rows of codes, and back. */

use half::f16;

use super::{Defines, Family, THREADS, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Slots of a panel.
pub(in crate::backend::cuda) const PANEL: usize = 128;
/// Tokens are padded to a multiple of so many where codes are tiled.
const TOKEN_MULTIPLE: usize = 8;
/// Groups whose scales lie next to each other.
pub(in crate::backend::cuda) const SCALE_GROUPS: usize = 8;
/// Rows of a block of weights.
pub(in crate::backend::cuda) const BLOCK_ROWS: usize = 64;
/// Outlier channels of a block of weights.
pub(in crate::backend::cuda) const OUTLIER_PART: usize = 64;
/// Bytes of its codes, and with the rows' scales.
const OUTLIER_CODE_BYTES: usize = BLOCK_ROWS * OUTLIER_PART;
pub(in crate::backend::cuda) const OUTLIER_BYTES: usize = OUTLIER_CODE_BYTES + 2 * BLOCK_ROWS;
/// Threads of a block that packs weights.
const PACK_THREADS: usize = 128;
/// Slots that a thread tiles, and codes of a word.
const CHUNK: usize = 16;

pub(super) const FAMILY: Family = Family {
    name: "hopper_layout",
    source: source!("hopper_layout"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| {
        [(128, false, false), (64, false, true), (32, true, false)]
            .map(|(group, wide, fp4)| Packing { group, wide, fp4 }.defines())
            .to_vec()
    },
    kernels: declared![
        PackWeights,
        PackOutliers,
        TileCodes,
        UntileCodes,
        WidenCodes,
        TileScales,
        UntileScales,
    ],
};

/// Tokens as they are padded in tiles.
pub(in crate::backend::cuda) fn padded_tokens(tokens: usize) -> usize {
    tokens.next_multiple_of(TOKEN_MULTIPLE)
}

/// Bytes of the scales of a tile's groups.
pub(in crate::backend::cuda) fn tiled_scale_bytes(groups: usize, tokens: usize) -> usize {
    2 * groups.next_multiple_of(SCALE_GROUPS) * padded_tokens(tokens)
}

/// How weights are packed.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Packing {
    /// Channels that share a scale: 32, 64 or 128.
    pub(in crate::backend::cuda) group: usize,
    /// Whether codes have 8 bits and not 4.
    pub(in crate::backend::cuda) wide: bool,
    pub(in crate::backend::cuda) fp4: bool,
}

/// A program of this file for the kernels that are the same in all.
const ANY: Packing = Packing { group: PANEL, wide: false, fp4: false };

impl Packing {
    /// Bytes of the codes of a block.
    fn code_bytes(&self) -> usize {
        BLOCK_ROWS * PANEL / if self.wide { 1 } else { 2 }
    }

    /// Bytes of 64 rows and 128 slots of weights: codes and f16 scales.
    pub(in crate::backend::cuda) fn block_bytes(&self) -> usize {
        self.code_bytes() + PANEL / self.group * BLOCK_ROWS * 2
    }

    /// The macros that this file and the products share.
    pub(super) fn shared(&self) -> Defines {
        defines! {
            "GROUP": self.group,
            "W_BITS": if self.wide { 8 } else { 4 },
            "W_FP4": flag(self.fp4),
            "PANEL": PANEL,
            "BLOCK_ROWS": BLOCK_ROWS,
            "SCALE_GROUPS": SCALE_GROUPS,
            "OUTLIER_PART": OUTLIER_PART,
            "CODE_BYTES": self.code_bytes(),
            "BLOCK_BYTES": self.block_bytes(),
            "OUTLIER_CODE_BYTES": OUTLIER_CODE_BYTES,
            "OUTLIER_BYTES": OUTLIER_BYTES,
        }
    }

    fn defines(&self) -> Defines {
        let own = defines! {
            "THREADS": THREADS,
            "PACK_THREADS": PACK_THREADS,
            "TOKEN_MULTIPLE": TOKEN_MULTIPLE,
            "CHUNK": CHUNK,
        };
        [self.shared(), own].concat()
    }
}

/// A launch of this file with any constants: its geometry.
macro_rules! launches {
    ($($name:ident: |$kernel:ident| $constants:expr, $geometry:expr;)*) => {$(
        impl Launch for $name<'_> {
            const FAMILY: Family = FAMILY;

            fn constants(&self) -> Defines {
                let $kernel = self;
                let _ = $kernel;
                $constants.defines()
            }

            fn geometry(&self) -> Geometry {
                let $kernel = self;
                $geometry
            }
        }
    )*};
}

kernel! {
    /// Weights in blocks; with `order` a row for each of its slots.
    PackWeights<'a> = ["pack_weights"] {
        codes: In<'a, i8>[source_rows * groups * packing.group],
        scales: In<'a, f32>[source_rows.div_ceil(rows_per_scale) * groups],
        order: Option<In<'a, i32>>[rows],
        rows: usize,
        groups: usize,
        rows_per_scale: usize,
        blocks: Out<'a, u8>[rows.div_ceil(BLOCK_ROWS) * panels * packing.block_bytes()],
    }
    launch {
        packing: Packing,
        panels: usize,
        /// Rows of the codes.
        source_rows: usize,
    }
}

kernel! {
    /// The same of outliers' codes.
    PackOutliers<'a> = ["pack_outliers"] {
        codes: Option<In<'a, i8>>[source_rows * width],
        scales: Option<In<'a, f32>>[source_rows],
        order: Option<In<'a, i32>>[rows],
        rows: usize,
        width: usize,
        blocks: Out<'a, u8>[rows.div_ceil(BLOCK_ROWS) * parts * OUTLIER_BYTES],
    }
    launch {
        packing: Packing,
        parts: usize,
        source_rows: usize,
    }
}

kernel! {
    /// Panels of rows of codes.
    TileCodes<'a> = ["tile_codes"] {
        codes: In<'a, i8>[tokens * width],
        tokens: usize,
        width: usize,
        padded: usize,
        panels: usize,
        magnitudes: bool,
        to: Out<'a, u8>[panels * padded * PANEL],
    }
}

kernel! {
    /// The way back.
    UntileCodes<'a> = ["untile_codes"] {
        from: In<'a, u8>[width.div_ceil(PANEL) * padded * PANEL],
        tokens: usize,
        width: usize,
        padded: usize,
        magnitudes: bool,
        codes: Out<'a, i8>[tokens * width],
    }
}

kernel! {
    /// Signs and magnitudes as two's complement.
    WidenCodes<'a> = ["widen_codes"] {
        from: In<'a, u32>[words as usize],
        words: i64,
        to: Out<'a, u32>[words as usize],
    }
}

kernel! {
    /// Scales as the products read them.
    TileScales<'a> = ["tile_scales"] {
        scales: In<'a, f32>[groups * stride],
        groups: usize,
        stride: usize,
        tokens: usize,
        padded: usize,
        to: Out<'a, f16>[groups.next_multiple_of(SCALE_GROUPS) * padded],
    }
}

kernel! {
    /// The way back.
    UntileScales<'a> = ["untile_scales"] {
        from: In<'a, f16>[groups.next_multiple_of(SCALE_GROUPS) * padded],
        groups: usize,
        stride: usize,
        tokens: usize,
        padded: usize,
        scales: Out<'a, f32>[groups * stride],
    }
}

launches! {
    PackWeights: |kernel| kernel.packing,
        Geometry::grid((kernel.panels, kernel.rows.div_ceil(BLOCK_ROWS), 1), PACK_THREADS);
    PackOutliers: |kernel| kernel.packing,
        Geometry::grid((kernel.parts, kernel.rows.div_ceil(BLOCK_ROWS), 1), PACK_THREADS);
    TileCodes: |kernel| ANY, Geometry::over(kernel.panels * kernel.padded * PANEL / CHUNK, THREADS);
    UntileCodes: |kernel| ANY, Geometry::over(kernel.tokens * kernel.width, THREADS);
    WidenCodes: |kernel| ANY, Geometry::over(kernel.words as usize, THREADS);
    TileScales: |kernel| ANY,
        Geometry::over(kernel.groups.div_ceil(SCALE_GROUPS) * kernel.padded, THREADS);
    UntileScales: |kernel| ANY, Geometry::over(kernel.stride * kernel.groups, THREADS);
}
