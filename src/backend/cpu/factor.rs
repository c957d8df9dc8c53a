/*! GPTQ's `U`, upper triangular with `U^T U = H^-1`, by one Cholesky factorization.

With J the reversal of rows and columns, `J H J = L L^T` gives `H = (J L J)(J L J)^T`, so
`U = (J L J)^-1 = J L^-1 J`: no inverse of H is formed, and one triangular inverse replaces a second
factorization (gptq.py does three).

All of it is computed in f64 and rounded once. Half of a matrix in f64 is as large as U in f32, which takes its place. */

use std::ops::Deref;

use rayon::prelude::*;

use super::cholesky::{SIDE, Tile, invert};
use super::isa::Isa;
use crate::backend::Damping;
use crate::quant::gptq::DAMPING_LADDER;

/// `U` `[n, n]`, row-major.
pub struct Factor {
    n: usize,
    /// Bytes of U, and of what is left of the matrix that it was computed in.
    tiles: Vec<Tile>,
}

impl Deref for Factor {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.tiles)[..self.n * self.n]
    }
}

/// `U` for the Hessian `[n, n]` whose lower triangle `hessian` holds, with the smallest damping of the
/// ladder that makes it positive definite. Channels that no token ever used get a diagonal of 1, as in
/// gptq.py.
pub(super) fn factor(
    isa: Isa,
    hessian: &[f32],
    n: usize,
    damping: f32,
) -> Option<(Factor, Damping)> {
    let live = |i: usize| if hessian[i * n + i] > 0.0 { hessian[i * n + i] } else { 1.0 };
    let mean = (0..n).map(|i| f64::from(live(i))).sum::<f64>() / n as f64;
    DAMPING_LADDER.iter().enumerate().find_map(|(failures, step)| {
        let share = damping * step;
        let damp = (f64::from(share) * mean) as f32;
        let u = inverse_factor(isa, n, |i, j| match i == j {
            true => live(i) + damp,
            false => hessian[i * n + j],
        })?;
        Some((u, Damping { share, failures }))
    })
}

/// `U` for the matrix with these entries, of which only those with `j <= i` are asked for; none if it is not positive
/// definite.
pub(super) fn inverse_factor(
    isa: Isa,
    n: usize,
    entry: impl Fn(usize, usize) -> f32 + Sync,
) -> Option<Factor> {
    let count = n.div_ceil(SIDE);
    let mut tiles = vec![[0.0; SIDE * SIDE]; count * (count + 1) / 2];
    let mut rows = rows(&mut tiles, count);
    rows.par_iter_mut().enumerate().for_each(|(i, row)| fill(row, i, n, &entry));
    invert(isa, &mut rows)?;
    round_in_place(&mut tiles, n);
    let u = Factor { n, tiles };
    (0..n).all(|i| u[i * n + i].is_finite() && u[i * n + i] > 0.0).then_some(u)
}

/// The rows of tiles, the longest of which comes first in memory.
fn rows(mut tiles: &mut [Tile], count: usize) -> Vec<&mut [Tile]> {
    let mut rows: Vec<_> = (1..=count)
        .rev()
        .map(|length| tiles.split_off_mut(..length).expect("a tile for each pair of rows"))
        .collect();
    rows.reverse();
    rows
}

/// The place of `at` in the reversed matrix, and the other way around; beyond the matrix lies what fills its last tiles.
fn reversed(at: usize, n: usize) -> usize {
    n.next_multiple_of(SIDE) - 1 - at
}

/// Writes row `i` of the tiles of `J H J`, which begins with an identity that makes its tiles full.
fn fill(row: &mut [Tile], i: usize, n: usize, entry: &impl Fn(usize, usize) -> f32) {
    for (k, tile) in row.iter_mut().enumerate() {
        for (at, to) in tile.iter_mut().enumerate() {
            let [y, x] = [k * SIDE + at / SIDE, i * SIDE + at % SIDE];
            let [from_y, from_x] = [reversed(y, n), reversed(x, n)];
            *to = match y <= x {
                true if from_y < n => f64::from(entry(from_y, from_x)),
                _ => f64::from(u8::from(y == x)),
            };
        }
    }
}

/// Makes U of the tiles of `L^-1`, row by row: U's rows are shorter, so none reaches into tiles that are still needed.
fn round_in_place(tiles: &mut [Tile], n: usize) {
    let count = n.div_ceil(SIDE);
    let mut start = 0;
    for length in (1..=count).rev() {
        let row = tiles[start..][..length].to_vec();
        start += length;
        let values: &mut [f32] = bytemuck::cast_slice_mut(tiles);
        for r in 0..SIDE {
            let i = reversed((length - 1) * SIDE + r, n);
            let Some(out) = values.get_mut(i * n..(i + 1) * n).filter(|_| i < n) else { continue };
            out[..i].fill(0.0);
            for (j, out) in out.iter_mut().enumerate().skip(i) {
                let x = reversed(j, n);
                *out = row[x / SIDE][r * SIDE + x % SIDE] as f32;
            }
        }
    }
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
