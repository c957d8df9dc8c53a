/*! Causal attention over whole windows, as the quantized KV cache would see it.

Keys and values make the round trip through the cache's format, so the result is what attention
over a stored cache gives. Scores and outputs are matrix products of [`super::gemm`], a tile of
queries against all keys up to the tile's last position; what lies after a row's own position is
exactly zero. Tasks only divide the work, so every thread count gives the same bits. */

use std::cell::Cell;

use rayon::prelude::*;

use super::elementwise::{dispatch, rope_body, softmax_row};
use super::gemm::{Panels, Rows, Shared, gemm};
use super::isa::Isa;
use crate::backend::{AttentionSpec, Placement};
use crate::quant::hadamard;
use crate::quant::kv::{self, KvFormat};

/// Queries of a tile: a multiple of the kernels' heights, and few enough that their scores against
/// 2048 keys (384 KiB) stay in L2.
const TILE: usize = 48;

thread_local! {
    /// Queries, scores and outputs of a tile, kept from tile to tile. Taken out while in use.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The sizes of an attention layer and of its windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head, an even number.
    pub head_dim: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Tokens that a token attends to at most, itself included.
    pub reach: usize,
}

impl AttentionShape {
    /// What a specification says.
    pub(super) fn of(spec: &AttentionSpec) -> Self {
        Self {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            seq_len: spec.seq_len,
            reach: spec.sliding_window.unwrap_or(spec.seq_len),
        }
    }
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
pub(super) fn whole_windows(rows: &[u32], seq_len: usize) -> Vec<Window<'_>> {
    let seq_len = seq_len.max(1);
    assert!(rows.len().is_multiple_of(seq_len), "rows that are not whole windows");
    rows.chunks(seq_len).map(|rows| Window { rows, first: 0 }).collect()
}

/// The windows of a placement, without what fills them up behind their last own place.
///
/// # Panics
/// If a window's own places do not follow one another.
pub(super) fn placed_windows(placement: &Placement, seq_len: usize) -> Vec<Window<'_>> {
    let Placement { windows, rows: places } = placement;
    let windows = windows.chunks(seq_len.max(1)).enumerate().filter_map(|(window, rows)| {
        let own = |at: &usize| places[rows[*at] as usize] as usize == window * seq_len + at;
        let first = (0..rows.len()).find(own)?;
        let end = rows.len() - (0..rows.len()).rev().take_while(|at| !own(at)).count();
        assert!((first..end).all(|at| own(&at)), "a window's own places are not one run");
        Some(Window { rows: &rows[..end], first })
    });
    windows.collect()
}

/// Attention of independent causal windows of `shape.seq_len` tokens each, on all threads of the current rayon pool.
///
/// `q` and `out` are `[windows * seq_len, heads * head_dim]`, `k` and `v`
/// `[windows * seq_len, kv_heads * head_dim]`, all before the rotary embedding, whose tables `cos`
/// and `sin` are `[seq_len, head_dim / 2]`.
///
/// Keys are quantized before or after the embedding as `format` says. If heads are rotated by a
/// Hadamard transform, keys after the embedding stay rotated and queries are rotated alike, which
/// leaves their products as they were; the outputs of rotated values are rotated back.
///
/// # Panics
/// If a slice's length does not fit the shape.
#[expect(clippy::too_many_arguments, reason = "the operands of one operation, all of them plain")]
pub fn attention(
    isa: Isa,
    shape: AttentionShape,
    format: &KvFormat,
    cos: &[f32],
    sin: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    key_mean: Option<&[f32]>,
    out: &mut [f32],
) {
    let rows: Vec<u32> = (0..(q.len() / (shape.heads * shape.head_dim).max(1)) as u32).collect();
    let windows = whole_windows(&rows, shape.seq_len);
    attention_of(isa, shape, &windows, format, cos, sin, q, k, v, key_mean, out);
}

/// As [`attention`], of any windows of `shape.seq_len` tokens at most. No two may have a query of the same row, and rows
/// whose query is in none are not written.
#[expect(clippy::too_many_arguments, reason = "the operands of one operation, all of them plain")]
pub(super) fn attention_of(
    isa: Isa,
    shape: AttentionShape,
    windows: &[Window<'_>],
    format: &KvFormat,
    cos: &[f32],
    sin: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    key_mean: Option<&[f32]>,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim, seq_len, reach } = shape;
    assert!(head_dim.is_multiple_of(2) && heads.is_multiple_of(kv_heads.max(1)));
    let width = heads.checked_mul(head_dim).expect("channels of all heads can be counted");
    let tokens = q.len() / width.max(1);
    assert!(q.len() == tokens * width && q.len() == out.len());
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
    if q.is_empty() {
        return;
    }
    let group = heads / kv_heads;
    let shared = Shared(out.as_mut_ptr());
    (0..windows.len() * kv_heads).into_par_iter().for_each(|task| {
        let (window, kv_head) = (&windows[task / kv_heads], task % kv_heads);
        let len = window.rows.len();
        let tiles = (len - window.first).div_ceil(TILE);
        let from_cache = |values: &[f32], prepare: &dyn Fn(&mut [f32])| {
            let mut head = vec![0.0; len * head_dim];
            let column = kv_head * head_dim;
            gather(values, kv_heads * head_dim, window.rows, column, head_dim, &mut head);
            prepare(&mut head);
            head
        };
        let mean = key_mean.map_or(&[][..], |mean| &mean[kv_head * head_dim..][..head_dim]);
        let keys =
            from_cache(k, &|head| keys_of_cache(isa, head, head_dim, format, cos, sin, mean));
        let keys = Panels::from_rows(&keys, len, head_dim);
        let values = from_cache(v, &|head| values_of_cache(isa, head, head_dim, format));
        let values = Panels::from_columns(&values, len, head_dim, head_dim);
        // Long tiles first, so that no thread is left with one at the end.
        (0..tiles * group).into_par_iter().for_each(|task| {
            let head = kv_head * group + task % group;
            let start = window.first + (tiles - 1 - task / group) * TILE;
            let end = (start + TILE).min(len);
            let rows = end - start;
            let own = &window.rows[start..end];
            let mut scratch = SCRATCH.take();
            let wanted = rows * (end + 2 * head_dim);
            scratch.resize(scratch.len().max(wanted), 0.0);
            let (queries, rest) = scratch.split_at_mut(rows * head_dim);
            let (result, rest) = rest.split_at_mut(rows * head_dim);
            let scores = &mut rest[..rows * end];

            let mut sums = [0.0f32; TILE];
            gather(q, heads * head_dim, own, head * head_dim, head_dim, queries);
            let (cos, sin) = (&cos[start * head_dim / 2..], &sin[start * head_dim / 2..]);
            prepare_queries(isa, queries, head_dim, format, cos, sin);
            let keys = keys.part(0..end, 0..head_dim);
            gemm(isa, Rows::new(queries, rows, head_dim), keys, scores, end, false);
            for (row, scores) in scores.chunks_exact_mut(end).enumerate() {
                let (past, future) = scores.split_at_mut(start + row + 1);
                let (beyond, seen) = past.split_at_mut(past.len().saturating_sub(reach));
                sums[row] = softmax_row(isa, seen, 1.0 / (head_dim as f32).sqrt());
                beyond.fill(0.0);
                future.fill(0.0);
            }
            let values = values.part(0..head_dim, 0..end);
            gemm(isa, Rows::new(scores, rows, end), values, result, head_dim, false);
            for (result, sum) in result.chunks_exact_mut(head_dim).zip(sums) {
                let inverse = 1.0 / sum;
                result.iter_mut().for_each(|value| *value *= inverse);
            }
            rotate_back(isa, result, head_dim, format);
            for (row, result) in own.iter().zip(result.chunks_exact(head_dim)) {
                // SAFETY: this row and head lie inside `out`, which has as many values as `q`, and
                // belong to no other task: a row is the query of one window only.
                unsafe {
                    let out = shared.at((*row as usize * heads + head) * head_dim);
                    out.copy_from_nonoverlapping(result.as_ptr(), head_dim);
                }
            }
            SCRATCH.set(scratch);
        });
    });
}

/// Copies `head_dim` columns from `column` on of the given rows.
fn gather(
    from: &[f32],
    row_len: usize,
    rows: &[u32],
    column: usize,
    head_dim: usize,
    to: &mut [f32],
) {
    for (row, to) in rows.iter().zip(to.chunks_exact_mut(head_dim)) {
        to.copy_from_slice(&from[*row as usize * row_len + column..][..head_dim]);
    }
}

/// Keys `[seq_len, head_dim]` of one head as the products with queries see them. `mean` `[head_dim]`,
/// or empty, is taken from the embedded keys of a quantized cache: a query's scores all change by the
/// same number, which the softmax does not see.
pub fn keys_of_cache(
    isa: Isa,
    keys: &mut [f32],
    head_dim: usize,
    format: &KvFormat,
    cos: &[f32],
    sin: &[f32],
    mean: &[f32],
) {
    dispatch!(isa, keys_body(keys: &mut [f32], head_dim: usize, format: &KvFormat, cos: &[f32], sin: &[f32], mean: &[f32]));
}

/// Adds each channel's sum over the tokens of the embedded keys `k` `[windows * seq_len, kv_heads *
/// head_dim]` to `sums`.
pub fn add_keys(isa: Isa, spec: &AttentionSpec, k: &[f32], sums: &mut [f64]) {
    let AttentionSpec { kv_heads, head_dim, seq_len, .. } = *spec;
    sums.par_chunks_mut(head_dim).enumerate().for_each(|(head, sums)| {
        let mut keys = vec![0.0; seq_len * head_dim];
        for k in k.chunks_exact(seq_len * kv_heads * head_dim) {
            for (row, key) in k.chunks_exact(kv_heads * head_dim).zip(keys.chunks_mut(head_dim)) {
                key.copy_from_slice(&row[head * head_dim..][..head_dim]);
            }
            keys_of_cache(isa, &mut keys, head_dim, &KvFormat::FULL, &spec.cos, &spec.sin, &[]);
            for key in keys.chunks(head_dim) {
                sums.iter_mut().zip(key).for_each(|(sum, key)| *sum += f64::from(*key));
            }
        }
    });
}

#[inline(always)]
fn keys_body(
    keys: &mut [f32],
    head_dim: usize,
    format: &KvFormat,
    cos: &[f32],
    sin: &[f32],
    mean: &[f32],
) {
    let rotate = format.is_quantized() && format.rotate;
    let half = head_dim / 2;
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (key, (cos, sin)) in keys.chunks_exact_mut(head_dim).zip(tables) {
        if format.after_rope {
            rope_body(key, cos, sin);
            key.iter_mut().zip(mean).for_each(|(key, mean)| *key -= mean);
        }
        if rotate {
            hadamard::transform(key);
        }
        kv::round_trip(format, key);
        if !format.after_rope {
            if rotate {
                hadamard::transform(key);
            }
            rope_body(key, cos, sin);
        }
    }
}

/// Values `[seq_len, head_dim]` of one head as the cache gives them back, still rotated if the
/// format rotates.
pub fn values_of_cache(isa: Isa, values: &mut [f32], head_dim: usize, format: &KvFormat) {
    dispatch!(isa, values_body(values: &mut [f32], head_dim: usize, format: &KvFormat));
}

#[inline(always)]
fn values_body(values: &mut [f32], head_dim: usize, format: &KvFormat) {
    for value in values.chunks_exact_mut(head_dim) {
        if format.is_quantized() && format.rotate {
            hadamard::transform(value);
        }
        kv::round_trip(format, value);
    }
}

/// Queries `[tokens, head_dim]` of one head, embedded, and rotated if the keys stay rotated.
pub fn prepare_queries(
    isa: Isa,
    queries: &mut [f32],
    head_dim: usize,
    format: &KvFormat,
    cos: &[f32],
    sin: &[f32],
) {
    dispatch!(isa, queries_body(queries: &mut [f32], head_dim: usize, format: &KvFormat, cos: &[f32], sin: &[f32]));
}

#[inline(always)]
fn queries_body(queries: &mut [f32], head_dim: usize, format: &KvFormat, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (query, (cos, sin)) in queries.chunks_exact_mut(head_dim).zip(tables) {
        rope_body(query, cos, sin);
        if format.is_quantized() && format.rotate && format.after_rope {
            hadamard::transform(query);
        }
    }
}

/// Outputs `[tokens, head_dim]` of one head, back from the basis that the values were rotated to.
pub fn rotate_back(isa: Isa, outputs: &mut [f32], head_dim: usize, format: &KvFormat) {
    if format.is_quantized() && format.rotate {
        dispatch!(isa, rotate_back_body(outputs: &mut [f32], head_dim: usize));
    }
}

#[inline(always)]
fn rotate_back_body(outputs: &mut [f32], head_dim: usize) {
    outputs.chunks_exact_mut(head_dim).for_each(hadamard::transform);
}

#[cfg(test)]
mod tests {
    use super::*;

    const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    const FORMATS: [KvFormat; 5] = [
        KvFormat::FULL,
        INT4,
        KvFormat { rotate: false, ..INT4 },
        KvFormat { after_rope: false, ..INT4 },
        KvFormat { rotate: false, after_rope: false, clip: 0.9, ..INT4 },
    ];

    struct Case {
        shape: AttentionShape,
        cos: Vec<f32>,
        sin: Vec<f32>,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    fn shape(heads: usize, kv_heads: usize, head_dim: usize, seq_len: usize) -> AttentionShape {
        AttentionShape { heads, kv_heads, head_dim, seq_len, reach: seq_len }
    }

    impl Case {
        fn new(shape: AttentionShape, windows: usize) -> Self {
            let AttentionShape { heads, kv_heads, head_dim, seq_len, .. } = shape;
            let wave = |rows: usize, columns: usize, seed: usize| -> Vec<f32> {
                (0..rows * columns).map(|i| ((i * (i + seed) % 1009) as f32 * 0.7).sin()).collect()
            };
            let half = head_dim / 2;
            let angle =
                |i: usize| (i / half) as f32 * 100f32.powf(-((i % half) as f32) / half as f32);
            let tokens = windows * seq_len;
            Self {
                shape,
                cos: (0..seq_len * half).map(|i| angle(i).cos()).collect(),
                sin: (0..seq_len * half).map(|i| angle(i).sin()).collect(),
                q: wave(tokens, heads * head_dim, 3),
                k: wave(tokens, kv_heads * head_dim, 5),
                v: wave(tokens, kv_heads * head_dim, 11),
            }
        }

        fn run(&self, isa: Isa, format: &KvFormat, threads: usize) -> Vec<f32> {
            let mut out = vec![f32::NAN; self.q.len()];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let Self { shape, cos, sin, q, k, v } = self;
            pool.install(|| attention(isa, *shape, format, cos, sin, q, k, v, None, &mut out));
            out
        }

        /// Attention by straight loops, one query at a time.
        fn reference(&self, format: &KvFormat) -> Vec<f32> {
            let AttentionShape { heads, kv_heads, head_dim, seq_len, reach } = self.shape;
            let half = head_dim / 2;
            let rope = |x: &[f32], position: usize| -> Vec<f32> {
                (0..head_dim)
                    .map(|i| {
                        let table = position * half + i % half;
                        let other = if i < half { -x[i + half] } else { x[i - half] };
                        x[i] * self.cos[table] + other * self.sin[table]
                    })
                    .collect()
            };
            let cached = |x: &[f32]| -> Vec<f32> {
                let mut x = x.to_vec();
                if format.bits < 16 {
                    (0..usize::from(format.rotate)).for_each(|_| hadamard::transform(&mut x));
                    kv::round_trip(format, &mut x);
                    (0..usize::from(format.rotate)).for_each(|_| hadamard::transform(&mut x));
                }
                x
            };
            let mut out = vec![0.0; self.q.len()];
            for row in 0..self.q.len() / (heads * head_dim) {
                let (position, window) = (row % seq_len, row / seq_len * seq_len);
                for head in 0..heads {
                    let at = (row * heads + head) * head_dim;
                    let query = rope(&self.q[at..][..head_dim], position);
                    let kv_at =
                        |t| ((window + t) * kv_heads + head / (heads / kv_heads)) * head_dim;
                    let first = (position + 1).saturating_sub(reach);
                    let scores: Vec<f64> = (first..=position)
                        .map(|t| {
                            let key = &self.k[kv_at(t)..][..head_dim];
                            let key = if format.after_rope {
                                cached(&rope(key, t))
                            } else {
                                rope(&cached(key), t)
                            };
                            let dot: f32 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                            (f64::from(dot) / (head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = scores.iter().sum();
                    for (t, score) in (first..).zip(&scores) {
                        let value = cached(&self.v[kv_at(t)..][..head_dim]);
                        for (out, value) in out[at..].iter_mut().zip(value) {
                            *out += (score / total) as f32 * value;
                        }
                    }
                }
            }
            out
        }
    }

    /// Codes can fall on either side of a tie, so quantized cases are compared by their mean.
    #[test]
    fn it_agrees_with_straight_loops() {
        for (shape, windows) in [
            (shape(4, 2, 32, 7), 3),
            (shape(9, 3, 64, 21), 1),
            (shape(1, 1, 96, 49), 2),
            (shape(1, 1, 128, 60), 1),
            (shape(2, 1, 2, 1), 2),
            (AttentionShape { reach: 5, ..shape(4, 2, 32, 60) }, 2),
            (AttentionShape { reach: 50, ..shape(2, 2, 16, 101) }, 1),
        ] {
            let case = Case::new(shape, windows);
            for format in FORMATS {
                let (ours, reference) =
                    (case.run(Isa::Portable, &format, 1), case.reference(&format));
                let errors = ours.iter().zip(&reference).map(|(a, b)| f64::from((a - b).abs()));
                let worst = errors.clone().fold(0.0, f64::max);
                let mean = errors.sum::<f64>() / ours.len() as f64;
                let limit = if format.is_quantized() { 0.05 } else { 1e-5 };
                assert!(worst < limit && mean < 1e-5, "{shape:?} {format:?} {worst:e} {mean:e}");
            }
        }
    }

    #[test]
    fn every_set_and_thread_count_gives_the_same_bits() {
        for (shape, windows) in [(shape(4, 2, 32, 53), 2), (shape(3, 1, 96, 101), 1)] {
            let case = Case::new(shape, windows);
            for format in FORMATS {
                let bits = |out: Vec<f32>| out.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let expected = bits(case.run(Isa::Plain, &format, 1));
                for isa in Isa::available() {
                    for threads in [1, 3] {
                        let ours = bits(case.run(isa, &format, threads));
                        assert!(ours == expected, "{isa:?} {shape:?} {format:?} {threads}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_in_several_windows_gives_the_bits_of_each() {
        // A window of 60 tokens, one that begins with 50 of them, and one of 3 tokens of its own.
        let shape = shape(4, 2, 32, 60);
        let case = Case::new(shape, 2);
        // Other rows are in none.
        let beside = |rows: std::ops::Range<u32>| (0..50).chain(rows);
        let placement = Placement {
            windows: beside(50..60)
                .chain(beside(60..70))
                .chain(110..113)
                .chain([112; 57])
                .collect(),
            rows: (60..110)
                .chain(50..60)
                .chain(110..120)
                .chain([u32::MAX; 40])
                .chain(120..123)
                .chain([u32::MAX; 7])
                .collect(),
        };
        let Case { cos, sin, q, k, v, .. } = &case;
        for format in [KvFormat::FULL, INT4] {
            for isa in Isa::available() {
                let mut ours = vec![f32::NAN; q.len()];
                let windows = placed_windows(&placement, 60);
                attention_of(isa, shape, &windows, &format, cos, sin, q, k, v, None, &mut ours);
                let place = |x: &[f32], width: usize| -> Vec<f32> {
                    let rows = placement.windows.iter();
                    rows.flat_map(|row| x[*row as usize * width..][..width].to_vec()).collect()
                };
                let (q, k, v) = (place(q, 128), place(k, 64), place(v, 64));
                let mut whole = vec![f32::NAN; q.len()];
                attention(isa, shape, &format, cos, sin, &q, &k, &v, None, &mut whole);
                for (row, place) in placement.rows.iter().enumerate() {
                    let ours = &ours[row * 128..][..128];
                    match whole.get(*place as usize * 128..).map(|whole| &whole[..128]) {
                        Some(whole) => assert_eq!(ours, whole, "{isa:?} row {row}"),
                        None => assert!(ours[0].is_nan()),
                    }
                }
            }
        }
    }

    #[test]
    fn the_future_and_other_windows_do_not_matter() {
        let mut case = Case::new(shape(2, 1, 32, 55), 2);
        let before = case.run(Isa::Portable, &INT4, 2);
        for row in [50, 51, 52, 53, 54, 60] {
            case.k[row * 32..][..32].fill(1e3);
            case.v[row * 32..][..32].fill(-1e3);
        }
        let after = case.run(Isa::Portable, &INT4, 2);
        for row in 0..110 {
            let same = before[row * 64..][..64] == after[row * 64..][..64];
            assert_eq!(same, row < 50 || (55..60).contains(&row), "row {row}");
        }
    }
}
