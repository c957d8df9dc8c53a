/*! What is trained, as one vector of parameters that begin at 0, and the values of a checkpoint that it stands for.

A parameter t stands for a scale `s (1 + t)`, for a norm's weight `w + r t` with r the root mean square of the norm's weights, or
for a clip ratio `c + t`. So a step of Adam, which has the size of the learning rate whatever the gradient's, is a share of what
is changed. Values are rounded to the type that they are stored in at every use; gradients pass the rounding straight through,
or what is gained would be lost when the checkpoint is written. */

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::checkpoint::Dtype;
use crate::network::{BlockValues, LinearValues, NetworkGradient, SiteValues};
use crate::quant::number::ScaleFormat;

/// What a parameter changes: each has a learning rate of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trained {
    /// A scale of a group.
    Scale,
    /// A scale of a row's outliers.
    OutlierScale,
    /// A norm's weight.
    Norm,
    /// A clip ratio.
    Clip,
}

/// Where values of a kind are in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A norm of a block, before attention or before the MLP.
    Norm(usize, usize),
    /// QK-norm of a block, of queries or keys.
    QkNorm(usize, usize),
    /// Of a block and site.
    Clip(usize, usize),
    /// Of a block, site and linear.
    Scales(usize, usize, usize),
    OutlierScales(usize, usize, usize),
    FinalNorm,
}

/// Parameters that belong together.
struct Part {
    place: Place,
    range: Range<usize>,
    /// What a parameter of 1 adds, where that is the same for all: not for scales.
    unit: f32,
}

/// The values of a network.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NetworkValues {
    /// Of its blocks.
    pub(super) blocks: Vec<BlockValues>,
    /// The last norm.
    pub(super) final_norm: Vec<f32>,
}

/// The parameters of a network.
pub(super) struct Parameters {
    base: NetworkValues,
    norm_type: Dtype,
    parts: Vec<Part>,
    count: usize,
}

/// The least share of a scale, and the least clip ratio, that training may arrive at.
const LEAST_SCALE: f32 = 0.25;
const LEAST_CLIP: f32 = 0.5;

impl Parameters {
    /// Those of `base`, whose norms are stored as `norm_type`.
    pub(super) fn new(base: NetworkValues, norm_type: Dtype) -> Self {
        let mut parts = Vec::new();
        let mut count = 0;
        let mut add = |place, values: usize, unit| {
            if values > 0 {
                parts.push(Part { place, range: count..count + values, unit });
                count += values;
            }
        };
        for (number, block) in base.blocks.iter().enumerate() {
            for (at, norm) in block.norms.iter().enumerate() {
                add(Place::Norm(number, at), norm.len(), root_mean_square(norm));
            }
            for (at, norm) in block.qk_norms.iter().flatten().enumerate() {
                add(Place::QkNorm(number, at), norm.len(), root_mean_square(norm));
            }
            for (at, SiteValues { clip, linears }) in block.sites.iter().enumerate() {
                add(Place::Clip(number, at), usize::from(clip.is_some()), 1.0);
                for (linear, values) in linears.iter().enumerate() {
                    let Some(values) = values else { continue };
                    add(Place::Scales(number, at, linear), values.scales.len(), 1.0);
                    let outliers = values.outlier_scales.len();
                    add(Place::OutlierScales(number, at, linear), outliers, 1.0);
                }
            }
        }
        let final_norm = &base.final_norm;
        add(Place::FinalNorm, final_norm.len(), root_mean_square(final_norm));
        Self { base, norm_type, parts, count }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The parameters of one kind after another.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (Trained, Range<usize>)> {
        self.parts.iter().map(|part| {
            let kind = match part.place {
                Place::Norm(..) | Place::QkNorm(..) | Place::FinalNorm => Trained::Norm,
                Place::Clip(..) => Trained::Clip,
                Place::Scales(..) => Trained::Scale,
                Place::OutlierScales(..) => Trained::OutlierScale,
            };
            (kind, part.range.clone())
        })
    }

    /// The values that parameters stand for, as they are stored.
    pub(super) fn values(&self, parameters: &[f32]) -> NetworkValues {
        let mut values = self.base.clone();
        for Part { place, range, unit } in &self.parts {
            let moved = &parameters[range.clone()];
            let norm = |to: &mut [f32]| {
                for (to, moved) in to.iter_mut().zip(moved) {
                    *to = stored_norm(self.norm_type, unit.mul_add(*moved, *to));
                }
            };
            match *place {
                Place::Norm(block, at) => norm(&mut values.blocks[block].norms[at]),
                Place::QkNorm(block, at) => {
                    norm(&mut values.blocks[block].qk_norms.as_mut().expect("a part is there")[at]);
                }
                Place::FinalNorm => norm(&mut values.final_norm),
                Place::Clip(block, site) => {
                    let clip = values.blocks[block].sites[site].clip.as_mut();
                    let clip = clip.expect("a part is there");
                    *clip = (*clip + moved[0]).clamp(LEAST_CLIP.min(*clip), 1.0);
                }
                Place::Scales(block, site, linear) => {
                    let linear = linear_of(&mut values, [block, site, linear]);
                    let format = linear.scale;
                    stored_scales(&mut linear.scales, moved, |scale| format_round(format, scale));
                }
                Place::OutlierScales(block, site, linear) => {
                    let linear = linear_of(&mut values, [block, site, linear]);
                    stored_scales(&mut linear.outlier_scales, moved, f16::from_f32);
                }
            }
        }
        values
    }

    /// The gradient of the mean loss with respect to the parameters, from that of the sum over `tokens`.
    pub(super) fn gradient(&self, gradient: &NetworkGradient, tokens: usize) -> Vec<f32> {
        let mut to = vec![0.0; self.count];
        let mean = 1.0 / tokens as f32;
        for Part { place, range, unit } in &self.parts {
            let to = &mut to[range.clone()];
            let scaled = |to: &mut [f32], from: &[f32]| {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * (unit * mean));
            };
            let relative = |to: &mut [f32], from: &[f32], base: &[f16]| {
                let rows = to.par_iter_mut().zip(from).zip(base).with_min_len(1 << 14);
                rows.for_each(|((to, from), base)| *to = from * (base.to_f32() * mean));
            };
            let base_of = |[block, site, linear]: [usize; 3]| {
                let linear = &self.base.blocks[block].sites[site].linears[linear];
                linear.as_ref().expect("a part is there")
            };
            match *place {
                Place::Norm(block, at) => scaled(to, &gradient.blocks[block].norms[at]),
                Place::QkNorm(block, at) => {
                    let norms = gradient.blocks[block].qk_norms.as_ref();
                    scaled(to, &norms.expect("a part is there")[at]);
                }
                Place::FinalNorm => scaled(to, &gradient.final_norm),
                Place::Clip(block, site) => {
                    to[0] = gradient.blocks[block].sites[site].clips.iter().sum::<f32>() * mean;
                }
                Place::Scales(block, site, linear) => {
                    let from = &gradient.blocks[block].sites[site].linears[linear].scales;
                    relative(to, from, &base_of([block, site, linear]).scales);
                }
                Place::OutlierScales(block, site, linear) => {
                    let from = &gradient.blocks[block].sites[site].linears[linear].outlier_scales;
                    relative(to, from, &base_of([block, site, linear]).outlier_scales);
                }
            }
        }
        to
    }

    /// Brings parameters back to where their values may be.
    pub(super) fn confine(&self, parameters: &mut [f32]) {
        for Part { place, range, .. } in &self.parts {
            let (least, most) = match *place {
                Place::Norm(..) | Place::QkNorm(..) | Place::FinalNorm => continue,
                Place::Scales(..) | Place::OutlierScales(..) => {
                    (LEAST_SCALE - 1.0, 1.0 / LEAST_SCALE - 1.0)
                }
                Place::Clip(block, site) => {
                    let clip = self.base.blocks[block].sites[site].clip.expect("a part is there");
                    (LEAST_CLIP.min(clip) - clip, 1.0 - clip)
                }
            };
            let own = &mut parameters[range.clone()];
            own.iter_mut().for_each(|parameter| *parameter = parameter.clamp(least, most));
        }
    }
}

fn linear_of(values: &mut NetworkValues, [block, site, linear]: [usize; 3]) -> &mut LinearValues {
    values.blocks[block].sites[site].linears[linear].as_mut().expect("a part is there")
}

fn root_mean_square(values: &[f32]) -> f32 {
    let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    (squares / values.len().max(1) as f64).sqrt() as f32
}

/// A norm's weight as a checkpoint holds it.
fn stored_norm(dtype: Dtype, weight: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(weight).to_f32(),
        Dtype::F16 => f16::from_f32(weight).to_f32(),
        _ => weight,
    }
}

/// A scale on its grid, with its sign.
fn format_round(format: ScaleFormat, scale: f32) -> f16 {
    f16::from_f32(format.round(scale.abs()).copysign(scale))
}

/// Changes scales by the shares `moved`. One that its grid does not hold, or that would vanish, stays as it was.
fn stored_scales(scales: &mut [f16], moved: &[f32], round: impl Fn(f32) -> f16 + Sync) {
    let rows = scales.par_iter_mut().zip(moved).with_min_len(1 << 14);
    rows.for_each(|(scale, moved)| {
        let changed = round(scale.to_f32() * (1.0 + moved));
        if changed.is_finite() && changed != f16::ZERO {
            *scale = changed;
        }
    });
}

#[cfg(test)]
#[path = "parameters_tests.rs"]
mod tests;
