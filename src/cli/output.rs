/*! stdout, which holds the result of a command and nothing else: a table, or one JSON object. */

use std::cell::Cell;
use std::io::{ErrorKind, Write};

use crate::report::Report;
use crate::{Error, Result};

/// Writes the command's one result.
pub struct Output {
    json: bool,
    written: Cell<bool>,
}

impl Output {
    /// With `json`, results are JSON objects instead of tables.
    pub fn new(json: bool) -> Self {
        Self { json, written: Cell::new(false) }
    }

    /// Writes an outcome.
    ///
    /// # Errors
    /// Kind `Machine` if stdout cannot be written, a reader that went away excepted.
    pub(crate) fn write(&self, outcome: &impl Report) -> Result<()> {
        if self.json {
            self.write_json(outcome)
        } else {
            self.written.set(true);
            write_stdout(&outcome.text())
        }
    }

    /// Whether an error is still owed to stdout as JSON: a JSON reader gets exactly one object, and
    /// a failed check comes after the outcome it judges.
    pub(crate) fn owes_json(&self) -> bool {
        self.json && !self.written.get()
    }

    /// Writes a JSON object.
    pub(crate) fn write_json(&self, object: &impl serde::Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(object)
            .map_err(|error| Error::machine(format!("cannot write the result as JSON: {error}")))?;
        text.push('\n');
        self.written.set(true);
        write_stdout(&text)
    }
}

/// Writes text to stdout. A reader that stopped reading (`| head`) has what it wanted: not an error.
fn write_stdout(text: &str) -> Result<()> {
    let mut stdout = anstream::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::machine(format!("cannot write the result to stdout: {error}")))
        }
        _ => Ok(()),
    }
}
