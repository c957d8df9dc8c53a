/*! The inverse of a Cholesky factor in f64, blocked as LAPACK's potrf and trtri.

`A = L L^T`, and `X = L^-1`. Half of A is kept, in square tiles. `R = L^T` takes their place, then X:

- `R(K,I) = W(K)^T (A(K,I) - sum_{J<K} R(J,K)^T R(J,I))` for K < I, with `W(K) = R(K,K)^-1`.
- `X(I,J) = -W(I)^T sum_{J<=K<I} R(K,I)^T X(K,J)` for J < I, and `X(I,I) = W(I)^T`.

Both are products of tiles of one form, `C - A^T B`, added up in ascending order with fused products. Threads and
instruction sets only choose which elements are worked on when, so they do not show in the result. */

use rayon::prelude::*;

use super::elementwise::dispatch;
use super::isa::Isa;

/// Rows and columns of a tile.
pub(super) const SIDE: usize = 64;

/// A tile, row after row.
pub(super) type Tile = [f64; SIDE * SIDE];

/// Replaces A by X, or returns none if a pivot is not positive and finite.
///
/// A row I has I + 1 tiles. Tile K of A is `A(K,I)`, K <= I: of the tile on the diagonal only the upper half is read.
/// Tile J of X is `X(I,J)`.
pub(super) fn invert(isa: Isa, rows: &mut [&mut [Tile]]) -> Option<()> {
    for k in 0..rows.len() {
        let (row, below) = rows[k..].split_first_mut().expect("row k is one of them");
        let (left, diagonal) = row.split_at_mut(k);
        let diagonal = &mut diagonal[0];
        for tile in &*left {
            subtract_product(isa, tile, tile, diagonal);
        }
        *diagonal = negated_inverse_root(isa, diagonal)?;
        below.par_iter_mut().for_each(|row| {
            let (before, own) = row.split_at_mut(k);
            for (a, b) in left.iter().zip(before) {
                subtract_product(isa, a, b, &mut own[0]);
            }
            own[0] = negated_product(isa, diagonal, &own[0]);
        });
    }
    for i in 0..rows.len() {
        let (above, row) = rows.split_at_mut(i);
        let (before, diagonal) = row[0].split_at_mut(i);
        let factor = before.to_vec();
        before.par_iter_mut().enumerate().for_each(|(j, own)| {
            let mut sum = [0.0; SIDE * SIDE];
            for (row, a) in above[j..].iter().zip(&factor[j..]) {
                subtract_product(isa, a, &row[j], &mut sum);
            }
            *own = negated_product(isa, &diagonal[0], &sum);
        });
        diagonal[0] = negated_transpose(&diagonal[0]);
    }
    Some(())
}

/// `-R^-1` of the upper triangular R with `R^T R = A`, of whose symmetric A only the upper half is read.
fn negated_inverse_root(isa: Isa, a: &Tile) -> Option<Tile> {
    let (r, inverse) = (&mut a.clone(), &mut [0.0; SIDE * SIDE]);
    let sound = dispatch!(isa, root_body(r: &mut Tile, inverse: &mut Tile) -> bool);
    sound.then_some(*inverse)
}

#[inline(always)]
fn root_body(r: &mut Tile, inverse: &mut Tile) -> bool {
    // Rows of R above the one that is being completed, and later rows of A less their products.
    for k in 0..SIDE {
        let (row, below) = r[k * SIDE..].split_at_mut(SIDE);
        let pivot = row[k];
        if !(pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let root = pivot.sqrt();
        row[k..].iter_mut().for_each(|value| *value /= root);
        for (i, below) in (k + 1..).zip(below.chunks_exact_mut(SIDE)) {
            for (to, from) in below[i..].iter_mut().zip(&row[i..]) {
                *to = (-row[i]).mul_add(*from, *to);
            }
        }
    }
    // Row k of R^-1 from the rows below it: R[k][k] V[k] = e[k] - sum_{i>k} R[k][i] V[i].
    for k in (0..SIDE).rev() {
        let (own, below) = inverse[k * SIDE..].split_at_mut(SIDE);
        let row = &r[k * SIDE..][..SIDE];
        own[k] = -1.0;
        for (i, below) in (k + 1..).zip(below.chunks_exact(SIDE)) {
            for (to, from) in own[i..].iter_mut().zip(&below[i..]) {
                *to = (-row[i]).mul_add(*from, *to);
            }
        }
        own[k..].iter_mut().for_each(|value| *value /= row[k]);
    }
    true
}

fn negated_transpose(tile: &Tile) -> Tile {
    std::array::from_fn(|at| -tile[at % SIDE * SIDE + at / SIDE])
}

/// `-A^T B`.
fn negated_product(isa: Isa, a: &Tile, b: &Tile) -> Tile {
    let mut c = [0.0; SIDE * SIDE];
    subtract_product(isa, a, b, &mut c);
    c
}

/// `C -= A^T B`, one chain of fused products for each element.
fn subtract_product(isa: Isa, a: &Tile, b: &Tile, c: &mut Tile) {
    match isa {
        Isa::Avx512(_) => dispatch!(isa, wide(a: &Tile, b: &Tile, c: &mut Tile)),
        _ => dispatch!(isa, narrow(a: &Tile, b: &Tile, c: &mut Tile)),
    }
}

/// For 32 registers of eight values: half of them hold sums.
#[inline(always)]
fn wide(a: &Tile, b: &Tile, c: &mut Tile) {
    subtract_in_strips::<16>(a, b, c);
}

/// For 16 registers of four values.
#[inline(always)]
fn narrow(a: &Tile, b: &Tile, c: &mut Tile) {
    subtract_in_strips::<8>(a, b, c);
}

#[inline(always)]
fn subtract_in_strips<const COLUMNS: usize>(a: &Tile, b: &Tile, c: &mut Tile) {
    const ROWS: usize = 4;
    for row in (0..SIDE).step_by(ROWS) {
        for column in (0..SIDE).step_by(COLUMNS) {
            let mut sums: [[f64; COLUMNS]; ROWS] =
                std::array::from_fn(|r| first(&c[(row + r) * SIDE + column..]));
            for k in 0..SIDE {
                let x: [f64; ROWS] = first(&a[k * SIDE + row..]);
                let y: [f64; COLUMNS] = first(&b[k * SIDE + column..]);
                for (sums, x) in sums.iter_mut().zip(x) {
                    for (sum, y) in sums.iter_mut().zip(y) {
                        *sum = (-x).mul_add(y, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                c[(row + r) * SIDE + column..][..COLUMNS].copy_from_slice(sums);
            }
        }
    }
}

#[inline(always)]
fn first<const N: usize>(values: &[f64]) -> [f64; N] {
    values[..N].try_into().expect("a tile's row goes on for N values")
}

#[cfg(test)]
#[path = "cholesky_tests.rs"]
mod tests;
