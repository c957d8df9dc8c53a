/*! Attention of a network over windows of one length. */

use crate::backend::AttentionSpec;
use crate::model::Architecture;
use crate::quant::kv::KvFormat;

/// The parameters of attention for windows of `seq_len` tokens.
pub fn attention_spec(architecture: &Architecture, kv: KvFormat, seq_len: usize) -> AttentionSpec {
    let (cos, sin) = architecture.rope_tables(seq_len);
    AttentionSpec {
        heads: architecture.heads,
        kv_heads: architecture.kv_heads,
        head_dim: architecture.head_dim,
        seq_len,
        sliding_window: architecture.sliding_window(),
        cos,
        sin,
        kv,
    }
}
