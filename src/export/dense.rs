/*! Dense weights in the source's channel order, of any checkpoint: what every program that loads the source's network
loads.

A weight is `code * scale`, exact in f32; the Hadamard transform is undone in f32, the channel order by copying, and the
result is rounded once to the output's type, to nearest, ties to even. */

use half::{bf16, f16};
use rayon::prelude::*;

use super::config::config;
use super::format::{Container, Contents, Format, Part};
use super::model::{ExportedModel, Piece, Subject};
use super::obstacle::Obstacle;
use crate::checkpoint::linear::read_order;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{Dtype, Tensor, TensorBytes, TensorSpec};
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::{hadamard, weights};
use crate::{Error, Result};

/// Dense weights, BF16 or F16.
pub(super) struct Dense;

impl Format for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn loaded_by(&self) -> &'static str {
        "every program that loads the source"
    }

    fn recipes(&self) -> &'static [&'static str] {
        &[]
    }

    fn obstacles(&self, _: &Subject<'_>) -> Vec<Obstacle> {
        Vec::new()
    }

    fn notes(&self, subject: &Subject<'_>) -> Vec<String> {
        let mut notes = Vec::new();
        if subject.sites().any(|site| site.bits < 16) {
            notes.push("activations are not quantized where the export runs".to_owned());
        }
        if subject.recipe.kv_bits < 16 {
            notes.push("the KV cache is not quantized where the export runs".to_owned());
        }
        notes
    }

    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>> {
        // F32 is twice as long as what it holds: a code and a scale have 11 significant bits, as f16 does.
        let dtype = if model.dtype == Dtype::F32 { Dtype::F16 } else { model.dtype };
        let part = |piece| match piece {
            Piece::Unquantized(tensor) if tensor.dtype != dtype => rounded(model, tensor, dtype),
            Piece::Unquantized(tensor) => model.copied(tensor),
            Piece::Quantized(site, linear) => dequantized(model, site, linear, dtype),
        };
        let parts = model.pieces()?.into_iter().map(part).collect();
        let config = config(model.checkpoint.config(), dtype, None);
        Ok(Contents { parts, container: Container::Shards { config } })
    }
}

/// A part that holds a stored tensor in another type.
fn rounded<'a>(model: &'a ExportedModel<'a>, tensor: Tensor<'a>, dtype: Dtype) -> Part<'a> {
    /// Values converted at once.
    const VALUES: usize = 1 << 22;
    let make = move || {
        model.verify(tensor.name)?;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let width = tensor.len().checked_div(rows).unwrap_or(0).max(1);
        let step = (VALUES / width).max(1);
        let mut bytes = vec![0; tensor.len() * dtype.size_bytes()];
        for (part, out) in bytes.chunks_mut(step * width * dtype.size_bytes()).enumerate() {
            let first = part * step;
            let values = tensor.rows_f32(first..(first + step).min(rows))?;
            round(&values, dtype, out).ok_or_else(|| too_large(tensor.name, dtype))?;
        }
        tensor.release();
        Ok(vec![TensorBytes::from(bytes)])
    };
    Part { tensors: vec![TensorSpec::new(tensor.name, dtype, tensor.shape)], make: Box::new(make) }
}

/// A part that holds a quantized linear's weights.
fn dequantized<'a>(
    model: &'a ExportedModel<'a>,
    site: &'a SitePlan,
    linear: &'a LinearPlan,
    dtype: Dtype,
) -> Part<'a> {
    let name = format!("{}.weight", linear.name);
    let spec = TensorSpec::new(name, dtype, [linear.rows, site.channels]);
    let make = move || {
        let grouped = site.groups() * site.group_size;
        model.verify(&format!("{}.order", site.name))?;
        let checkpoint = model.checkpoint;
        let order =
            read_order(checkpoint, &site.name, site.channels, grouped, site.outlier_channels)?;
        let quantized = model.quantized(site, linear)?;
        let bytes = dense_rows(&quantized, &site.format(order), dtype);
        let bytes = bytes.ok_or_else(|| too_large(&linear.name, dtype))?;
        Ok(vec![TensorBytes::from(bytes)])
    };
    Part { tensors: vec![spec], make: Box::new(make) }
}

/// The weights `[rows, channels]` of a linear in the source's channel order; none if one is beyond the range of `dtype`.
pub(super) fn dense_rows(
    linear: &QuantizedLinear,
    format: &SiteFormat,
    dtype: Dtype,
) -> Option<Vec<u8>> {
    let row_bytes = format.channels * dtype.size_bytes();
    let mut bytes = vec![0; linear.rows * row_bytes];
    let mut slots = vec![0; format.channels];
    for (slot, channel) in format.order.iter().enumerate() {
        if let Ok(channel) = usize::try_from(*channel) {
            slots[channel] = slot;
        }
    }
    let buffers = || (vec![0f32; format.width()], vec![0f32; format.channels]);
    let fits = bytes.par_chunks_mut(row_bytes).enumerate().map_init(
        buffers,
        |(permuted, row), (index, out)| {
            weights::dequantize_row(linear, index, permuted);
            if format.transform == Transform::Hadamard {
                // It is its own inverse; outliers, which come last, are not transformed.
                let groups = permuted[..format.row.grouped_channels()]
                    .chunks_exact_mut(format.row.numbers.group_size);
                groups.for_each(hadamard::transform);
            }
            for (value, slot) in row.iter_mut().zip(&slots) {
                *value = permuted[*slot];
            }
            round(row, dtype, out).is_some()
        },
    );
    let fits = fits.all(|fits| fits);
    fits.then_some(bytes)
}

/// Rounds finite values to F16 or BF16 once, to nearest, ties to even; none if one becomes infinite.
fn round(values: &[f32], dtype: Dtype, out: &mut [u8]) -> Option<()> {
    let pairs = values.iter().zip(out.as_chunks_mut::<2>().0);
    let mut largest = 0;
    let infinity = match dtype {
        Dtype::BF16 => {
            for (value, out) in pairs {
                let bits = value.to_bits();
                let rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
                largest = largest.max(rounded & 0x7fff);
                *out = rounded.to_le_bytes();
            }
            bf16::INFINITY.to_bits()
        }
        _ => {
            for (value, out) in pairs {
                let rounded = f16::from_f32(*value).to_bits();
                largest = largest.max(rounded & 0x7fff);
                *out = rounded.to_le_bytes();
            }
            f16::INFINITY.to_bits()
        }
    };
    (largest < infinity).then_some(())
}

fn too_large(name: &str, dtype: Dtype) -> Error {
    Error::input(format!("{name} holds a weight beyond the range of {dtype}"))
        .hint("export with --dtype bf16, whose range is that of f32")
}
