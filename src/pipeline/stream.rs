/*! The hidden states of all windows, between two blocks. */

use crate::backend::{AttentionSpec, Backend};
use crate::checkpoint::Tensors;
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;
use crate::pipeline::load::expect;
use crate::{Error, Result};

/// Hidden states of windows `[windows * seq_len, hidden]`, cut into batches.
pub struct Stream<B: Backend> {
    /// Whole windows, in order.
    pub batches: Vec<B::Tensor>,
}

/// Windows that go through a block together.
fn windows_per_batch(batch_bytes: usize, architecture: &Architecture, seq_len: usize) -> usize {
    let heads = architecture.heads + architecture.kv_heads;
    let channels =
        4 * architecture.hidden + 2 * heads * architecture.head_dim + 2 * architecture.intermediate;
    (batch_bytes / (4 * channels * seq_len)).max(1)
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
        let vocabulary = architecture.vocabulary;
        let embedding = expect(tensors, EMBEDDING, &[vocabulary, architecture.hidden])?;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(Error::input(format!(
                "the tokenizer gives token {token}, but the model has {vocabulary} embeddings"
            ))
            .hint("tokenizer.json does not belong to this model"));
        }
        let table = backend.load(embedding)?;
        let windows = windows_per_batch(backend.batch_bytes(), architecture, seq_len);
        let batches = tokens.chunks(windows * seq_len).map(|tokens| {
            let mut batch = backend.embed(&table, tokens)?;
            backend.set_aside(&mut batch)?;
            Ok(batch)
        });
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
            backend.recall(batch)?;
            block.forward(backend, attention, batch, &mut |_, _| Ok(()))?;
            backend.set_aside(batch)?;
        }
        Ok(())
    }
}
