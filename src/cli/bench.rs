/*! `atom bench`: speed, beside a baseline measured in the same run. */

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::args::{DeviceFlag, with_backend};
use super::recipe::RecipeFlags;
use super::{Output, Ui, values};
use crate::Result;
use crate::bench::{self, SyntheticModel};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Matrix products and integer kernels, beside faer's f32 product on the same shapes
    Cpu,
    /// Speed and memory of `quantize` on a synthetic checkpoint of a known model's widths
    Quantize(Box<SyntheticFlags>),
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  atom bench quantize --shape llama-2-7b --blocks 2 --samples 4")]
struct SyntheticFlags {
    /// Model whose widths the checkpoint has
    #[arg(long, value_name = "MODEL", default_value = "llama-2-7b")]
    shape: String,
    /// Decoder blocks [default: as many as the model has]
    #[arg(long, value_name = "N", value_parser = values::count)]
    blocks: Option<usize>,
    /// Calibration windows
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::count)]
    samples: usize,
    /// Tokens in a window
    #[arg(
        long,
        value_name = "TOKENS",
        default_value = "2048",
        value_parser = values::window_length
    )]
    seq_len: usize,
    /// Directory for the checkpoint and the result [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    recipe: RecipeFlags,
    #[command(flatten)]
    device: DeviceFlag,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let outcome = match &arguments.what {
        What::Cpu => bench::cpu()?,
        What::Quantize(flags) => {
            let model = SyntheticModel {
                shape: flags.shape.clone(),
                blocks: flags.blocks,
                samples: flags.samples,
                seq_len: flags.seq_len,
                directory: flags.dir.clone(),
            };
            model.known_shape()?;
            let recipe = flags.recipe.resolve()?;
            let backend = flags.device.open()?;
            with_backend!(&backend, ui, backend => bench::quantize(backend, &model, &recipe, ui))?
        }
    };
    ui.close();
    output.write(&outcome)
}
