/*! The products for Hopper, `product_stream.cu` for decode (up to 64 tokens) and `product_tiles.cu` for prefill, with `hopper.cuh`. */

mod tiling;

use half::f16;

use super::hopper_layout::{BLOCK_ROWS, OUTLIER_BYTES, OUTLIER_PART, PANEL, SCALE_GROUPS};
use super::{Defines, Family, declared, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};
pub(in crate::backend::cuda) use tiling::{MMA_TOKENS, ProductOutput, Tiling, is_prefill};

pub(super) const STREAM: Family = Family {
    name: "product_stream",
    source: source!("product_stream", "hopper"),
    only: Some("sm_90a"),
    tensor_core: Some("IGMMA"),
    pdl: true,
    variants: |_| {
        use ProductOutput::{Added, Float, Half};
        let tiling = |tokens, group, wide, fp4, output| {
            Tiling { fp4, output, ..Tiling::of(tokens, 12288, group, wide, 132) }.defines()
        };
        let narrow = |tokens, group| {
            let wide = [tokens <= MMA_TOKENS, false];
            Tiling::of(tokens, 4096, group, wide, 132).defines()
        };
        vec![
            tiling(1, 128, [true, false], false, Half),
            narrow(8, 128),
            tiling(8, 64, [true, false], true, Half),
            tiling(8, 32, [true; 2], false, Half),
            tiling(16, 64, [true, false], true, Half),
            tiling(16, 128, [true; 2], false, Float),
            narrow(16, 32),
            tiling(32, 32, [false; 2], false, Float),
            narrow(32, 128),
            tiling(64, 128, [false; 2], false, Half),
            narrow(64, 128),
            narrow(64, 32),
            // One block a tile.
            Tiling::of(64, 8192, 128, [false; 2], 132).defines(),
            tiling(64, 64, [true, false], true, Float),
            tiling(64, 128, [true; 2], false, Half),
            tiling(1, 128, [true, false], false, Added),
            tiling(64, 128, [false; 2], false, Added),
        ]
    },
    kernels: declared![Stream],
};

pub(super) const TILES: Family = Family {
    name: "product_tiles",
    source: source!("product_tiles", "hopper"),
    only: Some("sm_90a"),
    tensor_core: Some("IGMMA"),
    pdl: true,
    variants: |_| {
        use ProductOutput::{Added, Float, Half};
        let tiling = |group, wide, fp4, output| {
            Tiling { fp4, output, ..Tiling::of(1024, 12288, group, wide, 132) }.defines()
        };
        // Few tiles.
        let short = |group, wide, fp4, output| {
            Tiling { fp4, output, ..Tiling::of(65, 64, group, wide, 132) }.defines()
        };
        vec![
            tiling(128, [false; 2], false, Half),
            tiling(128, [false; 2], true, Half),
            tiling(128, [false; 2], false, Added),
            tiling(64, [false; 2], false, Float),
            tiling(32, [false; 2], false, Half),
            tiling(128, [true, false], false, Half),
            tiling(128, [true; 2], false, Float),
            tiling(64, [true; 2], false, Half),
            tiling(32, [true, false], true, Added),
            short(128, [false; 2], false, Half),
            short(128, [false; 2], true, Added),
            short(128, [true, false], false, Float),
            short(64, [false; 2], false, Half),
            short(32, [true; 2], false, Half),
        ]
    },
    kernels: declared![Tiles],
};

kernel! {
    /// The product of decode.
    Stream<'a> = ["integer_stream"] {
        x: In<'a, i8>[panels * padded * PANEL],
        sx: In<'a, f16>[(panels * PANEL / tiling.group).next_multiple_of(SCALE_GROUPS) * padded],
        xo: Option<In<'a, i8>>[(halves * OUTLIER_PART).div_ceil(PANEL) * padded * PANEL],
        sxo: Option<In<'a, f32>>[padded],
        w: In<'a, i8>[rows.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo: Option<In<'a, i8>>[rows.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y: Out<'a, Any>[tokens * rows * if tiling.output == ProductOutput::Half { 2 } else { 4 }],
        rows: usize,
        w1: Option<In<'a, i8>>[rows1.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo1: Option<In<'a, i8>>[rows1.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y1: Option<Out<'a, Any>>[tokens * rows1 * if tiling.output == ProductOutput::Half { 2 } else { 4 }],
        rows1: usize,
        w2: Option<In<'a, i8>>[rows2.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo2: Option<In<'a, i8>>[rows2.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y2: Option<Out<'a, Any>>[tokens * rows2 * if tiling.output == ProductOutput::Half { 2 } else { 4 }],
        rows2: usize,
        tokens: usize,
        padded: usize,
        panels: usize,
        halves: usize,
    }
    launch {
        tiling: Tiling,
        /// Thread blocks of a cluster, which divide a tile's stages (split-K).
        cluster: usize,
    }
}

impl Launch for Stream<'_> {
    const FAMILY: Family = STREAM;

    fn constants(&self) -> Defines {
        self.tiling.defines()
    }

    fn geometry(&self) -> Geometry {
        let Self { tiling, cluster, .. } = *self;
        let (threads, shared_bytes) = (tiling.threads(), tiling.shared_bytes());
        let all = self.all_rows();
        let most = all.into_iter().max().unwrap_or(0).div_ceil(BLOCK_ROWS * tiling.blocks);
        let weights = all.into_iter().filter(|rows| *rows > 0).count();
        Geometry { grid: (most, cluster, weights), threads, shared_bytes, cluster }
    }
}

impl Stream<'_> {
    /// Stages of a tile.
    pub(in crate::backend::cuda) fn tile_stages(&self) -> usize {
        self.panels.div_ceil(self.tiling.panels) + self.halves
    }

    /// Rows of each of the weights.
    fn all_rows(&self) -> [usize; 3] {
        [self.rows, self.rows1, self.rows2]
    }

    /// Tiles of all rows of all weights.
    pub(in crate::backend::cuda) fn tiles(&self) -> usize {
        let tiles = |rows: usize| rows.div_ceil(BLOCK_ROWS * self.tiling.blocks);
        self.all_rows().map(tiles).iter().sum()
    }
}

kernel! {
    /// The product of prefill.
    Tiles<'a> = ["integer_tiles"] {
        x: In<'a, i8>[panels * padded * PANEL],
        sx: In<'a, f16>[(panels * PANEL / tiling.group).next_multiple_of(SCALE_GROUPS) * padded],
        xo: Option<In<'a, i8>>[(halves * OUTLIER_PART).div_ceil(PANEL) * padded * PANEL],
        sxo: Option<In<'a, f32>>[padded],
        w: In<'a, i8>[rows.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo: Option<In<'a, i8>>[rows.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y: Out<'a, Any>[tokens * rows * if tiling.output == ProductOutput::Half { 2 } else { 4 }],
        tokens: usize,
        padded: usize,
        rows: usize,
        panels: usize,
        halves: usize,
    }
    launch {
        tiling: Tiling,
        multiprocessors: usize,
    }
}

impl Launch for Tiles<'_> {
    const FAMILY: Family = TILES;

    fn constants(&self) -> Defines {
        self.tiling.defines()
    }

    fn geometry(&self) -> Geometry {
        let tiling = self.tiling;
        // A thread block for each 64 rows of a tile, if the device holds so many: the kernel decides which tiles are cut.
        let tiles =
            self.rows.div_ceil(BLOCK_ROWS * tiling.blocks) * self.tokens.div_ceil(tiling.tokens);
        let blocks = (tiles * tiling.blocks).min(self.multiprocessors);
        let shared_bytes = tiling.shared_bytes();
        Geometry { shared_bytes, ..Geometry::line(blocks, tiling.threads()) }
    }
}
