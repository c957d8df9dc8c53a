/*! The command line: flags in, one library call, a result on stdout, an exit code.

Each subcommand is a file that holds its flags and a `run` which turns them into a library call and
hands the outcome to [`Output`]. What several subcommands share is in `args`; stderr belongs to
[`Ui`], stdout to [`Output`], and the rendering of errors to [`failure`]. */

mod args;
mod bench;
mod bench_serve;
mod calibrate;
mod completions;
mod distill;
mod doctor;
mod eval_ppl;
mod eval_tasks;
mod export;
mod exports;
pub mod failure;
mod generate;
mod inspect;
mod limits;
mod lines;
mod man;
mod names;
mod output;
mod own_text;
mod pack;
mod perplexity_change;
mod plan;
mod quantize;
mod ranks;
mod recipe;
mod report;
mod report_flag;
mod sampling;
mod target;
mod ui;
mod values;
mod verify;

use std::ffi::OsString;

use clap::builder::Styles;
use clap::builder::styling::AnsiColor;
use clap::{Parser, Subcommand};

pub use args::Running;
pub use output::Output;
use ranks::RanksFlags;
pub use ui::Ui;

use crate::printable::quoted;
use crate::{Error, Kind, Result};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// How the help of the program ends.
const AFTER_HELP: &str = "\
Examples:
  atom doctor
  atom quantize --model tiny-llama --samples 8 --seq-len 256
  atom quantize --help

Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 bad input, 4 the machine lacks something, \
130 interrupted.";

/// What the user typed.
#[derive(Debug, Parser)]
#[command(
    name = "atom",
    version = env!("ATOM_VERSION"),
    about = "Quantize LLM checkpoints to 4 bit by the Atom method, and measure what it cost",
    after_help = AFTER_HELP,
    styles = STYLES,
    args_override_self = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How the program runs and prints, whatever it does.
    #[command(flatten)]
    pub running: Running,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Quantize a checkpoint: calibrate, plan and pack in one pass
    Quantize(Box<quantize::Arguments>),
    /// Record the statistics of each activation; `plan` reads them
    Calibrate(calibrate::Arguments),
    /// Decide channel orders, groups and bits from a calibration file; `pack` reads them
    Plan(plan::Arguments),
    /// Write the quantized checkpoint that a plan describes
    Pack(pack::Arguments),
    /// Train scales, norms and clip ratios of an Atom checkpoint by its source's predictions
    Distill(distill::Arguments),
    /// Write an Atom checkpoint in the format of another program
    Export(export::Arguments),
    /// Measure the perplexity of a source or an Atom checkpoint
    EvalPpl(eval_ppl::Arguments),
    /// Measure zero-shot accuracy of a source or an Atom checkpoint on common tasks
    EvalTasks(eval_tasks::Arguments),
    /// Continue a text, or hold a conversation, with a source or an Atom checkpoint
    Generate(generate::Arguments),
    /// Check an Atom checkpoint: integrity, then perplexity against limits
    Verify(verify::Arguments),
    /// Show what a checkpoint holds; loads no weights
    Inspect(inspect::Arguments),
    /// Write a page of HTML about an Atom checkpoint and what was measured of it
    Report(report::Arguments),
    /// Measure speed, beside a baseline measured in the same run
    Bench(bench::Arguments),
    /// Say what this machine can do, and what each thing that it lacks means
    Doctor(doctor::Arguments),
    /// Print completions for a shell
    Completions(completions::Arguments),
    /// Print a manual page, or write them all
    Man(man::Arguments),
}

/// Runs the parsed command. `typed` is the entire command line, of which the hint of an interrupted
/// run is made.
///
/// # Errors
/// The library's errors, and a failed check after its outcome has been written.
pub fn run(cli: &Cli, typed: &[OsString], ui: &Ui, output: &Output) -> Result<()> {
    let ranks = cli.command.ranks();
    cli.running.start_threads(ranks.map_or(1, RanksFlags::local_ranks))?;
    ui.watch_signals(cli.command.resumes());
    let done = match &cli.command {
        Command::Quantize(arguments) => quantize::run(arguments, typed, ui, output),
        Command::Calibrate(arguments) => calibrate::run(arguments, ui, output),
        Command::Plan(arguments) => plan::run(arguments, output),
        Command::Pack(arguments) => pack::run(arguments, typed, ui, output),
        Command::Distill(arguments) => distill::run(arguments, ui, output),
        Command::Export(arguments) => export::run(arguments, ui, output),
        Command::EvalPpl(arguments) => eval_ppl::run(arguments, typed, ui, output),
        Command::EvalTasks(arguments) => eval_tasks::run(arguments, typed, ui, output),
        Command::Generate(arguments) => generate::run(arguments, ui, output),
        Command::Verify(arguments) => verify::run(arguments, ui, output),
        Command::Inspect(arguments) => inspect::run(arguments, ui, output),
        Command::Report(arguments) => report::run(arguments, ui, output),
        Command::Bench(arguments) => bench::run(arguments, typed, ui, output),
        Command::Doctor(arguments) => doctor::run(arguments, ui, output),
        Command::Completions(arguments) => completions::run(arguments, output),
        Command::Man(arguments) => man::run(arguments, output),
    };
    done.map_err(|error| match error.kind() {
        // One that has a hint already was stopped after the work that could be gone on with.
        Kind::Interrupted if cli.command.resumes() && error.hint_text().is_none() => {
            name_resume_command(error, typed)
        }
        _ => error,
    })
}

impl Command {
    /// Which ranks share its work, where ranks can.
    fn ranks(&self) -> Option<&RanksFlags> {
        match self {
            Self::Quantize(arguments) => Some(&arguments.ranks),
            Self::Pack(arguments) => Some(&arguments.ranks),
            Self::EvalPpl(arguments) => Some(&arguments.ranks),
            Self::EvalTasks(arguments) => Some(&arguments.ranks),
            Self::Bench(arguments) => arguments.ranks(),
            _ => None,
        }
    }

    /// Whether `--resume` goes on where an interrupted run stopped.
    fn resumes(&self) -> bool {
        matches!(self, Self::Quantize(_) | Self::Pack(_) | Self::Distill(_) | Self::Export(_))
    }
}

fn name_resume_command(error: Error, typed: &[OsString]) -> Error {
    let mut words: Vec<String> = typed.iter().map(|word| quoted(&word.to_string_lossy())).collect();
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".to_owned());
    }
    error.hint(format!("go on with `{}`", words.join(" ")))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_of_the_flags_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_interrupted_run_names_the_command_that_goes_on() {
        let hint = |typed: &[&str]| {
            let typed: Vec<OsString> = typed.iter().map(OsString::from).collect();
            name_resume_command(Error::interrupted(), &typed).hint_text().map(str::to_owned)
        };
        assert_eq!(
            hint(&["atom", "quantize", "--model", "my model"]).as_deref(),
            Some("go on with `atom quantize --model 'my model' --resume`")
        );
        assert_eq!(
            hint(&["atom", "pack", "--resume", "--plan", "p.json"]).as_deref(),
            Some("go on with `atom pack --resume --plan p.json`")
        );
    }

    #[test]
    fn of_a_repeated_flag_the_last_wins() {
        let cli = Cli::try_parse_from(["atom", "--threads=1", "inspect", "a", "--threads", "2"]);
        assert_eq!(cli.unwrap().running.threads, 2);
    }
}
