//! Lines that the user types.

use std::io::{BufRead, IsTerminal};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::Ui;
use crate::Result;
use crate::network::no_thread;
use crate::progress::Progress;

/// How often it is asked whether the user stops.
const LOOK: Duration = Duration::from_millis(50);

/// Lines of stdin, read on their own thread, so that waiting for one does not hide that the user stops.
pub(super) struct Lines {
    lines: Receiver<std::io::Result<String>>,
    terminal: bool,
}

impl Lines {
    /// Begins to read.
    pub(super) fn new() -> Result<Self> {
        let (sender, lines) = sync_channel(0);
        let read = move || {
            for line in std::io::stdin().lock().lines() {
                if sender.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().spawn(read).map_err(no_thread)?;
        Ok(Self { lines, terminal: std::io::stdin().is_terminal() })
    }

    /// The next line; none at the end.
    pub(super) fn next(&self, ui: &Ui) -> Result<Option<String>> {
        if self.terminal {
            ui.ask("> ");
        }
        loop {
            ui.check_stop()?;
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => return Ok(Some(line?)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }
}
