/*! stdout, which holds the result of a command and nothing else: a table, or one JSON object. */

use std::cell::Cell;
use std::io::{ErrorKind, Write};

use crate::printable::{printable_json, printable_styled};
use crate::report::Report;
use crate::{Error, Result, machine};

/// Writes the command's one result.
pub struct Output {
    json: bool,
    written: Cell<bool>,
}

impl Output {
    /// With `json`, results are JSON objects instead of tables.
    pub fn new(json: bool) -> Self {
        machine::owe_json(json);
        Self { json, written: Cell::new(false) }
    }

    /// Writes an outcome.
    ///
    /// # Errors
    /// Kind `Machine` if stdout cannot be written: it is closed, or its disk is full. A reader
    /// that went away is no error.
    pub(crate) fn write(&self, outcome: &impl Report) -> Result<()> {
        if self.json {
            self.write_json(outcome)
        } else {
            self.note_written();
            write_stdout(&printable_styled(&outcome.text()))
        }
    }

    /// Whether an error is still owed to stdout as JSON: a JSON reader gets exactly one object, and
    /// a failed check comes after the outcome it judges.
    pub(crate) fn owes_json(&self) -> bool {
        self.json && !self.written.get()
    }

    /// Writes a JSON object.
    pub(crate) fn write_json(&self, object: &impl serde::Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(object)
            .map_err(|error| Error::machine(format!("cannot write the result as JSON: {error}")))?;
        let mut text = printable_json(text);
        text.push('\n');
        self.note_written();
        write_stdout(&text)
    }

    /// From here on, nothing else may go to stdout.
    fn note_written(&self) {
        self.written.set(true);
        machine::owe_json(false);
    }
}

/// Writes text to stdout.
fn write_stdout(text: &str) -> Result<()> {
    let failed = |why: String| {
        let error = Error::machine(format!("cannot write the result to stdout: {why}"));
        error.hint("send stdout to a file with room, or to a program that reads all of it")
    };
    if machine::stdout_was_closed() {
        return Err(failed("it is closed".to_owned()));
    }
    match write_now(text) {
        // A reader that stopped reading (`| head`) has what was wanted.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(failed(error.to_string())),
        _ => Ok(()),
    }
}

/// Writes help or the version. Whoever stopped reading (`| head`) has what was wanted.
pub(super) fn write_help(text: &str) -> Result<()> {
    match write_now(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::machine(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

fn write_now(text: &str) -> std::io::Result<()> {
    let mut stdout = anstream::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
