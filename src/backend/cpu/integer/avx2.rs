/*! The panel kernels for AVX2 with FMA.

A tile is 3 tokens x 16 rows, twice a panel. Without VNNI, `vpmaddubsw` multiplies unsigned with
signed bytes and adds pairs in 16 bits, saturating. With weights of at most 15 a pair is at most
15 * 128 * 2 = 3840, so the 4 chunks of 16 channels sum to at most 15360 without saturation
and are widened together. Weights of 8 bits would saturate: they are widened first, even and odd
channels apart, and multiplied by `vpmaddwd`, which is exact. */

use std::arch::x86_64::*;

use super::layout::{CHUNK, Line, PANEL, STEP, unpack};
use super::{Destination, FloatBlock, IntegerBlock, group_starts};

/// Tokens in a tile.
const TILE: usize = 3;

/// Values in a register.
const LANES: usize = 8;

/// Bytes in a chunk.
const CHUNK_BYTES: usize = PANEL * CHUNK;

/// Chunks whose products of nibbles are summed in 16 bits.
const NARROW_CHUNKS: usize = STEP / CHUNK;

/// Calls a tile kernel for all tokens and both halves of the panel: tiles of [`TILE`], then one of
/// what is left.
macro_rules! tiles {
    ($kernel:ident, $block:expr, $acc:expr, $out:expr) => {
        for (tile, acc) in $acc.chunks_mut(TILE).enumerate() {
            let first = tile * TILE;
            for half in [0, PANEL / 2] {
                match acc.len() {
                    1 => $kernel::<1>($block, first, half, acc),
                    2 => $kernel::<2>($block, first, half, acc),
                    _ => $kernel::<TILE>($block, first, half, acc),
                }
            }
            if let Some(out) = $out {
                out.store(first, acc);
            }
        }
    };
}

/// See [`IntegerBlock`].
///
/// # Safety
/// The processor has AVX2 and FMA; the block's slices reach as far as `super::integer` checks.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn integer(
    block: &IntegerBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    // SAFETY: `integer_tile` requires of the block what this function does.
    unsafe { tiles!(integer_tile, block, acc, out) }
}

/// See [`FloatBlock`].
///
/// # Safety
/// The processor has AVX2 and FMA; `block.x` is `[acc.len(), block.weights.len()]`.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn float(
    block: &FloatBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    // SAFETY: `float_tile` requires of the block what this function does.
    unsafe { tiles!(float_tile, block, acc, out) }
}

/// See [`unpack`].
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn unpack_lines(packed: &[Line], unpacked: &mut [Line]) {
    unpack(packed, unpacked);
}

/// See [`group_starts`].
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn starts(codes: &[i8], size: usize, offset: i32, starts: &mut [i32]) {
    group_starts(codes, size, offset, starts);
}

/// The sums of 16 rows from `half` on of `TOKENS` tokens from `first` on.
///
/// # Safety
/// As [`integer`], with `first + TOKENS` tokens in the block and `TOKENS` in `acc`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn integer_tile<const TOKENS: usize>(
    block: &IntegerBlock<'_>,
    first: usize,
    half: usize,
    acc: &mut [[f32; PANEL]],
) {
    debug_assert_eq!(acc.len(), TOKENS);
    // SAFETY: the caller's promise: every pointer below stays within its slice.
    unsafe {
        let mut weights = block.codes.as_ptr().add(half * CHUNK);
        let mut x = block.x_codes.as_ptr().add(first * block.codes_stride);
        for (group, scales) in block.scales.iter().enumerate() {
            let mut sums = [[_mm256_setzero_si256(); 2]; TOKENS];
            for (token, sums) in sums.iter_mut().enumerate() {
                let at = (first + token) * block.groups_stride + group;
                *sums = [_mm256_set1_epi32(*block.starts.get_unchecked(at)); 2];
            }
            if block.nibbles {
                add_nibbles(block.group_chunks, weights, x, block.codes_stride, &mut sums);
            } else {
                add_bytes(block.group_chunks, weights, x, block.codes_stride, &mut sums);
            }
            weights = weights.add(block.group_chunks * CHUNK_BYTES);
            x = x.add(block.group_chunks * CHUNK);
            for (token, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let at = (first + token) * block.groups_stride + group;
                let scale = _mm256_set1_ps(*block.x_scales.get_unchecked(at));
                for (part, sums) in sums.into_iter().enumerate() {
                    let row = half + part * LANES;
                    let scale = _mm256_mul_ps(scale, _mm256_loadu_ps(scales[row..].as_ptr()));
                    let acc = acc[row..].as_mut_ptr();
                    let sum = _mm256_cvtepi32_ps(sums);
                    _mm256_storeu_ps(acc, _mm256_fmadd_ps(scale, sum, _mm256_loadu_ps(acc)));
                }
            }
        }
    }
}

/// Adds a group whose weights are at most 15.
///
/// # Safety
/// AVX2; `weights` and `TOKENS` tokens of `x`, `stride` apart, reach over `chunks` chunks, a
/// multiple of [`NARROW_CHUNKS`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_nibbles<const TOKENS: usize>(
    chunks: usize,
    weights: *const u8,
    x: *const i8,
    stride: usize,
    sums: &mut [[__m256i; 2]; TOKENS],
) {
    // SAFETY: by this function's contract the pointers reach over all chunks and tokens read below.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        for first in (0..chunks).step_by(NARROW_CHUNKS) {
            let mut narrow = [[_mm256_setzero_si256(); 2]; TOKENS];
            for chunk in first..first + NARROW_CHUNKS {
                let weights = weights.add(chunk * CHUNK_BYTES);
                let left = _mm256_loadu_si256(weights.cast());
                let right = _mm256_loadu_si256(weights.add(32).cast());
                for (token, narrow) in narrow.iter_mut().enumerate() {
                    let four = x.add(token * stride + chunk * CHUNK).cast::<i32>();
                    let four = _mm256_set1_epi32(four.read_unaligned());
                    narrow[0] = _mm256_add_epi16(narrow[0], _mm256_maddubs_epi16(left, four));
                    narrow[1] = _mm256_add_epi16(narrow[1], _mm256_maddubs_epi16(right, four));
                }
            }
            for (sums, narrow) in sums.iter_mut().zip(narrow) {
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(narrow[0], ones));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(narrow[1], ones));
            }
        }
    }
}

/// Adds a group whose weights are bytes.
///
/// # Safety
/// AVX2; `weights` and `TOKENS` tokens of `x`, `stride` apart, reach over `chunks` chunks.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_bytes<const TOKENS: usize>(
    chunks: usize,
    weights: *const u8,
    x: *const i8,
    stride: usize,
    sums: &mut [[__m256i; 2]; TOKENS],
) {
    // SAFETY: by this function's contract the pointers reach over all chunks and tokens read below.
    unsafe {
        let low = _mm256_set1_epi16(0xff);
        for chunk in 0..chunks {
            let weights = weights.add(chunk * CHUNK_BYTES);
            let [left, right] = [weights, weights.add(32)].map(|w| _mm256_loadu_si256(w.cast()));
            let [left_even, right_even] = [left, right].map(|w| _mm256_and_si256(w, low));
            let [left_odd, right_odd] = [left, right].map(|w| _mm256_srli_epi16::<8>(w));
            for (token, sums) in sums.iter_mut().enumerate() {
                let four = x.add(token * stride + chunk * CHUNK).cast::<i32>();
                let four = _mm256_set1_epi32(four.read_unaligned());
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(four));
                let odd = _mm256_srai_epi16::<8>(four);
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(left_even, even));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(right_even, even));
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(left_odd, odd));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(right_odd, odd));
            }
        }
    }
}

/// As [`integer_tile`], for [`float`].
///
/// # Safety
/// As [`float`], with `first + TOKENS` tokens in the block and `TOKENS` in `acc`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn float_tile<const TOKENS: usize>(
    block: &FloatBlock<'_>,
    first: usize,
    half: usize,
    acc: &mut [[f32; PANEL]],
) {
    debug_assert_eq!(acc.len(), TOKENS);
    let channels = block.weights.len();
    // SAFETY: the caller's promise: every pointer below stays within its slice.
    unsafe {
        let mut floats = [[_mm256_setzero_ps(); 2]; TOKENS];
        for (floats, acc) in floats.iter_mut().zip(&*acc) {
            let acc = acc[half..].as_ptr();
            *floats = [_mm256_loadu_ps(acc), _mm256_loadu_ps(acc.add(LANES))];
        }
        let x = block.x.as_ptr().add(first * channels);
        for (channel, weights) in block.weights.iter().enumerate() {
            let weights = weights[half..].as_ptr();
            let left = _mm256_loadu_ps(weights);
            let right = _mm256_loadu_ps(weights.add(LANES));
            for (token, floats) in floats.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(token * channels + channel));
                floats[0] = _mm256_fmadd_ps(x, left, floats[0]);
                floats[1] = _mm256_fmadd_ps(x, right, floats[1]);
            }
        }
        for (floats, acc) in floats.iter().zip(acc) {
            let acc = acc[half..].as_mut_ptr();
            _mm256_storeu_ps(acc, floats[0]);
            _mm256_storeu_ps(acc.add(LANES), floats[1]);
        }
    }
}
