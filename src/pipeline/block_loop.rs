/*! The blocks of a run, one after the other: calibrated, quantized or replayed, and sent on to be written. */

use std::ops::Range;
use std::sync::mpsc::SyncSender;

use super::channels::distribution;
use super::division::Division;
use super::energies::Statistics;
use super::exponents::with_exponents;
use super::job::{CalibrationInput, Job};
use super::quantizer::{BlockQuantizer, QuantizedBlock};
use super::strategy::{BlockInput, PassedBlock, PlannedBlock, Strategy, Streams};
use super::timing::Timing;
use super::underflow::check_activations;
use crate::backend::Backend;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::model::AttentionSpecs;
use crate::network::{BlockWeights, Stream, prefetch};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

use super::fallbacks::Fallbacks;

/// A block on its way to the disk.
pub(super) struct FinishedBlock<B: Backend> {
    pub(super) index: usize,
    pub(super) block: QuantizedBlock<B>,
    pub(super) statistics: Statistics,
}

/// What is known once every block is sent.
#[derive(Default)]
pub(super) struct Written {
    /// The plans, complete.
    pub(super) blocks: Vec<BlockPlan>,
    /// `(linear, error)` of every quantized linear.
    pub(super) errors: Vec<(String, f64)>,
    /// How large the channels of each block's sites are.
    pub(super) distributions: Vec<Vec<Vec<f64>>>,
    /// Blocks that an earlier run had finished.
    pub(super) resumed_blocks: usize,
}

/// The block of an index and a plan as an earlier run left it, on the rank that writes.
type Resumed<'a, B> = dyn Fn(usize, &[SitePlan]) -> Result<Option<QuantizedBlock<B>>> + 'a;

/// Who else takes part in a run.
pub(super) struct Surroundings<'a, B: Backend> {
    /// Statistics that are known and not measured again.
    pub(super) known: Option<&'a [Statistics]>,
    /// Whether an earlier run finished a block, which the rank that writes knows.
    pub(super) is_finished: &'a dyn Fn(usize) -> bool,
    /// A block that an earlier run finished.
    pub(super) resumed: &'a Resumed<'a, B>,
    /// Takes blocks to be written, on the rank that writes.
    pub(super) finished: Option<SyncSender<FinishedBlock<B>>>,
    /// What costs accuracy and was not asked for.
    pub(super) fallbacks: &'a Fallbacks,
}

/// Quantizes every block of `job` that is not done.
pub(super) fn quantize_blocks<B: Backend>(
    backend: &B,
    job: &Job<'_>,
    surroundings: Surroundings<'_, B>,
    timing: &mut Timing,
    progress: &dyn Progress,
) -> Result<Written> {
    let CalibrationInput { source, architecture, .. } = &job.input;
    let mut blocks = BlockLoop::new(backend, job, surroundings, timing, progress)?;
    progress.begin("quantize", job.blocks.len());
    let load = |index| BlockWeights::load_all(backend, *source, architecture, index);
    prefetch(0..job.blocks.len(), load, |index, next| {
        let weights = blocks.timing.measure("load", next)?;
        let worst = blocks.pass(index, weights)?;
        backend.trim();
        progress.advance(&worst);
        Ok(())
    })?;
    progress.end();
    progress.check_stop()?;
    Ok(blocks.written)
}

struct BlockLoop<'a, B: Backend> {
    job: &'a Job<'a>,
    quantizer: BlockQuantizer<'a, B>,
    strategy: Strategy,
    surroundings: Surroundings<'a, B>,
    streams: Streams<B>,
    timing: &'a mut Timing,
    written: Written,
}

impl<'a, B: Backend> BlockLoop<'a, B> {
    fn new(
        backend: &'a B,
        job: &'a Job<'a>,
        surroundings: Surroundings<'a, B>,
        timing: &'a mut Timing,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let Job { input, recipe, .. } = job;
        let CalibrationInput { source, architecture, tokens, provenance, .. } = input;
        let seq_len = provenance.seq_len;
        let attention = AttentionSpecs::of(architecture, recipe.kv(), seq_len);
        let full_attention = attention.with_kv(KvFormat::FULL);
        let strategy = Strategy::of(recipe);
        let more_bytes = strategy.more_bytes(architecture, tokens.len());
        let division = Division::new(backend.ranks(), provenance.samples);
        let windows = division.windows(tokens, seq_len);
        let embed = || Stream::embed_chunks(backend, *source, architecture, &windows, more_bytes);
        let needs_source = surroundings.known.is_none() || strategy.needs_source();
        let streams = Streams {
            source: needs_source.then(embed).transpose()?,
            quantized: recipe.gptq.then(embed).transpose()?,
        };
        let quantizer = BlockQuantizer {
            backend,
            architecture,
            recipe,
            attention,
            full_attention,
            tokens: tokens.len(),
            division,
            fallbacks: surroundings.fallbacks,
            progress,
        };
        let written = Written::default();
        Ok(Self { job, quantizer, strategy, surroundings, streams, timing, written })
    }

    /// Takes block `index` and the streams through all that is done to it; says what is worst in it.
    fn pass(&mut self, index: usize, weights: BlockWeights<'_, B>) -> Result<String> {
        let Job { input: CalibrationInput { source, architecture, tokens, .. }, blocks, .. } =
            self.job;
        let Self { quantizer, strategy, surroundings, streams, timing, written, .. } = self;
        let (plan, progress) = (&blocks[index], quantizer.progress);
        let planned = |sites: Range<usize>, statistics: &Statistics| {
            let (plan, energies) = (&plan[sites.clone()], &statistics.energies[sites.clone()]);
            let plan = with_exponents(plan, *source, energies, tokens.len(), progress)?;
            let specs = &architecture.sites(index)[sites];
            let experts = architecture.experts_of(index);
            check_activations(specs, experts, &plan, energies, tokens.len())?;
            Ok(plan)
        };
        let input = BlockInput {
            weights: &weights,
            known: surroundings.known.map(|known| &known[index]),
            planned: &planned,
            is_last: index + 1 == blocks.len(),
        };
        // Known to the rank that writes.
        let is_finished = vec![u8::from((surroundings.is_finished)(index))];
        let is_resumed = quantizer.division.ranks.broadcast(0, is_finished)? == [1];
        let passed = if is_resumed {
            let read = |planned: &PlannedBlock<'_, '_, B>| {
                let PlannedBlock { plan, statistics, .. } = planned;
                let own = (surroundings.resumed)(index, plan)?;
                quantizer.share_resumed(own, plan, &statistics.energies)
            };
            strategy.replay(quantizer, &input, read, streams, timing)?
        } else {
            strategy.quantize(quantizer, &input, streams, timing)?
        };
        let PassedBlock { planned: PlannedBlock { plan, statistics, .. }, block, pending } = passed;
        written.resumed_blocks += usize::from(is_resumed);
        written.errors.extend_from_slice(&block.errors);
        written.blocks.push(plan);
        let energies = &statistics.energies;
        written.distributions.push(energies.iter().map(|site| distribution(site)).collect());
        let worst = worst_of(&block.errors);
        drop(weights);
        if let (false, Some(finished)) = (is_resumed, &surroundings.finished) {
            // It fails if the writing has failed, which is then the error that counts.
            let sent = FinishedBlock { index, block, statistics };
            let sent = timing.measure("write", || finished.send(sent));
            sent.map_err(|_| Error::machine("the checkpoint could not be written"))?;
        }
        if let (Some(stream), Some(block)) = (&mut streams.quantized, pending) {
            let BlockQuantizer { backend, attention, progress, .. } = quantizer;
            timing.measure("propagate", || {
                stream.advance(*backend, attention, &block, || progress.check_stop())?;
                backend.wait()
            })?;
        }
        Ok(worst)
    }
}

fn worst_of(errors: &[(String, f64)]) -> String {
    match errors.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
        None => "unquantized".to_owned(),
        Some((name, error)) => {
            let short = name.rsplit('.').next().unwrap_or(name);
            format!("worst output error {error:.3} ({short})")
        }
    }
}
