/*! How the sites of a block are quantized: simultaneously (`paper`) or sequentially (`default`). */

mod pass;
mod sequential;
mod simultaneous;
mod visit;

use std::ops::Range;

use super::energies::{EnergyMeter, Statistics};
use super::quantizer::{BlockQuantizer, QuantizedBlock, SiteWork};
use super::timing::Timing;
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::model::Architecture;
use crate::model::block::Block;
use crate::model::sites::{MLP_IN, SiteSpec};
use crate::network::{BlockBuilder, BlockWeights, QuantizedSite, Stream};
use crate::pipeline::parts::SiteParts;
use crate::quant::site::SiteFormat;
use crate::recipe::Recipe;

/// One of the two algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strategy {
    /// All Hessians of a block come from one pass with the source's weights; without GPTQ there are none.
    Simultaneous,
    /// The Hessian of a site is accumulated on activations that already carry the quantization error of
    /// the sites before it.
    Sequential,
}

/// The hidden states of the calibration windows, in the same batches.
pub(super) struct Streams<B: Backend> {
    /// After the source's blocks, where they are needed.
    pub(super) source: Option<Stream<B>>,
    /// After the quantized blocks, where GPTQ is.
    pub(super) quantized: Option<Stream<B>>,
}

/// A block to be quantized.
pub(super) struct BlockInput<'a, 'w, B: Backend> {
    pub(super) weights: &'a BlockWeights<'w, B>,
    /// Its statistics, where they are not measured.
    pub(super) known: Option<&'a Statistics>,
    /// Makes the plan of some sites complete, by the energies of all, and refuses activations that are too small for it.
    pub(super) planned: &'a dyn Fn(Range<usize>, &Statistics) -> Result<BlockPlan>,
    /// The states after the last block are not used.
    pub(super) is_last: bool,
}

/// A block whose statistics and plan are known, as far as it is quantized.
pub(super) struct PlannedBlock<'a, 'w, B: Backend> {
    pub(super) weights: &'a BlockWeights<'w, B>,
    pub(super) plan: BlockPlan,
    pub(super) statistics: Statistics,
}

/// A quantized block, and how far the streams are.
pub(super) struct PassedBlock<'a, 'w, B: Backend> {
    pub(super) planned: PlannedBlock<'a, 'w, B>,
    pub(super) block: QuantizedBlock<B>,
    /// What the quantized stream is still to pass, if anything.
    pub(super) pending: Option<Block<B>>,
}

impl Strategy {
    /// The one of a recipe.
    pub(super) fn of(recipe: &Recipe) -> Self {
        if recipe.gptq && recipe.sequential { Self::Sequential } else { Self::Simultaneous }
    }

    /// Device memory that its work on a block takes besides what every strategy does.
    pub(super) fn more_bytes(self, architecture: &Architecture, tokens: usize) -> u64 {
        match self {
            Self::Simultaneous => 0,
            Self::Sequential => sequential::more_bytes(architecture, tokens),
        }
    }

    /// Whether the source's stream is needed even where all energies are known.
    pub(super) fn needs_source(self) -> bool {
        self == Self::Sequential
    }

    /// Quantizes a block.
    pub(super) fn quantize<'a, 'w, B: Backend>(
        self,
        quantizer: &BlockQuantizer<'_, B>,
        input: &BlockInput<'a, 'w, B>,
        streams: &mut Streams<B>,
        timing: &mut Timing,
    ) -> Result<PassedBlock<'a, 'w, B>> {
        match self {
            Self::Simultaneous => simultaneous::quantize(quantizer, input, streams, timing),
            Self::Sequential => sequential::quantize(quantizer, input, streams, timing),
        }
    }

    /// Carries the streams past a block that `read` finds in the work of an earlier run, as far as `quantize` does.
    pub(super) fn replay<'a, 'w, B: Backend>(
        self,
        quantizer: &BlockQuantizer<'_, B>,
        input: &BlockInput<'a, 'w, B>,
        read: impl FnOnce(&PlannedBlock<'a, 'w, B>) -> Result<QuantizedBlock<B>>,
        streams: &mut Streams<B>,
        timing: &mut Timing,
    ) -> Result<PassedBlock<'a, 'w, B>> {
        let planned = input.measured(quantizer, streams, timing)?;
        let moves = input.known.is_some() && self.needs_source() && !input.is_last;
        if let Some(stream) = streams.source.as_mut().filter(|_| moves) {
            timing.measure("propagate", || {
                let block = planned.builder(quantizer).source()?;
                let (backend, attention) = (quantizer.backend, &quantizer.full_attention);
                stream.advance(backend, attention, &block, || quantizer.progress.check_stop())
            })?;
        }
        let block = read(&planned)?;
        let pending = planned.pending(quantizer, &block.sites, input.is_last, streams, timing)?;
        Ok(PassedBlock { planned, block, pending })
    }
}

impl<'a, 'w, B: Backend> PlannedBlock<'a, 'w, B> {
    /// A block of which nothing is measured yet; statistics that are known are there.
    fn unmeasured(input: &BlockInput<'a, 'w, B>, specs: &[SiteSpec]) -> Self {
        let statistics = input.known.cloned().unwrap_or_else(|| Statistics {
            energies: vec![Vec::new(); specs.len()],
            key_mean: Vec::new(),
        });
        Self { weights: input.weights, plan: Vec::new(), statistics }
    }

    /// The order and format of a site that is planned.
    fn format(&self, at: usize) -> SiteFormat {
        let site = &self.plan[at];
        site.format(site.order(&self.statistics.energies[at]))
    }
}

/// Whether the linears of a site are divided among ranks: gate and up, of all experts where there are experts. Its sums are
/// small for the work on its linears, and go to all ranks.
fn divides(at: usize) -> bool {
    at == MLP_IN
}

impl<'a, 'w, B: Backend> BlockInput<'a, 'w, B> {
    /// The block with all of its statistics: those that are known, or measured on the source's stream, which then is
    /// after the block.
    fn measured(
        &self,
        quantizer: &BlockQuantizer<'_, B>,
        streams: &mut Streams<B>,
        timing: &mut Timing,
    ) -> Result<PlannedBlock<'a, 'w, B>> {
        let statistics = match self.known {
            Some(known) => known.clone(),
            None => {
                let stream = streams.source.as_mut();
                let stream = stream.expect("what is not known is measured on the source's stream");
                timing.measure("calibrate", || {
                    let measured = meter(quantizer).measure(self.weights, stream)?;
                    quantizer.backend.wait()?;
                    Ok::<_, crate::Error>(measured)
                })?
            }
        };
        let count = quantizer.architecture.sites(self.weights.index).len();
        let plan = (self.planned)(0..count, &statistics)?;
        Ok(PlannedBlock { weights: self.weights, plan, statistics })
    }
}

/// Measures on the source's stream.
fn meter<'a, B: Backend>(quantizer: &'a BlockQuantizer<'_, B>) -> EnergyMeter<'a, B> {
    let BlockQuantizer { backend, architecture, full_attention, division, progress, .. } =
        quantizer;
    EnergyMeter {
        backend: *backend,
        architecture,
        attention: full_attention,
        division: *division,
        progress: *progress,
    }
}

impl<'w, B: Backend> PlannedBlock<'_, 'w, B> {
    /// Builds blocks of its weights.
    fn builder<'s>(&'s self, quantizer: &BlockQuantizer<'s, B>) -> BlockBuilder<'s, 'w, B> {
        let key_mean = &self.statistics.key_mean[..];
        let key_mean = quantizer.attention.kv().is_centered().then_some(key_mean);
        BlockBuilder::new(quantizer.backend, quantizer.architecture, self.weights)
            .with_key_mean(key_mean)
    }

    /// Which rank quantizes what, where all sites can be quantized at the same time: the largest go first, each to the
    /// rank that has least to do.
    fn parts(&self, ranks: usize) -> Vec<SiteParts> {
        let cost = |site: &SitePlan| {
            let rows = site.linears.iter().map(|linear| linear.rows).sum::<usize>();
            (site.width() + rows) as f64 * (site.width() as f64).powi(2)
        };
        let costs: Vec<f64> = self.plan.iter().map(cost).collect();
        let mut largest: Vec<usize> = (0..costs.len()).collect();
        largest.retain(|site| !divides(*site));
        largest.sort_by(|a, b| costs[*b].total_cmp(&costs[*a]));
        let mut work = vec![0.0f64; ranks];
        let mut owners = vec![0; costs.len()];
        for site in largest {
            let least = (0..ranks).min_by(|a, b| work[*a].total_cmp(&work[*b]));
            owners[site] = least.expect("there is a rank");
            work[owners[site]] += costs[site];
        }
        let parts = owners.into_iter().enumerate().map(|(at, owner)| {
            let linears = self.plan[at].linears.len();
            match divides(at) {
                true => SiteParts::divided(linears, ranks),
                false => SiteParts::whole(linears, owner),
            }
        });
        parts.collect()
    }

    /// What one of its sites is quantized from.
    fn site<'s>(&'s self, at: usize, spec: &'s SiteSpec) -> SiteWork<'s, 'w, B> {
        SiteWork {
            spec,
            plan: &self.plan[at],
            weights: &self.weights.sites[at],
            energy: &self.statistics.energies[at],
        }
    }

    /// The quantized block, if its stream is to pass it.
    fn pending(
        &self,
        quantizer: &BlockQuantizer<'_, B>,
        sites: &[QuantizedSite<B::Quantized>],
        is_last: bool,
        streams: &Streams<B>,
        timing: &mut Timing,
    ) -> Result<Option<Block<B>>> {
        if is_last || streams.quantized.is_none() {
            return Ok(None);
        }
        let quantized = || self.builder(quantizer).quantized(sites);
        Ok(Some(timing.measure("propagate", quantized)?))
    }
}

#[cfg(test)]
mod tests;
