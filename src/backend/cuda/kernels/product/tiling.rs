//! Tiles of the products for Hopper: their shapes, stages and shared memory, and the macros that follow.

use super::super::hopper_layout::{PANEL, Packing, SCALE_GROUPS};
use super::super::{Defines, defines, flag};

/// Bytes to a multiple of which parts of a stage begin: swizzled rows need it.
const STAGE_MULTIPLE: usize = 1024;
/// Bytes of a token's results of a warpgroup where they are transposed: 64 in f16, or half of the tokens in f32.
const EPILOGUE_WIDTH: usize = 128;

/// Tokens up to which `product_stream` multiplies by `mma.sync`, codes in two's complement, and not by `wgmma`.
pub(in crate::backend::cuda) const MMA_TOKENS: usize = 16;
/// Thread blocks of a cluster at most, on every device.
const LARGEST_CLUSTER: usize = 8;
/// The same up to [`MMA_TOKENS`]: two have enough in flight.
const MMA_CLUSTER: usize = 2;

/// What the two products for Hopper are compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Tiling {
    /// Channels that share a scale: 32, 64 or 128.
    pub(super) group: usize,
    /// Tokens of a tile.
    pub(super) tokens: usize,
    /// Blocks of 64 rows in a tile.
    pub(super) blocks: usize,
    /// Panels of 128 slots in a stage.
    pub(super) panels: usize,
    /// Warpgroups that take a thread block's stages one after another (slice-K).
    pub(super) slices: usize,
    /// Occupancy: thread blocks per SM at least.
    pub(super) blocks_per_sm: usize,
    /// Stages whose weights `product_stream` prefetches before the PDL wait.
    pub(super) prefetched: usize,
    /// Whether activations' and weights' codes have 8 bits.
    pub(super) wide: [bool; 2],
    /// Whether weights are FP4.
    pub(super) fp4: bool,
    /// What results become.
    pub(super) output: ProductOutput,
    /// Whether it is `product_tiles`, with a thread block for tile after tile.
    pub(super) prefill: bool,
}

/// What a product's results become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cuda) enum ProductOutput {
    /// f32 values.
    Float,
    /// f16 values.
    Half,
    /// Added to f32 values that are there.
    Added,
}

impl Tiling {
    /// For products of `tokens` tokens with weights of `rows` rows, on a device of `multiprocessors`.
    pub(in crate::backend::cuda) fn of(
        tokens: usize,
        rows: usize,
        group: usize,
        wide: [bool; 2],
        multiprocessors: usize,
    ) -> Self {
        let prefill = is_prefill(tokens);
        let narrow = !prefill && narrow_tiles_fill(rows, multiprocessors);
        let (tokens, blocks, panels, slices, blocks_per_sm) = match tokens {
            0..=8 => (8, 1, 2, 2, blocks_per_sm_for(rows, multiprocessors).min(4)),
            9..=MMA_TOKENS => (16, 1, 2, 2, blocks_per_sm_for(rows, multiprocessors).min(3)),
            17..=32 if narrow => (32, 1, 2, 4, 1),
            17..=32 => (32, 3, 1, 1, 1),
            // Of two blocks a tile each has few stages: smaller ones are shared out better among the warpgroups.
            33..=64 if narrow && 2 * rows.div_ceil(64) <= multiprocessors => (64, 1, 1, 3, 1),
            33..=64 if narrow => (64, 1, 2, 3, 1),
            33..=64 => (64, 3, 1, 1, 1),
            _ if short_tiles_fill(tokens, rows, multiprocessors) => (64, 2, 1, 1, 1),
            _ => (128, 2, 1, 1, 1),
        };
        // A panel of 8 bits is twice as long.
        let panels = if wide[1] { 1 } else { panels };
        Self {
            group,
            tokens,
            blocks,
            panels,
            slices,
            blocks_per_sm,
            prefetched: prefetched_stages(tokens, rows, blocks_per_sm, multiprocessors),
            wide,
            fp4: false,
            output: ProductOutput::Half,
            prefill,
        }
    }

    /// The same for weights that may be FP4, and for other results.
    pub(in crate::backend::cuda) fn with(self, fp4: bool, output: ProductOutput) -> Self {
        Self { fp4, output, ..self }
    }

    /// Thread blocks of a cluster, which divide a tile's stages (split-K), if the device holds so many.
    pub(in crate::backend::cuda) fn cluster(
        &self,
        tiles: usize,
        stages: usize,
        multiprocessors: usize,
    ) -> usize {
        let most = if self.tokens <= MMA_TOKENS { MMA_CLUSTER } else { LARGEST_CLUSTER };
        (multiprocessors * self.blocks_per_sm / tiles).clamp(1, most.min(stages))
    }

    pub(super) fn packing(&self) -> Packing {
        Packing { group: self.group, wide: self.wide[1], fp4: self.fp4 }
    }

    /// The macros of `product_tiles` and `product_stream`.
    pub(super) fn defines(&self) -> Defines {
        let own = defines! {
            "TOKENS": self.tokens,
            "BLOCKS": self.blocks,
            "PANELS": self.panels,
            "STAGES": self.stages(),
            "BY_WARPS": flag(self.tokens <= MMA_TOKENS),
            "X_BITS": if self.wide[0] { 8 } else { 4 },
            "OUT": self.output as u8,
            "THREADS": self.consumers(),
            "PRODUCERS": self.producers(),
            "TOKEN_CODES": self.scale_bytes(),
            "WEIGHTS": self.scale_bytes() + self.panels * self.panel_code_bytes(),
            "STAGE_BYTES": self.stage_bytes(),
        };
        let shape = if self.is_prefill() {
            defines! { "EPILOGUE_BYTES": self.tokens * EPILOGUE_WIDTH }
        } else {
            defines! {
                "SLICES": self.slices,
                "BLOCKS_PER_SM": self.blocks_per_sm,
                "PREFETCHED": self.prefetched.min(self.stages()),
            }
        };
        [self.packing().shared(), own, shape].concat()
    }

    /// Whether tokens are many: a thread block then takes tile after tile.
    pub(in crate::backend::cuda) fn is_prefill(&self) -> bool {
        self.prefill
    }

    /// Threads of the consumer (MMA) warpgroups.
    fn consumers(&self) -> usize {
        128 * self.blocks * self.slices
    }

    /// Threads of the producer warps. An entire warpgroup of them leaves registers to the consumers.
    fn producers(&self) -> usize {
        match self.blocks * self.slices {
            _ if self.is_prefill() => 128,
            // Three consumer warpgroups need more registers than there are: the fourth leaves its own.
            3 => 128,
            4 => 64,
            _ => 32,
        }
    }

    pub(super) fn threads(&self) -> usize {
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

    /// Bytes after the stages, where prefill's epilogue transposes results.
    fn bytes_after(&self) -> usize {
        if self.is_prefill() { self.blocks * self.tokens * EPILOGUE_WIDTH } else { 0 }
    }

    /// As many stages as there is room for, but no more than are of use; a multiple of `slices`, so that a ring slot is
    /// always the same warpgroup's. A warpgroup that skips a slot could not see whether the other's stage has arrived there
    /// after its own of the round before: copies arrive in any order, and barriers distinguish only odd rounds from even ones.
    fn stages(&self) -> usize {
        const SM_BYTES: usize = 227 << 10;
        // A thread block has a kilobyte of its own, and one for alignment.
        let room = SM_BYTES / self.blocks_per_sm - 2048 - self.bytes_after();
        (room / self.stage_bytes()).min(16) / self.slices * self.slices
    }

    /// Dynamic shared memory of a thread block.
    pub(super) fn shared_bytes(&self) -> usize {
        self.stages() * self.stage_bytes() + self.bytes_after() + STAGE_MULTIPLE
    }
}

/// Whether the product of `tokens` tokens is one of prefill, with a thread block for tile after tile.
pub(in crate::backend::cuda) fn is_prefill(tokens: usize) -> bool {
    tokens > 64
}

/// Thread blocks per SM for all tiles of 64 rows to run simultaneously, two for a tile where tiles are
/// not many more than multiprocessors; not less than two. Fewer blocks have more stages each.
fn blocks_per_sm_for(rows: usize, multiprocessors: usize) -> usize {
    mma_blocks(rows, multiprocessors).div_ceil(multiprocessors).max(2)
}

/// Thread blocks of a product by `mma.sync`.
fn mma_blocks(rows: usize, multiprocessors: usize) -> usize {
    let tiles = rows.div_ceil(64);
    if 3 * tiles <= 4 * multiprocessors { MMA_CLUSTER * tiles } else { tiles }
}

/// Stages whose weights are prefetched before the PDL wait. Their copies are issued before the tokens' copies, and before those of the kernel that still runs. Where
/// the device holds the blocks of both kernels all begin early, and gain by none; docs/kernels.md has what was measured.
fn prefetched_stages(
    tokens: usize,
    rows: usize,
    blocks_per_sm: usize,
    multiprocessors: usize,
) -> usize {
    let both_fit = 2 * mma_blocks(rows, multiprocessors) <= blocks_per_sm * multiprocessors;
    match tokens {
        0..=MMA_TOKENS if both_fit => 0,
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

/// Whether more than 64 tokens are multiplied sooner in tiles of 64 tokens than in tiles of 128, by the rounds that each takes: a round of
/// entire tiles, and a last one that is cut into halves, take so many thousandths of a round of entire tiles of 128 tokens (H200).
fn short_tiles_fill(tokens: usize, rows: usize, multiprocessors: usize) -> bool {
    let time = |tile_tokens: usize, entire: usize, half: usize| {
        let tiles = tokens.div_ceil(tile_tokens) * rows.div_ceil(128);
        let (rounds, rest) = (tiles / multiprocessors, tiles % multiprocessors);
        let last = match rest {
            0 => 0,
            rest if 2 * rest <= multiprocessors => half,
            _ => entire,
        };
        rounds * entire + last
    };
    time(64, 755, 505) < time(128, 1000, 708)
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
            assert_eq!(tiling(8, rows).blocks_per_sm, per_sm, "{rows} rows");
            assert_eq!(tiling(16, rows).blocks_per_sm, per_sm.min(3), "{rows} rows");
        }
        for (rows, early) in [(4096, 0), (5120, 3), (8192, 3), (12288, 3), (57344, 3)] {
            assert_eq!(tiling(8, rows).prefetched, early, "{rows} rows");
            assert_eq!(tiling(16, rows).prefetched, early.min(2), "{rows} rows");
            assert_eq!(tiling(64, rows).prefetched, 2, "{rows} rows");
        }
    }

    /// Of prefill.
    #[test]
    fn few_tiles_are_of_64_tokens() {
        for (tokens, rows, expected) in
            [(128, 4096, 64), (65, 64, 64), (300, 257, 64), (1100, 2570, 128), (1024, 12288, 128)]
        {
            let tiling = tiling(tokens, rows);
            assert!(tiling.is_prefill());
            assert_eq!(tiling.tokens, expected, "{tokens} x {rows}");
        }
        assert!(!tiling(64, 4096).is_prefill());
    }

    #[test]
    fn a_ring_slot_is_one_warpgroups() {
        for tokens in [8, 16, 32, 64] {
            for (rows, group) in [(4096, 128), (12288, 128), (4096, 64), (4096, 32)] {
                for wide in [[false; 2], [true, false], [true; 2]] {
                    let tiling = Tiling::of(tokens, rows, group, wide, 132);
                    let stages = tiling.stages();
                    assert!(
                        stages >= 4 && stages.is_multiple_of(tiling.slices),
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
