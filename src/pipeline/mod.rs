/*! The stages and their order: calibrate, plan, pack, block by block.

Two streams of hidden states travel beside the weights: one through the original blocks, on which
channel energies (and sensitivities, where they are asked for) are measured, and one through the
quantized blocks, on which GPTQ's Hessians are. Memory is one block and the
streams, never the model. */

mod accounting;
mod ahead;
pub mod allocate;
mod block;
mod calibrate;
mod cautions;
mod fallbacks;
mod in_turn;
mod load;
mod manifest;
pub mod memory;
pub mod outcome;
pub mod plan;
mod run;
pub mod sensitivity;
mod stream;
mod timing;
mod underflow;

use std::path::{Path, PathBuf};
use std::time::Instant;

pub use accounting::{Network, check_counts, network};
pub use ahead::one_ahead;
pub use calibrate::{CALIBRATION_FILE, CalibrationData, Provenance, Statistics};
pub(crate) use cautions::caution;
pub use load::{
    BlockWeights, QuantizedSite, attention_spec, check_levels, expect, key_mean_spec,
    quantized_block, read_key_mean, read_sites, source_block, vector,
};
pub use manifest::{Manifest, SourceRecord};
pub use stream::Stream;
pub use timing::{cpu_seconds, peak_rss_bytes};

use crate::backend::Backend;
use crate::checkpoint::{AtomCheckpoint, Destination, OutputFile, Source, TensorSpec, Writer};
use crate::eval;
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;
use crate::text::{CalibrationWindows, TextSet, Tokenizer, check_tokens};
use crate::{Error, Result};
use allocate::{Allocating, allocate};
use memory::Windows;
use outcome::{DryRun, FileOutcome, Measured, PerplexityChange, QuantizeOutcome, StageSeconds};
use plan::{CalibrationFile, PLAN_VERSION, PlanFile, bits_per_weight, check_plan, plan_network};
use run::Job;
use sensitivity::{Sensor, Subject};

/// Which windows a model is calibrated on.
pub struct Calibration {
    /// The text they are drawn from.
    pub text: TextSet,
    /// How many.
    pub samples: usize,
    /// Tokens in each.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
}

/// What sensitivity is measured of.
pub struct Measuring<'a> {
    /// How linears are quantized; its width and outlier count are those that effects are measured at.
    pub recipe: &'a Recipe,
    /// Outlier counts beside the recipe's.
    pub outlier_counts: &'a [usize],
}

/// Where the checkpoint goes and what may be there already.
pub struct Output {
    /// Its directory, and what may not be touched.
    pub destination: Destination,
    /// Never throw an unfinished run away.
    pub resume: bool,
}

impl Output {
    /// The destination, with the source and more files among what may not be touched.
    fn protecting<'p>(
        &self,
        source: &'p Source,
        more: impl IntoIterator<Item = &'p Path>,
    ) -> Destination {
        let mut destination = self.destination.clone();
        for path in source.dir().into_iter().chain(more) {
            destination.inputs.add(path);
        }
        destination
    }
}

/// Text on which perplexity is measured.
pub struct Evaluation {
    /// The text.
    pub text: TextSet,
    /// Tokens in a window.
    pub seq_len: usize,
    /// At most this many windows.
    pub windows: Option<usize>,
}

/// `atom quantize`: calibrate, plan and pack in one pass.
pub fn quantize<B: Backend>(
    backend: &B,
    source: &Source,
    calibration: &Calibration,
    recipe: &Recipe,
    output: &Output,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    // Looked at again before anything is written; a long text is not tokenized for an output that cannot be.
    output.protecting(source, []).check()?;
    let job = prepare(source, calibration, recipe, progress)?;
    let evaluated = check_evaluation(source, &job.architecture, evaluation, progress)?;
    let texts_bytes = texts_bytes(source, Some(calibration), evaluation)?;
    check_memory(backend, &job, evaluated, texts_bytes, progress)?;
    caution(source, &job.architecture, longest(&job, evaluation), progress);
    run::run(backend, &job, output, evaluation, progress, None)
}

/// Everything `quantize` would find out before its first product.
pub fn dry_run<B: Backend>(
    backend: &B,
    source: &Source,
    calibration: &Calibration,
    recipe: &Recipe,
    output: &Output,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<DryRun> {
    output.protecting(source, []).check()?;
    let job = prepare(source, calibration, recipe, progress)?;
    let evaluated = check_evaluation(source, &job.architecture, evaluation, progress)?;
    let texts_bytes = texts_bytes(source, Some(calibration), evaluation)?;
    let memory_bytes = check_memory(backend, &job, evaluated, texts_bytes, progress)?;
    caution(source, &job.architecture, longest(&job, evaluation), progress);
    source.side_files()?.left_out.iter().for_each(|why| progress.warn(why));
    check_levels(backend, &job.blocks)?;
    job.check_tensors()?;
    job.check_kept(progress)?;
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
        samples: calibration.samples,
        seq_len: calibration.seq_len,
        source_bytes: source.total_bytes(),
        out_bytes,
        bits_per_weight: bits_per_weight(&job.blocks),
        memory_bytes,
        needed_disk_bytes: found.needed_bytes,
        free_disk_bytes: found.free_bytes.unwrap_or(u64::MAX),
        finished_blocks: run::finished_blocks(&found.done),
    })
}

fn prepare<'a>(
    source: &'a Source,
    calibration: &Calibration,
    recipe: &Recipe,
    progress: &dyn Progress,
) -> Result<Job<'a>> {
    let Network { architecture, ignored, .. } = network(source, progress)?;
    let blocks = plan_network(recipe, &architecture)?;
    let Calibration { text, samples, seq_len, seed } = calibration;
    let tokenizer = Tokenizer::from_bytes(&source.tokenizer()?, &source.tokenizer_path())?;
    let drawn = text.calibration_windows(&tokenizer, *samples, *seq_len, *seed, progress)?;
    let CalibrationWindows { tokens, sha256, sets } = drawn;
    check_embedded(source, &architecture, &tokens, tokenizer.path())?;
    let provenance = Provenance {
        dataset: text.name.clone(),
        sha256,
        samples: *samples,
        seq_len: *seq_len,
        seed: *seed,
        sets,
    };
    Ok(Job { source, architecture, ignored, recipe: recipe.clone(), blocks, tokens, provenance })
}

/// Finds out that a text is too short, or is no text of this model, before the work and not after it; the windows that
/// will be measured.
fn check_evaluation(
    source: &Source,
    architecture: &Architecture,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<Option<Windows>> {
    let Some(evaluation) = evaluation else { return Ok(None) };
    let path = source.tokenizer_path();
    let tokens = eval::windows(&source.tokenizer()?, &path, evaluation, progress)?;
    check_embedded(source, architecture, &tokens, &path)?;
    Ok(Some(Windows { tokens: tokens.len(), seq_len: evaluation.seq_len }))
}

/// Finds out that tokens have no embedding. An embedding of another shape than the configuration's is
/// refused elsewhere, with the shape.
fn check_embedded(
    source: &Source,
    architecture: &Architecture,
    tokens: &[u32],
    tokenizer: &str,
) -> Result<()> {
    let rows = architecture.vocabulary;
    let stored = source.tensor(EMBEDDING).ok().and_then(|tensor| tensor.shape.first().copied());
    if stored == Some(rows) { check_tokens(tokens, rows, tokenizer) } else { Ok(()) }
}

/// Finds out that memory will not do before the work; the estimate, in bytes. Texts took `texts_bytes` before.
fn check_memory<B: Backend>(
    backend: &B,
    job: &Job,
    evaluated: Option<Windows>,
    texts_bytes: u64,
    progress: &dyn Progress,
) -> Result<u64> {
    // The texts' memory is not to stand beside the work's.
    backend.trim();
    let needed = memory::quantize_bytes(job, memory::Place::of(backend), evaluated, texts_bytes);
    memory::check(needed, progress)?;
    Ok(needed)
}

/// What the texts of a run take at the peak, one after the other, while they are tokenized.
fn texts_bytes(
    source: &Source,
    calibration: Option<&Calibration>,
    evaluation: Option<&Evaluation>,
) -> Result<u64> {
    let calibration = calibration.map(|calibration| calibration.text.tokenizing_bytes());
    let evaluation = evaluation.map(|evaluation| evaluation.text.tokenizing_bytes());
    let tokenizer = Tokenizer::memory_bytes(source.tokenizer()?.len());
    Ok(tokenizer + calibration.max(evaluation).unwrap_or(0))
}

/// Tokens in the longest windows of a run.
fn longest(job: &Job, evaluation: Option<&Evaluation>) -> usize {
    let evaluated = evaluation.map_or(0, |evaluation| evaluation.seq_len);
    job.provenance.seq_len.max(evaluated)
}

fn evaluate_change<B: Backend>(
    backend: &B,
    source: &Source,
    checkpoint: &Path,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<PerplexityChange> {
    let before = eval::source_perplexity(backend, source, evaluation, progress)?;
    let checkpoint = AtomCheckpoint::open(checkpoint)?;
    let after = eval::atom_perplexity(backend, &checkpoint, evaluation, progress)?;
    Ok(PerplexityChange {
        dataset: evaluation.text.name.clone(),
        windows: before.windows,
        seq_len: evaluation.seq_len,
        before: before.perplexity,
        after: after.perplexity,
    })
}

/// `atom calibrate`: channel energies of every site, and with `measuring` their sensitivity, into a file.
pub fn calibrate<B: Backend>(
    backend: &B,
    source: &Source,
    calibration: &Calibration,
    measuring: Option<&Measuring<'_>>,
    file: &OutputFile,
    progress: &dyn Progress,
) -> Result<FileOutcome> {
    let start = Instant::now();
    // Any recipe will do where only the windows and the network are looked at.
    let any = memory::any_recipe();
    let recipe = measuring.map_or(&any, |measuring| measuring.recipe);
    let job = prepare(source, calibration, recipe, progress)?;
    backend.trim();
    let place = memory::Place::of(backend);
    let texts_bytes = texts_bytes(source, Some(calibration), None)?;
    let needed = memory::calibration_bytes(&job, place, measuring.is_some(), texts_bytes);
    memory::check(needed, progress)?;
    job.check_tensors()?;
    caution(source, &job.architecture, calibration.seq_len, progress);
    let data = measure(backend, &job, measuring, progress)?;
    source.check_unchanged()?;
    file.write(&data.to_bytes(&job.architecture)?)?;
    Ok(FileOutcome {
        out: file.shown().to_owned(),
        model: data.model,
        seconds: start.elapsed().as_secs_f64(),
        sites: job.blocks.iter().flatten().count(),
        linears: count_linears(&job.architecture),
        bits_per_weight: None,
        sensitivity: data.sensitivity.as_ref().map(Measured::of),
        allocation: None,
    })
}

/// Carries the windows through the original blocks and measures on the way.
fn measure<B: Backend>(
    backend: &B,
    job: &Job<'_>,
    measuring: Option<&Measuring<'_>>,
    progress: &dyn Progress,
) -> Result<CalibrationData> {
    let Job { source, architecture, tokens, provenance, .. } = job;
    let seq_len = provenance.seq_len;
    let attention = attention_spec(architecture, KvFormat::FULL, seq_len);
    let mut sensor = match measuring {
        None => None,
        Some(&Measuring { recipe, outlier_counts }) => {
            let tensors = *source;
            let attention = &attention;
            let subject = Subject { backend, tensors, architecture, attention, recipe, progress };
            Some(Sensor::new(subject, outlier_counts, tokens)?)
        }
    };
    // Last, because its batches are the largest: what it reserves for a block's work is what holds.
    let mut stream = Stream::embed(backend, *source, architecture, tokens, seq_len, 0)?;
    progress.begin("calibrate", architecture.blocks);
    let mut statistics = Vec::with_capacity(architecture.blocks);
    let load = |index| BlockWeights::<B>::load(backend, *source, architecture, index, |_, _| true);
    one_ahead(0..architecture.blocks, load, |_, weights| {
        let weights = weights()?;
        let measured = calibrate::measure_block(
            backend,
            architecture,
            &attention,
            &weights,
            &mut stream,
            true,
            progress,
        )?;
        if let Some(sensor) = &mut sensor {
            sensor.measure(&weights, &measured.energies)?;
        }
        statistics.push(measured);
        progress.advance("");
        Ok(())
    })?;
    let sensitivity = sensor.map(|sensor| sensor.finish(job.kept_bytes()?)).transpose()?;
    progress.end();
    Ok(CalibrationData {
        model: source.name().to_owned(),
        fingerprint: source.fingerprint()?,
        config: source.config().clone(),
        provenance: provenance.clone(),
        tokens: tokens.clone(),
        statistics,
        sensitivity,
    })
}

/// What decides a plan, beside the calibration.
#[derive(Clone, Copy)]
pub enum Planning<'a> {
    /// One width and outlier count everywhere: those of the recipe.
    Uniform(&'a Recipe),
    /// What costs least within a target, by the recipe given or the one that was measured.
    Allocated(Option<&'a Recipe>, &'a Allocating),
}

/// `atom plan`: what becomes of every site and linear, from a calibration file and a recipe.
pub fn plan(
    calibration_file: &Path,
    planning: Planning<'_>,
    file: &OutputFile,
) -> Result<FileOutcome> {
    let start = Instant::now();
    let (data, architecture, sha256) = CalibrationData::read(calibration_file)?;
    let (recipe, blocks, allocation) = match planning {
        Planning::Uniform(recipe) => (recipe.clone(), plan_network(recipe, &architecture)?, None),
        Planning::Allocated(recipe, allocating) => {
            let sensitivity = data.sensitivity.as_ref().ok_or_else(|| {
                Error::input(format!(
                    "{} holds no sensitivity, by which bits are allocated",
                    calibration_file.display()
                ))
                .hint("measure it once with `atom calibrate --sensitivity`")
            })?;
            let recipe = recipe.unwrap_or(&sensitivity.recipe);
            let (blocks, allocated) = allocate(sensitivity, &architecture, recipe, allocating)?;
            (recipe.clone(), blocks, Some(allocated))
        }
    };
    let bits = bits_per_weight(&blocks);
    // Relative where both files lie in one directory, so that the two can be moved together.
    let calibration = fs_err::canonicalize(calibration_file)?;
    let same_directory = calibration.parent() == file.path().parent();
    let path = match calibration.file_name().filter(|_| same_directory) {
        Some(name) => PathBuf::from(name),
        None => calibration,
    };
    let sites = blocks.iter().flatten().count();
    let plan = PlanFile {
        plan_version: PLAN_VERSION,
        model: data.model.clone(),
        recipe,
        calibration: CalibrationFile { path, sha256 },
        blocks,
    };
    let text = serde_json::to_string_pretty(&plan).expect("a plan has only JSON types");
    file.write(format!("{text}\n").as_bytes())?;
    Ok(FileOutcome {
        out: file.shown().to_owned(),
        model: data.model,
        seconds: start.elapsed().as_secs_f64(),
        sites,
        linears: count_linears(&architecture),
        bits_per_weight: Some(bits),
        sensitivity: None,
        allocation,
    })
}

/// `atom quantize --target-bits`: calibrate with sensitivity, plan and pack in one go.
pub fn quantize_to_target<B: Backend>(
    backend: &B,
    source: &Source,
    calibration: &Calibration,
    (measuring, allocating): (&Measuring<'_>, &Allocating),
    output: &Output,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let start = Instant::now();
    output.protecting(source, []).check()?;
    let mut job = prepare(source, calibration, measuring.recipe, progress)?;
    let evaluated = check_evaluation(source, &job.architecture, evaluation, progress)?;
    let texts_bytes = texts_bytes(source, Some(calibration), evaluation)?;
    check_memory(backend, &job, evaluated, texts_bytes, progress)?;
    let place = memory::Place::of(backend);
    memory::check(memory::calibration_bytes(&job, place, true, texts_bytes), progress)?;
    job.check_tensors()?;
    job.check_kept(progress)?;
    caution(source, &job.architecture, longest(&job, evaluation), progress);
    let data = measure(backend, &job, Some(measuring), progress)?;
    backend.trim();
    let sensitivity = data.sensitivity.as_ref().expect("it was just measured");
    let (blocks, allocated) =
        allocate(sensitivity, &job.architecture, measuring.recipe, allocating)?;
    job.blocks = blocks;
    let seconds = start.elapsed().as_secs_f64();
    let known = Some(&data.statistics[..]);
    let mut outcome = run::run(backend, &job, output, evaluation, progress, known)?;
    outcome.seconds += seconds;
    outcome.stage_seconds.insert(0, StageSeconds { stage: "sensitivity".to_owned(), seconds });
    outcome.allocation = Some(allocated);
    Ok(outcome)
}

/// `atom pack`: the checkpoint that a plan describes.
pub fn pack<B: Backend>(
    backend: &B,
    source: &Source,
    plan_file: &Path,
    output: &Output,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let (plan, calibration_file) = PlanFile::read(plan_file)?;
    let destination = output.protecting(source, [plan_file, calibration_file.as_path()]);
    destination.check()?;
    let (data, _, sha256) = CalibrationData::read(&calibration_file)?;
    if sha256 != plan.calibration.sha256 {
        return Err(Error::input(format!(
            "{} is not the calibration that {} was made from",
            calibration_file.display(),
            plan_file.display()
        ))
        .hint("make the plan again with `atom plan`"));
    }
    if source.fingerprint()? != data.fingerprint {
        return Err(Error::input(format!(
            "{} was calibrated on another model or version of `{}`",
            calibration_file.display(),
            data.model
        ))
        .hint("calibrate this model with `atom calibrate`"));
    }
    let Network { architecture, ignored, .. } = network(source, progress)?;
    check_plan(&architecture, &plan.blocks)?;
    let evaluated = check_evaluation(source, &architecture, evaluation, progress)?;
    let CalibrationData { provenance, tokens, statistics, .. } = data;
    let PlanFile { recipe, blocks, .. } = plan;
    let job = Job { source, architecture, ignored, recipe, blocks, tokens, provenance };
    let output = Output { destination, resume: output.resume };
    let texts_bytes = texts_bytes(source, None, evaluation)?;
    check_memory(backend, &job, evaluated, texts_bytes, progress)?;
    caution(source, &job.architecture, longest(&job, evaluation), progress);
    run::run(backend, &job, &output, evaluation, progress, Some(&statistics))
}

fn count_linears(architecture: &Architecture) -> usize {
    let sites = (0..architecture.blocks).flat_map(|block| architecture.sites(block));
    sites.map(|site| site.linears.len()).sum()
}
