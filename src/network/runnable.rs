/*! A model that can run, of either kind of checkpoint. Each block is read while the one before it is computed. */

use super::accounting::network;
use super::blocks::BlockBuilder;
use super::memory::{self, NetworkBytes, Windows, Workspace};
use super::model::Model;
use super::stored::{QuantizedSite, check_codebook, read_key_mean, read_sites};
use super::weights::BlockWeights;
use crate::backend::Backend;
use crate::checkpoint::plan::BlockPlan;
use crate::checkpoint::{AtomCheckpoint, Manifest, Source, Tensors};
use crate::model::block::Block;
use crate::model::{Architecture, read_manifest};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::{Error, Result};

/// A model on a backend: a source in full precision, an Atom checkpoint on the integer path.
pub struct Runnable<'a, B: Backend> {
    /// Where it runs.
    pub backend: &'a B,
    /// Its name.
    pub name: &'a str,
    /// Its tensors by name.
    pub tensors: &'a dyn Tensors,
    /// Its network.
    pub architecture: Architecture,
    /// How keys and values are held.
    pub kv: KvFormat,
    kind: ModelKind<'a>,
}

enum ModelKind<'a> {
    Source,
    Atom(&'a AtomCheckpoint, Vec<BlockPlan>),
}

/// A block as it was read.
pub struct LoadedBlock<'a, B: Backend> {
    /// The unquantized tensors.
    pub weights: BlockWeights<'a, B>,
    /// The quantized sites; none in a source.
    pub stored: Option<StoredBlock>,
}

/// A quantized block as a checkpoint holds it.
pub struct StoredBlock {
    /// Its sites, in the order of the plan.
    pub sites: Vec<QuantizedSite<QuantizedLinear>>,
    /// Its mean keys, where the cache is centred.
    pub key_mean: Option<Vec<f32>>,
}

impl<'a, B: Backend> Runnable<'a, B> {
    /// A model of either kind.
    pub fn new(backend: &'a B, model: &'a Model, progress: &dyn Progress) -> Result<Self> {
        match model {
            Model::Source(source) => Self::source(backend, source, progress),
            Model::Atom(checkpoint) => Self::atom(backend, checkpoint),
        }
    }

    /// A source in full precision.
    pub fn source(backend: &'a B, source: &'a Source, progress: &dyn Progress) -> Result<Self> {
        Ok(Self {
            backend,
            name: source.name(),
            tensors: source,
            architecture: network(source, progress)?.architecture,
            kv: KvFormat::FULL,
            kind: ModelKind::Source,
        })
    }

    /// A checkpoint on the integer path.
    pub fn atom(backend: &'a B, checkpoint: &'a AtomCheckpoint) -> Result<Self> {
        let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
        check_files(checkpoint)?;
        let Manifest { kv, blocks, .. } = read_manifest(checkpoint, &architecture)?;
        check_codebook(backend, &blocks)?;
        Ok(Self {
            backend,
            name: checkpoint.name(),
            tensors: checkpoint,
            architecture,
            kv,
            kind: ModelKind::Atom(checkpoint, blocks),
        })
    }

    /// Compares the memory of an evaluation with what the machine has, before it begins.
    ///
    /// # Errors
    /// A machine error with both numbers.
    pub fn check_memory(&self, windows: Windows, progress: &dyn Progress) -> Result<()> {
        let network = NetworkBytes {
            architecture: &self.architecture,
            workspace: Workspace::of(self.backend),
        };
        let bytes = match &self.kind {
            ModelKind::Atom(_, blocks) => {
                network.quantized_evaluation(self.tensors, blocks, windows)
            }
            ModelKind::Source => network.source_evaluation(self.tensors, windows),
        };
        memory::check(bytes, progress)
    }

    /// Compares the memory of decoding with what the machine has: all blocks resident, `tokens` of sequences of up to
    /// `longest` in a step, and `cache` bytes of keys and values.
    ///
    /// # Errors
    /// A machine error with both numbers.
    pub fn check_decoding_memory(
        &self,
        [tokens, longest]: [usize; 2],
        cache: u64,
        progress: &dyn Progress,
    ) -> Result<()> {
        const HINT: &str = "give a shorter prompt, fewer --max-new-tokens or fewer --threads, or take a machine with \
                            more memory";
        let network = NetworkBytes {
            architecture: &self.architecture,
            workspace: Workspace::of(self.backend),
        };
        let bytes = match &self.kind {
            ModelKind::Atom(_, blocks) => {
                network.quantized_decoding(self.tensors, blocks, tokens, longest)
            }
            ModelKind::Source => network.source_decoding(self.tensors, tokens, longest),
        };
        let cache = if B::ON_HOST { cache } else { 0 };
        memory::check_or(bytes + cache, HINT, progress)
    }

    /// Reads block `index`. Safe to call from another thread than the one that computes.
    pub fn load(&self, index: usize) -> Result<LoadedBlock<'a, B>> {
        let Self { backend, tensors, architecture, .. } = self;
        let ModelKind::Atom(checkpoint, blocks) = &self.kind else {
            let weights = BlockWeights::load_all(*backend, *tensors, architecture, index)?;
            return Ok(LoadedBlock { weights, stored: None });
        };
        let plan = &blocks[index];
        let read = || {
            let unquantized = |site: usize, linear: usize| plan[site].linears[linear].bits == 16;
            let weights = BlockWeights::load(*backend, *tensors, architecture, index, unquantized)?;
            let key_mean = read_key_mean(*checkpoint, architecture, index, &self.kv)?;
            let sites = read_sites(*checkpoint, plan)?;
            Ok(LoadedBlock { weights, stored: Some(StoredBlock { sites, key_mean }) })
        };
        read().map_err(|error: Error| {
            error.context(format!("block {index} of {} cannot be read", checkpoint.title()))
        })
    }

    /// Builds a block that can run.
    pub fn block(&self, loaded: LoadedBlock<'a, B>) -> Result<Block<B>> {
        let LoadedBlock { weights, stored } = loaded;
        let builder = BlockBuilder::new(self.backend, &self.architecture, &weights);
        let Some(StoredBlock { sites, key_mean }) = stored else { return builder.source() };
        let sites = sites.into_iter().map(|site| site.restore(self.backend));
        let sites = sites.collect::<Result<Vec<_>>>()?;
        builder.with_key_mean(key_mean.as_deref()).quantized(&sites)
    }
}

/// Refuses a checkpoint whose configuration, tokenizer or manifest has changed: it would be another model.
fn check_files(checkpoint: &AtomCheckpoint) -> Result<()> {
    checkpoint.covered_files().into_iter().try_for_each(|name| {
        checkpoint.verify_file(name).map_err(|error| {
            let hint = error.hint_text().unwrap_or_default().to_owned();
            Error::input(error.to_string()).hint(hint)
        })
    })
}
