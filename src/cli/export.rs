/*! `atom export`: an Atom checkpoint in the format of another program. */

use std::path::PathBuf;

use clap::Args;

use super::args::OverwriteFlag;
use super::{Output, Ui, names, values};
use crate::checkpoint::{Destination, Dtype, Inputs};
use crate::export::{Export, ExportedModel, Format, MatrixType, dry_run, export};
use crate::hub::Hub;
use crate::network::Model;
use crate::printable::quoted;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom export tiny-llama-atom-w4a4-g128 --format dense
  atom export ./SmolLM2-atom-w4a16-g128 --format compressed-tensors
  atom export ./SmolLM2-atom-w4a16-g128 --format gptq --dry-run
  atom export ./SmolLM2-atom-w4a16-g32 --format gguf
  atom export ./SmolLM2-atom-w4a4-g128 --format dense --dtype bf16

An export copies codes and scales and never rounds them again. A checkpoint that a format cannot hold \
exactly is refused before any work, with a recipe that would do; dense takes any checkpoint.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Directory of an Atom checkpoint
    #[arg(value_name = "ATOM")]
    checkpoint: String,
    #[command(flatten)]
    format: FormatFlag,
    /// Type of the floating-point tensors, f16 or bf16, to which they are rounded [default: the model's own]
    #[arg(long, value_name = "TYPE", value_parser = values::half)]
    dtype: Option<Dtype>,
    /// Type of embedding and head, f16 or q8_0, which rounds them to 8 bits; gguf only
    #[arg(long, value_name = "TYPE", value_parser = values::matrix_type)]
    embedding: Option<MatrixType>,
    /// Where the export goes [default: ./<name>-<format>]
    #[arg(long, value_name = "PATH", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Check everything that can be checked without reading a tensor, say what would be done, and stop
    #[arg(long, help_heading = "Output")]
    dry_run: bool,
    /// Insist on the unfinished export in the output's place: continue it, never throw it away. The same command
    /// continues it without this flag too
    #[arg(long, help_heading = "Output")]
    resume: bool,
    #[command(flatten)]
    overwrite: OverwriteFlag,
}

#[derive(Args, Debug)]
struct FormatFlag {
    /// Format of the export
    #[arg(long, value_name = "FORMAT", value_parser = values::export_format())]
    format: &'static dyn Format,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let format = arguments.format.format;
    if arguments.dtype.is_some() && format.name() == "gguf" {
        return Err(Error::usage("--dtype is not for --format gguf")
            .hint("leave it out: a GGUF file has types of its own"));
    }
    if arguments.embedding.is_some() && format.name() != "gguf" {
        return Err(Error::usage("--embedding is for --format gguf alone")
            .hint("leave it out: other formats keep the model's type"));
    }
    let hub = Hub::cached("atom export", ui)?;
    let Model::Atom(checkpoint) = Model::open(&hub, &arguments.checkpoint, None)? else {
        let message = format!("{} is not an Atom checkpoint", arguments.checkpoint);
        return Err(Error::input(message).hint(format!(
            "quantize it first: atom quantize --model {}",
            quoted(&arguments.checkpoint)
        )));
    };
    let mut model = ExportedModel::open(&checkpoint, arguments.dtype, ui)?;
    model.embedding = arguments.embedding.unwrap_or_default();
    if arguments.out.as_ref().is_some_and(|out| out.extension().is_some_and(|end| end == "gguf")) {
        return Err(Error::usage(
            "--out names a directory, and the file in it has a name of its own",
        )
        .hint("name a directory that does not end in .gguf"));
    }
    let default = || names::export_out(&arguments.checkpoint, format.name());
    let destination = Destination {
        out: arguments.out.clone().unwrap_or_else(default),
        overwrite: arguments.overwrite.overwrite,
        inputs: Inputs::default(),
    };
    let job = Export {
        model: &model,
        format,
        destination: &destination,
        resume: arguments.resume,
        perplexities: &[],
    };
    if arguments.dry_run {
        return output.write(&dry_run(&job)?);
    }
    let outcome = export(&job)?;
    ui.close();
    output.write(&outcome)
}
