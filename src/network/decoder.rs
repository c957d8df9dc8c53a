/*! A network that decodes: all of its blocks stay on the backend, and sequences grow by steps. */

use super::attention::attention_spec;
use super::prefetch::prefetch;
use super::runnable::Runnable;
use super::tensors::{expect, vector};
use crate::backend::{Argmax, AttentionSpec, Backend, Decode, DecodeStep, Matrix};
use crate::model::block::{Block, CachedAttention};
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

/// A source in full precision or an Atom checkpoint on the integer path, with its weights laid out once.
pub struct Decoder<'a, B: Backend + Decode> {
    model: Runnable<'a, B>,
    table: B::Weight<'a>,
    blocks: Vec<Block<B>>,
    final_norm: B::Hidden,
    head: B::Head,
}

/// What is wanted of a step.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'w> {
    /// The rows, ascending; there may be none.
    pub rows: &'w [u32],
    /// Whether their most probable tokens are enough.
    pub argmax_only: bool,
}

/// What rows predict.
pub enum Predictions {
    /// `[rows, vocabulary]`.
    Logits(Matrix),
    /// The most probable token of each row: where nothing else was wanted and the backend finds it.
    Argmax(Vec<Argmax>),
}

/// The keys and values of every block, in pages of the same numbers.
pub struct Caches<B: Decode> {
    spec: AttentionSpec,
    blocks: Vec<B::Cache>,
    pages: usize,
}

impl<B: Decode> Caches<B> {
    /// Tokens of a sequence at most.
    pub fn longest_sequence(&self) -> usize {
        self.spec.seq_len
    }

    /// Pages of each block.
    pub fn pages(&self) -> usize {
        self.pages
    }
}

impl<'a, B: Backend + Decode> Decoder<'a, B> {
    /// Loads all blocks of a model, the final norm and the output head.
    pub fn load(model: Runnable<'a, B>, progress: &dyn Progress) -> Result<Self> {
        let Runnable { backend, tensors, .. } = model;
        let architecture = &model.architecture;
        let shape = [architecture.vocabulary, architecture.hidden];
        let table = backend.load(expect(tensors, EMBEDDING, &shape)?)?;
        progress.begin(&format!("load {}", model.name), architecture.blocks + 1);
        let mut blocks = Vec::with_capacity(architecture.blocks);
        prefetch(
            0..architecture.blocks,
            |index| model.load(index),
            |_, next| {
                progress.check_stop()?;
                blocks.push(model.block(next()?)?);
                progress.advance("");
                Ok(())
            },
        )?;
        let final_norm = vector(backend, tensors, FINAL_NORM, architecture.hidden)?;
        let head = expect(tensors, architecture.head_name(), &shape)?;
        let head = backend.head(&backend.load(head)?)?;
        progress.advance("");
        progress.end();
        tensors.check_unchanged()?;
        Ok(Self { table, blocks, final_norm, head, model })
    }

    /// The model.
    pub fn model(&self) -> &Runnable<'a, B> {
        &self.model
    }

    /// How keys and values are held.
    pub fn kv(&self) -> &KvFormat {
        &self.model.kv
    }

    /// Bytes of a page of all blocks.
    ///
    /// # Errors
    /// A machine error where the backend has no cache for this network.
    pub fn page_bytes(&self) -> Result<u64> {
        let spec = attention_spec(&self.model.architecture, self.model.kv, 0);
        Ok(self.model.backend.page_bytes(&spec)? * self.blocks.len() as u64)
    }

    /// Empty caches of `pages` pages for sequences of up to `longest` tokens.
    pub fn caches(&self, longest: usize, pages: usize) -> Result<Caches<B>> {
        let spec = attention_spec(&self.model.architecture, self.model.kv, longest);
        let blocks = (0..self.blocks.len()).map(|_| self.model.backend.cache(&spec, pages));
        Ok(Caches { blocks: blocks.collect::<Result<_>>()?, spec, pages })
    }

    /// Runs the new tokens of a step through the network, and returns what the rows in `wanted`, ascending, predict.
    ///
    /// # Errors
    /// Input: a token without an embedding.
    pub fn forward(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
        wanted: Wanted<'_>,
    ) -> Result<Predictions> {
        assert!(tokens.len() == step.tokens());
        let vocabulary = self.model.architecture.vocabulary;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            let message = format!("token {token} has no embedding: the model has {vocabulary}");
            return Err(Error::input(message).hint("tokenizer.json does not belong to this model"));
        }
        if B::ON_HOST {
            // On one of the threads that share the work, so that none waits for another to be woken.
            return rayon::scope(|_| self.run(caches, step, tokens, wanted));
        }
        self.run(caches, step, tokens, wanted)
    }

    fn run(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
        Wanted { rows: wanted, argmax_only }: Wanted<'_>,
    ) -> Result<Predictions> {
        let Runnable { backend, architecture, .. } = &self.model;
        let mut x = backend.embed(&self.table, tokens)?;
        let step = backend.begin_step(step)?;
        let last = self.blocks.len().saturating_sub(1);
        for (index, (block, cache)) in self.blocks.iter().zip(&mut caches.blocks).enumerate() {
            let wanted = (index == last && !wanted.is_empty()).then_some(wanted);
            let cached = CachedAttention { spec: &caches.spec, cache, step: &step };
            block.forward_cached(*backend, cached, wanted, &mut x)?;
        }
        if wanted.is_empty() {
            return Ok(Predictions::Argmax(Vec::new()));
        }
        let normed = backend.rms_norm(&x, &self.final_norm, architecture.norm_epsilon)?;
        if argmax_only && let Some(found) = backend.argmax(&normed, &self.head)? {
            return Ok(Predictions::Argmax(found));
        }
        Ok(Predictions::Logits(backend.logits(&normed, &self.head)?))
    }
}
