/*! What all formats that copy codes and scales have in common: what they take, and stored bytes in the forms that other
programs read. */

use half::{bf16, f16};

use super::model::{ExportedModel, Subject};
use super::obstacle::Obstacles;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{Dtype, TensorBytes};
use crate::quant::scale::ScaleGrid;
use crate::quant::site::Transform;
use crate::recipe::Order;
use crate::{Error, Result};

/// Notes what no format of codes and scales can say: channels that are not in the source's order, outliers, padding and
/// transformed groups.
pub(super) fn check_sites(subject: &Subject<'_>, obstacles: &mut Obstacles) {
    for site in subject.sites() {
        // Nothing of a site without quantized linears is exported but the source's weights.
        if site.linears.iter().all(|linear| linear.bits == 16) && site.bits == 16 {
            continue;
        }
        let SitePlan { name, channels, group_size, outlier_channels, .. } = site;
        obstacles.check(site.order == Order::None, "order", name, "energy", "none");
        obstacles.check(*outlier_channels == 0, "outliers", name, outlier_channels, "0");
        obstacles.check(site.transform == Transform::None, "transform", name, "hadamard", "none");
        obstacles.check(
            channels.is_multiple_of(*group_size),
            "group",
            name,
            format_args!("{group_size} in {channels} channels, which it does not divide"),
            "a divisor of the channels (pad_groups = false)",
        );
    }
}

/// Notes scales that change when an engine casts them to the model's type.
pub(super) fn check_scale_type(subject: &Subject<'_>, obstacles: &mut Obstacles) {
    for (site, _) in subject.quantized() {
        let kept = subject.dtype != Dtype::BF16 || site.scales != ScaleGrid::F16;
        let needed = "bf16 in a model of BF16, to which engines cast them";
        obstacles.check(kept, "scales", &site.name, site.scales.name(), needed);
    }
}

/// The bits that turn integer codes into what formats without a sign hold, `code + 2^(bits-1)`, in each byte: in two's
/// complement that is the highest bit of each code.
pub(super) fn offset(linear: &LinearPlan) -> u8 {
    match linear.bits {
        2 => 0b1010_1010,
        4 => 0b1000_1000,
        8 => 0b1000_0000,
        bits => unreachable!("no format takes codes of {bits} bits"),
    }
}

/// A linear's codes as they are stored, lowest bits first, `[rows, channels * bits / 8]` bytes, with the bits of `flip`
/// turned in each. They are read as they are written.
pub(super) fn codes<'a>(
    model: &'a ExportedModel<'a>,
    linear: &LinearPlan,
    flip: u8,
) -> Result<TensorBytes<'a>> {
    let tensor = model.checkpoint.tensor(&codes_name(linear))?;
    Ok(model.checkpoint.verified_bytes(tensor, flip))
}

/// The name of the tensor of a linear's codes.
pub(super) fn codes_name(linear: &LinearPlan) -> String {
    format!("{}.weight_codes", linear.name)
}

/// A linear's scales as stored, `[rows, groups]` of `size` bytes each, repeated for rows that share one.
pub(super) fn stored_scales(
    model: &ExportedModel<'_>,
    site: &SitePlan,
    linear: &LinearPlan,
    size: usize,
) -> Result<Vec<u8>> {
    let scales = model.copy(&format!("{}.weight_scales", linear.name), 0)?;
    if linear.rows_per_scale == 1 {
        return Ok(scales);
    }
    let row_bytes = site.groups() * size;
    let rows = (0..linear.rows).flat_map(|row| {
        let first = row / linear.rows_per_scale * row_bytes;
        &scales[first..first + row_bytes]
    });
    Ok(rows.copied().collect())
}

/// A linear's scales as numbers, `[rows, groups]`.
pub(super) fn scales(
    model: &ExportedModel<'_>,
    site: &SitePlan,
    linear: &LinearPlan,
) -> Result<Vec<f16>> {
    let format = site.weights(linear).row.numbers.scale;
    let scales: Vec<f16> = if format.grid.is_stored_as_byte() {
        let bytes = stored_scales(model, site, linear, 1)?;
        bytes.iter().map(|&byte| format.of_byte(byte)).collect()
    } else {
        let bytes = stored_scales(model, site, linear, 2)?;
        bytes.as_chunks::<2>().0.iter().map(|pair| f16::from_le_bytes(*pair)).collect()
    };
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(scales),
        Some(at) => Err(Error::input(format!(
            "tensor `{}.weight_scales` holds {} at {at}",
            linear.name, scales[at]
        ))
        .hint("the file is damaged: copy the checkpoint again")),
    }
}

/// Scales in the model's type, which holds them exactly.
///
/// # Errors
/// Input: a scale that the type does not hold; [`check_scale_type`] refuses checkpoints where there may be one.
pub(super) fn scales_as(scales: &[f16], dtype: Dtype, name: &str) -> Result<Vec<u8>> {
    let mut bytes = vec![0; scales.len() * dtype.size_bytes()];
    match dtype {
        Dtype::BF16 => {
            for (scale, out) in scales.iter().zip(bytes.as_chunks_mut::<2>().0) {
                let rounded = bf16::from_f32(scale.to_f32());
                if rounded.to_f32() != scale.to_f32() {
                    let message = format!("{name} has the scale {scale}, which BF16 does not hold");
                    return Err(Error::input(message)
                        .hint("the file is damaged: copy the checkpoint again"));
                }
                *out = rounded.to_le_bytes();
            }
        }
        Dtype::F32 => {
            for (scale, out) in scales.iter().zip(bytes.as_chunks_mut::<4>().0) {
                *out = scale.to_f32().to_le_bytes();
            }
        }
        _ => {
            for (scale, out) in scales.iter().zip(bytes.as_chunks_mut::<2>().0) {
                *out = scale.to_le_bytes();
            }
        }
    }
    Ok(bytes)
}

/// What of a checkpoint is no part of an export of weights.
pub(super) fn notes(subject: &Subject<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    if subject.recipe.kv_bits < 16 {
        let bits = subject.recipe.kv_bits;
        notes.push(format!(
            "the KV cache of {bits} bits is no part of the export: the engine's own setting decides"
        ));
    }
    notes
}
