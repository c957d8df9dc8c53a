//! Attention of every block of a network, for windows of one length.

use std::sync::Arc;

use super::architecture::{Architecture, BlockAttention};
use super::rope::Rope;
use crate::backend::AttentionSpec;
use crate::quant::kv::KvFormat;

/// What attention depends on, block by block.
#[derive(Clone, Debug)]
pub struct AttentionSpecs(Vec<AttentionSpec>);

/// Cosines and sines of keys, and those of queries where they are others.
type Tables = ([Arc<[f32]>; 2], Option<[Arc<[f32]>; 2]>);

impl AttentionSpecs {
    /// Those of a network for windows of `seq_len` tokens. Blocks with the same rotary embedding share its tables.
    pub fn of(architecture: &Architecture, kv: KvFormat, seq_len: usize) -> Self {
        let mut known: Vec<(Option<&Rope>, Tables)> = Vec::new();
        let mut specs = Vec::with_capacity(architecture.blocks);
        for BlockAttention { rope, window } in &architecture.attention {
            let rope = rope.as_ref();
            if !known.iter().any(|(other, _)| *other == rope) {
                known.push((rope, tables(architecture, rope, seq_len)));
            }
            let found = known.iter().find(|(other, _)| *other == rope);
            let (_, ([cos, sin], query_tables)) = found.expect("made above");
            let usual = AttentionSpec::usual_scale(architecture.head_dim);
            specs.push(AttentionSpec {
                heads: architecture.heads,
                kv_heads: architecture.kv_heads,
                head_dim: architecture.head_dim,
                seq_len,
                sliding_window: *window,
                scale: architecture.attention_scale.unwrap_or(usual),
                cos: Arc::clone(cos),
                sin: Arc::clone(sin),
                query_tables: query_tables.clone(),
                kv,
            });
        }
        Self(specs)
    }

    /// Blocks that all attend alike.
    pub fn alike(spec: AttentionSpec) -> Self {
        Self(vec![spec])
    }

    /// That of block `index`.
    pub fn of_block(&self, index: usize) -> &AttentionSpec {
        self.0.get(index).unwrap_or(&self.0[0])
    }

    /// The same with keys and values held in another format.
    pub fn with_kv(&self, kv: KvFormat) -> Self {
        Self(self.0.iter().map(|spec| AttentionSpec { kv, ..spec.clone() }).collect())
    }

    /// Tokens of a window.
    pub fn seq_len(&self) -> usize {
        self.0[0].seq_len
    }

    /// How keys and values are held.
    pub fn kv(&self) -> &KvFormat {
        &self.0[0].kv
    }
}

fn tables(architecture: &Architecture, rope: Option<&Rope>, seq_len: usize) -> Tables {
    let Architecture { head_dim, query_scaling, .. } = *architecture;
    let [cos, sin] = match rope {
        Some(rope) => rope.tables(head_dim, seq_len),
        None => [1.0, 0.0].map(|value| vec![value; seq_len * head_dim / 2]),
    };
    let scaled = query_scaling.map(|scaling| {
        [&cos, &sin].map(|table| {
            let rows = table.chunks(head_dim / 2).enumerate();
            rows.flat_map(|(position, row)| {
                let factor = scaling.factor(position);
                row.iter().map(move |value| value * factor)
            })
            .collect()
        })
    });
    ([cos.into(), sin.into()], scaled)
}
