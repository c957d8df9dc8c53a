/*! `--export`: exports at the end of a run that writes a checkpoint. */

use std::path::{Path, PathBuf};

use clap::Args;

use super::values;
use crate::card::Perplexity;
use crate::checkpoint::{AtomCheckpoint, Destination, DirectoryKind, Source};
use crate::export::{self, Export, ExportOutcome, ExportedModel, Format};
use crate::network::network;
use crate::pipeline::Output;
use crate::pipeline::outcome::{PerplexityChange, QuantizeOutcome};
use crate::pipeline::plan::plan_network;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::{Error, Result};

#[derive(Args, Debug)]
pub(crate) struct ExportFlag {
    /// Export the finished checkpoint as well, to <out>-<format> for each of these formats
    #[arg(
        long = "export",
        value_name = "FORMAT,...",
        value_delimiter = ',',
        value_parser = values::export_format(),
        help_heading = "Output"
    )]
    formats: Vec<&'static dyn Format>,
}

impl ExportFlag {
    /// Refuses exports that cannot be made of what `recipe` will make of `source`, or written where they go, before any
    /// work. With `allocating`, widths and outliers are not known yet.
    ///
    /// # Errors
    /// Input: settings in the way. Usage: an output that cannot be written.
    pub(crate) fn check(
        &self,
        source: &Source,
        recipe: &Recipe,
        output: &Output,
        allocating: bool,
        progress: &dyn Progress,
    ) -> Result<()> {
        if self.formats.is_empty() {
            return Ok(());
        }
        let architecture = network(source, progress)?.architecture;
        let blocks = plan_network(recipe, &architecture)?;
        for format in &self.formats {
            if allocating && !format.recipes().is_empty() {
                let name = format.name();
                let message = format!(
                    "--export {name} needs widths and outliers that are known before the run, and a target chooses them"
                );
                return Err(Error::usage(message)
                    .hint(format!("quantize first, then run `atom export --format {name}`")));
            }
            export::check_planned(*format, source, &architecture, &blocks, recipe)?;
            let mut destination = export_destination(output, *format);
            source.dir().into_iter().for_each(|dir| destination.inputs.add(dir));
            destination.check_for(DirectoryKind::Export)?;
        }
        Ok(())
    }

    /// Exports the checkpoint that a run has finished.
    ///
    /// # Errors
    /// Those of the exports; the checkpoint stays.
    pub(crate) fn run(
        &self,
        outcome: &QuantizeOutcome,
        output: &Output,
        progress: &dyn Progress,
    ) -> Result<Vec<ExportOutcome>> {
        let checkpoint = &outcome.out;
        let perplexities: Vec<_> =
            outcome.perplexity.iter().map(PerplexityChange::measured).collect();
        let export = |format: &&'static dyn Format| {
            let destination = export_destination(output, *format);
            one(checkpoint, *format, &destination, &perplexities, progress).map_err(|error| {
                let dir = checkpoint.display();
                error.context(format!("{dir} is complete, but not its export")).hint(format!(
                    "go on with `atom export {dir} --format {} --out {}`",
                    format.name(),
                    destination.out.display()
                ))
            })
        };
        self.formats.iter().map(export).collect()
    }
}

fn one(
    checkpoint: &Path,
    format: &'static dyn Format,
    destination: &Destination,
    perplexities: &[Perplexity],
    progress: &dyn Progress,
) -> Result<ExportOutcome> {
    let checkpoint = AtomCheckpoint::open(checkpoint)?;
    let model = ExportedModel::open(&checkpoint, None, progress)?;
    export::export(&Export { model: &model, format, destination, resume: false, perplexities })
}

/// `<out>-<format>`, next to the checkpoint.
fn export_destination(output: &Output, format: &dyn Format) -> Destination {
    let mut destination = output.destination.clone();
    let name = destination.out.file_name().unwrap_or_default().to_string_lossy();
    let out: PathBuf = destination.out.with_file_name(format!("{name}-{}", format.name()));
    destination.out = out;
    destination
}
