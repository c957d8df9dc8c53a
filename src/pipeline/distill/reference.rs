/*! The source's predictions: its normed last hidden states on every window, made once, before training.

Logits are made of them again for each loss, by one product more. That takes less memory than the likeliest tokens of
each position would, and the loss is the divergence over the entire vocabulary. */

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Result;
use crate::backend::{Backend, Matrix, Tensor};
use crate::checkpoint::{Dtype, Source};
use crate::model::AttentionSpecs;
use crate::network::memory::Windows;
use crate::network::{OutputHead, Runnable, Stream, prefetch};
use crate::progress::Progress;

/// Normed hidden states of windows, in the type that the backend computes them in.
pub(super) struct Reference {
    seq_len: usize,
    hidden: usize,
    states: States,
}

enum States {
    Halves(Vec<f16>),
    Floats(Vec<f32>),
}

/// Bytes that the states of `tokens` take.
pub(super) fn reference_bytes<B: Backend>(tokens: usize, hidden: usize) -> u64 {
    (tokens * hidden * B::Activation::DTYPE.size_bytes()) as u64
}

impl Reference {
    /// Runs the source over `tokens`, complete windows, block by block.
    pub(super) fn measure<B: Backend>(
        backend: &B,
        source: &Source,
        tokens: &[u32],
        seq_len: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let model = Runnable::source(backend, source, progress)?;
        let architecture = &model.architecture;
        model.check_memory(Windows { tokens: tokens.len(), seq_len }, progress)?;
        let hidden = architecture.hidden;
        let mut states = match B::Activation::DTYPE {
            Dtype::F16 => States::Halves(Vec::with_capacity(tokens.len() * hidden)),
            _ => States::Floats(Vec::with_capacity(tokens.len() * hidden)),
        };
        let attention = AttentionSpecs::of(architecture, model.kv, seq_len);
        let part = (backend.stream_bytes() / (4 * seq_len * hidden)).max(1) * seq_len;
        let parts = tokens.len().div_ceil(part);
        progress.begin("predictions of the source", parts * (architecture.blocks + 1));
        for tokens in tokens.chunks(part) {
            let mut stream = Stream::embed(backend, source, architecture, tokens, seq_len, 0)?;
            prefetch(
                0..architecture.blocks,
                |index| model.load(index),
                |_, next| {
                    let block = model.block(next()?)?;
                    stream.advance(backend, &attention, &block, || progress.check_stop())?;
                    progress.advance("");
                    Ok(())
                },
            )?;
            backend.trim();
            let head = OutputHead::load(backend, source, architecture)?;
            for mut batch in stream.batches {
                progress.check_stop()?;
                backend.reload(&mut batch)?;
                states.push(backend.download_activation(&head.normed(backend, &batch)?)?);
            }
            progress.advance("");
        }
        progress.end();
        backend.trim();
        Ok(Self { seq_len, hidden, states })
    }

    /// The states of some windows on the backend, one after the other.
    pub(super) fn windows<B: Backend>(
        &self,
        backend: &B,
        windows: &[usize],
    ) -> Result<B::Activation> {
        let len = self.seq_len * self.hidden;
        let mut data = vec![0.0; windows.len() * len];
        for (to, window) in data.chunks_mut(len).zip(windows) {
            let range = window * len..(window + 1) * len;
            match &self.states {
                States::Halves(states) => states[range].convert_to_f32_slice(to),
                States::Floats(states) => to.copy_from_slice(&states[range]),
            }
        }
        let rows = windows.len() * self.seq_len;
        backend.upload_activation(Matrix { rows, columns: self.hidden, data })
    }
}

impl States {
    fn push(&mut self, matrix: Matrix) {
        match self {
            Self::Halves(states) => states.extend(matrix.data.into_iter().map(f16::from_f32)),
            Self::Floats(states) => states.extend(matrix.data),
        }
    }
}
