/*! `atom plan`: channel orders, groups and bits, decided from a calibration file by a recipe, or by what
was measured and a target. */

use std::path::PathBuf;

use clap::Args;

use super::args::OverwriteFlag;
use super::recipe::RecipeFlags;
use super::target::TargetFlags;
use super::{Output, names};
use crate::Result;
use crate::checkpoint::{Inputs, OutputFile};
use crate::pipeline::plan::PLAN_FILE;
use crate::pipeline::{self, Planning};

const EXAMPLES: &str = "\
Examples:
  atom plan tiny-llama-calibration.safetensors --group 64 --outliers 64
  atom plan SmolLM2-calibration.safetensors --target-bits 4.5
  atom plan SmolLM2-calibration.safetensors --target-size 120MB --widths 3,4,8

With a target, each linear gets the width and each site the outlier count that cost least by the \
measurements of `atom calibrate --sensitivity`. Another target takes a moment. Without recipe flags \
the recipe is the one that was measured. The plan is JSON and may be edited; `atom pack` obeys it.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// File that `atom calibrate` wrote
    #[arg(value_name = "CALIBRATION", required_unless_present = "calibration")]
    file: Option<PathBuf>,
    /// The same, as a flag
    #[arg(long, value_name = "FILE", conflicts_with = "file", help_heading = "Calibration")]
    calibration: Option<PathBuf>,
    /// File to write [default: ./<name>-plan.json]
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteFlag,
    #[command(flatten)]
    target: TargetFlags,
    /// Outlier counts to choose among, in channels of a site [default: all that were measured]
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        requires = "target",
        help_heading = "Allocation"
    )]
    outlier_counts: Option<Vec<usize>>,
    #[command(flatten)]
    recipe: RecipeFlags,
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Result<()> {
    let recipe = arguments.recipe.resolve()?;
    let calibration = arguments
        .calibration
        .as_deref()
        .or(arguments.file.as_deref())
        .expect("the parser requires one of the two");
    let out = arguments.out.clone().unwrap_or_else(|| names::plan_out(calibration));
    let allocating = arguments.target.allocating(arguments.outlier_counts.clone());
    let planning = match &allocating {
        None => Planning::Uniform(&recipe),
        Some(allocating) => {
            Planning::Allocated(arguments.recipe.given().then_some(&recipe), allocating)
        }
    };
    let inputs = Inputs::default().with(arguments.recipe.file()).with(Some(calibration));
    let overwrite = arguments.overwrite.overwrite;
    let file = OutputFile::check(&out, &PLAN_FILE, overwrite, inputs)?;
    output.write(&pipeline::plan(calibration, planning, &file)?)
}
