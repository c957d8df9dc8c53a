//! Decoding in host memory.

use super::paged::{self, PAGE_TOKENS, PagedCache};
use super::{Cpu, HostTensor};
use crate::Result;
use crate::backend::{AttentionSpec, Decode, DecodeStep, Forward, Matrix, Memory, Qkv};

impl Decode for Cpu {
    type Cache = PagedCache;
    type Step = DecodeStep;

    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn page_bytes(&self, spec: &AttentionSpec) -> Result<u64> {
        Ok(paged::page_bytes(spec, PAGE_TOKENS) as u64)
    }

    fn cache(&self, spec: &AttentionSpec, pages: usize) -> Result<PagedCache> {
        Ok(PagedCache::new(spec, PAGE_TOKENS, pages))
    }

    fn begin_step(&self, step: &DecodeStep) -> Result<DecodeStep> {
        Ok(step.clone())
    }

    fn cached_attention(
        &self,
        spec: &AttentionSpec,
        cache: &mut PagedCache,
        step: &DecodeStep,
        qkv: Qkv<HostTensor>,
        key_mean: Option<&HostTensor>,
    ) -> Result<HostTensor> {
        let Qkv { q, k, v } = &qkv;
        let mut out = self.tensor(q.rows, q.columns);
        let qkv = Qkv { q: &q.data[..], k: &k.data[..], v: &v.data[..] };
        let key_mean = key_mean.map(|mean| &mean.data[..]);
        paged::cached_attention(self.isa, spec, cache, step, qkv, key_mean, &mut out.data);
        Ok(out)
    }

    fn logits(&self, x: &HostTensor, head: &Self::Dense) -> Result<Matrix> {
        self.download(&self.product(x, head)?)
    }
}
