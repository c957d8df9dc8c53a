/*! `atom eval-tasks`: zero-shot accuracy of a source, or of an Atom checkpoint on the integer kernels. */

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::args::{DeviceFlag, ModelFlag, OverwriteFlag, with_backend};
use super::ranks::{RanksFlags, Team};
use super::report_flag::ReportFlag;
use super::{Output, Ui, values};
use crate::checkpoint::{FileKind, Inputs, OutputFile};
use crate::eval::{self, Sample};
use crate::text::tasks::{Task, TaskFile, TaskRows};
use crate::{Error, Result};

const EXAMPLES: &str = "\
Tasks: piqa, arc_easy, arc_challenge, boolq, hellaswag, winogrande, lambada. Prompts and metrics are \
those of lm-evaluation-harness 0.4.13, zero-shot: acc is the share of rows whose likeliest choice is \
right, acc_norm the same with log likelihoods (nats) divided by the choice's characters; for lambada \
acc counts greedily guessed last words.

Examples:
  atom eval-tasks --model ./SmolLM2 --tasks piqa,arc_easy --tasks-dir ./tasks
  atom eval-tasks --model ./SmolLM2 --tasks boolq,hellaswag,winogrande
  atom eval-tasks --model ./SmolLM2-atom --tasks lambada=words.jsonl --limit 200
  atom eval-tasks --model ./SmolLM2 --tasks arc_easy --min-acc 0.5 --json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelFlag,
    /// Tasks, separated by commas; NAME=FILE takes the rows from FILE (JSONL or Parquet)
    #[arg(
        long,
        value_name = "TASKS",
        value_delimiter = ',',
        required = true,
        help_heading = "Evaluation"
    )]
    tasks: Vec<TaskFile>,
    /// Directory with each task's rows, NAME.jsonl or NAME.parquet [default: the Hub]
    #[arg(long, value_name = "DIR", help_heading = "Evaluation")]
    tasks_dir: Option<PathBuf>,
    /// Ask the first N rows of each task only [default: all]
    #[arg(long, value_name = "N", value_parser = values::count, help_heading = "Evaluation")]
    limit: Option<usize>,
    /// Fail (exit code 1) if a task's acc is below X, a share from 0 to 1; NAME=X is for one task
    #[arg(long, value_name = "X", value_delimiter = ',', help_heading = "Evaluation")]
    min_acc: Vec<LeastAccuracy>,
    /// Write each row's log likelihoods to FILE, one JSON object a line
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    log_samples: Option<PathBuf>,
    #[command(flatten)]
    report: ReportFlag,
    #[command(flatten)]
    overwrite: OverwriteFlag,
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    pub(crate) ranks: RanksFlags,
}

/// A limit: for all tasks, or for one.
#[derive(Clone, Debug)]
struct LeastAccuracy {
    task: Option<&'static Task>,
    least: f64,
}

impl FromStr for LeastAccuracy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (task, least) = match text.split_once('=') {
            Some((name, least)) => (Some(Task::named(name)?), least),
            None => (None, text),
        };
        match least.parse::<f64>() {
            Ok(least) if (0.0..=1.0).contains(&least) => Ok(Self { task, least }),
            _ => Err(Error::usage("an accuracy is a share from 0 to 1, such as 0.55".to_owned())),
        }
    }
}

/// The limit of a task: its own where it has one, the last of several.
fn least(limits: &[LeastAccuracy], name: &str) -> Option<f64> {
    let own = |limit: &&LeastAccuracy| limit.task.is_some_and(|task| task.name == name);
    let general = |limit: &&LeastAccuracy| limit.task.is_none();
    let found = limits.iter().rev().find(own);
    found.or_else(|| limits.iter().rev().find(general)).map(|limit| limit.least)
}

pub(crate) fn run(
    arguments: &Arguments,
    typed: &[OsString],
    ui: &Ui,
    output: &Output,
) -> Result<()> {
    check(arguments)?;
    let ranks = &arguments.ranks;
    ranks.share(&arguments.device, typed, ui, |team| on_rank(arguments, team, ui, output))
}

/// The part of one rank.
fn on_rank(arguments: &Arguments, team: &Team, ui: &Ui, output: &Output) -> Result<()> {
    let named = Some(Path::new(&arguments.model.model));
    arguments.samples_file(named)?;
    let report = arguments.report.check(arguments.overwrite.overwrite, arguments.inputs(named))?;
    let backend = team.open(&arguments.device)?;
    let hub = arguments.model.hub(ui)?;
    let directory = arguments.tasks_dir.as_deref();
    let load = |task: &TaskFile| task.load(directory, arguments.limit, &hub);
    let rows: Vec<TaskRows> =
        team.first_alone(|| arguments.tasks.iter().map(load).collect::<Result<_>>())?;
    let model = team.first_alone(|| arguments.model.open(&hub, ui))?;
    let samples = arguments.samples_file(model.dir())?;
    let outcome = with_backend!(&backend, ui, backend => {
        eval::tasks(backend, &model, &rows, ui)
    })?;
    if !team.is_first() {
        return Ok(());
    }
    ui.close();
    if let Some(file) = samples {
        file.write_with(|out| write_samples(out, &outcome.samples))?;
    }
    output.write(&outcome)?;
    report.write(&outcome, model.dir())?;
    eval::check_accuracies(&outcome, |task| least(&arguments.min_acc, task))
}

/// Refuses what would be found out after the work only.
fn check(arguments: &Arguments) -> Result<()> {
    let asked =
        |task: &Task| arguments.tasks.iter().filter(|own| own.task.name == task.name).count();
    if let Some(twice) = arguments.tasks.iter().find(|own| asked(own.task) > 1) {
        return Err(Error::usage(format!("--tasks names {} twice", twice.task.name)));
    }
    let mut limited = arguments.min_acc.iter().filter_map(|limit| limit.task);
    if let Some(task) = limited.find(|task| asked(task) == 0) {
        return Err(Error::usage(format!(
            "--min-acc limits {}, which --tasks does not name",
            task.name
        )));
    }
    Ok(())
}

/// What `--log-samples` writes.
const SAMPLES: FileKind = FileKind { name: "a log of samples", recognizes: is_samples };

/// Whether the first line of a file is a [`Sample`].
fn is_samples(path: &Path) -> bool {
    let mut line = Vec::new();
    let read = fs_err::File::open(path)
        .and_then(|file| BufReader::new(file.take(1 << 20)).read_until(b'\n', &mut line));
    let sample: Option<serde_json::Value> = serde_json::from_slice(&line).ok();
    let fields = ["task", "row", "log_likelihoods", "greedy", "gold", "answer", "right"];
    read.is_ok() && sample.is_some_and(|sample| fields.iter().all(|key| sample.get(key).is_some()))
}

impl Arguments {
    /// The file of samples, if there is to be one; of a model on the Hub the directory is known late.
    fn samples_file(&self, model: Option<&Path>) -> Result<Option<OutputFile>> {
        let Some(path) = &self.log_samples else { return Ok(None) };
        OutputFile::check(path, &SAMPLES, self.overwrite.overwrite, self.inputs(model)).map(Some)
    }

    /// What is read.
    fn inputs(&self, model: Option<&Path>) -> Inputs {
        let mut inputs = Inputs::default().with(model).with(self.tasks_dir.as_deref());
        self.tasks.iter().filter_map(|task| task.file.as_deref()).for_each(|file| inputs.add(file));
        inputs
    }
}

fn write_samples(out: &mut dyn Write, samples: &[Sample]) -> Result<()> {
    for sample in samples {
        let line = serde_json::to_string(sample)
            .map_err(|error| Error::machine(format!("cannot write a row as JSON: {error}")))?;
        writeln!(out, "{line}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tasks_own_limit_wins_over_the_general_one() {
        let limits = ["0.3", "piqa=0.6", "0.4"].map(|text| text.parse().unwrap());
        assert_eq!(least(&limits, "piqa"), Some(0.6));
        assert_eq!(least(&limits, "arc_easy"), Some(0.4));
        assert_eq!(least(&limits[1..2], "arc_easy"), None);
        for wrong in ["1.1", "-0.1", "x", "nan", "piqa=2", "arc=0.5"] {
            assert!(wrong.parse::<LeastAccuracy>().is_err(), "{wrong}");
        }
    }
}
