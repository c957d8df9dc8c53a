/*! Hidden states of all windows, between two blocks. */

use std::ops::Range;

use super::tensors::expect;
use crate::backend::{Backend, Forward};
use crate::checkpoint::Tensors;
use crate::model::block::{Block, Observer};
use crate::model::sites::{EMBEDDING, SiteSpec};
use crate::model::{Architecture, AttentionSpecs};
use crate::ranks::Chunks;
use crate::{Error, Result};

/// Hidden states of windows `[windows * seq_len, hidden]`, in batches.
pub struct Stream<B: Backend> {
    /// Batches of complete windows, in order.
    pub batches: Vec<B::Hidden>,
    /// The batches of each chunk, where sums are made of chunks; else one of all batches.
    pub chunks: Vec<Range<usize>>,
}

/// Calibration windows, and the part of them that a rank has.
#[derive(Clone, Copy)]
pub struct CalibrationTokens<'a> {
    /// Tokens of all windows.
    pub tokens: &'a [u32],
    /// Tokens of one.
    pub seq_len: usize,
    /// How they are divided.
    pub chunks: Chunks,
    /// The rank.
    pub rank: usize,
}

/// Windows of a batch.
pub(super) fn windows_per_batch(
    batch_bytes: usize,
    architecture: &Architecture,
    seq_len: usize,
) -> usize {
    let heads = architecture.heads + architecture.kv_heads;
    let channels =
        4 * architecture.hidden + 2 * heads * architecture.head_dim + 2 * architecture.intermediate;
    (batch_bytes / (4 * channels * seq_len)).max(1)
}

/// An upper bound of the device memory of a block, without hidden states: its weights and the next block's in
/// 16 bits, a copy in the kernels' layout, Hessians and those of a chunk, a factor, and the larger of a batch's activations and
/// the weights of one site during quantization.
fn working_bytes(architecture: &Architecture, batch_tokens: usize) -> u64 {
    let rows = |site: &SiteSpec| site.linears.iter().map(|linear| linear.rows).sum::<usize>();
    let sites = architecture.largest_block();
    let weights: usize = sites.iter().map(|site| rows(site) * site.channels).sum();
    let squares = sites.iter().map(|site| site.channels * site.channels);
    let (hessians, factor) = (squares.clone().sum::<usize>(), squares.max().unwrap_or(0));
    let quantized = sites.iter().map(|site| 2 * rows(site) * site.channels).max().unwrap_or(0);
    let widths: usize = sites.iter().map(|site| rows(site) + site.channels).sum();
    let batch = 2 * batch_tokens * widths;
    (6 * weights + 4 * (2 * hessians + factor) + (4 * quantized).max(batch)) as u64 + (1 << 30)
}

/// Multiplies embedded tokens by the network's factor.
pub fn scale_embedding<B: Forward>(
    backend: &B,
    architecture: &Architecture,
    x: &mut B::Hidden,
) -> Result<()> {
    match architecture.multipliers.embedding {
        1.0 => Ok(()),
        factor => backend.scale(x, factor),
    }
}

impl<B: Backend> Stream<B> {
    /// A stream that is not divided into chunks.
    pub fn of(batches: Vec<B::Hidden>) -> Self {
        let all = 0..batches.len();
        Self { batches, chunks: vec![all] }
    }

    /// Windows of `seq_len` tokens in a batch, where there are enough.
    pub fn batch_windows(backend: &B, architecture: &Architecture, seq_len: usize) -> usize {
        windows_per_batch(backend.batch_bytes(), architecture, seq_len)
    }

    /// The embeddings of `tokens`, complete windows of `seq_len`, in batches of windows. `more_bytes` of device
    /// memory are reserved on top of those of every block.
    pub fn embed(
        backend: &B,
        tensors: &dyn Tensors,
        architecture: &Architecture,
        tokens: &[u32],
        seq_len: usize,
        more_bytes: u64,
    ) -> Result<Self> {
        let windows = windows_per_batch(backend.batch_bytes(), architecture, seq_len);
        let batches = tokens.chunks(windows * seq_len);
        Self::embed_batches(backend, tensors, architecture, batches, more_bytes)
    }

    /// The embeddings of a rank's calibration windows: its chunks in the order in which their sums are added, each in
    /// batches of windows. `more_bytes` as for [`embed`](Self::embed).
    pub fn embed_chunks(
        backend: &B,
        tensors: &dyn Tensors,
        architecture: &Architecture,
        windows: &CalibrationTokens<'_>,
        more_bytes: u64,
    ) -> Result<Self> {
        let CalibrationTokens { tokens, seq_len, chunks, rank } = *windows;
        let most = windows_per_batch(backend.batch_bytes(), architecture, seq_len);
        let mut all = Vec::new();
        let mut ranges = Vec::new();
        for chunk in chunks.own(rank) {
            let Range { start, end } = chunks.windows(chunk);
            let first = all.len();
            // Batches of one size, as far as that goes: a small one fills no device.
            let windows = (end - start).div_ceil((end - start).div_ceil(most));
            all.extend(tokens[start * seq_len..end * seq_len].chunks(windows * seq_len));
            ranges.push(first..all.len());
        }
        let stream =
            Self::embed_batches(backend, tensors, architecture, all.into_iter(), more_bytes)?;
        Ok(Self { chunks: ranges, ..stream })
    }

    /// The embeddings of batches of tokens.
    pub fn embed_batches<'t>(
        backend: &B,
        tensors: &dyn Tensors,
        architecture: &Architecture,
        batches: impl Iterator<Item = &'t [u32]> + Clone,
        more_bytes: u64,
    ) -> Result<Self> {
        let vocabulary = architecture.vocabulary;
        let embedding = expect(tensors, EMBEDDING, &[vocabulary, architecture.hidden])?;
        let mut tokens = batches.clone().flatten();
        if let Some(token) = tokens.find(|token| **token as usize >= vocabulary) {
            return Err(Error::input(format!(
                "the tokenizer gives token {token}, but the model has {vocabulary} embeddings"
            ))
            .hint("tokenizer.json does not belong to this model"));
        }
        let batch_tokens = batches.clone().map(<[u32]>::len).max().unwrap_or(0);
        backend.reserve(working_bytes(architecture, batch_tokens) + more_bytes)?;
        let table = backend.load(embedding)?;
        let batches = batches.map(|tokens| {
            let mut batch = backend.embed(&table, tokens)?;
            scale_embedding(backend, architecture, &mut batch)?;
            backend.offload(&mut batch)?;
            Ok(batch)
        });
        Ok(Self::of(batches.collect::<Result<_>>()?))
    }

    /// Runs `block` over every window.
    pub fn advance(
        &mut self,
        backend: &B,
        attention: &AttentionSpecs,
        block: &Block<B>,
        mut checkpoint: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        for batch in &mut self.batches {
            checkpoint()?;
            backend.reload(batch)?;
            block.forward(backend, attention, batch, &mut Observer::none())?;
            backend.offload(batch)?;
        }
        Ok(())
    }
}
