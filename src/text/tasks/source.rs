/*! Where a task's rows come from: a file that the user names, one of a directory of such files, or the Hub. */

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Question, Task};
use crate::hub::Hub;
use crate::text::file::DataPath;
use crate::text::rows::each_row;
use crate::{Error, Result};

/// The revision at which the Hub keeps every data set as Parquet, `CONFIG/SPLIT/0000.parquet`.
const PARQUET: &str = "refs/convert/parquet";

/// The most bytes of a file's questions, which stay in memory.
const QUESTION_BYTES: usize = 1 << 30;

/// A task and, where the user names one, the file of its rows: `piqa`, or `piqa=FILE`.
#[derive(Clone, Debug)]
pub struct TaskFile {
    /// The task.
    pub task: &'static Task,
    /// The file of its rows, if the user names one.
    pub file: Option<PathBuf>,
}

impl FromStr for TaskFile {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, file) = match text.split_once('=') {
            Some((_, "")) => {
                return Err(Error::usage(format!("`{text}` names no file"))
                    .hint("write the path of its rows after `=`"));
            }
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
    /// Questions, in file order.
    pub questions: Vec<Question>,
}

impl TaskFile {
    /// The task's first `limit` questions: from the file named with it, else from `NAME.jsonl` in `directory`, or
    /// without a directory from the Hub.
    ///
    /// # Errors
    /// If there is no such file, it cannot be read, or a row is not a question of the task.
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
        let mut questions = Vec::new();
        let mut bytes = 0;
        each_row(&DataPath::open(&path, hub.progress())?, None, &mut |_, row| {
            hub.progress().check_stop()?;
            if questions.len() >= limit.unwrap_or(usize::MAX) {
                return Ok(ControlFlow::Break(()));
            }
            let question = self.task.question(&row).map_err(|error| {
                let row = questions.len() + 1;
                error
                    .context(format!("row {row} of {file} is no question of {}", self.task.name))
                    .hint("docs/tasks.md has the columns that each task reads")
            })?;
            bytes += question.bytes();
            if bytes > QUESTION_BYTES {
                let what = format!("{file} holds more than {} MB of questions", bytes >> 20);
                return Err(Error::input(what).hint("ask fewer of them with --limit N"));
            }
            questions.push(question);
            Ok(ControlFlow::Continue(()))
        })?;
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

/// `NAME.jsonl`, `.json`, `.parquet`, the first two in gzip, `.csv` or `.tsv`.
fn in_directory(task: &Task, directory: &Path) -> Result<PathBuf> {
    let forms = ["jsonl", "json", "parquet", "jsonl.gz", "json.gz", "csv", "tsv"];
    let paths = forms.map(|form| directory.join(format!("{}.{form}", task.name)));
    paths.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        Error::input(format!("{} has no {}.jsonl", directory.display(), task.name))
            .hint(format!("name the file: --tasks {}=FILE", task.name))
    })
}
