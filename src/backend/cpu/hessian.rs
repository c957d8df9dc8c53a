/*! A running sum of `x^T x`, and quadratic forms with it. */

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
    /// The lower triangle with half the diagonal: `w H w^T = 2 w L w^T`, which reads H once and
    /// needs no mirror image of it.
    pub(super) fn half_panels(&self) -> Panels {
        Panels::from_rows_with(self.n, self.n, |row, out| {
            out.fill(0.0);
            out[..row].copy_from_slice(&self.lower[row * self.n..][..row]);
            out[row] = self.lower[row * self.n + row] / 2.0;
        })
    }
}

/// `tr(W H W^T)` for `weights` `[rows, n]`.
pub(super) fn energy(isa: Isa, weights: &[f32], n: usize, half: &Panels) -> f64 {
    const ROWS: usize = 240;
    // Columns of W L are made in parts, each from the rows of L that are not zero there.
    const COLUMNS: usize = 8 * PANEL;
    let sums: Vec<f64> = weights
        .par_chunks(ROWS * n)
        .map_init(
            || vec![0f32; ROWS * COLUMNS],
            |products, weights| {
                let rows = Rows::new(weights, weights.len() / n, n);
                let mut sum = 0.0;
                for first in (0..n).step_by(COLUMNS) {
                    let end = (first + COLUMNS).min(n);
                    let width = end - first;
                    gemm(isa, rows, half.part(first..end, 0..end), products, width, false);
                    for (product, weights) in products.chunks(width).zip(weights.chunks(n)) {
                        let pairs = product.iter().zip(&weights[first..end]);
                        sum += pairs.map(|(p, w)| f64::from(*p) * f64::from(*w)).sum::<f64>();
                    }
                }
                2.0 * sum
            },
        )
        .collect();
    sums.iter().sum()
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
        assert_eq!(energy(Isa::Plain, &weights, 2, &hessian.half_panels()), expected);
    }
}
