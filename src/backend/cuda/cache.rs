/*! The paged cache of keys and values: tokens come in as attention quantizes them, and one new token of each
sequence attends to them (cache.cu, decode.cu; pages.cuh has the layout).

A page holds [`PAGE_TOKENS`] tokens of all key and value heads of one layer; a table names the pages of each sequence. Keys
are held after the rotary embedding: keys that a recipe quantizes before it would have to be embedded again whenever
they are read, so such recipes are refused. */

use super::Cuda;
use super::gpu::Buffer;
pub use super::kernels::cache::PAGE_TOKENS;
use super::kernels::cache::{Append, Pages, WIDEST_HEAD};
use super::kernels::decode::{self, DecodeAttention, MOST_STAGES};
use super::tensor::{Activation, Hidden};
use crate::backend::AttentionSpec;
use crate::{Error, Result};

/// Keys and values of some sequences in one layer.
pub struct PagedCache {
    spec: AttentionSpec,
    /// What is subtracted from the embedded keys, `[1, kv_heads * head_dim]`.
    key_mean: Option<Hidden>,
    cos: Buffer,
    sin: Buffer,
    /// `[pool_pages, kv_heads, page_bytes]`.
    pool: Buffer,
    pool_pages: usize,
    /// Pages that no sequence has, the next one last.
    free: Vec<i32>,
    /// `[sequences, pages_each]`, on the host and on the device.
    table: Vec<i32>,
    device_table: Buffer,
    pages_each: usize,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    device_lengths: Buffer,
    program: decode::DecodeProgram,
    plan: DecodePlan,
    /// What splits leave for the last of them, and how many have.
    parts: Buffer,
    finished: Buffer,
}

/// How the work of a token is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DecodePlan {
    /// Parts of each sequence.
    splits: usize,
    /// Pages of a part.
    split_pages: usize,
    /// Groups of pages that a warp has in flight.
    stages: usize,
}

impl PagedCache {
    /// Tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Bytes that one token's keys and values take, all heads together.
    pub fn token_bytes(&self) -> usize {
        self.program.pages.bytes() * self.spec.kv_heads / PAGE_TOKENS
    }

    /// Bytes of the page of a head and where it begins.
    #[cfg(test)]
    pub(super) fn page(&self, sequence: usize, page: usize, head: usize) -> Result<Vec<u8>> {
        let number = self.table[sequence * self.pages_each + page] as usize;
        let bytes = self.program.pages.bytes();
        let first = (number * self.spec.kv_heads + head) * bytes;
        self.pool.download(first..first + bytes)
    }

    /// Leaves sequences in one split, however long they are.
    #[cfg(test)]
    pub(super) fn unsplit(&mut self) {
        self.plan = DecodePlan { splits: 1, split_pages: self.pages_each, ..self.plan };
    }

    fn head_tiles(&self) -> usize {
        let group = self.spec.heads / self.spec.kv_heads;
        self.spec.kv_heads * group.div_ceil(self.program.tile_heads)
    }
}

impl Cuda {
    /// An empty cache of `pages` pages for `sequences` sequences of up to `spec.seq_len` tokens. `key_mean` is subtracted from the
    /// embedded keys where the format says so.
    ///
    /// # Errors
    /// A machine error where pages cannot hold such heads or such codes, or memory does not suffice.
    pub fn paged_cache(
        &self,
        spec: &AttentionSpec,
        sequences: usize,
        pages: usize,
        key_mean: Option<Hidden>,
    ) -> Result<PagedCache> {
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
        if kv.is_quantized() && kv.bits > 4 {
            return Err(refused(format!(
                "the paged cache holds codes of 2 to 4 bits, or f16, but not of {} bits",
                kv.bits
            )));
        }
        if spec.sliding_window.is_some_and(|reach| reach < seq_len) {
            return Err(refused(
                "the paged cache is read entirely, without a sliding window".to_owned(),
            ));
        }
        assert!(heads.is_multiple_of(kv_heads) && kv.is_centered() == key_mean.is_some());
        let quantized = kv.is_quantized();
        let pages_held = Pages {
            head_dim,
            kv_bits: if quantized { 4 } else { 16 },
            rotated: quantized && kv.rotate,
        };
        let capability = self.gpu.device.capability;
        let program = decode::DecodeProgram::new(pages_held, heads == kv_heads, capability);
        let pages_each = seq_len.div_ceil(PAGE_TOKENS);
        let pool_bytes = pages * kv_heads * program.pages.bytes();
        let mut cache = PagedCache {
            spec: spec.clone(),
            key_mean,
            cos: self.gpu.upload(&spec.cos)?,
            sin: self.gpu.upload(&spec.sin)?,
            pool: self.gpu.alloc(pool_bytes)?,
            pool_pages: pages,
            free: (0..i32::try_from(pages).expect("pages are counted in 31 bits")).rev().collect(),
            table: vec![0; sequences * pages_each],
            device_table: self.gpu.zeros(4 * sequences * pages_each)?,
            pages_each,
            lengths: vec![0; sequences],
            device_lengths: self.gpu.zeros(4 * sequences)?,
            program,
            plan: DecodePlan::new(&program, self.gpu.multiprocessors, 1, 0),
            parts: self.gpu.alloc(0)?,
            finished: self.gpu.alloc(0)?,
        };
        cache.finished = self.gpu.zeros(4 * sequences * cache.head_tiles())?;
        let units = sequences * cache.head_tiles();
        cache.plan = DecodePlan::new(&program, self.gpu.multiprocessors, units, 0);
        Ok(cache)
    }

    /// Adds `added[i]` tokens to sequence i: rows of `k` and `v` `[tokens, kv_heads * head_dim]`, before the rotary
    /// embedding, those of the first sequence first.
    ///
    /// # Errors
    /// A machine error where no pages are left. Then nothing was added.
    pub fn append(
        &self,
        cache: &mut PagedCache,
        k: &Activation,
        v: &Activation,
        added: &[usize],
    ) -> Result<()> {
        let AttentionSpec { kv_heads, head_dim, seq_len, ref kv, .. } = cache.spec;
        let tokens: usize = added.iter().sum();
        assert!(added.len() == cache.lengths.len() && tokens <= k.rows && tokens <= v.rows);
        assert!(k.columns == kv_heads * head_dim && v.columns == k.columns);
        let fits = |(held, added): (&usize, &usize)| held + added <= seq_len;
        assert!(cache.lengths.iter().zip(added).all(fits));
        let pages = |tokens: usize| tokens.div_ceil(PAGE_TOKENS);
        let held = cache.lengths.clone();
        let needed: usize =
            held.iter().zip(added).map(|(held, added)| pages(held + added) - pages(*held)).sum();
        if needed > cache.free.len() {
            return Err(Error::machine(format!(
                "the cache has too few pages: {needed} were needed, {} are left",
                cache.free.len()
            ))
            .hint("hold fewer or shorter sequences"));
        }
        for (sequence, added) in added.iter().enumerate() {
            let length = held[sequence] + added;
            for page in pages(held[sequence])..pages(length) {
                let number = cache.free.pop().expect("counted above");
                cache.table[sequence * cache.pages_each + page] = number;
            }
            cache.lengths[sequence] = length;
        }
        let on_device = |values: &[usize]| {
            let count = |value: &usize| i32::try_from(*value).expect("tokens count in 31 bits");
            self.gpu.upload(&values.iter().map(count).collect::<Vec<i32>>())
        };
        if needed > 0 {
            cache.device_table = self.gpu.upload(&cache.table)?;
        }
        cache.device_lengths = on_device(&cache.lengths)?;
        let first_rows = added.iter().scan(0, |next, added| {
            *next += added;
            Some(*next)
        });
        let rows = on_device(&std::iter::once(0).chain(first_rows).collect::<Vec<usize>>())?;
        let touched = |(held, added): (&usize, &usize)| {
            if *added == 0 { 0 } else { pages(held + added) - held / PAGE_TOKENS }
        };
        let most = held.iter().zip(added).map(touched).max().unwrap_or(0);
        let held = on_device(&held)?;
        let kv_bits = if kv.is_quantized() { kv.bits } else { 16 };
        self.kernels.launch(&Append {
            k: k.half().into(),
            v: v.half().into(),
            row_stride: k.columns as i64,
            cos: (&cache.cos).into(),
            sin: (&cache.sin).into(),
            mean: cache.key_mean.as_ref().map(|mean| mean.float().into()),
            pool: (&cache.pool).into(),
            table: (&cache.device_table).into(),
            table_stride: cache.pages_each,
            rows: (&rows).into(),
            held: (&held).into(),
            kv_heads,
            clip: kv.clip,
            pages: Pages { kv_bits, ..cache.program.pages },
            seq_len,
            pool_pages: cache.pool_pages,
            sequences: added.len(),
            tokens,
            touched_pages: most,
        })?;
        self.plan_decode(cache)
    }

    /// Divides the work again for sequences as long as they are now.
    fn plan_decode(&self, cache: &mut PagedCache) -> Result<()> {
        let units = cache.lengths.len() * cache.head_tiles();
        let longest = cache.lengths.iter().max().map_or(0, |tokens| tokens.div_ceil(PAGE_TOKENS));
        cache.plan = DecodePlan::new(&cache.program, self.gpu.multiprocessors, units, longest);
        let bytes = units * cache.plan.splits * cache.program.part_bytes();
        if cache.plan.splits > 1 && cache.parts.bytes() < bytes {
            cache.parts = self.gpu.alloc(bytes)?;
        }
        Ok(())
    }

    /// Attention of each sequence's last token over all of its tokens. `q`: its query heads before the rotary embedding,
    /// `[sequences, heads * head_dim]`. An empty sequence gets zeros.
    pub fn decode(&self, cache: &PagedCache, q: &Activation) -> Result<Activation> {
        let out = self.half(q.rows, q.columns)?;
        self.decode_into(cache, q, &out)?;
        Ok(out)
    }

    /// The same into a tensor that is there.
    pub fn decode_into(&self, cache: &PagedCache, q: &Activation, out: &Activation) -> Result<()> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = cache.spec;
        let sequences = cache.lengths.len();
        assert!(q.rows == sequences && q.columns == heads * head_dim);
        assert!(out.rows == q.rows && out.columns == q.columns);
        let DecodePlan { splits, split_pages, stages } = cache.plan;
        self.kernels.launch(&DecodeAttention {
            q: q.half().into(),
            query_stride: q.columns as i64,
            cos: (&cache.cos).into(),
            sin: (&cache.sin).into(),
            pool: (&cache.pool).into(),
            table: (&cache.device_table).into(),
            table_stride: cache.pages_each,
            lengths: (&cache.device_lengths).into(),
            out: out.half().into(),
            parts: (&cache.parts).into(),
            finished: (&cache.finished).into(),
            heads,
            kv_heads,
            split_pages,
            stages,
            scale: 1.0 / (head_dim as f32).sqrt(),
            program: cache.program,
            seq_len,
            pool_pages: cache.pool_pages,
            sequences,
            head_tiles: cache.head_tiles(),
            splits,
        })
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
