/*! Refuses weights and activations that are too small for their scales.

A scale is an f16. Below 2^-14 it loses bits, below 2^-25 it is 0, and what it should scale with it: a network whose up
projection is a hundred thousand times smaller and whose down projection is as much larger computes the same, and cannot
be held like that. Groups that contribute next to nothing may be as small as they like. */

use rayon::prelude::*;

use crate::checkpoint::Tensor;
use crate::checkpoint::plan::SitePlan;
use crate::model::architecture::Experts;
use crate::model::sites::SiteSpec;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::OutlierFormat;
use crate::{Error, Result};

/// The least scale that f16 holds to an eighth of itself: subnormal numbers are 2^-24 apart.
const LEAST_SCALE: f32 = 1.0 / (1 << 22) as f32;

/// Share of a linear's output, or of a site's activation, that may come from smaller scales.
const NEGLIGIBLE: f64 = 0.02;

/// Refuses a linear of which more than a negligible share of the output comes from scales that f16 does not hold.
/// `source` is its weight `[out, channels]`, `order` its site's channel order, `energy` that of the site's channels: the
/// share is that of `sum w^2 E`, the expected squared output.
///
/// # Errors
/// Input, naming the linear; what a source tensor cannot be read for.
pub(super) fn check_weights(
    name: &str,
    linear: &QuantizedLinear,
    source: &Tensor<'_>,
    order: &[i32],
    energy: &[f64],
) -> Result<()> {
    let outliers = match &linear.outliers {
        OutlierBlock::Int8 { scales, .. } | OutlierBlock::Fp8 { scales, .. } => &scales[..],
        OutlierBlock::None | OutlierBlock::F16(_) => &[],
    };
    let small = |scale: f32| scale.abs() < LEAST_SCALE;
    let none_small = !linear.scales.iter().any(|scale| small(scale.to_f32()));
    if none_small && outliers.iter().all(|scale| scale.to_f32() != 0.0) {
        return Ok(());
    }
    let row_format = &linear.format.row;
    let (grouped, group_size) = (row_format.grouped_channels(), row_format.numbers.group_size);
    let lost_and_all = |row: usize| -> Result<(f64, f64)> {
        let weights = source.rows_f32(row..row + 1)?;
        let (mut lost, mut all) = (0.0, 0.0);
        for (slot, channel) in order.iter().enumerate() {
            let Ok(channel) = usize::try_from(*channel) else { continue };
            let output = f64::from(weights[channel]).powi(2) * energy[channel];
            all += output;
            let held = match slot < grouped {
                true => !small(linear.scale(row, slot / group_size)),
                // Of INT8 and FP8, whose codes are finer, a scale that is there will do.
                false => outliers.get(row).is_none_or(|scale| scale.to_f32() != 0.0),
            };
            lost += if held { 0.0 } else { output };
        }
        Ok((lost, all))
    };
    let rows = (0..linear.rows).into_par_iter().map(lost_and_all).collect::<Result<Vec<_>>>()?;
    source.release();
    let (lost, all) = rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
    refuse(lost, all, || format!("the weights of {name}"))
}

/// Refuses a block whose quantized activations are too small for their scales, from the energies of its sites over
/// `tokens` tokens. The scale of values is their greatest magnitude over the greatest code; it is taken to be that of their
/// root mean square or more.
///
/// # Errors
/// Input, naming the site.
pub(super) fn check_activations(
    specs: &[SiteSpec],
    experts: Option<&Experts>,
    plan: &[SitePlan],
    energies: &[Vec<f64>],
    tokens: usize,
) -> Result<()> {
    for ((site, spec), energy) in plan.iter().zip(specs).zip(energies) {
        if site.bits == 16 {
            continue;
        }
        // Of an expert's own site the tokens are not counted: its even share stands for them.
        let tokens = match (spec.expert, experts) {
            (Some(expert), Some(experts)) if expert < experts.count => {
                tokens * experts.per_token / experts.count
            }
            _ => tokens,
        };
        let order = site.order(energy);
        let sum = |slots: &[i32]| -> (f64, usize) {
            let channels = slots.iter().filter_map(|channel| usize::try_from(*channel).ok());
            channels.fold((0.0, 0), |(sum, count), channel| (sum + energy[channel], count + 1))
        };
        let (grouped, outliers) = order.split_at(site.groups() * site.group_size);
        let groups =
            grouped.chunks(site.group_size).map(|group| (group, 8.0, f64::from(LEAST_SCALE)));
        // Their scales must not round to 0.
        let least = f64::from(LEAST_SCALE) / 8.0;
        let outliers = match site.outlier_format {
            OutlierFormat::Int8 => Some((outliers, 127.0, least)),
            OutlierFormat::Fp8 => Some((outliers, 448.0, least)),
            OutlierFormat::F16 => None,
        };
        let lost = groups.chain(outliers).map(|(slots, greatest_code, least)| {
            let (energy, channels) = sum(slots);
            let mean_square = energy / (tokens.max(1) * channels.max(1)) as f64;
            let held = mean_square.sqrt() / greatest_code >= least;
            if held { 0.0 } else { energy }
        });
        let lost = lost.sum();
        refuse(lost, sum(&order).0, || format!("the activations of {}", site.name))?;
    }
    Ok(())
}

fn refuse(lost: f64, all: f64, what: impl Fn() -> String) -> Result<()> {
    if lost <= NEGLIGIBLE * all {
        return Ok(());
    }
    Err(Error::input(format!(
        "{} are too small for their scales: {:.0} % of what they contribute has scales below 2^-22, which f16 does not hold",
        what(),
        100.0 * lost / all
    ))
    .hint(
        "multiply the linear before by a power of two and divide the linear after by it, which changes \
         nothing else; or leave the linears of this site at 16 bits in a plan, and its activations too",
    ))
}

#[cfg(test)]
#[path = "underflow_tests.rs"]
mod tests;
