/*! Pages of keys and values of one layer, and the two kernels on them: tokens come in as attention quantizes them, and single
tokens attend to them (cache.cu, decode.cu; pages.cuh has the layout).

A page holds [`PAGE_TOKENS`] tokens of all key and value heads; tables name the pages of sequences. Keys are held after the
rotary embedding: keys that a recipe quantizes before it would have to be embedded again whenever they are read, so such
recipes are refused. */

use std::sync::Arc;

use half::f16;

use super::Cuda;
use super::gpu::Buffer;
pub use super::kernels::cache::PAGE_TOKENS;
use super::kernels::cache::{Append, Pages, WIDEST_HEAD};
use super::kernels::decode::{self, DecodeAttention, MOST_STAGES};
use super::slice::{In, Out};
use super::tensor::{Activation, Hidden};
use crate::backend::AttentionSpec;
use crate::{Error, Result};

/// The pages of one layer.
pub struct PagePool {
    pub(super) spec: AttentionSpec,
    /// Cosines and sines of keys, and of queries.
    key_tables: [Arc<Buffer>; 2],
    query_tables: [Arc<Buffer>; 2],
    /// `[pages, kv_heads, page_bytes]`.
    pub(super) memory: Buffer,
    pages: usize,
    pub(super) program: decode::DecodeProgram,
}

impl PagePool {
    /// Bytes of a page.
    pub(super) fn page_bytes(&self) -> usize {
        self.program.pages.bytes() * self.spec.kv_heads
    }

    /// Tiles of query heads of a token.
    pub(super) fn head_tiles(&self) -> usize {
        let group = self.spec.heads / self.spec.kv_heads;
        self.spec.kv_heads * group.div_ceil(self.program.tile_heads)
    }
}

/// New tokens of sequences, on the device.
pub(super) struct Additions<'a> {
    /// The pages of each sequence, `[sequences, table_stride]`.
    pub(super) table: &'a Buffer,
    pub(super) table_stride: usize,
    /// The first row of each sequence's tokens, and the end, `[sequences + 1]`.
    pub(super) rows: &'a Buffer,
    /// Tokens that each has, `[sequences]`.
    pub(super) held: &'a Buffer,
    pub(super) sequences: usize,
    /// New tokens of all sequences.
    pub(super) tokens: usize,
    /// New tokens of a sequence at most.
    pub(super) most_added: usize,
    /// Pages that the longest addition touches.
    pub(super) touched_pages: usize,
}

/// Single tokens that attend to pages, on the device.
pub(super) struct Readers<'a> {
    /// The pages of each token's sequence, `[readers, table_stride]`.
    pub(super) table: &'a Buffer,
    pub(super) table_stride: usize,
    /// Tokens of each one's sequence, itself included, `[readers]`.
    pub(super) lengths: &'a Buffer,
    pub(super) count: usize,
    pub(super) plan: DecodePlan,
    /// What splits leave for the last of them, and how many have.
    pub(super) parts: &'a Buffer,
    pub(super) finished: &'a Buffer,
}

/// How the work of a token is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DecodePlan {
    /// Parts of each sequence.
    pub(super) splits: usize,
    /// Pages of a part.
    pub(super) split_pages: usize,
    /// Groups of pages that a warp has in flight.
    pub(super) stages: usize,
}

impl Cuda {
    /// What the kernels are compiled for.
    ///
    /// # Errors
    /// A machine error where pages cannot hold such heads or such codes.
    pub(super) fn page_program(&self, spec: &AttentionSpec) -> Result<decode::DecodeProgram> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, kv, .. } = *spec;
        let refused = |what: String| Error::machine(what).hint("run with --device cpu");
        if !head_dim.is_multiple_of(16) || head_dim > WIDEST_HEAD {
            return Err(refused(format!(
                "the paged cache holds heads of a multiple of 16 channels up to {WIDEST_HEAD}, not of {head_dim}"
            )));
        }
        if kv.is_quantized() && !kv.after_rope {
            return Err(refused(
                "the paged cache holds keys after the rotary embedding, but the recipe quantizes them before it".to_owned(),
            ));
        }
        let quantized = kv.is_quantized();
        let own_bits = if quantized { kv.bits } else { 16 };
        let pages = Pages { head_dim, kv_bits: own_bits, rotated: quantized && kv.rotate };
        // One program for all widths that are held alike.
        let pages = Pages { kv_bits: pages.code_bits(), ..pages };
        let capability = self.gpu.device.capability;
        let windowed = spec.sliding_window.is_some_and(|reach| reach < seq_len);
        let program = decode::DecodeProgram::new(pages, heads == kv_heads, capability);
        Ok(decode::DecodeProgram { windowed, ..program })
    }

    /// `pages` pages for sequences of up to `spec.seq_len` tokens.
    ///
    /// # Errors
    /// As [`page_program`](Self::page_program), or memory does not suffice.
    pub(super) fn page_pool(&self, spec: &AttentionSpec, pages: usize) -> Result<PagePool> {
        let program = self.page_program(spec)?;
        let key_tables = self.rope_tables(spec.key_tables())?;
        let query_tables = self.rope_tables(spec.query_tables())?;
        let memory = self.gpu.alloc(pages * spec.kv_heads * program.pages.bytes())?;
        Ok(PagePool { spec: spec.clone(), key_tables, query_tables, memory, pages, program })
    }

    /// Adds rows of `k` and `v` `[tokens, kv_heads * head_dim]`, before the rotary embedding. `mean` is subtracted from
    /// the embedded keys.
    pub(super) fn append_to_pages(
        &self,
        pool: &PagePool,
        [k, v]: [&Activation; 2],
        mean: Option<&Hidden>,
        new: &Additions<'_>,
    ) -> Result<()> {
        let AttentionSpec { kv_heads, head_dim, seq_len, ref kv, .. } = pool.spec;
        assert!(new.tokens <= k.rows && new.tokens <= v.rows);
        assert!(k.columns == kv_heads * head_dim && v.columns == k.columns);
        assert!(kv.is_centered() == mean.is_some());
        let kv_bits = if kv.is_quantized() { kv.bits } else { 16 };
        self.kernels.launch(&Append {
            k: k.half().into(),
            v: v.half().into(),
            row_stride: k.columns as i64,
            cos: (&*pool.key_tables[0]).into(),
            sin: (&*pool.key_tables[1]).into(),
            mean: mean.map(|mean| mean.float().into()),
            pool: (&pool.memory).into(),
            table: new.table.into(),
            table_stride: new.table_stride,
            rows: new.rows.into(),
            held: new.held.into(),
            kv_heads,
            clip: kv.clip,
            pages: Pages { kv_bits, ..pool.program.pages },
            seq_len,
            pool_pages: pool.pages,
            sequences: new.sequences,
            tokens: new.tokens,
            most_added: new.most_added,
            touched_pages: new.touched_pages,
        })
    }

    /// Attention of single tokens: `q` and `out` are their rows, `[readers, heads * head_dim]`.
    pub(super) fn read_pages(
        &self,
        pool: &PagePool,
        q: In<'_, f16>,
        out: Out<'_, f16>,
        readers: &Readers<'_>,
    ) -> Result<()> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = pool.spec;
        let DecodePlan { splits, split_pages, stages } = readers.plan;
        self.kernels.launch(&DecodeAttention {
            q,
            query_stride: (heads * head_dim) as i64,
            cos: (&*pool.query_tables[0]).into(),
            sin: (&*pool.query_tables[1]).into(),
            pool: (&pool.memory).into(),
            table: readers.table.into(),
            table_stride: readers.table_stride,
            lengths: readers.lengths.into(),
            out,
            parts: readers.parts.into(),
            finished: readers.finished.into(),
            heads,
            kv_heads,
            split_pages,
            stages,
            scale: pool.spec.scale,
            reach: pool.spec.sliding_window.unwrap_or(seq_len),
            program: pool.program,
            seq_len,
            pool_pages: pool.pages,
            sequences: readers.count,
            head_tiles: pool.head_tiles(),
            splits,
        })
    }

    /// The division of the work of `readers` tokens over up to `pages` pages each.
    pub(super) fn decode_plan(&self, pool: &PagePool, readers: usize, pages: usize) -> DecodePlan {
        let units = readers * pool.head_tiles();
        DecodePlan::new(&pool.program, self.gpu.multiprocessors, units, pages)
    }
}

impl DecodePlan {
    /// The division of `units` times up to `pages` pages that takes the least time by a model of the chip: it reads so
    /// many bytes a microsecond, every wave of blocks begins and ends with work that reads nothing, and parts
    /// have to be put together.
    fn new(
        program: &decode::DecodeProgram,
        multiprocessors: usize,
        units: usize,
        pages: usize,
    ) -> Self {
        /// Bytes that a multiprocessor reads in a microsecond.
        const READ_BYTES: f64 = 33e3;
        const WAVE_US: f64 = 3.0;
        const JOIN_US: f64 = 1.5;
        const JOIN_SPLIT_US: f64 = 0.05;
        const MOST_SPLITS: usize = 128;
        let pages = pages.max(1);
        let step = program.warps * program.group_pages;
        let mut best: Option<(f64, usize, usize)> = None;
        for splits in 1..=MOST_SPLITS.min(pages) {
            let even = pages.div_ceil(splits);
            let own = if even > step { even.next_multiple_of(step) } else { even };
            // Rounding left some splits without pages: fewer have said the same.
            if pages.div_ceil(own) != splits {
                continue;
            }
            let blocks = units * splits;
            let waves = blocks.div_ceil(multiprocessors * program.blocks_per_sm);
            let bytes = blocks.div_ceil(multiprocessors) * own * program.pages.bytes();
            let join = if splits > 1 { JOIN_US + JOIN_SPLIT_US * splits as f64 } else { 0.0 };
            let us = bytes as f64 / READ_BYTES + waves as f64 * WAVE_US + join;
            if best.is_none_or(|(least, _, _)| us < least) {
                best = Some((us, splits, own));
            }
        }
        let (_, splits, split_pages) = best.expect("one split is always possible");
        let room = program.shared_bytes / program.blocks_per_sm;
        let stages =
            if program.bulk { (room / program.stage_bytes()).clamp(1, MOST_STAGES) } else { 2 };
        Self { splits, split_pages, stages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::libraries::Version;

    fn program() -> decode::DecodeProgram {
        let pages = Pages { head_dim: 128, kv_bits: 4, rotated: true };
        decode::DecodeProgram::new(pages, true, Version { major: 9, minor: 0 })
    }

    /// On an H200.
    fn plan(units: usize, pages: usize) -> DecodePlan {
        DecodePlan::new(&program(), 132, units, pages)
    }

    #[test]
    fn splits_cover_the_pages_and_none_is_empty() {
        for units in [1, 7, 8, 32, 256, 2048] {
            for pages in [0, 1, 2, 15, 16, 17, 100, 256, 513, 2048, 8192] {
                let DecodePlan { splits, split_pages, stages } = plan(units, pages);
                assert!(splits * split_pages >= pages && (splits - 1) * split_pages < pages.max(1));
                assert!((1..=MOST_STAGES).contains(&stages));
                assert!(2 * program().block_bytes(stages) <= 227 << 10, "{units} {pages}");
            }
        }
    }

    #[test]
    fn few_sequences_are_split_over_the_chip_and_many_are_not() {
        assert_eq!(plan(32, 256).splits, 4);
        assert_eq!(plan(2048, 256).splits, 1);
        assert!(plan(8, 2048).splits >= 16);
    }
}
