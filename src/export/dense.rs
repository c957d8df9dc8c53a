/*! Dense weights in the source's channel order, of any checkpoint: what every program that loads the source's network
loads.

A weight is `code * scale`, exact in f32; the Hadamard transform is undone in f32, the channel order by copying, and the
result is rounded once to the output's type, to nearest, ties to even. */

use rayon::prelude::*;

use super::cast::{self, round, too_large};
use super::config::config;
use super::format::{Container, Contents, Format, LOAD, Part, Published};
use super::model::{ExportedModel, Piece, Subject};
use super::obstacle::Obstacle;
use crate::Result;
use crate::checkpoint::linear::read_order;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{Dtype, TensorBytes, TensorSpec};
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::{hadamard, weights};

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

    fn published(&self) -> Published {
        Published {
            library: "transformers",
            tags: &[],
            usage: &[
                LOAD,
                (
                    "Measure it with lm-evaluation-harness",
                    "lm_eval --model hf --model_args pretrained=ORG/NAME --tasks wikitext",
                ),
            ],
        }
    }

    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>> {
        // F32 is twice as long as what it holds: a code and a scale have 11 significant bits, as f16 does.
        let dtype = if model.dtype == Dtype::F32 { Dtype::F16 } else { model.dtype };
        let part = |piece| match piece {
            Piece::Unquantized(tensor) => cast::part(model, tensor, dtype),
            Piece::Quantized(site, linear) => dequantized(model, site, linear, dtype),
        };
        let parts = model.pieces()?.into_iter().map(part).collect();
        let config = config(model.checkpoint.config(), dtype, None);
        Ok(Contents { parts, container: Container::Shards { config } })
    }
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
