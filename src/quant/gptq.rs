/*! GPTQ (Frantar et al., 2022; gptq.py of the reference), the plain version.

Minimizes `||(W - Q) X||^2` row by row: columns are quantized in order, and the error of each is
propagated to the columns after it by the rows of `U`, the upper Cholesky factor of the inverse
Hessian. Column order is the site's, low energy first. So the outlier block comes last, and absorbs
the errors of all other columns before it is rounded.

Two errors of the reference are corrected. A group's scale is computed from weights that have every
update so far (in the reference: only those of earlier column blocks). And a group whose values have one sign does
not saturate.

The order of operations is part of the contract: `w = fma(-error, u, w)`, columns ascending. Backends
may block the sweep for speed, with the same bits. */

use half::f16;

use super::grid::{Grid, ScaleRule, Scaling, inverse};
use super::linear::QuantizedLinear;
use super::number::{LinearFormat, RowFormat};
use super::weights::{assemble, best_scale};
use crate::Result;

/// Damping tried when the Hessian has no Cholesky factor, as multiples of the recipe's.
pub const DAMPING_LADDER: [f32; 5] = [1.0, 3.0, 10.0, 30.0, 100.0];

/// The sweep over all columns, one at a time.
///
/// `weights` is `[rows, width]`, `u` is `[width, width]`, upper triangular, row-major.
pub fn sweep_plain(
    mut weights: Vec<f32>,
    rows: usize,
    format: &LinearFormat,
    scaling: Scaling,
    u: &[f32],
) -> Result<QuantizedLinear> {
    let RowFormat { numbers, groups, .. } = format.row;
    let (width, grouped) = (format.row.width(), format.row.grouped_channels());
    let grid = Grid::of(&numbers, scaling, ScaleRule::Gptq);
    let mut codes = vec![0i8; rows * grouped];
    let mut scales = vec![f16::ZERO; format.scale_rows(rows) * groups];
    for (pair, (weights, codes)) in weights
        .chunks_mut(format.rows_per_scale * width)
        .zip(codes.chunks_mut(format.rows_per_scale * grouped))
        .enumerate()
    {
        let scales = &mut scales[pair * groups..(pair + 1) * groups];
        for column in 0..grouped {
            let group = column / numbers.group_size;
            if column % numbers.group_size == 0 {
                let end = column + numbers.group_size;
                scales[group] = best_scale(&grid, weights, width, column..end, Some(u))?;
            }
            let scale = scales[group].to_f32();
            let update = &u[column * width..(column + 1) * width];
            for (row, codes) in weights.chunks_mut(width).zip(codes.chunks_mut(grouped)) {
                let code = grid.code(row[column], inverse(scale));
                let error = (row[column] - code * scale) / update[column];
                for (weight, &u) in row[column + 1..].iter_mut().zip(&update[column + 1..]) {
                    *weight = (-error).mul_add(u, *weight);
                }
                codes[column] = grid.stored(code);
            }
        }
    }
    assemble(&weights, rows, format, codes, scales)
}
