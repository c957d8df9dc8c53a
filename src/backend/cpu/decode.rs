//! Decoding in host memory.

use super::paged::{self, PAGE_TOKENS, PagedCache};
use super::{Cpu, Head, HostTensor};
use crate::backend::{AttentionSpec, Decode, DecodeStep, Forward, GreedyToken, Matrix, Qkv};
use crate::{Result, checkpoint};

impl Decode for Cpu {
    type Cache = PagedCache;
    type Step = CpuStep;
    type Head = Head;
    type Argmax = Vec<GreedyToken>;
    type Replay = ();

    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn page_bytes(&self, spec: &AttentionSpec) -> Result<u64> {
        Ok(paged::page_bytes(spec, PAGE_TOKENS) as u64)
    }

    fn cache(&self, spec: &AttentionSpec, pages: usize) -> Result<PagedCache> {
        Ok(PagedCache::new(spec, PAGE_TOKENS, pages))
    }

    fn begin_step(&self, step: &DecodeStep, tokens: &[u32]) -> Result<CpuStep> {
        Ok(CpuStep { step: step.clone(), tokens: tokens.to_vec() })
    }

    fn embed_step(&self, table: &Self::Weight<'_>, step: &CpuStep) -> Result<HostTensor> {
        self.embed(table, &step.tokens)
    }

    fn cached_attention(
        &self,
        spec: &AttentionSpec,
        cache: &mut PagedCache,
        step: &CpuStep,
        qkv: Qkv<HostTensor>,
        key_mean: Option<&HostTensor>,
    ) -> Result<HostTensor> {
        let Qkv { q, k, v } = &qkv;
        let mut out = self.tensor(q.rows, q.columns);
        let qkv = Qkv { q: &q.data[..], k: &k.data[..], v: &v.data[..] };
        let key_mean = key_mean.map(|mean| &mean.data[..]);
        paged::cached_attention(self.isa, spec, cache, &step.step, qkv, key_mean, &mut out.data);
        Ok(out)
    }

    fn head(&self, weight: &checkpoint::Tensor<'_>) -> Result<Head> {
        Head::new(weight)
    }

    fn logits(&self, x: &HostTensor, head: &Head) -> Result<Matrix> {
        let mut data = vec![0.0; x.rows * head.rows()];
        head.product(self.isa, &x.data, x.rows, &mut data);
        Ok(Matrix { rows: x.rows, columns: head.rows(), data })
    }

    fn argmax(&self, x: &HostTensor, head: &Head) -> Result<Vec<GreedyToken>> {
        let logits = self.logits(x, head)?;
        Ok(logits.data.chunks_exact(logits.columns).map(greedy).collect())
    }

    fn greedy_step(
        &self,
        (): &mut (),
        step: &DecodeStep,
        tokens: &[u32],
        work: &mut dyn FnMut(&CpuStep) -> Result<Vec<GreedyToken>>,
    ) -> Result<Vec<GreedyToken>> {
        work(&self.begin_step(step, tokens)?)
    }
}

/// A step and its tokens.
pub struct CpuStep {
    step: DecodeStep,
    tokens: Vec<u32>,
}

/// The argmax of a row of logits; its probability is no number where one of them is none.
fn greedy(logits: &[f32]) -> GreedyToken {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (token, *logit);
        }
    }
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - best.1).exp())).sum();
    GreedyToken { token: best.0 as u32, log_probability: -sum.ln() }
}
