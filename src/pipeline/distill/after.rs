/*! `--distill` of `quantize` and `pack`: the checkpoint is finished next to its place, under a hidden name, and distilled from there
on the windows of its calibration. A run that is continued finds it finished. */

use crate::backend::Backend;
use crate::backend::Train;
use crate::checkpoint::plan::{BlockPlan, bits_per_weight};
use crate::checkpoint::{AtomCheckpoint, is_atom};
use crate::pipeline::energies::Statistics;
use crate::pipeline::job::Job;
use crate::pipeline::outcome::QuantizeOutcome;
use crate::pipeline::pack::{Packed, Packing};
use crate::pipeline::quantize::Quantization;
use crate::pipeline::run::{linears_of, run};
use crate::progress::Progress;

use super::{
    DistillOutcome, Distillation, DistillationWindows, Output, RATES, Result, check_trainable,
    course_of, distill, peak_rss_bytes,
};

/// Quantizes a model, and distills the checkpoint on `tokens` tokens of its calibration windows.
pub fn quantize_and_distill<B: Train>(
    backend: &B,
    quantization: &Quantization<'_>,
    tokens: usize,
    progress: &dyn Progress,
) -> Result<(QuantizeOutcome, DistillOutcome)> {
    course_of(tokens, quantization.calibration.seq_len)?;
    let job = quantization.job(progress)?;
    check_trainable(&job.input.architecture)?;
    quantization.texts().check(backend, &job, progress)?;
    run_and_distill(backend, &job, quantization.output, None, (tokens, progress))
}

/// Packs a plan, and distills the checkpoint on `tokens` tokens of its calibration windows.
pub fn pack_and_distill<B: Train>(
    backend: &B,
    packing: &Packing<'_>,
    tokens: usize,
    progress: &dyn Progress,
) -> Result<(QuantizeOutcome, DistillOutcome)> {
    let Packed { job, statistics, output } = Packed::prepare(backend, packing, progress)?;
    course_of(tokens, job.input.provenance.seq_len)?;
    check_trainable(&job.input.architecture)?;
    run_and_distill(backend, &job, &output, Some(&statistics), (tokens, progress))
}

fn run_and_distill<B: Train>(
    backend: &B,
    job: &Job<'_>,
    output: &Output,
    known: Option<&[Statistics]>,
    (tokens, progress): (usize, &dyn Progress),
) -> Result<(QuantizeOutcome, DistillOutcome)> {
    output.protecting(job.input.source, []).check()?;
    let staged = staged(output);
    let mut quantized = match finished(backend, job, &staged)? {
        Some(outcome) => {
            progress.info("the checkpoint is quantized already: going on with its distillation");
            outcome
        }
        None => run(backend, job, &staged, known, progress)?,
    };
    backend.trim();
    let checkpoint = AtomCheckpoint::open(&staged.destination.out)?;
    let distillation = Distillation {
        checkpoint: &checkpoint,
        source: job.input.source,
        windows: DistillationWindows::Given {
            tokens: &job.input.tokens,
            provenance: &job.input.provenance,
        },
        tokens,
        rates: RATES,
        output,
        always_writes: true,
    };
    let distilled = distill(backend, &distillation, progress)?;
    drop(checkpoint);
    fs_err::remove_dir_all(&staged.destination.out)?;
    quantized.out.clone_from(distilled.out.as_ref().expect("it is written in any case"));
    quantized.upload = crate::card::upload_command(&output.destination.out);
    quantized.seconds += distilled.seconds;
    quantized.peak_rss_bytes = peak_rss_bytes();
    quantized.peak_gpu_bytes = backend.peak_bytes();
    Ok((quantized, distilled))
}

/// Where the checkpoint goes before it is distilled: `.NAME.undistilled`, which is this program's own.
fn staged(output: &Output) -> Output {
    let mut destination = output.destination.clone();
    let name = destination.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    destination.out = destination.out.with_file_name(format!(".{name}.undistilled"));
    destination.overwrite = true;
    Output { destination, resume: false }
}

/// The checkpoint of this job, if it was finished by a run before.
fn finished<B: Backend>(
    backend: &B,
    job: &Job<'_>,
    staged: &Output,
) -> Result<Option<QuantizeOutcome>> {
    let dir = &staged.destination.out;
    if !is_atom(dir) {
        return Ok(None);
    }
    let checkpoint = AtomCheckpoint::open(dir)?;
    let found = checkpoint.manifest()?;
    let mut expected = job.manifest(job.blocks.clone(), &[])?;
    let blocks = planned(&found.blocks);
    expected.blocks = planned(&expected.blocks);
    expected.bits_per_weight = found.bits_per_weight;
    if (crate::checkpoint::Manifest { blocks, ..found.clone() }) != expected {
        return Ok(None);
    }
    let source = job.input.source;
    Ok(Some(QuantizeOutcome {
        out: dir.clone(),
        model: source.name().to_owned(),
        recipe: job.recipe.clone(),
        samples: job.input.provenance.samples,
        seq_len: job.input.provenance.seq_len,
        seconds: 0.0,
        stage_seconds: Vec::new(),
        peak_rss_bytes: peak_rss_bytes(),
        peak_gpu_bytes: backend.peak_bytes(),
        bits_per_weight: bits_per_weight(&found.blocks),
        source_bytes: source.total_bytes(),
        out_bytes: checkpoint.total_bytes(),
        device: backend.device(),
        resumed_blocks: job.blocks.len(),
        linears: linears_of(&found),
        perplexity: None,
        upload: String::new(),
        worst_sites: Vec::new(),
        allocation: None,
        distillation: None,
    }))
}

/// Plans without what quantization adds to them.
fn planned(blocks: &[BlockPlan]) -> Vec<BlockPlan> {
    let mut blocks = blocks.to_vec();
    for site in blocks.iter_mut().flatten() {
        (site.act_exponent, site.weight_exponent) = (None, None);
        site.linears.iter_mut().for_each(|linear| linear.error = None);
    }
    blocks
}
