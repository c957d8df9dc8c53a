/*! Weight quantization: rounding to nearest, and what it has in common with GPTQ.

All functions take a weight matrix `[out, channels]` that is already permuted to its site's channel order
and transformed, as [`SiteFormat::permute`](super::site::SiteFormat::permute) leaves it. */

use std::ops::Range;

use half::f16;

use super::float::{E4M3, e4m3_bits, e4m3_value};
use super::grid::{Grid, Peak, ScaleRule, Scaling, inverse};
use super::linear::{OutlierBlock, QuantizedLinear};
use super::number::{LinearFormat, OutlierFormat, RowFormat};
use crate::{Error, Result};

/// Rounds each weight to the nearest code (quant.py `quantize_tensor` over `[rows_per_scale, group]`).
///
/// `weights` is `[rows, format.width()]`.
pub fn round_to_nearest(
    weights: &[f32],
    rows: usize,
    format: &LinearFormat,
    scaling: Scaling,
) -> Result<QuantizedLinear> {
    let RowFormat { numbers, groups, .. } = format.row;
    let (width, grouped) = (format.row.width(), format.row.grouped_channels());
    let group = numbers.group_size;
    let grid = Grid::of(&numbers, scaling, ScaleRule::Rounding);
    let mut codes = vec![0i8; rows * grouped];
    let mut scales = Vec::with_capacity(format.scale_rows(rows) * groups);
    for (rows, codes) in weights
        .chunks(format.rows_per_scale * width)
        .zip(codes.chunks_mut(format.rows_per_scale * grouped))
    {
        for start in (0..grouped).step_by(group) {
            let scale = best_scale(&grid, rows, width, start..start + group, None)?;
            let inverse = inverse(scale.to_f32());
            for (row, codes) in rows.chunks(width).zip(codes.chunks_mut(grouped)) {
                for (code, &value) in
                    codes[start..start + group].iter_mut().zip(&row[start..start + group])
                {
                    *code = grid.stored(grid.code(value, inverse));
                }
            }
            scales.push(scale);
        }
    }
    assemble(weights, rows, format, codes, scales)
}

/// The peak of columns `start..start + len` over all rows of `weights` `[_, width]`.
pub(crate) fn peak(weights: &[f32], width: usize, start: usize, len: usize) -> Peak {
    weights.chunks(width).map(|row| Peak::of(&row[start..start + len])).fold(Peak::NONE, Peak::max)
}

/// The scale of a group, columns `group` of the rows of `weights` `[_, width]` that share it: of those that the grid tries
/// the one that costs the least, the first of equals.
///
/// The cost is what GPTQ minimizes, the sum of squares of the columns' errors over their pivots while each error is spread
/// over the columns of the group after it, by the rows of `u` `[width, width]`; without `u`, of the errors alone. Rows of
/// `weights` carry every update of the columns before the group.
#[inline(always)]
pub(crate) fn best_scale(
    grid: &Grid,
    weights: &[f32],
    width: usize,
    group: Range<usize>,
    u: Option<&[f32]>,
) -> Result<f16> {
    let peak = peak(weights, width, group.start, group.len());
    let first = grid.scale(peak)?;
    if grid.factors().len() == 1 {
        return Ok(first);
    }
    let mut best = (f32::INFINITY, first);
    let mut values = vec![0.0; group.len()];
    for &factor in grid.factors() {
        // A greater scale may be beyond f16 where the first is not.
        let Ok(scale) = grid.scaled(peak, factor) else { continue };
        let (step, inverse) = (scale.to_f32(), inverse(scale.to_f32()));
        let mut cost = 0.0;
        for row in weights.chunks(width) {
            values.copy_from_slice(&row[group.clone()]);
            let mut own = 0.0f32;
            for at in 0..values.len() {
                let lost = values[at] - grid.code(values[at], inverse) * step;
                let error = match u {
                    None => lost,
                    Some(u) => {
                        let column = group.start + at;
                        let u = &u[column * width + column..column * width + group.end];
                        let error = lost / u[0];
                        for (value, &u) in values[at + 1..].iter_mut().zip(&u[1..]) {
                            *value = (-error).mul_add(u, *value);
                        }
                        error
                    }
                };
                own = error.mul_add(error, own);
            }
            cost += own;
        }
        if cost < best.0 {
            best = (cost, scale);
        }
    }
    Ok(best.1)
}

/// Joins finished codes and scales with the outlier block, which is rounded from the last columns
/// of `weights` `[rows, width]` (after GPTQ: as its updates left them): INT8 with one scale a row
/// and no clipping, FP8 likewise, or f16.
pub(crate) fn assemble(
    weights: &[f32],
    rows: usize,
    format: &LinearFormat,
    codes: Vec<i8>,
    scales: Vec<f16>,
) -> Result<QuantizedLinear> {
    let columns =
        weights.chunks(format.row.width()).map(|row| &row[format.row.grouped_channels()..]);
    let outlier_channels = format.row.outlier_channels;
    let outliers = match format.row.outliers() {
        None => OutlierBlock::None,
        Some(OutlierFormat::F16) => {
            let values: Vec<f16> = columns.flatten().map(|&x| f16::from_f32(x)).collect();
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::input("an outlier's weight is greater than an f16 can be"));
            }
            OutlierBlock::F16(values)
        }
        Some(OutlierFormat::Fp8) => {
            let mut codes = Vec::with_capacity(rows * outlier_channels);
            let mut scales = Vec::with_capacity(rows);
            for row in columns {
                let scale = Grid::fp8().scale(Peak::of(row))?;
                let inverse = inverse(scale.to_f32());
                codes.extend(row.iter().map(|&value| e4m3_bits(E4M3.round(value * inverse))));
                scales.push(scale);
            }
            OutlierBlock::Fp8 { codes, scales }
        }
        Some(OutlierFormat::Int8) => {
            let grid = Grid::int8();
            let mut codes = Vec::with_capacity(rows * outlier_channels);
            let mut scales = Vec::with_capacity(rows);
            for row in columns {
                let scale = grid.scale(Peak::of(row))?;
                let inverse = inverse(scale.to_f32());
                codes.extend(row.iter().map(|&value| grid.code(value, inverse) as i8));
                scales.push(scale);
            }
            OutlierBlock::Int8 { codes, scales }
        }
    };
    Ok(QuantizedLinear { rows, format: *format, codes, scales, outliers })
}

/// The weights a [`QuantizedLinear`] stands for, `[rows, width]` in the site's order.
pub fn dequantize(linear: &QuantizedLinear) -> Vec<f32> {
    let width = linear.format.row.width();
    let mut weights = vec![0.0; linear.rows * width];
    for (row, out) in weights.chunks_mut(width.max(1)).enumerate() {
        dequantize_row(linear, row, out);
    }
    weights
}

/// The weights of one row, `[width]` in the site's order.
pub fn dequantize_row(linear: &QuantizedLinear, row: usize, out: &mut [f32]) {
    let RowFormat { numbers, outlier_channels, .. } = linear.format.row;
    let (grouped, group) = (linear.format.row.grouped_channels(), numbers.group_size);
    let codes = &linear.codes[row * grouped..(row + 1) * grouped];
    for (group, (out, codes)) in out.chunks_mut(group).zip(codes.chunks(group)).enumerate() {
        let scale = linear.scale(row, group);
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = numbers.codebook.value(code) * scale;
        }
    }
    let block = row * outlier_channels..(row + 1) * outlier_channels;
    for (column, out) in block.zip(&mut out[grouped..]) {
        *out = match &linear.outliers {
            OutlierBlock::None => 0.0,
            OutlierBlock::Int8 { codes, scales } => f32::from(codes[column]) * scales[row].to_f32(),
            OutlierBlock::Fp8 { codes, scales } => e4m3_value(codes[column]) * scales[row].to_f32(),
            OutlierBlock::F16(values) => values[column].to_f32(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::codebook::Codebook;
    use crate::quant::number::{NumberFormat, ScaleFormat};

    /// One group of 16 and two outliers, in two rows.
    fn rounded(codebook: Codebook, rows_per_scale: usize) -> QuantizedLinear {
        let numbers = NumberFormat { bits: 4, codebook, group_size: 16, scale: ScaleFormat::F16 };
        let row = RowFormat {
            numbers,
            groups: 1,
            outlier_channels: 2,
            outlier_format: OutlierFormat::Fp8,
        };
        let format = LinearFormat { row, rows_per_scale };
        let mut weights = [0.0; 36];
        weights[..8].copy_from_slice(&[-6.0, 5.0, 3.5, 2.5, 1.75, -1.25, 0.75, 0.25]);
        weights[16..18].copy_from_slice(&[448.0, -3.1]);
        weights[18..20].copy_from_slice(&[0.5, -12.0]);
        round_to_nearest(&weights, 2, &format, Scaling::clipped(1.0)).unwrap()
    }

    #[test]
    fn fp4_weights_and_fp8_outliers_are_the_nearest_numbers() {
        let linear = rounded(Codebook::Fp4, 1);
        assert_eq!(linear.scales, [f16::from_f32(0.5), f16::from_f32(1.0)]);
        assert_eq!(linear.codes[..8], [-12, 8, 8, 4, 4, -2, 2, 0]);
        assert_eq!(linear.codes[16..18], [0, -12], "halves go to even");
        // 1100 0000 is -2 and 1100 0101 -3.25; the nearest to -3.1 is -3, 1100 0100.
        let codes = vec![0x7e, 0xc4, 0, 0];
        let scales = vec![f16::ONE, f16::ZERO];
        assert_eq!(linear.outliers, OutlierBlock::Fp8 { codes, scales });
        let weights = dequantize(&linear);
        assert_eq!(weights[..8], [-6.0, 4.0, 4.0, 2.0, 2.0, -1.0, 1.0, 0.0]);
        assert_eq!(weights[16..20], [448.0, -3.0, 0.0, -12.0]);
    }

    #[test]
    fn bitsandbytes_sixteenths_are_codes_of_one() {
        let linear = rounded(Codebook::Fp4Bnb, 2);
        assert_eq!(linear.scales, [f16::ONE]);
        assert_eq!(linear.codes[..8], [-6, 4, 3, 2, 2, -2, 1, 1]);
        assert_eq!(linear.codes[16..18], [1, -12]);
        assert_eq!(dequantize(&linear)[6..8], [0.0625; 2]);
    }
}
