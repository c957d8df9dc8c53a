/*! H += X^T X, the matrix that GPTQ solves with, at half the price of a product.

Tokens are added one after the other to every element, so neither threads nor the size of the
batches that X comes in show in H. */

use rayon::prelude::*;

use super::gemm::{PANEL, Panels, Part, Rows, Shared, multiply, range};
use super::isa::Isa;

/// H += X^T X for X `[tokens, n]`, half of the work: only the lower triangle (j <= i) of H `[n, n]`
/// is read and written. Tokens are added in ascending order, whatever the thread count, so X in
/// pieces gives the same bits as X at once.
///
/// # Panics
/// If X or H is smaller than its shape.
pub fn gram_add(isa: Isa, x: &[f32], tokens: usize, n: usize, h: &mut [f32]) {
    assert!(x.len() >= tokens * n && h.len() >= n * n, "X or H is smaller than its shape");
    let right = Panels::from_columns(x, tokens, n, n);
    let (left, right) = (Rows::transposed(x, n), Part::from(&right));
    // Square blocks of H; small ones where large ones would leave threads without work.
    let triangle = |side: usize| n.div_ceil(side) * (n.div_ceil(side) + 1) / 2;
    let enough = 4 * rayon::current_num_threads();
    let side = [6, 3].map(|panels| panels * PANEL).into_iter().find(|&s| triangle(s) >= enough);
    let side = side.unwrap_or(PANEL * 2);
    let shared = Shared(h.as_mut_ptr());
    let blocks: Vec<_> =
        (0..n.div_ceil(side)).flat_map(|row| (0..=row).map(move |column| (row, column))).collect();
    blocks.into_par_iter().for_each(|(row, column)| {
        let (rows, columns) = (range(row, side, n), range(column, side, n));
        if row != column {
            // SAFETY: H holds n x n values and no two blocks share an element.
            unsafe {
                let c = shared.at(rows.start * n + columns.start);
                multiply(isa, left.slice(rows), &right.columns(columns), c, n, true);
            }
            return;
        }
        for first in columns.clone().step_by(PANEL) {
            let last = (first + PANEL).min(columns.end);
            let mut corner = [0.0f32; PANEL * PANEL];
            // SAFETY: H holds n x n values, no two blocks share an element, and the corner is
            // PANEL x PANEL. Only j <= i is touched.
            unsafe {
                for i in first..last {
                    let h = shared.at(i * n + first);
                    h.copy_to_nonoverlapping(&mut corner[(i - first) * PANEL], i - first + 1);
                }
                let b = right.columns(first..last);
                multiply(isa, left.slice(first..last), &b, corner.as_mut_ptr(), PANEL, true);
                for i in first..last {
                    let h = shared.at(i * n + first);
                    h.copy_from_nonoverlapping(&corner[(i - first) * PANEL], i - first + 1);
                }
                if last < rows.end {
                    let c = shared.at(last * n + first);
                    multiply(isa, left.slice(last..rows.end), &b, c, n, true);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::gemm::plain_gemm;
    use super::super::gemm::tests::{on_threads, random};
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
}
