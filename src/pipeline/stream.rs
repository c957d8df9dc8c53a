/*! The hidden states of all windows, between two blocks. */

use crate::backend::{AttentionSpec, Backend, Matrix};
use crate::checkpoint::Tensors;
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;
use crate::pipeline::load::expect;
use crate::{Error, Result};

/// Bytes of a batch's activations inside a block, about: some for every thread, so that each operation
/// has work for all of them. Results do not depend on it.
fn batch_bytes() -> usize {
    (64 << 20) + rayon::current_num_threads() * (24 << 20)
}

/// Hidden states of windows `[windows * seq_len, hidden]`, cut into batches.
pub struct Stream<B: Backend> {
    /// Whole windows, in order.
    pub batches: Vec<B::Tensor>,
}

/// Windows that go through a block together.
pub fn windows_per_batch(architecture: &Architecture, seq_len: usize) -> usize {
    let heads = architecture.heads + architecture.kv_heads;
    let channels =
        4 * architecture.hidden + 2 * heads * architecture.head_dim + 2 * architecture.intermediate;
    (batch_bytes() / (4 * channels * seq_len)).max(1)
}

impl<B: Backend> Stream<B> {
    /// The embeddings of `tokens`, whole windows of `seq_len`.
    pub fn embed(
        backend: &B,
        tensors: &dyn Tensors,
        architecture: &Architecture,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Self> {
        let hidden = architecture.hidden;
        let embedding = expect(tensors, EMBEDDING, &[architecture.vocabulary, hidden])?;
        let batch = windows_per_batch(architecture, seq_len) * seq_len;
        let batches = tokens.chunks(batch).map(|tokens| {
            let mut data = Vec::with_capacity(tokens.len() * hidden);
            for &token in tokens {
                let row = token as usize;
                if row >= architecture.vocabulary {
                    return Err(Error::input(format!(
                        "the tokenizer gives token {token}, but the model has {} embeddings",
                        architecture.vocabulary
                    ))
                    .hint("tokenizer.json does not belong to this model"));
                }
                data.extend(embedding.rows_f32(row..row + 1)?);
            }
            backend.upload(Matrix { rows: tokens.len(), columns: hidden, data })
        });
        let batches = batches.collect::<Result<_>>()?;
        embedding.release();
        Ok(Self { batches })
    }

    /// A second stream that starts from the same states.
    pub fn duplicate(&self, backend: &B) -> Result<Self> {
        let batches = self.batches.iter().map(|batch| backend.duplicate(batch));
        Ok(Self { batches: batches.collect::<Result<_>>()? })
    }

    /// Carries every window through `block`.
    pub fn advance(
        &mut self,
        backend: &B,
        attention: &AttentionSpec,
        block: &crate::model::block::Block<B>,
        mut checkpoint: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        for batch in &mut self.batches {
            checkpoint()?;
            block.forward(backend, attention, batch, &mut |_, _| Ok(()))?;
        }
        Ok(())
    }
}
