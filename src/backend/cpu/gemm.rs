/*! The f32 matrix product, with one result for every machine.

Each element of C is `c = fma(a[m][k], b[k][n], c)` with k strictly ascending, from 0 or from the
old C. Blocks, tiles, instruction sets and threads only choose which elements are worked on when,
so all of them give the same bits; `plain_gemm` is the definition.

The blocks are Goto's: a block of A is packed once and stays in L2, a panel's block of B stays in
L1 while all tiles of A pass over it, and a tile of C lives in registers. A panel's blocks follow one
another, so that its part of C is in L2 when the next one goes on with the sums, and each is asked for
while the one before it is worked on. */

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::gemm_kernels::{Kernels, TALLEST, kernels, prefetch};
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
/// Rows that go to a thread at once, a multiple of all kernels' heights.
const HEIGHT: usize = 240;

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
        // SAFETY: the caller's.
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
            packed.resize(packed.len().max(rows.len() * deep.len()), 0.0);
            for (tile, height) in tiles(rows.len(), tallest) {
                let values = &mut packed[tile * deep.len()..][..height * deep.len()];
                a.pack(rows.start + tile, height, deep.clone(), values);
            }
            // SAFETY: these are rows of C, and `packed` holds their tiles as written above.
            unsafe {
                let c = c.add(rows.start * c_stride);
                block(kernels, &packed, rows.len(), b, deep.clone(), c, c_stride, accumulate);
            }
        }
    }
    PACKED.set(packed);
}

/// Cuts `whole` into the fewest pieces of at most `most`, as equal as multiples of `unit` can be; one piece
/// if it is empty.
fn pieces(
    whole: Range<usize>,
    most: usize,
    unit: usize,
) -> impl Iterator<Item = Range<usize>> + Clone {
    let size = whole.len().div_ceil(whole.len().div_ceil(most).max(1)).max(1);
    let size = size.next_multiple_of(unit);
    let count = whole.len().div_ceil(size).max(1);
    (0..count).map(move |piece| {
        let first = whole.start + piece * size;
        first..(first + size).min(whole.end)
    })
}

/// Multiplies a packed block of A with all panels.
///
/// # Safety
/// `packed` must hold the tiles of `rows` rows, `deep.len()` steps each, and C be valid for `[rows, b.n()]`.
#[expect(clippy::too_many_arguments, reason = "one step of `multiply`, which owns all of them")]
unsafe fn block(
    kernels: &Kernels,
    packed: &[f32],
    rows: usize,
    b: &Part<'_>,
    deep: Range<usize>,
    c: *mut f32,
    c_stride: usize,
    accumulate: bool,
) {
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
            let first = tile * deep.len() + (depth.start - deep.start) * height;
            let from_a = &packed[first..][..height * depth.len()];
            // SAFETY: the slices have the lengths that the kernel reads (B's columns from
            // `column % PANEL` on lie in the same panel); C's tile is inside C, or `edge` stands in
            // for it where the kernel is wider than what is left of C.
            unsafe {
                let (a, b) = (from_a.as_ptr(), from_b.as_ptr().wrapping_add(column % PANEL));
                let c = c.add(tile * c_stride + column);
                if width == kernels.width {
                    kernel(depth.len(), a, height, b, c, c_stride, accumulate);
                    continue;
                }
                for row in 0..height * usize::from(accumulate) {
                    let from = c.add(row * c_stride);
                    from.copy_to_nonoverlapping(&mut edge[row * PANEL], width);
                }
                kernel(depth.len(), a, height, b, edge.as_mut_ptr(), PANEL, accumulate);
                for row in 0..height {
                    c.add(row * c_stride).copy_from_nonoverlapping(&edge[row * PANEL], width);
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
pub(crate) mod tests {
    use super::*;

    const SHAPES: [(usize, usize, usize); 15] = [
        (1, 1, 1),
        (1, 33, 7),
        (7, 1, 172),
        (5, 32, 1),
        (13, 31, 33),
        (31, 33, 65),
        (12, 64, 576),
        (25, 172, 64),
        (64, 172, 172),
        (3, 576, 321),
        (251, 40, 20),
        (13, 130, 1600),
        (4, 5, 0),
        (0, 5, 4),
        (5, 0, 4),
    ];

    pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    pub(crate) fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    #[test]
    fn every_set_and_thread_count_gives_the_bits_of_the_definition() {
        for (m, n, k) in SHAPES {
            let (a, w) = (random(m * k, 1), random(n * k, 2));
            let panels = Panels::from_rows(&w, n, k);
            let stride = n + 3;
            for accumulate in [false, true] {
                // What is overwritten starts as NaN; what lies outside must stay NaN.
                let inside = |i: usize| i % stride < n && i / stride < m;
                let start: Vec<f32> = random((m + 1) * stride, 3)
                    .into_iter()
                    .enumerate()
                    .map(|(i, value)| if accumulate && inside(i) { value } else { f32::NAN })
                    .collect();
                let mut expected = start.clone();
                let rows = Rows::new(&a, m, k);
                plain_gemm(rows, &panels, &mut expected, stride, accumulate);
                let as_expected = |(i, value): (usize, &f32)| value.is_nan() != inside(i);
                assert!(expected.iter().enumerate().all(as_expected));
                for isa in Isa::available() {
                    let mut c = start.clone();
                    gemm(isa, rows, &panels, &mut c, stride, accumulate);
                    assert_eq!(bits(&c), bits(&expected), "{isa:?} {m}x{n}x{k}");
                    for threads in [1, 3] {
                        let mut c = start.clone();
                        on_threads(threads, || {
                            par_gemm(isa, rows, &panels, &mut c, stride, accumulate)
                        });
                        assert_eq!(bits(&c), bits(&expected), "{isa:?} {m}x{n}x{k} {threads}");
                    }
                }
            }
        }
    }

    /// The panic's sentence.
    pub(crate) fn refusal(work: impl FnOnce() + std::panic::UnwindSafe) -> String {
        let panic = std::panic::catch_unwind(work).expect_err("it is refused");
        let sentence = panic.downcast_ref::<String>().cloned();
        sentence.unwrap_or_else(|| (*panic.downcast_ref::<&str>().unwrap()).to_owned())
    }

    #[test]
    fn sizes_that_wrap_are_refused() {
        const HUGE: usize = 1 << 63;
        let values = [1.0f32; 64];
        for isa in Isa::available() {
            let product = |a: Rows<'static>, c_stride: usize, parallel: bool| {
                refusal(move || {
                    let panels = Panels::from_rows(&[1.0; 8], 4, 2);
                    let mut c = [0.0; 64];
                    if parallel {
                        par_gemm(isa, a, &panels, &mut c, c_stride, false);
                    } else {
                        gemm(isa, a, &panels, &mut c, c_stride, false);
                    }
                })
            };
            static DATA: [f32; 64] = [1.0; 64];
            let rows = |rows, row_stride, column_stride| Rows {
                data: &DATA,
                rows,
                row_stride,
                column_stride,
            };
            for parallel in [false, true] {
                // Twice the stride is 0, and so would be where the last row begins.
                let last_row = product(rows(3, 1, 1), HUGE, parallel);
                assert!(last_row.contains("C is smaller than 3 x 4"), "{last_row}");
                let many = product(rows(HUGE + 1, 0, 1), 4, parallel);
                assert!(many.contains("C is smaller than"), "{many}");
                let stride = product(rows(3, HUGE, 1), 4, parallel);
                assert!(stride.contains("A has fewer than 2 columns"), "{stride}");
                let column = product(rows(2, 1, usize::MAX), 4, parallel);
                assert!(column.contains("A has fewer than 2 columns"), "{column}");
            }
        }
        let weight = refusal(move || drop(Panels::from_rows(&values, HUGE, 2)));
        assert!(weight.contains("has only 64 values"), "{weight}");
        let columns = refusal(move || drop(Panels::from_columns(&values, 3, 4, HUGE)));
        assert!(columns.contains("has only 64 values"), "{columns}");
        let panels = refusal(|| drop(Panels::from_rows_with(PANEL, 1 << 58, |_, _| {})));
        assert!(panels.contains("fit no memory"), "{panels}");
    }

    #[test]
    fn the_definition_is_a_matrix_product() {
        let (m, n, k) = (5, 37, 70);
        let (a, w) = (random(m * k, 4), random(n * k, 5));
        let mut c = vec![f32::NAN; m * n];
        plain_gemm(Rows::new(&a, m, k), &Panels::from_rows(&w, n, k), &mut c, n, false);
        for (i, value) in c.into_iter().enumerate() {
            let products =
                (0..k).map(|d| f64::from(a[i / n * k + d]) * f64::from(w[i % n * k + d]));
            assert!((products.sum::<f64>() - f64::from(value)).abs() < 1e-5);
        }
    }

    #[test]
    fn parts_and_transposed_rows_give_the_same_bits() {
        let (m, n, k) = (30, 150, 50);
        let (a, b) = (random(k * m, 6), random(k * n, 7));
        let a_rows: Vec<f32> = (0..m * k).map(|i| a[i % k * m + i / k]).collect();
        let panels = Panels::from_columns(&b, k, n, n);
        for isa in Isa::available() {
            let mut whole = vec![f32::NAN; m * n];
            gemm(isa, Rows::new(&a_rows, m, k), &panels, &mut whole, n, false);
            let mut pieces = vec![f32::NAN; m * n];
            for columns in [0..64, 64..128, 128..150] {
                for depth in [0..20, 20..50] {
                    let left = Rows { data: &a[depth.start * m..], ..Rows::transposed(&a, m) };
                    let part = panels.part(columns.clone(), depth.clone());
                    gemm(isa, left, part, &mut pieces[columns.start..], n, depth.start > 0);
                }
            }
            assert_eq!(bits(&pieces), bits(&whole), "{isa:?}");
        }
    }
}
