/*! The grid of codes: scale from a group's largest magnitude, code from a value.

Shared by rounding, GPTQ and their outlier blocks. The scale is rounded to f16
before any code is computed with it. */

use half::f16;

use super::codebook::Codebook;
use super::float::E4M3;
use super::number::NumberFormat;
use super::scale::{ScaleFormat, ScaleGrid};
use crate::{Error, Result};

/// The greatest magnitude of some values, and whether a negative value has it.
///
/// Magnitudes compare like their bit patterns, with NaN the greatest of all; the sign is the lowest bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peak(u32);

impl Peak {
    /// Of no values.
    pub const NONE: Self = Self(0);

    /// Of `values`.
    #[inline(always)]
    pub fn of(values: &[f32]) -> Self {
        values.iter().fold(Self::NONE, |peak, &value| peak.with(value))
    }

    /// Of these values and one more.
    #[inline(always)]
    pub fn with(self, value: f32) -> Self {
        Self(self.0.max(value.to_bits().rotate_left(1)))
    }

    /// The greatest magnitude, NaN if any value is NaN.
    #[inline(always)]
    pub fn magnitude(self) -> f32 {
        f32::from_bits(self.0 >> 1)
    }

    /// `scale` with the sign that brings the peak to the least code: integers have one more below zero
    /// than above it.
    #[inline(always)]
    pub fn signed(self, scale: f32) -> f32 {
        if self.0 & 1 == 1 || scale == 0.0 { scale } else { -scale }
    }
}

/// How magnitudes become scales and values become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    lowest: f32,
    highest: f32,
    /// `scale = absmax * ratio`.
    ratio: f32,
    /// What scales are rounded to, and whether they have the sign of [`Peak::signed`].
    scale: ScaleFormat,
    codebook: Codebook,
    /// Factors on the scale that are tried, 1 the first.
    factors: &'static [f32],
}

/// How the scales of weights are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// The factor on a group's absmax; 1 clips nothing.
    pub clip: f32,
    /// Whether of several scales the one is taken that costs the least in its group.
    pub search: bool,
}

impl Scaling {
    /// By the absmax times `clip` alone.
    pub fn clipped(clip: f32) -> Self {
        Self { clip, search: false }
    }
}

/// Factors on the scale of integers that are tried: less than 1 clips.
const INT_FACTORS: [f32; 5] = [1.0, 0.9375, 0.875, 0.8125, 0.75];
/// Of FP4, whose steps grow: with 1.5 the absmax falls on 4 instead of 6 ("Four Over Six"), which has finer steps around it.
const FP4_FACTORS: [f32; 6] = [1.0, 1.5, 1.25, 1.125, 0.9375, 0.875];
/// Of powers of two.
const POWER_FACTORS: [f32; 3] = [1.0, 2.0, 0.5];

/// Which scale a group of weights gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRule {
    /// [`Grid::rounding`], where codes are rounded to nearest.
    Rounding,
    /// [`Grid::gptq`].
    Gptq,
}

impl Grid {
    /// The grid of weights in groups of `numbers`.
    ///
    /// The clipped absmax lies on the greatest number (quant.py `quantize_tensor`:
    /// `absmax * clip / (2^(bits-1) - 1)`; gptq.py `Quantizer` with `--quant_type fp`: `2 * absmax * clip / 24`).
    /// Of integers without signed scales that GPTQ chooses, it lies half a step above it (gptq.py `Quantizer`:
    /// `2 * absmax * clip / (2^bits - 1)`). With signed scales the clipped peak lies on the least code, by the
    /// sign of the scale: a step is 7/8 of what the magnitude alone would allow at 4 bits, 3/4 at 3.
    pub fn of(numbers: &NumberFormat, scaling: Scaling, rule: ScaleRule) -> Self {
        let Scaling { clip, search } = scaling;
        let (lowest, highest) = numbers.limits();
        let signed = numbers.has_signs();
        let powers = numbers.scale.grid == ScaleGrid::PowerOfTwo;
        let half_a_step_above =
            rule == ScaleRule::Gptq && numbers.codebook.is_int() && !signed && !powers;
        let top = if half_a_step_above { highest + 0.5 } else { numbers.top() };
        Self {
            lowest,
            highest,
            ratio: clip / top,
            scale: ScaleFormat { signed, ..numbers.scale },
            codebook: numbers.codebook,
            factors: match (search, powers, numbers.codebook.is_int()) {
                (false, ..) => &[1.0],
                (true, true, _) => &POWER_FACTORS,
                (true, false, true) => &INT_FACTORS,
                (true, false, false) => &FP4_FACTORS,
            },
        }
    }

    /// INT8 outliers, unclipped: the absmax lies on the highest code.
    pub fn int8() -> Self {
        Self::with_absmax_on(127.0)
    }

    /// FP8 outliers (E4M3), unclipped: the absmax lies on the highest number.
    pub fn fp8() -> Self {
        Self::with_absmax_on(E4M3.highest)
    }

    fn with_absmax_on(highest: f32) -> Self {
        Self {
            lowest: -highest,
            highest,
            ratio: 1.0 / highest,
            scale: ScaleFormat::F16,
            codebook: Codebook::Int,
            factors: &[1.0],
        }
    }

    /// `scale / absmax`, before the scale is rounded.
    pub fn ratio(&self) -> f32 {
        self.ratio
    }

    /// What scales are rounded to, and whether they have a sign.
    pub fn scale_format(&self) -> ScaleFormat {
        self.scale
    }

    /// The least and the greatest code.
    pub fn limits(&self) -> (f32, f32) {
        (self.lowest, self.highest)
    }

    /// Factors on the scale of a group that are tried, 1 the first and often the only one.
    pub fn factors(&self) -> &'static [f32] {
        self.factors
    }

    /// The scale of a group of that peak, rounded to its grid.
    ///
    /// # Errors
    /// The magnitude is not finite, or its scale exceeds f16.
    pub fn scale(&self, peak: Peak) -> Result<f16> {
        self.scaled(peak, 1.0)
    }

    /// The scale of a group of that peak times `factor`, rounded to its grid.
    ///
    /// # Errors
    /// As [`Grid::scale`].
    pub fn scaled(&self, peak: Peak, factor: f32) -> Result<f16> {
        let absmax = peak.magnitude();
        let scale = self.scale.round(absmax * self.ratio * factor);
        if scale.is_finite() {
            Ok(f16::from_f32(if self.scale.signed { peak.signed(scale) } else { scale }))
        } else {
            Err(Error::input(format!(
                "a group's largest magnitude is {absmax}: its scale is not an f16"
            ))
            .hint(
                "multiply the linear before by a power of two and divide this one by it, which changes nothing \
                 else; or leave this one at 16 bits in a plan",
            ))
        }
    }

    /// The number nearest to `value`, in units of the scale whose [`inverse`] is given, clamped to the
    /// grid. For integers it is the code; [`stored`](Self::stored) returns the code of any number.
    #[inline(always)]
    pub fn code(&self, value: f32, inverse: f32) -> f32 {
        self.codebook.nearest(value * inverse, (self.lowest, self.highest))
    }

    /// The code of a number that [`code`](Self::code) returned.
    #[inline(always)]
    pub fn stored(&self, number: f32) -> i8 {
        self.codebook.code(number)
    }
}

/// What a value is multiplied by to come onto the grid; 0 for the scale of a group of zeros.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(bits: u8, scale: ScaleFormat) -> NumberFormat {
        NumberFormat { bits, codebook: Codebook::Int, group_size: 16, scale }
    }

    fn rounding(bits: u8, clip: f32) -> Grid {
        let numbers = numbers(bits, ScaleFormat::F16);
        Grid::of(&numbers, Scaling::clipped(clip), ScaleRule::Rounding)
    }

    fn gptq(bits: u8, clip: f32) -> Grid {
        let numbers = numbers(bits, ScaleFormat::F16);
        Grid::of(&numbers, Scaling::clipped(clip), ScaleRule::Gptq)
    }

    fn signed(bits: u8, clip: f32) -> Grid {
        let numbers = numbers(bits, ScaleFormat::SIGNED_F16);
        Grid::of(&numbers, Scaling::clipped(clip), ScaleRule::Gptq)
    }

    #[test]
    fn codes_stay_within_their_bits() {
        for (bits, lowest, highest) in
            [(2, -2.0, 1.0), (3, -4.0, 3.0), (4, -8.0, 7.0), (8, -127.0, 127.0)]
        {
            let grid = rounding(bits, 1.0);
            assert_eq!(grid.code(-1e9, 1.0), lowest);
            assert_eq!(grid.code(1e9, 1.0), highest);
        }
    }

    #[test]
    fn scales_follow_the_references_two_grids() {
        assert_eq!(rounding(4, 0.5).scale(Peak::of(&[14.0])).unwrap().to_f32(), 1.0);
        assert_eq!(gptq(4, 0.5).scale(Peak::of(&[15.0])).unwrap().to_f32(), 1.0);
        assert!(gptq(4, 1.0).scale(Peak::of(&[f32::INFINITY])).is_err());
        assert!(gptq(4, 1.0).scale(Peak::of(&[1e9])).is_err());
    }

    #[test]
    fn zeros_have_scale_and_code_zero() {
        let grid = rounding(4, 0.9);
        let scale = grid.scale(Peak::of(&[0.0, -0.0])).unwrap().to_f32();
        assert_eq!((scale, grid.code(0.0, inverse(scale))), (0.0, 0.0));
    }

    #[test]
    fn a_signed_scale_brings_the_peak_to_the_least_code() {
        for bits in [2u8, 3, 4] {
            let least = -f32::from(1u8 << (bits - 1));
            let grid = signed(bits, 1.0);
            for (values, sign) in
                [([1.0f32, -4.0, 2.0], 1.0), ([1.0, 4.0, -2.0], -1.0), ([4.0, -4.0, 0.5], 1.0)]
            {
                let scale = grid.scale(Peak::of(&values)).unwrap().to_f32();
                assert_eq!(scale, sign * 4.0 / -least);
                let codes = values.map(|value| grid.code(value, inverse(scale)));
                assert!(codes.contains(&least));
            }
        }
        let zero = signed(4, 1.0).scale(Peak::of(&[0.0])).unwrap();
        assert_eq!(zero.to_bits(), 0);
        assert!(signed(4, 1.0).scale(Peak::of(&[f32::NAN, 1.0])).is_err());
    }

    #[test]
    fn halves_round_to_even() {
        let grid = rounding(4, 1.0);
        assert_eq!(
            [0.5, 1.5, 2.5, -0.5, -1.5].map(|x| grid.code(x, 1.0)),
            [0.0, 2.0, 2.0, 0.0, -2.0]
        );
    }
}
