/*! A running sum of `x^T x`, and quadratic forms with it. */

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::gemm;
use super::gemm_pack::{PANEL, Panels, Rows};
use super::isa::Isa;

/// `sum x^T x` over the tokens, `[n, n]`; only the lower triangle is kept up to date.
pub struct Hessian {
    pub(super) n: usize,
    pub(super) lower: Vec<f32>,
}

impl Hessian {
    /// Some columns of the lower triangle with half the diagonal, the rows down to the last of them:
    /// `w H w^T = 2 w L w^T`, which reads H once and needs no mirror image of it.
    fn half_columns(&self, columns: Range<usize>) -> Panels {
        Panels::from_rows_with(columns.len(), columns.end, |column, out| {
            let row = columns.start + column;
            out.fill(0.0);
            out[..row].copy_from_slice(&self.lower[row * self.n..][..row]);
            out[row] = self.lower[row * self.n + row] / 2.0;
        })
    }

    /// Some columns of H, `[n, columns]`.
    pub(super) fn columns(&self, columns: Range<usize>) -> Panels {
        let Self { n, lower } = self;
        Panels::from_rows_with(columns.len(), *n, |column, out| {
            let column = columns.start + column;
            out[..=column].copy_from_slice(&lower[column * n..][..=column]);
            for (row, out) in out.iter_mut().enumerate().skip(column + 1) {
                *out = lower[row * n + column];
            }
        })
    }

    /// `tr(W H W^T)` for `weights` `[rows, n]`.
    pub(super) fn energy(&self, isa: Isa, weights: &[f32]) -> f64 {
        const ROWS: usize = 240;
        // Columns of W L are made in parts, each from the rows of L that are not zero there: a packed
        // copy of the entire L would be as large as H.
        const COLUMNS: usize = 8 * PANEL;
        let n = self.n;
        let mut sums = vec![0f64; weights.len().div_ceil(ROWS * n)];
        for first in (0..n).step_by(COLUMNS) {
            let end = (first + COLUMNS).min(n);
            let width = end - first;
            let half = self.half_columns(first..end);
            sums.par_iter_mut().zip(weights.par_chunks(ROWS * n)).for_each_init(
                || vec![0f32; ROWS * width],
                |products, (sum, weights)| {
                    let rows = Rows::new(weights, weights.len() / n, n);
                    gemm(isa, rows, &half, products, width, false);
                    for (product, weights) in products.chunks(width).zip(weights.chunks(n)) {
                        let pairs = product.iter().zip(&weights[first..end]);
                        *sum += pairs.map(|(p, w)| f64::from(*p) * f64::from(*w)).sum::<f64>();
                    }
                },
            );
        }
        sums.iter().map(|sum| 2.0 * sum).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_is_the_quadratic_form() {
        let hessian = Hessian { n: 2, lower: vec![3.0, f32::NAN, 1.0, 5.0] };
        let weights = [1.0, 2.0, -1.0, 0.5];
        let row = |a: f64, b: f64| 3.0 * a * a + 2.0 * a * b + 5.0 * b * b;
        let expected = row(1.0, 2.0) + row(-1.0, 0.5);
        assert_eq!(hessian.energy(Isa::Plain, &weights), expected);
    }
}
