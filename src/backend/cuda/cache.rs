/*! Sequences with a paged cache of one layer, as the kernels' measurements and tests have them: all have new tokens at the
same time, and one new token of each attends to them ([`super::pages`]). */

use super::Cuda;
use super::gpu::Buffer;
pub use super::pages::PAGE_TOKENS;
use super::pages::{Additions, DecodePlan, PagePool, Readers};
use super::tensor::{Activation, Hidden};
use crate::backend::AttentionSpec;
use crate::{Error, Result};

/// Keys and values of some sequences in one layer.
pub struct PagedCache {
    pool: PagePool,
    /// What is subtracted from the embedded keys, `[1, kv_heads * head_dim]`.
    key_mean: Option<Hidden>,
    /// Pages that no sequence has, the next one last.
    free: Vec<i32>,
    /// `[sequences, pages_each]`, on the host and on the device.
    table: Vec<i32>,
    device_table: Buffer,
    pages_each: usize,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    device_lengths: Buffer,
    plan: DecodePlan,
    /// What splits leave for the last of them, and how many have.
    parts: Buffer,
    finished: Buffer,
}

impl PagedCache {
    /// Tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Bytes that one token's keys and values take, all heads together.
    pub fn token_bytes(&self) -> usize {
        self.pool.page_bytes() / PAGE_TOKENS
    }

    /// Bytes of the page of a head and where it begins.
    #[cfg(test)]
    pub(super) fn page(&self, sequence: usize, page: usize, head: usize) -> Result<Vec<u8>> {
        let number = self.table[sequence * self.pages_each + page] as usize;
        let bytes = self.pool.program.pages.bytes();
        let first = (number * self.pool.spec.kv_heads + head) * bytes;
        self.pool.memory.download(first..first + bytes)
    }

    /// Leaves sequences in one split, however long they are.
    #[cfg(test)]
    pub(super) fn unsplit(&mut self) {
        self.plan = DecodePlan { splits: 1, split_pages: self.pages_each, ..self.plan };
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
        let pool = self.page_pool(spec, pages)?;
        let pages_each = spec.seq_len.div_ceil(PAGE_TOKENS);
        let plan = self.decode_plan(&pool, sequences.max(1), 0);
        Ok(PagedCache {
            key_mean,
            free: (0..i32::try_from(pages).expect("pages are counted in 31 bits")).rev().collect(),
            table: vec![0; sequences * pages_each],
            device_table: self.gpu.zeros(4 * sequences * pages_each)?,
            pages_each,
            lengths: vec![0; sequences],
            device_lengths: self.gpu.zeros(4 * sequences)?,
            plan,
            parts: self.gpu.alloc(0)?,
            finished: self.gpu.zeros(4 * sequences * pool.head_tiles())?,
            pool,
        })
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
        let seq_len = cache.pool.spec.seq_len;
        let tokens: usize = added.iter().sum();
        assert!(added.len() == cache.lengths.len());
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
        let new = Additions {
            table: &cache.device_table,
            table_stride: cache.pages_each,
            rows: &rows,
            held: &held,
            sequences: added.len(),
            tokens,
            most_added: added.iter().copied().max().unwrap_or(0),
            touched_pages: most,
        };
        self.append_to_pages(&cache.pool, [k, v], cache.key_mean.as_ref(), &new)?;
        self.plan_decode(cache)
    }

    /// Divides the work again for sequences as long as they are now.
    fn plan_decode(&self, cache: &mut PagedCache) -> Result<()> {
        let longest = cache.lengths.iter().max().map_or(0, |tokens| tokens.div_ceil(PAGE_TOKENS));
        cache.plan = self.decode_plan(&cache.pool, cache.lengths.len(), longest);
        let units = cache.lengths.len() * cache.pool.head_tiles();
        let bytes = units * cache.plan.splits * cache.pool.program.part_bytes();
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
        let AttentionSpec { heads, head_dim, .. } = cache.pool.spec;
        let count = cache.lengths.len();
        assert!(q.rows == count && q.columns == heads * head_dim);
        assert!(out.rows == q.rows && out.columns == q.columns);
        let readers = Readers {
            table: &cache.device_table,
            table_stride: cache.pages_each,
            lengths: &cache.device_lengths,
            count,
            plan: cache.plan,
            parts: &cache.parts,
            finished: &cache.finished,
        };
        self.read_pages(&cache.pool, q.half().into(), out.half().into(), &readers)
    }
}
