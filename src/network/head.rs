/*! The end of a network: the final norm and the output head. */

use super::tensors::{expect, final_norm};
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::Tensors;
use crate::model::Architecture;

/// The final norm and the output head on a backend.
pub struct OutputHead<B: Backend> {
    norm: B::Hidden,
    epsilon: f32,
    /// The product of normed hidden states with it is the logits.
    pub weight: B::Dense,
}

impl<B: Backend> OutputHead<B> {
    /// Loads both.
    pub fn load(backend: &B, tensors: &dyn Tensors, architecture: &Architecture) -> Result<Self> {
        let norm = final_norm(backend, tensors, architecture)?;
        let shape = [architecture.vocabulary, architecture.hidden];
        let head = expect(tensors, architecture.head_name(), &shape)?;
        let weight = backend.dense(&backend.load(head)?, None)?;
        Ok(Self { norm, epsilon: architecture.norm_epsilon, weight })
    }

    /// The final norm of hidden states.
    pub fn normed(&self, backend: &B, x: &B::Hidden) -> Result<B::Activation> {
        backend.rms_norm(x, &self.norm, self.epsilon)
    }
}
