/*! The orthonormal Walsh-Hadamard transform: spreads a large value over its entire group.

Only additions, subtractions and one product a value, in a fixed order, so that the bits are the same
for every instruction set. */

/// Butterflies of up to this many values work on an array of fixed length, which the compiler keeps in
/// registers.
const SMALL: usize = 16;

/// The length of the blocks that [`transform`] works on: the largest power of two that divides
/// `len` (0 for an empty slice).
#[inline(always)]
pub fn block(len: usize) -> usize {
    len & len.wrapping_neg()
}

/// The factor that makes a transform of `block` values orthonormal: `1/sqrt(block)`, computed in
/// f64 and rounded to f32 once.
#[inline(always)]
pub fn scale(block: usize) -> f32 {
    (1.0 / (block as f64).sqrt()) as f32
}

/// Transforms each consecutive block of [`block`]`(x.len())` values in place: butterflies
/// `(a + b, a - b)` at distances 1, 2, 4, ..., then the product with [`scale`]. It is its own
/// inverse up to rounding.
#[inline(always)]
pub fn transform(x: &mut [f32]) {
    transform_blocks(x, block(x.len()));
}

/// As [`transform`], with blocks of `block` values, a power of two; values after the last complete
/// block are unchanged.
#[inline(always)]
pub fn transform_blocks(x: &mut [f32], block: usize) {
    debug_assert!(block == 0 || block.is_power_of_two());
    if block < 2 {
        return;
    }
    let scale = scale(block);
    for values in x.chunks_exact_mut(block) {
        let mut distance = 1;
        if block >= SMALL {
            for small in values.as_chunks_mut::<SMALL>().0 {
                butterflies_of_small(small);
            }
            distance = SMALL;
        }
        while distance < block {
            for pair in values.chunks_exact_mut(2 * distance) {
                let (left, right) = pair.split_at_mut(distance);
                for (left, right) in left.iter_mut().zip(right) {
                    (*left, *right) = (*left + *right, *left - *right);
                }
            }
            distance *= 2;
        }
        values.iter_mut().for_each(|value| *value *= scale);
    }
}

/// The butterflies at distances 1, 2, 4 and 8, in four registers. The compiler's own
/// vectorization gathers one value from each of sixteen blocks, which a head of 64 does not have.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn butterflies_of_small(values: &mut [f32; SMALL]) {
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of every x86-64, and the four loads and stores cover the array.
    unsafe {
        // The right half of a butterfly, a - b, is a + (-b): the partner plus the value with its
        // sign turned.
        let turn_odd = _mm_castsi128_ps(_mm_setr_epi32(0, i32::MIN, 0, i32::MIN));
        let turn_high = _mm_castsi128_ps(_mm_setr_epi32(0, 0, i32::MIN, i32::MIN));
        let start = values.as_mut_ptr();
        let [a, b, c, d] = [0, 4, 8, 12].map(|first| {
            let x = _mm_loadu_ps(start.add(first));
            let x = _mm_add_ps(_mm_shuffle_ps::<0b10_11_00_01>(x, x), _mm_xor_ps(x, turn_odd));
            _mm_add_ps(_mm_shuffle_ps::<0b01_00_11_10>(x, x), _mm_xor_ps(x, turn_high))
        });
        let (a, b) = (_mm_add_ps(a, b), _mm_sub_ps(a, b));
        let (c, d) = (_mm_add_ps(c, d), _mm_sub_ps(c, d));
        _mm_storeu_ps(start, _mm_add_ps(a, c));
        _mm_storeu_ps(start.add(4), _mm_add_ps(b, d));
        _mm_storeu_ps(start.add(8), _mm_sub_ps(a, c));
        _mm_storeu_ps(start.add(12), _mm_sub_ps(b, d));
    }
}

/// The butterflies at distances 1, 2, 4 and 8.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
fn butterflies_by_definition(values: &mut [f32; SMALL]) {
    let mut distance = 1;
    while distance < SMALL {
        let from = *values;
        for lane in 0..SMALL {
            let other = from[lane ^ distance];
            values[lane] =
                if lane & distance == 0 { from[lane] + other } else { other - from[lane] };
        }
        distance *= 2;
    }
}

#[cfg(not(target_arch = "x86_64"))]
use butterflies_by_definition as butterflies_of_small;

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: row i, column j of the matrix is (-1)^popcount(i & j) / sqrt(block).
    fn by_matrix(x: &[f32]) -> Vec<f64> {
        let block = block(x.len());
        (0..x.len())
            .map(|i| {
                let base = i / block * block;
                let sum: f64 = (0..block)
                    .map(|j| {
                        let sign = if ((i - base) & j).count_ones().is_multiple_of(2) {
                            1.0
                        } else {
                            -1.0
                        };
                        sign * f64::from(x[base + j])
                    })
                    .sum();
                sum / (block as f64).sqrt()
            })
            .collect()
    }

    fn wave(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37).sin() + (i % 7) as f32 * 0.2).collect()
    }

    #[test]
    fn a_block_is_the_largest_power_of_two_that_divides() {
        let blocks = [0, 1, 2, 3, 12, 96, 128, 576, 11008].map(block);
        assert_eq!(blocks, [0, 1, 2, 1, 4, 32, 128, 64, 256]);
    }

    #[test]
    fn it_is_the_product_with_the_hadamard_matrix() {
        for len in [1, 2, 3, 6, 8, 16, 32, 48, 64, 96, 128, 160, 256] {
            let x = wave(len);
            let mut transformed = x.clone();
            transform(&mut transformed);
            for (value, expected) in transformed.iter().zip(by_matrix(&x)) {
                assert!((f64::from(*value) - expected).abs() < 1e-5, "length {len}");
            }
        }
    }

    #[test]
    fn registers_give_the_bits_of_the_definition() {
        let mut by_registers = *wave(SMALL).first_chunk::<SMALL>().unwrap();
        let mut by_definition = by_registers;
        butterflies_of_small(&mut by_registers);
        butterflies_by_definition(&mut by_definition);
        assert_eq!(by_registers.map(f32::to_bits), by_definition.map(f32::to_bits));
    }

    #[test]
    fn twice_is_the_identity() {
        let x = wave(128);
        let mut twice = x.clone();
        transform(&mut twice);
        assert_ne!(twice, x);
        transform(&mut twice);
        assert!(twice.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn a_tail_shorter_than_a_block_is_left_alone() {
        let mut x = wave(10);
        transform_blocks(&mut x, 4);
        assert_eq!(x[8..], wave(10)[8..]);
        assert_ne!(x[..4], wave(10)[..4]);
        transform(&mut []);
    }
}
