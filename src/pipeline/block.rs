/*! Quantizing one block: Hessians of its sites on the quantized stream, then every linear by GPTQ, or
rounding to nearest without a Hessian. */

use super::calibrate::{Energies, Statistics};
use super::fallbacks::{Fallback, Fallbacks};
use super::load::{BlockWeights, QuantizedSite, hessian_block};
use super::plan::SitePlan;
use super::stream::Stream;
use super::timing::Timing;
use crate::Result;
use crate::backend::{AccumulatedError, AttentionSpec, Backend, Tensor, Unquantized};
use crate::model::Architecture;
use crate::model::block::{Observer, Seen};
use crate::model::sites::SiteSpec;
use crate::progress::Progress;
use crate::quant::site::SiteFormat;

/// A block's quantized sites and the relative output error of each of its quantized linears.
pub struct QuantizedBlock<B: Backend> {
    /// In the order of the plan.
    pub sites: Vec<QuantizedSite<B::Quantized>>,
    /// `(linear, error)`.
    pub errors: Vec<(String, f64)>,
}

/// What stays the same from block to block.
pub struct BlockQuantizer<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// The network.
    pub architecture: &'a Architecture,
    /// Attention over quantized keys and values.
    pub attention: &'a AttentionSpec,
    /// Attention over keys and values as the source has them.
    pub full_attention: &'a AttentionSpec,
    /// Damping of the Hessians.
    pub damping: f32,
    /// How much of the drift is corrected, where sites are quantized in turn.
    pub correction: f32,
    /// Tokens that an expert needs for GPTQ.
    pub expert_tokens: usize,
    /// What costs accuracy and was not asked for.
    pub(super) fallbacks: &'a Fallbacks,
    /// Asked whether to stop.
    pub progress: &'a dyn Progress,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// Quantizes a block by `plan`. With `stream`, the hidden states that the quantized blocks before
    /// it gave, by GPTQ; without, by rounding.
    pub fn quantize(
        &self,
        weights: &BlockWeights<B>,
        plan: &[SitePlan],
        statistics: &Statistics,
        stream: Option<&Stream<B>>,
        timing: &mut Timing,
    ) -> Result<QuantizedBlock<B>> {
        let backend = self.backend;
        let formats = formats(plan, &statistics.energies);
        let mut hessians = match stream {
            None => formats.iter().map(|_| None).collect(),
            Some(stream) => timing.measure("hessians", || {
                let key_mean = self.key_mean(statistics);
                let hessians = self.hessians(weights, &formats, key_mean, stream)?;
                backend.wait()?;
                Ok::<_, crate::Error>(hessians)
            })?,
        };
        backend.trim();
        let mut sites = Vec::with_capacity(plan.len());
        let mut errors = Vec::new();
        let specs = self.architecture.sites(weights.index);
        for (at, format) in formats.into_iter().enumerate() {
            self.progress.check_stop()?;
            let hessian = hessians[at].take();
            let name = if hessian.is_some() { "gptq" } else { "round" };
            let work = SiteWork {
                spec: &specs[at],
                plan: &plan[at],
                weights: &weights.sites[at],
                energy: &statistics.energies[at],
            };
            let linears = timing.measure(name, || {
                let linears = self.quantize_site(&work, &format, hessian, None, &mut errors)?;
                backend.wait()?;
                Ok::<_, crate::Error>(linears)
            })?;
            sites.push(QuantizedSite { format, linears });
        }
        Ok(QuantizedBlock { sites, errors })
    }

    /// `sum x^T x` at every site, with quantized activations and the source's weights, as the
    /// reference collects them: all of a block at once.
    fn hessians(
        &self,
        weights: &BlockWeights<B>,
        formats: &[SiteFormat],
        key_mean: Option<&[f32]>,
        stream: &Stream<B>,
    ) -> Result<Vec<Option<B::Gram>>> {
        let backend = self.backend;
        let block = hessian_block(backend, self.architecture, weights, formats, key_mean)?;
        let mut hessians = formats
            .iter()
            .map(|format| backend.gram(format.width()))
            .collect::<Result<Vec<_>>>()?;
        let mut tokens = vec![0; hessians.len()];
        for batch in &stream.batches {
            self.progress.check_stop()?;
            let batch = backend.duplicate(batch)?;
            let mut see = |seen: Seen, x: &B::Activation| {
                let Seen::Site(site) = seen else { return Ok(()) };
                tokens[site] += x.rows();
                backend.add_gram(&mut hessians[site], x)
            };
            block.observe(backend, self.attention, batch, &mut Observer::new(&mut see))?;
        }
        let specs = self.architecture.sites(weights.index);
        let sites = specs.iter().zip(tokens).zip(hessians);
        Ok(sites.map(|((spec, tokens), hessian)| self.trusted(spec, tokens, hessian)).collect())
    }

    /// A site's Hessian, unless it is an expert's that too few tokens went to.
    pub(super) fn trusted(
        &self,
        spec: &SiteSpec,
        tokens: usize,
        hessian: B::Gram,
    ) -> Option<B::Gram> {
        if spec.expert.is_none() || tokens >= self.expert_tokens {
            return Some(hessian);
        }
        let kind = Fallback::FewTokens { wanted: self.expert_tokens };
        self.fallbacks.note(kind, &spec.name, &format!("{tokens} tokens"));
        None
    }

    /// The mean keys, where the cache is centred.
    pub(super) fn key_mean<'s>(&self, statistics: &'s Statistics) -> Option<&'s [f32]> {
        self.attention.kv.is_centered().then_some(&statistics.key_mean[..])
    }

    /// Quantizes a site's linears: by GPTQ with a Hessian, towards weights that make up for the drift if
    /// there is one.
    pub(super) fn quantize_site(
        &self,
        work: &SiteWork<B>,
        format: &SiteFormat,
        mut hessian: Option<B::Gram>,
        drift: Option<&AccumulatedError<B::CrossCovariance>>,
        errors: &mut Vec<(String, f64)>,
    ) -> Result<Vec<Option<B::Quantized>>> {
        let backend = self.backend;
        let site = backend.site(format)?;
        let factor = match &mut hessian {
            None => None,
            Some(hessian) => self.factor(hessian, &work.spec.name)?,
        };
        let planned = work.plan.linears.iter().zip(work.weights);
        let unquantized: Vec<Unquantized<B::Weight<'_>>> = planned
            .filter(|(linear, _)| linear.bits < 16)
            .map(|(linear, weight)| Unquantized {
                name: &linear.name,
                weight: weight.as_ref().expect("every weight is loaded to be quantized"),
                format: work.plan.weights(linear),
                clip: linear.clip,
            })
            .collect();
        let quantized = match (&hessian, &factor) {
            (Some(hessian), Some(factor)) => {
                backend.gptq(&unquantized, &site, hessian, factor, drift)?
            }
            (Some(hessian), None) => round_all(backend, &unquantized, &site, hessian)?,
            (None, _) => unquantized
                .iter()
                .map(|linear| {
                    let quantized = backend.round(linear, &site)?;
                    let error =
                        backend.energy_error(work.energy, &site, linear.weight, &quantized)?;
                    Ok((quantized, error))
                })
                .collect::<Result<_>>()?,
        };
        errors.extend(
            unquantized
                .iter()
                .zip(&quantized)
                .map(|(linear, (_, error))| (linear.name.to_owned(), *error)),
        );
        let mut quantized = quantized.into_iter().map(|(quantized, _)| quantized);
        let linears = work.plan.linears.iter();
        Ok(linears.map(|linear| if linear.bits < 16 { quantized.next() } else { None }).collect())
    }

    /// The Hessian's factor; none if it has none.
    fn factor(&self, hessian: &mut B::Gram, site: &str) -> Result<Option<B::Factor>> {
        let factor = self.backend.cholesky(hessian, self.damping)?;
        match &factor {
            None => {
                self.fallbacks.note(
                    Fallback::NoFactor,
                    site,
                    "its Hessian is not positive definite",
                );
            }
            Some((_, damping)) if damping.failures > 0 => {
                let share = format!("{} of the mean diagonal", damping.share);
                self.fallbacks.note(Fallback::Damping, site, &share);
            }
            Some(_) => {}
        }
        Ok(factor.map(|(factor, _)| factor))
    }
}

/// Linears rounded to nearest, each with its relative output error.
pub(super) fn round_all<B: Backend>(
    backend: &B,
    linears: &[Unquantized<B::Weight<'_>>],
    site: &B::Site,
    hessian: &B::Gram,
) -> Result<Vec<(B::Quantized, f64)>> {
    let round = |linear: &Unquantized<B::Weight<'_>>| {
        let quantized = backend.round(linear, site)?;
        let error = backend.output_error(hessian, site, linear.weight, &quantized)?;
        Ok((quantized, error))
    };
    linears.iter().map(round).collect()
}

/// Every site's order and format.
pub(super) fn formats(plan: &[SitePlan], energies: &Energies) -> Vec<SiteFormat> {
    let sites = plan.iter().zip(energies);
    sites.map(|(site, energy)| site.format(site.order(energy))).collect()
}

/// What one site's linears are quantized from.
pub(super) struct SiteWork<'a, 'w, B: Backend> {
    pub(super) spec: &'a SiteSpec,
    pub(super) plan: &'a SitePlan,
    pub(super) weights: &'a [Option<B::Weight<'w>>],
    pub(super) energy: &'a [f64],
}
