/*! GPTQ's `U`, upper triangular with `U^T U = H^-1`, by one Cholesky factorization.

With J the reversal of rows and columns, `J H J = L L^T` gives `H = (J L J)(J L J)^T`, so
`U = (J L J)^-1 = J L^-1 J`: no inverse of H is formed, and one triangular inverse replaces a second
factorization (gptq.py does three). */

use rayon::prelude::*;

use super::cholesky::inverse_factor;
use super::isa::Isa;
use crate::backend::Damping;
use crate::quant::gptq::DAMPING_LADDER;

/// `U` `[n, n]` row-major for the Hessian whose lower triangle `hessian` holds, with the smallest
/// damping of the ladder that makes it positive definite. Channels that no token ever used get a
/// diagonal of 1, as in gptq.py.
pub(super) fn factor(
    isa: Isa,
    hessian: &[f32],
    n: usize,
    damping: f32,
) -> Option<(Vec<f32>, Damping)> {
    let live = |i: usize| if hessian[i * n + i] > 0.0 { hessian[i * n + i] } else { 1.0 };
    let mean = (0..n).map(|i| f64::from(live(i))).sum::<f64>() / n as f64;
    DAMPING_LADDER.iter().enumerate().find_map(|(failures, step)| {
        let share = damping * step;
        let damp = (f64::from(share) * mean) as f32;
        let mut u = inverse_factor(isa, reversed(hessian, n, |i| live(i) + damp), n)?;
        // Reversing a row-major matrix reverses its rows and its columns.
        u.reverse();
        let sound = (0..n).all(|i| u[i * n + i].is_finite() && u[i * n + i] > 0.0);
        sound.then_some((u, Damping { share, failures }))
    })
}

/// `-J H J` in the upper triangle, for H of the strict lower triangle of `hessian` and the given diagonal.
fn reversed(hessian: &[f32], n: usize, diagonal: impl Fn(usize) -> f32 + Sync) -> Vec<f32> {
    let mut negated = vec![0.0; n * n];
    negated.par_chunks_mut(n.max(1)).enumerate().for_each(|(j, row)| {
        let from = n - 1 - j;
        row[j] = -diagonal(from);
        let left = hessian[from * n..][..from].iter().rev();
        row[j + 1..].iter_mut().zip(left).for_each(|(to, h)| *to = -h);
    });
    negated
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISA: Isa = Isa::Portable;

    #[test]
    fn u_is_the_upper_factor_of_the_inverse() {
        let n = 37;
        let x: Vec<f32> =
            (0..n * 2 * n).map(|i| ((i * i * 7919) % 1013) as f32 / 500.0 - 1.0).collect();
        let h: Vec<f32> = (0..n * n)
            .map(|at| (0..2 * n).map(|t| x[t * n + at / n] * x[t * n + at % n]).sum())
            .collect();
        let (u, damping) = factor(ISA, &h, n, 0.01).unwrap();
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
            factor(ISA, &indefinite, 2, 0.05).unwrap().1,
            Damping { share: 0.05 * 30.0, failures: 3 }
        );
        assert!(factor(ISA, &indefinite, 2, 0.001).is_none());
    }

    #[test]
    fn unused_channels_do_not_matter() {
        let (u, _) = factor(ISA, &[4.0, 0.0, 0.0, 0.0], 2, 0.01).unwrap();
        assert!(u[0] > 0.0 && u[3] > 0.0 && u[1] == 0.0);
    }

    #[test]
    fn only_the_lower_triangle_is_read() {
        for n in [1, 2, 37, 300, 517] {
            let x: Vec<f32> =
                (0..n * n).map(|i| ((i * i * 7919 + i) % 1013) as f32 / 500.0 - 1.0).collect();
            // Positive definite, or at no damping.
            for (diagonal, sound) in [(n as f32, true), (1e-3, n == 1)] {
                let entry = |at: usize| match (at / n, at % n) {
                    (i, j) if j < i => x[at],
                    (i, j) if j == i => diagonal,
                    _ => f32::NAN,
                };
                let h: Vec<f32> = (0..n * n).map(entry).collect();
                let found = factor(ISA, &h, n, 0.01);
                assert_eq!(found.is_some(), sound, "{n} {diagonal}");
                assert!(found.is_none_or(|(u, _)| u.iter().all(|value| value.is_finite())));
            }
        }
    }
}
