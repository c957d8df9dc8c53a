/*! Ranges of the settings: one table for recipes, plans, manifests and formats. */

use std::fmt::Display;

use crate::{Error, Result};

/// What a group size must be a multiple of, so that no kernel sees a ragged edge.
pub const GROUP_MULTIPLE: usize = 16;

/// The widest group whose scale is searched: what a warp sweeps at once.
pub const SEARCHED_GROUP: usize = 128;

/// The values that a setting may have.
pub struct Range<T> {
    holds: fn(T) -> bool,
    /// The same in words: `be 2, 3, 4, 8 or 16`.
    words: &'static str,
}

/// Bits of a code; 16 is floating point.
pub const BITS: Range<u8> =
    Range { holds: |bits| matches!(bits, 2 | 3 | 4 | 8 | 16), words: "be 2, 3, 4, 8 or 16" };

/// The factor on a group's absmax; 1 clips nothing.
pub const CLIP: Range<f32> =
    Range { holds: |clip| clip > 0.0 && clip <= 1.0, words: "lie in (0, 1]" };

/// Channels that share a scale.
pub const GROUP_SIZE: Range<usize> = Range {
    holds: |size| size > 0 && size.is_multiple_of(GROUP_MULTIPLE),
    words: "be a multiple of 16",
};

/// Exponents of the power of two that scales of E4M3 are multiplied with: from the least to the greatest,
/// 2^-9 to 448, all of them are numbers of f16.
pub const E4M3_EXPONENTS: Range<i8> =
    Range { holds: |exponent| matches!(exponent, -15..=7), words: "lie between -15 and 7" };

/// Adjacent output rows that share a scale.
pub const ROWS_PER_SCALE: Range<usize> =
    Range { holds: |rows| matches!(rows, 1 | 2), words: "be 1 or 2" };

/// A number of channels or tokens: no network or text has more, and files hold it in 64 bits with a sign.
pub const COUNT: Range<usize> = Range { holds: |count| count <= 1 << 40, words: "be at most 2^40" };

/// How much of the accumulated error is corrected.
pub const CORRECTION: Range<f32> =
    Range { holds: |share| (0.0..=1.0).contains(&share), words: "lie in [0, 1]" };

/// The share of a Gram matrix's mean diagonal that is added to the diagonal.
pub const DAMPING: Range<f32> =
    Range { holds: |share| share > 0.0 && share < 1.0, words: "lie in (0, 1)" };

impl<T: Copy + Display> Range<T> {
    /// Whether `value` may be chosen.
    pub fn holds(&self, value: T) -> bool {
        (self.holds)(value)
    }

    /// Refuses a `value` of the setting `name` that may not be chosen.
    ///
    /// # Errors
    /// Input: `NAME is VALUE; it must ...`.
    pub fn check(&self, name: impl Display, value: T) -> Result<()> {
        self.check_named(format_args!("{name} is {value}"), value)
    }

    /// The same, with the setting and its value in the words of `what`.
    ///
    /// # Errors
    /// Input: `WHAT; it must ...`.
    pub fn check_named(&self, what: impl Display, value: T) -> Result<()> {
        if self.holds(value) {
            return Ok(());
        }
        Err(Error::input(format!("{what}; it must {}", self.words)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inside_or_outside_as_their_words_say() {
        assert!((0..=u8::MAX).filter(|bits| BITS.holds(*bits)).eq([2, 3, 4, 8, 16]));
        assert!((0..80).filter(|size| GROUP_SIZE.holds(*size)).eq([16, 32, 48, 64]));
        assert!((0..9).filter(|rows| ROWS_PER_SCALE.holds(*rows)).eq([1, 2]));
        let held = |range: Range<f32>| {
            let values = [-0.1, 0.0, 0.1, 1.0, 1.1, f32::NAN, f32::INFINITY];
            values.map(|value| range.holds(value))
        };
        assert_eq!(held(CLIP), [false, false, true, true, false, false, false]);
        assert_eq!(held(CORRECTION), [false, true, true, true, false, false, false]);
        assert_eq!(held(DAMPING), [false, false, true, false, false, false, false]);
    }

    #[test]
    fn a_refusal_names_the_setting_its_value_and_what_it_may_be() {
        assert_eq!(BITS.check("act_bits", 4).map_err(|error| error.to_string()), Ok(()));
        let refused = BITS.check("act_bits", 5).unwrap_err();
        assert_eq!(refused.to_string(), "act_bits is 5; it must be 2, 3, 4, 8 or 16");
        assert_eq!(refused.kind(), crate::Kind::Input);
    }
}
