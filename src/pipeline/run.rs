/*! A whole run: from a source and a calibration to a finished checkpoint, block by block.

`quantize` measures channel energies on the way, `pack` reads them from a file; everything after
that is the same code, so both give the same bytes. */

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use super::agreement::agree;
use super::block_loop::{Surroundings, Written, quantize_blocks};
use super::channels::worst_sites;
use super::energies::Statistics;
use super::fallbacks::Fallbacks;
use super::job::Job;
use super::outcome::{LinearOutcome, QuantizeOutcome};
use super::output::Output;
use super::timing::Timing;
use super::writing::Writing;
use crate::backend::Backend;
use crate::card::{Card, Form, SourceCard, upload_command};
use crate::checkpoint::plan::bits_per_weight;
use crate::checkpoint::{DoneBlock, Manifest, SideFile, Source, TensorSpec, Writer};
use crate::machine::peak_rss_bytes;
use crate::network::{check_codebook, no_thread};
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// Quantizes and writes the entire model. Statistics that are `known` are not measured again. Every rank does its part of the
/// arithmetic; the first one writes.
pub(super) fn run<B: Backend>(
    backend: &B,
    job: &Job<'_>,
    output: &Output,
    known: Option<&[Statistics]>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let start = Instant::now();
    let mut timing = Timing::default();
    let source = job.input.source;
    check_codebook(backend, &job.blocks)?;
    job.input.check_tensors()?;
    if backend.ranks().is_first() {
        // Who writes them reads them.
        job.input.check_unquantized(progress)?;
    }
    let specs = job.tensor_specs()?;
    let out_bytes = specs.iter().map(TensorSpec::bytes).sum();
    agree(backend.ranks(), &job.identity()?)?;
    let run = Run { backend, job, output, known, progress };
    let made = match backend.ranks().is_first() {
        true => run.write(specs, out_bytes, &mut timing)?,
        false => run.follow(&mut timing)?,
    };
    let Made { out, manifest, distributions, resumed_blocks } = made;
    Ok(QuantizeOutcome {
        upload: upload_command(&output.destination.out),
        out,
        model: source.name().to_owned(),
        recipe: job.recipe.clone(),
        samples: job.input.provenance.samples,
        seq_len: job.input.provenance.seq_len,
        seconds: start.elapsed().as_secs_f64(),
        stage_seconds: timing.finish(),
        peak_rss_bytes: peak_rss_bytes(),
        peak_gpu_bytes: backend.peak_bytes(),
        bits_per_weight: bits_per_weight(&job.blocks),
        source_bytes: source.total_bytes(),
        out_bytes,
        device: backend.device(),
        resumed_blocks,
        worst_sites: worst_sites(&manifest.blocks, &distributions),
        linears: linears_of(&manifest),
        perplexity: None,
        allocation: None,
        distillation: None,
    })
}

/// A run on its way.
struct Run<'a, B: Backend> {
    backend: &'a B,
    job: &'a Job<'a>,
    output: &'a Output,
    known: Option<&'a [Statistics]>,
    progress: &'a dyn Progress,
}

/// A finished checkpoint, and what is said of it.
struct Made {
    out: PathBuf,
    manifest: Manifest,
    distributions: Vec<Vec<Vec<f64>>>,
    resumed_blocks: usize,
}

impl<B: Backend> Run<'_, B> {
    /// The part of the rank that writes.
    fn write(&self, specs: Vec<TensorSpec>, out_bytes: u64, timing: &mut Timing) -> Result<Made> {
        let Self { backend, job, output, known, progress } = *self;
        let (ranks, source) = (backend.ranks(), job.input.source);
        let destination = output.protecting(source, []);
        let (options, identity) = (job.options(output)?, job.identity()?);
        let check_stop = || progress.check_stop();
        let mut writer = Writer::create(&destination, specs, &identity, options, &check_stop)?;
        announce_resumed(job, writer.done(), progress);
        let out = writer.out().to_owned();
        let written = ranks
            .broadcast(0, out.as_os_str().as_bytes().to_vec())
            .and_then(|_| write_tensors(backend, job, &mut writer, known, timing, progress));
        // A weight that was written to meanwhile may be in the streams and not in the fingerprint: no block is kept.
        if let Err(changed) = source.check_unchanged() {
            writer.discard();
            let interrupted = written.err().filter(|error| error.kind() == Kind::Interrupted);
            return Err(interrupted.unwrap_or(changed));
        }
        // Another rank may have found its files changed.
        let written = written.and_then(|written| ranks.barrier().map(|()| written));
        let Written { blocks, errors, distributions, resumed_blocks } = match written {
            Ok(written) => written,
            Err(error) => {
                give_up(job, writer, &error, progress);
                return Err(error);
            }
        };
        let side_files = source.side_files()?;
        side_files.left_out.iter().for_each(|why| progress.warn(why));
        let manifest = job.manifest(blocks, &errors)?;
        let mut side_files = side_files.copied;
        side_files.push(card(&manifest, source, out_bytes, progress));
        timing.measure("write", || writer.finish(&job.config(), &manifest, &side_files))?;
        // From here on the others see it.
        ranks.barrier()?;
        Ok(Made { out, manifest, distributions, resumed_blocks })
    }

    /// The part of any other rank.
    fn follow(&self, timing: &mut Timing) -> Result<Made> {
        let Self { backend, job, known, progress, .. } = *self;
        let ranks = backend.ranks();
        let out = PathBuf::from(OsString::from_vec(ranks.broadcast(0, Vec::new())?));
        if !Writer::is_begun(&out) {
            let (rank, out) = (ranks.rank(), out.display());
            let message = format!("rank {rank} does not see the work of rank 0 next to {out}");
            return Err(Error::machine(message)
                .hint("name a directory with --out on a file system that all hosts share"));
        }
        let fallbacks = Fallbacks::default();
        let surroundings = Surroundings {
            known,
            is_finished: &|_| false,
            resumed: &|_, _| Ok(None),
            finished: None,
            fallbacks: &fallbacks,
        };
        let written = quantize_blocks(backend, job, surroundings, timing, progress)?;
        job.input.source.check_unchanged()?;
        ranks.barrier()?;
        let Written { blocks, errors, distributions, resumed_blocks } = written;
        let manifest = job.manifest(blocks, &errors)?;
        ranks.barrier()?;
        Ok(Made { out, manifest, distributions, resumed_blocks })
    }
}

/// The model card, before anything was measured.
fn card(manifest: &Manifest, source: &Source, out_bytes: u64, progress: &dyn Progress) -> SideFile {
    let form = Form::atom(manifest);
    let source = &SourceCard::of(source.readme(), progress);
    Card { manifest, source, bytes: out_bytes, perplexities: &[], form: &form }.file()
}

/// The quantized linears of a finished checkpoint.
pub(super) fn linears_of(manifest: &Manifest) -> Vec<LinearOutcome> {
    let linears = manifest.blocks.iter().flatten().flat_map(|site| &site.linears);
    let quantized = linears.filter_map(|linear| {
        Some(LinearOutcome { name: linear.name.clone(), bits: linear.bits, error: linear.error? })
    });
    quantized.collect()
}

/// Says how far the run is that is continued, if one is.
fn announce_resumed(job: &Job<'_>, done: &[DoneBlock], progress: &dyn Progress) {
    if !done.is_empty() {
        let blocks = job.blocks.len();
        progress.info(&format!(
            "continuing an unfinished run of the same job: {} of {blocks} blocks are finished",
            job.finished_blocks(done)
        ));
    }
}

/// Keeps finished blocks for another run; without any, nothing is kept.
fn give_up(job: &Job<'_>, writer: Writer, error: &Error, progress: &dyn Progress) {
    match job.finished_blocks(writer.done()) {
        0 => writer.discard(),
        done if error.kind() != Kind::Interrupted => progress.info(&format!(
            "{done} finished blocks are kept; the same command, or --resume, continues after them"
        )),
        _ => {}
    }
}

/// Quantizes block by block, and writes every tensor of the output next to the arithmetic.
fn write_tensors<B: Backend>(
    backend: &B,
    job: &Job<'_>,
    writer: &mut Writer,
    known: Option<&[Statistics]>,
    timing: &mut Timing,
    progress: &dyn Progress,
) -> Result<Written> {
    let writing = Writing::new(job, writer, progress);
    // In the host's memory, a copy of the embedding must not exist next to a block's Hessians; next to
    // the work of a GPU it costs nothing.
    if B::ON_HOST {
        timing.measure("write", || writing.outer_tensors())?;
    }
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(1);
        let write = || {
            if !B::ON_HOST {
                writing.outer_tensors()?;
            }
            writing.blocks(backend, receiver)
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, write).map_err(no_thread)?;
        let fallbacks = Fallbacks::default();
        let surroundings = Surroundings {
            known,
            is_finished: &|index| writing.is_finished(index),
            resumed: &|index, plan| writing.resumed(backend, index, plan),
            finished: Some(sender),
            fallbacks: &fallbacks,
        };
        let computed = quantize_blocks(backend, job, surroundings, timing, progress);
        fallbacks.warn(progress);
        let written = timing.measure("write", || thread.join());
        // What stopped the writing stopped the computing too, and says why.
        written.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        computed
    })
}
