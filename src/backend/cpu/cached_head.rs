//! What becomes of the heads of queries, keys and values on their way to attention's products: rotary embedding, basis, mean
//! keys, and the cache's codes.

use super::elementwise::{dispatch, rope_body};
use super::isa::Isa;
use crate::backend::AttentionSpec;
use crate::quant::hadamard;
use crate::quant::kv::{self, KvFormat};

/// How the cache holds a head.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct CachedHead<'a> {
    /// Channels, an even number.
    pub head_dim: usize,
    /// How keys and values are quantized.
    pub format: &'a KvFormat,
    /// Cosines of RoPE from the first token on, `[tokens, head_dim / 2]`.
    pub cos: &'a [f32],
    /// Its sines.
    pub sin: &'a [f32],
}

impl<'a> CachedHead<'a> {
    /// A head of a layer, from a window's first token on.
    pub(super) fn of(spec: &'a AttentionSpec) -> Self {
        let AttentionSpec { head_dim, kv, cos, sin, .. } = spec;
        Self { head_dim: *head_dim, format: kv, cos, sin }
    }

    /// The same of queries.
    pub(super) fn of_queries(spec: &'a AttentionSpec) -> Self {
        let [cos, sin] = spec.query_tables();
        Self { cos, sin, ..Self::of(spec) }
    }

    /// The same without the first `tokens` tokens.
    pub(super) fn after(&self, tokens: usize) -> Self {
        let first = tokens * self.head_dim / 2;
        Self { cos: &self.cos[first..], sin: &self.sin[first..], ..*self }
    }

    /// Whether heads are held in the basis of a Hadamard transform.
    fn is_rotated(&self) -> bool {
        self.format.is_quantized() && self.format.rotate
    }
}

/// Keys `[tokens, head_dim]` of one head as the products with queries see them. `mean` `[head_dim]`, or empty, is
/// subtracted from the embedded keys.
pub(in crate::backend) fn keys_of_cache(
    isa: Isa,
    keys: &mut [f32],
    head: &CachedHead<'_>,
    mean: &[f32],
) {
    dispatch!(isa, keys_body(keys: &mut [f32], head: &CachedHead<'_>, mean: &[f32]));
}

#[inline(always)]
fn keys_body(keys: &mut [f32], head: &CachedHead<'_>, mean: &[f32]) {
    let CachedHead { head_dim, format, cos, sin } = *head;
    let half = head_dim / 2;
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (key, (cos, sin)) in keys.chunks_exact_mut(head_dim).zip(tables) {
        key_into_cache(key, head, (cos, sin), mean);
        kv::round_trip(format, key);
        key_out_of_cache(key, head, (cos, sin));
    }
}

/// A key as it is quantized.
#[inline(always)]
pub(super) fn key_into_cache(
    key: &mut [f32],
    head: &CachedHead<'_>,
    (cos, sin): (&[f32], &[f32]),
    mean: &[f32],
) {
    if head.format.after_rope {
        rope_body(key, cos, sin);
        key.iter_mut().zip(mean).for_each(|(key, mean)| *key -= mean);
    }
    if head.is_rotated() {
        hadamard::transform(key);
    }
}

/// The rest of what is done to a key that was quantized before the rotary embedding.
#[inline(always)]
pub(super) fn key_out_of_cache(
    key: &mut [f32],
    head: &CachedHead<'_>,
    (cos, sin): (&[f32], &[f32]),
) {
    if !head.format.after_rope {
        if head.is_rotated() {
            hadamard::transform(key);
        }
        rope_body(key, cos, sin);
    }
}

/// Values `[tokens, head_dim]` of one head as they come back from the cache, still rotated if the format rotates.
pub(super) fn values_of_cache(isa: Isa, values: &mut [f32], head: &CachedHead<'_>) {
    dispatch!(isa, values_body(values: &mut [f32], head: &CachedHead<'_>));
}

#[inline(always)]
fn values_body(values: &mut [f32], head: &CachedHead<'_>) {
    for value in values.chunks_exact_mut(head.head_dim) {
        value_into_cache(value, head);
        kv::round_trip(head.format, value);
    }
}

/// A value as it is quantized.
#[inline(always)]
pub(super) fn value_into_cache(value: &mut [f32], head: &CachedHead<'_>) {
    if head.is_rotated() {
        hadamard::transform(value);
    }
}

/// Queries `[tokens, head_dim]` of one head, embedded, and rotated if the keys stay rotated.
pub(super) fn prepare_queries(isa: Isa, queries: &mut [f32], head: &CachedHead<'_>) {
    dispatch!(isa, queries_body(queries: &mut [f32], head: &CachedHead<'_>));
}

#[inline(always)]
fn queries_body(queries: &mut [f32], head: &CachedHead<'_>) {
    let CachedHead { head_dim, format, cos, sin } = *head;
    let half = head_dim / 2;
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (query, (cos, sin)) in queries.chunks_exact_mut(head_dim).zip(tables) {
        rope_body(query, cos, sin);
        if head.is_rotated() && format.after_rope {
            hadamard::transform(query);
        }
    }
}

/// Outputs `[tokens, head_dim]` of one head, back from the basis that the values were rotated to.
pub(super) fn rotate_back(isa: Isa, outputs: &mut [f32], head: &CachedHead<'_>) {
    if head.is_rotated() {
        let head_dim = head.head_dim;
        dispatch!(isa, rotate_back_body(outputs: &mut [f32], head_dim: usize));
    }
}

#[inline(always)]
fn rotate_back_body(outputs: &mut [f32], head_dim: usize) {
    outputs.chunks_exact_mut(head_dim).for_each(hadamard::transform);
}
