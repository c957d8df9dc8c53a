/*! Channel order, transform and quantization of activations and weights; the integer product; codes to
and from the host. */

use std::sync::{Arc, PoisonError};

use half::f16;

use super::gpu::Buffer;
use super::kernels::{self, Defines};
use super::launch::{Argument, Geometry, arguments};
use super::product::Precision;
use super::tensor::{
    Activation, Codes, Layout, OUTLIER_MULTIPLE, Outliers, Quantized, Rows, SCALE_MULTIPLE, Site,
    Weight,
};
use super::{Cuda, THREADS};
use crate::Result;
use crate::backend::Quantization;
use crate::quant::float::{e4m3_bits, e4m3_value};
use crate::quant::grid::Grid;
use crate::quant::levels::Levels;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, OutlierFormat, RowFormat};
use crate::quant::rows::{OutlierRows, QuantizedRows};
use crate::quant::site::{SiteFormat, Transform};

/// Shared memory that a row may be staged in: eight blocks of threads fit an SM beside each other.
const STAGED_BYTES: usize = 24 << 10;
/// Groups that are worked on in registers; arrange.cu has the same list.
const IN_REGISTERS: [usize; 6] = [32, 64, 128, 256, 512, 1024];
/// Groups of which `quantize` takes two rows of 16-bit values a block, as arrange.cu says.
const PAIRED: [usize; 4] = [32, 64, 128, 256];
/// Shared memory that two rows may be staged in: three blocks of threads fit an SM of 228 KiB beside
/// each other, one an SM of 100 KiB.
const PAIR_BYTES: usize = 64 << 10;
/// Shared memory of a block where groups are worked on there.
const GROUP_BYTES: usize = 96 << 10;

/// How arrange.cu is compiled and launched for a site.
pub(super) struct Arranging {
    pub(super) defines: Defines,
    threads: usize,
    shared_bytes: usize,
    /// Whether a row is staged in shared memory.
    pub(super) staged: i32,
    /// Shared memory of a pair of rows, where `quantize` takes two a block.
    pair_bytes: Option<usize>,
}

impl Arranging {
    /// `element` is the type of the rows.
    pub(super) fn new(format: &SiteFormat, element: &str) -> Self {
        let hadamard = format.transform == Transform::Hadamard;
        let row_bytes = format.channels * if element == "float" { 4 } else { 2 };
        let group_size = format.row.numbers.group_size;
        let (threads, group_bytes) = if IN_REGISTERS.contains(&group_size) {
            (THREADS, 0)
        } else {
            // As many warps as there is room for their groups.
            let warps = (GROUP_BYTES / (4 * group_size)).clamp(1, THREADS / 32);
            (32 * warps, 4 * group_size * warps)
        };
        let staged = row_bytes <= STAGED_BYTES;
        let row_bytes = if staged { row_bytes.next_multiple_of(16) } else { 0 };
        // A word a channel, and sixteen bytes before the first.
        let pair_bytes = 4 * (format.channels.next_multiple_of(4) + 4);
        let paired = element != "float" && PAIRED.contains(&group_size) && pair_bytes <= PAIR_BYTES;
        Self {
            defines: kernels::arrange(group_size, hadamard, element, threads, paired),
            threads,
            shared_bytes: row_bytes + group_bytes,
            staged: i32::from(staged),
            pair_bytes: paired.then_some(pair_bytes),
        }
    }

    pub(super) fn geometry(&self, rows: usize) -> Geometry {
        Geometry { grid: (rows, 1, 1), threads: self.threads, shared_bytes: self.shared_bytes }
    }

    /// How `quantize` is launched, and its argument `staged`: where it takes two rows a block, how many
    /// there are.
    fn quantizing(&self, rows: usize) -> (Geometry, Argument) {
        match self.pair_bytes {
            Some(shared_bytes) => {
                let grid = (rows.div_ceil(2), 1, 1);
                (Geometry { grid, threads: self.threads, shared_bytes }, rows.into())
            }
            None => (self.geometry(rows), self.staged.into()),
        }
    }
}

impl Cuda {
    /// Rows `[rows, channels]` of type `element` in the site's order, transformed, as f16 or f32.
    pub(super) fn arrange_rows(
        &self,
        x: u64,
        element: &str,
        rows: usize,
        site: &Site,
        to: u64,
        to_element: &str,
    ) -> Result<()> {
        let format = &site.format;
        let arranging = Arranging::new(format, element);
        self.kernels.launch(
            "arrange",
            &arranging.defines,
            &format!("arrange_to_{to_element}"),
            arranging.geometry(rows),
            arguments![
                x,
                &*site.order,
                format.channels,
                format.row.groups,
                format.row.outlier_channels,
                arranging.staged,
                to
            ],
        )
    }

    /// A weight in the site's order, transformed: f16 or f32.
    pub(super) fn arranged(
        &self,
        weight: &Weight,
        site: &Site,
        precision: Precision,
    ) -> Result<Buffer> {
        let (bytes, element) =
            if precision == Precision::HalfToHalf { (2, "half") } else { (4, "float") };
        let to = self.gpu.alloc(bytes * weight.rows * site.format.width())?;
        self.arrange_rows(
            weight.data.pointer(),
            weight.kind(),
            weight.rows,
            site,
            to.pointer(),
            element,
        )?;
        Ok(to)
    }

    /// Codes of rows in the layout that the products of their site read.
    pub fn quantize(&self, x: &Activation, site: &Site, name: &str) -> Result<Rows> {
        if self.takes_tiles(&site.format.row)
            && let Some(rows) = self.half_rows(x, site, Layout::Tiled, name)?
        {
            return Ok(rows);
        }
        self.laid_out(self.arranged_codes(x, site, name)?, &site.format.row)
    }

    /// Codes by `arrange.cu`, in rows.
    fn arranged_codes(&self, x: &Activation, site: &Site, name: &str) -> Result<Rows> {
        let format = &site.format;
        let RowFormat { numbers, groups, .. } = format.row;
        let tokens = x.rows;
        let outliers = self.outliers(&format.row, tokens)?;
        let scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
        let rows = Rows {
            layout: Layout::RowMajor,
            format: format.row,
            tokens,
            codes: self.gpu.alloc(tokens * format.row.grouped_channels())?,
            scales: self.gpu.alloc(4 * scale_stride * groups)?,
            scale_stride,
            outliers,
        };
        let (least, greatest) = numbers.limits();
        let arranging = Arranging::new(format, "half");
        let (geometry, staged) = arranging.quantizing(tokens);
        let fp8 = format.row.outlier_format == OutlierFormat::Fp8;
        let formats = kernels::formats(numbers.levels == Levels::Fp4, fp8);
        self.kernels.launch(
            "arrange",
            &[arranging.defines, formats].concat(),
            "quantize",
            geometry,
            arguments![
                x.half(),
                &*site.order,
                format.channels,
                format.row.groups,
                format.row.outlier_channels,
                rows.outliers.padded(),
                i32::from(rows.outliers.values.is_some()),
                staged,
                format.clip,
                numbers.top(),
                i32::from(numbers.has_signs()),
                least,
                greatest,
                &rows.codes,
                &rows.scales,
                scale_stride,
                rows.outliers.codes.as_ref(),
                rows.outliers.scales.as_ref(),
                rows.outliers.values.as_ref(),
                self.gpu.fault_cell(name)?
            ],
        )?;
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
    pub(super) fn fetch_rows(&self, rows: &Rows) -> Result<QuantizedRows> {
        if rows.layout != Layout::RowMajor {
            return self.fetch_rows(&self.row_major(rows)?);
        }
        let Rows { tokens, format, scale_stride, .. } = *rows;
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
    pub(super) fn restore_rows(&self, rows: &QuantizedRows) -> Result<Rows> {
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
        Ok(Rows { layout, format, tokens, codes, scales, scale_stride, outliers })
    }

    /// INT8 outliers `[rows, channels]` with zeros behind each row.
    fn padded_codes(&self, codes: &[i8], rows: usize, channels: usize) -> Result<Buffer> {
        let padded = channels.next_multiple_of(OUTLIER_MULTIPLE);
        let mut wide = vec![0i8; rows * padded];
        for (to, from) in wide.chunks_mut(padded).zip(codes.chunks(channels)) {
            to[..channels].copy_from_slice(from);
        }
        self.gpu.upload(&wide)
    }

    pub(super) fn dequantize(&self, x: &Rows) -> Result<Activation> {
        if x.layout != Layout::RowMajor {
            return self.dequantize(&self.row_major(x)?);
        }
        let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
        let y = self.half(x.tokens, x.format.width())?;
        let outliers = [&x.outliers.codes, &x.outliers.scales, &x.outliers.values]
            .map(|buffer| buffer.as_ref().map_or(0, Buffer::pointer));
        self.launch_dequantize(
            numbers.group_size,
            x.tokens,
            [x.codes.pointer(), x.scales.pointer()],
            outliers,
            [groups, outlier_channels, x.outliers.padded(), 1, 1, x.scale_stride],
            y.half(),
            "half",
        )?;
        Ok(y)
    }

    /// The weights that codes stand for `[rows, width]`, in f16 or in f32.
    pub(super) fn dequantized(&self, weight: &Quantized, half: bool) -> Result<Buffer> {
        let LinearFormat { row, rows_per_scale } = weight.format;
        let RowFormat { numbers, groups, .. } = row;
        let (bytes, element) = if half { (2, "half") } else { (4, "float") };
        let to = self.gpu.alloc(bytes * weight.rows * row.width())?;
        let outliers = &weight.shared.outliers;
        self.launch_dequantize(
            numbers.group_size,
            weight.rows,
            [weight.codes(), weight.scales()],
            weight.outliers(),
            [groups, outliers.channels, outliers.padded(), rows_per_scale, groups, 1],
            &to,
            element,
        )?;
        Ok(to)
    }

    /// `sizes`: groups, outliers, padded outliers, rows a scale, and the scales' strides from row to
    /// row and from group to group.
    #[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
    fn launch_dequantize(
        &self,
        group_size: usize,
        rows: usize,
        [codes, scales]: [u64; 2],
        [outlier_codes, outlier_scales, outlier_values]: [u64; 3],
        [groups, outliers, padded, rows_per_scale, row_stride, group_stride]: [usize; 6],
        to: &Buffer,
        element: &str,
    ) -> Result<()> {
        // The transform and the type of rows play no part on the way back.
        let defines = kernels::arrange(group_size, false, "half", THREADS, false);
        self.kernels.launch(
            "arrange",
            &defines,
            &format!("dequantize_to_{element}"),
            Geometry::line(rows, THREADS),
            arguments![
                codes,
                scales,
                outlier_codes,
                outlier_scales,
                outlier_values,
                groups,
                outliers,
                padded,
                rows_per_scale,
                row_stride,
                group_stride,
                to
            ],
        )
    }

    /// A quantized weight on the host. On the stream beside the kernels.
    pub(super) fn fetch(&self, weight: Quantized) -> Result<QuantizedLinear> {
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

    pub(super) fn restore(&self, weight: QuantizedLinear) -> Result<Quantized> {
        let QuantizedLinear { rows, format, .. } = weight;
        self.check_levels(format.row.numbers.levels)?;
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
        Ok(Quantized { format, first_row: 0, rows, shared, lost: None })
    }

    /// The ratio of scale to absmax of INT8 and FP8 outliers.
    pub(super) fn outlier_ratio(format: OutlierFormat) -> f32 {
        let grid = if format == OutlierFormat::Fp8 { Grid::fp8() } else { Grid::rounding(8, 1.0) };
        grid.ratio()
    }
}
