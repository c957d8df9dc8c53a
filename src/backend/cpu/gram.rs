/*! H += X^T X, the matrix that GPTQ solves with, at half the cost of a product.

Tokens are added one after the other to every element, so neither threads nor the size of the
batches that X comes in show in H. */

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{DEPTH, PANEL, Panels, Part, Shared, range, tiles};
use super::gemm_kernels::{Kernels, Source, Target, kernels};
use super::isa::Isa;

/// H += X^T X for X `[tokens, n]`, half of the work: only the lower triangle (j <= i) of H `[n, n]`
/// is read and written. Tokens are added in ascending order, whatever the thread count, so X in
/// pieces has the same bits as the entire X.
///
/// # Panics
/// If X or H is smaller than its shape.
pub fn gram_add(isa: Isa, x: &[f32], tokens: usize, n: usize, h: &mut [f32]) {
    let fits = |rows: usize, len: usize| rows.checked_mul(n).is_some_and(|count| count <= len);
    assert!(fits(tokens, x.len()) && fits(n, h.len()), "X or H is smaller than its shape");
    gram_add_packed(isa, &Panels::from_columns(x, tokens, n, n), h);
}

/// As [`gram_add`], for X that is packed.
///
/// # Panics
/// If H is smaller than its shape.
pub fn gram_add_packed(isa: Isa, x: &Panels, h: &mut [f32]) {
    let (tokens, n) = (x.k(), x.n());
    assert!(n.checked_mul(n).is_some_and(|count| count <= h.len()), "H is smaller than its shape");
    let gram = Gram { kernels: kernels(isa), x: Part::from(x), n, h: Shared(h.as_mut_ptr()) };
    // Square blocks of H; small ones where large ones would leave threads without work.
    let count = n.div_ceil(PANEL);
    let triangle = |side: usize| count.div_ceil(side) * (count.div_ceil(side) + 1) / 2;
    let enough = 4 * rayon::current_num_threads();
    let side = [3, 2].into_iter().find(|&side| triangle(side) >= enough).unwrap_or(1);
    let blocks: Vec<_> = (0..count.div_ceil(side))
        .flat_map(|row| (0..=row).map(move |column| (row, column)))
        .collect();
    blocks.into_par_iter().for_each(|(row, column)| {
        for depth in (0..tokens.div_ceil(DEPTH)).map(|block| range(block, DEPTH, tokens)) {
            for column in range(column, side, count) {
                for row in range(row, side, count).filter(|row| *row >= column) {
                    // SAFETY: no two blocks of H share an element, nor do two pairs of panels.
                    unsafe { gram.add_pair(row, column, depth.clone()) };
                }
            }
        }
    });
}

/// H and the panels of X, which serve as either side of the product: a step of depth is a token, and
/// its 64 values of a panel are 64 columns of X as well as 64 rows of X^T.
struct Gram<'a> {
    kernels: &'a Kernels,
    x: Part<'a>,
    n: usize,
    h: Shared,
}

impl Gram<'_> {
    /// Adds some tokens to the part of H in the rows of panel `row` and the columns of panel
    /// `column`, which is not after it.
    ///
    /// # Safety
    /// No other thread may use this part of H.
    unsafe fn add_pair(&self, row: usize, column: usize, tokens: Range<usize>) {
        let Self { n, .. } = *self;
        let rows = range(row, PANEL, n);
        // SAFETY: rows and columns are inside H. On the diagonal only j <= i may be touched, so a
        // corner of PANEL x PANEL stands in for it.
        unsafe {
            let c = self.h.at(rows.start * n + column * PANEL);
            if row != column {
                self.multiply(row, column, tokens, Target { start: c, stride: n });
                return;
            }
            let mut corner = [0.0f32; PANEL * PANEL];
            for i in 0..rows.len() {
                c.add(i * n).copy_to_nonoverlapping(&mut corner[i * PANEL], i + 1);
            }
            let start = corner.as_mut_ptr();
            self.multiply(row, column, tokens, Target { start, stride: PANEL });
            for i in 0..rows.len() {
                c.add(i * n).copy_from_nonoverlapping(&corner[i * PANEL], i + 1);
            }
        }
    }

    /// # Safety
    /// C must be valid for the rows of panel `row` and PANEL columns.
    unsafe fn multiply(&self, row: usize, column: usize, tokens: Range<usize>, c: Target) {
        let [left, right] = [row, column]
            .map(|panel| &self.x.panel(panel)[tokens.start * PANEL..tokens.end * PANEL]);
        for (tile, height) in tiles(range(row, PANEL, self.n).len(), self.kernels.by_height.len()) {
            for first in (0..PANEL).step_by(self.kernels.width) {
                let kernel = self.kernels.by_height[height - 1];
                // SAFETY: both panels hold PANEL values for each token, and the caller vouches for C.
                unsafe {
                    let a = Source { start: left.as_ptr().add(tile), step: PANEL, row: 1 };
                    let c = Target { start: c.start.add(tile * c.stride + first), ..c };
                    kernel(tokens.len(), a, right.as_ptr().add(first), c, true);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemm::tests::{on_threads, random, refusal};
    use super::super::gemm::{Rows, plain_gemm};
    use super::*;

    #[test]
    fn the_gram_matrix_has_the_bits_of_the_product_and_leaves_its_upper_half() {
        for (tokens, n) in [(1, 1), (5, 33), (40, 172), (330, 100), (3, 230)] {
            let x = random(tokens * n, 8);
            let panels = Panels::from_columns(&x, tokens, n, n);
            let old = random(n * n, 9);
            let mut expected = old.clone();
            plain_gemm(Rows::transposed(&x, n), &panels, &mut expected, n, true);
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let mut h = old.clone();
                    (0..n * n).filter(|i| i % n > i / n).for_each(|i| h[i] = f32::NAN);
                    let cut = tokens / 3;
                    on_threads(threads, || {
                        gram_add(isa, &x, cut, n, &mut h);
                        gram_add(isa, &x[cut * n..], tokens - cut, n, &mut h);
                    });
                    for i in 0..n * n {
                        let upper = i % n > i / n;
                        assert!(if upper { h[i].is_nan() } else { h[i] == expected[i] }, "{isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_width_whose_square_wraps_is_refused() {
        for isa in Isa::available() {
            let sentence = refusal(move || gram_add(isa, &[1.0; 8], 0, 1 << 32, &mut [0.0; 8]));
            assert!(sentence.contains("smaller than its shape"), "{sentence}");
            let sentence = refusal(move || gram_add(isa, &[1.0; 8], 1 << 63, 2, &mut [0.0; 8]));
            assert!(sentence.contains("smaller than its shape"), "{sentence}");
        }
    }
}
