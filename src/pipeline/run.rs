/*! A whole run: from a source and a calibration to a finished checkpoint, block by block.

`quantize` measures channel energies on the way, `pack` reads them from a file; everything after
that is the same code, so both give the same bytes. */

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use super::ahead::one_ahead;
use super::block::{BlockQuantizer, QuantizedBlock};
use super::calibrate::{Provenance, Statistics, measure_block};
use super::fallbacks::Fallbacks;
use super::in_turn::beside_bytes;
use super::load::{
    BlockWeights, attention_spec, check_levels, expect, key_mean_spec, quantized_block, read_sites,
    source_block,
};
use super::manifest::{Manifest, SourceRecord};
use super::outcome::{LinearOutcome, QuantizeOutcome};
use super::plan::{BlockPlan, LinearPlan, bits_per_weight};
use super::stream::Stream;
use super::timing::{Timing, peak_rss_bytes};
use super::underflow::{check_activations, check_weights};
use super::{Evaluation, Output, evaluate_change};
use crate::backend::{AttentionSpec, Backend};
use crate::checkpoint::linear::{order_spec, order_tensor, specs, to_tensors};
use crate::checkpoint::{DoneBlock, FORMAT_VERSION, Options, SideFile, Source, TensorSpec, Writer};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;
use crate::{Error, Kind, Result};

/// Everything a run is decided by.
pub struct Job<'a> {
    /// The model.
    pub source: &'a Source,
    /// Its network.
    pub architecture: Architecture,
    /// Stored names of the tensors that have no part in it and are left out.
    pub ignored: Vec<String>,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// What becomes of every block.
    pub blocks: Vec<BlockPlan>,
    /// Calibration windows, `[samples, seq_len]`.
    pub tokens: Vec<u32>,
    /// Where they came from.
    pub provenance: Provenance,
}

impl Job<'_> {
    /// Refuses a source whose tensors are not what its config says, before any work.
    pub fn check_tensors(&self) -> Result<()> {
        for (name, shape) in self.architecture.tensors() {
            expect(self.source, &name, &shape)?;
        }
        Ok(())
    }

    /// Refuses a NaN or infinity in a tensor that is kept: such tensors are few, and the output head
    /// would otherwise be looked at after all the work.
    pub fn check_kept(&self, progress: &dyn Progress) -> Result<()> {
        for name in self.kept_names() {
            let tensor = self.source.tensor(&name)?;
            tensor.check_finite(&|| progress.check_stop())?;
            tensor.release();
        }
        Ok(())
    }

    /// The output's tensors, in the order they are stored.
    pub fn tensor_specs(&self) -> Result<Vec<TensorSpec>> {
        let mut all = vec![self.kept(EMBEDDING)?];
        for (index, block) in self.blocks.iter().enumerate() {
            for (name, _) in self.architecture.beside_linears(index) {
                all.push(self.kept(&name)?);
            }
            if self.recipe.kv().is_centered() {
                all.push(key_mean_spec(&self.architecture, index));
            }
            for site in block {
                all.push(order_spec(&site.name, site.width()));
                for linear in &site.linears {
                    if linear.bits == 16 {
                        all.push(self.kept(&format!("{}.weight", linear.name))?);
                    } else {
                        all.extend(specs(&linear.name, linear.rows, &site.weights(linear)));
                    }
                }
            }
        }
        all.push(self.kept(FINAL_NORM)?);
        if !self.architecture.tied {
            all.push(self.kept(self.architecture.head_name())?);
        }
        Ok(all)
    }

    /// Bytes of what is in the output whatever the plan: the tensors beside the linears, and the files
    /// beside the shards.
    pub fn kept_bytes(&self) -> Result<u64> {
        let mut bytes = self.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        for name in self.kept_names() {
            bytes += self.kept(&name)?.bytes();
        }
        Ok(bytes)
    }

    /// The tensors beside the linears; a tied head once.
    fn kept_names(&self) -> Vec<String> {
        let blocks = 0..self.blocks.len();
        let beside = blocks.flat_map(|block| self.architecture.beside_linears(block));
        let mut names = vec![EMBEDDING.to_owned(), FINAL_NORM.to_owned()];
        if !self.architecture.tied {
            names.push(self.architecture.head_name().to_owned());
        }
        names.extend(beside.map(|(name, _)| name));
        names
    }

    /// A tensor that stays as the source has it.
    fn kept(&self, name: &str) -> Result<TensorSpec> {
        let tensor = self.source.tensor(name)?;
        Ok(TensorSpec::new(name, tensor.dtype, tensor.shape))
    }

    /// How the output is written.
    pub fn options(&self, output: &Output) -> Result<Options> {
        let side_bytes = self.source.side_files()?.copied.iter().map(SideFile::bytes).sum();
        Ok(Options { resume: output.resume, side_bytes, ..Options::default() })
    }

    /// Tells how far the run is that is continued, if one is.
    fn announce_resumed(&self, done: &[DoneBlock], progress: &dyn Progress) {
        if !done.is_empty() {
            progress.info(&format!(
                "continuing an unfinished run of the same job: {} of {} blocks are finished",
                finished_blocks(done),
                self.blocks.len()
            ));
        }
    }

    /// What a resumed run must agree on.
    pub fn identity(&self) -> Result<Value> {
        let mut identity = json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "source": self.source.fingerprint()?,
            "recipe": self.recipe,
            "calibration": self.provenance,
            "blocks": self.blocks,
        });
        if !self.ignored.is_empty() {
            identity["ignored_tensors"] = json!(self.ignored);
        }
        Ok(identity)
    }

    /// `config.json` of the output.
    fn config(&self) -> Value {
        let mut config = self.source.config().clone();
        if !self.architecture.tied && config.get("tie_word_embeddings") == Some(&json!(true)) {
            // The stored head is another than the embedding, whatever the source says.
            config["tie_word_embeddings"] = json!(false);
        }
        config["quantization_config"] = json!({
            "quant_method": "atom",
            "format_version": FORMAT_VERSION,
            "bits": self.recipe.bits,
            "act_bits": self.recipe.act_bits,
            "kv_bits": self.recipe.kv_bits,
            "format": self.recipe.format,
            "group": self.recipe.group,
            "outliers": self.recipe.outliers,
        });
        config
    }

    /// What `atom.json` of the output says. `errors` are those of the quantized linears.
    fn manifest(&self, errors: &[(String, f64)]) -> Result<Manifest> {
        let errors: HashMap<&str, f64> =
            errors.iter().map(|(name, error)| (name.as_str(), *error)).collect();
        let mut blocks = self.blocks.clone();
        for linear in blocks.iter_mut().flatten().flat_map(|site| &mut site.linears) {
            linear.error = errors.get(linear.name.as_str()).copied();
        }
        Ok(Manifest {
            format_version: FORMAT_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            source: SourceRecord {
                name: self.source.name().to_owned(),
                fingerprint: self.source.fingerprint()?,
                bytes: self.source.total_bytes(),
                hub: self.source.place().cloned(),
                ignored_tensors: self.ignored.clone(),
            },
            calibration: self.provenance.clone(),
            recipe: self.recipe.clone(),
            kv: self.recipe.kv(),
            bits_per_weight: bits_per_weight(&self.blocks),
            blocks,
        })
    }

    /// Tensors that stay as they are, with their bytes.
    fn copies(
        &self,
        names: impl IntoIterator<Item = String>,
        progress: &dyn Progress,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        names
            .into_iter()
            .map(|name| {
                let tensor = self.source.tensor(&name)?;
                // A NaN here would spoil the model as surely as one in a linear.
                tensor.check_finite(&|| progress.check_stop())?;
                Ok((name, tensor.copied()))
            })
            .collect()
    }
}

/// Quantizes and writes the whole model. What is `known` of the blocks is not measured again.
pub fn run<B: Backend>(
    backend: &B,
    job: &Job,
    output: &Output,
    evaluation: Option<&Evaluation>,
    progress: &dyn Progress,
    known: Option<&[Statistics]>,
) -> Result<QuantizeOutcome> {
    let start = Instant::now();
    let mut timing = Timing::default();
    check_levels(backend, &job.blocks)?;
    job.check_tensors()?;
    job.check_kept(progress)?;
    let destination = output.protecting(job.source, []);
    let options = job.options(output)?;
    let (specs, identity) = (job.tensor_specs()?, job.identity()?);
    let check_stop = || progress.check_stop();
    let mut writer = Writer::create(&destination, specs, &identity, options, &check_stop)?;
    job.announce_resumed(writer.done(), progress);
    let written = write_tensors(backend, job, &mut writer, progress, &mut timing, known);
    let Written { errors, resumed_blocks } = match written {
        Ok(written) => written,
        Err(error) => {
            match finished_blocks(writer.done()) {
                0 => writer.discard(),
                done if error.kind() != Kind::Interrupted => progress.info(&format!(
                    "{done} finished blocks are kept; the same command, or --resume, continues after them"
                )),
                _ => {}
            }
            return Err(error);
        }
    };
    // A weight that was written to meanwhile may be in the streams and not in the fingerprint.
    job.source.check_unchanged()?;
    let out = writer.out().to_owned();
    let out_bytes = job.tensor_specs()?.iter().map(TensorSpec::bytes).sum();
    let side_files = job.source.side_files()?;
    side_files.left_out.iter().for_each(|why| progress.warn(why));
    timing.measure("write", || {
        writer.finish(&job.config(), job.manifest(&errors)?.content(), &side_files.copied)
    })?;

    let perplexity = match evaluation {
        None => None,
        Some(evaluation) => {
            let measured = timing.measure("evaluate", || {
                evaluate_change(backend, job.source, &out, evaluation, progress)
            });
            Some(measured.map_err(|error| not_measured(error, &out))?)
        }
    };
    let linear = |linear: &LinearPlan, error: f64| LinearOutcome {
        name: linear.name.clone(),
        bits: linear.bits,
        error,
    };
    let planned = job.blocks.iter().flatten().flat_map(|site| &site.linears);
    Ok(QuantizeOutcome {
        out,
        model: job.source.name().to_owned(),
        recipe: job.recipe.clone(),
        seconds: start.elapsed().as_secs_f64(),
        stage_seconds: timing.finish(),
        peak_rss_bytes: peak_rss_bytes(),
        peak_gpu_bytes: backend.peak_bytes(),
        bits_per_weight: bits_per_weight(&job.blocks),
        source_bytes: job.source.total_bytes(),
        out_bytes,
        device: backend.device(),
        resumed_blocks,
        linears: planned
            .filter(|linear| linear.bits < 16)
            .zip(&errors)
            .map(|(plan, (_, error))| linear(plan, *error))
            .collect(),
        perplexity,
        allocation: None,
    })
}

/// An error of the measurement that follows the work: the work is not lost with it.
fn not_measured(error: Error, out: &Path) -> Error {
    let out = out.display();
    error
        .context(format!("the checkpoint {out} is complete, but its perplexity was not measured"))
        .hint(format!("measure it with `atom eval-ppl --model {out}`"))
}

/// What is known once every tensor is on the disk.
struct Written {
    /// `(linear, error)` of every quantized linear.
    errors: Vec<(String, f64)>,
    /// Blocks that an earlier run had finished.
    resumed_blocks: usize,
}

/// Quantizes block by block, and writes every tensor of the output behind the arithmetic.
fn write_tensors<B: Backend>(
    backend: &B,
    job: &Job,
    writer: &mut Writer,
    progress: &dyn Progress,
    timing: &mut Timing,
    known: Option<&[Statistics]>,
) -> Result<Written> {
    let done = writer.done().to_vec();
    let writer = Mutex::new(writer);
    // In the host's memory, a copy of the embedding is not to stand beside a block's Hessians; beside the
    // work of a GPU it costs nothing.
    if B::ON_HOST {
        timing.measure("write", || write_kept(job, &done, &writer, progress))?;
    }
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(1);
        let write = || {
            if !B::ON_HOST {
                write_kept(job, &done, &writer, progress)?;
            }
            write_behind(backend, job, &writer, receiver, progress)
        };
        let writing = std::thread::Builder::new().spawn_scoped(scope, write).map_err(no_thread)?;
        let fallbacks = Fallbacks::default();
        let run =
            Blocks { backend, job, done: &done, writer: &writer, fallbacks: &fallbacks, progress };
        let computed = run.quantize(timing, known, sender);
        fallbacks.warn(progress);
        let written = timing.measure("write", || writing.join());
        // What stopped the writing stopped the computing too, and says why.
        written.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        computed
    })
}

/// What is said where no thread can be started.
pub(super) fn no_thread(error: std::io::Error) -> Error {
    Error::machine(format!("cannot start a thread: {error}"))
        .hint("raise the limits on processes and memory (`ulimit -u`, `ulimit -v`)")
}

/// A writer that two threads reach; a panic of one is passed on by the other.
fn locked<'a, 'w>(writer: &'a Mutex<&'w mut Writer>) -> std::sync::MutexGuard<'a, &'w mut Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many of the units that were written are blocks.
pub fn finished_blocks(done: &[DoneBlock]) -> usize {
    done.iter().filter(|done| !KEPT.contains(&done.block.as_str())).count()
}

/// What is written beside the blocks: the embedding, the last norm, and the head if it is another.
const KEPT: [&str; 3] = ["embedding", "norm", "head"];

/// Writes the tensors beside the blocks, while the first block is computed.
fn write_kept(
    job: &Job,
    done: &[DoneBlock],
    writer: &Mutex<&mut Writer>,
    progress: &dyn Progress,
) -> Result<()> {
    let head = job.architecture.head_name();
    for (unit, name) in KEPT.into_iter().zip([EMBEDDING, FINAL_NORM, head]) {
        let tied_head = unit == KEPT[2] && job.architecture.tied;
        if !tied_head && done.iter().all(|done| done.block != unit) {
            let tensors = job.copies([name.to_owned()], progress)?;
            locked(writer).write_block(unit, tensors, Value::Null)?;
        }
    }
    Ok(())
}

/// A block on its way to the disk.
struct Finished<B: Backend> {
    index: usize,
    block: QuantizedBlock<B>,
    statistics: Statistics,
}

/// Packs and writes finished blocks as they come.
fn write_behind<B: Backend>(
    backend: &B,
    job: &Job,
    writer: &Mutex<&mut Writer>,
    blocks: Receiver<Finished<B>>,
    progress: &dyn Progress,
) -> Result<()> {
    for Finished { index, block: QuantizedBlock { sites, errors }, statistics } in blocks {
        let Statistics { key_mean, energies } = statistics;
        let beside = job.architecture.beside_linears(index);
        let mut tensors = job.copies(beside.into_iter().map(|(name, _)| name), progress)?;
        if job.recipe.kv().is_centered() {
            let bytes = key_mean.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((job.architecture.key_mean_name(index), bytes));
        }
        let planned = job.blocks[index].iter().zip(&energies);
        for ((site, energy), quantized) in planned.zip(sites) {
            let order = &quantized.format.order;
            tensors.push(order_tensor(&site.name, order));
            for (linear, weights) in site.linears.iter().zip(quantized.linears) {
                match weights {
                    Some(weights) => {
                        let weights = backend.fetch(weights)?;
                        let source = job.source.tensor(&format!("{}.weight", linear.name))?;
                        check_weights(&linear.name, &weights, &source, order, energy)?;
                        tensors.extend(to_tensors(&linear.name, &weights));
                    }
                    None => {
                        let name = format!("{}.weight", linear.name);
                        tensors.extend(job.copies([name], progress)?);
                    }
                }
            }
        }
        let name = job.architecture.block_name(index);
        locked(writer).write_block(&name, tensors, json!(errors))?;
    }
    Ok(())
}

/// The blocks of a run, and what each needs.
struct Blocks<'a, 'w, B: Backend> {
    backend: &'a B,
    job: &'a Job<'a>,
    /// Finished by an earlier run.
    done: &'a [DoneBlock],
    writer: &'a Mutex<&'w mut Writer>,
    fallbacks: &'a Fallbacks,
    progress: &'a dyn Progress,
}

impl<B: Backend> Blocks<'_, '_, B> {
    /// Quantizes every block that is not done, and sends it on to be written.
    fn quantize(
        &self,
        timing: &mut Timing,
        known: Option<&[Statistics]>,
        finished: SyncSender<Finished<B>>,
    ) -> Result<Written> {
        let Self { backend, job, progress, .. } = *self;
        let Job { architecture, recipe, .. } = job;
        let seq_len = job.provenance.seq_len;
        let attention = attention_spec(architecture, recipe.kv(), seq_len);
        let full_attention = AttentionSpec { kv: KvFormat::FULL, ..attention.clone() };
        let quantizer = BlockQuantizer {
            backend,
            architecture,
            attention: &attention,
            full_attention: &full_attention,
            damping: recipe.damping,
            correction: recipe.correction,
            expert_tokens: recipe.expert_tokens,
            fallbacks: self.fallbacks,
            progress,
        };
        let in_turn = recipe.gptq && recipe.sequential;
        let tokens = &job.tokens;
        let beside_bytes = if in_turn { beside_bytes(architecture, tokens.len()) } else { 0 };
        let embed =
            || Stream::embed(backend, job.source, architecture, tokens, seq_len, beside_bytes);
        // The source's is measured on, or goes with the quantized one.
        let mut source = (known.is_none() || in_turn).then(embed).transpose()?;
        let mut quantized = recipe.gptq.then(embed).transpose()?;
        progress.begin("quantize", job.blocks.len());
        let mut written = Written { errors: Vec::new(), resumed_blocks: 0 };
        let load =
            |index| BlockWeights::load(backend, job.source, architecture, index, |_, _| true);
        one_ahead(0..job.blocks.len(), load, |index, next| {
            // Nobody needs the states after the last block.
            let last = index + 1 == job.blocks.len();
            let weights = timing.measure("load", next)?;
            let statistics = match (known, &mut source) {
                (Some(known), _) => known[index].clone(),
                (None, Some(source)) => timing.measure("calibrate", || {
                    let attention = &full_attention;
                    // In turn, the source's stream moves with the quantized one.
                    let advance = !in_turn;
                    measure_block(
                        backend,
                        architecture,
                        attention,
                        &weights,
                        source,
                        advance,
                        progress,
                    )
                })?,
                (None, None) => {
                    unreachable!("what is not known is measured on the source's stream")
                }
            };
            let plan = &job.blocks[index];
            check_activations(architecture, index, plan, &statistics.energies, tokens.len())?;
            let (resumed, block) = match (self.resumed(index)?, &mut source, &mut quantized) {
                (Some(block), _, _) => (true, block),
                (None, Some(source), Some(quantized)) if in_turn => {
                    let streams = [source, quantized];
                    let block = quantizer.quantize_in_turn(
                        &weights,
                        plan,
                        &statistics,
                        streams,
                        last,
                        timing,
                    )?;
                    (false, block)
                }
                (None, _, quantized) => {
                    let stream = quantized.as_ref();
                    (false, quantizer.quantize(&weights, plan, &statistics, stream, timing)?)
                }
            };
            written.resumed_blocks += usize::from(resumed);
            written.errors.extend(block.errors.clone());
            let worst = worst_of(&block.errors);
            // In turn, both streams are through with the block, if it was not replayed.
            let source = source.as_mut().filter(|_| in_turn && resumed && !last);
            let quantized = quantized.as_mut().filter(|_| (!in_turn || resumed) && !last);
            let check_stop = || progress.check_stop();
            if let Some(stream) = source {
                timing.measure("propagate", || {
                    let block = source_block(backend, architecture, &weights)?;
                    stream.advance(backend, &full_attention, &block, check_stop)
                })?;
            }
            let laid_out = match &quantized {
                None => None,
                Some(_) => Some(timing.measure("propagate", || {
                    let key_mean = quantizer.key_mean(&statistics);
                    quantized_block(backend, architecture, &weights, &block.sites, key_mean)
                })?),
            };
            drop(weights);
            if !resumed {
                // It fails if the writing has failed, which is then the error that counts.
                let sent = Finished { index, block, statistics };
                let sent = timing.measure("write", || finished.send(sent));
                sent.map_err(|_| Error::machine("the checkpoint could not be written"))?;
            }
            if let (Some(stream), Some(block)) = (quantized, laid_out) {
                timing.measure("propagate", || {
                    stream.advance(backend, &attention, &block, check_stop)?;
                    backend.wait()
                })?;
            }
            backend.trim();
            progress.advance(&worst);
            Ok(())
        })?;
        progress.end();
        progress.check_stop()?;
        Ok(written)
    }

    /// Block `index` as an earlier run left it, if one did.
    fn resumed(&self, index: usize) -> Result<Option<QuantizedBlock<B>>> {
        let name = self.job.architecture.block_name(index);
        let Some(done) = self.done.iter().find(|done| done.block == name) else {
            return Ok(None);
        };
        let errors = serde_json::from_value(done.extra.clone())
            .map_err(|error| Error::input(format!("work of block {index}: {error}")))?;
        let sites = read_sites(&**locked(self.writer), &self.job.blocks[index])?;
        let sites = sites.into_iter().map(|site| site.restore(self.backend));
        Ok(Some(QuantizedBlock { sites: sites.collect::<Result<_>>()?, errors }))
    }
}

fn worst_of(errors: &[(String, f64)]) -> String {
    match errors.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
        None => "kept as it was".to_owned(),
        Some((name, error)) => {
            let short = name.rsplit('.').next().unwrap_or(name);
            format!("worst output error {error:.3} ({short})")
        }
    }
}
