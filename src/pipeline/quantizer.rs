/*! Quantizing the linears of one site: by GPTQ with a Hessian, or to nearest without one. */

use super::energies::Energies;
use super::fallbacks::{Fallback, Fallbacks};
use crate::Result;
use crate::backend::{AccumulatedError, AttentionSpec, Backend, Unquantized};
use crate::checkpoint::plan::SitePlan;
use crate::model::Architecture;
use crate::model::sites::SiteSpec;
use crate::network::QuantizedSite;
use crate::progress::Progress;
use crate::quant::site::SiteFormat;
use crate::recipe::Recipe;

/// A block's quantized sites and the relative output error of each of its quantized linears.
pub(super) struct QuantizedBlock<B: Backend> {
    /// In the order of the plan.
    pub sites: Vec<QuantizedSite<B::Quantized>>,
    /// `(linear, error)`.
    pub errors: Vec<(String, f64)>,
}

impl<B: Backend> QuantizedBlock<B> {
    /// A block of which no site is quantized yet.
    pub(super) fn empty() -> Self {
        Self { sites: Vec::new(), errors: Vec::new() }
    }
}

/// What stays the same from block to block.
pub(super) struct BlockQuantizer<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// The network.
    pub architecture: &'a Architecture,
    /// The settings.
    pub recipe: &'a Recipe,
    /// Attention over quantized keys and values.
    pub attention: AttentionSpec,
    /// Attention over keys and values as the source has them.
    pub full_attention: AttentionSpec,
    /// What costs accuracy and was not asked for.
    pub(super) fallbacks: &'a Fallbacks,
    /// Asked whether to stop.
    pub progress: &'a dyn Progress,
}

/// The Gram matrix and the cross-covariances that a site's linears are quantized by.
pub(super) struct SiteMatrices<B: Backend> {
    /// The Hessian; without it linears are rounded to nearest.
    pub(super) hessian: Option<B::Gram>,
    /// The accumulated error that weights make up for, where it is corrected.
    pub(super) correction: Option<AccumulatedError<B::CrossCovariance>>,
}

/// A site's linears, none where one stays as it is, and the relative output errors of those that are quantized.
pub(super) struct QuantizedLinears<B: Backend> {
    pub(super) linears: Vec<Option<B::Quantized>>,
    pub(super) errors: Vec<(String, f64)>,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// A site's Hessian, unless it is an expert's that too few tokens went to.
    pub(super) fn trusted(
        &self,
        spec: &SiteSpec,
        tokens: usize,
        hessian: B::Gram,
    ) -> Option<B::Gram> {
        if spec.expert.is_none() || tokens >= self.recipe.expert_tokens {
            return Some(hessian);
        }
        let kind = Fallback::FewTokens { wanted: self.recipe.expert_tokens };
        self.fallbacks.note(kind, &spec.name, &format!("{tokens} tokens"));
        None
    }

    /// Quantizes a site's linears.
    pub(super) fn quantize_site(
        &self,
        work: &SiteWork<B>,
        format: &SiteFormat,
        matrices: SiteMatrices<B>,
    ) -> Result<QuantizedLinears<B>> {
        let backend = self.backend;
        let site = backend.site(format)?;
        let SiteMatrices { mut hessian, correction } = matrices;
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
                scaling: linear.scaling(),
            })
            .collect();
        let quantized = match (&hessian, &factor) {
            (Some(hessian), Some(factor)) => {
                backend.gptq(&unquantized, &site, hessian, factor, correction.as_ref())?
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
        let errors = unquantized.iter().zip(&quantized);
        let errors = errors.map(|(linear, (_, error))| (linear.name.to_owned(), *error)).collect();
        let mut quantized = quantized.into_iter().map(|(quantized, _)| quantized);
        let linears = work.plan.linears.iter();
        let linears = linears.map(|linear| if linear.bits < 16 { quantized.next() } else { None });
        Ok(QuantizedLinears { linears: linears.collect(), errors })
    }

    /// The Hessian's factor; none if it has none.
    fn factor(&self, hessian: &mut B::Gram, site: &str) -> Result<Option<B::Factor>> {
        let factor = self.backend.cholesky(hessian, self.recipe.damping)?;
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
