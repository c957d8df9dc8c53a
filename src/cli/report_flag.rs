//! `--report FILE`: the result as a page, next to what stdout gets.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::checkpoint::{
    AtomCheckpoint, Destination, FileKind, Inputs, OutputFile, Source, is_atom,
};
use crate::pipeline;
use crate::report::html::{Shown, is_page, page};
use crate::{Error, Result};

/// For commands that have `--overwrite` for a result of their own.
#[derive(Args, Debug)]
pub(crate) struct ReportFlag {
    /// Write the result as a page of HTML too, which loads nothing from elsewhere
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) report: Option<PathBuf>,
}

/// For the others.
#[derive(Args, Debug)]
pub(crate) struct ReportFlags {
    #[command(flatten)]
    report: ReportFlag,
    /// Replace the page that is there
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
}

/// A page of this program.
pub(crate) const PAGE: FileKind =
    FileKind { name: "a report of atom", recognizes: begins_as_a_page };

fn begins_as_a_page(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = fs_err::File::open(path).and_then(|file| file.take(256).read_to_end(&mut start));
    read.is_ok() && is_page(&start)
}

impl ReportFlags {
    /// As [`ReportFlag::check`].
    pub(crate) fn check(&self, inputs: Inputs) -> Result<Report> {
        self.report.check(self.overwrite, inputs)
    }
}

impl ReportFlag {
    /// Looks whether the page can be written, before the work; `inputs` is what the command reads.
    pub(crate) fn check(&self, overwrite: bool, inputs: Inputs) -> Result<Report> {
        let file = self.report.as_deref();
        let file =
            file.map(|file| OutputFile::check(file, &PAGE, overwrite, inputs)).transpose()?;
        Ok(Report { file })
    }

    /// The same for a command that writes a checkpoint, in which no page may lie.
    pub(crate) fn next_to(&self, output: &pipeline::Output, source: &Source) -> Result<Report> {
        let Destination { out, overwrite, inputs } = &output.destination;
        self.check(*overwrite, inputs.clone().with(source.dir()).with(Some(out)))
    }
}

/// The page that a run writes, if it is to write one.
pub(crate) struct Report {
    file: Option<OutputFile>,
}

impl Report {
    /// Writes the page of an outcome, and of the Atom checkpoint in `model` if one is there. It comes after the result, which is not
    /// lost with it.
    ///
    /// # Errors
    /// If the page cannot be written.
    pub(crate) fn write(
        &self,
        outcome: &impl serde::Serialize,
        model: Option<&Path>,
    ) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let object = serde_json::to_value(outcome)
            .map_err(|error| Error::machine(format!("cannot write the result as JSON: {error}")))?;
        let checkpoint = model.filter(|dir| is_atom(dir)).map(AtomCheckpoint::open).transpose()?;
        let shown = checkpoint.as_ref().map(Shown::of).transpose()?;
        file.write(page(shown.as_ref(), vec![("the result".to_owned(), object)])?.as_bytes())
    }
}
