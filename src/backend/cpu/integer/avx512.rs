/*! The panel kernels for AVX-512 with VNNI.

A tile is 6 tokens x 32 rows: 12 registers of integer sums and 12 of f32 sums, two of weights and
one of activations. `vpdpbusd` has a latency of 5 cycles and two start each cycle, so 10
independent sums are the least that keeps the multipliers busy; 12 are as many as leave room for
the f32 sums. Each step of 4 channels loads 2 weight registers and broadcasts 6 words for 12
products, well below the two loads a cycle that the core can do. */

use std::arch::x86_64::*;

use super::layout::{CHUNK, Line, PANEL, STEP, unpack};
use super::{Destination, FloatBlock, IntegerBlock, PackedBlock, group_starts};

/// Tokens in a tile.
pub(super) const TILE: usize = 6;

/// Calls a tile kernel for all tokens: tiles of [`TILE`], then one of what is left. Finished sums
/// are stored tile by tile, while the next tile computes.
macro_rules! tiles {
    ($kernel:ident, $block:expr, $acc:expr, $out:expr) => {
        for (tile, acc) in $acc.chunks_mut(TILE).enumerate() {
            let first = tile * TILE;
            if let Some(out) = $out {
                prefetch(out, first, acc.len());
            }
            match acc.len() {
                // Several sums each, since a product waits for the one before it.
                1 => $kernel::<1, 4>($block, first, tile_of(acc)),
                2 => $kernel::<2, 2>($block, first, tile_of(acc)),
                3 => $kernel::<3, 1>($block, first, tile_of(acc)),
                4 => $kernel::<4, 1>($block, first, tile_of(acc)),
                5 => $kernel::<5, 1>($block, first, tile_of(acc)),
                _ => $kernel::<TILE, 1>($block, first, tile_of(acc)),
            }
            if let Some(out) = $out {
                out.store(first, acc);
            }
        }
    };
}

/// Prefetches the lines where a tile's sums will be stored, while the tile computes: the stores would
/// otherwise wait for them.
#[inline(always)]
fn prefetch(out: &Destination, first: usize, tokens: usize) {
    for token in first..first + tokens {
        let line = out.first.wrapping_add(token * out.stride).cast::<i8>();
        // SAFETY: a prefetch may name any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_ET0>(line);
            _mm_prefetch::<_MM_HINT_ET0>(line.wrapping_add(64));
            // The third line of a row that does not start on one.
            _mm_prefetch::<_MM_HINT_ET0>(line.wrapping_add(127));
        }
    }
}

/// The sums of a tile, whose number must be a constant for the compiler to keep them in registers.
#[inline(always)]
fn tile_of<const TOKENS: usize>(acc: &mut [[f32; PANEL]]) -> &mut [[f32; PANEL]; TOKENS] {
    acc.first_chunk_mut().expect("the tile kernel is chosen by this length")
}

/// See [`IntegerBlock`].
///
/// # Safety
/// The processor has AVX-512 F, BW and VNNI; the block's slices reach as far as `super::integer`
/// checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn integer(
    block: &IntegerBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    // SAFETY: `integer_tile` requires of the block what this function does.
    unsafe { tiles!(integer_tile, block, acc, out) }
}

/// See [`PackedBlock`].
///
/// # Safety
/// As [`integer`], with at most [`TILE`] tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn packed(
    block: &PackedBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    // SAFETY: `packed_tile` requires of the block what this function does.
    unsafe {
        match acc.len() {
            // Several sums each, since a product waits for the one before it.
            1 => packed_tile::<1, 4>(block, tile_of(acc)),
            2 => packed_tile::<2, 2>(block, tile_of(acc)),
            3 => packed_tile::<3, 1>(block, tile_of(acc)),
            4 => packed_tile::<4, 1>(block, tile_of(acc)),
            5 => packed_tile::<5, 1>(block, tile_of(acc)),
            _ => packed_tile::<TILE, 1>(block, tile_of(acc)),
        }
    }
    if let Some(out) = out {
        out.store(0, acc);
    }
}

/// The sums of `TOKENS` tokens, each in `CHAINS` parts.
///
/// # Safety
/// As [`packed`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn packed_tile<const TOKENS: usize, const CHAINS: usize>(
    block: &PackedBlock<'_>,
    acc: &mut [[f32; PANEL]; TOKENS],
) {
    let mask = _mm512_set1_epi8(15);
    // SAFETY: the caller's promise: every pointer below stays within its slice.
    unsafe {
        let mut floats: [[__m512; 2]; TOKENS] = std::array::from_fn(|token| {
            let acc = &acc[token];
            [_mm512_loadu_ps(acc.as_ptr()), _mm512_loadu_ps(acc[16..].as_ptr())]
        });
        let mut weights = block.codes.as_ptr();
        let mut x = block.x_codes.as_ptr();
        for (group, scales) in block.scales.as_chunks::<PANEL>().0.iter().enumerate() {
            let mut sums = [[[_mm512_setzero_si512(); 2]; CHAINS]; TOKENS];
            for (token, sums) in sums.iter_mut().enumerate() {
                let at = token * block.groups_stride + group;
                sums[0] = [_mm512_set1_epi32(*block.starts.get_unchecked(at)); 2];
            }
            // A group is a multiple of four chunks.
            for _ in 0..block.group_chunks / 4 {
                for chunk in 0..4 {
                    let both = _mm512_load_si512(weights.add(chunk).cast());
                    let left = _mm512_and_si512(both, mask);
                    let right = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
                    for (token, sums) in sums.iter_mut().enumerate() {
                        let four = x.add(token * block.codes_stride + chunk * CHUNK);
                        let four = _mm512_set1_epi32(four.cast::<i32>().read_unaligned());
                        let sums = &mut sums[chunk % CHAINS];
                        sums[0] = _mm512_dpbusd_epi32(sums[0], left, four);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], right, four);
                    }
                }
                weights = weights.add(4);
                x = x.add(4 * CHUNK);
            }
            let half =
                |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(scales[at..].as_ptr().cast()));
            let (left, right) = (half(0), half(16));
            for (token, (floats, sums)) in floats.iter_mut().zip(sums).enumerate() {
                let at = token * block.groups_stride + group;
                let scale = _mm512_set1_ps(*block.x_scales.get_unchecked(at));
                let [sum, other] = totals(&sums);
                floats[0] = _mm512_fmadd_ps(_mm512_mul_ps(scale, left), sum, floats[0]);
                floats[1] = _mm512_fmadd_ps(_mm512_mul_ps(scale, right), other, floats[1]);
            }
        }
        for (floats, acc) in floats.iter().zip(acc) {
            _mm512_storeu_ps(acc.as_mut_ptr(), floats[0]);
            _mm512_storeu_ps(acc[16..].as_mut_ptr(), floats[1]);
        }
    }
}

/// The parts of exact sums added up, as floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn totals(parts: &[[__m512i; 2]]) -> [__m512; 2] {
    let add = |a: [__m512i; 2], b: &[__m512i; 2]| {
        [_mm512_add_epi32(a[0], b[0]), _mm512_add_epi32(a[1], b[1])]
    };
    parts[1..].iter().fold(parts[0], add).map(|sum| _mm512_cvtepi32_ps(sum))
}

/// See [`FloatBlock`].
///
/// # Safety
/// The processor has AVX-512 F; `block.x` is `[acc.len(), block.weights.len()]`.
#[target_feature(enable = "avx512f")]
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
/// The processor has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn unpack_lines(packed: &[Line], unpacked: &mut [Line]) {
    unpack(packed, unpacked);
}

/// See [`group_starts`].
///
/// # Safety
/// The processor has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn starts(codes: &[i8], size: usize, offset: i32, starts: &mut [i32]) {
    group_starts(codes, size, offset, starts);
}

/// The sums of `TOKENS` tokens from `first` on, each in `CHAINS` parts.
///
/// # Safety
/// As [`integer`], with `first + TOKENS` tokens in the block and `TOKENS` in `acc`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn integer_tile<const TOKENS: usize, const CHAINS: usize>(
    block: &IntegerBlock<'_>,
    first: usize,
    acc: &mut [[f32; PANEL]; TOKENS],
) {
    // SAFETY: the caller's promise: every pointer below stays within its slice.
    unsafe {
        let mut floats: [[__m512; 2]; TOKENS] = std::array::from_fn(|token| {
            let acc = &acc[token];
            [_mm512_loadu_ps(acc.as_ptr()), _mm512_loadu_ps(acc[16..].as_ptr())]
        });
        let mut weights = block.codes.as_ptr();
        let mut x = block.x_codes.as_ptr().add(first * block.codes_stride);
        for (group, scales) in block.scales.iter().enumerate() {
            let mut sums = [[[_mm512_setzero_si512(); 2]; CHAINS]; TOKENS];
            for (token, sums) in sums.iter_mut().enumerate() {
                // The next tile's codes of this group: a job's tokens do not fit L1. A prefetch may
                // name any address.
                let next = x.wrapping_add((TILE + token) * block.codes_stride);
                _mm_prefetch::<_MM_HINT_T0>(next);
                let at = (first + token) * block.groups_stride + group;
                sums[0] = [_mm512_set1_epi32(*block.starts.get_unchecked(at)); 2];
            }
            for _ in 0..block.group_chunks / (STEP / CHUNK) {
                let tokens: [*const i8; TOKENS] =
                    std::array::from_fn(|token| x.add(token * block.codes_stride));
                for chunk in 0..STEP / CHUNK {
                    let weights = weights.add(chunk * PANEL * CHUNK);
                    let left = _mm512_loadu_si512(weights.cast());
                    let right = _mm512_loadu_si512(weights.add(64).cast());
                    for (x, sums) in tokens.iter().zip(&mut sums) {
                        let four = x.add(chunk * CHUNK).cast::<i32>().read_unaligned();
                        let four = _mm512_set1_epi32(four);
                        let sums = &mut sums[chunk % CHAINS];
                        sums[0] = _mm512_dpbusd_epi32(sums[0], left, four);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], right, four);
                    }
                }
                weights = weights.add(PANEL * STEP);
                x = x.add(STEP);
            }
            let left = _mm512_loadu_ps(scales.as_ptr());
            let right = _mm512_loadu_ps(scales[16..].as_ptr());
            for (token, (floats, sums)) in floats.iter_mut().zip(sums).enumerate() {
                let at = (first + token) * block.groups_stride + group;
                let scale = _mm512_set1_ps(*block.x_scales.get_unchecked(at));
                let [sum, other] = totals(&sums);
                floats[0] = _mm512_fmadd_ps(_mm512_mul_ps(scale, left), sum, floats[0]);
                floats[1] = _mm512_fmadd_ps(_mm512_mul_ps(scale, right), other, floats[1]);
            }
        }
        for (floats, acc) in floats.iter().zip(acc) {
            _mm512_storeu_ps(acc.as_mut_ptr(), floats[0]);
            _mm512_storeu_ps(acc[16..].as_mut_ptr(), floats[1]);
        }
    }
}

/// As [`integer_tile`], for [`float`], whose sums have one order: `CHAINS` is not used.
///
/// # Safety
/// As [`float`], with `first + TOKENS` tokens in the block and `TOKENS` in `acc`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn float_tile<const TOKENS: usize, const CHAINS: usize>(
    block: &FloatBlock<'_>,
    first: usize,
    acc: &mut [[f32; PANEL]; TOKENS],
) {
    let channels = block.weights.len();
    // SAFETY: the caller's promise: every pointer below stays within its slice.
    unsafe {
        let mut floats: [[__m512; 2]; TOKENS] = std::array::from_fn(|token| {
            let acc = &acc[token];
            [_mm512_loadu_ps(acc.as_ptr()), _mm512_loadu_ps(acc[16..].as_ptr())]
        });
        let x = block.x.as_ptr().add(first * channels);
        for (channel, weights) in block.weights.iter().enumerate() {
            let left = _mm512_loadu_ps(weights.as_ptr());
            let right = _mm512_loadu_ps(weights[16..].as_ptr());
            for (token, floats) in floats.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*x.add(token * channels + channel));
                floats[0] = _mm512_fmadd_ps(x, left, floats[0]);
                floats[1] = _mm512_fmadd_ps(x, right, floats[1]);
            }
        }
        for (floats, acc) in floats.iter().zip(acc) {
            _mm512_storeu_ps(acc.as_mut_ptr(), floats[0]);
            _mm512_storeu_ps(acc[16..].as_mut_ptr(), floats[1]);
        }
    }
}
