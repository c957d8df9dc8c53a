/*! Quantizing one block site by site: each site's Hessian is measured behind the quantized linears of the sites
before it, and its linears aim at what the source computes there.

Both streams go through the block together, a site at a time, and no product is computed twice but the quantized
block's gate and up, whose result is too wide to be kept. Experts are sites one after the other: each looks at the tokens
that the quantized block's router gives it, on both streams, and what it computed there is not kept. */

use super::block::{BlockQuantizer, QuantizedBlock, SiteWork, formats};
use super::calibrate::Statistics;
use super::fallbacks::Fallback;
use super::load::{BlockWeights, QuantizedSite, open_block, quantized_linears, source_block};
use super::plan::SitePlan;
use super::stream::Stream;
use super::timing::Timing;
use crate::Result;
use crate::backend::{AccumulatedError, Backend, Memory, Tensor};
use crate::model::Architecture;
use crate::model::block::{Block, Observer, Site};
use crate::model::experts::Share;
use crate::model::sites::{ATTN_OUT, MLP_ACT, MLP_IN, SiteKind, SiteSpec};

/// The hidden states of the calibration windows behind the source's blocks and behind the quantized ones,
/// batch by batch alike.
type Streams<'s, B> = [&'s mut Stream<B>; 2];

/// Device memory that the drift of the widest site and attention's outputs of all `tokens` take.
pub fn beside_bytes(architecture: &Architecture, tokens: usize) -> u64 {
    let widest = architecture.sites(0).iter().map(|site| site.channels).max().unwrap_or(0);
    let drift = widest * (widest + architecture.hidden);
    let heads = 2 * tokens * architecture.heads * architecture.head_dim;
    (4 * drift + 2 * heads) as u64
}

/// What attn_out sees of a batch: of the source, and of the quantized block.
type Heads<B> = [<B as Memory>::Activation; 2];

/// What is kept of every batch between its sites.
struct Kept<B: Backend> {
    /// While o is quantized.
    heads: Vec<Heads<B>>,
    /// The tokens that the quantized block's router sends to each of its experts, from behind attention on.
    shares: Vec<Vec<Share>>,
}

/// What a site's linears are quantized by.
struct Sums<B: Backend> {
    hessian: Option<B::Gram>,
    drift: Option<AccumulatedError<B::CrossCovariance>>,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// Quantizes a block by `plan` and carries both streams through it; not all the way if it is the
    /// `last`, whose states nobody needs.
    pub fn quantize_in_turn(
        &self,
        weights: &BlockWeights<B>,
        plan: &[SitePlan],
        statistics: &Statistics,
        mut streams: [&mut Stream<B>; 2],
        last: bool,
        timing: &mut Timing,
    ) -> Result<QuantizedBlock<B>> {
        let Self { backend, architecture, .. } = *self;
        let formats = formats(plan, &statistics.energies);
        let source = source_block(backend, architecture, weights)?;
        let key_mean = self.key_mean(statistics);
        let mut block = open_block(backend, architecture, weights, &formats, key_mean)?;
        let mut made = QuantizedBlock { sites: Vec::new(), errors: Vec::new() };
        let mut kept = Kept { heads: Vec::new(), shares: Vec::new() };
        let specs = architecture.sites(weights.index);
        for (at, (spec, format)) in specs.iter().zip(formats).enumerate() {
            let pair = [&source, &block];
            let sums = timing.measure("hessians", || {
                let site = (at, spec, format.width());
                let sums = self.sums(pair, site, &mut streams, &mut kept, last)?;
                backend.wait()?;
                Ok::<_, crate::Error>(sums)
            })?;
            backend.trim();
            let work = SiteWork {
                spec,
                plan: &plan[at],
                weights: &weights.sites[at],
                energy: &statistics.energies[at],
            };
            block.sites[at].linears = timing.measure("gptq", || {
                let Sums { hessian, drift } = sums;
                let errors = &mut made.errors;
                let linears =
                    self.quantize_site(&work, &format, hessian, drift.as_ref(), errors)?;
                let order = backend.site(&format)?;
                let site = QuantizedSite { format, linears };
                let feeds = if at == MLP_IN { &block.sites[MLP_ACT..] } else { &[] };
                let feeds: Vec<_> = feeds.iter().map(Site::order).collect();
                let laid_out = quantized_linears(backend, weights, at, &site, &order, &feeds)?;
                made.sites.push(site);
                backend.wait()?;
                Ok::<_, crate::Error>(laid_out)
            })?;
            timing.measure("propagate", || {
                if spec.kind == SiteKind::AttnOut {
                    self.add_heads([&source, &block], &mut streams, &mut kept)?;
                } else if at + 1 == specs.len() && !last {
                    self.add_mlp([&source, &block], &mut streams)?;
                }
                backend.wait()
            })?;
        }
        Ok(made)
    }

    /// Site `at`'s Hessian and drift, on the streams as they reach it. What attn_out sees is kept in
    /// `heads`; without experts, the source's stream is through with the block at its last site.
    fn sums(
        &self,
        [source, block]: [&Block<B>; 2],
        (at, spec, width): (usize, &SiteSpec, usize),
        streams: &mut Streams<'_, B>,
        Kept { heads, shares }: &mut Kept<B>,
        last: bool,
    ) -> Result<Sums<B>> {
        let Self { backend, architecture, attention, full_attention, .. } = *self;
        let mut hessian = backend.gram(width)?;
        let all: usize = streams[0].batches.iter().map(|batch| batch.rows()).sum();
        let mut drift = if self.correction > 0.0 && all >= width {
            let adds = matches!(spec.kind, SiteKind::AttnOut | SiteKind::MlpAct);
            let outputs =
                adds.then(|| backend.cross_covariance(architecture.hidden, width)).transpose()?;
            let inputs = backend.cross_covariance(width, width)?;
            Some(AccumulatedError { inputs, outputs, share: self.correction })
        } else {
            None
        };
        let mut tokens = 0;
        self.for_batches(streams, |batch, before, after| {
            let share = spec.expert.map(|expert| &shares[batch][expert]);
            if share.is_some_and(Share::is_empty) {
                return Ok(());
            }
            let nobody = &mut Observer::none();
            let norm = |x: &B::Hidden, weight| backend.rms_norm(x, weight, source.epsilon);
            let [x0, x] = match spec.kind {
                SiteKind::AttnIn => {
                    [norm(before, &source.attn_norm)?, norm(after, &block.attn_norm)?]
                }
                SiteKind::AttnOut => [
                    source.heads(backend, full_attention, before, nobody)?,
                    block.heads(backend, attention, after, nobody)?,
                ],
                SiteKind::MlpIn => [norm(before, &source.mlp_norm)?, norm(after, &block.mlp_norm)?],
                SiteKind::MlpAct => match spec.expert.zip(share) {
                    None => [
                        source.gated(backend, before, nobody)?,
                        block.gated(backend, after, nobody)?,
                    ],
                    Some((expert, share)) => {
                        let normed0 = norm(before, &source.mlp_norm)?;
                        let normed = norm(after, &block.mlp_norm)?;
                        [
                            source.gated_of(backend, expert, &normed0, share, nobody)?,
                            block.gated_of(backend, expert, &normed, share, nobody)?,
                        ]
                    }
                },
            };
            tokens += x.rows();
            let site = &block.sites[at];
            // What an expert gives counts by the token's share of it, so that its errors do.
            let mut seen = site.seen(backend, &x)?;
            if let Some(Share { weights, .. }) = share {
                backend.scale_rows(&mut seen, weights)?;
            }
            backend.add_gram(&mut hessian, &seen)?;
            if let Some(AccumulatedError { inputs, outputs, .. }) = &mut drift {
                let mut wanted = backend.permute(&x0, site.order())?;
                if let Some(Share { weights, .. }) = share {
                    backend.scale_rows(&mut wanted, weights)?;
                }
                backend.add_cross_covariance(
                    inputs,
                    &backend.difference(&wanted, &seen)?,
                    &seen,
                )?;
                if let Some(outputs) = outputs {
                    let mut lost = backend.hidden_difference(before, after)?;
                    if let (Some(share), Some(router)) = (share, &block.router) {
                        // Each of a token's experts makes up for its part.
                        let part = vec![1.0 / router.per_token as f32; share.tokens.len()];
                        lost = backend.select_rows(&lost, &share.tokens)?;
                        backend.scale_rows(&mut lost, &part)?;
                    }
                    backend.add_cross_covariance(outputs, &lost, &seen)?;
                }
            }
            match spec.kind {
                SiteKind::AttnOut => heads.push([x0, x]),
                SiteKind::MlpAct if spec.expert.is_none() && !last => {
                    source.sites[at].apply_onto(backend, x0, before, nobody)?
                }
                _ => {}
            }
            Ok(())
        })?;
        let hessian = self.trusted(spec, tokens, hessian);
        // Least squares with more unknowns than tokens would learn the tokens by heart.
        if self.correction > 0.0 && tokens < width && hessian.is_some() {
            let found = format!("{tokens} tokens for {width} channels");
            self.fallbacks.note(Fallback::Drift, &spec.name, &found);
        }
        Ok(Sums { hessian, drift: drift.filter(|_| tokens >= width) })
    }

    /// Adds attention's output to both streams, and where there are experts, finds out the tokens of each.
    fn add_heads(
        &self,
        [source, block]: [&Block<B>; 2],
        streams: &mut Streams<'_, B>,
        Kept { heads, shares }: &mut Kept<B>,
    ) -> Result<()> {
        let backend = self.backend;
        let mut heads = std::mem::take(heads).into_iter();
        self.for_batches(streams, |_, before, after| {
            let [x0, x] = heads.next().expect("as many as batches");
            source.sites[ATTN_OUT].apply_onto(backend, x0, before, &mut Observer::none())?;
            block.sites[ATTN_OUT].apply_onto(backend, x, after, &mut Observer::none())?;
            if let Some(router) = &block.router {
                let normed = backend.rms_norm(after, &block.mlp_norm, block.epsilon)?;
                shares.push(router.shares(backend, &normed)?);
            }
            Ok(())
        })
    }

    /// Adds the MLP's output to the quantized stream; where there are experts, to both.
    fn add_mlp(&self, [source, block]: [&Block<B>; 2], streams: &mut Streams<'_, B>) -> Result<()> {
        let backend = self.backend;
        self.for_batches(streams, |_, before, after| {
            let nobody = &mut Observer::none();
            if source.router.is_some() {
                source.mlp(backend, before, nobody)?;
            }
            // As the forward pass does it, which a resumed run repeats.
            block.mlp(backend, after, nobody)
        })
    }

    fn for_batches(
        &self,
        streams: &mut Streams<'_, B>,
        mut work: impl FnMut(usize, &mut B::Hidden, &mut B::Hidden) -> Result<()>,
    ) -> Result<()> {
        let backend = self.backend;
        let [source, quantized] = streams;
        let batches = source.batches.iter_mut().zip(&mut quantized.batches);
        for (batch, (before, after)) in batches.enumerate() {
            self.progress.check_stop()?;
            backend.reload(before)?;
            backend.reload(after)?;
            work(batch, before, after)?;
            backend.offload(before)?;
            backend.offload(after)?;
        }
        Ok(())
    }
}
