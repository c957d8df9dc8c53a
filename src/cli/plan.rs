/*! `atom plan`: channel orders, groups and bits, decided from a calibration file by a recipe. */

use std::path::PathBuf;

use clap::Args;

use super::args::OverwriteFlag;
use super::recipe::RecipeFlags;
use super::{Output, names};
use crate::{Result, pipeline};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  atom plan SmolLM2-calibration.safetensors --group 64")]
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
    output.write(&pipeline::plan(calibration, &recipe, &out, arguments.overwrite.overwrite)?)
}
