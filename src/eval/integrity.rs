/*! Whether a checkpoint is what was written: its files, the plan, and every tensor. */

use super::verify::{Check, check};
use crate::checkpoint::linear::{from_tensors, order_spec, read_order, specs};
use crate::checkpoint::plan::{BlockPlan, LinearPlan, SitePlan};
use crate::checkpoint::{AtomCheckpoint, Manifest, Stored, TensorSpec};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::network::{expect, key_mean_spec, read_key_mean};
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
    let mut checks = Vec::new();
    progress.begin("verify", blocks.len());
    checks.push(check("shapes", shapes(checkpoint, architecture, kv, blocks)));
    checks.push(check("checksums", checksums(checkpoint, progress)));
    checks.push(check("orders", orders(checkpoint, blocks, progress)));
    checks.push(check("codes", codes(checkpoint, blocks, progress)));
    if kv.is_centered() {
        checks.push(check("mean keys", mean_keys(checkpoint, architecture, kv)));
    }
    checks.push(check("kept tensors", kept(checkpoint, architecture, blocks, progress)));
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

/// Every tensor the plan asks for is there with its type and shape, and none besides.
fn shapes(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    kv: &KvFormat,
    blocks: &[BlockPlan],
) -> Result<String> {
    let mut expected: Vec<TensorSpec> = Vec::new();
    if kv.is_centered() {
        expected.extend((0..blocks.len()).map(|block| key_mean_spec(architecture, block)));
    }
    for site in blocks.iter().flatten() {
        expected.push(order_spec(&site.name, site.width()));
        for linear in quantized(site) {
            expected.extend(specs(&linear.name, linear.rows, &site.weights(linear)));
        }
    }
    for spec in &expected {
        checkpoint.fetch(spec)?;
    }
    let kept = kept_tensors(architecture, blocks);
    for (name, shape) in &kept {
        expect(checkpoint, name, shape)?;
    }
    let (needed, found) = (expected.len() + kept.len(), checkpoint.names().count());
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
fn kept(
    checkpoint: &AtomCheckpoint,
    architecture: &Architecture,
    blocks: &[BlockPlan],
    progress: &dyn Progress,
) -> Result<String> {
    let kept = kept_tensors(architecture, blocks);
    for (name, _) in &kept {
        let tensor = checkpoint.tensor(name)?;
        tensor.check_finite(&|| progress.check_stop())?;
        tensor.release();
    }
    Ok(format!("{} tensors in full precision are finite", kept.len()))
}

fn kept_tensors(architecture: &Architecture, blocks: &[BlockPlan]) -> Vec<(String, Vec<usize>)> {
    let hidden = architecture.hidden;
    let table = vec![architecture.vocabulary, hidden];
    let mut kept =
        vec![(EMBEDDING.to_owned(), table.clone()), (FINAL_NORM.to_owned(), vec![hidden])];
    if !architecture.tied {
        kept.push((architecture.head_name().to_owned(), table));
    }
    for (index, block) in blocks.iter().enumerate() {
        kept.extend(architecture.unquantized_tensors(index));
        for site in block {
            let whole = site.linears.iter().filter(|linear| linear.bits == 16);
            kept.extend(whole.map(|linear| {
                (format!("{}.weight", linear.name), vec![linear.rows, site.channels])
            }));
        }
    }
    kept
}

fn quantized(site: &SitePlan) -> impl Iterator<Item = &LinearPlan> {
    site.linears.iter().filter(|linear| linear.bits < 16)
}
