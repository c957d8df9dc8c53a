/*! The stages and their order: calibrate, plan, pack, block by block. */

pub mod outcome;
pub mod progress;

use std::path::{Path, PathBuf};

use crate::Result;
use crate::checkpoint::Source;
use crate::recipe::Recipe;
use crate::text::TextSet;
use outcome::{DryRun, FileOutcome, QuantizeOutcome};
use progress::Progress;

/// Which windows a model is calibrated on.
pub struct Calibration {
    pub text: TextSet,
    pub samples: usize,
    pub seq_len: usize,
    pub seed: u64,
}

/// Where the checkpoint goes and what may be there already.
pub struct Output {
    pub out: PathBuf,
    pub overwrite: bool,
    pub resume: bool,
}

/// Text on which the cost in accuracy is measured.
pub struct Evaluation {
    pub text: TextSet,
    pub seq_len: usize,
    pub windows: Option<usize>,
}

pub fn quantize(source: &Source, calibration: &Calibration, recipe: &Recipe, output: &Output, evaluation: Option<&Evaluation>, progress: &dyn Progress) -> Result<QuantizeOutcome> { todo!() }
pub fn dry_run(source: &Source, calibration: &Calibration, recipe: &Recipe, output: &Output) -> Result<DryRun> { todo!() }
pub fn calibrate(source: &Source, calibration: &Calibration, out: &Path, overwrite: bool, progress: &dyn Progress) -> Result<FileOutcome> { todo!() }
pub fn plan(calibration_file: &Path, recipe: &Recipe, out: &Path, overwrite: bool) -> Result<FileOutcome> { todo!() }
pub fn pack(source: &Source, plan_file: &Path, output: &Output, evaluation: Option<&Evaluation>, progress: &dyn Progress) -> Result<QuantizeOutcome> { todo!() }
