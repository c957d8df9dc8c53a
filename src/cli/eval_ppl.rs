/*! `atom eval-ppl`: perplexity of a source, or of an Atom checkpoint on the integer kernels. */

use std::ffi::OsString;
use std::path::Path;

use clap::Args;

use super::args::{DeviceFlag, ModelFlag, WindowFlag, text_files, with_backend};
use super::limits::MaxPerplexity;
use super::ranks::{RanksFlags, Team};
use super::report_flag::ReportFlags;
use super::{Output, Ui, values};
use crate::Result;
use crate::eval;
use crate::text::{Evaluation, Split, TextSet};

const EXAMPLES: &str = "\
Examples:
  atom eval-ppl --model tiny-llama --dataset sample
  atom eval-ppl --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset wikitext2
  atom eval-ppl --model ./SmolLM2-atom-w4a4-g128 --dataset wikitext2=wiki.raw
  atom eval-ppl --model ./SmolLM2 --dataset wiki.test.jsonl --max-ppl 22 --json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    /// Text to measure on: `sample` (bundled), `wikitext2` (its test part), `ptb` or `c4` (their
    /// validation parts) from the Hub, NAME=FILE (such a set's own file), or a file (text, .jsonl,
    /// .json.gz, .csv, .tsv, .parquet)
    #[arg(long, value_name = "TEXT", default_value = "sample", help_heading = "Evaluation")]
    dataset: String,
    /// Measure on the first N windows of the text only [default: all; of c4 256, drawn as the reference does]
    #[arg(long, value_name = "N", value_parser = values::count, help_heading = "Evaluation")]
    windows: Option<usize>,
    #[command(flatten, next_help_heading = "Evaluation")]
    length: WindowFlag,
    #[command(flatten)]
    max_ppl: MaxPerplexity,
    #[command(flatten)]
    report: ReportFlags,
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    pub(crate) ranks: RanksFlags,
}

pub(crate) fn run(
    arguments: &Arguments,
    typed: &[OsString],
    ui: &Ui,
    output: &Output,
) -> Result<()> {
    let ranks = &arguments.ranks;
    ranks.share(&arguments.device, typed, ui, |team| on_rank(arguments, team, ui, output))
}

/// The part of one rank.
fn on_rank(arguments: &Arguments, team: &Team, ui: &Ui, output: &Output) -> Result<()> {
    let inputs = text_files(&arguments.dataset).with(Some(Path::new(&arguments.model.model)));
    let report = arguments.report.check(inputs)?;
    let backend = team.open(&arguments.device)?;
    let hub = arguments.model.hub(ui)?;
    let model = team.first_alone(|| arguments.model.open(&hub, ui))?;
    let evaluation = Evaluation {
        text: team.first_alone(|| TextSet::load(&arguments.dataset, Split::Evaluation, &hub))?,
        seq_len: arguments.length.seq_len,
        windows: arguments.windows,
    };
    let outcome = with_backend!(&backend, ui, backend => {
        eval::perplexity(backend, &model, &evaluation, ui)
    })?;
    if !team.is_first() {
        return Ok(());
    }
    ui.close();
    output.write(&outcome)?;
    report.write(&outcome, model.dir())?;
    arguments.max_ppl.check(outcome.perplexity)
}
