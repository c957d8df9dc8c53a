/*! Blocks that can run, made of loaded weights: in full precision, with quantized activations for GPTQ's
Hessians, or quantized. */

use super::stored::QuantizedSite;
use super::weights::BlockWeights;
use crate::backend::{Backend, Matrix};
use crate::model::Architecture;
use crate::model::architecture::{Activation, RouterKind};
use crate::model::block::{Block, Leaving, Linear, Site, Treatment};
use crate::model::experts::{Choice, Router, Shared};
use crate::model::sites::{ATTN_OUT, MLP_ACT, MLP_IN, SiteKind};
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

/// Makes blocks of one block's weights.
pub struct BlockBuilder<'a, 'w, B: Backend> {
    backend: &'a B,
    architecture: &'a Architecture,
    weights: &'a BlockWeights<'w, B>,
    key_mean: Option<&'a [f32]>,
    reorders: bool,
}

/// The treatment of a site's activation, and its linears.
type SiteParts<B> = (Treatment<B>, Vec<Linear<B>>);

impl<'a, 'w, B: Backend> BlockBuilder<'a, 'w, B> {
    /// A builder of blocks whose cache is not centred.
    pub fn new(
        backend: &'a B,
        architecture: &'a Architecture,
        weights: &'a BlockWeights<'w, B>,
    ) -> Self {
        Self { backend, architecture, weights, key_mean: None, reorders: true }
    }

    /// Centres the cache of quantized blocks at these mean keys, if there are any.
    pub fn with_key_mean(self, key_mean: Option<&'a [f32]>) -> Self {
        Self { key_mean, ..self }
    }

    /// Leaves the outputs of gate and up in the source's order, which the backward pass needs. The block computes the same.
    pub fn without_reordering(self) -> Self {
        Self { reorders: false, ..self }
    }

    /// The block in full precision.
    pub fn source(&self) -> Result<Block<B>> {
        self.block(None, |site| {
            let linears = 0..self.weights.sites[site].len();
            let linears = linears.map(|linear| {
                let weight = self.weights.weight(site, linear);
                Ok(Linear::Dense(self.backend.dense(weight, None)?))
            });
            Ok((Treatment::Source, linears.collect::<Result<_>>()?))
        })
    }

    /// The block before its linears are quantized, without sites: [`open_site`](Self::open_site) makes these.
    pub fn open(&self) -> Result<Block<B>> {
        self.block_of(0, self.key_mean, |_| unreachable!("no site is wanted"))
    }

    /// A site before its linears are quantized: it permutes and quantizes its activation, and has no linears yet.
    pub fn open_site(&self, at: usize, format: &SiteFormat) -> Result<Site<B>> {
        self.site(at, (treatment::<B>(format, self.backend.site(format)?), Vec::new()))
    }

    /// The block with full-precision weights on quantized activations, on which GPTQ's Hessians are accumulated.
    /// It is only observed, so the linear of the last site is left out: it is the largest of the block, and
    /// its product is not used.
    pub fn observed(&self, formats: &[SiteFormat]) -> Result<Block<B>> {
        let specs = self.architecture.sites(self.weights.index);
        self.block(self.key_mean, |site| {
            let format = &formats[site];
            let order = self.backend.site(format)?;
            let linears = match specs[site].kind {
                SiteKind::MlpAct => Vec::new(),
                _ => self.permuted_linears(site, &order)?,
            };
            Ok((treatment::<B>(format, order), linears))
        })
    }

    /// The quantized block: on the integer path, or, with activations in floating point, with dequantized
    /// weights.
    pub fn quantized(&self, sites: &[QuantizedSite<B::Quantized>]) -> Result<Block<B>> {
        let orders = sites.iter().map(|site| self.backend.site(&site.format));
        let orders = orders.collect::<Result<Vec<_>>>()?;
        let linears = (0..sites.len()).map(|at| {
            let feeds = if at == MLP_IN { orders[MLP_ACT..].iter().collect() } else { Vec::new() };
            self.quantized_linears(at, &sites[at], &orders[at], &feeds)
        });
        let linears = linears.collect::<Result<Vec<_>>>()?;
        let mut made = orders.into_iter().zip(linears);
        self.block(self.key_mean, |site| {
            let (order, linears) = made.next().expect("sites come in order");
            Ok((treatment::<B>(&sites[site].format, order), linears))
        })
    }

    /// The linears of one site of a quantized block. For mlp_in, `feeds` are the sites that its pairs of gate
    /// and up feed.
    pub fn quantized_linears(
        &self,
        site: usize,
        quantized: &QuantizedSite<B::Quantized>,
        order: &B::Site,
        feeds: &[&B::Site],
    ) -> Result<Vec<Linear<B>>> {
        let QuantizedSite { format, linears } = quantized;
        let (backend, weights) = (self.backend, self.weights);
        // The rows of gate and up can be in the order of the site that they feed only if both are packed and have no bias, and
        // SiLU is between them.
        let reorderable = self.reorders
            && self.architecture.mlp.activation == Activation::Silu
            && linears.iter().all(Option::is_some)
            && weights.biases[site].iter().all(Option::is_none);
        let feeds = |linear: usize| feeds.get(linear / 2).copied().filter(|_| reorderable);
        let linears = linears.iter().enumerate().map(|(linear, quantized)| match quantized {
            None => {
                let weight = weights.weight(site, linear);
                Ok(Linear::Dense(backend.dense(weight, Some(order))?))
            }
            Some(quantized) if format.row.numbers.bits == 16 => {
                Ok(Linear::Dense(backend.dense_of(quantized)?))
            }
            Some(quantized) => Ok(Linear::Packed(backend.pack(quantized, feeds(linear))?)),
        });
        linears.collect()
    }

    /// One site with quantized activations and full-precision weights.
    pub fn quantized_activation(&self, at: usize, format: &SiteFormat) -> Result<Site<B>> {
        let order = self.backend.site(format)?;
        let linears = self.permuted_linears(at, &order)?;
        self.site(at, (treatment::<B>(format, order), linears))
    }

    /// One site with activations in floating point and only the linear `changed` quantized.
    pub fn one_quantized_linear(
        &self,
        at: usize,
        format: &SiteFormat,
        changed: (usize, &B::Quantized),
    ) -> Result<Site<B>> {
        let order = self.backend.site(format)?;
        let linears = (0..self.weights.sites[at].len()).map(|linear| {
            let dense = match changed {
                (number, codes) if number == linear => self.backend.dense_of(codes)?,
                _ => self.backend.dense(self.weights.weight(at, linear), Some(&order))?,
            };
            Ok(Linear::Dense(dense))
        });
        let linears = linears.collect::<Result<_>>()?;
        self.site(at, (Treatment::Permuted(order), linears))
    }

    /// A site's linears in full precision, in the site's order.
    fn permuted_linears(&self, site: usize, order: &B::Site) -> Result<Vec<Linear<B>>> {
        let linears = (0..self.weights.sites[site].len()).map(|linear| {
            let weight = self.weights.weight(site, linear);
            Ok(Linear::Dense(self.backend.dense(weight, Some(order))?))
        });
        linears.collect()
    }

    fn site(&self, at: usize, (treatment, linears): SiteParts<B>) -> Result<Site<B>> {
        let name = self.architecture.sites(self.weights.index)[at].name.clone();
        let biases = self.weights.biases(self.backend, at)?;
        Ok(Site { at, name, treatment, linears, biases, leaving: self.leaving(at)? })
    }

    /// What becomes of the output of a site before it is added to the residual stream.
    fn leaving(&self, at: usize) -> Result<Leaving<B>> {
        let which = match at {
            ATTN_OUT => 0,
            MLP_ACT.. => 1,
            _ => return Ok(Leaving::unchanged()),
        };
        let norm = self.weights.norms_after.as_ref().map(|norms| norms[which].clone());
        Ok(Leaving {
            norm: norm.map(|norm| self.backend.upload(norm)).transpose()?,
            epsilon: self.architecture.norm_epsilon,
            factor: self.architecture.multipliers.residual,
        })
    }

    /// The block's router.
    fn router(&self) -> Result<Option<Router<B>>> {
        let Self { backend, architecture, weights, .. } = *self;
        let experts = architecture.experts_of(weights.index);
        let Some((experts, weight)) = experts.zip(weights.router.as_ref()) else {
            return Ok(None);
        };
        let shared = match (&weights.shared_gate, experts.shared) {
            (_, None) => None,
            (None, Some(_)) => Some(Shared::Always),
            (Some(gate), Some(_)) => Some(Shared::Gated(backend.dense(gate, None)?)),
        };
        let sigmoid_bias = weights.router_bias.clone();
        assert!(sigmoid_bias.is_some() == (experts.router == RouterKind::SigmoidWithBias));
        let choice = Choice {
            per_token: experts.per_token,
            normalized: experts.normalized,
            scale: experts.scale,
            sigmoid_bias,
        };
        Ok(Some(Router { weight: backend.dense(weight, None)?, choice, shared }))
    }

    /// The orders of the channels of queries and keys in which attention computes them.
    fn head_order(&self) -> Result<Option<[B::Site; 2]>> {
        let Self { backend, architecture, weights, .. } = *self;
        let Some(order) = architecture.head_order(weights.index) else { return Ok(None) };
        let of_heads = |heads: usize| {
            let channels = |head: usize| {
                let first = head * order.len();
                order.iter().map(move |channel| (first + channel) as i32)
            };
            backend.site(&SiteFormat::permutation((0..heads).flat_map(channels).collect()))
        };
        Ok(Some([of_heads(architecture.heads)?, of_heads(architecture.kv_heads)?]))
    }

    fn block(
        &self,
        key_mean: Option<&[f32]>,
        fill: impl FnMut(usize) -> Result<SiteParts<B>>,
    ) -> Result<Block<B>> {
        self.block_of(self.architecture.sites(self.weights.index).len(), key_mean, fill)
    }

    /// A block with its first `count` sites.
    fn block_of(
        &self,
        count: usize,
        key_mean: Option<&[f32]>,
        mut fill: impl FnMut(usize) -> Result<SiteParts<B>>,
    ) -> Result<Block<B>> {
        let Self { backend, architecture, weights, .. } = *self;
        let sites = (0..count).map(|at| self.site(at, fill(at)?)).collect::<Result<_>>()?;
        let pair = |norms: &Option<[Matrix; 2]>| {
            let upload =
                |[a, b]: [Matrix; 2]| Ok::<_, Error>([backend.upload(a)?, backend.upload(b)?]);
            norms.clone().map(upload).transpose()
        };
        let key_mean = key_mean.map(|mean| {
            let data = mean.to_vec();
            backend.upload(Matrix { rows: 1, columns: data.len(), data })
        });
        Ok(Block {
            key_mean: key_mean.transpose()?,
            index: weights.index,
            norms: pair(&weights.norms_before)?,
            epsilon: architecture.norm_epsilon,
            qk_norm: pair(&weights.qk_norm)?,
            head_order: self.head_order()?,
            activation: architecture.mlp.activation,
            router: self.router()?,
            sites,
        })
    }
}

fn treatment<B: Backend>(format: &SiteFormat, site: B::Site) -> Treatment<B> {
    if format.row.numbers.bits == 16 {
        Treatment::Permuted(site)
    } else {
        Treatment::Quantized(site)
    }
}
