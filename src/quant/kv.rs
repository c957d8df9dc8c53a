/*! The quantized KV cache: asymmetric integers, one scale and zero point a token and head.

With `lo = min(0, min x) clip` and `hi = max(0, max x) clip`, the scale is
`f16((hi - lo) / (2^bits - 1))`, the zero point `z = rint(-lo / scale)`, a code
`q = rint(x / scale) + z`, both clamped to `0..2^bits`, and its value `(q - z) scale`. The range
always contains 0, so that 0 is exact. Quotients are products with `1 / scale`, computed once. */

use half::f16;
use serde::{Deserialize, Serialize};

use super::ranges::{BITS, CLIP};
use crate::{Error, Result};

/// How keys and values are held in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvFormat {
    /// Bits of a code, 2 to 8; at 16 nothing is quantized or rotated.
    pub bits: u8,
    /// The factor on the range, in (0, 1]; 1 clips nothing.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip: f32,
    /// Whether heads are quantized in the basis of a Hadamard transform.
    pub rotate: bool,
    /// Whether keys are quantized after the rotary embedding, or before it.
    pub after_rope: bool,
    /// Whether each head's mean key on the calibration text is subtracted after the rotary embedding.
    #[serde(default)]
    pub center: bool,
}

impl KvFormat {
    /// No quantization.
    pub const FULL: Self =
        Self { bits: 16, clip: 1.0, rotate: false, after_rope: true, center: false };

    /// Whether anything is quantized.
    pub fn is_quantized(&self) -> bool {
        self.bits < 16
    }

    /// Whether mean keys are subtracted from the keys.
    pub fn is_centered(&self) -> bool {
        self.is_quantized() && self.center
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        BITS.check("bits", self.bits)?;
        CLIP.check("clip", self.clip)?;
        if self.center && !self.after_rope {
            return Err(Error::input("center needs after_rope"));
        }
        Ok(())
    }

    /// The largest code.
    fn top(&self) -> f32 {
        debug_assert!((1..=8).contains(&self.bits));
        ((1u32 << self.bits) - 1) as f32
    }
}

/// Codes of one token's head `x` `[head_dim]`, its scale (an f16 value) and its zero point.
///
/// # Panics
/// If the format is not quantized: there are no codes of 16 bits.
pub fn quantize(format: &KvFormat, x: &[f32], codes: &mut [u8]) -> (f32, u8) {
    assert!(format.is_quantized() && x.len() == codes.len());
    let grid = KvGrid::of(format, x);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = grid.code(*x) as u8;
    }
    (grid.scale, grid.zero as u8)
}

/// The values of codes.
pub fn dequantize(codes: &[u8], scale: f32, zero: u8, x: &mut [f32]) {
    for (x, code) in x.iter_mut().zip(codes) {
        *x = (f32::from(*code) - f32::from(zero)) * scale;
    }
}

/// Replaces `x` by what the cache would return: [`quantize`], then [`dequantize`].
#[inline(always)]
pub fn round_trip(format: &KvFormat, x: &mut [f32]) {
    if !format.is_quantized() {
        return;
    }
    let grid = KvGrid::of(format, x);
    x.iter_mut().for_each(|x| *x = (grid.code(*x) - grid.zero) * grid.scale);
}

/// Replaces the gradient of a value that came back from the cache by that of what went in, `x`: 0 where the value was clipped.
/// Rounding passes straight through, and scale and zero point are constants.
pub fn block_clipped(format: &KvFormat, x: &[f32], gradient: &mut [f32]) {
    if !format.is_quantized() {
        return;
    }
    let grid = KvGrid::of(format, x);
    for (x, gradient) in x.iter().zip(gradient) {
        if !(0.0..=grid.top).contains(&(x * grid.inverse + grid.zero)) {
            *gradient = 0.0;
        }
    }
}

/// The grid that one head's codes lie on. Codes are integral f32 values, which vectorize.
struct KvGrid {
    scale: f32,
    inverse: f32,
    zero: f32,
    top: f32,
}

impl KvGrid {
    #[inline(always)]
    fn of(format: &KvFormat, x: &[f32]) -> Self {
        // Sixteen lanes and comparisons instead of f32::min, or the loop would be a chain of scalar
        // steps. The order does not matter: of equal values only zeros differ in their bits.
        let (mut lows, mut highs) = ([0.0f32; 16], [0.0f32; 16]);
        let smaller = |a: f32, b: f32| if b < a { b } else { a };
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let (chunks, tail) = x.as_chunks::<16>();
        for chunk in chunks {
            lows = std::array::from_fn(|lane| smaller(lows[lane], chunk[lane]));
            highs = std::array::from_fn(|lane| larger(highs[lane], chunk[lane]));
        }
        for &x in tail {
            lows[0] = smaller(lows[0], x);
            highs[0] = larger(highs[0], x);
        }
        let low = lows.into_iter().fold(0.0, smaller) * format.clip;
        let high = highs.into_iter().fold(0.0, larger) * format.clip;
        let top = format.top();
        let scale = f16::from_f32((high - low) / top).to_f32();
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let zero = clamp(rint(-low * inverse), top);
        Self { scale, inverse, zero, top }
    }

    #[inline(always)]
    fn code(&self, x: f32) -> f32 {
        clamp(rint(x * self.inverse) + self.zero, self.top)
    }
}

/// Rounds to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bit
/// below one. Larger values, which are clamped afterwards, stay large.
#[inline(always)]
fn rint(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (x + ROUND) - ROUND
}

/// Clamps to 0..=top.
#[inline(always)]
fn clamp(x: f32, top: f32) -> f32 {
    let x = if x < 0.0 { 0.0 } else { x };
    if x > top { top } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INT4: KvFormat = KvFormat { bits: 4, ..KvFormat::FULL };

    fn codes_of(format: &KvFormat, x: &[f32]) -> (Vec<u8>, f32, u8) {
        let mut codes = vec![99; x.len()];
        let (scale, zero) = quantize(format, x, &mut codes);
        (codes, scale, zero)
    }

    #[test]
    fn a_head_of_zeros_stays_zero() {
        assert_eq!(codes_of(&INT4, &[0.0; 8]), (vec![0; 8], 0.0, 0));
        let mut x = [0.0, -0.0, 0.0];
        round_trip(&INT4, &mut x);
        assert_eq!(x, [0.0; 3]);
    }

    #[test]
    fn one_signed_heads_use_the_whole_range_from_zero() {
        assert_eq!(codes_of(&INT4, &[15.0, 1.0, 0.0, 7.0]), (vec![15, 1, 0, 7], 1.0, 0));
        assert_eq!(codes_of(&INT4, &[-15.0, -1.0, 0.0, -7.0]), (vec![0, 14, 15, 8], 1.0, 15));
        assert_eq!(codes_of(&INT4, &[7.5; 4]), (vec![15; 4], 0.5, 0));
        assert_eq!(codes_of(&INT4, &[-7.5; 4]), (vec![0; 4], 0.5, 15));
    }

    #[test]
    fn halves_round_to_even_in_codes_and_in_the_zero_point() {
        let (codes, scale, zero) = codes_of(&INT4, &[-2.5, 12.5, 0.5, 1.5, 2.5]);
        assert_eq!((scale, zero), (1.0, 2));
        assert_eq!(codes, [0, 14, 2, 4, 4]);
    }

    #[test]
    fn clipped_values_saturate() {
        let format = KvFormat { clip: 0.5, ..INT4 };
        let (codes, scale, zero) = codes_of(&format, &[-10.0, 20.0, 1.0]);
        assert_eq!((codes, scale, zero), (vec![0, 15, 6], 1.0, 5));
    }

    #[test]
    fn the_error_is_at_most_one_step_and_the_round_trip_is_that_of_the_codes() {
        for bits in [2, 3, 4, 8] {
            let format = KvFormat { bits, ..INT4 };
            for case in 0..50 {
                let x: Vec<f32> = (0..33)
                    .map(|i| ((i * 7 + case) as f32).sin() * 3.0 + case as f32 * 0.1)
                    .collect();
                let (codes, scale, zero) = codes_of(&format, &x);
                assert_eq!(scale, f16::from_f32(scale).to_f32());
                assert!(codes.iter().all(|code| u32::from(*code) < 1 << bits));
                let mut values = vec![f32::NAN; x.len()];
                dequantize(&codes, scale, zero, &mut values);
                for (value, x) in values.iter().zip(&x) {
                    assert!((value - x).abs() <= scale * 1.01, "{value} for {x} at {bits} bits");
                }
                let mut trip = x.clone();
                round_trip(&format, &mut trip);
                assert_eq!(trip, values);
            }
        }
    }

    #[test]
    fn sixteen_bits_change_nothing_and_a_nan_does_not_hide() {
        let mut x = [1.1, f32::NAN, -3.3];
        round_trip(&KvFormat::FULL, &mut x);
        assert_eq!((x[0], x[2]), (1.1, -3.3));
        round_trip(&INT4, &mut x);
        assert!(x[1].is_nan());
    }
}
