//! The steps of a training, with measurements on held-out windows between them.

use std::time::{Duration, Instant};

use super::adam::schedule;
use super::parameters::{Parameters, Trained};
use super::reference::Reference;
use super::state::TrainingState;
use super::windows::Division;
use crate::backend::Train;
use crate::checkpoint::{DistillationRates, DistilledStep};
use crate::network::TrainedNetwork;
use crate::progress::Progress;
use crate::{Error, Kind, Result};

/// Learning rates at their highest, unless told otherwise.
pub const RATES: DistillationRates =
    DistillationRates { scales: 3e-3, outlier_scales: 5e-4, norms: 2e-3, clips: 2e-3 };
/// Measurements on held-out windows in a training, besides the one at its beginning.
const MEASUREMENTS: usize = 10;
/// How long a run works at least before its state is kept again.
const SAVED_EVERY: Duration = Duration::from_secs(20);

/// How long a training is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Course {
    /// Steps.
    pub(super) steps: usize,
    /// Windows of a step.
    pub(super) per_step: usize,
    /// Tokens of a window.
    pub(super) seq_len: usize,
    /// Seed of the windows' order.
    pub(super) seed: u64,
}

/// What a training works with.
pub(super) struct Training<'a, 'n, B: Train> {
    pub(super) backend: &'a B,
    pub(super) network: TrainedNetwork<'n, B>,
    pub(super) parameters: &'a Parameters,
    pub(super) reference: &'a Reference,
    pub(super) tokens: &'a [u32],
    pub(super) division: &'a Division,
    pub(super) course: Course,
    pub(super) rates: DistillationRates,
    pub(super) progress: &'a dyn Progress,
}

impl<B: Train> Training<'_, '_, B> {
    /// Makes the steps that are left. `save` keeps the state now and then, and when the run is to stop. Returns the seconds of
    /// each step.
    pub(super) fn run(
        &mut self,
        state: &mut TrainingState,
        mut save: impl FnMut(&TrainingState) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let Course { steps, .. } = self.course;
        self.progress.begin("distill", steps);
        self.set(&state.parameters)?;
        let mut saved = Instant::now();
        let goes_on = state.measured.steps > 0;
        if goes_on {
            (0..state.measured.steps).for_each(|_| self.progress.advance(&last(state)));
        }
        let mut seconds = Vec::new();
        loop {
            let (start, steps_before) = (Instant::now(), state.measured.steps);
            let made = self.measure_and_step(state);
            if let Err(error) = made {
                // The state is that after the last complete step.
                if error.kind() == Kind::Interrupted && state.measured.steps > 0 {
                    save(state)?;
                }
                return Err(error);
            }
            if state.measured.steps > steps_before {
                seconds.push(start.elapsed().as_secs_f64());
            }
            if state.measured.steps == steps && is_measured(state) {
                break;
            }
            if saved.elapsed() > SAVED_EVERY {
                save(state)?;
                saved = Instant::now();
            }
        }
        self.progress.end();
        save(state)?;
        Ok(seconds)
    }

    /// Measures if a measurement is due, else makes a step.
    fn measure_and_step(&mut self, state: &mut TrainingState) -> Result<()> {
        self.progress.check_stop()?;
        let (done, steps) = (state.measured.steps, self.course.steps);
        let due = done.is_multiple_of(steps.div_ceil(MEASUREMENTS)) || done == steps;
        if due && !is_measured(state) {
            return self.measure(state);
        }
        let nats = self.step(state)?;
        state.measured.recent.push(nats);
        state.measured.steps += 1;
        self.progress.advance(&last(state));
        Ok(())
    }

    /// The mean loss of the held-out windows; the parameters are kept where it is the least so far.
    fn measure(&self, state: &mut TrainingState) -> Result<()> {
        let Course { per_step, seq_len, .. } = self.course;
        let mut sum = 0.0;
        for windows in self.division.held.chunks(per_step) {
            let original = self.reference.windows(self.backend, windows)?;
            let stop = &mut || self.progress.check_stop();
            let nats = self.network.divergences(&self.tokens_of(windows), &original, stop)?;
            sum += nats.iter().sum::<f64>();
        }
        let held_out = sum / (self.division.held.len() * seq_len) as f64;
        check_finite(held_out)?;
        let measured = &mut state.measured;
        let best = measured.curve.iter().map(|point| point.held_out).fold(f64::INFINITY, f64::min);
        if held_out < best {
            state.best.copy_from_slice(&state.parameters);
        }
        let recent = std::mem::take(&mut measured.recent);
        let trained =
            (!recent.is_empty()).then(|| recent.iter().sum::<f64>() / recent.len() as f64);
        measured.curve.push(DistilledStep { step: measured.steps, trained, held_out });
        Ok(())
    }

    /// One step; its mean loss before it.
    fn step(&mut self, state: &mut TrainingState) -> Result<f64> {
        let Course { steps, per_step, seed, .. } = self.course;
        let windows = self.division.of_step(state.measured.steps, per_step, seed);
        let tokens = self.tokens_of(&windows);
        let original = self.reference.windows(self.backend, &windows)?;
        let stop = &mut || self.progress.check_stop();
        let (nats, gradient) = self.network.gradients(&tokens, &original, stop)?;
        let mean = nats.iter().sum::<f64>() / tokens.len() as f64;
        check_finite(mean)?;
        let gradient = self.parameters.gradient(&gradient, tokens.len());
        let factor = schedule(state.measured.steps, steps);
        let rates = self.parameters.kinds().map(|(kind, range)| {
            let rate = match kind {
                Trained::Scale => self.rates.scales,
                Trained::OutlierScale => self.rates.outlier_scales,
                Trained::Norm => self.rates.norms,
                Trained::Clip => self.rates.clips,
            };
            (rate * factor, range)
        });
        state.adam.step(&mut state.parameters, &gradient, rates);
        self.parameters.confine(&mut state.parameters);
        self.set(&state.parameters)?;
        Ok(mean)
    }

    /// Gives the network the values of parameters.
    fn set(&mut self, parameters: &[f32]) -> Result<()> {
        let values = self.parameters.values(parameters);
        for (index, block) in values.blocks.iter().enumerate() {
            self.network.set_block(index, block)?;
        }
        self.network.set_final_norm(&values.final_norm)
    }

    fn tokens_of(&self, windows: &[usize]) -> Vec<u32> {
        let seq_len = self.course.seq_len;
        let window = |window: &usize| &self.tokens[window * seq_len..(window + 1) * seq_len];
        windows.iter().flat_map(window).copied().collect()
    }
}

/// Whether the parameters as they are have been measured.
fn is_measured(state: &TrainingState) -> bool {
    state.measured.curve.last().is_some_and(|point| point.step == state.measured.steps)
}

/// The held-out divergence measured last, for the progress bar.
fn last(state: &TrainingState) -> String {
    let point = state.measured.curve.last();
    point.map_or_else(String::new, |point| format!("held out {:.4} nats", point.held_out))
}

fn check_finite(nats: f64) -> Result<()> {
    if nats.is_finite() {
        return Ok(());
    }
    Err(Error::input("the checkpoint's predictions are not finite on this text")
        .hint("check the checkpoint with `atom verify`"))
}
