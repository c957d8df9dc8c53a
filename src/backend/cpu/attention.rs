/*! Causal attention over entire windows, as the quantized KV cache would see it.

Keys and values make the round trip through the cache's format, so the result is what attention
over a stored cache computes. Scores and outputs are matrix products of [`super::gemm`], a tile of
queries against all keys up to the tile's last position; scores after a row's own position are
exactly zero. Tasks only divide the work, so every thread count has the same bits. */

use std::cell::Cell;

use rayon::prelude::*;

pub(in crate::backend) use super::cached_head::{CachedHead, keys_of_cache};
use super::cached_head::{prepare_queries, rotate_back, values_of_cache};
use super::elementwise::softmax_row;
use super::gemm::{Panels, Rows, Shared, gemm};
use super::isa::Isa;
use crate::backend::{AttentionSpec, Placement, Qkv};
use crate::quant::kv::KvFormat;

/// Queries of a tile: a multiple of the kernels' heights, and few enough that their scores against
/// 2048 keys (384 KiB) stay in L2.
const TILE: usize = 48;
/// Queries of a sequence below which its heads' tiles are computed on one thread.
const FEW_QUERIES: usize = 8;

thread_local! {
    /// Queries, scores and outputs of a tile, kept from tile to tile. Taken out while in use.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// A window of tokens that may stand in any rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window<'a> {
    /// The row of each token.
    rows: &'a [u32],
    /// The tokens before this one are keys only: their queries belong to other windows.
    first: usize,
}

/// Windows of `seq_len` rows each, one after the other.
///
/// # Panics
/// If the last is shorter.
pub(super) fn consecutive_windows(rows: &[u32], seq_len: usize) -> Vec<Window<'_>> {
    let seq_len = seq_len.max(1);
    assert!(rows.len().is_multiple_of(seq_len), "rows that are no multiple of a window");
    rows.chunks(seq_len).map(|rows| Window { rows, first: 0 }).collect()
}

/// The windows of a placement, without the padding after their last own position.
///
/// # Panics
/// If a window's own positions do not follow one another.
pub(super) fn placed_windows(placement: &Placement, seq_len: usize) -> Vec<Window<'_>> {
    let Placement { windows, rows: positions } = placement;
    let windows = windows.chunks(seq_len.max(1)).enumerate().filter_map(|(window, rows)| {
        let own = |at: &usize| positions[rows[*at] as usize] as usize == window * seq_len + at;
        let first = (0..rows.len()).find(own)?;
        let end = rows.len() - (0..rows.len()).rev().take_while(|at| !own(at)).count();
        assert!((first..end).all(|at| own(&at)), "a window's own positions are not one run");
        Some(Window { rows: &rows[..end], first })
    });
    windows.collect()
}

/// Attention of causal windows of `spec.seq_len` tokens at most, on all threads of the current rayon pool. No two windows may
/// have a query of the same row, and rows whose query is in none are not written.
///
/// Queries and `out` are `[tokens, heads * head_dim]`, keys and values `[tokens, kv_heads * head_dim]`, before the rotary
/// embedding. `key_mean` `[kv_heads * head_dim]` is subtracted from the embedded keys of a quantized cache: a query's scores
/// all change by the same number, which the softmax does not see.
///
/// Keys are quantized before or after the embedding as the format says. If heads are rotated by a Hadamard transform, keys
/// after the embedding stay rotated and queries are rotated alike, which leaves their products as they were; the outputs of
/// rotated values are rotated back.
///
/// # Panics
/// If a slice's length does not fit the specification.
pub(super) fn attention(
    isa: Isa,
    spec: &AttentionSpec,
    windows: &[Window<'_>],
    qkv: Qkv<&[f32]>,
    key_mean: Option<&[f32]>,
    out: &mut [f32],
) {
    check(spec, windows, &qkv, out.len());
    if out.is_empty() {
        return;
    }
    let out = Shared(out.as_mut_ptr());
    let head = CachedHead::of(spec);
    let layer = Layer { isa, spec, head, q: qkv.q, out };
    let keys_values = KeysValues { k: qkv.k, v: qkv.v, key_mean };
    (0..windows.len() * spec.kv_heads).into_par_iter().for_each(|task| {
        // SAFETY: the operands are checked above; no two tasks share a head and a window, nor two windows a query's row.
        unsafe {
            layer.kv_head(&windows[task / spec.kv_heads], task % spec.kv_heads, &keys_values);
        };
    });
}

fn check(spec: &AttentionSpec, windows: &[Window<'_>], qkv: &Qkv<&[f32]>, out: usize) {
    let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref cos, ref sin, .. } = *spec;
    let Qkv { q, k, v } = qkv;
    assert!(head_dim.is_multiple_of(2) && heads.is_multiple_of(kv_heads.max(1)));
    let width = heads.checked_mul(head_dim).expect("channels of all heads can be counted");
    let tokens = q.len() / width.max(1);
    assert!(q.len() == tokens * width && q.len() == out);
    // No wider than the queries', so it can be counted too.
    assert!(kv_heads <= heads && k.len() == tokens * kv_heads * head_dim && k.len() == v.len());
    let mut own = vec![false; tokens];
    for window in windows {
        assert!(window.rows.len() <= seq_len);
        for row in &window.rows[window.first..] {
            assert!(
                !std::mem::replace(&mut own[*row as usize], true),
                "row {row} is in two windows"
            );
        }
    }
    let tables = seq_len.checked_mul(head_dim).expect("values of a window can be counted") / 2;
    assert!(cos.len() >= tables && sin.len() >= tables);
    assert!(spec.query_tables().iter().all(|table| table.len() >= tables));
}

/// Keys and values before the rotary embedding, and what is subtracted from the embedded keys.
struct KeysValues<'a> {
    k: &'a [f32],
    v: &'a [f32],
    key_mean: Option<&'a [f32]>,
}

/// The checked operands of [`attention`] besides keys and values, or of attention over a cache.
pub(super) struct Layer<'a> {
    pub(super) isa: Isa,
    pub(super) spec: &'a AttentionSpec,
    pub(super) head: CachedHead<'a>,
    /// `[tokens, heads * head_dim]`, before the rotary embedding.
    pub(super) q: &'a [f32],
    /// As long as `q`.
    pub(super) out: Shared,
}

/// Keys and values of a head as the products read them, from the token of position `first` on.
pub(super) struct HeadPanels<'a> {
    pub(super) keys: &'a Panels,
    pub(super) values: &'a Panels,
    pub(super) first: usize,
}

/// Queries whose positions follow one another: their rows, and the position of the first.
pub(super) struct Queries<'a> {
    pub(super) rows: &'a [u32],
    pub(super) start: usize,
}

impl Layer<'_> {
    /// A key and value head of a window, with all query heads that share it.
    ///
    /// # Safety
    /// The operands are checked, and no other thread may use these heads of the window's queries' rows in `out`.
    unsafe fn kv_head(&self, window: &Window<'_>, kv_head: usize, from: &KeysValues<'_>) {
        let Self { isa, head, .. } = self;
        let AttentionSpec { kv_heads, head_dim, .. } = *self.spec;
        let len = window.rows.len();
        let gathered = |values: &[f32]| {
            let mut head = vec![0.0; len * head_dim];
            let columns = Columns { row_len: kv_heads * head_dim, head: kv_head, head_dim };
            columns.gather(values, window.rows, &mut head);
            head
        };
        let mean = from.key_mean.map_or(&[][..], |mean| &mean[kv_head * head_dim..][..head_dim]);
        let mut keys = gathered(from.k);
        keys_of_cache(*isa, &mut keys, head, mean);
        let keys = Panels::from_rows(&keys, len, head_dim);
        let mut values = gathered(from.v);
        values_of_cache(*isa, &mut values, head);
        let values = Panels::from_columns(&values, len, head_dim, head_dim);
        let queries = Queries { rows: &window.rows[window.first..], start: window.first };
        let panels = HeadPanels { keys: &keys, values: &values, first: 0 };
        // SAFETY: the caller's promise.
        unsafe { self.queries(kv_head, &queries, &panels) };
    }

    /// Queries of all heads that share a key and value head, against its keys and values up to the last of them.
    ///
    /// # Safety
    /// The operands are checked, and no other thread may use these heads of the queries' rows in `out`.
    pub(super) unsafe fn queries(
        &self,
        kv_head: usize,
        queries: &Queries<'_>,
        panels: &HeadPanels<'_>,
    ) {
        let group = self.spec.heads / self.spec.kv_heads;
        let tiles = queries.rows.len().div_ceil(TILE);
        let task = |task: usize| {
            // Long tiles first, so that no thread is left with one at the end.
            let first = (tiles - 1 - task / group) * TILE;
            let rows = &queries.rows[first..queries.rows.len().min(first + TILE)];
            let tile = Queries { rows, start: queries.start + first };
            // SAFETY: the caller's promise; no two tasks share a head and a query.
            unsafe { self.tile(kv_head * group + task % group, &tile, panels) };
        };
        // The work of a few queries is done before another thread wakes.
        if queries.rows.len() < FEW_QUERIES {
            (0..tiles * group).for_each(task);
        } else {
            (0..tiles * group).into_par_iter().for_each(task);
        }
    }

    /// A tile of queries of one head, against the keys and values of the head that it reads.
    ///
    /// # Safety
    /// As [`queries`](Self::queries), of this head and these queries.
    unsafe fn tile(&self, head: usize, tile: &Queries<'_>, panels: &HeadPanels<'_>) {
        let isa = self.isa;
        let AttentionSpec { heads, head_dim, sliding_window, scale, .. } = *self.spec;
        let (rows, own) = (tile.rows.len(), tile.rows);
        // Positions among the keys and values at hand.
        let start = tile.start - panels.first;
        let end = start + rows;
        let mut scratch = SCRATCH.take();
        let wanted = rows * (end + 2 * head_dim);
        scratch.resize(scratch.len().max(wanted), 0.0);
        let (queries, rest) = scratch.split_at_mut(rows * head_dim);
        let (result, rest) = rest.split_at_mut(rows * head_dim);
        let scores = &mut rest[..rows * end];

        let mut sums = [0.0f32; TILE];
        let columns = Columns { row_len: heads * head_dim, head, head_dim };
        columns.gather(self.q, own, queries);
        prepare_queries(isa, queries, &CachedHead::of_queries(self.spec).after(tile.start));
        let keys = panels.keys.part(0..end, 0..head_dim);
        gemm(isa, Rows::new(queries, rows, head_dim), keys, scores, end, false);
        let reach = sliding_window.unwrap_or(usize::MAX);
        for (row, scores) in scores.chunks_exact_mut(end).enumerate() {
            let (past, future) = scores.split_at_mut(start + row + 1);
            let (beyond, seen) = past.split_at_mut(past.len().saturating_sub(reach));
            sums[row] = softmax_row(isa, seen, scale);
            beyond.fill(0.0);
            future.fill(0.0);
        }
        let values = panels.values.part(0..head_dim, 0..end);
        gemm(isa, Rows::new(scores, rows, end), values, result, head_dim, false);
        for (result, sum) in result.chunks_exact_mut(head_dim).zip(sums) {
            let inverse = 1.0 / sum;
            result.iter_mut().for_each(|value| *value *= inverse);
        }
        rotate_back(isa, result, &self.head);
        for (row, result) in own.iter().zip(result.chunks_exact(head_dim)) {
            // SAFETY: this row and head lie inside `out`, which has as many values as `q`, and belong to no other thread, as
            // the caller promises.
            unsafe {
                let out = self.out.at((*row as usize * heads + head) * head_dim);
                out.copy_from_nonoverlapping(result.as_ptr(), head_dim);
            }
        }
        SCRATCH.set(scratch);
    }
}

/// Where a head lies in rows.
struct Columns {
    row_len: usize,
    head: usize,
    head_dim: usize,
}

impl Columns {
    /// Copies the head of the given rows.
    fn gather(&self, from: &[f32], rows: &[u32], to: &mut [f32]) {
        let Self { row_len, head, head_dim } = *self;
        for (row, to) in rows.iter().zip(to.chunks_exact_mut(head_dim)) {
            to.copy_from_slice(&from[*row as usize * row_len + head * head_dim..][..head_dim]);
        }
    }
}

/// Adds each channel's sum over the tokens of the embedded keys `k` `[windows * seq_len, kv_heads *
/// head_dim]` to `sums`.
pub(super) fn add_keys(isa: Isa, spec: &AttentionSpec, k: &[f32], sums: &mut [f64]) {
    let AttentionSpec { kv_heads, head_dim, seq_len, .. } = *spec;
    let unquantized = CachedHead { format: &KvFormat::FULL, ..CachedHead::of(spec) };
    sums.par_chunks_mut(head_dim).enumerate().for_each(|(head, sums)| {
        let mut keys = vec![0.0; seq_len * head_dim];
        for k in k.chunks_exact(seq_len * kv_heads * head_dim) {
            for (row, key) in k.chunks_exact(kv_heads * head_dim).zip(keys.chunks_mut(head_dim)) {
                key.copy_from_slice(&row[head * head_dim..][..head_dim]);
            }
            keys_of_cache(isa, &mut keys, &unquantized, &[]);
            for key in keys.chunks(head_dim) {
                sums.iter_mut().zip(key).for_each(|(sum, key)| *sum += f64::from(*key));
            }
        }
    });
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
