/*! The paged cache of keys and values, and attention over it.

A page holds some tokens of every key and value head of a block. Keys lie by channel and values by token, as the panels of
[`super::gemm`] have them, so reading a page is unpacking its rows:

```text
    keys    [head_dim][page_tokens] codes    scale and zero point of each token
    values  [page_tokens][head_dim] codes    scale and zero point of each token
```

At 16 bits nothing is quantized and the values are held in f32, as attention over windows sees them. Everything else is
that attention's own code ([`super::attention`]): a token's result has the bits that it has there. */

use std::cell::Cell;

use half::f16;
use rayon::prelude::*;

use super::attention::{HeadPanels, Layer, Queries};
use super::cached_head::{CachedHead, key_out_of_cache};
use super::code_rows::{row_bytes, set, unpack};
use super::elementwise::dispatch;
use super::gemm::{PANEL, Panels, Shared};
use super::isa::Isa;
use super::new_tokens::{Entry, NewTokens};
use crate::backend::{AttentionSpec, DecodeStep, Qkv, SequenceStep};

/// Tokens of a page at most: those of a panel.
pub(super) const PAGE_TOKENS: usize = PANEL;

/// Keys of all heads that one thread has read before another is awake.
const ALONE_VALUES: usize = 1 << 16;

thread_local! {
    /// Panels of keys and of values, kept from head to head. Taken out while in use.
    static PANELS: Cell<[Panels; 2]> = Cell::default();
}

/// Keys and values of one block.
pub struct PagedCache {
    /// Tokens of a page.
    page_tokens: usize,
    kv_heads: usize,
    head_dim: usize,
    store: Store,
}

enum Store {
    /// `[pages, kv_heads]` of keys, then values.
    Floats(Vec<f32>),
    /// Codes as floats are; scales (f16) and zero points `[pages, kv_heads, 2, page_tokens]`.
    Codes { bits: u8, codes: Vec<u8>, scales: Vec<u16>, zeros: Vec<u8> },
}

/// Where a page's head lies.
struct Place {
    /// Number of the head among all pages' heads.
    block: usize,
    /// Position in the page.
    token: usize,
}

/// Bytes of a page of `spec`'s heads.
pub(super) fn page_bytes(spec: &AttentionSpec, page_tokens: usize) -> usize {
    let AttentionSpec { kv_heads, head_dim, ref kv, .. } = *spec;
    let head = match kv.is_quantized() {
        false => 8 * page_tokens * head_dim,
        true => {
            key_bytes(kv.bits, head_dim, page_tokens)
                + value_bytes(kv.bits, head_dim, page_tokens)
                + 6 * page_tokens
        }
    };
    kv_heads * head
}

fn key_bytes(bits: u8, head_dim: usize, page_tokens: usize) -> usize {
    head_dim * row_bytes(bits, page_tokens)
}

fn value_bytes(bits: u8, head_dim: usize, page_tokens: usize) -> usize {
    page_tokens * row_bytes(bits, head_dim.next_multiple_of(8))
}

impl PagedCache {
    /// An empty cache of pages of `page_tokens` tokens, which is a multiple of 8 and divides [`PAGE_TOKENS`].
    pub(super) fn new(spec: &AttentionSpec, page_tokens: usize, pages: usize) -> Self {
        assert!(page_tokens.is_multiple_of(8) && PAGE_TOKENS.is_multiple_of(page_tokens));
        let AttentionSpec { kv_heads, head_dim, ref kv, .. } = *spec;
        let heads = pages * kv_heads;
        let store = if kv.is_quantized() {
            let bytes = key_bytes(kv.bits, head_dim, page_tokens)
                + value_bytes(kv.bits, head_dim, page_tokens);
            let numbers = 2 * heads * page_tokens;
            let (scales, zeros) = (vec![0; numbers], vec![0; numbers]);
            Store::Codes { bits: kv.bits, codes: vec![0; heads * bytes], scales, zeros }
        } else {
            Store::Floats(vec![0.0; 2 * heads * page_tokens * head_dim])
        };
        Self { page_tokens, kv_heads, head_dim, store }
    }

    fn place(&self, pages: &[u32], position: usize, kv_head: usize) -> Place {
        let page = pages[position / self.page_tokens] as usize;
        Place { block: page * self.kv_heads + kv_head, token: position % self.page_tokens }
    }

    /// Adds the tokens of a step.
    fn append(&mut self, isa: Isa, head: &CachedHead<'_>, step: &DecodeStep, new: &NewTokens<'_>) {
        let Self { kv_heads, head_dim, .. } = *self;
        let entries = new.entries(isa, head, step, kv_heads);
        let mut entries = entries.iter();
        for sequence in &step.sequences {
            for position in sequence.held..sequence.held + sequence.added {
                for kv_head in 0..kv_heads {
                    let place = self.place(&sequence.pages, position, kv_head);
                    let entry = entries.next().expect("an entry for each token and head");
                    self.write(&place, entry, head_dim);
                }
            }
        }
    }

    fn write(&mut self, place: &Place, entry: &Entry, head_dim: usize) {
        let Self { page_tokens, ref mut store, .. } = *self;
        let Place { block, token } = *place;
        match (store, entry) {
            (Store::Floats(floats), Entry::Floats([key, value])) => {
                let side = page_tokens * head_dim;
                let (keys, values) = floats[2 * block * side..][..2 * side].split_at_mut(side);
                for (row, key) in keys.chunks_exact_mut(page_tokens).zip(key) {
                    row[token] = *key;
                }
                values[token * head_dim..][..head_dim].copy_from_slice(value);
            }
            (Store::Codes { bits, codes, scales, zeros }, Entry::Codes(sides)) => {
                let bits = *bits;
                let sizes = [
                    key_bytes(bits, head_dim, page_tokens),
                    value_bytes(bits, head_dim, page_tokens),
                ];
                let all = sizes[0] + sizes[1];
                let (keys, values) = codes[block * all..][..all].split_at_mut(sizes[0]);
                let [key, value] = sides;
                for (row, code) in
                    keys.chunks_exact_mut(row_bytes(bits, page_tokens)).zip(&key.codes)
                {
                    set(bits, row, token, *code);
                }
                let row_len = row_bytes(bits, head_dim.next_multiple_of(8));
                let row = &mut values[token * row_len..][..row_len];
                for (at, code) in value.codes.iter().enumerate() {
                    set(bits, row, at, *code);
                }
                for (side, entry) in sides.iter().enumerate() {
                    let number = (2 * block + side) * page_tokens + token;
                    scales[number] = f16::from_f32(entry.scale).to_bits();
                    zeros[number] = entry.zero;
                }
            }
            _ => unreachable!("entries are made for the store"),
        }
    }

    /// The panels of a head's keys and values of the pages' tokens from `first`, a panel's first, to `end`.
    fn read(
        &self,
        isa: Isa,
        head: &CachedHead<'_>,
        pages: &[u32],
        kv_head: usize,
        tokens: std::ops::Range<usize>,
        panels: &mut [Panels; 2],
    ) {
        let Self { page_tokens, head_dim, .. } = *self;
        let [keys, values] = panels;
        let room = tokens.len().next_multiple_of(PANEL);
        let keys = keys.reshape(room, head_dim);
        let values = values.reshape(head_dim, room);
        for (number, position) in tokens.clone().step_by(page_tokens).enumerate() {
            let at = number * page_tokens;
            let block = self.place(pages, position, kv_head).block;
            let page = Page { cache: self, block };
            dispatch!(isa, read_page_body(page: Page<'_>, keys: &mut [f32], values: &mut [f32], at: usize));
        }
        if !head.format.after_rope && head.format.is_quantized() {
            let head = &head.after(tokens.start);
            let count = tokens.len();
            dispatch!(isa, embed_body(keys: &mut [f32], head: &CachedHead<'_>, count: usize));
        }
    }
}

/// A head of a page.
#[derive(Clone, Copy)]
struct Page<'a> {
    cache: &'a PagedCache,
    block: usize,
}

/// Writes a page's keys and values into panels, from token `at` of them on.
#[inline(always)]
fn read_page_body(page: Page<'_>, keys: &mut [f32], values: &mut [f32], at: usize) {
    let PagedCache { page_tokens, head_dim, ref store, .. } = *page.cache;
    let room = values.len() / head_dim.next_multiple_of(PANEL);
    let keys = &mut keys[at / PANEL * PANEL * head_dim..][..PANEL * head_dim];
    let mut value_row = |token: usize, row: &[f32]| {
        for (panel, row) in row.chunks(PANEL).enumerate() {
            values[(panel * room + at + token) * PANEL..][..row.len()].copy_from_slice(row);
        }
    };
    match store {
        Store::Floats(floats) => {
            let side = page_tokens * head_dim;
            let (from_keys, from_values) =
                floats[2 * page.block * side..][..2 * side].split_at(side);
            for (to, from) in keys.chunks_exact_mut(PANEL).zip(from_keys.chunks_exact(page_tokens))
            {
                to[at % PANEL..][..page_tokens].copy_from_slice(from);
            }
            for (token, from) in from_values.chunks_exact(head_dim).enumerate() {
                value_row(token, from);
            }
        }
        Store::Codes { bits, codes, scales, zeros } => {
            let bits = *bits;
            let key_bytes = key_bytes(bits, head_dim, page_tokens);
            let all = key_bytes + value_bytes(bits, head_dim, page_tokens);
            let (from_keys, from_values) = codes[page.block * all..][..all].split_at(key_bytes);
            let numbers = 2 * page.block * page_tokens..2 * (page.block + 1) * page_tokens;
            let mut grid = [[0.0f32; PAGE_TOKENS]; 4];
            let [key_scales, key_zeros, value_scales, value_zeros] = &mut grid;
            let sides = scales[numbers.clone()]
                .chunks_exact(page_tokens)
                .zip(zeros[numbers].chunks_exact(page_tokens));
            let into = [(key_scales, key_zeros), (value_scales, value_zeros)];
            for ((scales, zeros), (to_scales, to_zeros)) in sides.zip(into) {
                for token in 0..page_tokens {
                    to_scales[token] = f16::from_bits(scales[token]).to_f32();
                    to_zeros[token] = f32::from(zeros[token]);
                }
            }
            let [key_scales, key_zeros, value_scales, value_zeros] = &grid;
            let rows = from_keys.chunks_exact(row_bytes(bits, page_tokens));
            for (to, from) in keys.chunks_exact_mut(PANEL).zip(rows) {
                let to = &mut to[at % PANEL..][..page_tokens];
                unpack(bits, from, to);
                for ((to, scale), zero) in to.iter_mut().zip(key_scales).zip(key_zeros) {
                    *to = (*to - zero) * scale;
                }
            }
            let padded = head_dim.next_multiple_of(8);
            let mut row = vec![0.0; padded];
            for (token, from) in from_values.chunks_exact(row_bytes(bits, padded)).enumerate() {
                unpack(bits, from, &mut row);
                let (scale, zero) = (value_scales[token], value_zeros[token]);
                row.iter_mut().for_each(|x| *x = (*x - zero) * scale);
                value_row(token, &row[..head_dim]);
            }
        }
    }
}

/// Embeds the first `tokens` keys of panels, which were quantized before the rotary embedding.
#[inline(always)]
fn embed_body(keys: &mut [f32], head: &CachedHead<'_>, tokens: usize) {
    let CachedHead { head_dim, cos, sin, .. } = *head;
    let half = head_dim / 2;
    let mut key = vec![0.0; head_dim];
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (token, tables) in (0..tokens).zip(tables) {
        let panel = &mut keys[token / PANEL * PANEL * head_dim..][..PANEL * head_dim];
        let column = token % PANEL;
        for (key, row) in key.iter_mut().zip(panel.chunks_exact(PANEL)) {
            *key = row[column];
        }
        key_out_of_cache(&mut key, head, tables);
        for (key, row) in key.iter().zip(panel.chunks_exact_mut(PANEL)) {
            row[column] = *key;
        }
    }
}

/// Adds the keys and values of a step to the cache, and attends: `out` is `[tokens, heads * head_dim]`, as the queries
/// are, `key_mean` `[kv_heads * head_dim]`.
///
/// # Panics
/// If a slice's length does not fit the step, or a sequence has too few pages or tokens beyond `spec.seq_len`.
pub(super) fn cached_attention(
    isa: Isa,
    spec: &AttentionSpec,
    cache: &mut PagedCache,
    step: &DecodeStep,
    qkv: Qkv<&[f32]>,
    key_mean: Option<&[f32]>,
    out: &mut [f32],
) {
    check(spec, cache, step, &qkv, out.len());
    let head = CachedHead::of(spec);
    cache.append(isa, &head, step, &NewTokens { k: qkv.k, v: qkv.v, key_mean });
    let cache = &*cache;
    let rows: Vec<u32> = (0..step.tokens() as u32).collect();
    let first_rows = step.sequences.iter().scan(0, |next, sequence| {
        *next += sequence.added;
        Some(*next - sequence.added)
    });
    let sequences: Vec<(usize, &SequenceStep)> = first_rows.zip(&step.sequences).collect();
    let layer = Layer { isa, spec, head, q: qkv.q, out: Shared(out.as_mut_ptr()) };
    let task = |task: usize| {
        let ((row, sequence), kv_head) = (sequences[task / spec.kv_heads], task % spec.kv_heads);
        let SequenceStep { held, added, ref pages } = *sequence;
        // Keys before every query's window are left out, entire panels of them.
        let unseen = spec.sliding_window.map_or(0, |reach| (held + 1).saturating_sub(reach));
        let first = unseen / PANEL * PANEL;
        let mut panels = PANELS.take();
        cache.read(isa, &layer.head, pages, kv_head, first..held + added, &mut panels);
        let queries = Queries { rows: &rows[row..row + added], start: held };
        let own = HeadPanels { keys: &panels[0], values: &panels[1], first };
        // SAFETY: `check` has found the rows of all sequences in `out`, and no two tasks share a row and a head.
        unsafe { layer.queries(kv_head, &queries, &own) };
        PANELS.set(panels);
    };
    let tasks = 0..sequences.len() * spec.kv_heads;
    let read: usize = step.sequences.iter().map(|sequence| sequence.held + sequence.added).sum();
    if read * spec.kv_heads * spec.head_dim <= ALONE_VALUES {
        tasks.for_each(task);
    } else {
        tasks.into_par_iter().for_each(task);
    }
}

fn check(
    spec: &AttentionSpec,
    cache: &PagedCache,
    step: &DecodeStep,
    qkv: &Qkv<&[f32]>,
    out: usize,
) {
    let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref cos, ref sin, .. } = *spec;
    let tokens = step.tokens();
    assert!(head_dim.is_multiple_of(2) && heads.is_multiple_of(kv_heads.max(1)));
    assert!(cache.kv_heads == kv_heads && cache.head_dim == head_dim);
    assert!(qkv.q.len() == tokens * heads * head_dim && out == qkv.q.len());
    assert!(qkv.k.len() == tokens * kv_heads * head_dim && qkv.v.len() == qkv.k.len());
    assert!(cos.len() >= seq_len * head_dim / 2 && sin.len() >= seq_len * head_dim / 2);
    for SequenceStep { pages, held, added } in &step.sequences {
        let end = held + added;
        assert!(*added > 0 && end <= seq_len && end <= pages.len() * cache.page_tokens);
    }
}

#[cfg(test)]
#[path = "paged_tests.rs"]
mod tests;
