/*! `cache.cu` and `pages.cuh`: keys and values into the pages of the cache. */

use super::{Defines, Family, THREADS, declared, defines, flag, heads, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Tokens of a page.
pub const PAGE_TOKENS: usize = 16;
/// Threads of a block that adds one token to a page: a warp for its key, and one for its value.
const SINGLE_THREADS: usize = 64;
/// Heads at most that a block makes one after another, where words are put together by shuffles.
const MOST_HEADS: usize = 16;
/// Blocks that are enough to occupy a device: fewer have one head each.
const ENOUGH_BLOCKS: usize = 512;
/// The widest head that pages hold.
pub(in crate::backend::cuda) const WIDEST_HEAD: usize = 128;

pub(super) const FAMILY: Family = Family {
    name: "cache",
    source: source!("cache", "heads", "pages"),
    only: None,
    tensor_core: None,
    pdl: true,
    variants: |_| {
        [
            (128, 4, true),
            (128, 8, true),
            (128, 16, false),
            (96, 3, true),
            (96, 4, false),
            (80, 8, false),
            (64, 2, false),
        ]
        .map(|(head_dim, kv_bits, rotated)| Pages { head_dim, kv_bits, rotated }.append())
        .to_vec()
    },
    kernels: declared![Append],
};

/// What pages hold of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cuda) struct Pages {
    pub(in crate::backend::cuda) head_dim: usize,
    /// 16 where nothing is quantized.
    pub(in crate::backend::cuda) kv_bits: u8,
    /// Whether heads are quantized in the basis of a Hadamard transform.
    pub(in crate::backend::cuda) rotated: bool,
}

impl Pages {
    /// Whether pages hold codes and not f16.
    pub(in crate::backend::cuda) fn quantized(&self) -> bool {
        self.kv_bits < 16
    }

    /// Bits that hold a code, or an f16.
    pub(in crate::backend::cuda) fn code_bits(&self) -> u8 {
        match self.kv_bits {
            0..=4 => 4,
            5..=8 => 8,
            _ => 16,
        }
    }

    /// Bytes of keys, and of values.
    fn side_bytes(&self) -> usize {
        PAGE_TOKENS * self.head_dim * usize::from(self.code_bits()) / 8
    }

    /// Bytes of a page of a head: of codes with their scales and zero points.
    pub(in crate::backend::cuda) fn bytes(&self) -> usize {
        2 * self.side_bytes() + if self.quantized() { PAGE_TOKENS * 4 * 2 } else { 0 }
    }

    /// The macros of heads.cuh and pages.cuh.
    pub(super) fn defines(&self) -> Defines {
        let own = defines! {
            "PAGE_TOKENS": PAGE_TOKENS,
            "WIDEST_HEAD": WIDEST_HEAD,
            "SIDE_BYTES": self.side_bytes(),
            "PAGE_BYTES": self.bytes(),
        };
        [heads::quantized(self.head_dim, self.kv_bits, self.rotated), own].concat()
    }

    /// Whether a page's words are put together by shuffles, for several heads one after another.
    fn by_shuffles(&self) -> bool {
        self.rotated && self.head_dim == 128 && self.code_bits() == 4
    }

    fn append(&self) -> Defines {
        let own = defines! { "THREADS": THREADS, "BY_SHUFFLES": flag(self.by_shuffles()) };
        [self.defines(), own].concat()
    }
}

kernel! {
    /// Adds tokens to sequences.
    Append<'a> = ["append", "append_single"] {
        k: In<'a, half::f16>[tokens.saturating_sub(1) * row_stride as usize + kv_heads * pages.head_dim],
        v: In<'a, half::f16>[tokens.saturating_sub(1) * row_stride as usize + kv_heads * pages.head_dim],
        row_stride: i64,
        cos: In<'a, f32>[seq_len * pages.head_dim / 2],
        sin: In<'a, f32>[seq_len * pages.head_dim / 2],
        mean: Option<In<'a, f32>>[kv_heads * pages.head_dim],
        pool: Out<'a, u8>[pool_pages * kv_heads * pages.bytes()],
        table: In<'a, i32>[sequences * table_stride],
        table_stride: usize,
        rows: In<'a, i32>[sequences + 1],
        held: In<'a, i32>[sequences],
        kv_heads: usize,
        clip: f32,
    }
    launch {
        pages: Pages,
        /// Tokens of a sequence at most.
        seq_len: usize,
        pool_pages: usize,
        sequences: usize,
        /// New tokens of all sequences.
        tokens: usize,
        /// New tokens of a sequence at most.
        most_added: usize,
        /// Pages that the longest addition touches.
        touched_pages: usize,
    }
}

impl Launch for Append<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        usize::from(self.is_single())
    }

    fn constants(&self) -> Defines {
        self.pages.append()
    }

    fn geometry(&self) -> Geometry {
        let threads = if self.is_single() { SINGLE_THREADS } else { THREADS };
        let blocks = self.kv_heads.div_ceil(self.heads_a_block());
        Geometry::grid((self.touched_pages, blocks, self.sequences), threads)
    }
}

impl Append<'_> {
    /// Heads that a block makes one after another.
    fn heads_a_block(&self) -> usize {
        if self.is_single() || !self.pages.by_shuffles() {
            return 1;
        }
        let all = self.touched_pages * self.kv_heads * self.sequences;
        (all / ENOUGH_BLOCKS).clamp(1, MOST_HEADS)
    }

    /// Whether no sequence has more than one new token.
    fn is_single(&self) -> bool {
        self.most_added <= 1
    }
}
