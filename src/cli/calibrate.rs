/*! `atom calibrate`: the statistics of each site, as a file that `atom plan` reads. */

use std::path::PathBuf;

use clap::Args;

use super::args::{
    CalibrationFlags, DeviceFlag, ModelFlag, OverwriteFlag, WindowFlag, with_backend,
};
use super::{Output, Ui, names};
use crate::{Result, hub, pipeline};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  atom calibrate --model ./SmolLM2 --calib wiki.jsonl")]
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
    #[command(flatten)]
    device: DeviceFlag,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let backend = arguments.device.open()?;
    let model = &arguments.model.model;
    let source = hub::source(model)?;
    let calibration = arguments.calibration.load(&arguments.length)?;
    let out = arguments.out.clone().unwrap_or_else(|| names::calibration_out(model));
    let overwrite = arguments.overwrite.overwrite;
    let outcome = with_backend!(&backend, ui, backend => {
        pipeline::calibrate(backend, &source, &calibration, &out, overwrite, ui)
    })?;
    ui.close();
    output.write(&outcome)
}
