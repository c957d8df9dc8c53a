/*! `decode.cu`: attention of one new token of each sequence over the pages of the cache. */

use super::cache::Pages;
use super::{Defines, Family, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::libraries::Version;
use crate::backend::cuda::slice::{In, Out};

/// Query heads of a tile at most.
const TILE_HEADS: usize = 8;
/// Stages at most: groups of pages that a warp has in flight.
pub(in crate::backend::cuda) const MOST_STAGES: usize = 8;
/// Floats after a head's outputs in a part: its maximum and its sum, and padding, so that lanes that write 8 channels of 8 heads meet
/// 32 banks.
const PART_END: usize = 4;

pub(super) const FAMILY: Family = Family {
    name: "decode",
    source: source!("decode", "heads", "pages"),
    only: None,
    tensor_core: Some("HMMA"),
    pdl: true,
    variants: |capability| {
        [
            (128, 4, true, false, false),
            (128, 4, true, true, false),
            (128, 8, true, true, false),
            (128, 16, false, false, false),
            (128, 16, false, true, false),
            (96, 4, true, false, false),
            (80, 8, false, false, false),
            (64, 4, false, true, false),
            (64, 16, false, false, false),
            (128, 4, true, false, true),
            (64, 16, false, true, true),
        ]
        .map(|(head_dim, kv_bits, rotated, single, windowed)| {
            let pages = Pages { head_dim, kv_bits, rotated };
            let program = DecodeProgram::new(pages, single, capability);
            DecodeProgram { windowed, ..program }.defines()
        })
        .to_vec()
    },
    kernels: declared![DecodeAttention],
};

/// What the file is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cuda) struct DecodeProgram {
    pub(in crate::backend::cuda) pages: Pages,
    pub(in crate::backend::cuda) warps: usize,
    /// Pages that a warp takes together.
    pub(in crate::backend::cuda) group_pages: usize,
    /// Query heads of a tile.
    pub(in crate::backend::cuda) tile_heads: usize,
    /// Occupancy: thread blocks per SM.
    pub(in crate::backend::cuda) blocks_per_sm: usize,
    /// Whether pages are copied by one instruction each, so that the stages may be of any number.
    pub(in crate::backend::cuda) bulk: bool,
    /// Shared memory of a multiprocessor for stages.
    pub(in crate::backend::cuda) shared_bytes: usize,
    /// Whether only the last tokens of a sequence are seen.
    pub(in crate::backend::cuda) windowed: bool,
}

impl DecodeProgram {
    /// For pages on a device; `single` where a key and value head serves one query head.
    pub(in crate::backend::cuda) fn new(pages: Pages, single: bool, capability: Version) -> Self {
        // Chips with 227 KiB of shared memory a block, and those with 99 or more.
        let large = (9..12).contains(&capability.major);
        // Pages of 4 bits are short.
        let short = pages.code_bits() == 4;
        Self {
            pages,
            warps: if short || large { 8 } else { 4 },
            group_pages: if short { 2 } else { 1 },
            tile_heads: if single { 1 } else { TILE_HEADS },
            blocks_per_sm: if pages.quantized() && large { 2 } else { 1 },
            bulk: capability.major >= 9,
            shared_bytes: if large { 210_000 } else { 90_000 },
            windowed: false,
        }
    }

    fn part_pitch(&self) -> usize {
        self.pages.head_dim + PART_END
    }

    /// Bytes of a split's part of a head tile.
    pub(in crate::backend::cuda) fn part_bytes(&self) -> usize {
        4 * self.tile_heads * self.part_pitch()
    }

    /// Bytes of a stage of all warps.
    pub(in crate::backend::cuda) fn stage_bytes(&self) -> usize {
        self.warps * self.group_pages * self.pages.bytes()
    }

    /// Dynamic shared memory of a block.
    pub(in crate::backend::cuda) fn block_bytes(&self, stages: usize) -> usize {
        (stages * self.stage_bytes()).max(self.warps * self.part_bytes())
    }

    fn defines(&self) -> Defines {
        let own = defines! {
            "SINGLE": flag(self.tile_heads == 1),
            "TILE_HEADS": self.tile_heads,
            "WARPS": self.warps,
            "GROUP": self.group_pages,
            "BLOCKS_PER_SM": self.blocks_per_sm,
            "BULK": flag(self.bulk),
            "WINDOWED": flag(self.windowed),
            "MOST_STAGES": MOST_STAGES,
            "PART_PITCH": self.part_pitch(),
        };
        [self.pages.defines(), own].concat()
    }
}

kernel! {
    /// Attention of each sequence's last token.
    DecodeAttention<'a> = ["decode_attention"] {
        q: In<'a, half::f16>[sequences.saturating_sub(1) * query_stride as usize + heads * program.pages.head_dim],
        query_stride: i64,
        cos: In<'a, f32>[seq_len * program.pages.head_dim / 2],
        sin: In<'a, f32>[seq_len * program.pages.head_dim / 2],
        pool: In<'a, u8>[pool_pages * kv_heads * program.pages.bytes()],
        table: In<'a, i32>[sequences * table_stride],
        table_stride: usize,
        lengths: In<'a, i32>[sequences],
        out: Out<'a, half::f16>[sequences * heads * program.pages.head_dim],
        parts: Out<'a, f32>[if splits > 1 { sequences * head_tiles * splits * program.part_bytes() / 4 } else { 0 }],
        finished: Out<'a, u32>[sequences * head_tiles],
        heads: usize,
        kv_heads: usize,
        split_pages: usize,
        stages: usize,
        scale: f32,
        reach: usize,
    }
    launch {
        program: DecodeProgram,
        /// Tokens of a sequence at most.
        seq_len: usize,
        pool_pages: usize,
        sequences: usize,
        head_tiles: usize,
        /// Splits of each sequence.
        splits: usize,
    }
}

impl Launch for DecodeAttention<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        let grid = (self.splits, self.head_tiles, self.sequences);
        let shared_bytes = self.program.block_bytes(self.stages);
        Geometry { shared_bytes, ..Geometry::grid(grid, 32 * self.program.warps) }
    }
}
