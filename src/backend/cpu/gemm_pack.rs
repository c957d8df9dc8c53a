/*! The operands of the f32 matrix product: a right-hand side packed into panels, and a left-hand
side that is any strided matrix.

A panel holds 64 columns, four AVX-512 registers wide, so that a kernel reads it front to back with
no stride. Packing only copies, so it never changes a result. */

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

/// Columns of a panel.
pub const PANEL: usize = 64;
/// Rows that are transposed into a panel together: one cache line of it.
const STRIP: usize = 16;

/// One cache line, which keeps panels aligned to AVX-512 loads.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; STRIP]);

/// Where a matrix `[rows, columns]` ends, with `stride` values from row to row; none beyond what can be counted.
pub(super) fn span(rows: usize, columns: usize, stride: usize) -> Option<usize> {
    match rows.checked_sub(1) {
        Some(last) if columns > 0 => last.checked_mul(stride)?.checked_add(columns),
        _ => Some(0),
    }
}

/// A matrix B `[k, n]`, packed for products from the right: panels of [`PANEL`] columns, each
/// `[k, 64]`, columns after the last hold zeros.
#[derive(Clone, Default)]
pub struct Panels {
    lines: Vec<Line>,
    n: usize,
    k: usize,
}

impl Panels {
    /// Packs B = W^T from the rows of a weight `[n, k]`, so that a product is `x W^T`.
    pub fn from_rows(w: &[f32], n: usize, k: usize) -> Self {
        let mut panels = Self::default();
        panels.refill_rows(w, n, k);
        panels
    }

    /// As [`Panels::from_rows`], where `row(i, out)` writes row `i` of W, `[k]`. It is called
    /// in any order and from several threads.
    pub fn from_rows_with(n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut panels = Self::default();
        panels.refill_rows_with(n, k, row);
        panels
    }

    /// Packs a B that lies row-major, `[k, n]` with `row_stride` values from row to row.
    pub fn from_columns(b: &[f32], k: usize, n: usize, row_stride: usize) -> Self {
        let mut panels = Self::default();
        panels.refill_columns(b, k, n, row_stride);
        panels
    }

    /// As [`Panels::from_rows`], into the memory of `self`.
    pub fn refill_rows(&mut self, w: &[f32], n: usize, k: usize) {
        let enough = span(n, k, k).is_some_and(|end| end <= w.len());
        assert!(enough, "a weight of {n} x {k} has only {} values", w.len());
        self.refill_rows_with(n, k, |row, out| out.copy_from_slice(&w[row * k..][..k]));
    }

    /// As [`Panels::from_rows_with`], into the memory of `self`.
    pub fn refill_rows_with(&mut self, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) {
        self.resize(n, k);
        // A stride that is no power of two, or 16 rows of 4096 values would share one cache set.
        let stride = k + STRIP;
        self.for_each_panel(
            || vec![0.0; stride * STRIP],
            |scratch: &mut Vec<f32>, panel, lines| {
                for half in 0..PANEL / STRIP {
                    let first = panel * PANEL + half * STRIP;
                    let rows = n.saturating_sub(first).min(STRIP);
                    for lane in 0..rows {
                        row(first + lane, &mut scratch[lane * stride..][..k]);
                    }
                    scratch[rows * stride..].fill(0.0);
                    for (depth, pair) in lines.chunks_exact_mut(PANEL / STRIP).enumerate() {
                        pair[half].0 = std::array::from_fn(|lane| scratch[lane * stride + depth]);
                    }
                }
            },
        );
    }

    /// As [`Panels::from_columns`], into the memory of `self`.
    pub fn refill_columns(&mut self, b: &[f32], k: usize, n: usize, row_stride: usize) {
        let enough = span(k, n, row_stride).is_some_and(|end| end <= b.len());
        assert!(enough, "B of {k} x {n} has only {} values", b.len());
        self.resize(n, k);
        self.for_each_panel(
            || (),
            |(), panel, lines| {
                let first = panel * PANEL;
                let columns = (n - first).min(PANEL);
                let values: &mut [f32] = bytemuck::cast_slice_mut(lines);
                for (depth, line) in values.chunks_exact_mut(PANEL).enumerate() {
                    let row = &b[depth * row_stride + first..][..columns];
                    line[..columns].copy_from_slice(row);
                    line[columns..].fill(0.0);
                }
            },
        );
    }

    /// Makes it `[k, n]` and returns the values, `[ceil(n / 64), k, 64]`, which are still to be written.
    pub(super) fn reshape(&mut self, n: usize, k: usize) -> &mut [f32] {
        self.resize(n, k);
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Columns, the product's width.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Rows, the depth of the product's sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The part of B in the given columns and rows. `columns` starts at a multiple of [`PANEL`].
    pub fn part(&self, columns: Range<usize>, depth: Range<usize>) -> Part<'_> {
        assert!(columns.start.is_multiple_of(PANEL) && columns.end <= self.n);
        assert!(depth.start <= depth.end && depth.end <= self.k);
        Part { panels: self, columns, depth }
    }

    fn resize(&mut self, n: usize, k: usize) {
        let lines = n.div_ceil(PANEL).checked_mul(k);
        let lines = lines.and_then(|lines| lines.checked_mul(PANEL / STRIP));
        // Values are counted by `panel`, and each of them must have an index.
        let lines = lines.filter(|lines| lines.checked_mul(STRIP).is_some());
        let lines = lines.unwrap_or_else(|| panic!("panels of {n} x {k} fit no memory"));
        (self.n, self.k) = (n, k);
        self.lines.resize(lines, Line::zeroed());
    }

    /// Calls `fill(state, panel, lines)` for each panel, in parallel.
    fn for_each_panel<S>(
        &mut self,
        state: impl Fn() -> S + Sync + Send,
        fill: impl Fn(&mut S, usize, &mut [Line]) + Sync + Send,
    ) {
        let lines_per_panel = (self.k * (PANEL / STRIP)).max(1);
        // A small matrix is packed sooner than a thread wakes.
        if self.lines.len() < 4096 {
            let mut state = state();
            for (panel, lines) in self.lines.chunks_exact_mut(lines_per_panel).enumerate() {
                fill(&mut state, panel, lines);
            }
            return;
        }
        self.lines
            .par_chunks_exact_mut(lines_per_panel)
            .enumerate()
            .for_each_init(state, |state, (panel, lines)| fill(state, panel, lines));
    }
}

/// A range of columns and of rows of [`Panels`].
#[derive(Clone)]
pub struct Part<'a> {
    panels: &'a Panels,
    columns: Range<usize>,
    depth: Range<usize>,
}

impl<'a> From<&'a Panels> for Part<'a> {
    fn from(panels: &'a Panels) -> Self {
        panels.part(0..panels.n, 0..panels.k)
    }
}

impl<'a> Part<'a> {
    /// Columns of this part.
    pub fn n(&self) -> usize {
        self.columns.len()
    }

    /// Rows of this part.
    pub fn k(&self) -> usize {
        self.depth.len()
    }

    /// Some of this part's columns, counted from its first; they start at a multiple of [`PANEL`].
    pub fn columns(&self, columns: Range<usize>) -> Part<'a> {
        let first = self.columns.start;
        self.panels.part(first + columns.start..first + columns.end, self.depth.clone())
    }

    /// The values `[k, 64]` of this part's panel `panel`.
    pub(super) fn panel(&self, panel: usize) -> &'a [f32] {
        let values: &[f32] = bytemuck::cast_slice(&self.panels.lines);
        let panel = self.columns.start / PANEL + panel;
        &values[(panel * self.panels.k + self.depth.start) * PANEL..][..self.k() * PANEL]
    }
}

/// A left-hand side `[rows, k]`, whose element `(row, depth)` lies at
/// `data[row * row_stride + depth * column_stride]`; so X and X^T are both at hand.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The values.
    pub data: &'a [f32],
    /// How many rows.
    pub rows: usize,
    /// Values from row to row.
    pub row_stride: usize,
    /// Values from column to column.
    pub column_stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a matrix `[rows, columns]` that lies row-major without gaps.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { data, rows, row_stride: columns, column_stride: 1 }
    }

    /// The transpose of a row-major `[rows, columns]`: its rows are the columns.
    pub fn transposed(data: &'a [f32], columns: usize) -> Self {
        Self { data, rows: columns, row_stride: 1, column_stride: columns }
    }

    /// Rows `range` of this matrix.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        let first = range.start.saturating_mul(self.row_stride).min(self.data.len());
        Self { data: &self.data[first..], rows: range.len(), ..*self }
    }

    /// Whether `k` columns of every row lie inside the data.
    pub(super) fn has_columns(&self, k: usize) -> bool {
        let (Some(last_row), Some(last_column)) = (self.rows.checked_sub(1), k.checked_sub(1))
        else {
            return true;
        };
        let row = last_row.checked_mul(self.row_stride);
        let column = last_column.checked_mul(self.column_stride);
        let last = row.zip(column).and_then(|(row, column)| row.checked_add(column));
        last.is_some_and(|last| last < self.data.len())
    }

    /// Copies `height` rows from `first` on, columns `depth`, to `tile` `[depth, height]`.
    #[inline(always)]
    pub(super) fn pack(&self, first: usize, height: usize, depth: Range<usize>, tile: &mut [f32]) {
        let start = first * self.row_stride + depth.start * self.column_stride;
        if self.row_stride == 1 {
            let from = &self.data[start..];
            // A copy of a known length is two moves, which a call would cost more than.
            return match height {
                6 => pack_columns::<6>(from, self.column_stride, tile),
                5 => pack_columns::<5>(from, self.column_stride, tile),
                4 => pack_columns::<4>(from, self.column_stride, tile),
                _ => {
                    for (step, column) in tile.chunks_exact_mut(height).enumerate() {
                        column.copy_from_slice(&from[step * self.column_stride..][..height]);
                    }
                }
            };
        }
        if self.column_stride == 1 {
            let steps = depth.len();
            return transpose(&self.data[start..], self.row_stride, height, steps, tile, height);
        }
        for row in 0..height {
            let row_start = start + row * self.row_stride;
            for (step, column) in tile.chunks_exact_mut(height).enumerate() {
                column[row] = self.data[row_start + step * self.column_stride];
            }
        }
    }
}

/// Copies the first `HEIGHT` values of columns that lie `stride` apart.
fn pack_columns<const HEIGHT: usize>(from: &[f32], stride: usize, tile: &mut [f32]) {
    for (step, column) in tile.as_chunks_mut::<HEIGHT>().0.iter_mut().enumerate() {
        let values = from[step * stride..].first_chunk();
        *column = *values.expect("every column has as many rows as the tile is high");
    }
}

/// `to[d * to_stride + r] = from[r * from_stride + d]` for r below `rows` and d below `depth`, in
/// squares of 4 x 4 where they fit; the last of them reach back over what others have written.
fn transpose(
    from: &[f32],
    from_stride: usize,
    rows: usize,
    depth: usize,
    to: &mut [f32],
    to_stride: usize,
) {
    if rows == 0 || depth == 0 {
        return;
    }
    assert!(span(rows, depth, from_stride).is_some_and(|end| end <= from.len()));
    assert!(span(depth, rows, to_stride).is_some_and(|end| end <= to.len()) && rows <= to_stride);
    if rows < 4 || depth < 4 {
        for (r, d) in (0..rows).flat_map(|r| (0..depth).map(move |d| (r, d))) {
            to[d * to_stride + r] = from[r * from_stride + d];
        }
        return;
    }
    for d in (0..depth).step_by(4).map(|d| d.min(depth - 4)) {
        for r in (0..rows).step_by(4).map(|r| r.min(rows - 4)) {
            // SAFETY: rows r..r+4 and columns d..d+4 lie inside both slices, by the asserts.
            unsafe {
                let to = to.as_mut_ptr().add(d * to_stride + r);
                let from = from.as_ptr().add(r * from_stride + d);
                transpose_square(from, from_stride, to, to_stride);
            }
        }
    }
}

/// Transposes 4 x 4 values.
///
/// # Safety
/// Four rows of four values must be valid at both addresses.
#[inline(always)]
unsafe fn transpose_square(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller vouches for the addresses; SSE2 is part of every x86-64.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::*;
            let row = |r: usize| _mm_loadu_ps(from.add(r * from_stride));
            let (low, high) = (_mm_unpacklo_ps(row(0), row(1)), _mm_unpackhi_ps(row(0), row(1)));
            let (low2, high2) = (_mm_unpacklo_ps(row(2), row(3)), _mm_unpackhi_ps(row(2), row(3)));
            _mm_storeu_ps(to, _mm_movelh_ps(low, low2));
            _mm_storeu_ps(to.add(to_stride), _mm_movehl_ps(low2, low));
            _mm_storeu_ps(to.add(2 * to_stride), _mm_movelh_ps(high, high2));
            _mm_storeu_ps(to.add(3 * to_stride), _mm_movehl_ps(high2, high));
        }
        #[cfg(not(target_arch = "x86_64"))]
        for r in 0..4 {
            for d in 0..4 {
                *to.add(d * to_stride + r) = *from.add(r * from_stride + d);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_pack_the_same_panels() {
        for (n, k) in [(1, 1), (31, 5), (33, 7), (64, 40), (70, 172), (0, 3), (3, 0)] {
            let w: Vec<f32> = (0..n * k).map(|i| i as f32 + 1.0).collect();
            let b: Vec<f32> = (0..n * k).map(|i| w[i % n * k + i / n]).collect();
            let mut by_rows = Panels::from_rows(&vec![f32::NAN; 5000], 50, 100);
            by_rows.refill_rows(&w, n, k);
            let mut by_columns = by_rows.clone();
            by_columns.refill_columns(&b, k, n, n);
            for panel in 0..n.div_ceil(PANEL) {
                let values = Part::from(&by_rows).panel(panel).to_vec();
                assert_eq!(values, Part::from(&by_columns).panel(panel));
                for (i, value) in values.into_iter().enumerate() {
                    let (depth, column) = (i / PANEL, panel * PANEL + i % PANEL);
                    assert_eq!(value, if column < n { w[column * k + depth] } else { 0.0 });
                }
            }
        }
    }
}
