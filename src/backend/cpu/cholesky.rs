/*! The inverse of a Cholesky factor, blocked as LAPACK's potrf and trtri, on the f32 product.

`A = R^T R` with R upper triangular, and `X = R^-T`, lower triangular. The definition, with i ascending:

- `c = -a[r][j]`, then `c = fma(R[i][r], R[i][j], c)` for i < r. `R[r][r] = sqrt(-c)` where j = r, and
  `R[r][j] = c / -R[r][r]` where j > r.
- `c = -1` where j = r and `0` where j < r, then `c = fma(R[i][r], X[i][j], c)` for j <= i < r, and
  `X[r][j] = c / -R[r][r]`.

Every element has one chain of fused products, so blocks, threads and instruction sets do not show in the
result. Both steps hold negated sums until a row's turn comes, because the product only adds. */

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{PANEL, Panels, Part, Rows, par_gemm, tiles};
use super::gemm_kernels::{Kernels, kernels};
use super::isa::Isa;

/// Rows between two updates of what lies below them. More rows read and write it less often, but more of
/// the work is then done in one panel after another.
const BLOCK: usize = 4 * PANEL;
/// Rows whose update by a symmetric product begins at a common column: whole panels.
const STRIP: usize = 3 * PANEL;

/// X, row-major with zeros above its diagonal, for the matrix `[n, n]` whose negated upper triangle
/// `work` holds; none if a pivot is not positive and finite. What lies below the diagonal is not read.
pub(super) fn inverse_factor(isa: Isa, mut work: Vec<f32>, n: usize) -> Option<Vec<f32>> {
    assert_eq!(work.len(), n * n, "the matrix is not {n} x {n}");
    let mut panels = Panels::default();
    for rows in blocks(n) {
        factor_rows(isa, &mut work, n, rows, &mut panels)?;
    }
    work.par_chunks_mut(n.max(1)).enumerate().for_each(|(r, row)| row[..r].fill(0.0));
    for rows in blocks(n) {
        invert_rows(isa, &mut work, n, rows, &mut panels);
    }
    Some(work)
}

fn blocks(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(BLOCK).map(move |first| first..(first + BLOCK).min(n))
}

/// Completes some rows of R, and adds their products to the rows below.
fn factor_rows(
    isa: Isa,
    work: &mut [f32],
    n: usize,
    Range { start, end }: Range<usize>,
    panels: &mut Panels,
) -> Option<()> {
    let (top, below) = work.split_at_mut(end * n);
    let rows = &mut top[start * n..];
    let depth = end - start;
    panels.refill_columns(&rows[start..], depth, n - start, n);
    let size = depth * PANEL;
    let (diagonal, others) = panels.values_mut().split_at_mut(depth.div_ceil(PANEL) * size);
    let kernels = kernels(isa);
    for panel in 0..depth.div_ceil(PANEL) {
        let (before, own) = diagonal.split_at_mut(panel * size);
        let own = &mut own[..size];
        solve(kernels, before, own);
        complete(kernels, None, panel * PANEL, own)?;
    }
    let diagonal = &*diagonal;
    others.par_chunks_mut(size).for_each(|own| solve(kernels, diagonal, own));
    rows.par_chunks_mut(n).enumerate().for_each(|(r, row)| panels.copy_row(r, &mut row[start..]));
    if end == n {
        return Some(());
    }
    let left = Rows { data: &rows[end..], rows: n - end, row_stride: 1, column_stride: n };
    let right = panels.part(depth..n - start, 0..depth);
    // Only columns from the diagonal on matter: half of the product.
    below.par_chunks_mut(STRIP * n).enumerate().for_each(|(strip, c)| {
        let first = strip * STRIP;
        let left = left.slice(first..(first + STRIP).min(n - end));
        let right = right.columns(first..n - end);
        par_gemm(isa, left, right, &mut c[end + first..], n, true);
    });
    Some(())
}

/// Completes some rows of X in the place of R's, and adds their products to the rows below.
fn invert_rows(
    isa: Isa,
    work: &mut [f32],
    n: usize,
    Range { start, end }: Range<usize>,
    panels: &mut Panels,
) {
    let (top, below) = work.split_at_mut(end * n);
    let rows = &mut top[start * n..];
    let depth = end - start;
    let diagonal = Panels::from_columns(&rows[start..], depth, depth, n);
    let diagonal = diagonal.values();
    for (r, row) in rows.chunks_mut(n).enumerate() {
        row[start..end].fill(0.0);
        row[start + r] = -1.0;
    }
    panels.refill_columns(rows, depth, end, n);
    let kernels = kernels(isa);
    panels.values_mut().par_chunks_mut(depth * PANEL).for_each(|own| solve(kernels, diagonal, own));
    rows.par_chunks_mut(n).enumerate().for_each(|(r, row)| panels.copy_row(r, &mut row[..end]));
    let left = Rows { data: &rows[end..], rows: n - end, row_stride: 1, column_stride: n };
    par_gemm(isa, left, Part::from(&*panels), below, n, true);
    rows.par_chunks_mut(n).for_each(|row| row[end..].fill(0.0));
}

/// Completes rows of the panel `own`, as many as R has columns in the panels `factor`.
fn solve(kernels: &Kernels, factor: &[f32], own: &mut [f32]) {
    for (panel, factor) in factor.chunks_exact(own.len()).enumerate() {
        // Only a pivot can fail, and these are known.
        let _ = complete(kernels, Some(factor), panel * PANEL, own);
    }
}

/// Completes the rows of a panel `own` `[depth, PANEL]`, negated sums, that have their diagonal in `factor`, a panel of R
/// of the same depth whose diagonal begins at row `first`; or in `own` itself, which then becomes R. None
/// if a pivot is not positive and finite.
fn complete(
    kernels: &Kernels,
    factor: Option<&[f32]>,
    first: usize,
    own: &mut [f32],
) -> Option<()> {
    let columns = PANEL.min(own.len() / PANEL - first);
    for (tile, height) in tiles(columns, kernels.by_height.len()) {
        let start = first + tile;
        let (done, rest) = own.split_at_mut(start * PANEL);
        let done = &*done;
        add_products(kernels, factor.unwrap_or(done), tile, done, &mut rest[..height * PANEL]);
        for (row, column) in (0..height).zip(tile..) {
            let (done, row) = rest.split_at_mut(row * PANEL);
            let (done, row) = (&*done, &mut row[..PANEL]);
            let left = factor.map_or(done, |factor| &factor[start * PANEL..]);
            add_products(kernels, left, column, done, row);
            let root = match factor {
                Some(factor) => factor[(first + column) * PANEL + column],
                None => root(-row[column])?,
            };
            row.iter_mut().for_each(|value| *value /= -root);
            if factor.is_none() {
                row[column] = root;
            }
        }
    }
    Some(())
}

fn root(pivot: f32) -> Option<f32> {
    (pivot > 0.0 && pivot.is_finite()).then(|| pivot.sqrt())
}

/// `to += left^T right`, where `right` `[depth, PANEL]` and `to` `[height, PANEL]` are rows of one panel, and
/// `left` is the columns of another from `column` on, as many as `to` has rows.
fn add_products(kernels: &Kernels, left: &[f32], column: usize, right: &[f32], to: &mut [f32]) {
    let (depth, height) = (right.len() / PANEL, to.len() / PANEL);
    if depth == 0 {
        return;
    }
    assert!(left.len() >= right.len() && column + height <= PANEL);
    let kernel = kernels.by_height[height - 1];
    for first in (0..PANEL).step_by(kernels.width) {
        // SAFETY: a step of depth reads `height` values of a row of `left` from `column` on and `width`
        // values of a row of `right`; both slices hold `depth` rows of PANEL values, by the assertion.
        // `to` holds `height` such rows, and the kernel's width divides PANEL.
        unsafe {
            let (a, b) = (left.as_ptr().add(column), right.as_ptr().add(first));
            kernel(depth, a, PANEL, b, to.as_mut_ptr().add(first), PANEL, true);
        }
    }
}

#[cfg(test)]
#[path = "cholesky_tests.rs"]
mod tests;
