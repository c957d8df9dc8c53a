/*! `atom quantize`: calibrate, plan and pack in one pass, then measure what it cost. */

use std::ffi::OsString;

use clap::Args;

use super::args::{
    CalibrationFlags, DeviceFlag, EvaluationFlags, ModelFlag, OutputFlags, WindowFlag, with_backend,
};
use super::distill::DistillFlag;
use super::exports::ExportFlag;
use super::limits::{MaxIncrease, MaxPerplexity};
use super::own_text::{self, write_own_text};
use super::perplexity_change::with_perplexity;
use super::ranks::{RanksFlags, Team};
use super::recipe::RecipeFlags;
use super::report_flag::ReportFlag;
use super::target::{OUTLIER_COUNTS, TargetFlags};
use super::{Output, Ui, names};
use crate::checkpoint::Source;
use crate::pipeline::outcome::QuantizeOutcome;
use crate::pipeline::{self, Calibration, Quantization, distill};
use crate::printable::printable;
use crate::progress::{Progress, Silent};
use crate::recipe::Recipe;
use crate::report::Exported;
use crate::text::Evaluation;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom quantize --model tiny-llama --samples 8 --seq-len 256
  atom quantize --model llama-2-7b --calib wikitext2 --dataset wikitext2
  atom quantize --model org/SmolLM2@v1.0 --calib wikitext2,c4 --samples 128
  atom quantize --model ./SmolLM2 --calib wiki.jsonl --group 64 --outliers 64
  atom quantize --model ./SmolLM2 --calib self --seq-len 1024
  atom quantize --model ./SmolLM2 --recipe paper --no-gptq --dry-run
  atom quantize --model ./SmolLM2 --recipe w4a16 --export compressed-tensors
  atom quantize --model ./SmolLM2 --calib wiki.jsonl --distill
  atom quantize --model ./SmolLM2 --target-bits 4.5 --json > report.json

The first takes seconds and shows the way; a checkpoint worth keeping takes the default 128 windows \
of 2048 tokens. Narrow models gain from smaller groups and more outliers than the default.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    #[command(flatten)]
    output: OutputFlags,
    /// Check everything that can be checked in seconds, say what would be done, and stop
    #[arg(long, help_heading = "Output", conflicts_with = "target")]
    dry_run: bool,
    #[command(flatten)]
    export: ExportFlag,
    #[command(flatten)]
    recipe: RecipeFlags,
    #[command(flatten)]
    target: TargetFlags,
    /// Outlier counts to choose among, in channels of a site [default: 0,32,64,128 and the recipe's]
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        requires = "target",
        help_heading = "Allocation"
    )]
    outlier_counts: Option<Vec<usize>>,
    #[command(flatten)]
    calibration: CalibrationFlags,
    #[command(flatten)]
    training: DistillFlag,
    #[command(flatten, next_help_heading = "Calibration")]
    length: WindowFlag,
    #[command(flatten)]
    evaluation: EvaluationFlags,
    #[command(flatten)]
    max_ppl: MaxPerplexity,
    #[command(flatten)]
    max_increase: MaxIncrease,
    #[command(flatten)]
    report: ReportFlag,
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    pub(crate) ranks: RanksFlags,
}

/// A quantization but for its calibration, which the model may first have to write.
struct Work<'a> {
    source: &'a Source,
    recipe: &'a Recipe,
    output: &'a pipeline::Output,
    evaluation: Option<Evaluation>,
}

impl Work<'_> {
    fn on<'c>(&'c self, calibration: &'c Calibration) -> Quantization<'c> {
        let Self { source, recipe, output, evaluation } = self;
        Quantization { source, calibration, recipe, output, evaluation: evaluation.as_ref() }
    }
}

pub(crate) fn run(
    arguments: &Arguments,
    typed: &[OsString],
    ui: &Ui,
    output: &Output,
) -> Result<()> {
    // What was typed is looked at before a device, which takes a moment to open.
    let recipe = arguments.recipe.resolve()?;
    arguments.training.check(arguments.length.seq_len)?;
    if arguments.dry_run {
        return on_rank(arguments, recipe, &Team::alone(), ui, output);
    }
    let ranks = &arguments.ranks;
    ranks.share(&arguments.device, typed, ui, |team| on_rank(arguments, recipe, team, ui, output))
}

/// The part of one rank.
fn on_rank(
    arguments: &Arguments,
    recipe: Recipe,
    team: &Team,
    ui: &Ui,
    output: &Output,
) -> Result<()> {
    let backend = team.open(&arguments.device)?;
    arguments.training.check_ranks(&backend)?;
    let hub = arguments.model.hub(ui)?;
    let source = team.first_alone(|| arguments.model.source(&hub, ui))?;
    let calibration = team.first_alone(|| arguments.calibration.load(&arguments.length, &hub))?;
    own_text::check_ranks(&calibration, &backend)?;
    let evaluation =
        team.first_alone(|| arguments.evaluation.load(arguments.length.seq_len, &hub))?;
    let inputs = arguments.calibration.inputs().and(arguments.evaluation.inputs());
    let inputs = inputs.with(arguments.recipe.file());
    let default = || Ok(names::checkpoint_out(&arguments.model.model, &recipe));
    let destination = arguments.output.destination(default, inputs)?;
    let report = arguments.report.next_to(&destination, &source)?;
    let allocating = arguments.target.allocating(arguments.outlier_counts.clone());
    if allocating.is_some() && arguments.training.distill.is_some() {
        return Err(Error::usage("--distill does not go with a target of bits or size")
            .hint("quantize first, then run `atom distill` on the checkpoint"));
    }
    arguments.export.check(&source, &recipe, &destination, allocating.is_some(), ui)?;
    let work = Work { source: &source, recipe: &recipe, output: &destination, evaluation };
    if arguments.dry_run {
        let found = with_backend!(&backend, ui, backend => {
            pipeline::dry_run(backend, &work.on(&calibration), ui)
        })?;
        return output.write(&found);
    }
    let name = printable(source.name());
    ui.info(&format!("quantizing {name}\n{}", crate::recipe::lines(&recipe)));
    let outcome = with_backend!(&backend, ui, backend => {
        if calibration.text.unwritten(calibration.samples)?.is_some() {
            // The model's own text takes long: what would be refused after it is refused now.
            pipeline::dry_run(backend, &work.on(&calibration), &Silent)?;
        }
        let calibration = write_own_text(backend, &source, calibration, ui)?;
        let quantization = work.on(&calibration);
        let outcome = match &allocating {
            None => match arguments.training.distill {
                Some(tokens) => {
                    let (outcome, distilled) =
                        distill::quantize_and_distill(backend, &quantization, tokens, ui)?;
                    outcome.distilled(distilled)
                }
                None => pipeline::quantize(backend, &quantization, ui)?,
            },
            Some(allocating) => {
                let counts = arguments.outlier_counts.as_deref().unwrap_or(&OUTLIER_COUNTS);
                pipeline::quantize_to_target(backend, &quantization, counts, allocating, ui)?
            }
        };
        with_perplexity(backend, &source, outcome, quantization.evaluation, ui)?
    });
    if !team.is_first() {
        return Ok(());
    }
    let exports = arguments.export.run(&outcome, &destination, ui)?;
    ui.close();
    output.write(&Exported { outcome: &outcome, exports: &exports })?;
    report.write(&outcome, Some(&outcome.out))?;
    check(&outcome, &arguments.max_ppl, &arguments.max_increase)
}

/// Holds the measured perplexity against the limits, after the outcome has been written.
pub(crate) fn check(
    outcome: &QuantizeOutcome,
    max_ppl: &MaxPerplexity,
    max_increase: &MaxIncrease,
) -> Result<()> {
    match &outcome.perplexity {
        Some(change) => {
            max_ppl.check(change.after)?;
            max_increase.check(change.before, change.after)
        }
        None => Ok(()),
    }
}
