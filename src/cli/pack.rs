/*! `atom pack`: the checkpoint that a plan describes, then what it cost. */

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

use super::args::{DeviceFlag, EvaluationFlags, ModelFlag, OutputFlags, WindowFlag, with_backend};
use super::distill::DistillFlag;
use super::limits::{MaxIncrease, MaxPerplexity};
use super::perplexity_change::with_perplexity;
use super::ranks::{RanksFlags, Team};
use super::report_flag::ReportFlag;
use super::{Output, Ui, names, quantize};
use crate::pipeline::Packing;
use crate::pipeline::distill;
use crate::pipeline::plan::read_json;
use crate::recipe::Recipe;
use crate::{Result, pipeline};

const EXAMPLES: &str = "\
Examples:
  atom pack --model tiny-llama --plan tiny-llama-plan.json --no-eval
  atom pack --model ./SmolLM2 --plan SmolLM2-plan.json --distill
  atom pack --model ./SmolLM2 --plan SmolLM2-plan.json --max-ppl-increase 0.5";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    /// Plan that `atom plan` wrote
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    plan: PathBuf,
    #[command(flatten)]
    output: OutputFlags,
    #[command(flatten)]
    training: DistillFlag,
    #[command(flatten)]
    evaluation: EvaluationFlags,
    #[command(flatten, next_help_heading = "Evaluation")]
    length: WindowFlag,
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
    let backend = team.open(&arguments.device)?;
    arguments.training.check_ranks(&backend)?;
    let model = &arguments.model.model;
    let hub = arguments.model.hub(ui)?;
    let source = team.first_alone(|| arguments.model.source(&hub, ui))?;
    let default = || Ok(names::checkpoint_out(model, &planned_recipe(&arguments.plan)?));
    let destination = arguments.output.destination(default, arguments.evaluation.inputs())?;
    let report = arguments.report.next_to(&destination, &source)?;
    let evaluation =
        team.first_alone(|| arguments.evaluation.load(arguments.length.seq_len, &hub))?;
    let packing = Packing {
        source: &source,
        plan_file: &arguments.plan,
        output: &destination,
        evaluation: evaluation.as_ref(),
    };
    let outcome = with_backend!(&backend, ui, backend => {
        let outcome = match arguments.training.distill {
            Some(tokens) => {
                let (outcome, distilled) =
                    distill::pack_and_distill(backend, &packing, tokens, ui)?;
                outcome.distilled(distilled)
            }
            None => pipeline::pack(backend, &packing, ui)?,
        };
        with_perplexity(backend, &source, outcome, packing.evaluation, ui)?
    });
    if !team.is_first() {
        return Ok(());
    }
    ui.close();
    output.write(&outcome)?;
    report.write(&outcome, Some(&outcome.out))?;
    quantize::check(&outcome, &arguments.max_ppl, &arguments.max_increase)
}

/// The part of a plan that names the default output directory.
#[derive(Deserialize)]
struct PlanHead {
    recipe: Recipe,
}

fn planned_recipe(plan: &Path) -> Result<Recipe> {
    let head: PlanHead = read_json(plan)?;
    Ok(head.recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_is_read_from_a_plan_and_a_stranger_refused() {
        let directory = tempfile::tempdir().unwrap();
        let plan = directory.path().join("plan.json");
        let recipe = Recipe::paper();
        let text = serde_json::json!({ "recipe": recipe, "sites": [] }).to_string();
        fs_err::write(&plan, text).unwrap();
        assert_eq!(planned_recipe(&plan).unwrap(), recipe);
        fs_err::write(&plan, "[]").unwrap();
        let error = planned_recipe(&plan).unwrap_err();
        assert!(error.message().contains("plan.json is not a plan"), "{error}");
    }
}
