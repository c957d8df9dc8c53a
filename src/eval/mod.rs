/*! Perplexity and integrity, over any model that can run. */

use std::path::Path;
use serde::Serialize;
use crate::Result;
use crate::checkpoint::Source;
use crate::pipeline::Evaluation;
use crate::pipeline::progress::Progress;

/// The result of `atom eval-ppl`.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityOutcome {
    pub model: String,
    pub dataset: String,
    pub perplexity: f64,
    /// Standard error of the estimate, from the spread of the windows' means.
    pub standard_error: f64,
    pub windows: usize,
    pub seq_len: usize,
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// CPU seconds of the process in the meantime.
    pub cpu_seconds: f64,
    pub device: String,
}
/// One line of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct Check { pub name: String, pub ok: bool, pub detail: String }
/// The result of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyOutcome { pub model: String, pub ok: bool, pub checks: Vec<Check>, pub perplexity: Option<f64>, pub reference_perplexity: Option<f64>, /** relative: perplexity / reference - 1 */ pub increase: Option<f64>, pub device: String }
/// Limits that make an evaluation a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits { pub max_ppl: Option<f64>, /** relative, e.g. 0.1 for 10 % */ pub max_ppl_increase: Option<f64> }

/// What can be evaluated.
pub enum Model { Source(Source), Atom(crate::checkpoint::AtomCheckpoint) }
impl Model { /** directory (Atom or HF), alias or bundled name */ pub fn open(model: &str) -> Result<Self> { todo!() } }

pub fn perplexity(model: &Model, evaluation: &Evaluation, progress: &dyn Progress) -> Result<PerplexityOutcome> { todo!() }
pub fn verify(checkpoint: &Path, reference: Option<&Model>, evaluation: Option<&Evaluation>, limits: Limits, progress: &dyn Progress) -> Result<VerifyOutcome> { todo!() }
