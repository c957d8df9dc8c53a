/*! An export from the checks to the finished output, whatever the format. */

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use super::card::card;
use super::format::{Container, Contents, Format, Part};
use super::model::{ExportedModel, as_input};
use super::obstacle::check;
use super::outcome::{ExportDryRun, ExportOutcome};
use crate::card::{Perplexity, upload_command};
use crate::checkpoint::{
    Destination, DirectoryKind, FORMAT_VERSION, Options, SideFile, SideFiles, SingleFile,
    SourceRecord, TensorBytes, TensorFiles, TensorSpec, Writer, is_legal_file, sha256_hex,
};
use crate::machine::peak_rss_bytes;
use crate::network::no_thread;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// Tensors are synced and noted as finished in units of at least so many bytes; those of tests are small.
const UNIT_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };

/// What is exported, as what, and where to.
pub struct Export<'a> {
    /// The checkpoint.
    pub model: &'a ExportedModel<'a>,
    /// The format.
    pub format: &'a dyn Format,
    /// The output. The checkpoint's directory is added to what may not be touched.
    pub destination: &'a Destination,
    /// Never throw an unfinished export away.
    pub resume: bool,
    /// What was measured of the checkpoint, for the model card.
    pub perplexities: &'a [Perplexity],
}

/// What `atom-export.json` says, next to hashes of every tensor and file.
#[derive(Serialize)]
struct ExportManifest<'a> {
    format_version: u64,
    tool_version: &'static str,
    format: &'static str,
    /// The file of a format of one file.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    checkpoint: Value,
    source: &'a SourceRecord,
    recipe: &'a Recipe,
}

/// Everything that is known before the first tensor is made.
struct Prepared<'a> {
    parts: Vec<Part<'a>>,
    /// How many tensors they are.
    tensors: usize,
    files: TensorFiles,
    /// The content of `config.json`, if there is such a file.
    config: Option<Value>,
    destination: Destination,
    side_files: Vec<SideFile>,
    options: Options,
    job: Value,
}

impl<'a> Export<'a> {
    /// Checks everything that can be checked without reading a tensor.
    fn prepare(&self) -> Result<Prepared<'a>> {
        let Self { model, format, resume, .. } = *self;
        let mut destination = self.destination.clone();
        model.checkpoint.dir().into_iter().for_each(|dir| destination.inputs.add(dir));
        destination.check_for(DirectoryKind::Export)?;
        check(format, &model.subject(), &model.checkpoint.title())?;
        let Contents { parts, container } = format.contents(model)?;
        let SideFiles { copied: mut side_files, left_out } = model.checkpoint.side_files()?;
        left_out.iter().for_each(|why| model.progress.warn(why));
        if let Container::File { .. } = container {
            // Tokenizer and configuration are in the file.
            side_files.retain(|file| is_legal_file(&file.name));
        }
        let bytes = parts.iter().map(Part::bytes).sum();
        side_files.push(card(format, model, bytes, self.perplexities));
        let side_bytes = side_files.iter().map(SideFile::bytes).sum();
        let options =
            Options { resume, side_bytes, kind: DirectoryKind::Export, ..Options::default() };
        let mut job = json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "checkpoint": model.checkpoint.fingerprint()?,
            "format": format.name(),
        });
        let mut tensors = parts.iter().map(|part| part.tensors.len()).sum();
        let (files, config) = match container {
            Container::Shards { config } => {
                job["config"] = config.clone();
                (specs(&parts).into(), Some(config))
            }
            Container::File { name, header, offsets, bytes, tensors: count } => {
                tensors = count;
                job["header"] = sha256_hex(&header).into();
                let places = specs(&parts).into_iter().zip(offsets).collect();
                (TensorFiles::Single(SingleFile { name, header, tensors: places, bytes }), None)
            }
        };
        Ok(Prepared { parts, tensors, files, config, destination, side_files, options, job })
    }

    fn manifest(&self, file: Option<String>) -> Result<ExportManifest<'a>> {
        let Self { model, format, .. } = *self;
        Ok(ExportManifest {
            format_version: FORMAT_VERSION,
            tool_version: env!("CARGO_PKG_VERSION"),
            format: format.name(),
            file,
            checkpoint: json!({
                "name": model.checkpoint.name(),
                "sha256": model.checkpoint.fingerprint()?,
            }),
            source: &model.manifest.source,
            recipe: &model.manifest.recipe,
        })
    }
}

fn specs(parts: &[Part<'_>]) -> Vec<TensorSpec> {
    parts.iter().flat_map(|part| part.tensors.clone()).collect()
}

/// Everything that [`export`] would find out before it reads a tensor.
///
/// # Errors
/// Those of [`export`] that need no tensor.
pub fn dry_run(export: &Export<'_>) -> Result<ExportDryRun> {
    let Prepared { tensors, files, destination, options, job, .. } = export.prepare()?;
    let out_bytes = files.specs().map(TensorSpec::bytes).sum();
    let found = Writer::preview(&destination, files, &job, options)?;
    Ok(ExportDryRun {
        out: export.destination.out.clone(),
        checkpoint: export.model.checkpoint.name().to_owned(),
        format: export.format.name(),
        loaded_by: export.format.loaded_by(),
        tensors,
        checkpoint_bytes: export.model.checkpoint.total_bytes(),
        out_bytes,
        needed_disk_bytes: found.needed_bytes,
        free_disk_bytes: found.free_bytes.unwrap_or(u64::MAX),
        finished_tensors: found.done.iter().map(|unit| unit.sha256.len()).sum(),
        notes: export.format.notes(&export.model.subject()),
    })
}

/// Exports a checkpoint.
///
/// # Errors
/// Usage: the output cannot be written. Input: settings in the way, or a damaged checkpoint. Machine: a full disk.
pub fn export(export: &Export<'_>) -> Result<ExportOutcome> {
    let start = Instant::now();
    let Export { model, format, .. } = *export;
    let Prepared { parts, tensors, files, config, destination, side_files, options, job } =
        export.prepare()?;
    let file = match &files {
        TensorFiles::Single(file) => Some(file.name.clone()),
        TensorFiles::Shards(_) => None,
    };
    let check_stop = || model.progress.check_stop();
    let mut writer = Writer::create(&destination, files, &job, options, &check_stop)?;
    let resumed_tensors = writer.done().iter().map(|unit| unit.sha256.len()).sum();
    if resumed_tensors > 0 {
        model.progress.info(&format!(
            "continuing an unfinished export: {resumed_tensors} of {tensors} tensors are written"
        ));
    }
    let written = write_parts(parts, &mut writer, model);
    // A tensor that was written to meanwhile may be in the output under its former hash: nothing is kept.
    if let Err(changed) = model.checkpoint.check_unchanged() {
        writer.discard();
        return Err(changed);
    }
    if let Err(error) = written {
        if writer.done().is_empty() {
            writer.discard();
        }
        return Err(error);
    }
    let out = writer.out().to_owned();
    let out_bytes = writer.finish(config.as_ref(), &export.manifest(file)?, &side_files)?;
    Ok(ExportOutcome {
        upload: upload_command(&export.destination.out),
        out,
        checkpoint: model.checkpoint.name().to_owned(),
        format: format.name(),
        loaded_by: format.loaded_by(),
        tensors,
        checkpoint_bytes: model.checkpoint.total_bytes(),
        out_bytes,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes(),
        resumed_tensors,
        notes: format.notes(&model.subject()),
    })
}

/// Tensors that are synced together, by the name of the first.
struct Unit<'a> {
    name: String,
    parts: Vec<Part<'a>>,
}

/// Divides parts into units; the same parts always give the same units.
fn units(parts: Vec<Part<'_>>) -> Vec<Unit<'_>> {
    let mut units: Vec<Unit<'_>> = Vec::new();
    let mut filled = UNIT_BYTES;
    for part in parts {
        let Some(first) = part.tensors.first() else { continue };
        if filled >= UNIT_BYTES {
            units.push(Unit { name: first.name.clone(), parts: Vec::new() });
            filled = 0;
        }
        filled += part.bytes();
        if let Some(unit) = units.last_mut() {
            unit.parts.push(part);
        }
    }
    units
}

type Made<'a> = (String, Vec<(String, TensorBytes<'a>)>);

/// Makes the units that are not written yet, and writes each while the next is made.
fn write_parts(parts: Vec<Part<'_>>, writer: &mut Writer, model: &ExportedModel<'_>) -> Result<()> {
    let done: Vec<String> = writer.done().iter().map(|unit| unit.block.clone()).collect();
    let mut units = units(parts);
    model.progress.begin("export", units.len());
    units.retain(|unit| {
        let written = done.contains(&unit.name);
        if written {
            model.progress.advance("");
        }
        !written
    });
    let result = std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(0);
        let write = || write_units(receiver, writer, model);
        let thread = std::thread::Builder::new().spawn_scoped(scope, write).map_err(no_thread)?;
        let made = make_units(&units, &sender, model);
        drop(sender);
        let written = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What stopped the writing stopped the making too, and says why.
        written.and(made)
    });
    model.progress.end();
    result
}

fn make_units<'a>(
    units: &[Unit<'a>],
    sender: &SyncSender<Made<'a>>,
    model: &ExportedModel<'_>,
) -> Result<()> {
    for unit in units {
        let made = unit.parts.par_iter().map(|part| {
            model.progress.check_stop()?;
            let names = part.tensors.iter().map(|spec| spec.name.clone());
            Ok(names.zip((part.make)()?).collect::<Vec<_>>())
        });
        let tensors = made.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let closed = |_| Error::machine("the export's writer has stopped");
        sender.send((unit.name.clone(), tensors)).map_err(closed)?;
    }
    Ok(())
}

fn write_units(
    units: Receiver<Made<'_>>,
    writer: &mut Writer,
    model: &ExportedModel<'_>,
) -> Result<()> {
    for (name, tensors) in units {
        writer.write_block(&name, tensors, Value::Null).map_err(as_input)?;
        model.progress.advance("");
    }
    Ok(())
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
