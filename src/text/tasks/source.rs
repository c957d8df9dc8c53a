/*! Where a task's rows come from: a file that the user names, one of a directory of such files, or the Hub. */

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Question, Task};
use crate::hub::Hub;
use crate::text::rows;
use crate::{Error, Result};

/// The revision at which the Hub keeps every data set as Parquet, `CONFIG/SPLIT/0000.parquet`.
const PARQUET: &str = "refs/convert/parquet";

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
    /// The task's first `limit` questions: from the file named with it, or else from `NAME.jsonl` in `directory`, or
    /// without one from the Hub.
    ///
    /// # Errors
    /// If there is no such file, it cannot be read, or has a row that is no question of the task.
    pub fn load(
        &self,
        directory: Option<&Path>,
        limit: Option<usize>,
        hub: &Hub<'_>,
    ) -> Result<TaskRows> {
        let (path, file) = match (&self.file, directory) {
            (Some(file), _) => (file.clone(), file.display().to_string()),
            (None, Some(directory)) => {
                let path = in_directory(self.task, directory)?;
                (path.clone(), path.display().to_string())
            }
            (None, None) => from_hub(self.task, hub)?,
        };
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

/// The data set's file in the Hub's cache, and its name there.
fn from_hub(task: &Task, hub: &Hub<'_>) -> Result<(PathBuf, String)> {
    let found = hub.dataset_file(task.repo, PARQUET, &task.hub_file()).map_err(|error| {
        let named = error.hint_text().map_or(String::new(), |hint| format!("; or {hint}"));
        let hint = format!(
            "without the Hub give --tasks-dir DIR with {0}.jsonl in it, or --tasks {0}=FILE{named}",
            task.name
        );
        error.context(format!("there are no rows for {}", task.name)).hint(hint)
    })?;
    let name = format!("{}/{} ({})", found.repo, found.file, found.commit);
    Ok((found.path, name))
}

/// `NAME.jsonl`, `.json`, `.parquet`, or the first two in gzip.
fn in_directory(task: &Task, directory: &Path) -> Result<PathBuf> {
    let forms = ["jsonl", "json", "parquet", "jsonl.gz", "json.gz"];
    let paths = forms.map(|form| directory.join(format!("{}.{form}", task.name)));
    paths.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        Error::input(format!("{} has no {}.jsonl", directory.display(), task.name))
            .hint(format!("name the file: --tasks {}=FILE", task.name))
    })
}
