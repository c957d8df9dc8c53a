/*! Medians of device work, and the rates that it is measured by. */

use std::time::Duration;

use super::median;
use crate::backend::Memory;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::measure::{Random, SPREADS};
use crate::backend::cuda::timing::{REPLAYS, TRIAL_REPLAYS, rotation};
use crate::{Error, Kind, Result};

/// Times work on a device.
pub(super) struct Timer<'a> {
    pub(super) cuda: &'a Cuda,
}

/// Long enough for a device that has been at its power limit to raise its clock again.
pub(super) const SETTLE: Duration = Duration::from_millis(200);

impl Timer<'_> {
    /// Has the device rest: what is measured first would else be measured at the clock of what went before.
    pub(super) fn settle(&self) -> Result<()> {
        self.cuda.wait()?;
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Median seconds of one call of `work`, which gets the number of the operand set to use.
    pub(super) fn seconds(&self, sets: usize, work: impl Fn(usize) -> Result<()>) -> Result<f64> {
        Ok(median(&mut self.cuda.replays(sets, REPLAYS, work)?))
    }

    /// Median seconds by the fastest of several choices, which `work` gets before the operand set; none where all of
    /// them fail.
    pub(super) fn fastest(
        &self,
        choices: usize,
        sets: usize,
        work: impl Fn(usize, usize) -> Result<()>,
    ) -> Result<Option<f64>> {
        let mut best = None;
        for choice in 0..choices {
            match self.cuda.replays(sets, TRIAL_REPLAYS, |set| work(choice, set)) {
                Ok(mut seconds) => {
                    let seconds = median(&mut seconds);
                    if best.is_none_or(|(_, least)| seconds < least) {
                        best = Some((choice, seconds));
                    }
                }
                Err(error) if error.kind() == Kind::Machine => {}
                Err(error) => return Err(error),
            }
        }
        let Some((choice, _)) = best else { return Ok(None) };
        self.seconds(sets, |set| work(choice, set)).map(Some)
    }

    /// Seconds of a plain read of `bytes`, a multiple of 16, spread as is best.
    pub(super) fn read(&self, bytes: usize) -> Result<f64> {
        let sets = rotation(bytes);
        let from = self.cuda.random(Random::Int8, sets * bytes, 0)?;
        // A word a block, of which there are less than words of 16 bytes.
        let sums = self.cuda.gpu().alloc(bytes / 4)?;
        let read = |choice: usize, set: usize| {
            self.cuda.read(&from, set * bytes, bytes, SPREADS[choice], &sums)
        };
        self.fastest(SPREADS.len(), sets, read)?.ok_or_else(failed)
    }

    /// Seconds of a plain copy of `bytes`, a multiple of 16, spread as is best.
    pub(super) fn copy(&self, bytes: usize) -> Result<f64> {
        let sets = rotation(2 * bytes);
        let from = self.cuda.random(Random::Int8, sets * bytes, 0)?;
        let to = self.cuda.gpu().alloc(sets * bytes)?;
        let copy = |choice: usize, set: usize| {
            self.cuda.copy(&from, set * bytes, bytes, SPREADS[choice], &to)
        };
        self.fastest(SPREADS.len(), sets, copy)?.ok_or_else(failed)
    }
}

fn failed() -> Error {
    Error::machine("the GPU neither reads nor copies its memory")
        .hint("`nvidia-smi` and the system's log say what became of it")
}
