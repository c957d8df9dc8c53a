/*! Quantizing the linears of one site: by GPTQ with a Hessian, or to nearest without one. */

use serde::{Deserialize, Serialize};

use super::division::Division;
use super::energies::Energies;
use super::fallbacks::{Fallback, Fallbacks};
use super::parts::SiteParts;
use crate::backend::{AccumulatedError, Backend, Unquantized};
use crate::checkpoint::plan::SitePlan;
use crate::model::sites::SiteSpec;
use crate::model::{Architecture, AttentionSpecs};
use crate::network::QuantizedSite;
use crate::progress::Progress;
use crate::quant::site::SiteFormat;
use crate::ranks::Collectives;
use crate::recipe::Recipe;
use crate::{Error, Result};

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

    /// Adds the next site.
    pub(super) fn push(&mut self, format: SiteFormat, quantized: QuantizedLinears<B>) {
        let QuantizedLinears { linears, report } = quantized;
        self.errors.extend(report.errors);
        self.sites.push(QuantizedSite { format, linears });
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
    pub attention: AttentionSpecs,
    /// Attention over keys and values as the source has them.
    pub full_attention: AttentionSpecs,
    /// Tokens of all calibration windows.
    pub tokens: usize,
    /// The ranks, and whose the windows are.
    pub(super) division: Division<'a>,
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
    /// What was not done as it was wanted.
    pub(super) notes: Vec<Note>,
}

/// A fallback at a site, and what was found there, in a few words.
#[derive(Serialize, Deserialize)]
pub(super) struct Note(pub(super) Fallback, pub(super) String);

/// A site's linears, none where one stays as it is, and the relative output errors of those that are quantized.
pub(super) struct QuantizedLinears<B: Backend> {
    pub(super) linears: Vec<Option<B::Quantized>>,
    pub(super) report: SiteReport,
}

/// What is said of a site's linears.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct SiteReport {
    pub(super) errors: Vec<(String, f64)>,
    notes: Vec<Note>,
}

impl<B: Backend> BlockQuantizer<'_, B> {
    /// What a site is quantized by, of a Hessian of `tokens` tokens: nothing if it is an expert's that too few went to.
    pub(super) fn trusted(
        &self,
        spec: &SiteSpec,
        tokens: u64,
        hessian: B::Gram,
    ) -> SiteMatrices<B> {
        let wanted = self.recipe.expert_tokens;
        if spec.expert.is_none() || tokens >= wanted as u64 {
            return SiteMatrices { hessian: Some(hessian), correction: None, notes: Vec::new() };
        }
        let note = Note(Fallback::FewTokens { wanted }, format!("{tokens} tokens"));
        SiteMatrices { hessian: None, correction: None, notes: vec![note] }
    }

    /// A site's linears on all ranks, of which each has quantized its parts.
    pub(super) fn share(
        &self,
        work: &SiteWork<B>,
        parts: &SiteParts,
        own: Option<QuantizedLinears<B>>,
    ) -> Result<QuantizedLinears<B>> {
        let ranks = self.division.ranks;
        let quantized = match own {
            Some(own) if ranks.ranks() == 1 => own,
            own => {
                let (linears, report) = own.map_or_else(
                    || (Vec::new(), SiteReport::default()),
                    |own| (own.linears, own.report),
                );
                let report = share_report(ranks, work.plan, parts, &report)?;
                QuantizedLinears { linears: self.broadcast(work.plan, parts, linears)?, report }
            }
        };
        for Note(kind, found) in &quantized.report.notes {
            self.fallbacks.note(*kind, &work.spec.name, found);
        }
        Ok(quantized)
    }

    /// A block that rank 0 has of an earlier run, on all ranks.
    pub(super) fn share_resumed(
        &self,
        own: Option<QuantizedBlock<B>>,
        plan: &[SitePlan],
        energies: &Energies,
    ) -> Result<QuantizedBlock<B>> {
        let ranks = self.division.ranks;
        let own = match own {
            Some(own) if ranks.ranks() == 1 => return Ok(own),
            own => own.unwrap_or_else(QuantizedBlock::empty),
        };
        let message = serde_json::to_vec(&own.errors).expect("errors have only JSON types");
        let errors: Vec<(String, f64)> = serde_json::from_slice(&ranks.broadcast(0, message)?)
            .map_err(|error| Error::machine(format!("a message of rank 0: {error}")))?;
        let mut own = own.sites.into_iter();
        let sites = formats(plan, energies).into_iter().zip(plan).map(|(format, plan)| {
            let parts = SiteParts::whole(plan.linears.len(), 0);
            let own = own.next().map_or_else(Vec::new, |site| site.linears);
            let linears = self.broadcast(plan, &parts, own)?;
            Ok(QuantizedSite { format, linears })
        });
        Ok(QuantizedBlock { sites: sites.collect::<Result<_>>()?, errors })
    }

    /// The quantized linears of a site on all ranks, each of which has those of its parts.
    fn broadcast(
        &self,
        plan: &SitePlan,
        parts: &SiteParts,
        own: Vec<Option<B::Quantized>>,
    ) -> Result<Vec<Option<B::Quantized>>> {
        let mut own = own.into_iter();
        let linears = plan.linears.iter().enumerate().map(|(at, linear)| {
            let own = own.next().flatten();
            if linear.bits == 16 {
                return Ok(None);
            }
            let shape = (linear.rows, plan.weights(linear));
            self.backend.broadcast_quantized(parts.rank(at), own, shape).map(Some)
        });
        linears.collect()
    }

    /// Quantizes this rank's parts of a site's linears; the others are none.
    pub(super) fn quantize_site(
        &self,
        work: &SiteWork<B>,
        format: &SiteFormat,
        matrices: SiteMatrices<B>,
        parts: &SiteParts,
    ) -> Result<QuantizedLinears<B>> {
        let backend = self.backend;
        let site = backend.site(format)?;
        let SiteMatrices { mut hessian, correction, mut notes } = matrices;
        let factor = match &mut hessian {
            None => None,
            Some(hessian) => self.factor(hessian, &mut notes)?,
        };
        let mut linears: Vec<_> = work.plan.linears.iter().map(|_| None).collect();
        let mut errors = Vec::new();
        for part in parts.of(self.division.ranks.rank()) {
            let quantized: Vec<usize> =
                part.filter(|at| work.plan.linears[*at].bits < 16).collect();
            let unquantized: Vec<_> = quantized.iter().map(|at| work.unquantized(*at)).collect();
            let made = match (&hessian, &factor) {
                _ if unquantized.is_empty() => Vec::new(),
                (Some(hessian), Some(factor)) => {
                    backend.gptq(&unquantized, &site, hessian, factor, correction.as_ref())?
                }
                (Some(hessian), None) => round_all(backend, &unquantized, &site, hessian)?,
                (None, _) => unquantized
                    .iter()
                    .map(|linear| {
                        let quantized = backend.round(linear, &site)?;
                        let (energy, weight) = (work.energy, linear.weight);
                        let error = backend.energy_error(energy, &site, weight, &quantized)?;
                        Ok((quantized, error))
                    })
                    .collect::<Result<_>>()?,
            };
            for ((at, linear), (quantized, error)) in quantized.iter().zip(unquantized).zip(made) {
                linears[*at] = Some(quantized);
                errors.push((linear.name.to_owned(), error));
            }
        }
        Ok(QuantizedLinears { linears, report: SiteReport { errors, notes } })
    }

    /// The Hessian's factor; none if it has none.
    fn factor(&self, hessian: &mut B::Gram, notes: &mut Vec<Note>) -> Result<Option<B::Factor>> {
        let factor = self.backend.cholesky(hessian, self.recipe.damping)?;
        match &factor {
            None => {
                let found = "its Hessian is not positive definite".to_owned();
                notes.push(Note(Fallback::NoFactor, found));
            }
            Some((_, damping)) if damping.failures > 0 => {
                let share = format!("{} of the mean diagonal", damping.share);
                notes.push(Note(Fallback::Damping, share));
            }
            Some(_) => {}
        }
        Ok(factor.map(|(factor, _)| factor))
    }
}

/// What is said of a site's linears by the ranks that have quantized them.
fn share_report(
    ranks: &dyn Collectives,
    plan: &SitePlan,
    parts: &SiteParts,
    own: &SiteReport,
) -> Result<SiteReport> {
    let message = serde_json::to_vec(own).expect("a report has only JSON types");
    let all = ranks.gather_all(message)?;
    let read = |(rank, message): (usize, &Vec<u8>)| {
        serde_json::from_slice(message)
            .map_err(|error| Error::machine(format!("a message of rank {rank}: {error}")))
    };
    let mut reports: Vec<SiteReport> = all.iter().enumerate().map(read).collect::<Result<_>>()?;
    let notes = std::mem::take(&mut reports[parts.owner()].notes);
    let mut errors: Vec<_> = reports.into_iter().map(|report| report.errors.into_iter()).collect();
    let quantized = plan.linears.iter().enumerate().filter(|(_, linear)| linear.bits < 16);
    // Each rank has those of its parts in order.
    let errors = quantized.filter_map(|(at, _)| errors[parts.rank(at)].next());
    Ok(SiteReport { errors: errors.collect(), notes })
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
pub(super) fn formats(plan: &[SitePlan], energies: &[Vec<f64>]) -> Vec<SiteFormat> {
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

impl<'a, 'w, B: Backend> SiteWork<'a, 'w, B> {
    /// One of its linears, as it is to be quantized.
    fn unquantized(&self, at: usize) -> Unquantized<'a, B::Weight<'w>> {
        let linear = &self.plan.linears[at];
        Unquantized {
            name: &linear.name,
            weight: self.weights[at].as_ref().expect("every weight is loaded to be quantized"),
            format: self.plan.weights(linear),
            scaling: linear.scaling(),
        }
    }
}
