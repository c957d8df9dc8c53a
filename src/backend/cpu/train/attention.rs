//! Backward of attention: the weights are made again, a tile of queries at a time.

use rayon::prelude::*;

use super::super::attention::CachedHead;
use super::super::cached_head::{
    key_into_cache, keys_of_cache, prepare_queries, value_into_cache, values_of_cache,
};
use super::super::elementwise::{rope, softmax_row};
use super::super::gemm::{Panels, Rows, Shared, gemm};
use super::super::isa::Isa;
use crate::backend::{AttentionSpec, Qkv};
use crate::quant::{hadamard, kv};

/// Queries of a tile.
const TILE: usize = 48;

/// Gradients with respect to queries, keys and values of consecutive windows, all in the layout of attention's operands.
///
/// # Panics
/// If a slice's length does not fit the specification.
pub(super) fn backward(
    isa: Isa,
    spec: &AttentionSpec,
    qkv: Qkv<&[f32]>,
    key_mean: Option<&[f32]>,
    d_heads: &[f32],
    to: Qkv<&mut [f32]>,
) {
    let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = *spec;
    let [width, kv_width] = [heads * head_dim, kv_heads * head_dim];
    let windows = qkv.q.len() / (width * seq_len).max(1);
    for (values, gradients, width) in
        [(qkv.q, to.q.len(), width), (qkv.k, to.k.len(), kv_width), (qkv.v, to.v.len(), kv_width)]
    {
        assert!(values.len() == windows * seq_len * width && gradients == values.len());
    }
    assert_eq!(d_heads.len(), qkv.q.len());
    let [d_q, d_k, d_v] = [to.q, to.k, to.v].map(|to| Shared(to.as_mut_ptr()));
    let layer = Layer { isa, spec, head: CachedHead::of(spec), qkv, key_mean, d_heads };
    (0..windows * kv_heads).into_par_iter().for_each(|task| {
        // SAFETY: the lengths are checked above, and no two tasks share a window and a key and value head.
        unsafe { layer.kv_head(task / kv_heads, task % kv_heads, [&d_q, &d_k, &d_v]) };
    });
}

struct Layer<'a> {
    isa: Isa,
    spec: &'a AttentionSpec,
    head: CachedHead<'a>,
    qkv: Qkv<&'a [f32]>,
    key_mean: Option<&'a [f32]>,
    d_heads: &'a [f32],
}

/// Keys and values of a head as the products read them, and the sums of their gradients, `[seq_len, head_dim]`.
struct HeadSums {
    /// Of `q k^T`.
    keys: Panels,
    /// Of `d_S k`.
    keys_by_token: Panels,
    /// Of `d_o v^T`.
    values: Panels,
    d_keys: Vec<f32>,
    d_values: Vec<f32>,
}

impl Layer<'_> {
    /// The heads of a window that share a key and value head.
    ///
    /// # Safety
    /// The outputs must be as long as their operands, and no other thread use these heads of the window.
    unsafe fn kv_head(&self, window: usize, kv_head: usize, [d_q, d_k, d_v]: [&Shared; 3]) {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = *self.spec;
        let mean = self.key_mean.map_or(&[][..], |mean| &mean[kv_head * head_dim..][..head_dim]);
        let kv_at = Place { window, head: kv_head, heads: kv_heads, head_dim, seq_len };
        let [source_keys, source_values] = [self.qkv.k, self.qkv.v].map(|from| kv_at.gather(from));
        let (mut keys, mut values) = (source_keys.clone(), source_values.clone());
        keys_of_cache(self.isa, &mut keys, &self.head, mean);
        values_of_cache(self.isa, &mut values, &self.head);
        let mut sums = HeadSums {
            keys: Panels::from_rows(&keys, seq_len, head_dim),
            keys_by_token: Panels::from_columns(&keys, seq_len, head_dim, head_dim),
            values: Panels::from_rows(&values, seq_len, head_dim),
            d_keys: vec![0.0; keys.len()],
            d_values: vec![0.0; values.len()],
        };
        let group = heads / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            let at = Place { head, heads, ..kv_at };
            let mut queries = at.gather(self.qkv.q);
            prepare_queries(self.isa, &mut queries, &self.head);
            let mut d_outputs = at.gather(self.d_heads);
            if self.is_rotated() {
                d_outputs.chunks_exact_mut(head_dim).for_each(hadamard::transform);
            }
            let mut d_queries = vec![0.0; queries.len()];
            for first in (0..seq_len).step_by(TILE) {
                let tile = first * head_dim..(first + TILE).min(seq_len) * head_dim;
                let from = [&queries[tile.clone()], &d_outputs[tile.clone()]];
                self.tile(first, from, &mut d_queries[tile], &mut sums);
            }
            self.queries_back(&mut d_queries);
            // SAFETY: the caller's promise.
            unsafe { at.scatter(&d_queries, d_q) };
        }
        self.keys_back(source_keys, mean, &mut sums.d_keys);
        self.values_back(source_values, &mut sums.d_values);
        // SAFETY: the caller's promise.
        unsafe {
            kv_at.scatter(&sums.d_keys, d_k);
            kv_at.scatter(&sums.d_values, d_v);
        }
    }

    /// A tile of queries of one head from token `first` on: the gradient of the queries, and its part of the others'.
    fn tile(
        &self,
        first: usize,
        [queries, d_outputs]: [&[f32]; 2],
        d_queries: &mut [f32],
        sums: &mut HeadSums,
    ) {
        let AttentionSpec { head_dim, sliding_window, scale: factor, .. } = *self.spec;
        let isa = self.isa;
        let rows = queries.len() / head_dim;
        let end = first + rows;
        let [mut weights, mut d_weights] = [(); 2].map(|()| vec![0.0; rows * end]);
        let own = |values| Rows::new(values, rows, head_dim);
        let keys = sums.keys.part(0..end, 0..head_dim);
        gemm(isa, own(queries), keys, &mut weights, end, false);
        let values = sums.values.part(0..end, 0..head_dim);
        gemm(isa, own(d_outputs), values, &mut d_weights, end, false);
        let reach = sliding_window.unwrap_or(usize::MAX);
        let pairs = weights.chunks_exact_mut(end).zip(d_weights.chunks_exact_mut(end));
        for (row, (weights, d_weights)) in pairs.enumerate() {
            let last = first + row + 1;
            let seen = last.saturating_sub(reach)..last;
            let inverse = 1.0 / softmax_row(isa, &mut weights[seen.clone()], factor);
            weights[..seen.start].fill(0.0);
            weights[last..].fill(0.0);
            weights[seen.clone()].iter_mut().for_each(|weight| *weight *= inverse);
            let terms = weights[seen.clone()].iter().zip(&d_weights[seen.clone()]);
            let mean: f64 = terms.map(|(p, d)| f64::from(*p) * f64::from(*d)).sum();
            d_weights[..seen.start].fill(0.0);
            d_weights[last..].fill(0.0);
            for (weight, d_weight) in weights[seen.clone()].iter().zip(&mut d_weights[seen]) {
                // From here on the gradient of the scores before the factor.
                *d_weight = weight * (*d_weight - mean as f32) * factor;
            }
        }
        let by_token = sums.keys_by_token.part(0..head_dim, 0..end);
        gemm(isa, Rows::new(&d_weights, rows, end), by_token, d_queries, head_dim, false);
        let columns = |values| Panels::from_columns(values, rows, head_dim, head_dim);
        let (d_scores, weights) =
            (Rows::transposed(&d_weights, end), Rows::transposed(&weights, end));
        gemm(isa, d_scores, &columns(queries), &mut sums.d_keys, head_dim, true);
        gemm(isa, weights, &columns(d_outputs), &mut sums.d_values, head_dim, true);
    }

    /// Whether heads are held in the basis of a Hadamard transform.
    fn is_rotated(&self) -> bool {
        self.spec.kv.is_quantized() && self.spec.kv.rotate
    }

    /// The transpose of the rotary embedding: the rotation by the negative angle.
    fn embedding_back(&self, heads: &mut [f32]) {
        let half = self.spec.head_dim / 2;
        let tables = self.head.cos.chunks_exact(half).zip(self.head.sin.chunks_exact(half));
        for (head, (cos, sin)) in heads.chunks_exact_mut(2 * half).zip(tables) {
            let negative: Vec<f32> = sin.iter().map(|sin| -sin).collect();
            rope(self.isa, head, cos, &negative);
        }
    }

    fn queries_back(&self, d_queries: &mut [f32]) {
        if self.is_rotated() && self.spec.kv.after_rope {
            d_queries.chunks_exact_mut(self.spec.head_dim).for_each(hadamard::transform);
        }
        self.embedding_back(d_queries);
    }

    /// From keys as the products read them back to keys before the rotary embedding, which are `keys`.
    fn keys_back(&self, mut keys: Vec<f32>, mean: &[f32], d_keys: &mut [f32]) {
        let AttentionSpec { head_dim, ref kv, .. } = *self.spec;
        let half = head_dim / 2;
        let tables = self.head.cos.chunks_exact(half).zip(self.head.sin.chunks_exact(half));
        if !kv.after_rope {
            self.embedding_back(d_keys);
        }
        let rotate = |head: &mut [f32]| {
            if self.is_rotated() {
                hadamard::transform(head);
            }
        };
        let rows = keys.chunks_exact_mut(head_dim).zip(d_keys.chunks_exact_mut(head_dim));
        for ((key, d_key), tables) in rows.zip(tables) {
            if !kv.after_rope {
                rotate(d_key);
            }
            key_into_cache(key, &self.head, tables, mean);
            kv::block_clipped(kv, key, d_key);
            rotate(d_key);
        }
        if kv.after_rope {
            self.embedding_back(d_keys);
        }
    }

    fn values_back(&self, mut values: Vec<f32>, d_values: &mut [f32]) {
        let AttentionSpec { head_dim, ref kv, .. } = *self.spec;
        let rows = values.chunks_exact_mut(head_dim).zip(d_values.chunks_exact_mut(head_dim));
        for (value, d_value) in rows {
            value_into_cache(value, &self.head);
            kv::block_clipped(kv, value, d_value);
            if self.is_rotated() {
                hadamard::transform(d_value);
            }
        }
    }
}

/// Where a head of a window lies in rows of all heads.
#[derive(Clone, Copy)]
struct Place {
    window: usize,
    head: usize,
    heads: usize,
    head_dim: usize,
    seq_len: usize,
}

impl Place {
    fn offset(&self, token: usize) -> usize {
        ((self.window * self.seq_len + token) * self.heads + self.head) * self.head_dim
    }

    /// The head of every token, `[seq_len, head_dim]`.
    fn gather(&self, from: &[f32]) -> Vec<f32> {
        let heads = (0..self.seq_len).map(|token| &from[self.offset(token)..][..self.head_dim]);
        heads.flatten().copied().collect()
    }

    /// Writes the head of every token.
    ///
    /// # Safety
    /// `to` must be as long as what the head was gathered from, and no other thread use this head of the window.
    unsafe fn scatter(&self, from: &[f32], to: &Shared) {
        for (token, head) in from.chunks_exact(self.head_dim).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                to.at(self.offset(token)).copy_from_nonoverlapping(head.as_ptr(), self.head_dim);
            }
        }
    }
}
