/*! Whether a checkpoint is what was written: its files, the plan, and every tensor. */

use super::verify::{Check, check};
use crate::checkpoint::linear::{from_tensors, read_order};
use crate::checkpoint::plan::{BlockPlan, LinearPlan, SitePlan};
use crate::checkpoint::{AtomCheckpoint, Manifest, Stored};
use crate::model::Architecture;
use crate::network::{PlannedTensor, expect, planned_tensors, read_key_mean};
use crate::progress::Progress;
use crate::quant::kv::KvFormat;
use crate::{Error, Result};

/// The checks of all tensors, after that of the plan.
pub(super) fn tensor_checks(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    manifest: &Manifest,
    progress: &dyn Progress,
) -> Vec<Check> {
    let Manifest { kv, blocks, .. } = manifest;
    let planned = planned_tensors(architecture, blocks, kv);
    let mut checks = Vec::new();
    progress.begin("verify", blocks.len());
    checks.push(check("shapes", shapes(checkpoint, &planned)));
    checks.push(check("checksums", checksums(checkpoint, progress)));
    checks.push(check("orders", orders(checkpoint, blocks, progress)));
    checks.push(check("codes", codes(checkpoint, blocks, progress)));
    if kv.is_centered() {
        checks.push(check("mean keys", mean_keys(checkpoint, architecture, kv)));
    }
    checks.push(check("kept tensors", unquantized(checkpoint, &planned, progress)));
    progress.end();
    checks
}

/// `atom.json`, `config.json`, the tokenizer and every other file next to the shards are what was written.
pub(super) fn files(checkpoint: &AtomCheckpoint) -> Result<String> {
    let covered = checkpoint.covered_files();
    covered.iter().try_for_each(|name| checkpoint.verify_file(name))?;
    if checkpoint.covers_files() {
        return Ok(format!("SHA-256 of {}", covered.join(", ")));
    }
    Ok("not covered: this checkpoint was written before atom.json, config.json and the tokenizer had hashes".to_owned())
}

/// Every planned tensor is there with its type and shape, and no other.
fn shapes(checkpoint: &AtomCheckpoint, planned: &[PlannedTensor]) -> Result<String> {
    for tensor in planned {
        match tensor {
            PlannedTensor::Made(spec) => drop(checkpoint.fetch(spec)?),
            PlannedTensor::Unquantized { name, shape } => drop(expect(checkpoint, name, shape)?),
        }
    }
    let (needed, found) = (planned.len(), checkpoint.names().count());
    if needed == found {
        Ok(format!("{found} tensors"))
    } else {
        Err(Error::check(format!("{found} tensors where the plan has {needed}")))
    }
}

fn mean_keys(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    kv: &KvFormat,
) -> Result<String> {
    for block in 0..architecture.blocks {
        read_key_mean(checkpoint, architecture, block, kv)?;
    }
    Ok(format!("{} blocks' mean keys are finite", architecture.blocks))
}

fn checksums(checkpoint: &AtomCheckpoint, progress: &dyn Progress) -> Result<String> {
    for name in checkpoint.names() {
        checkpoint.verify_tensor(name, &|| progress.check_stop())?;
    }
    Ok(format!(
        "SHA-256 of {} tensors, {} bytes",
        checkpoint.names().count(),
        checkpoint.total_bytes()
    ))
}

fn orders(
    checkpoint: &AtomCheckpoint,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let mut sites = 0;
    for site in blocks.iter().flatten() {
        let grouped = site.groups() * site.group_size;
        progress.check_stop()?;
        read_order(checkpoint, &site.name, site.channels, grouped, site.outlier_channels)?;
        sites += 1;
    }
    Ok(format!("{sites} channel orders are permutations and padding"))
}

fn codes(
    checkpoint: &AtomCheckpoint,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let mut linears = 0;
    for block in blocks {
        for site in block {
            for linear in quantized(site) {
                progress.check_stop()?;
                let format = site.weights(linear);
                let codes = from_tensors(checkpoint, &linear.name, linear.rows, &format)?;
                let may_be_signed = format.row.numbers.has_signs();
                let negative = codes.scales.iter().position(|scale| scale.to_f32() < 0.0);
                if let Some(scale) = negative.filter(|_| !may_be_signed) {
                    return Err(Error::check(format!(
                        "{}.weight_scales holds a negative scale at {scale}",
                        linear.name
                    )));
                }
                linears += 1;
            }
        }
        progress.advance("");
    }
    Ok(format!("{linears} linears: codes, scales and outliers in range"))
}

/// Tensors that stayed as they were hold numbers only.
fn unquantized(
    checkpoint: &AtomCheckpoint,
    planned: &[PlannedTensor],
    progress: &dyn Progress,
) -> Result<String> {
    let mut tensors = 0;
    for planned in planned {
        if let PlannedTensor::Unquantized { name, .. } = planned {
            let tensor = checkpoint.tensor(name)?;
            tensor.check_finite(&|| progress.check_stop())?;
            tensor.release();
            tensors += 1;
        }
    }
    Ok(format!("{tensors} tensors in full precision are finite"))
}

fn quantized(site: &SitePlan) -> impl Iterator<Item = &LinearPlan> {
    site.linears.iter().filter(|linear| linear.bits < 16)
}
