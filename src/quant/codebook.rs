/*! Codebooks: the numbers that codes stand for, and which number is nearest.

A code is held in an i8 and means `value(code) * scale`. Integers and FP4 are exact in it: FP4 is held
doubled, 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, with the scale of one half, so that integer
kernels compute it as they are. */

use serde::{Deserialize, Serialize};

use super::float::E2M1_DOUBLED;

/// The numbers that codes stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codebook {
    /// Integers of 2, 3, 4 or 8 bits.
    #[default]
    Int,
    /// OCP E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Codes are twice that.
    Fp4,
    /// bitsandbytes' table, for comparison with the reference (its `--quant_type fp`): 0, 1/16, 2, 3, 4,
    /// 6, 8, 12 and their negatives. The code of 1/16 is 1, else code and number are equal.
    Fp4Bnb,
}

/// The magnitudes of FP4 codes; the index is what three bits of storage hold, the fourth is the sign.
const FP4_MAGNITUDES: [i8; 8] = [0, 1, 2, 3, 4, 6, 8, 12];

/// The least positive number of bitsandbytes' table.
const BNB_LEAST: f32 = 0.0625;

impl Codebook {
    /// As recipes and `atom.json` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Fp4 => "fp4",
            Self::Fp4Bnb => "fp4-bnb",
        }
    }

    /// Whether the numbers are integers.
    pub fn is_int(self) -> bool {
        self == Self::Int
    }

    /// Whether codes of `bits` bits exist.
    pub fn has_bits(self, bits: u8) -> bool {
        match self {
            Self::Int => matches!(bits, 2 | 3 | 4 | 8),
            Self::Fp4 | Self::Fp4Bnb => bits == 4,
        }
    }

    /// The least and the greatest number of `bits` bits: `-2^(bits-1)` and `2^(bits-1) - 1`, but -127
    /// and 127 at 8 bits; -12 and 12 for both kinds of FP4.
    #[inline(always)]
    pub fn limits(self, bits: u8) -> (f32, f32) {
        match self {
            Self::Int => {
                let greatest = ((1_i32 << (bits - 1)) - 1) as f32;
                (if bits == 8 { -greatest } else { -greatest - 1.0 }, greatest)
            }
            Self::Fp4 | Self::Fp4Bnb => (-E2M1_DOUBLED.highest, E2M1_DOUBLED.highest),
        }
    }

    /// The nearest number to `value` within [`limits`](Self::limits), `value` being in units of the
    /// scale. Ties go to the even code, with bitsandbytes' table to the lesser magnitude, as there.
    #[inline(always)]
    pub fn nearest(self, value: f32, (least, greatest): (f32, f32)) -> f32 {
        match self {
            Self::Int => value.round_ties_even().clamp(least, greatest),
            Self::Fp4 => E2M1_DOUBLED.round(value),
            Self::Fp4Bnb => {
                const STEPS: [(f32, f32); 7] = [
                    (0.03125, BNB_LEAST),
                    (1.03125, 2.0),
                    (2.5, 3.0),
                    (3.5, 4.0),
                    (5.0, 6.0),
                    (7.0, 8.0),
                    (10.0, 12.0),
                ];
                let below = STEPS.iter().rfind(|(tie, _)| value.abs() > *tie);
                below.map_or(0.0, |(_, number)| number.copysign(value))
            }
        }
    }

    /// The code of one of these numbers.
    #[inline(always)]
    pub fn code(self, number: f32) -> i8 {
        match self {
            Self::Fp4Bnb if number.abs() == BNB_LEAST => number.signum() as i8,
            _ => number as i8,
        }
    }

    /// The number a code stands for, in units of the scale.
    #[inline(always)]
    pub fn value(self, code: i8) -> f32 {
        match self {
            Self::Fp4Bnb if code.abs() == 1 => f32::from(code) * BNB_LEAST,
            _ => f32::from(code),
        }
    }

    /// [`value`](Self::value) counted in [`unit`](Self::unit)s, an integer.
    #[inline(always)]
    pub(crate) fn in_units(self, code: i8) -> i32 {
        match self {
            Self::Fp4Bnb if code.abs() != 1 => 16 * i32::from(code),
            _ => i32::from(code),
        }
    }

    /// The unit of [`in_units`](Self::in_units), a power of two.
    pub(crate) fn unit(self) -> f32 {
        if self == Self::Fp4Bnb { BNB_LEAST } else { 1.0 }
    }

    /// A code as its bits are stored, in two's complement: an FP4 code becomes its sign (bit 3) and the
    /// index of its magnitude, which are the bits of OCP E2M1.
    pub fn stored(self, code: i8) -> i8 {
        if self.is_int() {
            return code;
        }
        let index = FP4_MAGNITUDES.iter().position(|&magnitude| magnitude == code.abs());
        let index = index.expect("an FP4 code is one of the table's") as i8;
        if code < 0 { index - 8 } else { index }
    }

    /// Undoes [`stored`](Self::stored); FP4's -0 is 0.
    pub fn restored(self, bits: i8) -> i8 {
        if self.is_int() {
            return bits;
        }
        let magnitude = FP4_MAGNITUDES[usize::from(bits as u8 & 7)];
        if bits < 0 { -magnitude } else { magnitude }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_its_own_nearest_and_survives_storage() {
        for (codebook, bits) in [
            (Codebook::Int, 2),
            (Codebook::Int, 3),
            (Codebook::Int, 4),
            (Codebook::Int, 8),
            (Codebook::Fp4, 4),
            (Codebook::Fp4Bnb, 4),
        ] {
            assert!(codebook.has_bits(bits));
            let limits = codebook.limits(bits);
            let codes: Vec<i8> = match codebook {
                Codebook::Int => (limits.0 as i8..=limits.1 as i8).collect(),
                _ => FP4_MAGNITUDES.into_iter().flat_map(|code| [code, -code]).collect(),
            };
            for code in codes {
                let number = codebook.value(code);
                assert_eq!(codebook.nearest(number, limits), number, "{codebook:?}");
                assert_eq!(codebook.code(number), code, "{codebook:?}");
                assert_eq!(
                    codebook.in_units(code) as f32 * codebook.unit(),
                    number,
                    "{codebook:?}"
                );
                assert_eq!(codebook.restored(codebook.stored(code)), code, "{codebook:?}");
            }
            assert_eq!(codebook.nearest(1e9, limits), limits.1);
            assert_eq!(codebook.nearest(-1e9, limits), limits.0);
        }
        assert!(
            !Codebook::Fp4.has_bits(8)
                && !Codebook::Fp4Bnb.has_bits(3)
                && !Codebook::Int.has_bits(16)
        );
    }

    #[test]
    fn fp4_is_stored_as_ocp_has_it() {
        // 1.5 is 0 01 1, -6 is 1 11 1, and -0 is read as 0.
        assert_eq!(Codebook::Fp4.stored(3), 0b0011);
        assert_eq!(Codebook::Fp4.stored(-12) as u8 & 15, 0b1111);
        assert_eq!(Codebook::Fp4.restored(-8), 0);
    }

    #[test]
    fn ties_in_bitsandbytes_table_go_down() {
        let limits = Codebook::Fp4Bnb.limits(4);
        let nearest = |value| Codebook::Fp4Bnb.nearest(value, limits);
        let ties = [0.03125, 1.03125, 2.5, 3.5, 5.0, 7.0, 10.0];
        assert_eq!(ties.map(nearest), [0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0]);
        assert_eq!(
            ties.map(|tie| nearest(-f32::next_up(tie))),
            [-0.0625, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0]
        );
    }
}
