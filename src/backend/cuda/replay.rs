/*! Greedy decoding as a CUDA graph: what a step issues is recorded when as many sequences have taken a step before, and replayed
with other tokens, pages and lengths in the same memory. A step of a 7B network is some 300 kernels; issued one by one, they
take the host longer than the device. */

use std::sync::Arc;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::ActivationPart;
use super::Cuda;
use super::decode::{DeviceStep, table_stride};
use super::deferred_errors::Pending;
use super::driver_error::failed;
use super::gpu::{Buffer, Gpu, Scratch, Stream};
use super::kernels::elementwise::Embed;
use super::kernels::reduce::{Argmax, CrossEntropy};
use super::product::Precision;
use super::slice::{In, Out};
use super::tensor::{Activation, Dense, Hidden, Weight};
use crate::backend::{Decode, DecodeStep, GreedyToken};
use crate::{Error, Result};

/// The argmax of rows of logits: negative log-probabilities in f64, `[rows]`, then tokens in u32, `[rows]`.
pub struct DeviceArgmax {
    rows: usize,
    found: Buffer,
}

/// The recorded work of steps of one shape.
#[derive(Default)]
pub struct StepReplay {
    last: Option<Shape>,
    record: Option<Record>,
}

/// What a step's kernels depend on: its sequences, each of which has one new token, and the stride of their tables.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    sequences: usize,
    table_stride: usize,
}

/// Dropped in this order: the graph uses what follows it.
struct Record {
    shape: Shape,
    graph: CudaGraph,
    argmax: DeviceArgmax,
    step: DeviceStep,
    _scratch: Option<Scratch>,
    errors: RecordedErrors,
}

// SAFETY: a graph is a handle of the driver, whose calls may come from any thread; this is its only owner, and it is launched
// through a unique reference.
unsafe impl Send for Record {}

/// The deferred errors of kernels that are recorded.
struct RecordedErrors {
    gpu: Arc<Gpu>,
    flags: Vec<Pending>,
}

impl Drop for RecordedErrors {
    fn drop(&mut self) {
        // A failure means that the device is lost, or was reported by the step that it belongs to.
        let _ = self.gpu.wait(Stream::Main);
        let _ = self.gpu.deferred().settle(std::mem::take(&mut self.flags));
    }
}

impl Shape {
    /// None where a sequence has several new tokens.
    fn of(step: &DecodeStep) -> Option<Self> {
        let single = step.sequences.iter().all(|sequence| sequence.added == 1);
        single.then(|| Self { sequences: step.sequences.len(), table_stride: table_stride(step) })
    }
}

impl Cuda {
    /// The rows of `table` that `count` tokens on the device name.
    pub(super) fn embed_ids(
        &self,
        table: &Weight,
        tokens: &Buffer,
        count: usize,
    ) -> Result<Hidden> {
        let y = self.gpu.alloc(4 * count * table.columns)?;
        self.kernels.launch(&Embed {
            table: (&*table.data).into(),
            tokens: tokens.into(),
            hidden: table.columns,
            y: (&y).into(),
            element: table.element(),
            vocabulary: table.rows,
            count,
        })?;
        Ok(Hidden::new(count, table.columns, y))
    }

    /// The argmax of the logits of `x`.
    pub(super) fn row_argmax(&self, x: &Activation, head: &Dense) -> Result<DeviceArgmax> {
        let (rows, vocabulary) = (x.rows, head.rows);
        let logits = self.gpu.alloc(4 * rows * vocabulary)?;
        self.multiply(ActivationPart::all(x), head, &logits, Precision::HalfToFloat, false)?;
        let found = self.gpu.alloc(12 * rows)?;
        // Tokens follow the numbers of 8 bytes.
        self.kernels.launch(&Argmax {
            logits: (&logits).into(),
            vocabulary,
            tokens: Out::from(&found).skip(2 * rows),
            rows,
        })?;
        self.kernels.launch(&CrossEntropy {
            logits: (&logits).into(),
            targets: In::from(&found).skip(2 * rows),
            vocabulary,
            nats: (&found).into(),
            rows,
        })?;
        Ok(DeviceArgmax { rows, found })
    }

    /// [`Decode::greedy_step`](crate::backend::Decode::greedy_step).
    pub(super) fn replayed(
        &self,
        replay: &mut StepReplay,
        step: &DecodeStep,
        tokens: &[u32],
        work: &mut dyn FnMut(&DeviceStep) -> Result<DeviceArgmax>,
    ) -> Result<Vec<GreedyToken>> {
        let shape = Shape::of(step);
        let repeats = shape.is_some() && shape == replay.last && !self.gpu.is_traced();
        replay.last = shape;
        let Some(shape) = shape.filter(|_| repeats) else {
            return tokens_of(&work(&self.begin_step(step, tokens)?)?);
        };
        let record = match &replay.record {
            Some(record) if record.shape == shape => {
                record.step.rewrite(step, tokens)?;
                record
            }
            _ => {
                replay.record = None;
                replay.record.insert(self.record(shape, self.begin_step(step, tokens)?, work)?)
            }
        };
        record.graph.launch().map_err(|error| failed("a graph of decoding", error))?;
        let found = tokens_of(&record.argmax);
        self.gpu.deferred().check(&record.errors.flags)?;
        found
    }

    /// Records the work of a step, which has run before: kernels are compiled and products planned.
    fn record(
        &self,
        shape: Shape,
        step: DeviceStep,
        work: &mut dyn FnMut(&DeviceStep) -> Result<DeviceArgmax>,
    ) -> Result<Record> {
        let failed = |error| failed("recording a step", error);
        self.gpu.begin_recording();
        let recorded = (|| {
            // Leaves the buffers that the record needs in the scratch memory.
            drop(work(&step)?);
            self.gpu.wait(Stream::Main)?;
            let stream = self.gpu.main();
            stream
                .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                .map_err(failed)?;
            let argmax = work(&step);
            let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failed);
            let (argmax, graph) = (argmax?, graph?);
            let graph =
                graph.ok_or_else(|| Error::machine("the driver recorded no work of a step"))?;
            Ok::<_, Error>((argmax, graph))
        })();
        let scratch = self.gpu.end_recording();
        let flags = self.gpu.deferred().take();
        let errors = RecordedErrors { gpu: Arc::clone(&self.gpu), flags };
        let (argmax, graph) = recorded?;
        Ok(Record { shape, graph, argmax, step, _scratch: scratch, errors })
    }
}

/// The tokens, after all work of the main stream so far.
fn tokens_of(argmax: &DeviceArgmax) -> Result<Vec<GreedyToken>> {
    let rows = argmax.rows;
    let words = argmax.found.download::<u32>(0..12 * rows)?;
    let (nats, tokens) = words.split_at(2 * rows);
    let nats = nats
        .chunks_exact(2)
        .map(|pair| f64::from_bits(u64::from(pair[1]) << 32 | u64::from(pair[0])));
    let token = |(nats, token): (f64, &u32)| GreedyToken { token: *token, log_probability: -nats };
    Ok(nats.zip(tokens).map(token).collect())
}
