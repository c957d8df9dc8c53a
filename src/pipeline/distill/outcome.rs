//! What a distillation returns: plain data, serialized as the `--json` objects.

use std::path::PathBuf;

use serde::Serialize;

use crate::checkpoint::DistilledStep;

/// The result of `atom distill`.
#[derive(Clone, Debug, Serialize)]
pub struct DistillOutcome {
    /// The directory that was written; none if nothing was gained.
    pub out: Option<PathBuf>,
    /// The checkpoint's name.
    pub model: String,
    /// Values that were trained.
    pub parameters: usize,
    /// Steps.
    pub steps: usize,
    /// Windows of a step.
    pub windows_per_step: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows that were trained on.
    pub windows: usize,
    /// Windows that were held back.
    pub held_out_windows: usize,
    /// Mean divergence of the held-out tokens before training, in nats.
    pub before: f64,
    /// The same with the values that were kept.
    pub after: f64,
    /// The step that they are of; 0 if nothing was gained.
    pub kept_step: usize,
    /// All measurements.
    pub curve: Vec<DistilledStep>,
    /// Steps that a run before had made.
    pub resumed_steps: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Of a step of this run, the median; none if it made no step.
    pub step_seconds: Option<f64>,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Highest device memory; none on the CPU.
    pub peak_gpu_bytes: Option<u64>,
    /// What it ran on.
    pub device: String,
}

/// What `atom distill --dry-run` found.
#[derive(Clone, Debug, Serialize)]
pub struct DistillDryRun {
    /// Where the checkpoint would go.
    pub out: PathBuf,
    /// The checkpoint's name.
    pub model: String,
    /// Steps.
    pub steps: usize,
    /// Windows of a step.
    pub windows_per_step: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows that would be trained on.
    pub windows: usize,
    /// Windows that would be held back.
    pub held_out_windows: usize,
    /// Memory that the run would need at its peak, estimated.
    pub memory_bytes: u64,
    /// Bytes of disk that the run would still reserve.
    pub needed_disk_bytes: u64,
    /// Whether an unfinished run of the same job would be continued.
    pub resumes: bool,
}
