/*! GPTQ's `U`, upper triangular with `U^T U = H^-1`, by one Cholesky factorization.

With J the reversal of rows and columns, `J H J = L L^T` gives `H = (J L J)(J L J)^T`, so
`U = (J L J)^-1 = J L^-1 J`: no inverse of H is formed, and one triangular inverse replaces a second
factorization (gptq.py does three). */

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor as llt;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{MatMut, MatRef, Par};

use crate::backend::Damping;
use crate::quant::gptq::DAMPING_LADDER;

/// `U` `[n, n]` row-major for the Hessian whose lower triangle `hessian` holds, with the smallest
/// damping of the ladder that makes it positive definite. Channels that no token ever used get a
/// diagonal of 1, as in gptq.py.
///
/// The factorization runs in the strict upper triangle and the diagonal of `hessian`, which holds
/// nothing otherwise, so that no second matrix of its size is needed. The lower triangle and the
/// diagonal are the same afterwards.
pub(super) fn factor(hessian: &mut [f32], n: usize, damping: f32) -> Option<(Vec<f32>, Damping)> {
    let diagonal: Vec<f32> = (0..n).map(|i| hessian[i * n + i]).collect();
    let live = |i: usize| if diagonal[i] > 0.0 { diagonal[i] } else { 1.0 };
    let mean = (0..n).map(|i| f64::from(live(i))).sum::<f64>() / n as f64;
    let band = Band::of(hessian, n);
    DAMPING_LADDER.iter().enumerate().find_map(|(failures, step)| {
        let share = damping * step;
        let damp = (f64::from(share) * mean) as f32;
        let u = inverse_factor(hessian, n, |i| live(i) + damp);
        band.restore(hessian);
        Some((u?, Damping { share, failures }))
    })
}

/// The diagonal of a Hessian and what lies near it in the lower triangle. The innermost blocks of the
/// factorization, 64 columns wide, are kept in registers and written back as squares.
struct Band {
    n: usize,
    /// Row after row, from `BAND` columns left of the diagonal to the diagonal.
    values: Vec<f32>,
}

/// Columns left of the diagonal that are restored: twice what the factorization may overwrite.
const BAND: usize = 128;

impl Band {
    fn of(hessian: &[f32], n: usize) -> Self {
        let rows =
            (0..n).flat_map(|row| &hessian[row * n + row.saturating_sub(BAND)..=row * n + row]);
        Self { n, values: rows.copied().collect() }
    }

    fn restore(&self, hessian: &mut [f32]) {
        let mut rest = &self.values[..];
        for row in 0..self.n {
            let to = &mut hessian[row * self.n + row.saturating_sub(BAND)..=row * self.n + row];
            let (values, after) = rest.split_at(to.len());
            to.copy_from_slice(values);
            rest = after;
        }
    }
}

/// `U` for the matrix of `hessian`'s strict lower triangle and the given diagonal; none if it is not
/// positive definite. Overwrites the diagonal, the upper triangle, and the lower one near the diagonal.
fn inverse_factor(
    hessian: &mut [f32],
    n: usize,
    diagonal: impl Fn(usize) -> f32,
) -> Option<Vec<f32>> {
    // Column j of the column-major lower triangle of J H J, from its diagonal down, is row n-1-j of H
    // from its diagonal to the left. It lies in row j of the buffer, right of the diagonal.
    for j in 0..n {
        for i in j + 1..n {
            hessian[j * n + i] = hessian[(n - 1 - j) * n + n - 1 - i];
        }
    }
    for j in 0..n {
        hessian[j * n + j] = diagonal(n - 1 - j);
    }
    let par = Par::rayon(0);
    let scratch = llt::cholesky_in_place_scratch::<f32>(n, par, Default::default());
    let mut memory = MemBuffer::new(scratch);
    llt::cholesky_in_place(
        MatMut::from_column_major_slice_mut(hessian, n, n),
        Default::default(),
        par,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .ok()?;
    let mut u = vec![0f32; n * n];
    invert_lower_triangular(
        MatMut::from_row_major_slice_mut(&mut u, n, n),
        MatRef::from_column_major_slice(hessian, n, n),
        par,
    );
    // Reversing a row-major matrix reverses its rows and its columns.
    u.reverse();
    (0..n).all(|i| u[i * n + i].is_finite() && u[i * n + i] > 0.0).then_some(u)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u_is_the_upper_factor_of_the_inverse() {
        let n = 37;
        let x: Vec<f32> =
            (0..n * 2 * n).map(|i| ((i * i * 7919) % 1013) as f32 / 500.0 - 1.0).collect();
        let h: Vec<f32> = (0..n * n)
            .map(|at| (0..2 * n).map(|t| x[t * n + at / n] * x[t * n + at % n]).sum())
            .collect();
        let (u, damping) = factor(&mut h.clone(), n, 0.01).unwrap();
        assert_eq!(damping, Damping { share: 0.01, failures: 0 });
        let damp = 0.01 * (0..n).map(|i| h[i * n + i]).sum::<f32>() / n as f32;
        let damped = |i: usize, j: usize| h[i * n + j] + if i == j { damp } else { 0.0 };
        for i in 0..n {
            assert!(u[i * n..i * n + i].iter().all(|&below| below == 0.0));
            // U^T U H = I, row i.
            let inverse: Vec<f32> =
                (0..n).map(|j| (0..n).map(|k| u[k * n + i] * u[k * n + j]).sum()).collect();
            for j in 0..n {
                let entry: f32 = (0..n).map(|k| inverse[k] * damped(k, j)).sum();
                assert!((entry - f32::from(u8::from(i == j))).abs() < 2e-3, "{i} {j}: {entry}");
            }
        }
    }

    #[test]
    fn damping_climbs_and_gives_up() {
        // Eigenvalues 3 and -1 (mean diagonal 1): damping must exceed 1.
        let mut indefinite = [1.0, 0.0, 2.0, 1.0];
        assert_eq!(
            factor(&mut indefinite, 2, 0.05).unwrap().1,
            Damping { share: 0.05 * 30.0, failures: 3 }
        );
        assert!(factor(&mut indefinite, 2, 0.001).is_none());
    }

    #[test]
    fn unused_channels_do_not_matter() {
        let (u, _) = factor(&mut [4.0, 0.0, 0.0, 0.0], 2, 0.01).unwrap();
        assert!(u[0] > 0.0 && u[3] > 0.0 && u[1] == 0.0);
    }

    #[test]
    fn the_hessian_is_the_same_after_its_factorization() {
        for n in [1, 2, 37, 300, 517] {
            let x: Vec<f32> =
                (0..n * n).map(|i| ((i * i * 7919 + i) % 1013) as f32 / 500.0 - 1.0).collect();
            // Positive definite, or at no damping: neither changes it.
            for (diagonal, sound) in [(n as f32, true), (1e-3, n == 1)] {
                let lower = |i: usize, j: usize| if i == j { diagonal } else { x[i * n + j] };
                let entry = |at: usize| match (at / n, at % n) {
                    (i, j) if j <= i => lower(i, j),
                    _ => f32::NAN,
                };
                let mut h: Vec<f32> = (0..n * n).map(entry).collect();
                assert_eq!(factor(&mut h, n, 0.01).is_some(), sound, "{n} {diagonal}");
                for i in 0..n {
                    assert!((0..=i).all(|j| h[i * n + j] == lower(i, j)), "{n}: row {i}");
                }
            }
        }
    }
}
