/*! Seconds by stage. */

use std::time::Instant;

use super::outcome::StageSeconds;

/// Adds up the wall-clock seconds of named stages.
#[derive(Default)]
pub(super) struct Timing {
    stages: Vec<StageSeconds>,
}

impl Timing {
    /// Runs `work` and books its time to `stage`.
    pub(super) fn measure<T>(&mut self, stage: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs_f64();
        match self.stages.iter_mut().find(|known| known.stage == stage) {
            Some(known) => known.seconds += seconds,
            None => self.stages.push(StageSeconds { stage: stage.to_owned(), seconds }),
        }
        result
    }

    /// The stages in the order they first began.
    pub(super) fn finish(self) -> Vec<StageSeconds> {
        self.stages
    }
}
