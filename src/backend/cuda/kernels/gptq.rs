/*! `gptq.cu`: the damped Hessian's factor, the sweep, and what it cost. */

use super::{Defines, Family, THREADS, declared, defines, flag, grid_name, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};
use crate::quant::scale::ScaleGrid;

/// Columns of a span.
pub(in crate::backend::cuda) const SPAN: usize = 128;
/// Rows and columns of a tile that is mirrored.
const TILE: usize = 32;

pub(super) const FAMILY: Family = Family {
    name: "gptq",
    source: source!("gptq"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| {
        vec![
            constants(false, ScaleGrid::F16, &[1.0]),
            constants(true, ScaleGrid::F16, &[1.0]),
            constants(true, ScaleGrid::E4m3, &[1.0, 1.5]),
            constants(true, ScaleGrid::PowerOfTwo, &[1.0, 2.0, 0.5]),
            constants(false, ScaleGrid::Bf16, &[1.0]),
        ]
    },
    kernels: declared![
        Mirror,
        Diagonal,
        Flip,
        Divisors,
        UnitUpper,
        WideGroupScales,
        Sweep,
        OutlierBlock,
        OutlierErrors,
        ReverseColumns,
        AddReversed,
        Subtract,
        ExpandScales,
    ],
};

fn constants(fp4: bool, grid: ScaleGrid, factors: &[f32]) -> Defines {
    let factors_list: Vec<String> = factors.iter().map(|factor| format!("{factor:?}f")).collect();
    defines! {
        "THREADS": THREADS,
        "SPAN": SPAN,
        "TILE": TILE,
        "FP4": flag(fp4),
        "SCALE_GRID": grid_name(grid),
        "FACTORS": factors_list.join(","),
        "FACTOR_COUNT": factors.len(),
    }
}

/// A launch of this file for integers: its geometry.
macro_rules! launches {
    ($($name:ident: |$kernel:ident| $geometry:expr;)*) => {$(
        impl Launch for $name<'_> {
            const FAMILY: Family = FAMILY;

            fn constants(&self) -> Defines {
                constants(false, ScaleGrid::F16, &[1.0])
            }

            fn geometry(&self) -> Geometry {
                let $kernel = self;
                $geometry
            }
        }
    )*};
}

kernel! {
    /// Mirrors the upper triangle to the lower one.
    Mirror<'a> = ["mirror"] {
        h: Out<'a, f32>[n * n],
        n: usize,
    }
}

kernel! {
    /// The diagonal.
    Diagonal<'a> = ["diagonal"] {
        h: In<'a, f32>[n * n],
        n: usize,
        to: Out<'a, f32>[n],
    }
}

kernel! {
    /// The lower triangle of J H J, damped.
    Flip<'a> = ["flip"] {
        h: In<'a, f32>[n * n],
        n: usize,
        damp: f32,
        to: Out<'a, f32>[n * n],
    }
}

kernel! {
    /// The diagonal of L from its last entry to its first.
    Divisors<'a> = ["divisors"] {
        l: In<'a, f32>[n * n],
        n: usize,
        to: Out<'a, f32>[n],
    }
}

kernel! {
    /// R above the diagonal, from L.
    UnitUpper<'a> = ["unit_upper"] {
        l: Out<'a, f32>[n * n],
        divisors: In<'a, f32>[n],
        n: usize,
    }
}

kernel! {
    /// The scales of a group that is wider than a span.
    WideGroupScales<'a> = ["wide_group_scales"] {
        weights: In<'a, f32>[rows * width],
        rows: usize,
        width: usize,
        rows_per_scale: usize,
        first: usize,
        size: usize,
        group: usize,
        groups: usize,
        ratio: f32,
        signed_scales: bool,
        scale_unit: f32,
        scales: Out<'a, f32>[rows.div_ceil(rows_per_scale) * groups],
        bad: Out<'a, u32>[1],
    }
    launch { grid: ScaleGrid }
}

impl Launch for WideGroupScales<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        constants(false, self.grid, &[1.0])
    }

    fn geometry(&self) -> Geometry {
        Geometry::over(32 * self.rows.div_ceil(self.rows_per_scale), THREADS)
    }
}

kernel! {
    /// Sweeps the columns of a span.
    Sweep<'a> = ["sweep_rows", "sweep_row_pairs"] {
        weights: In<'a, f32>[rows * width],
        original: In<'a, f32>[rows * width],
        r: Option<In<'a, f32>>[width * width],
        rows: usize,
        width: usize,
        first: usize,
        count: usize,
        group_size: usize,
        groups: usize,
        wide: bool,
        feedback: bool,
        ratio: f32,
        signed_scales: bool,
        scale_unit: f32,
        least: f32,
        greatest: f32,
        codes: Out<'a, i8>[rows * groups * group_size],
        scales: Out<'a, f32>[rows.div_ceil(rows_per_scale) * groups],
        difference: Option<Out<'a, f32>>[rows * SPAN],
        unrounded: Option<Out<'a, f32>>[rows * width],
        pivots: Option<In<'a, f32>>[width],
        errors: Option<Out<'a, f64>>[2 * rows],
        bad: Out<'a, u32>[1],
    }
    launch {
        /// One or two.
        rows_per_scale: usize,
        fp4: bool,
        grid: ScaleGrid,
        factors: &'static [f32],
    }
}

impl Launch for Sweep<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        usize::from(self.rows_per_scale > 1)
    }

    fn constants(&self) -> Defines {
        constants(self.fp4, self.grid, self.factors)
    }

    fn geometry(&self) -> Geometry {
        let shared_bytes = if self.feedback { 4 * SPAN * self.count } else { 0 };
        Geometry {
            shared_bytes,
            ..Geometry::over(32 * self.rows.div_ceil(self.rows_per_scale), THREADS)
        }
    }
}

kernel! {
    /// Codes of the outlier columns.
    OutlierBlock<'a> = ["outlier_block"] {
        weights: In<'a, f32>[rows * width],
        rows: usize,
        width: usize,
        outliers: usize,
        padded: usize,
        ratio: f32,
        codes: Option<Out<'a, i8>>[rows * padded],
        scales: Option<Out<'a, f32>>[rows],
        values: Option<Out<'a, f32>>[rows * outliers],
        bad: Out<'a, u32>[1],
    }
}

kernel! {
    /// What the outlier columns cost.
    OutlierErrors<'a> = ["outlier_errors"] {
        weights: In<'a, f32>[rows * width],
        original: In<'a, f32>[rows * width],
        r: In<'a, f32>[width * width],
        pivots: In<'a, f32>[width],
        rows: usize,
        width: usize,
        outliers: usize,
        padded: usize,
        codes: Option<In<'a, i8>>[rows * padded],
        scales: Option<In<'a, f32>>[rows],
        values: Option<In<'a, f32>>[rows * outliers],
        errors: Out<'a, f64>[2 * rows],
    }
}

kernel! {
    /// Reverses the columns.
    ReverseColumns<'a> = ["reverse_columns"] {
        x: In<'a, f32>[rows * n],
        n: usize,
        to: Out<'a, f32>[rows * n],
    }
    launch { rows: usize }
}

kernel! {
    /// Adds a change whose columns are reversed.
    AddReversed<'a> = ["add_reversed"] {
        weights: Out<'a, f32>[rows * n],
        change: In<'a, f32>[rows * n],
        n: usize,
        share: f32,
    }
    launch { rows: usize }
}

kernel! {
    /// `x -= y`.
    Subtract<'a> = ["subtract"] {
        x: Out<'a, f32>[count as usize],
        y: In<'a, f32>[count as usize],
        count: i64,
    }
}

kernel! {
    /// Scales as the integer product reads them, one a row.
    ExpandScales<'a> = ["expand_scales"] {
        scales: In<'a, f32>[rows.div_ceil(rows_per_scale) * groups],
        rows: usize,
        groups: usize,
        rows_per_scale: usize,
        stride: usize,
        to: Out<'a, f32>[groups * stride],
    }
}

/// A thread a column of each of `n` rows.
fn square(n: usize) -> Geometry {
    Geometry::grid((n.div_ceil(THREADS), n, 1), THREADS)
}

/// All experts' rows may be more than a grid's other dimensions hold.
fn rows_in_x(rows: usize, n: usize) -> Geometry {
    Geometry::grid((rows, n.div_ceil(THREADS), 1), THREADS)
}

launches! {
    Mirror: |kernel| {
        let tiles = kernel.n.div_ceil(TILE);
        Geometry::grid((tiles, tiles, 1), THREADS)
    };
    Diagonal: |kernel| Geometry::over(kernel.n, THREADS);
    Flip: |kernel| square(kernel.n);
    Divisors: |kernel| Geometry::over(kernel.n, THREADS);
    UnitUpper: |kernel| square(kernel.n);
    OutlierBlock: |kernel| Geometry::over(32 * kernel.rows, THREADS);
    OutlierErrors: |kernel| Geometry::over(32 * kernel.rows, THREADS);
    ReverseColumns: |kernel| rows_in_x(kernel.rows, kernel.n);
    AddReversed: |kernel| rows_in_x(kernel.rows, kernel.n);
    Subtract: |kernel| Geometry::over(kernel.count as usize, THREADS);
    ExpandScales: |kernel| Geometry::over(kernel.rows * kernel.groups, THREADS);
}
