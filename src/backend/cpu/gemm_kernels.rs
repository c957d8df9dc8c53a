/*! The innermost products: a tile of C held in registers while the depth runs by.

A kernel of height R computes `c[r][j] = fma(a[k][r], b[k][j], c[r][j])` for ascending k. Every
element has its own chain of fused products, so a tile's shape never shows in the result. */

use super::gemm_pack::PANEL;
use super::isa::Isa;

/// The rows of A that a kernel of height R reads.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub start: *const f32,
    /// Values from one step of depth to the next.
    pub step: usize,
    /// Values from one row to the next.
    pub row: usize,
}

/// The tile of C, `[R, width]`, that a kernel writes.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub start: *mut f32,
    /// Values from row to row.
    pub stride: usize,
}

/// A kernel: `(depth, a, b, c, accumulate)` with `b` `[depth, PANEL]`, of which the first columns of the kernel's width are
/// used, and `c`, which is read only if `accumulate`. Pairs of a pointer and a number are passed in registers.
pub(super) type Kernel = unsafe fn(usize, Source, *const f32, Target, bool);

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// Columns of a tile; divides [`PANEL`].
    pub width: usize,
    /// Kernels of heights 1, 2, ..., the tallest last.
    pub by_height: &'static [Kernel],
}

/// The tallest tile of any set.
pub(super) const TALLEST: usize = 6;

/// The kernels for `isa`.
pub(super) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => &x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => &x86::AVX2,
        _ => &PORTABLE,
    }
}

/// 4 x 16: sixteen registers of four floats on AArch64.
static PORTABLE: Kernels =
    Kernels { width: 16, by_height: &[portable::<1>, portable::<2>, portable::<3>, portable::<4>] };

/// # Safety
/// `a`, `b` and `c` must be valid for the shapes that [`Kernel`] names.
unsafe fn portable<const R: usize>(
    depth: usize,
    Source { start: a, step: a_step, row: a_row }: Source,
    b: *const f32,
    Target { start: c, stride: c_stride }: Target,
    accumulate: bool,
) {
    let mut tile = [[0.0f32; 16]; R];
    // SAFETY: the caller vouches for every address below.
    unsafe {
        if accumulate {
            for (row, lanes) in tile.iter_mut().enumerate() {
                *lanes = c.add(row * c_stride).cast::<[f32; 16]>().read();
            }
        }
        for step in 0..depth {
            let from_b = b.add(step * PANEL).cast::<[f32; 16]>().read();
            let from_a: [f32; R] = std::array::from_fn(|row| *a.add(step * a_step + row * a_row));
            for (lanes, x) in tile.iter_mut().zip(from_a) {
                for (lane, y) in lanes.iter_mut().zip(from_b) {
                    *lane = x.mul_add(y, *lane);
                }
            }
        }
        for (row, lanes) in tile.iter().enumerate() {
            c.add(row * c_stride).cast::<[f32; 16]>().write(*lanes);
        }
    }
}

/// Prefetches some lines of `values`, from value `first` on, into L2.
#[inline(always)]
pub(super) fn prefetch(values: &[f32], first: usize, lines: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (first..values.len()).step_by(16).take(lines) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch may name any address, and SSE is part of every x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().add(at).cast()) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernels, PANEL, Source, Target};

    /// 6 x 64: 24 of 32 registers accumulate, so the latency of 4 cycles on two units is covered
    /// three times, and a step of 24 products loads only 10 times, four of them from L1.
    pub(super) static AVX512: Kernels = Kernels {
        width: 64,
        by_height: &[avx512::<1>, avx512::<2>, avx512::<3>, avx512::<4>, avx512::<5>, avx512::<6>],
    };

    /// 6 x 16: 12 of 16 registers accumulate.
    pub(super) static AVX2: Kernels = Kernels {
        width: 16,
        by_height: &[avx2::<1>, avx2::<2>, avx2::<3>, avx2::<4>, avx2::<5>, avx2::<6>],
    };

    /// # Safety
    /// The processor must have AVX-512F; addresses as [`super::Kernel`] names them.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const R: usize>(
        depth: usize,
        Source { start: mut a, step: a_step, row: a_row }: Source,
        mut b: *const f32,
        Target { start: c, stride: c_stride }: Target,
        accumulate: bool,
    ) {
        const W: usize = PANEL / 16;
        let mut tile = [[_mm512_setzero_ps(); W]; R];
        // SAFETY: the caller vouches for every address below; a prefetch may name any address.
        unsafe {
            for (row, lanes) in tile.iter_mut().enumerate() {
                for (lane, sums) in lanes.iter_mut().enumerate() {
                    let c = c.add(row * c_stride + 16 * lane);
                    if accumulate {
                        *sums = _mm512_loadu_ps(c);
                    } else {
                        // The stores at the end would otherwise wait for C to come from memory.
                        _mm_prefetch::<_MM_HINT_ET0>(c.cast());
                    }
                }
            }
            for _ in 0..depth {
                let mut from_b = [_mm512_setzero_ps(); W];
                for (lane, y) in from_b.iter_mut().enumerate() {
                    *y = _mm512_loadu_ps(b.add(16 * lane));
                }
                for (row, lanes) in tile.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(row * a_row));
                    for (sums, y) in lanes.iter_mut().zip(from_b) {
                        *sums = _mm512_fmadd_ps(x, y, *sums);
                    }
                }
                a = a.add(a_step);
                b = b.add(PANEL);
            }
            for (row, lanes) in tile.iter().enumerate() {
                for (lane, sums) in lanes.iter().enumerate() {
                    _mm512_storeu_ps(c.add(row * c_stride + 16 * lane), *sums);
                }
            }
        }
    }

    /// # Safety
    /// The processor must have AVX2 and FMA; addresses as [`super::Kernel`] names them.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize>(
        depth: usize,
        Source { start: mut a, step: a_step, row: a_row }: Source,
        mut b: *const f32,
        Target { start: c, stride: c_stride }: Target,
        accumulate: bool,
    ) {
        let mut tile = [[_mm256_setzero_ps(); 2]; R];
        // SAFETY: the caller vouches for every address below.
        unsafe {
            if accumulate {
                for (row, lanes) in tile.iter_mut().enumerate() {
                    let c = c.add(row * c_stride);
                    *lanes = [_mm256_loadu_ps(c), _mm256_loadu_ps(c.add(8))];
                }
            }
            for _ in 0..depth {
                let left = _mm256_loadu_ps(b);
                let right = _mm256_loadu_ps(b.add(8));
                for (row, lanes) in tile.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(row * a_row));
                    lanes[0] = _mm256_fmadd_ps(x, left, lanes[0]);
                    lanes[1] = _mm256_fmadd_ps(x, right, lanes[1]);
                }
                a = a.add(a_step);
                b = b.add(PANEL);
            }
            for (row, lanes) in tile.iter().enumerate() {
                let c = c.add(row * c_stride);
                _mm256_storeu_ps(c, lanes[0]);
                _mm256_storeu_ps(c.add(8), lanes[1]);
            }
        }
    }
}
