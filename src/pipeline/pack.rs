/*! `atom pack`: the checkpoint that a plan describes. */

use std::path::Path;

use super::calibration::CalibrationData;
use super::energies::Statistics;
use super::job::{CalibrationInput, Job};
use super::outcome::QuantizeOutcome;
use super::output::Output;
use super::plan::PlanFile;
use super::prepare::Texts;
use super::run::run;
use crate::backend::Backend;
use crate::checkpoint::Source;
use crate::model::check_plan;
use crate::network::{Network, network};
use crate::progress::Progress;
use crate::text::Evaluation;
use crate::{Error, Result};

/// What is to be packed, and where to.
pub struct Packing<'a> {
    /// The model.
    pub source: &'a Source,
    /// The file of its plan.
    pub plan_file: &'a Path,
    /// Where the checkpoint goes.
    pub output: &'a Output,
    /// The text that is checked for a measurement after the run.
    pub evaluation: Option<&'a Evaluation>,
}

/// Quantizes a model as a plan says. What it cost in accuracy is not measured here.
pub fn pack<B: Backend>(
    backend: &B,
    packing: &Packing<'_>,
    progress: &dyn Progress,
) -> Result<QuantizeOutcome> {
    let Packed { job, statistics, output } = Packed::prepare(backend, packing, progress)?;
    run(backend, &job, &output, Some(&statistics), progress)
}

/// What is to be packed, read and checked.
pub(super) struct Packed<'a> {
    pub(super) job: Job<'a>,
    pub(super) statistics: Vec<Statistics>,
    pub(super) output: Output,
}

impl<'a> Packed<'a> {
    /// Reads plan and calibration.
    pub(super) fn prepare<B: Backend>(
        backend: &B,
        packing: &Packing<'a>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Packing { source, plan_file, output, evaluation } = *packing;
        let (plan, calibration_file) = PlanFile::read(plan_file)?;
        let destination = output.protecting(source, [plan_file, calibration_file.as_path()]);
        destination.check()?;
        let (data, _, sha256) = CalibrationData::read(&calibration_file)?;
        if sha256 != plan.calibration.sha256 {
            return Err(Error::input(format!(
                "{} is not the calibration that {} was made from",
                calibration_file.display(),
                plan_file.display()
            ))
            .hint("make the plan again with `atom plan`"));
        }
        if source.fingerprint()? != data.fingerprint {
            return Err(Error::input(format!(
                "{} was calibrated on another model or version of `{}`",
                calibration_file.display(),
                data.model
            ))
            .hint("calibrate this model with `atom calibrate`"));
        }
        let Network { architecture, ignored, .. } = network(source, progress)?;
        check_plan(&architecture, &plan.blocks)?;
        let CalibrationData { provenance, tokens, statistics, .. } = data;
        let input = CalibrationInput { source, architecture, ignored, tokens, provenance };
        let PlanFile { recipe, blocks, .. } = plan;
        let job = Job { input, recipe, blocks };
        let output = Output { destination, resume: output.resume };
        Texts { calibration: None, evaluation }.check(backend, &job, progress)?;
        Ok(Self { job, statistics, output })
    }
}
