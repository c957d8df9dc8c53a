/*! Attention over keys and values as the cache holds them. */

use std::sync::Arc;

use super::gpu::Buffer;
use super::launch::{Geometry, arguments};
use super::tensor::{Activation, Hidden};
use super::{Cuda, THREADS, kernels};
use crate::backend::{AttentionSpec, Qkv};
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

/// The widest head that prepare.cu and attention.cu are written for.
const WIDEST_HEAD: usize = 256;
/// Threads of a block of flash_attention, as in attention.cu.
const ATTENTION_THREADS: usize = 128;

/// Cosines and sines on the device, and what they were made from.
pub(super) struct RopeTables {
    host: [Arc<[f32]>; 2],
    cos: Buffer,
    sin: Buffer,
}

impl Cuda {
    /// Attention of windows that follow one another.
    pub(super) fn attention_of_windows(
        &self,
        spec: &AttentionSpec,
        Qkv { q, k, v }: &Qkv<Activation>,
        key_mean: Option<&Hidden>,
    ) -> Result<Activation> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref kv, .. } = *spec;
        let windows = q.rows / seq_len;
        let width = head_dim.next_multiple_of(16);
        let rotated = kv.rotate && kv.is_quantized();
        let queries = self.prepare("prepare_queries", spec, q, heads, None)?;
        let keys = self.prepare("prepare_keys", spec, k, kv_heads, key_mean)?;
        let values = self.prepare("prepare_values", spec, v, kv_heads, None)?;
        let out = self.half(q.rows, q.columns)?;
        // attention.cu: QUERY_ROWS, KEY_ROWS, PITCH.
        let windowed = spec.sliding_window.is_some_and(|reach| reach < seq_len);
        let query_rows = if width <= if windowed { 64 } else { 128 } { 128 } else { 64 };
        let key_rows = if width <= 128 { 64 } else { 32 };
        let pitch = if width.is_multiple_of(64) { 2 * width } else { 2 * width + 16 };
        self.kernels.launch(
            "attention",
            &kernels::attention(head_dim, rotated, windowed),
            "flash_attention",
            Geometry {
                grid: (seq_len.div_ceil(query_rows), heads, windows),
                threads: ATTENTION_THREADS,
                shared_bytes: (query_rows + 4 * key_rows) * pitch,
            },
            arguments![
                &queries,
                &keys,
                &values,
                out.half(),
                seq_len,
                heads,
                kv_heads,
                1.0 / (head_dim as f32).sqrt(),
                spec.sliding_window.unwrap_or(seq_len)
            ],
        )?;
        Ok(out)
    }

    /// Queries, keys or values as the products see them, `[windows, heads, seq_len, width]`.
    fn prepare(
        &self,
        entry: &str,
        spec: &AttentionSpec,
        x: &Activation,
        heads: usize,
        mean: Option<&Hidden>,
    ) -> Result<Buffer> {
        let AttentionSpec { head_dim, seq_len, ref kv, .. } = *spec;
        if head_dim > WIDEST_HEAD {
            return Err(Error::machine(format!(
                "attention on a GPU knows heads of up to {WIDEST_HEAD} channels, not {head_dim}"
            ))
            .hint("run with --device cpu"));
        }
        let width = head_dim.next_multiple_of(16);
        let rotated = kv.rotate && kv.is_quantized();
        let kv_bits = if kv.is_quantized() { kv.bits } else { 16 };
        let prepared = kernels::prepare(head_dim, kv_bits, rotated, kv.after_rope);
        let mut rope = self.rope.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Comparing tables takes longer than a kernel does.
        let same = |a: &Arc<[f32]>, b: &Arc<[f32]>| Arc::ptr_eq(a, b) || a == b;
        let known = |RopeTables { host: [cos, sin], .. }: &RopeTables| {
            same(cos, &spec.cos) && same(sin, &spec.sin)
        };
        if !rope.as_ref().is_some_and(known) {
            *rope = Some(RopeTables {
                cos: self.gpu.upload(&spec.cos)?,
                sin: self.gpu.upload(&spec.sin)?,
                host: [Arc::clone(&spec.cos), Arc::clone(&spec.sin)],
            });
        }
        let RopeTables { cos, sin, .. } = rope.as_ref().expect("made above");
        // prepare.cu: QUADS, QUAD_LANES, QUAD_HEADS.
        let quads = head_dim.is_multiple_of(16) && (!rotated || head_dim.is_power_of_two());
        let (lanes, together) =
            if quads { ((head_dim / 8).next_power_of_two(), 4) } else { (32, 1) };
        let to = self.gpu.alloc(2 * x.rows * heads * width)?;
        let tasks = x.rows * heads.div_ceil(together);
        self.kernels.launch(
            "prepare",
            &prepared,
            entry,
            Geometry::line(tasks.div_ceil(THREADS / lanes), THREADS),
            arguments![
                x.half(),
                x.columns as i64,
                cos,
                sin,
                &to,
                x.rows,
                heads,
                seq_len,
                kv.clip,
                mean.map(Hidden::float)
            ],
        )?;
        Ok(to)
    }

    /// Adds each channel's sum over the tokens of the embedded keys to `sums`.
    pub(super) fn add_key_sums(
        &self,
        spec: &AttentionSpec,
        k: &Activation,
        sums: &mut [f64],
    ) -> Result<()> {
        let spec = AttentionSpec { kv: KvFormat::FULL, ..spec.clone() };
        let AttentionSpec { kv_heads, head_dim, seq_len, .. } = spec;
        let keys = self.prepare("prepare_keys", &spec, k, kv_heads, None)?;
        let windows = k.rows / seq_len;
        let parts = self.gpu.alloc(8 * windows * kv_heads * head_dim)?;
        self.launch(
            "reduce",
            "key_parts",
            Geometry::line(windows * kv_heads, THREADS),
            arguments![&keys, seq_len, head_dim, head_dim.next_multiple_of(16), &parts],
        )?;
        self.sum_parts(&parts, windows, sums)
    }
}
