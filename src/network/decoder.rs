/*! A network that decodes: all of its blocks stay on the backend, and sequences grow by steps. */

use std::sync::atomic::{AtomicU64, Ordering};

use super::prefetch::prefetch;
use super::runnable::Runnable;
use super::stream::scale_embedding;
use super::tensors::{expect, final_norm};
use crate::backend::{Backend, Decode, DecodeStep, GreedyToken, Matrix};
use crate::model::block::{Block, CachedAttention};
use crate::model::sites::EMBEDDING;
use crate::model::{Architecture, AttentionSpecs};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A source in full precision or an Atom checkpoint on the integer path, with its weights laid out once.
pub struct Decoder<'a, B: Backend + Decode> {
    /// Of no other decoder of this process.
    id: u64,
    backend: &'a B,
    architecture: Architecture,
    kv: KvFormat,
    table: B::Weight<'a>,
    blocks: Vec<Block<B>>,
    final_norm: B::Hidden,
    head: B::Head,
}

/// The weights of a network on a backend.
pub struct DecoderParts<'a, B: Backend + Decode> {
    /// The embedding, `[vocabulary, hidden]`.
    pub table: B::Weight<'a>,
    /// All blocks.
    pub blocks: Vec<Block<B>>,
    /// The weight of the final norm, `[1, hidden]`.
    pub final_norm: B::Hidden,
    /// The output head.
    pub head: B::Head,
}

/// The keys and values of every block, in pages of the same numbers.
pub struct Caches<B: Decode> {
    attention: AttentionSpecs,
    blocks: Vec<B::Cache>,
    pages: usize,
    replay: B::Replay,
    /// The decoder whose weights a record may read.
    decoder: u64,
}

impl<B: Decode> Caches<B> {
    /// Tokens of a sequence at most.
    pub fn longest_sequence(&self) -> usize {
        self.attention.seq_len()
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
        let final_norm = final_norm(backend, tensors, architecture)?;
        let head = expect(tensors, architecture.head_name(), &shape)?;
        let head = backend.head(&backend.load(head)?)?;
        progress.advance("");
        progress.end();
        tensors.check_unchanged()?;
        let Runnable { architecture, kv, .. } = model;
        let parts = DecoderParts { table, blocks, final_norm, head };
        Ok(Self::of_parts(backend, architecture, kv, parts))
    }

    /// A network of parts that are on the backend already.
    pub fn of_parts(
        backend: &'a B,
        architecture: Architecture,
        kv: KvFormat,
        DecoderParts { table, blocks, final_norm, head }: DecoderParts<'a, B>,
    ) -> Self {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self { id, backend, architecture, kv, table, blocks, final_norm, head }
    }

    /// Where it runs.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// Its network.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// How keys and values are held.
    pub fn kv(&self) -> &KvFormat {
        &self.kv
    }

    /// Bytes of a page of all blocks.
    ///
    /// # Errors
    /// A machine error where the backend has no cache for this network.
    pub fn page_bytes(&self) -> Result<u64> {
        page_bytes(self.backend, &self.architecture, self.kv)
    }

    /// Empty caches of `pages` pages for sequences of up to `longest` tokens.
    pub fn caches(&self, longest: usize, pages: usize) -> Result<Caches<B>> {
        let attention = AttentionSpecs::of(&self.architecture, self.kv, longest);
        let blocks = 0..self.blocks.len();
        let blocks = blocks.map(|block| self.backend.cache(attention.of_block(block), pages));
        let blocks = blocks.collect::<Result<_>>()?;
        Ok(Caches { blocks, attention, pages, replay: B::Replay::default(), decoder: self.id })
    }

    /// Runs the new tokens of a step, one or more of each sequence, through the network. Returns the argmax of each
    /// sequence's last one.
    ///
    /// # Errors
    /// Input: a token without an embedding, or logits that are not finite.
    pub fn greedy(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
    ) -> Result<Vec<GreedyToken>> {
        self.check_step(caches, step, tokens)?;
        Self::on_pool(|| self.run_greedy(caches, step, tokens))
    }

    fn run_greedy(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
    ) -> Result<Vec<GreedyToken>> {
        let Caches { attention, blocks, replay, .. } = caches;
        let backend = self.backend;
        let last_rows = step.last_rows();
        let wanted = (last_rows.len() < tokens.len()).then_some(&last_rows[..]);
        let mut work = |step: &B::Step| {
            let x = self.pass(attention, blocks, step, wanted)?;
            backend.argmax(&self.normed(&x)?, &self.head)
        };
        // Experts are chosen on the host, which no record can do.
        let found = if self.architecture.experts.is_some() {
            backend.greedy_step(&mut B::Replay::default(), step, tokens, &mut work)?
        } else {
            backend.greedy_step(replay, step, tokens, &mut work)?
        };
        match found.iter().find(|found| !found.log_probability.is_finite()) {
            Some(_) => Err(Error::input("a logit is not finite")
                .hint("the weights overflow on this prompt: is the checkpoint sound?")),
            None => Ok(found),
        }
    }

    /// Runs the new tokens of a step through the network. Returns the logits of the rows in `wanted`, ascending,
    /// `[wanted, vocabulary]`.
    ///
    /// # Errors
    /// Input: a token without an embedding.
    pub fn forward(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
        wanted: &[u32],
    ) -> Result<Matrix> {
        self.check_step(caches, step, tokens)?;
        Self::on_pool(|| self.run(caches, step, tokens, wanted))
    }

    fn run(
        &self,
        caches: &mut Caches<B>,
        step: &DecodeStep,
        tokens: &[u32],
        wanted: &[u32],
    ) -> Result<Matrix> {
        let backend = self.backend;
        let step = backend.begin_step(step, tokens)?;
        let last = (!wanted.is_empty()).then_some(wanted);
        let x = self.pass(&caches.attention, &mut caches.blocks, &step, last)?;
        if wanted.is_empty() {
            let columns = self.architecture.vocabulary;
            return Ok(Matrix { rows: 0, columns, data: Vec::new() });
        }
        backend.logits(&self.normed(&x)?, &self.head)
    }

    /// Runs `work` on one of the threads that share it, where it is the host's, so that none waits for another to be woken.
    fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        if B::ON_HOST { rayon::scope(|_| work()) } else { work() }
    }

    fn normed(&self, x: &B::Hidden) -> Result<B::Activation> {
        self.backend.rms_norm(x, &self.final_norm, self.architecture.norm_epsilon)
    }

    fn check_step(&self, caches: &Caches<B>, step: &DecodeStep, tokens: &[u32]) -> Result<()> {
        assert_eq!(caches.decoder, self.id, "caches are used by the decoder that made them");
        assert!(tokens.len() == step.tokens());
        let vocabulary = self.architecture.vocabulary;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            None => Ok(()),
            Some(token) => Err(Error::input(format!(
                "token {token} has no embedding: the model has {vocabulary}"
            ))
            .hint("tokenizer.json does not belong to this model")),
        }
    }

    /// The hidden states after all blocks, of the rows in `wanted` alone where it is given.
    fn pass(
        &self,
        attention: &AttentionSpecs,
        caches: &mut [B::Cache],
        step: &B::Step,
        wanted: Option<&[u32]>,
    ) -> Result<B::Hidden> {
        let mut x = self.backend.embed_step(&self.table, step)?;
        scale_embedding(self.backend, &self.architecture, &mut x)?;
        let last = self.blocks.len().saturating_sub(1);
        for (index, (block, cache)) in self.blocks.iter().zip(caches).enumerate() {
            let spec = attention.of_block(index);
            let cached = CachedAttention { spec, cache, step };
            let wanted = wanted.filter(|_| index == last);
            block.forward_cached(self.backend, cached, wanted, &mut x)?;
        }
        Ok(x)
    }
}

/// Bytes of a page of all blocks of a network.
///
/// # Errors
/// A machine error where the backend has no cache for this network.
pub fn page_bytes<B: Decode>(
    backend: &B,
    architecture: &Architecture,
    kv: KvFormat,
) -> Result<u64> {
    let attention = AttentionSpecs::of(architecture, kv, 0);
    (0..architecture.blocks).map(|block| backend.page_bytes(attention.of_block(block))).sum()
}
