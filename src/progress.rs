/*! Progress reports of long work, and requests to stop it. */

use crate::{Error, Result};

/// Receives the events of long work, which does not print anything itself.
pub trait Progress: Sync {
    /// A stage of `steps` equal steps begins, e.g. `quantize` with one step a block.
    fn begin(&self, stage: &str, steps: usize);
    /// One step of the current stage ended; `detail` describes it in a few words.
    fn advance(&self, detail: &str);
    /// The current stage ended.
    fn end(&self);
    /// Information for the user.
    fn info(&self, message: &str);
    /// A warning: an unexpected loss of accuracy or time.
    fn warn(&self, message: &str);
    /// Whether the user asked the run to stop.
    fn stop_requested(&self) -> bool;

    /// An error once the user asked the run to stop; called between units of work.
    fn check_stop(&self) -> Result<()> {
        if self.stop_requested() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

/// Ignores all events; for tests and library callers.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _stage: &str, _steps: usize) {}
    fn advance(&self, _detail: &str) {}
    fn end(&self) {}
    fn info(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
    fn stop_requested(&self) -> bool {
        false
    }
}
