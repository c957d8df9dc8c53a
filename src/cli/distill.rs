/*! `atom distill`: trains the scales, norms and clip ratios of a finished checkpoint by its source's predictions. */

use std::path::PathBuf;

use clap::Args;

use super::args::{
    DeviceFlag, IgnoreFlag, OfflineFlag, Opened, OverwriteFlag, WindowFlag, text_files,
    with_backend,
};
use super::{Output, Ui, names, values};
use crate::backend::Exchange;
use crate::checkpoint::{Destination, Source};
use crate::network::Model;
use crate::pipeline;
use crate::pipeline::distill::{self, DEFAULT_TOKENS, Distillation, DistillationWindows, RATES};
use crate::printable::{printable, quoted};
use crate::progress::Progress;
use crate::text::{Split, TextSet};
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom distill tiny-llama-atom-w4a4-g128 --reference tiny-llama --tokens 10000
  atom distill ./SmolLM2-atom-w4a4-g64 --reference ./SmolLM2 --calib wiki.jsonl
  atom distill ./SmolLM2-atom-w4a4-g64 --reference ./SmolLM2 --dry-run

Codes, orders and sizes stay: what kernels and exports read is the same. Windows that are held back choose the step \
that is kept; where training does not improve them, nothing is written. See docs/distillation.md.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Directory of an Atom checkpoint
    #[arg(value_name = "ATOM")]
    checkpoint: PathBuf,
    /// Source that it was quantized from: a directory, a Hub id or an alias, as --model of `quantize`
    #[arg(long, value_name = "SOURCE", help_heading = "Model")]
    reference: String,
    #[command(flatten)]
    ignoring: IgnoreFlag,
    #[command(flatten)]
    offline: OfflineFlag,
    /// Text to train on, as --calib of `quantize`. A mix of texts costs little on each and serves all of them
    #[arg(long, value_name = "TEXT", default_value = "sample", help_heading = "Training")]
    calib: String,
    /// Tokens to train on. A text that holds fewer is read again
    #[arg(
        long,
        value_name = "N",
        default_value_t = DEFAULT_TOKENS,
        value_parser = values::count,
        help_heading = "Training"
    )]
    tokens: usize,
    /// Learning rates, as a multiple of the usual ones: less for long training, more for short and small networks
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        value_parser = values::rate_factor,
        help_heading = "Training"
    )]
    rate: f32,
    /// Seed of the windows and their order, a whole number
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Training")]
    seed: u64,
    #[command(flatten, next_help_heading = "Training")]
    length: WindowFlag,
    /// Directory of the distilled checkpoint [default: ./<name>-distilled]
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Insist on the unfinished run in the output's place: continue it, never throw it away. The same command
    /// continues it without this flag too
    #[arg(long, help_heading = "Output")]
    resume: bool,
    #[command(flatten)]
    overwrite: OverwriteFlag,
    /// Check everything that can be checked in seconds, say what would be done, and stop
    #[arg(long, help_heading = "Output")]
    dry_run: bool,
    #[command(flatten)]
    device: DeviceFlag,
}

/// The distillation that ends `quantize` and `pack`.
#[derive(Args, Debug)]
pub(crate) struct DistillFlag {
    /// Train scales, norms and clip ratios by the source's predictions afterwards, on the calibration windows; so many tokens in all, 819200 where the number is left out
    #[arg(
        long,
        value_name = "TOKENS",
        num_args = 0..=1,
        default_missing_value = DEFAULT_TEXT,
        value_parser = values::count,
        help_heading = "Training"
    )]
    pub(crate) distill: Option<usize>,
}

impl DistillFlag {
    /// Refuses a number of tokens that is less than a step.
    ///
    /// # Errors
    /// Usage.
    pub(crate) fn check(&self, seq_len: usize) -> Result<()> {
        self.distill.map_or(Ok(()), |tokens| distill::course_of(tokens, seq_len).map(drop))
    }

    /// Refuses several ranks, before any work.
    ///
    /// # Errors
    /// Usage.
    pub(crate) fn check_ranks(&self, opened: &Opened) -> Result<()> {
        let ranks = match opened {
            Opened::Cpu(cpu, _) => cpu.ranks().ranks(),
            Opened::Cuda(cuda) => cuda.ranks().ranks(),
        };
        if self.distill.is_none() || ranks == 1 {
            return Ok(());
        }
        Err(Error::usage("distillation runs on one rank alone").hint(
            "quantize on several without --distill, then run `atom distill` on the checkpoint",
        ))
    }
}

/// [`DEFAULT_TOKENS`], as it is typed.
const DEFAULT_TEXT: &str = "819200";

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    distill::course_of(arguments.tokens, arguments.length.seq_len)?;
    let backend = arguments.device.open()?;
    let hub = arguments.offline.hub(ui)?;
    let shown = arguments.checkpoint.to_string_lossy();
    let Model::Atom(checkpoint) = Model::open(&hub, &shown, None)? else {
        return Err(Error::input(format!("{shown} is not an Atom checkpoint"))
            .hint(format!("quantize it first: atom quantize --model {}", quoted(&shown))));
    };
    let source = source(arguments, Model::open(&hub, &arguments.reference, None)?, ui)?;
    let text = TextSet::load(&arguments.calib, Split::Calibration, &hub)?;
    let destination = Destination {
        out: arguments.out.clone().unwrap_or_else(|| names::distilled_out(&shown)),
        overwrite: arguments.overwrite.overwrite,
        inputs: text_files(&arguments.calib),
    };
    let destination = pipeline::Output { destination, resume: arguments.resume };
    let distillation = Distillation {
        checkpoint: &checkpoint,
        source: &source,
        windows: DistillationWindows::Drawn {
            text: &text,
            seq_len: arguments.length.seq_len,
            seed: arguments.seed,
        },
        tokens: arguments.tokens,
        rates: RATES.times(arguments.rate),
        output: &destination,
        always_writes: false,
    };
    if arguments.dry_run {
        let found = with_backend!(&backend, ui, backend => {
            distill::distill_dry_run(backend, &distillation, ui)
        })?;
        return output.write(&found);
    }
    ui.info(&format!("distilling {}", printable(checkpoint.name())));
    let outcome = with_backend!(&backend, ui, backend => {
        distill::distill(backend, &distillation, ui)
    })?;
    ui.close();
    output.write(&outcome)
}

/// The reference, which is a source.
fn source(arguments: &Arguments, model: Model, progress: &dyn Progress) -> Result<Source> {
    match arguments.ignoring.account_model(model, progress)? {
        Model::Source(source) => Ok(source),
        Model::Atom(checkpoint) => {
            Err(Error::input(format!("{} is an Atom checkpoint, not a source", checkpoint.title()))
                .hint("give --reference the model that the checkpoint was quantized from"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_that_may_be_left_out_is_the_default() {
        assert_eq!(DEFAULT_TEXT, DEFAULT_TOKENS.to_string());
    }
}
