//! The keys and values of a step's new tokens, as the paged cache stores them.

use rayon::prelude::*;

use super::cached_head::{CachedHead, key_into_cache, key_out_of_cache, value_into_cache};
use super::elementwise::dispatch;
use super::isa::Isa;
use crate::backend::DecodeStep;
use crate::quant::kv;

/// Keys and values of a step, `[tokens, kv_heads * head_dim]`, before the rotary embedding.
pub(super) struct NewTokens<'a> {
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) key_mean: Option<&'a [f32]>,
}

/// A token's key and value of one head as the store holds them.
pub(super) enum Entry {
    Floats([Vec<f32>; 2]),
    Codes([Side; 2]),
}

/// The codes of a key or a value.
pub(super) struct Side {
    pub(super) codes: Vec<u8>,
    pub(super) scale: f32,
    pub(super) zero: u8,
}

impl NewTokens<'_> {
    /// `[tokens, kv_heads]`.
    pub(super) fn entries(
        &self,
        isa: Isa,
        head: &CachedHead<'_>,
        step: &DecodeStep,
        kv_heads: usize,
    ) -> Vec<Entry> {
        let positions = step
            .sequences
            .iter()
            .flat_map(|sequence| sequence.held..sequence.held + sequence.added);
        let positions: Vec<usize> = positions.collect();
        let entry = |index: usize| {
            let (position, kv_head, head_dim) =
                (positions[index / kv_heads], index % kv_heads, head.head_dim);
            let own = |rows: &[f32]| rows[index * head_dim..][..head_dim].to_vec();
            let mean =
                self.key_mean.map_or(&[][..], |mean| &mean[kv_head * head_dim..][..head_dim]);
            let (mut key, mut value) = (own(self.k), own(self.v));
            let table = position * head_dim / 2;
            let tables = (&head.cos[table..][..head_dim / 2], &head.sin[table..][..head_dim / 2]);
            let (into_key, into_value) = (&mut key[..], &mut value[..]);
            dispatch!(isa, prepare_body(into_key: &mut [f32], into_value: &mut [f32], head: &CachedHead<'_>, tables: (&[f32], &[f32]), mean: &[f32]));
            if !head.format.is_quantized() {
                return Entry::Floats([key, value]);
            }
            Entry::Codes([key, value].map(|x| {
                let mut codes = vec![0; head_dim];
                let (scale, zero) = kv::quantize(head.format, &x, &mut codes);
                Side { codes, scale, zero }
            }))
        };
        let count = positions.len() * kv_heads;
        // The work of a few tokens is done before another thread wakes.
        if count < 64 {
            return (0..count).map(entry).collect();
        }
        (0..count).into_par_iter().map(entry).collect()
    }
}

#[inline(always)]
fn prepare_body(
    key: &mut [f32],
    value: &mut [f32],
    head: &CachedHead<'_>,
    tables: (&[f32], &[f32]),
    mean: &[f32],
) {
    key_into_cache(key, head, tables, mean);
    if !head.format.is_quantized() {
        key_out_of_cache(key, head, tables);
    }
    value_into_cache(value, head);
}
