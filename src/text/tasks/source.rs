/*! Where a task's rows come from: a file that the user names, or one of a directory of such files. */

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::Value;

use super::{Question, Task};
use crate::{Error, Result};

/// A task and, where the user names one, the file of its rows: `piqa`, or `piqa=FILE`.
#[derive(Clone, Debug)]
pub struct TaskFile {
    /// The task.
    pub task: &'static Task,
    /// The file that was named with it.
    pub file: Option<PathBuf>,
}

impl FromStr for TaskFile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, file) = match text.split_once('=') {
            Some((name, file)) => (name, Some(PathBuf::from(file))),
            None => (text, None),
        };
        Ok(Self { task: Task::named(name)?, file })
    }
}

/// A task with its questions.
#[derive(Debug)]
pub struct TaskRows {
    /// The task.
    pub task: &'static Task,
    /// The file that the questions come from.
    pub file: String,
    /// They, in the file's order.
    pub questions: Vec<Question>,
}

impl TaskFile {
    /// The task's first `limit` questions, from the file named with it, or else from `NAME.jsonl` in `directory`.
    ///
    /// # Errors
    /// If there is no such file, it cannot be read, or has a row that is no question of the task.
    pub fn load(&self, directory: Option<&Path>, limit: Option<usize>) -> Result<TaskRows> {
        let path = match (&self.file, directory) {
            (Some(file), _) => file.clone(),
            (None, Some(directory)) => in_directory(self.task, directory)?,
            (None, None) => return Err(no_file(self.task)),
        };
        let file = path.display().to_string();
        let rows = rows(&path)?;
        let questions = rows.iter().take(limit.unwrap_or(usize::MAX)).enumerate();
        let questions = questions.map(|(row, value)| {
            self.task.question(value).map_err(|error| {
                let what =
                    format!("row {} of {file} is no question of {}", row + 1, self.task.name);
                error.context(what).hint("docs/tasks.md has the columns that each task reads")
            })
        });
        let questions: Vec<Question> = questions.collect::<Result<_>>()?;
        if questions.is_empty() {
            return Err(Error::input(format!("{file} holds no row")));
        }
        Ok(TaskRows { task: self.task, file, questions })
    }
}

fn no_file(task: &Task) -> Error {
    Error::input(format!("there is no file of rows for {}", task.name)).hint(format!(
        "give --tasks-dir DIR with {0}.jsonl in it, or --tasks {0}=FILE; the rows are those of {1}, {2} {3}",
        task.name, task.repo, task.config, task.split
    ))
}

/// `NAME.jsonl`, or `NAME.json`.
fn in_directory(task: &Task, directory: &Path) -> Result<PathBuf> {
    let paths = ["jsonl", "json"].map(|form| directory.join(format!("{}.{form}", task.name)));
    paths.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        Error::input(format!("{} has no {}.jsonl", directory.display(), task.name))
            .hint(format!("name the file: --tasks {}=FILE", task.name))
    })
}

/// The rows of a file, one JSON object a line; empty lines do not count.
fn rows(path: &Path) -> Result<Vec<Value>> {
    let text = fs_err::read_to_string(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            serde_json::from_str(line).map_err(|error| {
                Error::input(format!("{} line {}: {error}", path.display(), at + 1))
                    .hint("a task's file has one JSON object a line")
            })
        })
        .collect()
}
