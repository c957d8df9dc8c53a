/*! Cross-covariances `y^T x`, and the correction of weights for the accumulated error. */

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::par_gemm;
use super::gemm_pack::{PANEL, Panels, Rows};
use super::isa::Isa;
use super::{CHUNK, Hessian};
use crate::backend::{AccumulatedError, ErrorKind, Matrix};

/// Columns of a right-hand side that are packed together.
const COLUMNS: usize = 16 * PANEL;

/// `C += y^T x` for `tokens` rows of both, in order: batches have the same bits as one pass over all tokens.
pub(super) fn add(isa: Isa, cross: &mut Matrix, y: &[f32], x: &[f32], tokens: usize) {
    add_packed(isa, cross, y, &Panels::from_columns(x, tokens, cross.columns, cross.columns));
}

/// As [`add`], for x that is packed.
pub(super) fn add_packed(isa: Isa, cross: &mut Matrix, y: &[f32], x: &Panels) {
    let Matrix { rows, columns, data } = cross;
    assert_eq!(*columns, x.n(), "columns of a cross-covariance");
    par_gemm(isa, Rows::transposed(y, *rows), x, data, *columns, true);
}

/// `W += share (W C) H^-1`, or `W += share (C - W H) H^-1`, for `weights` `[out, channels]`, permuted, as the kind of error says.
/// `factor` is `U`, `U^T U = H^-1`, the damped Hessian's.
pub(super) fn correct(
    isa: Isa,
    weights: &mut Matrix,
    error: &AccumulatedError<Matrix>,
    hessian: &Hessian,
    factor: &[f32],
) {
    let Matrix { rows, columns: n, .. } = *weights;
    let found = [error.cross.rows, error.cross.columns, hessian.n];
    let expected = if error.kind == ErrorKind::Inputs { n } else { rows };
    assert_eq!(found, [expected, n, n], "shapes of the accumulated error and the weights");
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
    let wanted = match error.kind {
        ErrorKind::Inputs => {
            times(&weights.data, &|columns| columns_of(&error.cross.data, columns))
        }
        ErrorKind::Outputs => {
            let mut wanted = times(&weights.data, &|columns| hessian.columns(columns));
            let targets = wanted.par_chunks_mut(CHUNK).zip(error.cross.data.par_chunks(CHUNK));
            targets.for_each(|(own, target)| {
                own.iter_mut().zip(target).for_each(|(own, target)| *own = target - *own);
            });
            wanted
        }
    };
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
        let rows_of = |m: &[f32], rows: usize, x: &[f32]| -> Vec<f32> {
            x.chunks(n).flat_map(|x| apply(m, rows, x)).collect()
        };
        let x0 = rows_of(&a, n, &x);
        let d: Vec<f32> = x0.iter().zip(&x).map(|(x0, x)| x0 - x).collect();
        let outputs = rows_of(&w, rows, &x0).into_iter().zip(rows_of(&b, rows, &x));
        let y: Vec<f32> = outputs.map(|(y, r)| y + r).collect();
        // Only the lower triangle is read.
        let mut hessian = Hessian { n, lower: vec![f32::NAN; n * n] };
        for (i, j) in (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))) {
            hessian.lower[i * n + j] = x.chunks(n).map(|x| x[i] * x[j]).sum();
        }
        let (u, _) = factor(Isa::detect().unwrap(), &hessian.lower, n, 1e-6).unwrap();
        let kinds = [(ErrorKind::Inputs, &d, n), (ErrorKind::Outputs, &y, rows)];
        let shares = kinds.into_iter().flat_map(|kind| [(kind, 1.0), (kind, 0.5)]);
        for (((kind, lost, width), share), isa) in
            shares.flat_map(|case| Isa::available().into_iter().map(move |isa| (case, isa)))
        {
            let cross = Matrix { rows: width, columns: n, data: vec![0.0; width * n] };
            let mut error = AccumulatedError { cross, kind, share };
            // In two batches.
            let cut = tokens / 3;
            for part in [0..cut, cut..tokens] {
                let of = |y: &[f32], width: usize| y[part.start * width..part.end * width].to_vec();
                add(isa, &mut error.cross, &of(lost, width), &of(&x, n), part.len());
            }
            let mut weights = Matrix { rows, columns: n, data: w.clone() };
            correct(isa, &mut weights, &error, &hessian, &u);
            for (i, got) in weights.data.iter().enumerate() {
                let (row, j) = (i / n, i % n);
                let hidden = if kind == ErrorKind::Outputs { b[i] } else { 0.0 };
                let full: f32 = (0..n).map(|k| w[row * n + k] * a[k * n + j]).sum::<f32>() + hidden;
                let expected = w[i] + share * (full - w[i]);
                assert!(
                    (got - expected).abs() < 1e-2,
                    "{kind:?} {isa:?} {share}: {got} {expected}"
                );
            }
        }
    }
}
