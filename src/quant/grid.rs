/*! The grid of codes: scale from a group's largest magnitude, code from a value.

Shared by rounding, GPTQ and their outlier blocks (design: numbers). The scale is rounded to f16
before any code is computed with it. */

use half::f16;

use super::float::E4M3;
use super::levels::Levels;
use crate::{Error, Result};

/// How magnitudes become scales and values become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    lowest: f32,
    highest: f32,
    /// `scale = absmax * ratio`.
    ratio: f32,
    levels: Levels,
}

impl Grid {
    /// Codes of `bits` bits; the clipped absmax lies on the highest code (quant.py
    /// `quantize_tensor`: `absmax * clip / (2^(bits-1) - 1)`).
    pub fn rounding(bits: u8, clip: f32) -> Self {
        let (lowest, highest) = bounds(bits);
        Self { lowest, highest, ratio: clip / highest, levels: Levels::Int }
    }

    /// Codes of `bits` bits; the clipped absmax lies half a step above the highest code (gptq.py
    /// `Quantizer`: `2 * absmax * clip / (2^bits - 1)`).
    pub fn gptq(bits: u8, clip: f32) -> Self {
        let (lowest, highest) = bounds(bits);
        Self { lowest, highest, ratio: clip / (highest + 0.5), levels: Levels::Int }
    }

    /// FP4, for both ways of choosing codes: the clipped absmax lies on the highest number (gptq.py
    /// `Quantizer` with `--quant_type fp`: `2 * absmax * clip / 24`).
    pub fn fp4(levels: Levels, clip: f32) -> Self {
        let (lowest, highest) = levels.limits(4);
        Self { lowest, highest, ratio: clip / highest, levels }
    }

    /// FP8 outliers (E4M3), unclipped: the absmax lies on the highest number.
    pub fn fp8() -> Self {
        let highest = E4M3.highest;
        Self { lowest: -highest, highest, ratio: 1.0 / highest, levels: Levels::Int }
    }

    /// `scale / absmax`, before the scale is rounded.
    pub fn ratio(&self) -> f32 {
        self.ratio
    }

    /// The least and the greatest code.
    pub fn limits(&self) -> (f32, f32) {
        (self.lowest, self.highest)
    }

    /// The scale of a group whose largest magnitude is `absmax`, rounded to f16.
    ///
    /// # Errors
    /// The magnitude is not finite, or its scale exceeds f16.
    pub fn scale(&self, absmax: f32) -> Result<f16> {
        let scale = f16::from_f32(absmax * self.ratio);
        if scale.is_finite() {
            Ok(scale)
        } else {
            Err(Error::input(format!(
                "a group's largest magnitude is {absmax}: its scale is not an f16"
            )))
        }
    }

    /// The number nearest to `value`, in units of the scale whose [`inverse`] is given, held within the
    /// grid. Among integers it is the code; [`stored`](Self::stored) gives any number's.
    #[inline(always)]
    pub fn code(&self, value: f32, inverse: f32) -> f32 {
        self.levels.nearest(value * inverse, (self.lowest, self.highest))
    }

    /// The code of a number that [`code`](Self::code) gave.
    #[inline(always)]
    pub fn stored(&self, number: f32) -> i8 {
        self.levels.code(number)
    }
}

/// `-2^(bits-1)..=2^(bits-1)-1`, but -127..=127 at 8 bits.
fn bounds(bits: u8) -> (f32, f32) {
    Levels::Int.limits(bits)
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
        assert_eq!(Grid::rounding(4, 0.5).scale(14.0).unwrap().to_f32(), 1.0);
        assert_eq!(Grid::gptq(4, 0.5).scale(15.0).unwrap().to_f32(), 1.0);
        assert!(Grid::gptq(4, 1.0).scale(f32::INFINITY).is_err());
        assert!(Grid::gptq(4, 1.0).scale(1e9).is_err());
    }

    #[test]
    fn zeros_have_scale_and_code_zero() {
        let grid = Grid::rounding(4, 0.9);
        let scale = grid.scale(0.0).unwrap().to_f32();
        assert_eq!((scale, grid.code(0.0, inverse(scale))), (0.0, 0.0));
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
