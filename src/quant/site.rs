/*! A site's format: how the activation that feeds a group of linears is reordered, transformed and
quantized.

The functions here are the definition. `backend::cpu::quantize` computes the same bits, fast. */

use half::f16;
use serde::{Deserialize, Serialize};

use super::codebook::Codebook;
use super::float::E4M3;
use super::grid::{self, Peak};
use super::hadamard;
use super::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use super::ranges::{BITS, CLIP, GROUP_MULTIPLE, GROUP_SIZE};
use super::rows::{OutlierRows, QuantizedRows};
use crate::{Error, Result};

/// An entry of a channel order that stands for a channel of zeros.
pub const PADDING: i32 = -1;

/// What is done to each group before it is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transform {
    /// Nothing.
    None,
    /// The orthonormal Hadamard transform of [`hadamard::transform`].
    Hadamard,
}

/// How the activation that feeds a group of linears is reordered and quantized.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteFormat {
    /// Channels of the activation in the source.
    pub channels: usize,
    /// The channel in each slot, `[groups * group_size + outlier_channels]`: a permutation of
    /// `0..channels` with [`PADDING`] entries before the outliers, which are last.
    pub order: Vec<i32>,
    /// How a row is held.
    pub row: RowFormat,
    /// The factor on a group's absmax before its scale is taken; 1 clips nothing.
    pub clip: f32,
    /// What is done to each group before it is quantized.
    pub transform: Transform,
}

impl SiteFormat {
    /// The format with a change, for tests of many.
    #[cfg(test)]
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// A permutation that leaves values in floating point; `order` names the channel in each slot.
    pub fn permutation(order: Vec<i32>) -> Self {
        let channels = order.len();
        let numbers = NumberFormat {
            bits: 16,
            codebook: Codebook::Int,
            group_size: GROUP_MULTIPLE,
            scale: ScaleFormat::F16,
        };
        let row = RowFormat {
            numbers,
            groups: channels / GROUP_MULTIPLE,
            outlier_channels: channels % GROUP_MULTIPLE,
            outlier_format: OutlierFormat::F16,
        };
        Self { channels, order, row, clip: 1.0, transform: Transform::None }
    }

    /// Channels after reordering: padding and outliers included.
    pub fn width(&self) -> usize {
        self.order.len()
    }

    /// The scale of a group of that peak; not finite if f16 cannot hold it.
    #[inline(always)]
    pub fn scale(&self, peak: Peak) -> f32 {
        let numbers = &self.row.numbers;
        let scale = numbers.scale.round(peak.magnitude() * self.clip / numbers.top());
        if numbers.has_signs() { peak.signed(scale) } else { scale }
    }

    /// Checks that the fields agree with each other, which every other function relies on.
    ///
    /// # Errors
    /// An input error that names the wrong field.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::input(what));
        let NumberFormat { bits, codebook, group_size, .. } = self.row.numbers;
        BITS.check("bits", bits)?;
        if bits < 16 && !codebook.has_bits(bits) {
            return wrong(format!("there are no {} codes of {bits} bits", codebook.name()));
        }
        CLIP.check("the clip ratio", self.clip)?;
        GROUP_SIZE.check("the group size", group_size)?;
        let RowFormat { groups, outlier_channels, .. } = self.row;
        let width = groups
            .checked_mul(group_size)
            .and_then(|grouped| grouped.checked_add(outlier_channels));
        if width != Some(self.width()) {
            return wrong(format!(
                "the channel order has {} entries, but {groups} groups of {group_size} and {outlier_channels} outliers were declared",
                self.width()
            ));
        }
        let mut seen = vec![false; self.channels];
        for (slot, &channel) in self.order.iter().enumerate() {
            if channel == PADDING && slot < self.row.grouped_channels() {
                continue;
            }
            let entry = usize::try_from(channel).ok().and_then(|index| seen.get_mut(index));
            match entry {
                Some(seen) if !*seen => *seen = true,
                Some(_) => {
                    return wrong(format!("channel {channel} occurs twice in the channel order"));
                }
                None => {
                    return wrong(format!(
                        "entry {slot} of the channel order is {channel}, but the site has {} channels",
                        self.channels
                    ));
                }
            }
        }
        match seen.iter().position(|seen| !seen) {
            Some(channel) => wrong(format!("channel {channel} is missing in the channel order")),
            None => Ok(()),
        }
    }

    /// Permutes one row of an activation or of a weight to the site's order and transforms its
    /// groups: `row` is `[channels]`, `out` is `[width]`. Outliers are not transformed.
    pub fn permute(&self, row: &[f32], out: &mut [f32]) {
        debug_assert_eq!((row.len(), out.len()), (self.channels, self.width()));
        for (value, &channel) in out.iter_mut().zip(&self.order) {
            *value = if channel == PADDING { 0.0 } else { row[channel as usize] };
        }
        if self.transform == Transform::Hadamard {
            let grouped = &mut out[..self.row.grouped_channels()];
            grouped.chunks_exact_mut(self.row.numbers.group_size).for_each(hadamard::transform);
        }
    }

    /// [`SiteFormat::permute`] of every row: `[tokens, channels]` to `[tokens, width]`. A site of 16 bits
    /// multiplies its weights with the result.
    pub fn permute_rows_plain(&self, x: &[f32], tokens: usize) -> Vec<f32> {
        let mut permuted = vec![0.0; tokens * self.width()];
        for token in 0..tokens {
            let row = &x[token * self.channels..][..self.channels];
            self.permute(row, &mut permuted[token * self.width()..][..self.width()]);
        }
        permuted
    }
}

/// The scale of a group whose absmax is `absmax`: `absmax * clip / greatest code`, rounded to f16.
/// Infinite if f16 cannot hold it.
#[inline(always)]
pub fn scale_of(absmax: f32, clip: f32, greatest: f32) -> f32 {
    f16::from_f32(absmax * clip / greatest).to_f32()
}

/// The code of `value`: that of the nearest number, ties as [`Codebook::nearest`] has them.
#[inline(always)]
pub fn code_of(codebook: Codebook, value: f32, inverse: f32, limits: (f32, f32)) -> i8 {
    codebook.code(codebook.nearest(value * inverse, limits))
}

/// `value` rounded to FP8: the nearest number of E4M3 times the scale, a product that is exact in f32.
#[inline(always)]
pub fn fp8_of(value: f32, inverse: f32, scale: f32) -> f32 {
    E4M3.round(value * inverse) * scale
}

/// The greatest INT8 code; its negative is the least.
pub const GREATEST_INT8: f32 = 127.0;

/// Quantizes activations `[tokens, channels]`.
///
/// # Errors
/// An input error that names token and channel if a value is NaN or infinite, or token and group
/// if a scale (or an f16 outlier) is beyond the range of f16.
pub fn quantize_rows_plain(x: &[f32], tokens: usize, format: &SiteFormat) -> Result<QuantizedRows> {
    let row_format = format.row;
    let (grouped, outliers) = (row_format.grouped_channels(), row_format.outlier_channels);
    let numbers = row_format.numbers;
    let mut codes = Vec::with_capacity(tokens * grouped);
    let mut scales = Vec::with_capacity(tokens * row_format.groups);
    let mut outlier_codes = Vec::new();
    let mut outlier_scales = Vec::new();
    let mut outlier_values = Vec::new();
    let mut permuted = vec![0.0; format.width()];
    for token in 0..tokens {
        let row = &x[token * format.channels..][..format.channels];
        if let Some(channel) = row.iter().position(|value| !value.is_finite()) {
            return Err(Error::input(format!(
                "the activation of token {token}, channel {channel} is {}",
                row[channel]
            ))
            .hint("the model overflows: check that its weights are intact"));
        }
        format.permute(row, &mut permuted);
        let (groups, tail) = permuted.split_at(grouped);
        for (group, values) in groups.chunks_exact(numbers.group_size).enumerate() {
            let limits = numbers.limits();
            let scale = format.scale(Peak::of(values));
            if !scale.is_finite() {
                return Err(overflow(token, &format!("the scale of group {group}")));
            }
            let inverse = grid::inverse(scale);
            let code = |&value: &f32| code_of(numbers.codebook, value, inverse, limits);
            codes.extend(values.iter().map(code));
            scales.push(scale);
        }
        match row_format.outliers() {
            None => {}
            Some(OutlierFormat::Int8) => {
                let scale = scale_of(absmax(tail), 1.0, GREATEST_INT8);
                if !scale.is_finite() {
                    return Err(overflow(token, "the scale of the outlier channels"));
                }
                let (inverse, limits) = (grid::inverse(scale), (-GREATEST_INT8, GREATEST_INT8));
                let code = |&value: &f32| code_of(Codebook::Int, value, inverse, limits);
                outlier_codes.extend(tail.iter().map(code));
                outlier_scales.push(scale);
            }
            Some(OutlierFormat::Fp8) => {
                let scale = scale_of(absmax(tail), 1.0, E4M3.highest);
                if !scale.is_finite() {
                    return Err(overflow(token, "the scale of the outlier channels"));
                }
                let inverse = grid::inverse(scale);
                outlier_values.extend(tail.iter().map(|&value| fp8_of(value, inverse, scale)));
            }
            Some(OutlierFormat::F16) => {
                let rounded = tail.iter().map(|&value| f16::from_f32(value).to_f32());
                outlier_values.extend(rounded);
                if !outlier_values[token * outliers..].iter().all(|value| value.is_finite()) {
                    return Err(overflow(token, "an outlier channel"));
                }
            }
        }
    }
    Ok(QuantizedRows {
        tokens,
        format: row_format,
        codes,
        scales,
        outliers: match row_format.outliers() {
            None => OutlierRows::None,
            Some(OutlierFormat::Int8) => {
                OutlierRows::Int8 { codes: outlier_codes, scales: outlier_scales }
            }
            Some(OutlierFormat::Fp8) => OutlierRows::Fp8(outlier_values),
            Some(OutlierFormat::F16) => OutlierRows::F16(outlier_values),
        },
    })
}

/// The values of the codes, `value(code) * scale`, and FP8 and f16 outliers as they are, `[tokens, width]`.
pub fn dequantize_rows_plain(rows: &QuantizedRows) -> Vec<f32> {
    let RowFormat { numbers, groups, outlier_channels: outliers, .. } = rows.format;
    let (grouped, group_size) = (rows.format.grouped_channels(), numbers.group_size);
    let mut values = Vec::with_capacity(rows.tokens * (grouped + outliers));
    for token in 0..rows.tokens {
        for group in token * groups..(token + 1) * groups {
            let codes = &rows.codes[group * group_size..][..group_size];
            values.extend(
                codes.iter().map(|&code| numbers.codebook.value(code) * rows.scales[group]),
            );
        }
        let own = token * outliers..(token + 1) * outliers;
        match &rows.outliers {
            OutlierRows::None => {}
            OutlierRows::Int8 { codes, scales } => {
                values.extend(codes[own].iter().map(|&code| f32::from(code) * scales[token]));
            }
            OutlierRows::Fp8(outliers) | OutlierRows::F16(outliers) => {
                values.extend(&outliers[own])
            }
        }
    }
    values
}

/// The greatest magnitude, NaN if any value is NaN.
#[inline(always)]
pub fn absmax(values: &[f32]) -> f32 {
    Peak::of(values).magnitude()
}

fn overflow(token: usize, what: &str) -> Error {
    Error::input(format!("{what} of token {token} is beyond the range of f16"))
        .hint("the model's activations overflow: check that its weights are intact")
}

#[cfg(test)]
mod tests;
