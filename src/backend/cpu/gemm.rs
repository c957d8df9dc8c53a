/*! The f32 matrix product, with one result for every machine.

Each element of C is `c = fma(a[m][k], b[k][n], c)` with k strictly ascending, from 0 or from the
old C. Blocks, tiles, instruction sets and threads only choose which elements are worked on when,
so all of them compute the same bits; `plain_gemm` is the definition.

The blocks are Goto's: a block of A is packed once and stays in L2, a panel's block of B stays in
L1 while all tiles of A pass over it, and a tile of C lives in registers. A panel's blocks follow one
another, so that its part of C is in L2 when the next one goes on with the sums, and each is prefetched
while the one before it is multiplied. */

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::gemm_kernels::{Kernels, Source, TALLEST, Target, kernels, prefetch};
use super::gemm_pack::span;
pub use super::gemm_pack::{PANEL, Panels, Part, Rows};
use super::isa::Isa;

/// Depth of a panel's block of B at most: 24 KiB, which leaves any L1 room for the tiles of A and C
/// that pass by.
pub(super) const DEPTH: usize = 96;
/// Depth of a block of A at most.
const DEEP: usize = 16 * DEPTH;
/// Values of a block of A at most: 600 KiB of L2.
const BLOCK: usize = 600 << 8;
/// Rows of a task, a multiple of all kernels' heights.
const HEIGHT: usize = 240;
/// Columns of B up to which rows of A that lie in one piece are read where they are: packing them would cost more.
const FEW_COLUMNS: usize = 2 * PANEL;

thread_local! {
    /// The packed block of A, kept from call to call. It is taken out while in use.
    static PACKED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// C `[rows, n]` = A B, or C += A B if `accumulate`, by the definition.
///
/// # Panics
/// If A or C is smaller than the shapes say.
pub fn plain_gemm<'b>(
    a: Rows<'_>,
    b: impl Into<Part<'b>>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let b = b.into();
    check(&a, &b, c, c_stride);
    for row in 0..a.rows {
        for column in 0..b.n() {
            let panel = b.panel(column / PANEL);
            let element = &mut c[row * c_stride + column];
            let mut sum = if accumulate { *element } else { 0.0 };
            for depth in 0..b.k() {
                let x = a.data[row * a.row_stride + depth * a.column_stride];
                sum = x.mul_add(panel[depth * PANEL + column % PANEL], sum);
            }
            *element = sum;
        }
    }
}

/// C `[a.rows, n]` = A B, or C += A B if `accumulate`, on this thread. Rows of C lie `c_stride`
/// values apart; values between them are neither read nor written.
///
/// # Panics
/// If A or C is smaller than the shapes say.
pub fn gemm<'b>(
    isa: Isa,
    a: Rows<'_>,
    b: impl Into<Part<'b>>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let b = b.into();
    if isa == Isa::Plain {
        return plain_gemm(a, b, c, c_stride, accumulate);
    }
    check(&a, &b, c, c_stride);
    // SAFETY: `check` has found C's rows, `n` values each, inside the slice, which is ours alone.
    unsafe { multiply(isa, a, &b, c.as_mut_ptr(), c_stride, accumulate) }
}

/// As [`gemm`], on all threads of the current rayon pool.
pub fn par_gemm<'b>(
    isa: Isa,
    a: Rows<'_>,
    b: impl Into<Part<'b>>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let b = b.into();
    if isa == Isa::Plain {
        return plain_gemm(a, b, c, c_stride, accumulate);
    }
    check(&a, &b, c, c_stride);
    let threads = rayon::current_num_threads();
    let tasks = if threads == 1 { 1 } else { 4 * threads };
    let row_tasks = a.rows.div_ceil(HEIGHT);
    let panels = b.n().div_ceil(PANEL);
    let columns = panels.div_ceil(tasks.div_ceil(row_tasks.max(1))).max(1) * PANEL;
    let column_tasks = b.n().div_ceil(columns);
    let shared = Shared(c.as_mut_ptr());
    (0..row_tasks * column_tasks).into_par_iter().for_each(|task| {
        let rows = range(task / column_tasks, HEIGHT, a.rows);
        let columns = range(task % column_tasks, columns, b.n());
        // SAFETY: `check` has found all of C inside its slice, and no two tasks share a row and a
        // column of it.
        unsafe {
            let c = shared.at(rows.start * c_stride + columns.start);
            multiply(isa, a.slice(rows), &b.columns(columns), c, c_stride, accumulate);
        }
    });
}

/// The start of an output, shared by tasks that each write their own part of it.
pub(super) struct Shared(pub(super) *mut f32);
// SAFETY: the pointer is only used by tasks whose parts do not overlap, while the output is borrowed.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `offset` must lie inside the output.
    pub(super) unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: by the contract of this function the result is inside the output, too.
        unsafe { self.0.add(offset) }
    }
}

/// Piece `index` of `0..end` in pieces of `size`.
pub(super) fn range(index: usize, size: usize, end: usize) -> Range<usize> {
    index * size..((index + 1) * size).min(end)
}

fn check(a: &Rows<'_>, b: &Part<'_>, c: &[f32], c_stride: usize) {
    assert!(a.has_columns(b.k()), "A has fewer than {} columns", b.k());
    let end = span(a.rows, b.n(), c_stride);
    assert!(end.is_some_and(|end| end <= c.len()), "C is smaller than {} x {}", a.rows, b.n());
    assert!(a.rows < 2 || c_stride >= b.n(), "rows of C overlap");
}

/// The blocked product.
///
/// # Safety
/// C must be valid for `[a.rows, b.n()]` with rows `c_stride` apart, and A have `b.k()` columns.
pub(super) unsafe fn multiply(
    isa: Isa,
    a: Rows<'_>,
    b: &Part<'_>,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
    let kernels = kernels(isa);
    let tallest = kernels.by_height.len();
    let mut packed = PACKED.take();
    for deep in pieces(0..b.k(), DEEP, 1) {
        // C holds the sums of the blocks before, which this one goes on with.
        let accumulate = accumulate || deep.start > 0;
        let most = BLOCK / deep.len().max(1) / tallest * tallest;
        for rows in pieces(0..a.rows, most.min(HEIGHT), tallest) {
            let (count, depth) = (rows.len(), deep.clone());
            let block = if a.column_stride == 1 && b.n() <= FEW_COLUMNS {
                let first = rows.start * a.row_stride + deep.start;
                let values =
                    if count == 0 || depth.is_empty() { &[][..] } else { &a.data[first..] };
                Block { values, row_stride: Some(a.row_stride), rows: count, depth }
            } else {
                packed.resize(packed.len().max(count * deep.len()), 0.0);
                for (tile, height) in tiles(count, tallest) {
                    let values = &mut packed[tile * deep.len()..][..height * deep.len()];
                    a.pack(rows.start + tile, height, deep.clone(), values);
                }
                Block { values: &packed, row_stride: None, rows: count, depth }
            };
            // SAFETY: these are rows of C, and `packed` holds their tiles as written above.
            unsafe {
                let c = Target { start: c.add(rows.start * c_stride), stride: c_stride };
                block.multiply(kernels, b, c, accumulate);
            }
        }
    }
    PACKED.set(packed);
}

/// Cuts `all` into the fewest pieces of at most `most`, as equal as multiples of `unit` can be; one piece
/// if it is empty.
fn pieces(
    all: Range<usize>,
    most: usize,
    unit: usize,
) -> impl Iterator<Item = Range<usize>> + Clone {
    let size = all.len().div_ceil(all.len().div_ceil(most).max(1)).max(1);
    let size = size.next_multiple_of(unit);
    let count = all.len().div_ceil(size).max(1);
    (0..count).map(move |piece| {
        let first = all.start + piece * size;
        first..(first + size).min(all.end)
    })
}

/// A block of A.
struct Block<'a> {
    /// Its rows, or packed the tiles of its rows, `[depth, height]` each.
    values: &'a [f32],
    /// Values from row to row, where it is not packed.
    row_stride: Option<usize>,
    rows: usize,
    depth: Range<usize>,
}

impl Block<'_> {
    /// Multiplies the block with all panels.
    ///
    /// # Safety
    /// `values` must hold all rows or their tiles, and C be valid for `[rows, b.n()]`.
    unsafe fn multiply(&self, kernels: &Kernels, b: &Part<'_>, c: Target, accumulate: bool) {
        let Self { values, row_stride, rows, depth: ref deep } = *self;
        let mut edge = [0.0f32; TALLEST * PANEL];
        let depths = pieces(deep.clone(), DEPTH, 1);
        let columns = (0..b.n()).step_by(kernels.width);
        let steps = columns.flat_map(|column| depths.clone().map(move |depth| (column, depth)));
        let from_panel = |(column, depth): &(usize, Range<usize>)| {
            &b.panel(column / PANEL)[depth.start * PANEL..depth.end * PANEL]
        };
        let mut steps = steps.peekable();
        while let Some(step) = steps.next() {
            let from_b = from_panel(&step);
            let next = steps.peek().map_or(&[][..], from_panel);
            let lines = next.len().div_ceil(16 * rows.div_ceil(kernels.by_height.len()).max(1));
            let (column, depth) = step;
            let accumulate = accumulate || depth.start > deep.start;
            let width = (b.n() - column).min(kernels.width);
            for (number, (tile, height)) in tiles(rows, kernels.by_height.len()).enumerate() {
                prefetch(next, number * lines * 16, lines);
                let kernel = kernels.by_height[height - 1];
                let begin = depth.start - deep.start;
                let a = match row_stride {
                    Some(row) => {
                        let from_a = &values[tile * row + begin..];
                        assert!(
                            span(height, depth.len(), row).is_some_and(|end| end <= from_a.len())
                        );
                        Source { start: from_a.as_ptr(), step: 1, row }
                    }
                    None => {
                        let from_a = &values[tile * deep.len() + begin * height..];
                        let from_a = &from_a[..height * depth.len()];
                        Source { start: from_a.as_ptr(), step: height, row: 1 }
                    }
                };
                // SAFETY: the slices have the lengths that the kernel reads (B's columns from
                // `column % PANEL` on lie in the same panel); C's tile is inside C, or `edge` stands in
                // for it where the kernel is wider than what is left of C.
                unsafe {
                    let b = from_b.as_ptr().wrapping_add(column % PANEL);
                    let start = c.start.add(tile * c.stride + column);
                    if width == kernels.width {
                        kernel(depth.len(), a, b, Target { start, ..c }, accumulate);
                        continue;
                    }
                    for row in 0..height * usize::from(accumulate) {
                        let from = start.add(row * c.stride);
                        from.copy_to_nonoverlapping(&mut edge[row * PANEL], width);
                    }
                    let corner = Target { start: edge.as_mut_ptr(), stride: PANEL };
                    kernel(depth.len(), a, b, corner, accumulate);
                    for row in 0..height {
                        let to = start.add(row * c.stride);
                        to.copy_from_nonoverlapping(&edge[row * PANEL], width);
                    }
                }
            }
        }
    }
}

/// The tiles `(first row, height)` of `rows` rows, `tallest` at most; what is left at the end is
/// halved rather than left to one low tile, which could not hide the latency of its products.
pub(super) fn tiles(rows: usize, tallest: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = rows - first;
        let height = match left {
            0 => return None,
            _ if left <= tallest => left,
            _ if left < 2 * tallest => left.div_ceil(2),
            _ => tallest,
        };
        first += height;
        Some((first - height, height))
    })
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
pub(crate) mod tests;
