/*! Flags that several subcommands share, each group under its heading of the help page. */

use std::path::{Path, PathBuf};

use clap::Args;

use super::values::{self, Device};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::checkpoint::{Destination, Inputs, Source};
use crate::hub::Hub;
use crate::machine;
use crate::network::{Model, network, split_fused};
use crate::pipeline::{Calibration, Output};
use crate::progress::Progress;
use crate::text::{Evaluation, Split, TextSet};
use crate::units;
use crate::{Error, Result, hub};

/// How the program runs and prints, whatever it does. Orders of display keep the group as it is next to
/// the flags of any subcommand.
#[derive(Args, Debug)]
#[command(next_help_heading = "Running")]
pub struct Running {
    /// CPU threads; 0 means all cores
    #[arg(
        long,
        global = true,
        value_name = "N",
        default_value_t = 0,
        value_parser = values::threads,
        display_order = 1002
    )]
    pub threads: usize,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long, global = true, display_order = 1003)]
    pub json: bool,
    /// Print only warnings and errors on stderr
    #[arg(long, short, global = true, display_order = 1004)]
    pub quiet: bool,
}

/// Address space of a thread's stack, with its guard and the stack of its signal handlers.
const THREAD_BYTES: u64 = 3 << 20;

impl Running {
    /// Sizes the thread pool that all arithmetic shares, of one of so many processes on this host.
    pub(crate) fn start_threads(&self, processes: usize) -> Result<()> {
        let refused = |why: String| {
            Error::machine(format!("cannot start the worker threads: {why}")).hint(
                "give fewer --threads, or raise the limits on processes and memory (`ulimit -u`, `ulimit -v`)",
            )
        };
        let threads = match self.threads {
            0 => {
                let all = std::thread::available_parallelism().map_or(1, usize::from);
                (all / processes).max(1)
            }
            threads => threads,
        };
        // A thread whose stacks cannot be had ends the process before any of our code runs in it.
        let needed = THREAD_BYTES * threads as u64;
        if let Some(left) = machine::address_space_left().filter(|left| *left < needed) {
            let [needed, left] = [needed, left].map(units::bytes);
            return Err(refused(format!(
                "the stacks of {threads} take {needed}, and `ulimit -v` leaves {left}"
            )));
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(|error| refused(error.to_string()))
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Running")]
pub(crate) struct DeviceFlag {
    /// Where the arithmetic runs: auto (a GPU if there is one), cpu, cuda or cuda:N
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        env = "ATOM_DEVICE",
        hide_env_values = true,
        display_order = 1000
    )]
    pub(crate) device: Device,
    /// GPU memory to use at most, such as 24GB or 16GiB; hidden states that do not fit stay in host
    /// memory [default: all that is free]
    #[arg(long, value_name = "SIZE", value_parser = values::bytes, display_order = 1001)]
    pub(crate) gpu_memory: Option<u64>,
}

/// A backend that was opened.
pub(crate) enum Opened {
    /// The CPU, and why `auto` took it.
    Cpu(Cpu, Option<Error>),
    /// A CUDA device.
    Cuda(Box<Cuda>),
}

impl Opened {
    /// Says why there is no GPU in use where one might be expected.
    pub(crate) fn announce(&self, progress: &dyn Progress) {
        if let Self::Cpu(_, Some(why)) = self {
            progress.info(&format!("running on the CPU: {why}"));
        }
    }
}

impl DeviceFlag {
    /// The backend of the device asked for. `auto` takes the CPU where no GPU can be used.
    pub(crate) fn open(&self) -> Result<Opened> {
        let cuda = |number| Ok(Opened::Cuda(Box::new(Cuda::open(number, self.gpu_memory)?)));
        match self.device {
            Device::Cpu => Ok(Opened::Cpu(Cpu::new()?, None)),
            Device::Cuda(number) => cuda(number),
            Device::Auto => cuda(0).or_else(|error| Ok(Opened::Cpu(Cpu::new()?, Some(error)))),
        }
    }
}

impl DeviceFlag {
    /// The GPU asked for, where there is nothing to do without one.
    ///
    /// # Errors
    /// A machine error that says why there is none.
    pub(crate) fn open_cuda(&self) -> Result<Box<Cuda>> {
        match self.open()? {
            Opened::Cuda(cuda) => Ok(cuda),
            Opened::Cpu(_, why) => {
                let error =
                    why.unwrap_or_else(|| Error::machine("--device cpu leaves the GPU out"));
                let error =
                    error.context("this measures a GPU's kernels, and there is none to use");
                Err(error.hint(
                    "run it where there is one, with NVIDIA's driver 570 or newer; without one there are \
                     `atom bench cpu` and `atom bench prefill`",
                ))
            }
        }
    }
}

/// Announces what was opened and runs an expression with `$backend` bound to it.
macro_rules! with_backend {
    ($opened:expr, $ui:expr, $backend:ident => $work:expr) => {{
        let opened: &$crate::cli::args::Opened = $opened;
        opened.announce($ui);
        match opened {
            $crate::cli::args::Opened::Cpu($backend, _) => $work,
            $crate::cli::args::Opened::Cuda($backend) => {
                let $backend = &**$backend;
                $work
            }
        }
    }};
}
pub(crate) use with_backend;

#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelFlag {
    /// Checkpoint directory, the bundled `tiny-llama`, a Hub id such as org/name or org/name@REVISION,
    /// or an alias (docs/hub.md) such as llama-2-7b, mixtral-8x7b or smollm3-3b
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,
    /// Branch, tag or commit of the model on the Hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    #[command(flatten)]
    ignoring: IgnoreFlag,
    #[command(flatten)]
    offline: OfflineFlag,
}

impl ModelFlag {
    /// The Hub as this run may use it.
    pub(crate) fn hub<'a>(&self, progress: &'a dyn Progress) -> Result<Hub<'a>> {
        self.offline.hub(progress)
    }

    /// The model, opened as a source checkpoint of which every tensor is accounted for.
    pub(crate) fn source(&self, hub: &Hub<'_>, progress: &dyn Progress) -> Result<Source> {
        self.ignoring.account(hub::source(hub, &self.model, self.revision.as_deref())?, progress)
    }

    /// The model, opened as a checkpoint of either kind.
    pub(crate) fn open(&self, hub: &Hub<'_>, progress: &dyn Progress) -> Result<Model> {
        let model = Model::open(hub, &self.model, self.revision.as_deref())?;
        self.ignoring.account_model(model, progress)
    }
}

#[derive(Args, Debug)]
pub(crate) struct IgnoreFlag {
    /// Leave out stored tensors that have no part in the network: names, in which * stands for any
    /// characters. The checkpoint's atom.json lists them
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Model")]
    ignore_tensors: Vec<String>,
}

impl IgnoreFlag {
    /// Whether any pattern was given.
    pub(crate) fn is_given(&self) -> bool {
        !self.ignore_tensors.is_empty()
    }

    /// Accounts for every tensor of a source, and warns of what is not as its configuration says.
    fn account(&self, source: Source, progress: &dyn Progress) -> Result<Source> {
        let source = split_fused(source.ignoring(self.ignore_tensors.clone()))?;
        for warning in network(&source, progress)?.warnings {
            progress.warn(&warning);
        }
        Ok(source)
    }

    /// The same for a model that may be an Atom checkpoint, all of whose tensors are its own.
    pub(crate) fn account_model(&self, model: Model, progress: &dyn Progress) -> Result<Model> {
        match model {
            Model::Source(source) => Ok(Model::Source(self.account(source, progress)?)),
            Model::Atom(_) if self.is_given() => {
                Err(Error::usage("--ignore-tensors is for sources, not for an Atom checkpoint")
                    .hint("leave it out: what was ignored in the source is not in the checkpoint"))
            }
            Model::Atom(checkpoint) => Ok(Model::Atom(checkpoint)),
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct OfflineFlag {
    /// Use nothing of the Hub but what its cache holds; HF_HUB_OFFLINE=1 does the same
    #[arg(long, help_heading = "Running")]
    offline: bool,
}

impl OfflineFlag {
    /// The Hub as this run may use it.
    pub(crate) fn hub<'a>(&self, progress: &'a dyn Progress) -> Result<Hub<'a>> {
        Hub::from_env(self.offline, progress)
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Calibration")]
pub(crate) struct CalibrationFlags {
    /// Text to calibrate on: `sample` (bundled), `wikitext2`, `ptb` or `c4` (their training parts, from
    /// the Hub), NAME=FILE (such a set's own file), a file (text, .jsonl, .json.gz, .csv, .tsv, .parquet), or `self`: what the
    /// model writes at temperature 1 from random tokens, or from the lines of FILE with self=FILE, for which no text is
    /// needed. Several, with commas, divide the samples evenly, the first ones taking what is left over
    #[arg(long, value_name = "TEXT", default_value = "sample")]
    calib: String,
    /// Windows drawn, of --seq-len tokens each, from all sets together: anywhere in the text, of c4 inside single documents; of a set no more than it holds
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::count)]
    samples: usize,
    /// Seed of the draw, a whole number
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl CalibrationFlags {
    /// The files of the text, if it comes from files.
    pub(crate) fn inputs(&self) -> Inputs {
        text_files(&self.calib)
    }

    /// Loads the text.
    pub(crate) fn load(&self, length: &WindowFlag, hub: &Hub<'_>) -> Result<Calibration> {
        Ok(Calibration {
            text: TextSet::load(&self.calib, Split::Calibration, hub)?,
            samples: self.samples,
            seq_len: length.seq_len,
            seed: self.seed,
        })
    }
}

/// The files that a text set's name stands for: itself, or after `NAME=`, of several each.
pub(crate) fn text_files(spec: &str) -> Inputs {
    let mut inputs = Inputs::default();
    for part in std::iter::once(spec).chain(spec.split(',').map(str::trim)) {
        inputs.add(Path::new(part));
        if let Some((_, file)) = part.split_once('=') {
            inputs.add(Path::new(file));
        }
    }
    inputs
}

/// One length for the windows of calibration and evaluation alike; the heading is the user's.
#[derive(Args, Debug)]
pub(crate) struct WindowFlag {
    /// Tokens in a window
    #[arg(
        long,
        value_name = "TOKENS",
        default_value = "2048",
        value_parser = values::window_length
    )]
    pub(crate) seq_len: usize,
}

/// The short measurement that ends `quantize` and `pack`, and opens to scrutiny in `verify`.
#[derive(Args, Debug)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct EvaluationFlags {
    /// Text to measure perplexity on: `sample` (bundled), `wikitext2` (its test part), `ptb` or `c4`
    /// (their validation parts) from the Hub, NAME=FILE, or a file as for --calib
    #[arg(long, value_name = "TEXT", default_value = "sample")]
    dataset: String,
    /// Measure on the first N windows of the text only
    #[arg(long, value_name = "N", default_value = "8", value_parser = values::count)]
    windows: usize,
    /// Do not measure perplexity
    #[arg(long, conflicts_with_all = ["max_ppl", "max_ppl_increase"])]
    no_eval: bool,
}

impl EvaluationFlags {
    /// The file of the text, if it comes from one.
    pub(crate) fn inputs(&self) -> Inputs {
        text_files(&self.dataset)
    }

    /// The text, whether it is measured on or not.
    pub(crate) fn text(&self, hub: &Hub<'_>) -> Result<TextSet> {
        TextSet::load(&self.dataset, Split::Evaluation, hub)
    }

    /// Loads the text; none with `--no-eval`.
    pub(crate) fn load(&self, seq_len: usize, hub: &Hub<'_>) -> Result<Option<Evaluation>> {
        if self.no_eval {
            return Ok(None);
        }
        let text = self.text(hub)?;
        Ok(Some(Evaluation { text, seq_len, windows: Some(self.windows) }))
    }
}

#[derive(Args, Debug)]
pub(crate) struct OverwriteFlag {
    /// Replace the result of the same kind at the output path, or an unfinished run of other settings
    #[arg(long, help_heading = "Output")]
    pub(crate) overwrite: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputFlags {
    /// Directory of the checkpoint [default: ./<name>-atom-<recipe>]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Insist on the unfinished run in the output's place: continue it, never throw it away. The same command
    /// continues it without this flag too
    #[arg(long)]
    pub(crate) resume: bool,
    #[command(flatten)]
    pub(crate) overwrite: OverwriteFlag,
}

impl OutputFlags {
    /// `--out`, or the path that `default` makes up; `inputs` is what the command reads besides the model.
    pub(crate) fn destination(
        &self,
        default: impl FnOnce() -> Result<PathBuf>,
        inputs: Inputs,
    ) -> Result<Output> {
        let out = self.out.clone().map_or_else(default, Ok)?;
        let destination = Destination { out, overwrite: self.overwrite.overwrite, inputs };
        Ok(Output { destination, resume: self.resume })
    }
}
