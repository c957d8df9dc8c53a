/*! The grid of codes: scale from a group's largest magnitude, code from a value.

Shared by rounding, GPTQ and their outlier blocks. The scale is rounded to f16
before any code is computed with it. */

use half::f16;

use super::codebook::Codebook;
use super::float::E4M3;
use super::number::NumberFormat;
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
    /// Whether scales have the sign of [`Peak::signed`].
    signed: bool,
    codebook: Codebook,
}

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
    pub fn of(numbers: &NumberFormat, clip: f32, rule: ScaleRule) -> Self {
        match (numbers.codebook, rule) {
            _ if numbers.has_signs() => Self::signed(numbers.bits, clip),
            (Codebook::Int, ScaleRule::Rounding) => Self::rounding(numbers.bits, clip),
            (Codebook::Int, ScaleRule::Gptq) => Self::gptq(numbers.bits, clip),
            (codebook, _) => Self::fp4(codebook, clip),
        }
    }

    /// Codes of `bits` bits; the clipped absmax lies on the highest code (quant.py
    /// `quantize_tensor`: `absmax * clip / (2^(bits-1) - 1)`).
    pub fn rounding(bits: u8, clip: f32) -> Self {
        let (lowest, highest) = bounds(bits);
        Self { lowest, highest, ratio: clip / highest, signed: false, codebook: Codebook::Int }
    }

    /// Codes of `bits` bits; the clipped absmax lies half a step above the highest code (gptq.py
    /// `Quantizer`: `2 * absmax * clip / (2^bits - 1)`).
    pub fn gptq(bits: u8, clip: f32) -> Self {
        let (lowest, highest) = bounds(bits);
        Self {
            lowest,
            highest,
            ratio: clip / (highest + 0.5),
            signed: false,
            codebook: Codebook::Int,
        }
    }

    /// Codes of `bits` bits, fewer than 8; the clipped peak lies on the lowest code, by the sign of the scale.
    /// A step is 7/8 of what the magnitude alone would allow at 4 bits, 3/4 at 3.
    pub fn signed(bits: u8, clip: f32) -> Self {
        let (lowest, highest) = bounds(bits);
        Self { lowest, highest, ratio: clip / -lowest, signed: true, codebook: Codebook::Int }
    }

    /// FP4, for both ways of choosing codes: the clipped absmax lies on the highest number (gptq.py
    /// `Quantizer` with `--quant_type fp`: `2 * absmax * clip / 24`).
    pub fn fp4(codebook: Codebook, clip: f32) -> Self {
        let (lowest, highest) = codebook.limits(4);
        Self { lowest, highest, ratio: clip / highest, signed: false, codebook }
    }

    /// FP8 outliers (E4M3), unclipped: the absmax lies on the highest number.
    pub fn fp8() -> Self {
        let highest = E4M3.highest;
        Self {
            lowest: -highest,
            highest,
            ratio: 1.0 / highest,
            signed: false,
            codebook: Codebook::Int,
        }
    }

    /// `scale / absmax`, before the scale is rounded.
    pub fn ratio(&self) -> f32 {
        self.ratio
    }

    /// Whether scales are signed.
    pub fn is_signed(&self) -> bool {
        self.signed
    }

    /// The least and the greatest code.
    pub fn limits(&self) -> (f32, f32) {
        (self.lowest, self.highest)
    }

    /// The scale of a group of that peak, rounded to f16.
    ///
    /// # Errors
    /// The magnitude is not finite, or its scale exceeds f16.
    pub fn scale(&self, peak: Peak) -> Result<f16> {
        let absmax = peak.magnitude();
        let scale = f16::from_f32(absmax * self.ratio);
        if scale.is_finite() {
            Ok(if self.signed { f16::from_f32(peak.signed(scale.to_f32())) } else { scale })
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

/// `-2^(bits-1)..=2^(bits-1)-1`, but -127..=127 at 8 bits.
fn bounds(bits: u8) -> (f32, f32) {
    Codebook::Int.limits(bits)
}

/// What a value is multiplied by to come onto the grid; 0 for the scale of a group of zeros.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stay_within_their_bits() {
        for (bits, lowest, highest) in
            [(2, -2.0, 1.0), (3, -4.0, 3.0), (4, -8.0, 7.0), (8, -127.0, 127.0)]
        {
            let grid = Grid::rounding(bits, 1.0);
            assert_eq!(grid.code(-1e9, 1.0), lowest);
            assert_eq!(grid.code(1e9, 1.0), highest);
        }
    }

    #[test]
    fn scales_follow_the_references_two_grids() {
        assert_eq!(Grid::rounding(4, 0.5).scale(Peak::of(&[14.0])).unwrap().to_f32(), 1.0);
        assert_eq!(Grid::gptq(4, 0.5).scale(Peak::of(&[15.0])).unwrap().to_f32(), 1.0);
        assert!(Grid::gptq(4, 1.0).scale(Peak::of(&[f32::INFINITY])).is_err());
        assert!(Grid::gptq(4, 1.0).scale(Peak::of(&[1e9])).is_err());
    }

    #[test]
    fn zeros_have_scale_and_code_zero() {
        let grid = Grid::rounding(4, 0.9);
        let scale = grid.scale(Peak::of(&[0.0, -0.0])).unwrap().to_f32();
        assert_eq!((scale, grid.code(0.0, inverse(scale))), (0.0, 0.0));
    }

    #[test]
    fn a_signed_scale_brings_the_peak_to_the_least_code() {
        for bits in [2u8, 3, 4] {
            let least = -f32::from(1u8 << (bits - 1));
            let grid = Grid::signed(bits, 1.0);
            for (values, sign) in
                [([1.0f32, -4.0, 2.0], 1.0), ([1.0, 4.0, -2.0], -1.0), ([4.0, -4.0, 0.5], 1.0)]
            {
                let scale = grid.scale(Peak::of(&values)).unwrap().to_f32();
                assert_eq!(scale, sign * 4.0 / -least);
                let codes = values.map(|value| grid.code(value, inverse(scale)));
                assert!(codes.contains(&least));
            }
        }
        let zero = Grid::signed(4, 1.0).scale(Peak::of(&[0.0])).unwrap();
        assert_eq!(zero.to_bits(), 0);
        assert!(Grid::signed(4, 1.0).scale(Peak::of(&[f32::NAN, 1.0])).is_err());
    }

    #[test]
    fn halves_round_to_even() {
        let grid = Grid::rounding(4, 1.0);
        assert_eq!(
            [0.5, 1.5, 2.5, -0.5, -1.5].map(|x| grid.code(x, 1.0)),
            [0.0, 2.0, 2.0, 0.0, -2.0]
        );
    }
}
