/*! Attention over keys and values as the cache holds them. */

use std::sync::Arc;

use half::f16;

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::attention::{self, FlashAttention};
use super::kernels::heads;
use super::kernels::prepare::{self, Prepare, Role};
use super::kernels::reduce::KeyParts;
use super::slice::Out;
use super::tensor::{Activation, Hidden};
use crate::backend::{AttentionSpec, Qkv};
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

/// The widest head that prepare.cu and attention.cu are written for.
const WIDEST_HEAD: usize = 256;

/// Tables of the rotary embedding that stay on the device: of queries and keys, of two kinds of blocks.
const MOST_TABLES: usize = 4;

/// Cosines and sines on the device, and what they were made from.
pub(super) struct RopeTables {
    host: [Arc<[f32]>; 2],
    cos: Arc<Buffer>,
    sin: Arc<Buffer>,
}

impl Cuda {
    /// Attention of windows that follow one another.
    pub(super) fn attention_of_windows(
        &self,
        spec: &AttentionSpec,
        Qkv { q, k, v }: &Qkv<Activation>,
        key_mean: Option<&Hidden>,
    ) -> Result<Activation> {
        let out = self.half(q.rows, q.columns)?;
        self.attention_into(spec, &Qkv { q, k, v }, key_mean, out.half().into())?;
        Ok(out)
    }

    /// The same into memory that is there, as long as the queries.
    pub(super) fn attention_into(
        &self,
        spec: &AttentionSpec,
        Qkv { q, k, v }: &Qkv<&Activation>,
        key_mean: Option<&Hidden>,
        out: Out<'_, f16>,
    ) -> Result<()> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref kv, .. } = *spec;
        let windows = q.rows / seq_len;
        let rotated = kv.rotate && kv.is_quantized();
        let queries = self.prepare(Role::Queries, spec, q, heads, None)?;
        let keys = self.prepare(Role::Keys, spec, k, kv_heads, key_mean)?;
        let values = self.prepare(Role::Values, spec, v, kv_heads, None)?;
        let windowed = spec.sliding_window.is_some_and(|reach| reach < seq_len);
        self.kernels.launch(&FlashAttention {
            q: (&queries).into(),
            k: (&keys).into(),
            v: (&values).into(),
            out,
            seq_len,
            heads,
            kv_heads,
            scale: spec.scale,
            reach: spec.sliding_window.unwrap_or(seq_len),
            program: attention::AttentionProgram { head_dim, rotated, windowed },
            windows,
        })
    }

    /// Cosines and sines of a rotary embedding on the device. They stay there until [`MOST_TABLES`] others are needed.
    pub(super) fn rope_tables(&self, [cos, sin]: [&Arc<[f32]>; 2]) -> Result<[Arc<Buffer>; 2]> {
        let mut tables = self.rope.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Comparing tables takes longer than a kernel does.
        let same = |a: &Arc<[f32]>, b: &Arc<[f32]>| Arc::ptr_eq(a, b) || a == b;
        let known = |tables: &RopeTables| same(&tables.host[0], cos) && same(&tables.host[1], sin);
        if let Some(RopeTables { cos, sin, .. }) = tables.iter().find(|tables| known(tables)) {
            return Ok([Arc::clone(cos), Arc::clone(sin)]);
        }
        if tables.len() == MOST_TABLES {
            tables.remove(0);
        }
        let made = [Arc::new(self.gpu.upload(cos)?), Arc::new(self.gpu.upload(sin)?)];
        let [on_cos, on_sin] = made.clone();
        let host = [Arc::clone(cos), Arc::clone(sin)];
        tables.push(RopeTables { host, cos: on_cos, sin: on_sin });
        Ok(made)
    }

    /// Queries, keys or values as the products see them, `[windows, heads, seq_len, width]`.
    pub(super) fn prepare(
        &self,
        role: Role,
        spec: &AttentionSpec,
        x: &Activation,
        heads: usize,
        mean: Option<&Hidden>,
    ) -> Result<Buffer> {
        let AttentionSpec { head_dim, seq_len, ref kv, .. } = *spec;
        if head_dim > WIDEST_HEAD {
            return Err(Error::machine(format!(
                "attention on a GPU supports heads of up to {WIDEST_HEAD} channels, not {head_dim}"
            ))
            .hint("run with --device cpu"));
        }
        let rotated = kv.rotate && kv.is_quantized();
        let kv_bits = if kv.is_quantized() { kv.bits } else { 16 };
        let tables = match role {
            Role::Queries => spec.query_tables(),
            Role::Keys | Role::Values => spec.key_tables(),
        };
        let [cos, sin] = self.rope_tables(tables)?;
        let to = self.gpu.alloc(2 * x.rows * heads * heads::padded(head_dim))?;
        self.kernels.launch(&Prepare {
            x: x.half().into(),
            row_stride: x.columns as i64,
            cos: (&*cos).into(),
            sin: (&*sin).into(),
            out: (&to).into(),
            tokens: x.rows,
            heads,
            seq_len,
            clip: kv.clip,
            mean: mean.map(|mean| mean.float().into()),
            role,
            program: prepare::PrepareProgram {
                head_dim,
                kv_bits,
                rotated,
                after_rope: kv.after_rope,
            },
        })?;
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
        let keys = self.prepare(Role::Keys, &spec, k, kv_heads, None)?;
        let windows = k.rows / seq_len;
        let parts = self.gpu.alloc(8 * windows * kv_heads * head_dim)?;
        self.kernels.launch(&KeyParts {
            keys: (&keys).into(),
            seq_len,
            head_dim,
            width: heads::padded(head_dim),
            sums: (&parts).into(),
            windows_and_heads: windows * kv_heads,
        })?;
        self.sum_parts(&parts, windows, sums)
    }
}
