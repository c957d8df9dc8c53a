/*! The products for Hopper, `product_stream.cu` for few tokens and `product_tiles.cu` for many, with `hopper.cuh`. */

use half::f16;

use super::hopper_layout::{BLOCK_ROWS, OUTLIER_BYTES, OUTLIER_PART, PANEL, Packing, SCALE_GROUPS};
use super::{Defines, Family, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};

/// Bytes to a multiple of which parts of a stage begin: swizzled rows need it.
const STAGE_MULTIPLE: usize = 1024;
/// Bytes of a token's results of a warpgroup where they are transposed: 64 in f16, or half of the tokens in f32.
const EPILOGUE_WIDTH: usize = 128;

pub(super) const STREAM: Family = Family {
    name: "product_stream",
    source: source!("product_stream", "hopper"),
    only: Some("sm_90a"),
    tensor_core: Some("IGMMA"),
    pdl: true,
    variants: |_| {
        use Output::{Float, Half};
        let tiling = |tokens, group, wide, fp4, output| {
            Tiling { fp4, output, ..Tiling::of(tokens, 12288, group, wide, 132) }.defines()
        };
        let narrow = |tokens, group| {
            let wide = [tokens <= FEW_TOKENS, false];
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
            tiling(64, 64, [true, false], true, Float),
            tiling(64, 128, [true; 2], false, Half),
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
        use Output::{Added, Float, Half};
        let tiling = |group, wide, fp4, output| {
            Tiling { fp4, output, ..Tiling::of(1024, 12288, group, wide, 132) }.defines()
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
        ]
    },
    kernels: declared![Tiles],
};

/// Tokens up to which `product_stream`'s warps multiply by themselves, by `mma.sync`, codes in two's complement.
pub(in crate::backend::cuda) const FEW_TOKENS: usize = 16;
/// Blocks of threads of a cluster at most, by what every device takes.
const LARGEST_CLUSTER: usize = 8;
/// And for few tokens, of which two have enough in flight.
const CLUSTER_OF_FEW: usize = 2;

/// What the two products for Hopper are compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Tiling {
    /// Channels that share a scale: 32, 64 or 128.
    group: usize,
    /// Tokens of a tile.
    tokens: usize,
    /// Blocks of 64 rows in a tile.
    blocks: usize,
    /// Times 128 places in a stage.
    panels: usize,
    /// Warpgroups that share a block's stages.
    split: usize,
    /// Blocks of threads that an SM holds at least.
    per_sm: usize,
    /// Stages whose weights `product_stream` prefetches before the PDL wait.
    early: usize,
    /// Whether activations' and weights' codes have 8 bits.
    wide: [bool; 2],
    /// Whether weights are FP4.
    fp4: bool,
    /// What results become.
    output: Output,
}

/// What a product's results become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cuda) enum Output {
    /// f32 values.
    Float,
    /// f16 values.
    Half,
    /// Added to f32 values that are there: of many tokens only.
    Added,
}

impl Tiling {
    /// For products of so many tokens with weights of `rows` rows, on so many multiprocessors.
    pub(in crate::backend::cuda) fn of(
        tokens: usize,
        rows: usize,
        group: usize,
        wide: [bool; 2],
        multiprocessors: usize,
    ) -> Self {
        let (tokens, blocks, panels, split, per_sm) = match tokens {
            0..=8 => (8, 1, 2, 2, blocks_a_multiprocessor(rows, multiprocessors).min(4)),
            9..=FEW_TOKENS => (16, 1, 2, 2, blocks_a_multiprocessor(rows, multiprocessors).min(3)),
            17..=32 if narrow_tiles_fill(rows, multiprocessors) => (32, 1, 2, 4, 1),
            17..=32 => (32, 3, 2, 1, 1),
            33..=64 if narrow_tiles_fill(rows, multiprocessors) => (64, 1, 2, 2, 1),
            33..=64 => (64, 3, 1, 1, 1),
            _ => (128, 2, 1, 1, 1),
        };
        // A panel of 8 bits is twice as long.
        let panels = if wide[1] { 1 } else { panels };
        Self {
            group,
            tokens,
            blocks,
            panels,
            split,
            per_sm,
            early: early_stages(tokens, rows, per_sm, multiprocessors),
            wide,
            fp4: false,
            output: Output::Half,
        }
    }

    /// The same for weights that may be FP4, and for other results.
    pub(in crate::backend::cuda) fn with(self, fp4: bool, output: Output) -> Self {
        Self { fp4, output, ..self }
    }

    /// Thread blocks that share a tile's stages, if the device holds so many.
    pub(in crate::backend::cuda) fn cluster(
        &self,
        tiles: usize,
        stages: usize,
        multiprocessors: usize,
    ) -> usize {
        let most = if self.tokens <= FEW_TOKENS { CLUSTER_OF_FEW } else { LARGEST_CLUSTER };
        (multiprocessors * self.per_sm / tiles).clamp(1, most.min(stages))
    }

    fn packing(&self) -> Packing {
        Packing { group: self.group, wide: self.wide[1], fp4: self.fp4 }
    }

    /// The macros of `product_tiles` and `product_stream`.
    fn defines(&self) -> Defines {
        let own = defines! {
            "TOKENS": self.tokens,
            "BLOCKS": self.blocks,
            "PANELS": self.panels,
            "STAGES": self.stages(),
            "BY_WARPS": flag(self.tokens <= FEW_TOKENS),
            "X_BITS": if self.wide[0] { 8 } else { 4 },
            "OUT": self.output as u8,
            "THREADS": self.consumers(),
            "PRODUCERS": self.producers(),
            "TOKEN_CODES": self.scale_bytes(),
            "WEIGHTS": self.scale_bytes() + self.panels * self.panel_code_bytes(),
            "STAGE_BYTES": self.stage_bytes(),
        };
        let shape = if self.is_for_many() {
            defines! { "EPILOGUE_BYTES": self.tokens * EPILOGUE_WIDTH }
        } else {
            defines! {
                "SPLIT": self.split,
                "PER_SM": self.per_sm,
                "EARLY": self.early.min(self.stages()),
            }
        };
        [self.packing().shared(), own, shape].concat()
    }

    /// Whether a thread block takes tile after tile.
    pub(in crate::backend::cuda) fn is_for_many(&self) -> bool {
        is_for_many(self.tokens)
    }

    /// Threads whose warps multiply: warpgroups.
    fn consumers(&self) -> usize {
        128 * self.blocks * self.split
    }

    /// Threads whose warps copy: of an entire warpgroup of them, registers are given to the consumers.
    fn producers(&self) -> usize {
        match self.blocks * self.split {
            _ if self.is_for_many() => 128,
            // Too many registers are needed for what a block of warps has: the fourth gives its own.
            3 => 128,
            4 => 64,
            _ => 32,
        }
    }

    fn threads(&self) -> usize {
        self.consumers() + self.producers()
    }

    /// Bytes of the tokens' scales at the head of a stage: of eight groups, of which those of the stage are used; of outliers, one float
    /// a token.
    fn scale_bytes(&self) -> usize {
        (self.tokens * SCALE_GROUPS * 2).next_multiple_of(STAGE_MULTIPLE)
    }

    /// Bytes of the tokens' codes of a panel.
    fn panel_code_bytes(&self) -> usize {
        self.tokens * PANEL
    }

    /// Bytes of a stage.
    fn stage_bytes(&self) -> usize {
        let panel = self.panel_code_bytes() + self.blocks * self.packing().block_bytes();
        (self.scale_bytes() + self.panels * panel).next_multiple_of(STAGE_MULTIPLE)
    }

    /// Bytes after the stages, where the results of many tokens are transposed.
    fn bytes_behind(&self) -> usize {
        if self.is_for_many() { self.blocks * self.tokens * EPILOGUE_WIDTH } else { 0 }
    }

    /// As many stages as there is room for, but no more than are of use; a multiple of `split`, so that a place in the ring is
    /// always the same warpgroup's. A warpgroup that skips a place would not see whether the other's stage has come there
    /// yet, when its own of the round before has: copies arrive in any order, and barriers tell odd rounds from even ones only.
    fn stages(&self) -> usize {
        const SM_BYTES: usize = 227 << 10;
        // A thread block has a kilobyte of its own, and one for alignment.
        let room = SM_BYTES / self.per_sm - 2048 - self.bytes_behind();
        (room / self.stage_bytes()).min(16) / self.split * self.split
    }

    /// Dynamic shared memory of a thread block.
    fn shared_bytes(&self) -> usize {
        self.stages() * self.stage_bytes() + self.bytes_behind() + STAGE_MULTIPLE
    }
}

/// Whether the product of so many tokens goes tile after tile.
pub(in crate::backend::cuda) fn is_for_many(tokens: usize) -> bool {
    tokens > 64
}

/// Blocks of threads that a multiprocessor must hold for all tiles of 64 rows to be under way at once, two for a tile where tiles are
/// not many more than multiprocessors; not less than two. Fewer blocks have more stages each.
fn blocks_a_multiprocessor(rows: usize, multiprocessors: usize) -> usize {
    blocks_of_few(rows, multiprocessors).div_ceil(multiprocessors).max(2)
}

/// Blocks of threads of a product of few tokens.
fn blocks_of_few(rows: usize, multiprocessors: usize) -> usize {
    let tiles = rows.div_ceil(64);
    if 3 * tiles <= 4 * multiprocessors { CLUSTER_OF_FEW * tiles } else { tiles }
}

/// Stages whose weights are prefetched before the PDL wait. Their copies are issued before the tokens' copies, and before those of the kernel that still runs. Where
/// the device holds the blocks of both kernels all begin early, and gain by none; docs/kernels.md has what was measured.
fn early_stages(tokens: usize, rows: usize, per_sm: usize, multiprocessors: usize) -> usize {
    let both_fit = 2 * blocks_of_few(rows, multiprocessors) <= per_sm * multiprocessors;
    match tokens {
        0..=FEW_TOKENS if both_fit => 0,
        0..=8 => 3,
        _ => 2,
    }
}

/// Whether 17 to 64 tokens are multiplied sooner in tiles of 64 rows than in tiles of 192, of which a stage takes 2.85 times as
/// long (H200, 64 tokens), by the rounds that each takes.
fn narrow_tiles_fill(rows: usize, multiprocessors: usize) -> bool {
    let time = |tile_rows: usize, stage: f64| {
        let tiles = rows.div_ceil(tile_rows);
        // Clusters of more than two leave some multiprocessors of each part of the device without work.
        let pairs = multiprocessors / 2 >= tiles;
        let larger = (multiprocessors * 7 / 8 / tiles).min(LARGEST_CLUSTER);
        let cluster = larger.max(if pairs { 2 } else { 1 });
        stage * (tiles * cluster).div_ceil(multiprocessors) as f64 / cluster as f64
    };
    time(64, 1.0) < time(192, 2.85)
}

kernel! {
    /// The product of few tokens.
    Stream<'a> = ["integer_stream"] {
        x: In<'a, i8>[panels * padded * PANEL],
        sx: In<'a, f16>[(panels * PANEL / tiling.group).next_multiple_of(SCALE_GROUPS) * padded],
        xo: Option<In<'a, i8>>[(halves * OUTLIER_PART).div_ceil(PANEL) * padded * PANEL],
        sxo: Option<In<'a, f32>>[padded],
        w: In<'a, i8>[rows.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo: Option<In<'a, i8>>[rows.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y: Out<'a, Any>[tokens * rows * if tiling.output == Output::Half { 2 } else { 4 }],
        tokens: usize,
        padded: usize,
        rows: usize,
        panels: usize,
        halves: usize,
    }
    launch {
        tiling: Tiling,
        /// Thread blocks that share a tile's stages.
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
        Geometry { grid: (self.tiles(), cluster, 1), threads, shared_bytes, cluster }
    }
}

impl Stream<'_> {
    /// Stages of a tile.
    pub(in crate::backend::cuda) fn tile_stages(&self) -> usize {
        self.panels.div_ceil(self.tiling.panels) + self.halves
    }

    /// Tiles of all rows.
    pub(in crate::backend::cuda) fn tiles(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS * self.tiling.blocks)
    }
}

kernel! {
    /// The product of many tokens.
    Tiles<'a> = ["integer_tiles"] {
        x: In<'a, i8>[panels * padded * PANEL],
        sx: In<'a, f16>[(panels * PANEL / tiling.group).next_multiple_of(SCALE_GROUPS) * padded],
        xo: Option<In<'a, i8>>[(halves * OUTLIER_PART).div_ceil(PANEL) * padded * PANEL],
        sxo: Option<In<'a, f32>>[padded],
        w: In<'a, i8>[rows.div_ceil(BLOCK_ROWS) * panels * tiling.packing().block_bytes()],
        wo: Option<In<'a, i8>>[rows.div_ceil(BLOCK_ROWS) * halves * OUTLIER_BYTES],
        y: Out<'a, Any>[tokens * rows * if tiling.output == Output::Half { 2 } else { 4 }],
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
        // A block for each part of a tile, if the device holds so many: the kernel decides which tiles it takes in parts.
        let tiles =
            self.rows.div_ceil(BLOCK_ROWS * tiling.blocks) * self.tokens.div_ceil(tiling.tokens);
        let blocks = (tiles * tiling.blocks).min(self.multiprocessors);
        let shared_bytes = tiling.shared_bytes();
        Geometry { shared_bytes, ..Geometry::line(blocks, tiling.threads()) }
    }
}

#[cfg(test)]
mod tests {
    use super::Tiling;

    fn tiling(tokens: usize, rows: usize) -> Tiling {
        Tiling::of(tokens, rows, 128, [false; 2], 132)
    }

    /// What was faster on an H200, of shapes of Llama-2-7B and 70B.
    #[test]
    fn tiles_fill_the_device() {
        for (rows, blocks) in [(4096, 1), (8192, 1), (10240, 3), (12288, 3), (22016, 3), (57344, 1)]
        {
            assert_eq!(tiling(64, rows).blocks, blocks, "{rows} rows");
        }
        for (rows, per_sm) in [(4096, 2), (8192, 2), (10240, 3), (12288, 2), (22016, 3), (57344, 4)]
        {
            assert_eq!(tiling(8, rows).per_sm, per_sm, "{rows} rows");
            assert_eq!(tiling(16, rows).per_sm, per_sm.min(3), "{rows} rows");
        }
        for (rows, early) in [(4096, 0), (5120, 3), (8192, 3), (12288, 3), (57344, 3)] {
            assert_eq!(tiling(8, rows).early, early, "{rows} rows");
            assert_eq!(tiling(16, rows).early, early.min(2), "{rows} rows");
            assert_eq!(tiling(64, rows).early, 2, "{rows} rows");
        }
    }

    #[test]
    fn a_place_in_the_ring_is_one_warpgroups() {
        for tokens in [8, 16, 32, 64] {
            for (rows, group) in [(4096, 128), (12288, 128), (4096, 64), (4096, 32)] {
                for wide in [[false; 2], [true, false], [true; 2]] {
                    let tiling = Tiling::of(tokens, rows, group, wide, 132);
                    let stages = tiling.stages();
                    assert!(
                        stages >= 4 && stages.is_multiple_of(tiling.split),
                        "{stages}: {tiling:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn clusters_fill_the_device_once() {
        let cluster = |tokens, rows, stages| {
            let tiling = tiling(tokens, rows);
            tiling.cluster(rows.div_ceil(64 * tiling.blocks), stages, 132)
        };
        assert_eq!(cluster(8, 4096, 45), 2);
        assert_eq!(cluster(8, 8192, 114), 2);
        assert_eq!(cluster(8, 10240, 34), 2);
        assert_eq!(cluster(8, 12288, 18), 1);
        assert_eq!(cluster(8, 22016, 18), 1);
        assert_eq!(cluster(8, 57344, 18), 1);
        assert_eq!(cluster(32, 4096, 45), 2);
        assert_eq!(cluster(32, 12288, 18), 2);
        assert_eq!(cluster(64, 64, 87), 8);
    }
}
