/*! `atom calibrate`: channel energies of every site, and their sensitivity where it is asked for, into a file. */

use std::time::Instant;

use super::calibration::CalibrationData;
use super::division::Division;
use super::energies::EnergyMeter;
use super::job::CalibrationInput;
use super::memory::{SensitivityPlan, calibration_bytes};
use super::outcome::{FileOutcome, Measured, count_linears};
use super::plan::plan_network;
use super::prepare::{Calibration, Texts};
use super::sensor::{Sensor, Subject};
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::{OutputFile, Source};
use crate::machine::hand_back;
use crate::model::AttentionSpecs;
use crate::network::memory::{self, Workspace};
use crate::network::{BlockWeights, Stream, caution, network, prefetch};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;

/// Settings under which sensitivity is measured.
pub struct Measuring<'a> {
    /// How linears are quantized; its width and outlier count are those that effects are measured at.
    pub recipe: &'a Recipe,
    /// Outlier counts besides that of the recipe.
    pub outlier_counts: &'a [usize],
}

/// Calibrates a model: with `measuring` its sensitivity too.
pub fn calibrate<B: Backend>(
    backend: &B,
    source: &Source,
    calibration: &Calibration,
    measuring: Option<&Measuring<'_>>,
    file: &OutputFile,
    progress: &dyn Progress,
) -> Result<FileOutcome> {
    calibration.check_written()?;
    let start = Instant::now();
    let network = network(source, progress)?;
    let blocks = measuring
        .map(|measuring| plan_network(measuring.recipe, &network.architecture))
        .transpose()?;
    let input = calibration.input(source, network, progress)?;
    hand_back();
    let text_bytes = Texts { calibration: Some(calibration), evaluation: None }.bytes(source)?;
    let plan = measuring.zip(blocks.as_ref());
    let plan = plan.map(|(measuring, blocks)| SensitivityPlan { recipe: measuring.recipe, blocks });
    let workspace = Workspace::of(backend);
    memory::check(calibration_bytes(&input, workspace, plan, text_bytes), progress)?;
    input.check_tensors()?;
    caution(source, &input.architecture, calibration.seq_len, progress);
    let data = measure(backend, &input, measuring, progress)?;
    source.check_unchanged()?;
    file.write(&data.to_bytes(&input.architecture)?)?;
    Ok(FileOutcome {
        out: file.shown().to_owned(),
        model: data.model,
        seconds: start.elapsed().as_secs_f64(),
        sites: data.statistics.iter().map(|block| block.energies.len()).sum(),
        linears: count_linears(&input.architecture),
        bits_per_weight: None,
        sensitivity: data.sensitivity.as_ref().map(Measured::of),
        allocation: None,
    })
}

/// Carries the windows through the original blocks and measures on the way.
pub(super) fn measure<B: Backend>(
    backend: &B,
    input: &CalibrationInput<'_>,
    measuring: Option<&Measuring<'_>>,
    progress: &dyn Progress,
) -> Result<CalibrationData> {
    let CalibrationInput { source, architecture, tokens, provenance, .. } = input;
    let seq_len = provenance.seq_len;
    let attention = &AttentionSpecs::of(architecture, KvFormat::FULL, seq_len);
    let mut sensor = match measuring {
        None => None,
        Some(&Measuring { recipe, outlier_counts }) => {
            let subject =
                Subject { backend, tensors: *source, architecture, attention, recipe, progress };
            Some(Sensor::new(subject, outlier_counts, tokens)?)
        }
    };
    // Last, because its batches are the largest: what it reserves for a block's work is what holds.
    let division = Division::new(backend.ranks(), provenance.samples);
    let windows = division.windows(tokens, seq_len);
    let mut stream = Stream::embed_chunks(backend, *source, architecture, &windows, 0)?;
    progress.begin("calibrate", architecture.blocks);
    let mut statistics = Vec::with_capacity(architecture.blocks);
    let meter = EnergyMeter { backend, architecture, attention, division, progress };
    let load = |index| BlockWeights::<B>::load_all(backend, *source, architecture, index);
    prefetch(0..architecture.blocks, load, |_, weights| {
        let weights = weights()?;
        let measured = meter.measure(&weights, &mut stream)?;
        if let Some(sensor) = &mut sensor {
            sensor.measure(&weights, &measured.energies)?;
        }
        statistics.push(measured);
        progress.advance("");
        Ok(())
    })?;
    let sensitivity = sensor.map(|sensor| sensor.finish(input.unquantized_bytes()?)).transpose()?;
    progress.end();
    Ok(CalibrationData {
        model: source.name().to_owned(),
        fingerprint: source.fingerprint()?,
        config: source.config().clone(),
        provenance: provenance.clone(),
        tokens: tokens.clone(),
        statistics,
        sensitivity,
    })
}
