/*! `atom report`: a page of HTML about a checkpoint, with results that other commands have printed. */

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::report_flag::PAGE;
use super::{Output, Ui};
use crate::checkpoint::{Inputs, OutputFile, read_named};
use crate::hub::Hub;
use crate::network::Model;
use crate::printable::printable;
use crate::report::Report;
use crate::report::html::{Shown, page};
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom report tiny-llama-atom-w4a4-g128 -o report.html
  atom report ./SmolLM2-atom-w4a4-g128 --with ppl.json,tasks.json -o page.html";

/// The longest result that is read.
const LIMIT: u64 = 256 << 20;

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Directory of an Atom checkpoint, or its name in the Hub's cache
    #[arg(value_name = "ATOM")]
    checkpoint: String,
    /// Results to show with it: what quantize, pack, verify, eval-ppl, eval-tasks and bench print with --json, of the
    /// checkpoint and, to compare, of its source
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    with: Vec<PathBuf>,
    /// The page [default: ./<name>-report.html]
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Replace the page that is there
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
}

/// The result of `atom report`.
#[derive(Serialize)]
struct ReportOutcome {
    /// The page.
    out: PathBuf,
}

impl Report for ReportOutcome {
    fn text(&self) -> String {
        format!("wrote {}\n", printable(&self.out.display().to_string()))
    }
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let hub = Hub::cached("atom report", ui)?;
    let Model::Atom(checkpoint) = Model::open(&hub, &arguments.checkpoint, None)? else {
        return Err(Error::input(format!("{} is not an Atom checkpoint", arguments.checkpoint))
            .hint("give a directory that `atom quantize` has written; what was measured of a source goes with it, after --with"));
    };
    let out = arguments.out.clone();
    let out = out.unwrap_or_else(|| PathBuf::from(format!("./{}-report.html", checkpoint.name())));
    let inputs = Inputs::default().with(checkpoint.dir());
    let inputs = arguments.with.iter().fold(inputs, |inputs, file| inputs.with(Some(file)));
    let file = OutputFile::check(&out, &PAGE, arguments.overwrite, inputs)?;
    let results = arguments.with.iter().map(|file| read(file)).collect::<Result<_>>()?;
    let shown = Shown::of(&checkpoint)?;
    file.write(page(Some(&shown), results)?.as_bytes())?;
    output.write(&ReportOutcome { out })
}

/// A result that a command has printed, with its file's name.
fn read(file: &Path) -> Result<(String, Value)> {
    let shown = file.display().to_string();
    let content = read_named(file, LIMIT)?;
    let object = serde_json::from_slice(&content).map_err(|error| {
        Error::input(format!("{shown} is not one JSON object: {error}"))
            .hint("give what a command prints on stdout with --json")
    })?;
    Ok((shown, object))
}
