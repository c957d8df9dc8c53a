/*! Small floating-point formats: the nearest value of a format, and the bits of E4M3.

Both formats follow the OCP specifications (Microscaling Formats 1.0; 8-bit Floating Point 1.0): no
infinities, subnormals below the least normal number, nearest ties to the even mantissa. */

/// A format of few bits, whose values between two powers of two are `steps` apart evenly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FloatFormat {
    /// `2^(bits of the mantissa)`: values from a power of two up to the next.
    pub steps: f32,
    /// The least normal number; below it lie equal steps down to 0.
    pub normal: f32,
    /// The greatest number.
    pub highest: f32,
}

/// E2M1, doubled so that its values are integers: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
pub const E2M1_DOUBLED: FloatFormat = FloatFormat { steps: 2.0, normal: 2.0, highest: 12.0 };

/// E4M3 ("e4m3fn"): up to 448, subnormals of `2^-9`.
pub const E4M3: FloatFormat = FloatFormat { steps: 8.0, normal: 0.015_625, highest: 448.0 };

impl FloatFormat {
    /// The value of the format nearest to `value`, ties to the even mantissa, held within the format.
    /// It is never -0.
    ///
    /// Adding `1.5 * 2^23` steps leaves no bit below one step, so the sum is rounded as wanted and the
    /// difference is exact.
    #[inline(always)]
    pub fn round(self, value: f32) -> f32 {
        let value = value.clamp(-self.highest, self.highest);
        let power = f32::from_bits(value.to_bits() & 0x7f80_0000);
        let power = if power > self.normal { power } else { self.normal };
        let rounder = power * (12_582_912.0 / self.steps);
        (value + rounder) - rounder
    }
}

/// `2^120`, by the difference of the exponent biases of f32 (127) and E4M3 (7).
const BIAS: f32 = f32::from_bits((127 + 120) << 23);

/// The bits of a value of E4M3.
pub fn e4m3_bits(value: f32) -> u8 {
    let magnitude = (value.abs() * (1.0 / BIAS)).to_bits() >> 20;
    magnitude as u8 | if value < 0.0 { 0x80 } else { 0 }
}

/// The value that E4M3's bits stand for; NaN for the codes 0x7f and 0xff.
pub fn e4m3_value(bits: u8) -> f32 {
    if bits & 0x7f == 0x7f {
        return f32::NAN;
    }
    let magnitude = f32::from_bits(u32::from(bits & 0x7f) << 20) * BIAS;
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest of `magnitudes` (ascending; the index is the bits), ties to the even
    /// index.
    fn nearest(magnitudes: &[f64], value: f32) -> f64 {
        let magnitude = f64::from(value).abs();
        let distance = |index: usize| (magnitudes[index] - magnitude).abs();
        let best = (0..magnitudes.len()).reduce(|best, next| {
            let closer = distance(next) < distance(best);
            let even = distance(next) == distance(best) && next % 2 == 0;
            if closer || even { next } else { best }
        });
        magnitudes[best.unwrap()].copysign(f64::from(value))
    }

    /// Values around every magnitude and every tie between two.
    fn trials(magnitudes: &[f64]) -> Vec<f32> {
        let between = magnitudes.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let points = magnitudes.iter().copied().chain(between).chain([magnitudes[1] / 7.0]);
        let top = *magnitudes.last().unwrap();
        points
            .chain([1.2 * top, 1e3 * top])
            .flat_map(|point| {
                let point = point as f32;
                [point, point.next_up(), point.next_down(), -point, -point.next_up()]
            })
            .collect()
    }

    #[test]
    fn every_value_goes_to_the_nearest_with_ties_to_even() {
        let e2m1 = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
        let e4m3: Vec<f64> = (0u8..0x7f).map(|bits| f64::from(e4m3_value(bits))).collect();
        for (format, magnitudes) in [(E2M1_DOUBLED, &e2m1[..]), (E4M3, &e4m3)] {
            for value in trials(magnitudes) {
                let found = format.round(value);
                assert_eq!(f64::from(found), nearest(magnitudes, value), "{value} {format:?}");
                assert!(found != 0.0 || found.is_sign_positive(), "{value} {format:?}");
            }
        }
    }

    #[test]
    fn ties_of_fp4_are_those_of_nvfp4() {
        let halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
        let found = halves.map(|value| E2M1_DOUBLED.round(2.0 * value) / 2.0);
        assert_eq!(found, [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]);
    }

    #[test]
    fn bits_of_e4m3_are_the_specifications() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0xc0, -2.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!((e4m3_value(bits), e4m3_bits(value)), (value, bits));
        }
        for bits in (0..=0xffu8).filter(|bits| bits & 0x7f != 0x7f && *bits != 0x80) {
            assert_eq!(e4m3_bits(e4m3_value(bits)), bits);
        }
        assert!(e4m3_value(0x7f).is_nan() && e4m3_value(0xff).is_nan());
    }
}
