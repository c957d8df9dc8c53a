//! Decoding in host memory.

use super::paged::{self, PAGE_TOKENS, PagedCache};
use super::{Cpu, Head, HostTensor};
use crate::backend::{AttentionSpec, Decode, DecodeStep, Matrix, Qkv};
use crate::{Result, checkpoint};

impl Decode for Cpu {
    type Cache = PagedCache;
    type Step = DecodeStep;
    type Head = Head;

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

    fn head(&self, weight: &checkpoint::Tensor<'_>) -> Result<Head> {
        Head::new(weight)
    }

    fn logits(&self, x: &HostTensor, head: &Head) -> Result<Matrix> {
        let mut data = vec![0.0; x.rows * head.rows()];
        head.product(self.isa, &x.data, x.rows, &mut data);
        Ok(Matrix { rows: x.rows, columns: head.rows(), data })
    }
}
