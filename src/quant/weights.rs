/*! Weight quantization: what both methods share, rounding to nearest, and the plain GPTQ sweep.

All of it works on a weight matrix `[out, channels]` already arranged in its site's channel order
(and transformed), as [`SiteFormat::arrange`](super::site::SiteFormat::arrange) leaves it. */

use half::f16;

use super::float::{E4M3, e4m3_bits, e4m3_value};
use super::grid::{Grid, Peak, inverse};
use super::levels::Levels;
use super::linear::{OutlierBlock, QuantizedLinear};
use super::site::{OutlierFormat, SiteFormat};
use crate::{Error, Result};

/// How a linear's weights are held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightFormat {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// What codes stand for.
    pub levels: Levels,
    /// Channels in a group.
    pub group_size: usize,
    /// Groups in a row.
    pub groups: usize,
    /// Adjacent rows that share a scale.
    pub rows_per_scale: usize,
    /// Clip ratio of the groups.
    pub clip: f32,
    /// Whether scales of integer codes are signed, see [`Grid::signed`].
    pub signed_scales: bool,
    /// Channels in the outlier block.
    pub outlier_channels: usize,
    /// How they are held.
    pub outlier_format: OutlierFormat,
}

impl WeightFormat {
    /// The format of a linear of integer codes fed by `site`.
    pub fn of(site: &SiteFormat, bits: u8, rows_per_scale: usize, clip: f32) -> Self {
        Self {
            bits,
            levels: Levels::Int,
            group_size: site.group_size,
            groups: site.groups,
            rows_per_scale,
            clip,
            signed_scales: site.signed_scales,
            outlier_channels: site.outlier_channels,
            outlier_format: site.outlier_format,
        }
    }

    /// Where the weights of a group may lie, chosen by GPTQ or rounded.
    pub fn grid(&self, gptq: bool) -> Grid {
        match self.levels {
            Levels::Int if self.signed_scales && self.bits < 8 => {
                Grid::signed(self.bits, self.clip)
            }
            Levels::Int if gptq => Grid::gptq(self.bits, self.clip),
            Levels::Int => Grid::rounding(self.bits, self.clip),
            levels => Grid::fp4(levels, self.clip),
        }
    }

    /// Channels before the outlier block.
    pub fn grouped_channels(&self) -> usize {
        self.groups * self.group_size
    }

    /// All channels, padding included.
    pub fn width(&self) -> usize {
        self.grouped_channels() + self.outlier_channels
    }
}

/// Rounds each weight to the nearest code (quant.py `quantize_tensor` over `[rows_per_scale, group]`).
///
/// `weights` is `[rows, format.width()]`.
pub fn round_to_nearest(
    weights: &[f32],
    rows: usize,
    format: &WeightFormat,
) -> Result<QuantizedLinear> {
    let (width, grouped, group) = (format.width(), format.grouped_channels(), format.group_size);
    let grid = format.grid(false);
    let mut codes = vec![0i8; rows * grouped];
    let mut scales = Vec::with_capacity(rows.div_ceil(format.rows_per_scale) * format.groups);
    for (rows, codes) in weights
        .chunks(format.rows_per_scale * width)
        .zip(codes.chunks_mut(format.rows_per_scale * grouped))
    {
        for start in (0..grouped).step_by(group) {
            let scale = grid.scale(peak(rows, width, start, group))?;
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

/// Joins finished codes and scales with the outlier block, which is rounded from the last columns
/// of `weights` `[rows, width]` (after GPTQ: as its updates left them): INT8 with one scale a row
/// and no clipping, FP8 likewise, or f16.
pub(crate) fn assemble(
    weights: &[f32],
    rows: usize,
    format: &WeightFormat,
    codes: Vec<i8>,
    scales: Vec<f16>,
) -> Result<QuantizedLinear> {
    let columns = weights.chunks(format.width()).map(|row| &row[format.grouped_channels()..]);
    let outliers = match format.outlier_format {
        _ if format.outlier_channels == 0 => OutlierBlock::None,
        OutlierFormat::F16 => {
            let values: Vec<f16> = columns.flatten().map(|&x| f16::from_f32(x)).collect();
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::input("an outlier's weight is greater than an f16 can be"));
            }
            OutlierBlock::F16(values)
        }
        OutlierFormat::Fp8 => {
            let mut codes = Vec::with_capacity(rows * format.outlier_channels);
            let mut scales = Vec::with_capacity(rows);
            for row in columns {
                let scale = Grid::fp8().scale(Peak::of(row))?;
                let inverse = inverse(scale.to_f32());
                codes.extend(row.iter().map(|&value| e4m3_bits(E4M3.round(value * inverse))));
                scales.push(scale);
            }
            OutlierBlock::Fp8 { codes, scales }
        }
        OutlierFormat::Int8 => {
            let grid = Grid::rounding(8, 1.0);
            let mut codes = Vec::with_capacity(rows * format.outlier_channels);
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
    Ok(QuantizedLinear {
        rows,
        bits: format.bits,
        levels: format.levels,
        group_size: format.group_size,
        groups: format.groups,
        rows_per_scale: format.rows_per_scale,
        codes,
        scales,
        outlier_channels: format.outlier_channels,
        outliers,
    })
}

/// The weights a [`QuantizedLinear`] stands for, `[rows, width]` in the site's order.
pub fn dequantize(linear: &QuantizedLinear) -> Vec<f32> {
    let grouped = linear.grouped_channels();
    let width = grouped + linear.outlier_channels;
    let mut weights = vec![0.0; linear.rows * width];
    for (row, out) in weights.chunks_mut(width.max(1)).enumerate() {
        let codes = &linear.codes[row * grouped..(row + 1) * grouped];
        for (group, (out, codes)) in
            out.chunks_mut(linear.group_size).zip(codes.chunks(linear.group_size)).enumerate()
        {
            let scale = linear.scale(row, group);
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = linear.levels.value(code) * scale;
            }
        }
        let block = row * linear.outlier_channels..(row + 1) * linear.outlier_channels;
        for (column, out) in block.zip(&mut out[grouped..]) {
            *out = match &linear.outliers {
                OutlierBlock::None => 0.0,
                OutlierBlock::Int8 { codes, scales } => {
                    f32::from(codes[column]) * scales[row].to_f32()
                }
                OutlierBlock::Fp8 { codes, scales } => {
                    e4m3_value(codes[column]) * scales[row].to_f32()
                }
                OutlierBlock::F16(values) => values[column].to_f32(),
            };
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One group of 16 and two outliers, in two rows.
    fn rounded(levels: Levels, rows_per_scale: usize) -> QuantizedLinear {
        let format = WeightFormat {
            bits: 4,
            levels,
            group_size: 16,
            groups: 1,
            rows_per_scale,
            clip: 1.0,
            signed_scales: false,
            outlier_channels: 2,
            outlier_format: OutlierFormat::Fp8,
        };
        let mut weights = [0.0; 36];
        weights[..8].copy_from_slice(&[-6.0, 5.0, 3.5, 2.5, 1.75, -1.25, 0.75, 0.25]);
        weights[16..18].copy_from_slice(&[448.0, -3.1]);
        weights[18..20].copy_from_slice(&[0.5, -12.0]);
        round_to_nearest(&weights, 2, &format).unwrap()
    }

    #[test]
    fn fp4_weights_and_fp8_outliers_are_the_nearest_numbers() {
        let linear = rounded(Levels::Fp4, 1);
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
        let linear = rounded(Levels::Fp4Bnb, 2);
        assert_eq!(linear.scales, [f16::ONE]);
        assert_eq!(linear.codes[..8], [-6, 4, 3, 2, 2, -2, 1, 1]);
        assert_eq!(linear.codes[16..18], [1, -12]);
        assert_eq!(dequantize(&linear)[6..8], [0.0625; 2]);
    }
}
