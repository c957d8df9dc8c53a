/*! Cross-covariances `y^T x`, and the correction of weights for the accumulated error. */

use std::ops::Range;

use super::gemm::par_gemm;
use super::gemm_pack::{PANEL, Panels, Rows};
use super::isa::Isa;
use crate::backend::{AccumulatedError, Matrix};

/// Columns of a right-hand side that are packed together.
const COLUMNS: usize = 16 * PANEL;

/// `C += y^T x` for `tokens` rows of both, in order: batches have the same bits as one pass over all tokens.
pub(super) fn add(isa: Isa, cross: &mut Matrix, y: &[f32], x: &[f32], tokens: usize) {
    let Matrix { rows, columns, data } = cross;
    let panels = Panels::from_columns(x, tokens, *columns, *columns);
    par_gemm(isa, Rows::transposed(y, *rows), &panels, data, *columns, true);
}

/// `W += share (W C_in + C_out) H^-1` for `weights` `[out, channels]`, permuted. `factor` is `U`,
/// `U^T U = H^-1`, the damped Hessian's.
pub(super) fn correct(
    isa: Isa,
    weights: &mut Matrix,
    error: &AccumulatedError<Matrix>,
    factor: &[f32],
) {
    let Matrix { rows, columns: n, .. } = *weights;
    assert_eq!(
        error.inputs.data.len(),
        n * n,
        "channels of the accumulated error and of the weights"
    );
    // The right-hand sides are packed some columns at a time: a packed copy of all of them would be as
    // large as the Hessian.
    let times = |left: &[f32], pack: &dyn Fn(Range<usize>) -> Panels| {
        let mut product = vec![0.0; rows * n];
        for first in (0..n).step_by(COLUMNS) {
            let panels = pack(first..(first + COLUMNS).min(n));
            par_gemm(isa, Rows::new(left, rows, n), &panels, &mut product[first..], n, false);
        }
        product
    };
    let columns_of = |matrix: &[f32], columns: Range<usize>| {
        Panels::from_columns(&matrix[columns.start..], n, columns.len(), n)
    };
    let mut wanted = times(&weights.data, &|columns| columns_of(&error.inputs.data, columns));
    if let Some(outputs) = &error.outputs {
        assert_eq!(
            outputs.data.len(),
            rows * n,
            "outputs of the accumulated error and of the weights"
        );
        wanted.iter_mut().zip(&outputs.data).for_each(|(wanted, lost)| *wanted += lost);
    }
    let half = times(&wanted, &|columns| {
        Panels::from_rows(&factor[columns.start * n..columns.end * n], columns.len(), n)
    });
    drop(wanted);
    let change = times(&half, &|columns| columns_of(factor, columns));
    for (weight, change) in weights.data.iter_mut().zip(change) {
        *weight = error.share.mul_add(change, *weight);
    }
}

#[cfg(test)]
mod tests {
    use super::super::factor::factor;
    use super::super::gemm::tests::random;
    use super::*;

    /// The outputs of the corrected weights on `x` are those of the source's on `x0`, where that is possible:
    /// here `x0 = A x`, and `r = B x`.
    #[test]
    fn a_linear_error_is_undone() {
        let (tokens, n, rows) = (300, 24, 7);
        let x = random(tokens * n, 1);
        let [a, b, w] = [n * n, rows * n, rows * n].map(|len| random(len, len as u64));
        let apply = |m: &[f32], rows: usize, x: &[f32]| -> Vec<f32> {
            (0..rows).map(|i| (0..n).map(|j| m[i * n + j] * x[j]).sum()).collect()
        };
        let rows_of = |m: &[f32], rows: usize| -> Vec<f32> {
            x.chunks(n).flat_map(|x| apply(m, rows, x)).collect()
        };
        let (x0, r) = (rows_of(&a, n), rows_of(&b, rows));
        let d: Vec<f32> = x0.iter().zip(&x).map(|(x0, x)| x0 - x).collect();
        let mut h = vec![0.0; n * n];
        for x in x.chunks(n) {
            (0..n * n).for_each(|at| h[at] += x[at / n] * x[at % n]);
        }
        let (u, _) = factor(Isa::detect().unwrap(), &h, n, 1e-6).unwrap();
        let cross = |rows| Matrix { rows, columns: n, data: vec![0.0; rows * n] };
        for (share, isa) in Isa::available().into_iter().flat_map(|isa| [(1.0, isa), (0.5, isa)]) {
            let mut error =
                AccumulatedError { inputs: cross(n), outputs: Some(cross(rows)), share };
            // In two batches.
            let cut = tokens / 3;
            for part in [0..cut, cut..tokens] {
                let of = |y: &[f32], width: usize| y[part.start * width..part.end * width].to_vec();
                add(isa, &mut error.inputs, &of(&d, n), &of(&x, n), part.len());
                let outputs = error.outputs.as_mut().unwrap();
                add(isa, outputs, &of(&r, rows), &of(&x, n), part.len());
            }
            let mut weights = Matrix { rows, columns: n, data: w.clone() };
            correct(isa, &mut weights, &error, &u);
            for (i, got) in weights.data.iter().enumerate() {
                let (row, j) = (i / n, i % n);
                let full: f32 = (0..n).map(|k| w[row * n + k] * a[k * n + j]).sum::<f32>() + b[i];
                let expected = w[i] + share * (full - w[i]);
                assert!((got - expected).abs() < 1e-2, "{isa:?} {share}: {got} for {expected}");
            }
        }
    }
}
