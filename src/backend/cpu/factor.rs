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
pub(super) fn factor(hessian: &[f32], n: usize, damping: f32) -> Option<(Vec<f32>, Damping)> {
    let diagonal = |i: usize| hessian[i * n + i];
    let live = |i: usize| diagonal(i) > 0.0;
    let mean =
        (0..n).map(|i| f64::from(if live(i) { diagonal(i) } else { 1.0 })).sum::<f64>() / n as f64;
    DAMPING_LADDER.iter().enumerate().find_map(|(failures, step)| {
        let share = damping * step;
        let damp = (f64::from(share) * mean) as f32;
        // Column-major lower triangle of J H J: column j from its diagonal down is row n-1-j of H
        // from its diagonal to the left.
        let mut lower = vec![0f32; n * n];
        for (j, column) in lower.chunks_mut(n).enumerate() {
            let row = &hessian[(n - 1 - j) * n..][..n - j];
            // H's rows hold its lower triangle; J H J's column j needs H[n-1-i][n-1-j], i >= j,
            // which by symmetry is H[n-1-j][n-1-i].
            for (value, &h) in column[j..].iter_mut().zip(row.iter().rev()) {
                *value = h;
            }
            column[j] = if live(n - 1 - j) { column[j] } else { 1.0 } + damp;
        }
        let par = Par::rayon(0);
        let mut memory =
            MemBuffer::new(llt::cholesky_in_place_scratch::<f32>(n, par, Default::default()));
        llt::cholesky_in_place(
            MatMut::from_column_major_slice_mut(&mut lower, n, n),
            Default::default(),
            par,
            MemStack::new(&mut memory),
            Default::default(),
        )
        .ok()?;
        let mut u = vec![0f32; n * n];
        invert_lower_triangular(
            MatMut::from_row_major_slice_mut(&mut u, n, n),
            MatRef::from_column_major_slice(&lower, n, n),
            par,
        );
        // Reversing a row-major matrix reverses its rows and its columns.
        u.reverse();
        let sound = (0..n).all(|i| u[i * n + i].is_finite() && u[i * n + i] > 0.0);
        sound.then_some((u, Damping { share, failures }))
    })
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
        let (u, damping) = factor(&h, n, 0.01).unwrap();
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
        let indefinite = [1.0, 0.0, 2.0, 1.0];
        assert_eq!(
            factor(&indefinite, 2, 0.05).unwrap().1,
            Damping { share: 0.05 * 30.0, failures: 3 }
        );
        assert!(factor(&indefinite, 2, 0.001).is_none());
    }

    #[test]
    fn unused_channels_do_not_matter() {
        let (u, _) = factor(&[4.0, 0.0, 0.0, 0.0], 2, 0.01).unwrap();
        assert!(u[0] > 0.0 && u[3] > 0.0 && u[1] == 0.0);
    }
}
