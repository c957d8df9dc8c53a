/*! Zero-shot accuracy: which of a question's choices has the greatest likelihood, measured as lm-evaluation-harness
measures it. */

use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::likelihood::{Likelihood, likelihoods};
use crate::backend::Backend;
use crate::machine::cpu_seconds;
use crate::network::memory::Windows;
use crate::network::{Model, Runnable, caution};
use crate::progress::Progress;
use crate::text::Tokenizer;
use crate::text::tasks::{Measure, Question, ScoredText, TaskRows};
use crate::{Error, Kind, Result};

/// The result of `atom eval-tasks`.
#[derive(Clone, Debug, Serialize)]
pub struct TasksOutcome {
    /// Name of the model.
    pub model: String,
    /// The tasks, in the order they were asked for.
    pub tasks: Vec<TaskOutcome>,
    /// Texts scored: one for each choice of each row.
    pub texts: usize,
    /// Tokens of all texts.
    pub text_tokens: usize,
    /// Tokens computed: texts that begin alike share these.
    pub tokens: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// `rows / seconds`, over all tasks.
    pub rows_per_second: f64,
    /// CPU seconds of the process in the meantime.
    pub cpu_seconds: f64,
    /// What it ran on.
    pub device: String,
    /// What was found of every row.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

/// What one task gave. Standard errors are NaN (in JSON `null`) for a single row, which has none.
#[derive(Clone, Debug, Serialize)]
pub struct TaskOutcome {
    /// The task.
    pub task: String,
    /// The file that its rows come from.
    pub file: String,
    /// Rows asked.
    pub rows: usize,
    /// Share of the rows that were answered rightly.
    pub acc: f64,
    /// Its standard error.
    pub acc_stderr: f64,
    /// The same with log likelihoods divided by the choices' lengths in characters, where the task has it.
    pub acc_norm: Option<f64>,
    /// Its standard error.
    pub acc_norm_stderr: Option<f64>,
    /// `exp` of the mean negative log likelihood of a continuation, where the task has it.
    pub perplexity: Option<f64>,
    /// Its standard error, that of the mean times the perplexity.
    pub perplexity_stderr: Option<f64>,
}

/// What was found of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// The task.
    pub task: &'static str,
    /// The row's number in the file, from 0.
    pub row: usize,
    /// Each choice's log likelihood, in nats.
    pub log_likelihoods: Vec<f64>,
    /// Whether each token of a choice is the argmax.
    pub greedy: Vec<bool>,
    /// The right choice.
    pub gold: usize,
    /// The choice of the greatest likelihood.
    pub answer: usize,
    /// Whether the row counts as answered rightly.
    pub right: bool,
    /// The same by log likelihoods divided by length, where the task has it.
    pub right_norm: Option<bool>,
}

/// Accuracy of a model on tasks: of a source in full precision, of an Atom checkpoint on the integer path. All tasks
/// pass the blocks together.
pub fn tasks<B: Backend>(
    backend: &B,
    model: &Model,
    tasks: &[TaskRows],
    progress: &dyn Progress,
) -> Result<TasksOutcome> {
    let (start, cpu_start) = (Instant::now(), cpu_seconds());
    let runnable = Runnable::new(backend, model, progress)?;
    let positions = runnable.architecture.max_positions;
    let (tokenizer, path) = match model {
        Model::Source(source) => (source.tokenizer()?, source.tokenizer_path()),
        Model::Atom(checkpoint) => (checkpoint.tokenizer()?, checkpoint.tokenizer_path()),
    };
    let tokenizer = Tokenizer::from_bytes(&tokenizer, &path)?;
    let mut texts = Vec::new();
    for rows in tasks {
        let encoded: Vec<Vec<ScoredText>> = rows
            .questions
            .par_iter()
            .enumerate()
            .map(|(row, question)| {
                let choices = question.choices.iter();
                let texts = choices.map(|choice| choice.encode(&tokenizer, positions, progress));
                let texts: Result<_> = texts.collect();
                texts.map_err(|error| match error.kind() {
                    Kind::Interrupted => error,
                    _ => error.context(format!("row {} of {}", row + 1, rows.file)),
                })
            })
            .collect::<Result<_>>()?;
        texts.extend(encoded);
    }
    caution(runnable.tensors, &runnable.architecture, 0, progress);
    let full = texts.iter().flatten().filter(|text| text.tokens.len() > positions).count();
    if full > 0 {
        progress.warn(&format!(
            "{full} texts take all of the model's {positions} positions (`max_position_embeddings`): those that are \
             longer lose their first tokens"
        ));
    }
    let lengths = || texts.iter().flatten().map(|text: &ScoredText| text.tokens.len());
    let windows = Windows { tokens: lengths().sum(), seq_len: lengths().max().unwrap_or(0) };
    runnable.check_memory(windows, progress)?;
    let (found, tokens) = likelihoods(&runnable, &texts, progress)?;
    runnable.tensors.check_unchanged()?;

    let (mut samples, mut outcomes) = (Vec::new(), Vec::new());
    let mut found = &found[..];
    for rows in tasks {
        let first = samples.len();
        for (row, question) in rows.questions.iter().enumerate() {
            let (own, rest) = found.split_at(question.choices.len());
            samples.push(sample(rows, row, question, own));
            found = rest;
        }
        outcomes.push(outcome(rows, &samples[first..]));
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(TasksOutcome {
        model: runnable.name.to_owned(),
        tasks: outcomes,
        texts: texts.iter().map(Vec::len).sum(),
        text_tokens: texts.iter().flatten().map(|text| text.tokens.len()).sum(),
        tokens,
        seconds,
        rows_per_second: samples.len() as f64 / seconds,
        cpu_seconds: cpu_seconds() - cpu_start,
        device: backend.device(),
        samples,
    })
}

fn sample(rows: &TaskRows, row: usize, question: &Question, found: &[Likelihood]) -> Sample {
    let logs: Vec<f64> = found.iter().map(|likelihood| likelihood.log).collect();
    let answer = greatest(logs.iter().copied());
    let by_length = || {
        let lengths = question.choices.iter().map(|choice| choice.characters as f64);
        greatest(logs.iter().zip(lengths).map(|(log, length)| log / length))
    };
    let (right, right_norm) = match rows.task.measure {
        Measure::Accuracy => (answer == question.gold, None),
        Measure::AccuracyAndNormalized => {
            (answer == question.gold, Some(by_length() == question.gold))
        }
        Measure::LastWord => (found[question.gold].greedy, None),
    };
    Sample {
        task: rows.task.name,
        row,
        greedy: found.iter().map(|likelihood| likelihood.greedy).collect(),
        gold: question.gold,
        log_likelihoods: logs,
        answer,
        right,
        right_norm,
    }
}

/// The number of the greatest value; of equal ones the first.
fn greatest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (number, value) in values.enumerate() {
        if value > best.1 {
            best = (number, value);
        }
    }
    best.0
}

fn outcome(rows: &TaskRows, samples: &[Sample]) -> TaskOutcome {
    let share = |right: bool| f64::from(u8::from(right));
    let (acc, acc_stderr) = mean(samples.iter().map(|sample| share(sample.right)));
    let normed: Option<Vec<f64>> =
        samples.iter().map(|sample| sample.right_norm.map(share)).collect();
    let normed = normed.map(|normed| mean(normed.into_iter()));
    let perplexity = (rows.task.measure == Measure::LastWord).then(|| {
        let (mean, error) = mean(samples.iter().map(|sample| -sample.log_likelihoods[sample.gold]));
        (mean.exp(), mean.exp() * error)
    });
    TaskOutcome {
        task: rows.task.name.to_owned(),
        file: rows.file.clone(),
        rows: samples.len(),
        acc,
        acc_stderr,
        acc_norm: normed.map(|normed| normed.0),
        acc_norm_stderr: normed.map(|normed| normed.1),
        perplexity: perplexity.map(|perplexity| perplexity.0),
        perplexity_stderr: perplexity.map(|perplexity| perplexity.1),
    }
}

/// The mean and its standard error, from the sample's variance (divided by one less than there are).
fn mean(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, (variance / count).sqrt())
}

/// Fails if a task that a limit is given for does not reach it.
///
/// # Errors
/// A failed check that names every such task.
pub fn check_accuracies(outcome: &TasksOutcome, least: impl Fn(&str) -> Option<f64>) -> Result<()> {
    let missed = outcome.tasks.iter().filter_map(|task| {
        let least = least(&task.task)?;
        (task.acc.is_nan() || task.acc < least)
            .then(|| format!("acc {:.4} of {} is below --min-acc {least}", task.acc, task.task))
    });
    let missed: Vec<String> = missed.collect();
    if missed.is_empty() { Ok(()) } else { Err(Error::check(missed.join(", "))) }
}

#[cfg(test)]
#[path = "tasks_tests.rs"]
mod tests;
