//! A distillation with everything that was checked and drawn before the work, and what follows from it.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;

use super::checks::{check_source, check_trainable, norm_type};
use super::parameters::{NetworkValues, Parameters};
use super::reference::Reference;
use super::state::TrainingState;
use super::training::{Course, Training};
use super::windows::{Division, held_of};
use super::writing::Writing;
use super::{Distillation, DistillationWindows, course_of, memory};
use crate::backend::Train;
use crate::card::{Card, Form, SourceCard};
use crate::checkpoint::plan::BlockPlan;
use crate::checkpoint::{
    CARD, Destination, DistillationRates, DistillationRecord, Dtype, Manifest, Options, Provenance,
    SideFile, Source, Writer,
};
use crate::model::{Architecture, read_manifest};
use crate::network::{Runnable, TrainedNetwork, network, trained_values};
use crate::pipeline::prepare::Draw;
use crate::progress::Progress;
use crate::text::{Rounds, WindowDraw};
use crate::{Error, Result};

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

/// What a training left behind.
pub(super) struct TrainedState {
    pub(super) parameters: Parameters,
    pub(super) state: TrainingState,
    /// Steps that a run before had made.
    pub(super) resumed_steps: usize,
    /// Seconds of each step of this run.
    pub(super) step_seconds: Vec<f64>,
}

/// Everything that was checked and drawn before the work.
pub(super) struct Prepared<'a> {
    pub(super) distillation: &'a Distillation<'a>,
    pub(super) architecture: Architecture,
    pub(super) manifest: Manifest,
    pub(super) tokens: Cow<'a, [u32]>,
    pub(super) provenance: Provenance,
    pub(super) division: Division,
    pub(super) course: Course,
    pub(super) norm_type: Dtype,
}

impl<'a> DistillationWindows<'a> {
    /// Tokens of a window.
    fn seq_len(&self) -> usize {
        match self {
            Self::Drawn { seq_len, .. } => *seq_len,
            Self::Given { provenance, .. } => provenance.seq_len,
        }
    }

    /// The windows, of drawn ones `wanted` or as many as the text holds.
    fn load(
        &self,
        wanted: usize,
        source: &Source,
        progress: &dyn Progress,
    ) -> Result<(Cow<'a, [u32]>, Provenance)> {
        match *self {
            Self::Drawn { text, seq_len, seed } => {
                let windows =
                    WindowDraw { samples: wanted, seq_len, seed, rounds: Rounds::Shifted };
                let input =
                    Draw { text, windows }.input(source, network(source, progress)?, progress)?;
                input.check_tensors()?;
                Ok((input.tokens.into(), input.provenance))
            }
            Self::Given { tokens, provenance } => Ok((tokens.into(), provenance.clone())),
        }
    }
}

impl<'a> Prepared<'a> {
    /// Checks what can be checked in seconds, and draws the windows.
    pub(super) fn new<B: Train>(
        backend: &B,
        distillation: &'a Distillation<'a>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Distillation { checkpoint, source, ref windows, tokens, .. } = *distillation;
        let seq_len = windows.seq_len();
        let (steps, per_step) = course_of(tokens, seq_len)?;
        let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
        check_trainable(&architecture)?;
        let manifest = read_manifest(checkpoint, &architecture)?;
        check_source(checkpoint, &manifest, source)?;
        let norm_type = norm_type(checkpoint, &architecture)?;
        // Nothing is tokenized for an output that cannot be.
        distillation.output.protecting(source, checkpoint.dir()).check()?;
        let wanted = steps * per_step;
        let (tokens, provenance) =
            windows.load(wanted + held_of(wanted, seq_len), source, progress)?;
        let division = Division::of(&tokens, seq_len);
        if division.trained.is_empty() {
            return Err(Error::input(format!(
                "{} gives too few windows of {seq_len} tokens to hold one back and train on others",
                provenance.dataset
            ))
            .hint("give more text with --calib, more --samples, or a shorter --seq-len"));
        }
        let seed = provenance.seed;
        let course = Course { steps, per_step, seq_len, seed };
        let prepared = Self {
            distillation,
            architecture,
            manifest,
            tokens,
            provenance,
            division,
            course,
            norm_type,
        };
        backend.trim();
        crate::network::memory::check(prepared.memory_bytes(backend), progress)?;
        Ok(prepared)
    }

    pub(super) fn memory_bytes<B: Train>(&self, backend: &B) -> u64 {
        memory::distill_bytes(
            backend,
            &self.architecture,
            &self.manifest.blocks,
            self.tokens.len(),
            self.course,
        )
    }

    pub(super) fn destination(&self) -> Destination {
        let Distillation { checkpoint, source, output, .. } = self.distillation;
        output.protecting(source, checkpoint.dir())
    }

    pub(super) fn options(&self) -> Result<Options> {
        let Distillation { checkpoint, output, .. } = self.distillation;
        let side_bytes = checkpoint.side_files()?.copied.iter().map(SideFile::bytes).sum();
        Ok(Options { resume: output.resume, side_bytes, ..Options::default() })
    }

    pub(super) fn identity<B: Train>(&self, backend: &B) -> Result<Value> {
        let Distillation { checkpoint, source, always_writes, .. } = self.distillation;
        let identity = Identity {
            tool_version: env!("CARGO_PKG_VERSION"),
            checkpoint: checkpoint.fingerprint()?,
            source: source.fingerprint()?,
            text: &self.provenance,
            steps: self.course.steps,
            windows_per_step: self.course.per_step,
            rates: self.distillation.rates,
            always_writes: *always_writes,
            // Thread counts and instruction sets change no byte; another kind of device does.
            device: if B::ON_HOST { "cpu".to_owned() } else { backend.device() },
        };
        Ok(serde_json::to_value(identity).expect("an identity has only JSON types"))
    }

    pub(super) fn writing<'w>(
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

    /// Trains, or goes on with what a run before has trained.
    pub(super) fn train<B: Train>(
        &self,
        backend: &B,
        model: &Runnable<'_, B>,
        writer: &mut Writer,
        progress: &dyn Progress,
    ) -> Result<TrainedState> {
        let Course { steps, seq_len, .. } = self.course;
        let (tokens, source) = (&self.tokens[..], self.distillation.source);
        let (blocks, final_norm) = trained_values(model)?;
        let parameters = Parameters::new(NetworkValues { blocks, final_norm }, self.norm_type);
        let kept = writer.state()?;
        let kept = kept.and_then(|bytes| TrainingState::from_bytes(&bytes, parameters.count()));
        let resumed = kept.as_ref().map_or(0, |state| state.measured.steps);
        let mut state = kept.unwrap_or_else(|| TrainingState::new(parameters.count()));
        if resumed > 0 {
            progress.info(&format!("continuing after step {resumed} of {steps}"));
        }
        let mut step_seconds = Vec::new();
        let is_complete = state.measured.curve.last().is_some_and(|point| point.step == steps);
        if !is_complete {
            // The checkpoint is loaded when the source's blocks and streams are gone.
            let reference = Reference::measure(backend, source, tokens, seq_len, progress)?;
            let network = TrainedNetwork::load(model, seq_len)?;
            let mut training = Training {
                backend,
                network,
                parameters: &parameters,
                reference: &reference,
                tokens,
                division: &self.division,
                course: self.course,
                rates: self.distillation.rates,
                progress,
            };
            step_seconds =
                training.run(&mut state, |state| writer.save_state(&state.to_bytes()))?;
        }
        Ok(TrainedState { parameters, state, resumed_steps: resumed, step_seconds })
    }

    /// What was trained and gained.
    pub(super) fn record(&self, state: &TrainingState, parameters: usize) -> DistillationRecord {
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
            text: self.provenance.clone(),
            steps: self.course.steps,
            windows_per_step: self.course.per_step,
            held_out_windows: self.division.held.len(),
            rates: self.distillation.rates,
            parameters,
            kept_step: best.step,
            before,
            after: best.held_out,
            curve,
        }
    }

    /// Writes the checkpoint with trained values, or as it was.
    pub(super) fn write(
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
