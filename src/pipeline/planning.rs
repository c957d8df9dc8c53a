/*! `atom plan`: what becomes of every site and linear, from a calibration file and a recipe. */

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::allocate::{Allocating, allocate};
use super::calibration::CalibrationData;
use super::outcome::{FileOutcome, count_linears};
use super::plan::{CalibrationFile, PLAN_VERSION, PlanFile, plan_network};
use crate::checkpoint::OutputFile;
use crate::checkpoint::plan::bits_per_weight;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// What decides a plan, next to the calibration.
#[derive(Clone, Copy)]
pub enum Planning<'a> {
    /// One width and outlier count everywhere: those of the recipe.
    Uniform(&'a Recipe),
    /// What costs least within a target, by the recipe given or the one that was measured.
    Allocated(Option<&'a Recipe>, &'a Allocating),
}

/// Plans from a calibration file.
pub fn plan(
    calibration_file: &Path,
    planning: Planning<'_>,
    file: &OutputFile,
) -> Result<FileOutcome> {
    let start = Instant::now();
    let (data, architecture, sha256) = CalibrationData::read(calibration_file)?;
    let (recipe, blocks, allocation) = match planning {
        Planning::Uniform(recipe) => (recipe.clone(), plan_network(recipe, &architecture)?, None),
        Planning::Allocated(recipe, allocating) => {
            let sensitivity = data.sensitivity.as_ref().ok_or_else(|| {
                Error::input(format!(
                    "{} holds no sensitivity, by which bits are allocated",
                    calibration_file.display()
                ))
                .hint("measure it once with `atom calibrate --sensitivity`")
            })?;
            let recipe = recipe.unwrap_or(&sensitivity.recipe);
            let (blocks, allocated) = allocate(sensitivity, &architecture, recipe, allocating)?;
            (recipe.clone(), blocks, Some(allocated))
        }
    };
    let bits = bits_per_weight(&blocks);
    // Relative where both files lie in one directory, so that the two can be moved together.
    let calibration = fs_err::canonicalize(calibration_file)?;
    let same_directory = calibration.parent() == file.path().parent();
    let path = match calibration.file_name().filter(|_| same_directory) {
        Some(name) => PathBuf::from(name),
        None => calibration,
    };
    let sites = blocks.iter().flatten().count();
    let plan = PlanFile {
        plan_version: PLAN_VERSION,
        model: data.model.clone(),
        recipe,
        calibration: CalibrationFile { path, sha256 },
        blocks,
    };
    let text = serde_json::to_string_pretty(&plan).expect("a plan has only JSON types");
    file.write(format!("{text}\n").as_bytes())?;
    Ok(FileOutcome {
        out: file.shown().to_owned(),
        model: data.model,
        seconds: start.elapsed().as_secs_f64(),
        sites,
        linears: count_linears(&architecture),
        bits_per_weight: Some(bits),
        sensitivity: None,
        allocation,
    })
}
