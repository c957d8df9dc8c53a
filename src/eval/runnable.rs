/*! A model that can run, whichever kind of checkpoint holds it: its blocks are read one ahead of the arithmetic and
made ready when their turn comes. */

use super::{Model, check_files};
use crate::backend::Backend;
use crate::checkpoint::{AtomCheckpoint, Source, Tensors};
use crate::model::Architecture;
use crate::model::block::Block;
use crate::pipeline::memory::{self, Place, Windows};
use crate::pipeline::plan::{BlockPlan, plan_network};
use crate::pipeline::{
    BlockWeights, Manifest, QuantizedSite, check_levels, network, quantized_block, read_key_mean,
    read_sites, source_block,
};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::{Error, Result};

/// A model on a backend: a source in full precision, an Atom checkpoint on the integer path.
pub(super) struct Runnable<'a, B: Backend> {
    pub(super) backend: &'a B,
    /// Its name.
    pub(super) name: &'a str,
    /// Its tensors by name.
    pub(super) tensors: &'a dyn Tensors,
    pub(super) architecture: Architecture,
    /// How keys and values are held.
    pub(super) kv: KvFormat,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Source,
    Atom(&'a AtomCheckpoint, Vec<BlockPlan>),
}

/// What was read of a block.
pub(super) struct Loaded<'a, B: Backend> {
    weights: BlockWeights<'a, B>,
    quantized: Option<Quantized>,
}

struct Quantized {
    sites: Vec<QuantizedSite<QuantizedLinear>>,
    key_mean: Option<Vec<f32>>,
}

impl<'a, B: Backend> Runnable<'a, B> {
    /// A model of either kind.
    pub(super) fn new(backend: &'a B, model: &'a Model, progress: &dyn Progress) -> Result<Self> {
        match model {
            Model::Source(source) => Self::source(backend, source, progress),
            Model::Atom(checkpoint) => Self::atom(backend, checkpoint),
        }
    }

    /// A source in full precision.
    pub(super) fn source(
        backend: &'a B,
        source: &'a Source,
        progress: &dyn Progress,
    ) -> Result<Self> {
        Ok(Self {
            backend,
            name: source.name(),
            tensors: source,
            architecture: network(source, progress)?.architecture,
            kv: KvFormat::FULL,
            kind: Kind::Source,
        })
    }

    /// A checkpoint on the integer path.
    pub(super) fn atom(backend: &'a B, checkpoint: &'a AtomCheckpoint) -> Result<Self> {
        let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
        check_files(checkpoint)?;
        let Manifest { kv, blocks, .. } = Manifest::read(checkpoint, &architecture)?;
        check_levels(backend, &blocks)?;
        Ok(Self {
            backend,
            name: checkpoint.name(),
            tensors: checkpoint,
            architecture,
            kv,
            kind: Kind::Atom(checkpoint, blocks),
        })
    }

    /// Compares what an evaluation takes with what the machine has, before it begins.
    ///
    /// # Errors
    /// A machine error with both numbers.
    pub(super) fn check_memory(&self, windows: Windows, progress: &dyn Progress) -> Result<()> {
        let Self { backend, architecture, tensors, .. } = self;
        let as_it_is;
        let (blocks, quantized) = match &self.kind {
            Kind::Atom(_, blocks) => (blocks, true),
            Kind::Source => {
                as_it_is = plan_network(&memory::any_recipe(), architecture)?;
                (&as_it_is, false)
            }
        };
        let place = Place::of(*backend);
        let bytes =
            memory::evaluation_bytes(architecture, *tensors, blocks, place, windows, quantized);
        memory::check(bytes, progress)
    }

    /// Reads block `index`. Safe to call from a thread beside the one that computes.
    pub(super) fn load(&self, index: usize) -> Result<Loaded<'a, B>> {
        let Self { backend, tensors, architecture, .. } = self;
        let Kind::Atom(checkpoint, blocks) = &self.kind else {
            let weights = BlockWeights::load(*backend, *tensors, architecture, index, |_, _| true)?;
            return Ok(Loaded { weights, quantized: None });
        };
        let plan = &blocks[index];
        let read = || {
            let kept = |site: usize, linear: usize| plan[site].linears[linear].bits == 16;
            let weights = BlockWeights::load(*backend, *tensors, architecture, index, kept)?;
            let key_mean = read_key_mean(*checkpoint, architecture, index, &self.kv)?;
            let sites = read_sites(*checkpoint, plan)?;
            Ok(Loaded { weights, quantized: Some(Quantized { sites, key_mean }) })
        };
        read().map_err(|error: Error| {
            error.context(format!("block {index} of {} cannot be read", checkpoint.title()))
        })
    }

    /// Makes what was read ready to run.
    pub(super) fn block(&self, loaded: Loaded<'a, B>) -> Result<Block<B>> {
        let Loaded { weights, quantized } = loaded;
        let Some(Quantized { sites, key_mean }) = quantized else {
            return source_block(self.backend, &self.architecture, &weights);
        };
        let sites = sites.into_iter().map(|site| site.restore(self.backend));
        let sites = sites.collect::<Result<Vec<_>>>()?;
        quantized_block(self.backend, &self.architecture, &weights, &sites, key_mean.as_deref())
    }
}
