/*! `atom quantize`: calibrate, plan and pack in one pass. */

use std::time::Instant;

use super::allocate::{Allocating, allocate};
use super::calibrate::{Measuring, measure};
use super::job::Job;
use super::memory::{SensitivityPlan, calibration_bytes};
use super::outcome::{DryRun, QuantizeOutcome, StageSeconds};
use super::output::Output;
use super::plan::plan_network;
use super::prepare::{Calibration, Texts};
use super::run::run;
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::plan::bits_per_weight;
use crate::checkpoint::{Source, TensorSpec, Writer};
use crate::network::memory::{self, Workspace};
use crate::network::{check_codebook, network};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::text::Evaluation;

/// What is to be quantized, how, and where to.
pub struct Quantization<'a> {
    /// The model.
    pub source: &'a Source,
    /// The windows it is calibrated on.
    pub calibration: &'a Calibration,
    /// The settings.
    pub recipe: &'a Recipe,
    /// Where the checkpoint goes.
    pub output: &'a Output,
    /// The text that is checked for a measurement after the run.
    pub evaluation: Option<&'a Evaluation>,
}

impl<'a> Quantization<'a> {
    /// The job, with the windows drawn.
    pub(super) fn job(&self, progress: &dyn Progress) -> Result<Job<'a>> {
        // Checked again before anything is written; a long text is not tokenized for an output that cannot be.
        self.output.protecting(self.source, []).check()?;
        let network = network(self.source, progress)?;
        let blocks = plan_network(self.recipe, &network.architecture)?;
        let input = self.calibration.input(self.source, network, progress)?;
        Ok(Job { input, recipe: self.recipe.clone(), blocks })
    }

    pub(super) fn texts(&self) -> Texts<'a> {
        Texts { calibration: Some(self.calibration), evaluation: self.evaluation }
    }
}

/// Quantizes a model. What it cost in accuracy is not measured here.
pub fn quantize<B: Backend>(
    backend: &B,
    quantization: &Quantization<'_>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    quantization.calibration.check_written()?;
    let job = quantization.job(progress)?;
    quantization.texts().check(backend, &job, progress)?;
    run(backend, &job, quantization.output, None, progress)
}

/// Everything `quantize` would find out before its first product.
pub fn dry_run<B: Backend>(
    backend: &B,
    quantization: &Quantization<'_>,
    progress: &dyn Progress,
) -> Result<DryRun> {
    let Quantization { source, recipe, output, .. } = *quantization;
    let job = quantization.job(progress)?;
    let memory_bytes = quantization.texts().check(backend, &job, progress)?;
    source.side_files()?.left_out.iter().for_each(|why| progress.warn(why));
    check_codebook(backend, &job.blocks)?;
    job.input.check_tensors()?;
    job.input.check_unquantized(progress)?;
    let specs = job.tensor_specs()?;
    let out_bytes: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let destination = output.protecting(source, []);
    let found = Writer::preview(&destination, specs, &job.identity()?, job.options(output)?)?;
    let (blocks, sites) = (job.blocks.len(), job.blocks.iter().flatten());
    let linears = sites.flat_map(|site| &site.linears).filter(|linear| linear.bits < 16).count();
    Ok(DryRun {
        out: output.destination.out.clone(),
        model: source.name().to_owned(),
        recipe: recipe.clone(),
        blocks,
        linears,
        samples: job.input.provenance.samples,
        seq_len: job.input.provenance.seq_len,
        source_bytes: source.total_bytes(),
        out_bytes,
        bits_per_weight: bits_per_weight(&job.blocks),
        memory_bytes,
        needed_disk_bytes: found.needed_bytes,
        free_disk_bytes: found.free_bytes.unwrap_or(u64::MAX),
        finished_blocks: job.finished_blocks(&found.done),
    })
}

/// `atom quantize --target-bits`: calibrate with sensitivity at `outlier_counts`, plan and pack in one go.
pub fn quantize_to_target<B: Backend>(
    backend: &B,
    quantization: &Quantization<'_>,
    outlier_counts: &[usize],
    allocating: &Allocating,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let start = Instant::now();
    let recipe = quantization.recipe;
    quantization.calibration.check_written()?;
    let mut job = quantization.job(progress)?;
    let texts = quantization.texts();
    texts.check(backend, &job, progress)?;
    let plan = SensitivityPlan { recipe, blocks: &job.blocks };
    let text_bytes = texts.bytes(quantization.source)?;
    let workspace = Workspace::of(backend);
    memory::check(calibration_bytes(&job.input, workspace, Some(plan), text_bytes), progress)?;
    job.input.check_tensors()?;
    job.input.check_unquantized(progress)?;
    let measuring = Measuring { recipe, outlier_counts };
    let data = measure(backend, &job.input, Some(&measuring), progress)?;
    backend.trim();
    let sensitivity = data.sensitivity.as_ref().expect("it was just measured");
    let (blocks, allocated) = allocate(sensitivity, &job.input.architecture, recipe, allocating)?;
    job.blocks = blocks;
    let seconds = start.elapsed().as_secs_f64();
    let mut outcome = run(backend, &job, quantization.output, Some(&data.statistics), progress)?;
    outcome.seconds += seconds;
    outcome.stage_seconds.insert(0, StageSeconds { stage: "sensitivity".to_owned(), seconds });
    outcome.allocation = Some(allocated);
    Ok(outcome)
}
