/*! Training by distillation, end to end: the scales, norms and clip ratios of a finished checkpoint move so that its predictions
come closer to its source's (docs/distillation.md).

The source runs first, block by block, and its last hidden states are kept; then the checkpoint is trained, all of its codes
on the backend. Windows that are held back choose the step that is kept. Codes, orders and every byte count stay. */

mod adam;
mod memory;
mod parameters;
mod reference;
mod state;
#[cfg(test)]
mod tests;
mod training;
mod windows;
mod writing;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use self::parameters::{NetworkValues, Parameters};
use self::reference::Reference;
use self::state::TrainingState;
use self::training::{Course, RATES, Training};
use self::windows::Division;
use self::writing::Writing;
use super::job::CalibrationInput;
use super::output::Output;
use super::prepare::Draw;
use crate::backend::Train;
use crate::card::{Card, Form, SourceCard};
use crate::checkpoint::plan::BlockPlan;
use crate::checkpoint::{
    AtomCheckpoint, CARD, DistillationRates, DistillationRecord, DistilledStep, Dtype, Manifest,
    Options, Provenance, SideFile, Source, Writer,
};
use crate::machine::peak_rss_bytes;
use crate::model::sites::FINAL_NORM;
use crate::model::{Architecture, read_manifest};
use crate::network::{Runnable, TrainedNetwork, network};
use crate::progress::Progress;
use crate::text::TextSet;
use crate::{Error, Kind, Result};

/// Tokens that are trained on unless told otherwise.
pub const DEFAULT_TOKENS: usize = 100 * TOKENS_PER_STEP;
/// Tokens of a step at least; a window may be longer.
const TOKENS_PER_STEP: usize = 8192;

/// What is trained, by what, and where the result goes.
pub struct Distillation<'a> {
    /// The checkpoint.
    pub checkpoint: &'a AtomCheckpoint,
    /// What it was made from.
    pub source: &'a Source,
    /// The text that windows are drawn from.
    pub text: &'a TextSet,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Tokens that are trained on, those of repeated windows counted again.
    pub tokens: usize,
    /// Seed of the draw and of the windows' order.
    pub seed: u64,
    /// Where the distilled checkpoint goes.
    pub output: &'a Output,
    /// Whether a checkpoint that gained nothing is written all the same, as it was.
    pub always_writes: bool,
}

/// The result of `atom distill`.
#[derive(Clone, Debug, Serialize)]
pub struct DistillOutcome {
    /// The directory that was written; none if nothing was gained.
    pub out: Option<PathBuf>,
    /// The checkpoint's name.
    pub model: String,
    /// Values that were trained.
    pub parameters: usize,
    /// Steps.
    pub steps: usize,
    /// Windows of a step.
    pub windows_per_step: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows that were trained on.
    pub windows: usize,
    /// Windows that were held back.
    pub held_out_windows: usize,
    /// Mean divergence of the held-out tokens before training, in nats.
    pub before: f64,
    /// The same with the values that were kept.
    pub after: f64,
    /// The step that they are of; 0 if nothing was gained.
    pub kept_step: usize,
    /// All measurements.
    pub curve: Vec<DistilledStep>,
    /// Steps that a run before had made.
    pub resumed_steps: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Highest device memory; none on the CPU.
    pub peak_gpu_bytes: Option<u64>,
    /// What it ran on.
    pub device: String,
}

/// What `atom distill --dry-run` found.
#[derive(Clone, Debug, Serialize)]
pub struct DistillDryRun {
    /// Where the checkpoint would go.
    pub out: PathBuf,
    /// The checkpoint's name.
    pub model: String,
    /// Steps.
    pub steps: usize,
    /// Windows of a step.
    pub windows_per_step: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows that would be trained on.
    pub windows: usize,
    /// Windows that would be held back.
    pub held_out_windows: usize,
    /// Memory that the run would need at its peak, estimated.
    pub memory_bytes: u64,
    /// Bytes of disk that the run would still reserve.
    pub needed_disk_bytes: u64,
    /// Whether an unfinished run of the same job would be continued.
    pub resumes: bool,
}

/// What decides the bytes of a distilled checkpoint.
#[derive(Serialize)]
struct Identity<'a> {
    tool_version: &'static str,
    checkpoint: String,
    source: String,
    text: &'a Provenance,
    steps: usize,
    windows_per_step: usize,
    rates: DistillationRates,
    always_writes: bool,
    device: String,
}

/// Everything that was checked and drawn before the work.
struct Prepared<'a> {
    distillation: &'a Distillation<'a>,
    architecture: Architecture,
    manifest: Manifest,
    input: CalibrationInput<'a>,
    division: Division,
    course: Course,
    norm_type: Dtype,
}

/// Trains a checkpoint.
pub fn distill<B: Train>(
    backend: &B,
    distillation: &Distillation<'_>,
    progress: &dyn Progress,
) -> Result<DistillOutcome> {
    let start = Instant::now();
    let prepared = Prepared::new(backend, distillation, progress)?;
    let model = Runnable::atom(backend, distillation.checkpoint)?;
    let writing = prepared.writing(&prepared.manifest.blocks, None, progress);
    let (specs, identity) = (writing.specs()?, prepared.identity(backend)?);
    let destination = prepared.destination();
    let check_stop = || progress.check_stop();
    let options = prepared.options()?;
    let mut writer = Writer::create(&destination, specs, &identity, options, &check_stop)?;
    let trained = prepared.train(backend, &model, &mut writer, progress);
    let (parameters, state, resumed_steps) = match trained {
        Ok(trained) => trained,
        Err(error) => {
            if writer.state()?.is_none() {
                writer.discard();
            } else if error.kind() != Kind::Interrupted {
                progress.info("the steps that were made are kept; the same command goes on");
            }
            return Err(error);
        }
    };
    distillation.source.check_unchanged()?;
    distillation.checkpoint.check_unchanged()?;
    let record = prepared.record(&state, parameters.count());
    let improved = record.kept_step > 0;
    let (before, after, kept_step) = (record.before, record.after, record.kept_step);
    let mut out = None;
    if improved || distillation.always_writes {
        out = Some(writer.out().to_owned());
        let values = improved.then(|| parameters.values(&state.best));
        prepared.write(writer, values.as_ref(), record, progress)?;
    } else {
        writer.discard();
    }
    let Course { steps, per_step, seq_len, .. } = prepared.course;
    Ok(DistillOutcome {
        out,
        model: distillation.checkpoint.name().to_owned(),
        parameters: parameters.count(),
        steps,
        windows_per_step: per_step,
        seq_len,
        windows: prepared.division.trained.len(),
        held_out_windows: prepared.division.held.len(),
        before,
        after,
        kept_step,
        curve: state.measured.curve,
        resumed_steps,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes(),
        peak_gpu_bytes: backend.peak_bytes(),
        device: backend.device(),
    })
}

/// Everything `distill` would find out before its first product.
pub fn distill_dry_run<B: Train>(
    backend: &B,
    distillation: &Distillation<'_>,
    progress: &dyn Progress,
) -> Result<DistillDryRun> {
    let prepared = Prepared::new(backend, distillation, progress)?;
    Runnable::atom(backend, distillation.checkpoint)?;
    let specs = prepared.writing(&prepared.manifest.blocks, None, progress).specs()?;
    let destination = prepared.destination();
    let identity = prepared.identity(backend)?;
    let found = Writer::preview(&destination, specs, &identity, prepared.options()?)?;
    let Course { steps, per_step, seq_len, .. } = prepared.course;
    Ok(DistillDryRun {
        out: found.out,
        model: distillation.checkpoint.name().to_owned(),
        steps,
        windows_per_step: per_step,
        seq_len,
        windows: prepared.division.trained.len(),
        held_out_windows: prepared.division.held.len(),
        memory_bytes: prepared.memory_bytes(backend),
        needed_disk_bytes: found.needed_bytes,
        resumes: found.needed_bytes == 0,
    })
}

/// The steps of a training on so many tokens, and the windows of each.
///
/// # Errors
/// Usage: there are fewer tokens than a step has.
pub fn course_of(tokens: usize, seq_len: usize) -> Result<(usize, usize)> {
    let per_step = TOKENS_PER_STEP.div_ceil(seq_len);
    match tokens / (per_step * seq_len) {
        0 => Err(Error::usage(format!(
            "{tokens} tokens are less than a step of distillation, which has {}",
            per_step * seq_len
        ))
        .hint(format!("give {DEFAULT_TOKENS}, or leave the number out"))),
        steps => Ok((steps, per_step)),
    }
}

/// Refuses what cannot be trained.
///
/// # Errors
/// Input: the network has experts.
pub fn check_trainable(architecture: &Architecture) -> Result<()> {
    match &architecture.experts {
        None => Ok(()),
        Some(experts) => Err(Error::input(format!(
            "distillation trains no network with experts, and this one has {} in a block",
            experts.count
        ))
        .hint("leave --distill out: the checkpoint is complete without it")),
    }
}

impl<'a> Prepared<'a> {
    /// Checks what can be checked in seconds, and draws the windows.
    fn new<B: Train>(
        backend: &B,
        distillation: &'a Distillation<'a>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Distillation { checkpoint, source, text, seq_len, tokens, seed, .. } = *distillation;
        let (steps, per_step) = course_of(tokens, seq_len)?;
        let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
        check_trainable(&architecture)?;
        let manifest = read_manifest(checkpoint, &architecture)?;
        check_source(checkpoint, &manifest, source)?;
        let norm_type = norm_type(checkpoint, &architecture)?;
        // Nothing is tokenized for an output that cannot be.
        distillation.output.protecting(source, checkpoint.dir()).check()?;
        let wanted = steps * per_step;
        let samples = wanted + windows::held_of(wanted);
        let draw = Draw { text, samples, seq_len, seed };
        let input = draw.input(source, network(source, progress)?, progress)?;
        input.check_tensors()?;
        let division = Division::of(&input.tokens, seq_len);
        if division.trained.is_empty() {
            return Err(Error::input(format!(
                "{} holds too few windows of {seq_len} tokens to hold one back and train on others",
                text.name
            ))
            .hint("give more text with --calib, or a shorter --seq-len"));
        }
        let course = Course { steps, per_step, seq_len, seed };
        let prepared =
            Self { distillation, architecture, manifest, input, division, course, norm_type };
        backend.trim();
        crate::network::memory::check(prepared.memory_bytes(backend), progress)?;
        Ok(prepared)
    }

    fn memory_bytes<B: Train>(&self, backend: &B) -> u64 {
        memory::distill_bytes(
            backend,
            &self.architecture,
            &self.manifest.blocks,
            self.input.tokens.len(),
            self.course,
        )
    }

    fn destination(&self) -> crate::checkpoint::Destination {
        let Distillation { checkpoint, source, output, .. } = self.distillation;
        output.protecting(source, checkpoint.dir())
    }

    fn options(&self) -> Result<Options> {
        let Distillation { checkpoint, output, .. } = self.distillation;
        let side_bytes = checkpoint.side_files()?.copied.iter().map(SideFile::bytes).sum();
        Ok(Options { resume: output.resume, side_bytes, ..Options::default() })
    }

    fn identity<B: Train>(&self, backend: &B) -> Result<Value> {
        let Distillation { checkpoint, source, always_writes, .. } = self.distillation;
        let identity = Identity {
            tool_version: env!("CARGO_PKG_VERSION"),
            checkpoint: checkpoint.fingerprint()?,
            source: source.fingerprint()?,
            text: &self.input.provenance,
            steps: self.course.steps,
            windows_per_step: self.course.per_step,
            rates: RATES,
            always_writes: *always_writes,
            // Thread counts and instruction sets change no byte; another kind of device does.
            device: if B::ON_HOST { "cpu".to_owned() } else { backend.device() },
        };
        Ok(serde_json::to_value(identity).expect("an identity has only JSON types"))
    }

    fn writing<'w>(
        &'w self,
        blocks: &'w [BlockPlan],
        values: Option<&'w NetworkValues>,
        progress: &'w dyn Progress,
    ) -> Writing<'w> {
        Writing {
            checkpoint: self.distillation.checkpoint,
            architecture: &self.architecture,
            blocks,
            kv: &self.manifest.kv,
            values,
            progress,
        }
    }

    /// Trains, or goes on with what a run before has trained. Returns how many steps that had made.
    fn train<B: Train>(
        &self,
        backend: &B,
        model: &Runnable<'_, B>,
        writer: &mut Writer,
        progress: &dyn Progress,
    ) -> Result<(Parameters, TrainingState, usize)> {
        let Course { steps, seq_len, .. } = self.course;
        let (tokens, source) = (&self.input.tokens, self.distillation.source);
        let (loaded, blocks, final_norm) = TrainedNetwork::load(model, seq_len)?;
        let parameters = Parameters::new(NetworkValues { blocks, final_norm }, self.norm_type);
        let kept = writer.state()?;
        let kept = kept.and_then(|bytes| TrainingState::from_bytes(&bytes, parameters.count()));
        let resumed = kept.as_ref().map_or(0, |state| state.measured.steps);
        let mut state = kept.unwrap_or_else(|| TrainingState::new(parameters.count()));
        if resumed > 0 {
            progress.info(&format!("continuing after step {resumed} of {steps}"));
        }
        let is_complete = state.measured.curve.last().is_some_and(|point| point.step == steps);
        if !is_complete {
            // Weights and states of the source are not there together with those of the checkpoint.
            drop(loaded);
            let reference = Reference::measure(backend, source, tokens, seq_len, progress)?;
            let (network, ..) = TrainedNetwork::load(model, seq_len)?;
            let mut training = Training {
                backend,
                network,
                parameters: &parameters,
                reference: &reference,
                tokens,
                division: &self.division,
                course: self.course,
                progress,
            };
            training.run(&mut state, |state| writer.save_state(&state.to_bytes()))?;
        }
        Ok((parameters, state, resumed))
    }

    /// What was trained and gained.
    fn record(&self, state: &TrainingState, parameters: usize) -> DistillationRecord {
        let curve = state.measured.curve.clone();
        let before = curve[0].held_out;
        let best =
            curve.iter().fold(
                curve[0],
                |best, point| {
                    if point.held_out < best.held_out { *point } else { best }
                },
            );
        DistillationRecord {
            text: self.input.provenance.clone(),
            steps: self.course.steps,
            windows_per_step: self.course.per_step,
            held_out_windows: self.division.held.len(),
            rates: RATES,
            parameters,
            kept_step: best.step,
            before,
            after: best.held_out,
            curve,
        }
    }

    /// Writes the checkpoint with trained values, or as it was.
    fn write(
        &self,
        mut writer: Writer,
        values: Option<&NetworkValues>,
        record: DistillationRecord,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Distillation { checkpoint, source, .. } = self.distillation;
        let mut manifest = self.manifest.clone();
        if let Some(values) = values {
            for (plans, values) in manifest.blocks.iter_mut().zip(&values.blocks) {
                for (plan, values) in plans.iter_mut().zip(&values.sites) {
                    plan.clip = values.clip.unwrap_or(plan.clip);
                }
            }
            manifest.distillation = Some(record);
        }
        let writing = self.writing(&self.manifest.blocks, values, progress);
        writing.write(&mut writer)?;
        let side_files = checkpoint.side_files()?;
        side_files.left_out.iter().for_each(|why| progress.warn(why));
        let mut side_files = side_files.copied;
        side_files.retain(|file| file.name != CARD);
        let form = Form::atom(&manifest);
        let source = &SourceCard::of(source.readme(), progress);
        let bytes = checkpoint.total_bytes();
        let card = Card { manifest: &manifest, source, bytes, perplexities: &[], form: &form };
        side_files.push(card.file());
        writer.finish(checkpoint.config(), &manifest, &side_files).map(drop)
    }
}

/// Refuses a source that the checkpoint was not made from, and a checkpoint that is distilled already.
fn check_source(checkpoint: &AtomCheckpoint, manifest: &Manifest, source: &Source) -> Result<()> {
    if manifest.distillation.is_some() {
        return Err(Error::input(format!("{} is distilled already", checkpoint.title()))
            .hint("give the checkpoint that it was made from, with more --tokens"));
    }
    if source.fingerprint()? != manifest.source.fingerprint {
        return Err(Error::input(format!(
            "{} was not made from {}, but from `{}`, or from another version of it",
            checkpoint.title(),
            source.name(),
            manifest.source.name
        ))
        .hint("give --reference the source that the checkpoint was quantized from"));
    }
    let mut linears = manifest.blocks.iter().flatten().flat_map(|site| &site.linears);
    if linears.all(|linear| linear.bits == 16) {
        return Err(Error::input(format!("no linear of {} is quantized", checkpoint.title()))
            .hint("there is nothing to distill: it computes what its source computes"));
    }
    Ok(())
}

/// The type that norms are stored in.
fn norm_type(checkpoint: &AtomCheckpoint, architecture: &Architecture) -> Result<Dtype> {
    let blocks = 0..architecture.blocks;
    let names = blocks.flat_map(|block| {
        let qk_norms = architecture.qk_norm_names(block).into_iter().flatten();
        architecture.norm_names(block).into_iter().chain(qk_norms)
    });
    let last = checkpoint.tensor(FINAL_NORM)?.dtype;
    for name in names {
        let dtype = checkpoint.tensor(&name)?.dtype;
        if dtype != last {
            return Err(Error::input(format!(
                "`{name}` is {}, and `{FINAL_NORM}` {}: distillation wants norms of one type",
                dtype.name(),
                last.name()
            ))
            .hint("convert the source's norms to one type, and quantize it again"));
        }
    }
    Ok(last)
}
