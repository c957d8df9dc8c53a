//! Backward of attention: the weights of a head and a window are made again as a matrix, since products of matrices are what takes time.

use super::{Floats, Sum};
use crate::Result;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::gpu::Buffer;
use crate::backend::cuda::kernels::heads::padded;
use crate::backend::cuda::kernels::prepare::Role;
use crate::backend::cuda::kernels::train::WeightsBackward;
use crate::backend::cuda::kernels::train_heads::{
    HeadsProgram, KeysBackward, OutputsByHead, QueriesBackward, ValuesBackward,
};
use crate::backend::cuda::slice::In;
use crate::backend::cuda::tensor::{Activation, Hidden};
use crate::backend::{AttentionSpec, Qkv};

/// Operands of the products, by heads `[windows, heads, seq_len, padded head]`, and their gradients.
struct ByHead {
    queries: Buffer,
    keys: Buffer,
    values: Buffer,
    d_outputs: Buffer,
    d_queries: Buffer,
    d_keys: Buffer,
    d_values: Buffer,
}

impl Cuda {
    /// [`attention_backward`](crate::backend::Train::attention_backward).
    pub(super) fn windows_backward(
        &self,
        spec: &AttentionSpec,
        Qkv { q, k, v }: &Qkv<Activation>,
        key_mean: Option<&Hidden>,
        d_heads: &Hidden,
    ) -> Result<Qkv<Hidden>> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref kv, .. } = *spec;
        let tokens = q.rows;
        let program = HeadsProgram {
            head_dim,
            kv_bits: if kv.is_quantized() { kv.bits } else { 16 },
            rotated: kv.rotate && kv.is_quantized(),
            after_rope: kv.after_rope,
        };
        let operand = |role, x: &Activation, heads: usize, mean: Option<&Hidden>| {
            let prepared = self.prepare(role, spec, x, heads, mean)?;
            self.widened_halves((&prepared).into(), tokens * heads * padded(head_dim))
        };
        let d_outputs = self.gpu.alloc(4 * tokens * heads * padded(head_dim))?;
        self.kernels.launch(&OutputsByHead {
            d: d_heads.float().into(),
            tokens,
            heads,
            seq_len,
            to: (&d_outputs).into(),
            program,
        })?;
        let room = |heads: usize| self.gpu.alloc(4 * tokens * heads * padded(head_dim));
        let all = ByHead {
            queries: operand(Role::Queries, q, heads, None)?,
            keys: operand(Role::Keys, k, kv_heads, key_mean)?,
            values: operand(Role::Values, v, kv_heads, None)?,
            d_outputs,
            d_queries: room(heads)?,
            d_keys: room(kv_heads)?,
            d_values: room(kv_heads)?,
        };
        let [scores, d_weights] = [(); 2].map(|()| self.gpu.alloc(4 * seq_len * seq_len));
        let squares = [scores?, d_weights?];
        for head in 0..tokens / seq_len * heads {
            self.head_backward(spec, &all, head, &squares)?;
        }
        drop(squares);
        self.heads_back(spec, program, (&[q, k, v], key_mean), &all)
    }

    /// A query head of a window, numbered by windows and heads.
    fn head_backward(
        &self,
        spec: &AttentionSpec,
        all: &ByHead,
        head: usize,
        [scores, d_weights]: &[Buffer; 2],
    ) -> Result<()> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, sliding_window, .. } = *spec;
        let (width, group) = (padded(head_dim), heads / kv_heads);
        let kv_head = head / heads * kv_heads + head % heads / group;
        let of =
            |buffer, head: usize| Floats::new(In::from(buffer).skip(head * seq_len * width), width);
        let [queries, d_outputs] = [&all.queries, &all.d_outputs].map(|all| of(all, head));
        let [keys, values] = [&all.keys, &all.values].map(|all| of(all, kv_head));
        let square = |buffer| Floats::new(buffer, seq_len);
        let inner = [seq_len, width, seq_len];
        self.times_transposed(queries, keys, square(scores), inner)?;
        self.times_transposed(d_outputs, values, square(d_weights), inner)?;
        self.kernels.launch(&WeightsBackward {
            scores: scores.into(),
            d_weights: d_weights.into(),
            tokens: seq_len,
            reach: sliding_window.unwrap_or(seq_len),
            factor: spec.scale,
        })?;
        let outer = [seq_len, seq_len, width];
        let (d_scores, weights) = (square(d_weights), square(scores));
        self.times(d_scores, keys, of(&all.d_queries, head), outer, Sum::Fresh)?;
        // The heads that share a key and value head follow one another.
        let sum = if head.is_multiple_of(group) { Sum::Fresh } else { Sum::Added };
        self.transposed_times(d_scores, queries, of(&all.d_keys, kv_head), outer, sum)?;
        self.transposed_times(weights, d_outputs, of(&all.d_values, kv_head), outer, sum)
    }

    /// Gradients of what entered attention, in rows.
    fn heads_back(
        &self,
        spec: &AttentionSpec,
        program: HeadsProgram,
        ([q, k, v], key_mean): (&[&Activation; 3], Option<&Hidden>),
        all: &ByHead,
    ) -> Result<Qkv<Hidden>> {
        let AttentionSpec { heads, kv_heads, seq_len, ref kv, .. } = *spec;
        let tokens = q.rows;
        let [cos, sin] = self.rope_tables(spec.key_tables())?;
        let room = |x: &Activation| -> Result<Hidden> {
            Ok(Hidden::new(x.rows, x.columns, self.gpu.alloc(4 * x.count())?))
        };
        let d = Qkv { q: room(q)?, k: room(k)?, v: room(v)? };
        self.kernels.launch(&QueriesBackward {
            d: (&all.d_queries).into(),
            cos: (&*cos).into(),
            sin: (&*sin).into(),
            tokens,
            heads,
            seq_len,
            to: d.q.float().into(),
            program,
        })?;
        self.kernels.launch(&KeysBackward {
            k: k.half().into(),
            d: (&all.d_keys).into(),
            cos: (&*cos).into(),
            sin: (&*sin).into(),
            mean: key_mean.map(|mean| mean.float().into()),
            clip: kv.clip,
            tokens,
            heads: kv_heads,
            seq_len,
            to: d.k.float().into(),
            program,
        })?;
        self.kernels.launch(&ValuesBackward {
            v: v.half().into(),
            d: (&all.d_values).into(),
            clip: kv.clip,
            tokens,
            heads: kv_heads,
            seq_len,
            to: d.v.float().into(),
            program,
        })?;
        Ok(d)
    }
}
