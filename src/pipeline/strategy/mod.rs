/*! How the sites of a block are quantized: simultaneously (`paper`) or sequentially (`default`). */

mod sequential;
mod simultaneous;

use super::energies::{AfterBlock, Statistics};
use super::quantizer::{BlockQuantizer, QuantizedBlock, SiteWork};
use super::timing::Timing;
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::plan::SitePlan;
use crate::model::Architecture;
use crate::model::block::Block;
use crate::model::sites::{MLP_IN, SiteSpec};
use crate::network::{BlockBuilder, BlockWeights, QuantizedSite, Stream};
use crate::pipeline::parts::SiteParts;
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
    /// What attn_out of the source's block at hand sees of each batch, where the measurement of energies found it.
    pub(super) source_heads: Vec<B::Activation>,
}

/// A block to be quantized, and what is known of it.
pub(super) struct BlockInput<'a, 'w, B: Backend> {
    pub(super) weights: &'a BlockWeights<'w, B>,
    pub(super) plan: &'a [SitePlan],
    pub(super) statistics: &'a Statistics,
    /// The states after the last block are not used.
    pub(super) is_last: bool,
}

/// A quantized block, and how far the streams are.
pub(super) struct PassedBlock<B: Backend> {
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

    /// What the measurement of energies leaves of the source's stream.
    pub(super) fn after_measurement(self) -> AfterBlock {
        match self {
            Self::Simultaneous => AfterBlock::Advanced,
            // It moves with the quantized stream.
            Self::Sequential => AfterBlock::Unchanged,
        }
    }

    /// Quantizes a block.
    pub(super) fn quantize<B: Backend>(
        self,
        quantizer: &BlockQuantizer<'_, B>,
        input: &BlockInput<'_, '_, B>,
        streams: &mut Streams<B>,
        timing: &mut Timing,
    ) -> Result<PassedBlock<B>> {
        match self {
            Self::Simultaneous => simultaneous::quantize(quantizer, input, streams, timing),
            Self::Sequential => sequential::quantize(quantizer, input, streams, timing),
        }
    }

    /// Carries the streams past a block that an earlier run quantized, as far as `quantize` does.
    pub(super) fn replay<B: Backend>(
        self,
        quantizer: &BlockQuantizer<'_, B>,
        input: &BlockInput<'_, '_, B>,
        block: QuantizedBlock<B>,
        streams: &mut Streams<B>,
        timing: &mut Timing,
    ) -> Result<PassedBlock<B>> {
        streams.source_heads.clear();
        let source = streams.source.as_mut();
        let moves = self.after_measurement() == AfterBlock::Unchanged && !input.is_last;
        if let Some(stream) = source.filter(|_| moves) {
            timing.measure("propagate", || {
                let block = input.builder(quantizer).source()?;
                let (backend, attention) = (quantizer.backend, &quantizer.full_attention);
                stream.advance(backend, attention, &block, || quantizer.progress.check_stop())
            })?;
        }
        let pending = input.pending(quantizer, &block.sites, streams, timing)?;
        Ok(PassedBlock { block, pending })
    }
}

/// Whether the linears of a site are divided among ranks: gate and up, of all experts where there are experts. Its sums are
/// small for the work on its linears, and go to all ranks.
fn divides(at: usize) -> bool {
    at == MLP_IN
}

impl<'a, 'w, B: Backend> BlockInput<'a, 'w, B> {
    /// Builds blocks of its weights.
    fn builder(&self, quantizer: &BlockQuantizer<'a, B>) -> BlockBuilder<'a, 'w, B> {
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
        streams: &Streams<B>,
        timing: &mut Timing,
    ) -> Result<Option<Block<B>>> {
        if self.is_last || streams.quantized.is_none() {
            return Ok(None);
        }
        let quantized = || self.builder(quantizer).quantized(sites);
        Ok(Some(timing.measure("propagate", quantized)?))
    }
}

#[cfg(test)]
mod tests;
