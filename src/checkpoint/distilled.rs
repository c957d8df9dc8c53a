/*! What training by distillation did to a checkpoint; part of `atom.json`. */

use serde::{Deserialize, Serialize};

use super::Provenance;
use crate::{Error, Result};

/// What was trained, on what, and what it gained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistillationRecord {
    /// Where the windows came from, those held back included.
    pub text: Provenance,
    /// Steps that were made.
    pub steps: usize,
    /// Windows of a step.
    pub windows_per_step: usize,
    /// Windows that were held back to choose the step.
    pub held_out_windows: usize,
    /// Learning rates.
    pub rates: DistillationRates,
    /// How many values were trained.
    pub parameters: usize,
    /// The step whose values were kept.
    pub kept_step: usize,
    /// Mean divergence of the held-out windows' tokens from the source before training, in nats.
    pub before: f64,
    /// The same of the kept step.
    pub after: f64,
    /// All measurements, in the order of the steps.
    pub curve: Vec<DistilledStep>,
}

/// Learning rates of training, at their highest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistillationRates {
    /// Of groups' scales, as shares of them.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub scales: f32,
    /// Of outliers' scales, likewise.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub outlier_scales: f32,
    /// Of norms' weights, as shares of a norm's root mean square.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub norms: f32,
    /// Of clip ratios.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clips: f32,
}

impl DistillationRates {
    /// All of them, `factor` times as high.
    pub fn times(self, factor: f32) -> Self {
        Self {
            scales: factor * self.scales,
            outlier_scales: factor * self.outlier_scales,
            norms: factor * self.norms,
            clips: factor * self.clips,
        }
    }
}

/// A measurement between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistilledStep {
    /// Steps before it.
    pub step: usize,
    /// Mean loss of the steps since the measurement before, in nats a token; none at the beginning.
    pub trained: Option<f64>,
    /// Mean divergence of the held-out windows, in nats a token.
    pub held_out: f64,
}

impl DistillationRecord {
    /// What it was trained on, and what that gained.
    pub fn in_words(&self) -> String {
        let Self { steps, windows_per_step, before, after, ref text, .. } = *self;
        let change = crate::units::change(after / before);
        format!(
            "{steps} steps of {windows_per_step} windows of {} tokens of {}; {before:.4} -> {after:.4} nats a token ({change}) on \
             windows held back",
            text.seq_len, text.dataset
        )
    }

    /// Refuses measurements that are none.
    ///
    /// # Errors
    /// Input: what is wrong.
    pub(super) fn check(&self) -> Result<()> {
        let Self { before, after, .. } = self;
        if !(before.is_finite() && after.is_finite() && after < before) {
            let message = format!("`distillation` says {after} nats after and {before} before");
            return Err(Error::input(message));
        }
        Ok(())
    }
}
