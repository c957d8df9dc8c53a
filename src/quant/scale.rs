/*! The grid that a group's scale lies on.

A scale is an f16 in this program, whatever the grid: every number of every grid is one. So kernels multiply
codes and scales alike, and only what chooses scales, and what stores them, distinguishes grids. */

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::float::{E4M3, e4m3_bits, e4m3_value};
use crate::{Error, Result};

/// The numbers that scales are rounded to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleGrid {
    /// All numbers of f16.
    #[default]
    F16,
    /// Numbers that f16 and bf16 both hold, so that an engine may load them as either.
    Bf16,
    /// Numbers of FP8 (E4M3) times a power of two that the tensor has: NVFP4's scales.
    E4m3,
    /// Powers of two: E8M0, the scales of the Microscaling formats.
    PowerOfTwo,
}

impl ScaleGrid {
    /// As recipes and `atom.json` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E4m3 => "e4m3",
            Self::PowerOfTwo => "power-of-two",
        }
    }

    /// Whether a checkpoint holds scales as bytes, and not as f16.
    pub fn is_stored_as_byte(self) -> bool {
        matches!(self, Self::E4m3 | Self::PowerOfTwo)
    }

    /// Refuses signs where the grid has none.
    ///
    /// # Errors
    /// Input: powers of two with signs.
    pub fn check(self, signed: bool) -> Result<()> {
        if self == Self::PowerOfTwo && signed {
            return Err(Error::input("scales that are powers of two have no signs")
                .hint("set signed_scales = false with scales = \"power-of-two\""));
        }
        Ok(())
    }
}

/// What a group's scale is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleFormat {
    /// The numbers it is rounded to.
    pub grid: ScaleGrid,
    /// The exponent of the power of two that numbers of E4M3 are multiplied with, in
    /// [`E4M3_EXPONENTS`](super::ranges::E4M3_EXPONENTS); 0 on other grids.
    pub exponent: i8,
    /// Whether it has a sign, where integers have one code more below zero than above it: the group's peak
    /// becomes the least code.
    pub signed: bool,
}

impl ScaleFormat {
    /// An f16 of zero or more.
    pub const F16: Self = Self { grid: ScaleGrid::F16, exponent: 0, signed: false };
    /// An f16 with a sign.
    pub const SIGNED_F16: Self = Self { signed: true, ..Self::F16 };

    /// The power of two that numbers of E4M3 are multiplied with.
    #[inline(always)]
    pub fn unit(self) -> f32 {
        f32::from_bits(((127 + i32::from(self.exponent)) as u32) << 23)
    }

    /// The byte that a scale of this grid is stored as: the bits of E4M3, or E8M0's exponent with 0 for the scale of
    /// a group of zeros. None on grids that are stored as f16.
    pub fn byte(self, scale: f16) -> Option<u8> {
        let scale = scale.to_f32();
        match self.grid {
            ScaleGrid::F16 | ScaleGrid::Bf16 => None,
            ScaleGrid::E4m3 => Some(e4m3_bits(scale / self.unit())),
            ScaleGrid::PowerOfTwo => Some((scale.to_bits() >> 23) as u8),
        }
    }

    /// The scale that a stored byte stands for; NaN where it stands for none that f16 holds.
    pub fn of_byte(self, byte: u8) -> f16 {
        match self.grid {
            ScaleGrid::F16 | ScaleGrid::Bf16 => f16::NAN,
            ScaleGrid::E4m3 => f16::from_f32(e4m3_value(byte) * self.unit()),
            ScaleGrid::PowerOfTwo => {
                let scale = f16::from_f32(f32::from_bits(u32::from(byte) << 23));
                if byte > 0 && (scale == f16::ZERO || scale.is_infinite()) {
                    f16::NAN
                } else {
                    scale
                }
            }
        }
    }

    /// The scale on the grid nearest to `scale`, ties to even; of powers of two the one below it, but the
    /// next where its significand is 1.75 or more. Not finite if it is beyond f16, or if `scale` is.
    ///
    /// E4M3 saturates at 448 times its power of two.
    #[inline(always)]
    pub fn round(self, scale: f32) -> f32 {
        let on_grid = match self.grid {
            ScaleGrid::F16 => scale,
            _ if !scale.is_finite() => scale,
            ScaleGrid::Bf16 => bf16::from_f32(scale).to_f32(),
            ScaleGrid::E4m3 => E4M3.round(scale / self.unit()) * self.unit(),
            ScaleGrid::PowerOfTwo => f32::from_bits((scale.to_bits() + QUARTER) & EXPONENT),
        };
        f16::from_f32(on_grid).to_f32()
    }
}

/// The bits of the exponent of an f32.
const EXPONENT: u32 = 0x7f80_0000;

/// A quarter in the significand of an f32: added to 1.75 it makes 2.
const QUARTER: u32 = 0x0020_0000;

/// The greatest power of two that is not above `value`, a normal positive number.
#[inline(always)]
pub fn power_below(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & EXPONENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::ranges::E4M3_EXPONENTS;

    fn rounded(grid: ScaleGrid, exponent: i8, scale: f32) -> f32 {
        ScaleFormat { grid, exponent, signed: false }.round(scale)
    }

    #[test]
    fn powers_of_two_round_up_from_seven_quarters() {
        let found = [0.0, 1.0, 1.74, 1.75, 2.0, 3.49, 3.5, 0.3, 1e-30]
            .map(|scale| rounded(ScaleGrid::PowerOfTwo, 0, scale));
        assert_eq!(found, [0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 0.25, 0.0]);
    }

    #[test]
    fn e4m3_scales_are_its_numbers_times_a_power_of_two_and_all_are_f16() {
        let exponents = (i8::MIN..=i8::MAX).filter(|exponent| E4M3_EXPONENTS.holds(*exponent));
        let mut count = 0;
        for exponent in exponents {
            for bits in 0..0x7f {
                let scale = e4m3_value(bits) * 2f32.powi(i32::from(exponent));
                assert_eq!(f16::from_f32(scale).to_f32(), scale, "{bits} {exponent}");
                assert_eq!(rounded(ScaleGrid::E4m3, exponent, scale), scale);
                count += 1;
            }
        }
        assert_eq!(count, 23 * 127);
        assert_eq!(rounded(ScaleGrid::E4m3, -8, 1e3), 448.0 / 256.0);
        // Halfway between 1 and 1.125: to the even significand.
        assert_eq!(rounded(ScaleGrid::E4m3, 0, 1.0625), 1.0);
        assert_eq!(rounded(ScaleGrid::E4m3, 0, 1.1875), 1.25);
    }

    #[test]
    fn a_stored_scale_is_the_scale() {
        let power = ScaleFormat { grid: ScaleGrid::PowerOfTwo, ..ScaleFormat::F16 };
        for scale in [0.0, 2f32.powi(-24), 0.5, 1.0, 32768.0].map(f16::from_f32) {
            assert_eq!(power.of_byte(power.byte(scale).unwrap()), scale);
        }
        let powers = (0..=u8::MAX).filter(|byte| power.of_byte(*byte).is_finite());
        assert!(powers.eq([0].into_iter().chain(127 - 24..=127 + 15)));
        let signed = ScaleFormat { grid: ScaleGrid::E4m3, exponent: -9, signed: true };
        for scale in [0.0, 448.0 / 512.0, -1.125 / 512.0].map(f16::from_f32) {
            assert_eq!(signed.of_byte(signed.byte(scale).unwrap()), scale);
        }
        assert!(signed.of_byte(0x7f).is_nan() && signed.of_byte(0xff).is_nan());
        assert_eq!(ScaleFormat::SIGNED_F16.byte(f16::ONE), None);
    }

    #[test]
    fn bf16_scales_are_numbers_of_both_formats() {
        for scale in [1.0f32, 1.003, 0.37, 3e-5, 1e-6, 6e4, 1e-8] {
            let found = rounded(ScaleGrid::Bf16, 0, scale);
            assert_eq!(
                (bf16::from_f32(found).to_f32(), f16::from_f32(found).to_f32()),
                (found, found)
            );
            assert!(
                (found - scale).abs() <= (scale / 128.0).max(2f32.powi(-24)),
                "{scale} {found}"
            );
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_on_every_grid() {
        for grid in [ScaleGrid::F16, ScaleGrid::Bf16, ScaleGrid::E4m3, ScaleGrid::PowerOfTwo] {
            for scale in [f32::NAN, f32::from_bits(0x7fff_ffff), f32::INFINITY] {
                assert!(!rounded(grid, 0, scale).is_finite(), "{grid:?} {scale}");
            }
        }
        for grid in [ScaleGrid::F16, ScaleGrid::Bf16, ScaleGrid::PowerOfTwo] {
            assert!(!rounded(grid, 0, 1e6).is_finite(), "{grid:?}");
        }
    }
}
