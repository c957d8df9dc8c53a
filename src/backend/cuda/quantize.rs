/*! Channel order, transform and quantization of activations and weights; the integer product; codes to
and from the host. */

use std::sync::{Arc, PoisonError};

use half::f16;

use super::Cuda;
use super::fused::SiteCodes;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::permute::{Dequantize, Permutation, Permute, Quantize};
use super::slice::{Any, In, Out};
use super::tensor::{
    Activation, Codes, DeviceLinear, DeviceRows, DeviceSite, Layout, OUTLIER_MULTIPLE, Outliers,
    SCALE_MULTIPLE, Weight,
};
use crate::Result;
use crate::backend::Quantization;
use crate::quant::float::{e4m3_bits, e4m3_value};
use crate::quant::grid::Grid;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, OutlierFormat, RowFormat};
use crate::quant::rows::{OutlierRows, QuantizedRows};

/// Rows `[rows, channels]` in the source's order.
pub(super) struct SourceRows<'a> {
    pub(super) values: In<'a, Any>,
    pub(super) element: Float,
    pub(super) rows: usize,
}

/// Where rows `[rows, width]` in a site's order are written.
pub(super) struct PermutedRows<'a> {
    pub(super) values: Out<'a, Any>,
    pub(super) element: Float,
}

impl Weight {
    pub(super) fn source(&self) -> SourceRows<'_> {
        let values = (&*self.data).into();
        SourceRows { values, element: self.element(), rows: self.rows }
    }
}

impl Cuda {
    /// Rows in the site's order, transformed.
    pub(super) fn permute_rows(
        &self,
        from: SourceRows<'_>,
        site: &DeviceSite,
        to: PermutedRows<'_>,
    ) -> Result<()> {
        let format = &site.format;
        let permutation = Permutation::new(format, from.element);
        self.kernels.launch(&Permute {
            x: from.values,
            order: (&*site.order).into(),
            channels: format.channels,
            groups: format.row.groups,
            outliers: format.row.outlier_channels,
            staged: permutation.staged,
            y: to.values,
            permutation,
            to: to.element,
            rows: from.rows,
        })
    }

    /// A weight in the site's order, transformed: f16 or f32.
    pub(super) fn permuted(
        &self,
        weight: &Weight,
        site: &DeviceSite,
        element: Float,
    ) -> Result<Buffer> {
        let to = self.gpu.alloc(element.bytes() * weight.rows * site.format.width())?;
        let values = (&to).into();
        self.permute_rows(weight.source(), site, PermutedRows { values, element })?;
        Ok(to)
    }

    /// Codes of rows in the layout that the products of their site read.
    pub fn quantize(&self, x: &Activation, site: &DeviceSite, name: &str) -> Result<DeviceRows> {
        if self.takes_tiles(&site.format.row)
            && let Some(rows) =
                self.half_rows(x, SiteCodes { site, layout: Layout::Tiled, name })?
        {
            return Ok(rows);
        }
        self.laid_out(self.permuted_codes(x, site, name)?, &site.format.row)
    }

    /// Codes by `permute.cu`, in rows.
    fn permuted_codes(&self, x: &Activation, site: &DeviceSite, name: &str) -> Result<DeviceRows> {
        let format = &site.format;
        let RowFormat { numbers, groups, .. } = format.row;
        let tokens = x.rows;
        let outliers = self.outliers(&format.row, tokens)?;
        let scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
        let rows = DeviceRows {
            layout: Layout::RowMajor,
            format: format.row,
            tokens,
            codes: self.gpu.alloc(tokens * format.row.grouped_channels())?,
            scales: self.gpu.alloc(4 * scale_stride * groups)?,
            scale_stride,
            outliers,
        };
        let (least, greatest) = numbers.limits();
        let permutation = Permutation::new(format, Float::Half).with_format(&format.row);
        let Outliers { codes, scales, values, .. } = &rows.outliers;
        self.kernels.launch(&Quantize {
            x: x.half().into(),
            order: (&*site.order).into(),
            channels: format.channels,
            groups,
            outliers: format.row.outlier_channels,
            padded_outliers: rows.outliers.padded(),
            float_outliers: values.is_some(),
            staged: permutation.staged_of(tokens),
            clip: format.clip,
            top: numbers.top(),
            signed_scales: numbers.has_signs(),
            scale_unit: numbers.scale.unit(),
            least,
            greatest,
            codes: (&rows.codes).into(),
            scales: (&rows.scales).into(),
            scale_stride,
            outlier_codes: codes.as_ref().map(Into::into),
            outlier_scales: scales.as_ref().map(Into::into),
            outlier_values: values.as_ref().map(Into::into),
            bad: self.gpu.error_flag(name)?,
            permutation,
            rows: tokens,
        })?;
        Ok(rows)
    }

    /// Room for the outliers of `rows` rows.
    pub(super) fn outliers(&self, format: &RowFormat, rows: usize) -> Result<Outliers> {
        let channels = format.outlier_channels;
        let padded = channels.next_multiple_of(OUTLIER_MULTIPLE);
        let (codes, scales, values) = match format.outliers() {
            None => (None, None, None),
            Some(OutlierFormat::Int8) => {
                (Some(self.gpu.alloc(rows * padded)?), Some(self.gpu.alloc(4 * rows)?), None)
            }
            Some(OutlierFormat::Fp8) => {
                (None, Some(self.gpu.alloc(4 * rows)?), Some(self.gpu.alloc(4 * rows * channels)?))
            }
            Some(OutlierFormat::F16) => (None, None, Some(self.gpu.alloc(4 * rows * channels)?)),
        };
        Ok(Outliers { channels, codes, scales, values })
    }

    /// Quantized activations on the host.
    pub(super) fn fetch_rows(&self, rows: &DeviceRows) -> Result<QuantizedRows> {
        if rows.layout != Layout::RowMajor {
            return self.fetch_rows(&self.row_major(rows)?);
        }
        let DeviceRows { tokens, format, scale_stride, .. } = *rows;
        let groups = format.groups;
        let codes = rows.codes.download::<i8>(0..tokens * format.grouped_channels())?;
        let scales = rows.scales.download::<f32>(0..4 * scale_stride * groups)?;
        let of_token = |at: usize| scales[at % groups * scale_stride + at / groups];
        let scales = (0..tokens * groups).map(of_token).collect();
        let channels = rows.outliers.channels;
        let Outliers { codes: outlier_codes, scales: outlier_scales, values, .. } = &rows.outliers;
        let outliers = match (outlier_codes, outlier_scales, values) {
            (Some(codes), Some(scales), _) => {
                let padded = rows.outliers.padded();
                let codes = codes.download::<i8>(0..tokens * padded)?;
                let codes = codes.chunks(padded).flat_map(|row| &row[..channels]).copied();
                let scales = scales.download(0..4 * tokens)?;
                OutlierRows::Int8 { codes: codes.collect(), scales }
            }
            (None, Some(_), Some(values)) => {
                OutlierRows::Fp8(values.download(0..4 * tokens * channels)?)
            }
            (_, _, Some(values)) => OutlierRows::F16(values.download(0..4 * tokens * channels)?),
            _ => OutlierRows::None,
        };
        Ok(QuantizedRows { tokens, format, codes, scales, outliers })
    }

    /// Quantized activations from the host.
    pub(super) fn restore_rows(&self, rows: &QuantizedRows) -> Result<DeviceRows> {
        let QuantizedRows { tokens, format, .. } = *rows;
        let RowFormat { groups, outlier_channels, .. } = format;
        let scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
        let mut scales = vec![0f32; scale_stride * groups];
        for (at, scale) in rows.scales.iter().enumerate() {
            scales[at % groups * scale_stride + at / groups] = *scale;
        }
        let mut outliers =
            Outliers { channels: outlier_channels, codes: None, scales: None, values: None };
        match &rows.outliers {
            OutlierRows::None => {}
            OutlierRows::Int8 { codes, scales } => {
                outliers.codes = Some(self.padded_codes(codes, tokens, outlier_channels)?);
                outliers.scales = Some(self.gpu.upload(scales)?);
            }
            OutlierRows::Fp8(values) => {
                // Values have their scale in them; what it was is not needed any more.
                outliers.scales = Some(self.gpu.upload(&vec![1f32; tokens])?);
                outliers.values = Some(self.gpu.upload(values)?);
            }
            OutlierRows::F16(values) => outliers.values = Some(self.gpu.upload(values)?),
        }
        let codes = self.gpu.upload(&rows.codes)?;
        let scales = self.gpu.upload(&scales)?;
        let layout = Layout::RowMajor;
        Ok(DeviceRows { layout, format, tokens, codes, scales, scale_stride, outliers })
    }

    /// INT8 outliers `[rows, channels]` with zeros after each row.
    fn padded_codes(&self, codes: &[i8], rows: usize, channels: usize) -> Result<Buffer> {
        let padded = channels.next_multiple_of(OUTLIER_MULTIPLE);
        let mut wide = vec![0i8; rows * padded];
        for (to, from) in wide.chunks_mut(padded).zip(codes.chunks(channels)) {
            to[..channels].copy_from_slice(from);
        }
        self.gpu.upload(&wide)
    }

    pub(super) fn dequantize(&self, x: &DeviceRows) -> Result<Activation> {
        if x.layout != Layout::RowMajor {
            return self.dequantize(&self.row_major(x)?);
        }
        let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
        let y = self.half(x.tokens, x.format.width())?;
        let outliers = x.outliers.from(0);
        self.kernels.launch(&Dequantize {
            codes: (&x.codes).into(),
            scales: (&x.scales).into(),
            outlier_codes: outliers.codes,
            outlier_scales: outliers.scales,
            outlier_values: outliers.values,
            groups,
            outliers: outlier_channels,
            padded_outliers: x.outliers.padded(),
            rows_per_scale: 1,
            row_stride: 1,
            group_stride: x.scale_stride,
            y: y.half().into(),
            group_size: numbers.group_size,
            rows: x.tokens,
            to: Float::Half,
        })?;
        Ok(y)
    }

    /// The weights that codes stand for `[rows, width]`, in f16 or in f32.
    pub(super) fn dequantized(&self, weight: &DeviceLinear, element: Float) -> Result<Buffer> {
        let LinearFormat { row, rows_per_scale } = weight.format;
        let to = self.gpu.alloc(element.bytes() * weight.rows * row.width())?;
        let outliers = weight.outliers();
        self.kernels.launch(&Dequantize {
            codes: weight.codes(),
            scales: weight.scales(),
            outlier_codes: outliers.codes,
            outlier_scales: outliers.scales,
            outlier_values: outliers.values,
            groups: row.groups,
            outliers: weight.shared.outliers.channels,
            padded_outliers: weight.shared.outliers.padded(),
            rows_per_scale,
            row_stride: row.groups,
            group_stride: 1,
            y: (&to).into(),
            group_size: row.numbers.group_size,
            rows: weight.rows,
            to: element,
        })?;
        Ok(to)
    }

    /// A quantized weight on the host. On a stream of its own.
    pub(super) fn fetch(&self, weight: DeviceLinear) -> Result<QuantizedLinear> {
        let (rows, format) = (weight.rows, weight.format);
        let RowFormat { groups, outlier_channels, .. } = format.row;
        let grouped = format.row.grouped_channels();
        let mut staging = self.downloads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut codes = vec![0i8; rows * grouped];
        let Codes { codes: all, scales: all_scales, outliers, ready } = &*weight.shared;
        staging.after(ready)?;
        staging.download(all, weight.first_row * grouped, bytemuck::cast_slice_mut(&mut codes))?;
        let mut halves = |buffer: &Buffer, first: usize, count: usize| -> Result<Vec<f16>> {
            let mut floats = vec![0f32; count];
            staging.download(buffer, 4 * first, bytemuck::cast_slice_mut(&mut floats))?;
            Ok(floats.into_iter().map(f16::from_f32).collect())
        };
        let scales =
            halves(all_scales, weight.first_scale() * groups, weight.scale_rows() * groups)?;
        let outlier_block = match (&outliers.codes, &outliers.scales, &outliers.values) {
            (Some(all), Some(all_scales), _) => {
                let scales = halves(all_scales, weight.first_row, rows)?;
                let padded = outliers.padded();
                let mut codes = vec![0i8; rows * padded];
                let first = weight.first_row * padded;
                staging.download(all, first, bytemuck::cast_slice_mut(&mut codes))?;
                let codes = codes.chunks(padded).flat_map(|row| &row[..outlier_channels]).copied();
                OutlierBlock::Int8 { codes: codes.collect(), scales }
            }
            (None, Some(all_scales), Some(values)) => {
                let scales = halves(all_scales, weight.first_row, rows)?;
                let mut numbers = vec![0f32; rows * outlier_channels];
                let first = 4 * weight.first_row * outlier_channels;
                staging.download(values, first, bytemuck::cast_slice_mut(&mut numbers))?;
                let rows = numbers.chunks(outlier_channels).zip(&scales);
                // Exact: a value is its number times the scale, without rounding.
                let codes = rows.flat_map(|(row, scale)| {
                    let scale = scale.to_f32();
                    row.iter().map(move |value| match scale {
                        0.0 => 0,
                        scale => e4m3_bits(value / scale),
                    })
                });
                OutlierBlock::Fp8 { codes: codes.collect(), scales }
            }
            (_, _, Some(values)) => {
                let first = weight.first_row * outlier_channels;
                OutlierBlock::F16(halves(values, first, rows * outlier_channels)?)
            }
            _ => OutlierBlock::None,
        };
        Ok(QuantizedLinear { rows, format, codes, scales, outliers: outlier_block })
    }

    pub(super) fn restore(&self, weight: QuantizedLinear) -> Result<DeviceLinear> {
        let QuantizedLinear { rows, format, .. } = weight;
        self.check_codebook(format.row.numbers.codebook)?;
        let channels = format.row.outlier_channels;
        let floats = |values: &[f16]| -> Result<Buffer> {
            self.gpu.upload(&values.iter().map(|value| value.to_f32()).collect::<Vec<_>>())
        };
        let outliers = match &weight.outliers {
            OutlierBlock::None => Outliers { channels: 0, codes: None, scales: None, values: None },
            OutlierBlock::Int8 { codes, scales } => {
                let codes = Some(self.padded_codes(codes, rows, channels)?);
                let scales = Some(floats(scales)?);
                Outliers { channels, codes, scales, values: None }
            }
            OutlierBlock::Fp8 { codes, scales } => {
                let rows = codes.chunks(channels).zip(scales);
                let values: Vec<f32> = rows
                    .flat_map(|(row, scale)| {
                        row.iter().map(|&code| e4m3_value(code) * scale.to_f32())
                    })
                    .collect();
                let (scales, values) = (Some(floats(scales)?), Some(self.gpu.upload(&values)?));
                Outliers { channels, codes: None, scales, values }
            }
            OutlierBlock::F16(values) => {
                Outliers { channels, codes: None, scales: None, values: Some(floats(values)?) }
            }
        };
        let codes = self.gpu.upload(&weight.codes)?;
        let scales = floats(&weight.scales)?;
        let shared = Arc::new(Codes { codes, scales, outliers, ready: self.gpu.mark()? });
        Ok(DeviceLinear { format, first_row: 0, rows, shared, lost: None })
    }

    /// The ratio of scale to absmax of INT8 and FP8 outliers.
    pub(super) fn outlier_ratio(format: OutlierFormat) -> f32 {
        let grid = if format == OutlierFormat::Fp8 { Grid::fp8() } else { Grid::int8() };
        grid.ratio()
    }
}
