/*! `atom bench serve`: tokens a second of a network in several formats at a fixed memory.

One process, one scheduler, one sampler: only linears and cache differ from row to row. Weights are random, outputs are as
long as the workload says. Each row is run at its own batch, the largest that the memory allows, and at a batch that is
equal for all, so that what the batch gains and what the arithmetic gains are told apart. */

mod network;
mod outcome;
mod timing;
mod workload;

pub use network::{NetworkShape, RowKind};
pub use outcome::{ServeOutcome, ServeRow, StepTime};
use workload::Lengths;
pub use workload::Workload;

use super::device::Timer;
use super::median;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Decode};
use crate::network::Decoder;
use crate::progress::Progress;
use crate::serve::{Limits, Scheduler};
use crate::{Error, Result, units};
use network::NetworkValues;

/// Tokens in a step at most.
const STEP_TOKENS: usize = 4096;
/// Cached tokens of the sequences whose steps are timed.
const STEP_CONTEXT: usize = 1024;
/// The largest batch: attention has a block of a grid's last dimension for each sequence.
const MOST_SEQUENCES: usize = 1 << 15;
/// Bytes that are read to find out what the device reads a second.
const READ_BYTES: usize = 1 << 30;

/// How many sequences run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// The largest power of two that fits (the reference's rule).
    Auto,
    /// As many as fit.
    Max,
    /// So many.
    Of(usize),
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// The network.
    pub shape: NetworkShape,
    /// The requests.
    pub workload: Workload,
    /// Device memory that a row has to fit into at its own batch.
    pub memory: u64,
    /// The batch of each row.
    pub batch: Batch,
    /// A batch for all rows, in addition to their own.
    pub equal_batch: Option<usize>,
    /// Batches whose steps are timed, each with 1024 cached tokens a sequence.
    pub steps: Vec<usize>,
    /// Rows, the one first that others are compared with.
    pub rows: Vec<RowKind>,
    /// Runs of each row that the median is taken of.
    pub repeats: usize,
}

/// What a device says of its memory.
pub trait Device {
    /// Bytes in use, and at most; none where weights and cache lie in the host's memory.
    fn memory(&self) -> Option<(u64, u64)>;
    /// Bounds what may be in use.
    fn bound(&self, bytes: u64);
    /// Has the peak begin again.
    fn restart_peak(&self);
    /// Bytes a second of a plain read, where that can be measured.
    fn read_rate(&self) -> Result<Option<f64>>;
}

impl Device for Cpu {
    fn memory(&self) -> Option<(u64, u64)> {
        None
    }

    fn bound(&self, _bytes: u64) {}

    fn restart_peak(&self) {}

    fn read_rate(&self) -> Result<Option<f64>> {
        Ok(None)
    }
}

impl Device for Cuda {
    fn memory(&self) -> Option<(u64, u64)> {
        Some((self.gpu().used_bytes(), self.gpu().limit_bytes()))
    }

    fn bound(&self, bytes: u64) {
        self.gpu().bound(bytes);
    }

    fn restart_peak(&self) {
        self.gpu().restart_peak();
    }

    fn read_rate(&self) -> Result<Option<f64>> {
        let seconds = Timer { cuda: self }.read(READ_BYTES)?;
        Ok(Some(READ_BYTES as f64 / seconds))
    }
}

/// Measures all rows.
///
/// # Errors
/// A usage error where formats or batches do not fit; the device's.
pub fn serve<B: Backend + Decode + Device>(
    backend: &B,
    settings: &ServeSettings,
    progress: &dyn Progress,
) -> Result<ServeOutcome> {
    let ServeSettings { shape, workload, .. } = settings;
    shape.check()?;
    if backend.memory().is_none() && !matches!(settings.batch, Batch::Of(_)) {
        return Err(Error::usage("on the CPU the batch does not follow from the memory")
            .hint("give --batch a number"));
    }
    let read_rate = backend.read_rate()?;
    let all_memory = backend.memory().map(|(_, limit)| limit);
    if let Some(free) = all_memory.filter(|free| *free < settings.memory) {
        let [memory, free] = [settings.memory, free].map(units::bytes);
        return Err(Error::machine(format!("{memory} were to be used, and {free} are free"))
            .hint("give less --memory, or end what else uses the GPU"));
    }
    let mut outcome = ServeOutcome {
        shape: shape.name.clone(),
        device: backend.device(),
        workload: workload.name.clone(),
        memory_bytes: all_memory.map(|_| settings.memory),
        read_rate,
        own: Vec::new(),
        equal: Vec::new(),
        steps: Vec::new(),
    };
    progress.info(&format!("making random weights of {}", shape.name));
    let values = NetworkValues::new(&shape.architecture);
    for kind in &settings.rows {
        backend.trim();
        let before = backend.memory().map_or(0, |(used, _)| used);
        let decoder = values.decoder(backend, shape, *kind, progress)?;
        let weight_bytes = backend.memory().map(|(used, _)| used - before);
        let network = Network { decoder: &decoder, kind: *kind, weight_bytes, settings, progress };
        backend.bound(settings.memory);
        let batch = network.batch()?;
        outcome.own.push(network.row(batch)?);
        backend.trim();
        // The same batch may need more: what the arithmetic gains is another question than what fits.
        backend.bound(all_memory.unwrap_or(0));
        if let Some(batch) = settings.equal_batch {
            outcome.equal.push(network.row(batch)?);
        }
        let steps = settings.steps.iter().map(|batch| network.step(*batch, read_rate));
        outcome.steps.push((*kind, steps.collect::<Result<_>>()?));
    }
    outcome.compare();
    Ok(outcome)
}

/// One row's network.
struct Network<'n, 'm, B: Backend + Decode> {
    decoder: &'n Decoder<'m, B>,
    kind: RowKind,
    weight_bytes: Option<u64>,
    settings: &'n ServeSettings,
    progress: &'n dyn Progress,
}

impl<B: Backend + Decode + Device> Network<'_, '_, B> {
    /// Its own batch.
    fn batch(&self) -> Result<usize> {
        let Some((used, limit)) = self.decoder.backend().memory() else {
            let Batch::Of(batch) = self.settings.batch else {
                unreachable!("checked before the first network")
            };
            return Ok(batch);
        };
        let longest = self.settings.workload.longest();
        let each = self.pages(longest) as u64 * self.decoder.page_bytes()?;
        let left = limit.saturating_sub(used);
        let fits = |batch: usize| batch as u64 * each + self.working_bytes(batch) <= left;
        let largest = (1..=MOST_SEQUENCES).take_while(|batch| fits(*batch)).last().unwrap_or(0);
        let wanted = match self.settings.batch {
            Batch::Auto if largest > 0 => 1 << largest.ilog2(),
            Batch::Auto | Batch::Max => largest,
            Batch::Of(batch) => batch,
        };
        if wanted == 0 || wanted > largest {
            let what = format!(
                "{} has room for {largest} sequences of {longest} tokens: weights take {used} bytes of {limit}, a sequence {each}",
                self.kind.name()
            );
            return Err(Error::usage(what).hint("give more --memory, or a smaller --batch"));
        }
        Ok(wanted)
    }

    fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.decoder.backend().page_tokens())
    }

    /// An upper bound of what a step's activations take: those of the widest step issued, and of a recorded one.
    fn working_bytes(&self, batch: usize) -> u64 {
        let architecture = &self.settings.shape.architecture;
        let heads = architecture.heads + 2 * architecture.kv_heads;
        let token = 12 * architecture.hidden
            + 4 * heads * architecture.head_dim
            + 8 * architecture.intermediate;
        let logits = 2 * batch * 4 * architecture.vocabulary;
        ((STEP_TOKENS + batch) * token + logits) as u64
    }

    fn limits(&self, batch: usize, longest: usize) -> Limits {
        Limits { batch, step_tokens: STEP_TOKENS, longest, pages: batch * self.pages(longest) }
    }

    /// Serves the workload.
    fn row(&self, batch: usize) -> Result<ServeRow> {
        let Self { decoder, kind, settings, progress, .. } = self;
        let ServeSettings { workload, repeats, shape, .. } = settings;
        let backend = decoder.backend();
        let requests = workload.requests(batch);
        let vocabulary = shape.architecture.vocabulary;
        backend.restart_peak();
        let mut scheduler = Scheduler::new(decoder, self.limits(batch, workload.longest()))?;
        let mut runs = Vec::new();
        for _ in 0..*repeats {
            progress.begin(&format!("serve {} x {batch}", kind.name()), requests.len());
            runs.push(timing::run(
                &mut scheduler,
                &requests,
                workload.policy,
                (batch, vocabulary),
                *progress,
            )?);
            progress.end();
        }
        let all_tokens_per_second: Vec<f64> =
            runs.iter().map(|run| run.total_tokens_per_second).collect();
        let middle = median(&mut all_tokens_per_second.clone());
        let run = runs.into_iter().find(|run| run.total_tokens_per_second == middle);
        let run = run.expect("the median is one of an odd number of runs, or the lower of two");
        let page_tokens = backend.page_tokens() as u64;
        Ok(ServeRow {
            row: *kind,
            batch,
            run,
            all_tokens_per_second,
            speedup: 1.0,
            peak_bytes: backend.peak_bytes(),
            weight_bytes: self.weight_bytes,
            token_bytes: decoder.page_bytes()? / page_tokens,
        })
    }

    /// Times steps.
    fn step(&self, batch: usize, read_rate: Option<f64>) -> Result<StepTime> {
        let Self { decoder, kind, settings, progress, .. } = self;
        progress.info(&format!("timing steps of {} x {batch}", kind.name()));
        let architecture = &settings.shape.architecture;
        let output = timing::step_outputs(batch, STEP_CONTEXT, STEP_TOKENS);
        let lengths = Lengths { prompt: STEP_CONTEXT, output };
        let longest = lengths.prompt + lengths.output;
        let mut scheduler = Scheduler::new(decoder, self.limits(batch, longest))?;
        let counts = (batch, lengths, architecture.vocabulary);
        let timed = timing::steps(&mut scheduler, counts, *progress)?;
        let ms = median(&mut timed.clone());
        // The embedding is not read: as many of its rows as the batch has sequences.
        let embedding = (2 * architecture.vocabulary * architecture.hidden) as u64;
        let cache = batch as u64 * self.pages(STEP_CONTEXT) as u64 * decoder.page_bytes()?;
        let bytes = self.weight_bytes.map(|weights| weights.saturating_sub(embedding) + cache);
        let floor = bytes.zip(read_rate).map(|(bytes, rate)| 1e3 * bytes as f64 / rate);
        Ok(StepTime {
            batch,
            context: STEP_CONTEXT,
            ms,
            bytes,
            share_of_floor: floor.map(|floor| floor / ms),
            speedup: None,
        })
    }
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
