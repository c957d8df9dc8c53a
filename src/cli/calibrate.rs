/*! `atom calibrate`: the statistics of each site, as a file that `atom plan` reads. */

use std::path::PathBuf;

use clap::Args;

use super::args::{
    CalibrationFlags, DeviceFlag, ModelFlag, OverwriteFlag, WindowFlag, with_backend,
};
use super::own_text::write_own_text;
use super::recipe::RecipeFlags;
use super::target::OUTLIER_COUNTS;
use super::{Output, Ui, names};
use crate::checkpoint::OutputFile;
use crate::pipeline::{CALIBRATION_FILE, Measuring};
use crate::{Error, Result, pipeline};

const EXAMPLES: &str = "\
Examples:
  atom calibrate --model tiny-llama --samples 8 --seq-len 256
  atom calibrate --model ./SmolLM2 --calib wiki.jsonl
  atom calibrate --model ./SmolLM2 --calib self --seq-len 1024
  atom calibrate --model ./SmolLM2 --sensitivity --group 64 --outliers 64

With --sensitivity the file also says what each width of a linear and each outlier count of a site \
would cost under the recipe, so that `atom plan --target-bits` can choose. It takes several times \
as long as `atom quantize`, once for all targets.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    /// File to write [default: ./<name>-calibration.safetensors]
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteFlag,
    #[command(flatten)]
    calibration: CalibrationFlags,
    #[command(flatten, next_help_heading = "Calibration")]
    length: WindowFlag,
    /// Measure what each width and outlier count would cost, for `atom plan --target-bits`
    #[arg(long, help_heading = "Sensitivity")]
    sensitivity: bool,
    /// Outlier counts to measure, in channels of a site, beside the recipe's [default: 0,32,64,128]
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        requires = "sensitivity",
        help_heading = "Sensitivity"
    )]
    outlier_counts: Option<Vec<usize>>,
    #[command(flatten)]
    recipe: RecipeFlags,
    #[command(flatten)]
    device: DeviceFlag,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    if arguments.recipe.given() && !arguments.sensitivity {
        return Err(Error::usage(
            "recipe flags change nothing that is measured without --sensitivity",
        )
        .hint("add --sensitivity, or give the recipe to `atom plan`"));
    }
    let recipe = arguments.recipe.resolve()?;
    let backend = arguments.device.open()?;
    let model = &arguments.model.model;
    let hub = arguments.model.hub(ui)?;
    let source = arguments.model.source(&hub, ui)?;
    let calibration = arguments.calibration.load(&arguments.length, &hub)?;
    let out = arguments.out.clone().unwrap_or_else(|| names::calibration_out(model));
    let counts = arguments.outlier_counts.as_deref().unwrap_or(&OUTLIER_COUNTS);
    let measuring = Measuring { recipe: &recipe, outlier_counts: counts };
    let measuring = arguments.sensitivity.then_some(&measuring);
    let inputs = arguments.calibration.inputs().with(arguments.recipe.file()).with(source.dir());
    let overwrite = arguments.overwrite.overwrite;
    let file = OutputFile::check(&out, &CALIBRATION_FILE, overwrite, inputs)?;
    let outcome = with_backend!(&backend, ui, backend => {
        let calibration = write_own_text(backend, &source, calibration, ui)?;
        pipeline::calibrate(backend, &source, &calibration, measuring, &file, ui)
    })?;
    ui.close();
    output.write(&outcome)
}
