/*! stdout, which holds the result of a command and nothing else: a table, or one JSON object. */

use std::cell::Cell;
use std::io::{ErrorKind, IsTerminal, Write};

use crate::printable::{printable_json, printable_styled, printable_text};
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

    /// Whether results are JSON objects.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Refuses a stdout that is closed, before the work whose result would go there.
    ///
    /// # Errors
    /// Kind `Machine`.
    pub(crate) fn check_open(&self) -> Result<()> {
        if machine::stdout_was_closed() {
            Err(unwritable("it is closed".to_owned()))
        } else {
            Ok(())
        }
    }

    /// Writes a part of a text that comes piece by piece, and returns whether anybody still reads it. On a terminal,
    /// characters that would act on it are escapes.
    ///
    /// # Errors
    /// Kind `Machine` if stdout cannot be written.
    pub(crate) fn write_piece(&self, piece: &str) -> Result<bool> {
        self.note_written();
        let mut stdout = std::io::stdout().lock();
        let shown = match stdout.is_terminal() {
            true => printable_text(piece),
            false => piece.into(),
        };
        match stdout.write_all(shown.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(unwritable(error.to_string())),
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
    if machine::stdout_was_closed() {
        return Err(unwritable("it is closed".to_owned()));
    }
    match write_now(text) {
        // A reader that stopped reading (`| head`) has what was wanted.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(unwritable(error.to_string())),
        _ => Ok(()),
    }
}

fn unwritable(why: String) -> Error {
    let error = Error::machine(format!("cannot write the result to stdout: {why}"));
    error.hint("send stdout to a file with room, or to a program that reads all of it")
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
