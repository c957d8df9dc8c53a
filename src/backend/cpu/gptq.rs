/*! The GPTQ sweep in column blocks: bit for bit what `quant::gptq::sweep_plain` returns.

Rows are independent, so each block's columns are swept row by row in parallel, and its errors then
reach the columns after it as one matrix product. Both use `w = fma(-error, u, w)` in ascending order
of columns, so blocking changes no bit. */

use half::f16;
use rayon::prelude::*;

use super::gemm::par_gemm;
use super::gemm_pack::{Panels, Rows};
use super::isa::Isa;
use crate::Result;
use crate::backend::Matrix;
use crate::quant::grid::{Grid, ScaleRule, Scaling, inverse};
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;
use crate::quant::weights::{assemble, best_scale};

/// Columns swept before the rest is updated: their part of `U` (64 KB) stays in the caches.
const BLOCK: usize = 128;

/// Where the blocks of `format` begin and end. A group that starts in a block either ends in it or
/// starts at its first column, so its scale always comes from weights that carry every update.
fn blocks(format: &LinearFormat) -> Vec<(usize, usize)> {
    let (group, grouped) = (format.row.numbers.group_size, format.row.grouped_channels());
    let step = if group <= BLOCK { BLOCK / group * group } else { group };
    (0..grouped)
        .step_by(step)
        .flat_map(|start| {
            let end = (start + step).min(grouped);
            (start..end).step_by(BLOCK).map(move |first| (first, (first + BLOCK).min(end)))
        })
        .collect()
}

/// The sweep over `weights` `[rows, width]`; `u` is `[width, width]`, upper triangular.
pub(super) fn sweep(
    isa: Isa,
    weights: Matrix,
    format: &LinearFormat,
    scaling: Scaling,
    u: &[f32],
) -> Result<QuantizedLinear> {
    let Matrix { rows, columns: width, data: mut weights } = weights;
    let (groups, grouped) = (format.row.groups, format.row.grouped_channels());
    let grid = Grid::of(&format.row.numbers, scaling, ScaleRule::Gptq);
    let mut codes = vec![0i8; rows * grouped];
    let mut scales = vec![f16::ZERO; format.scale_rows(rows) * groups];
    let mut errors = vec![0f32; rows * BLOCK];
    for (first, end) in blocks(format) {
        let span = Span { first, end, width, format, grid: &grid, u };
        weights
            .par_chunks_mut(format.rows_per_scale * width)
            .zip(codes.par_chunks_mut(format.rows_per_scale * grouped))
            .zip(scales.par_chunks_mut(groups))
            .zip(errors.par_chunks_mut(format.rows_per_scale * BLOCK))
            .try_for_each(|(((weights, codes), scales), errors)| {
                span.sweep(isa, weights, codes, scales, errors)
            })?;
        if end < width {
            let tail =
                Panels::from_columns(&u[first * width + end..], end - first, width - end, width);
            let errors = Rows { data: &errors, rows, row_stride: BLOCK, column_stride: 1 };
            par_gemm(isa, errors, &tail, &mut weights[end..], width, true);
        }
    }
    assemble(&weights, rows, format, codes, scales)
}

/// One block of columns, `first..end`.
struct Span<'a> {
    first: usize,
    end: usize,
    width: usize,
    format: &'a LinearFormat,
    grid: &'a Grid,
    u: &'a [f32],
}

impl Span<'_> {
    /// Sweeps the rows that share a scale; leaves `-error` of each column in `errors`.
    fn sweep(
        &self,
        isa: Isa,
        weights: &mut [f32],
        codes: &mut [i8],
        scales: &mut [f16],
        errors: &mut [f32],
    ) -> Result<()> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token is proof that the processor has the set.
            Isa::Avx512(_) => unsafe { self.sweep_avx512(weights, codes, scales, errors) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token is proof that the processor has the set.
            Isa::Avx2(_) => unsafe { self.sweep_avx2(weights, codes, scales, errors) },
            _ => self.sweep_body(weights, codes, scales, errors),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,fma")]
    fn sweep_avx512(
        &self,
        weights: &mut [f32],
        codes: &mut [i8],
        scales: &mut [f16],
        errors: &mut [f32],
    ) -> Result<()> {
        self.sweep_body(weights, codes, scales, errors)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn sweep_avx2(
        &self,
        weights: &mut [f32],
        codes: &mut [i8],
        scales: &mut [f16],
        errors: &mut [f32],
    ) -> Result<()> {
        self.sweep_body(weights, codes, scales, errors)
    }

    #[inline(always)]
    fn sweep_body(
        &self,
        weights: &mut [f32],
        codes: &mut [i8],
        scales: &mut [f16],
        errors: &mut [f32],
    ) -> Result<()> {
        let Self { first, end, width, format, grid, u } = *self;
        let (group_size, grouped) = (format.row.numbers.group_size, format.row.grouped_channels());
        for column in first..end {
            let group = column / group_size;
            if column % group_size == 0 {
                let group_columns = column..column + group_size;
                scales[group] = best_scale(grid, weights, width, group_columns, Some(u))?;
            }
            let scale = scales[group].to_f32();
            let update = &u[column * width + column..column * width + end];
            let rows = weights
                .chunks_mut(width)
                .zip(codes.chunks_mut(grouped))
                .zip(errors.chunks_mut(BLOCK));
            for ((row, codes), errors) in rows {
                let row = &mut row[column..end];
                let code = grid.code(row[0], inverse(scale));
                let error = -((row[0] - code * scale) / update[0]);
                for (weight, &u) in row[1..].iter_mut().zip(&update[1..]) {
                    *weight = error.mul_add(u, *weight);
                }
                codes[column] = grid.stored(code);
                errors[column - first] = error;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::codebook::Codebook;
    use crate::quant::gptq::sweep_plain;
    use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
    use crate::quant::scale::ScaleGrid;

    #[test]
    fn the_blocked_sweep_gives_the_plain_sweeps_bits() {
        let mut state = 1u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        use Codebook::{Fp4, Fp4Bnb, Int};
        use OutlierFormat::{F16, Fp8, Int8};
        for (rows, group_size, groups, outliers, rows_per_scale, bits, codebook, outlier_format) in [
            (5, 16, 9, 20, 2, 4, Int, Int8),
            (3, 64, 5, 0, 1, 4, Int, Int8),
            (4, 48, 7, 3, 1, 3, Int, F16),
            (2, 192, 2, 64, 2, 2, Int, Int8),
            (1, 304, 1, 1, 1, 8, Int, Int8),
            (5, 16, 9, 20, 2, 4, Fp4, Fp8),
            (4, 48, 7, 3, 1, 4, Fp4, Int8),
            (3, 176, 1, 0, 1, 4, Fp4, Int8),
            (2, 304, 2, 33, 1, 4, Fp4Bnb, Fp8),
            (3, 64, 3, 7, 2, 4, Fp4Bnb, F16),
        ] {
            let scale = match (rows, outlier_format) {
                (4, _) => ScaleFormat::F16,
                (3, _) => ScaleFormat { grid: ScaleGrid::PowerOfTwo, ..ScaleFormat::F16 },
                (2, _) => {
                    ScaleFormat { grid: ScaleGrid::E4m3, exponent: -9, ..ScaleFormat::SIGNED_F16 }
                }
                (5, Fp8) => ScaleFormat { grid: ScaleGrid::E4m3, exponent: -9, ..ScaleFormat::F16 },
                _ => ScaleFormat::SIGNED_F16,
            };
            let numbers = NumberFormat { bits, codebook, group_size, scale };
            let row = RowFormat { numbers, groups, outlier_channels: outliers, outlier_format };
            let format = LinearFormat { row, rows_per_scale };
            let width = row.width();
            let weights: Vec<f32> = (0..rows * width).map(|_| random()).collect();
            let mut u = vec![0.0; width * width];
            for row in 0..width {
                for column in row..width {
                    u[row * width + column] = if row == column { 1.5 } else { 0.2 * random() };
                }
            }
            for search in [false, true] {
                let scaling = Scaling { clip: 0.85, search };
                let expected = sweep_plain(weights.clone(), rows, &format, scaling, &u).unwrap();
                for isa in Isa::available() {
                    let weights = Matrix { rows, columns: width, data: weights.clone() };
                    let found = sweep(isa, weights, &format, scaling, &u).unwrap();
                    assert_eq!(found, expected, "{format:?} {isa:?} {search}");
                }
            }
        }
    }
}
