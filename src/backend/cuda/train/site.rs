//! Backward of a site and its linears.

use super::{Floats, Sum};
use crate::Result;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::gpu::Buffer;
use crate::backend::cuda::kernels::Float;
use crate::backend::cuda::kernels::permute::Dequantize;
use crate::backend::cuda::kernels::train::{
    OutlierGradients, PART_ROWS, PermutationBackward, QuantizerBackward, ScaleGradients,
};
use crate::backend::cuda::quantize::{PermutedRows, SourceRows};
use crate::backend::cuda::slice::In;
use crate::backend::cuda::tensor::{
    Activation, DeviceLinear, DeviceRows, DeviceSite, Hidden, Layout,
};
use crate::backend::{LinearGradient, SiteGradient, TrainedLinear};
use crate::quant::hadamard;
use crate::quant::site::Transform;

impl Cuda {
    /// [`site_backward`](crate::backend::Train::site_backward).
    pub(super) fn linears_backward(
        &self,
        site: &DeviceSite,
        linears: &[TrainedLinear<'_, Self>],
        (x, rows): (&Activation, Option<&DeviceRows>),
        d_outputs: &[Hidden],
    ) -> Result<(Hidden, SiteGradient)> {
        let (tokens, width) = (x.rows, site.format.width());
        let permuted = self.permuted_floats(x, site)?;
        let by_rows = match rows {
            Some(rows) if rows.layout != Layout::RowMajor => Some(self.row_major(rows)?),
            _ => None,
        };
        let rows = by_rows.as_ref().or(rows);
        let values = rows.map(|rows| self.dequantized_rows(rows)).transpose()?;
        let read = values.as_ref().unwrap_or(&permuted);
        let d_values = self.gpu.alloc(4 * tokens * width)?;
        let mut gradient = SiteGradient::default();
        for (number, (linear, d_y)) in linears.iter().zip(d_outputs).enumerate() {
            let sum = if number > 0 { Sum::Added } else { Sum::Fresh };
            let outputs = d_y.columns;
            let weights = match linear {
                TrainedLinear::Quantized(linear) => self.dequantized(linear, Float::Single)?,
                TrainedLinear::Unquantized(dense) => {
                    self.widened_halves(In::from(&*dense.data), dense.rows * dense.columns)?
                }
            };
            let d_y = Floats::new(d_y.float(), outputs);
            let to = Floats::new(&d_values, width);
            self.times(d_y, Floats::new(&weights, width), to, [tokens, outputs, width], sum)?;
            gradient.linears.push(match linear {
                TrainedLinear::Unquantized(_) => LinearGradient::default(),
                TrainedLinear::Quantized(linear) => {
                    // In place of the weights, which are as large.
                    let (products, read) = (Floats::new(&weights, width), Floats::new(read, width));
                    let shape = [outputs, tokens, width];
                    self.transposed_times(d_y, read, products, shape, Sum::Fresh)?;
                    self.scale_gradients(linear, &weights)?
                }
            });
        }
        if let Some(rows) = rows {
            gradient.clips = self.quantizer_backward(site, &permuted, rows, &d_values)?;
        }
        Ok((self.permutation_backward(site, &d_values, tokens)?, gradient))
    }

    /// In the site's order, transformed, in f32.
    fn permuted_floats(&self, x: &Activation, site: &DeviceSite) -> Result<Buffer> {
        let to = self.gpu.alloc(4 * x.rows * site.format.width())?;
        let from = SourceRows { values: x.half().into(), element: Float::Half, rows: x.rows };
        let element = Float::Single;
        self.permute_rows(from, site, PermutedRows { values: (&to).into(), element })?;
        Ok(to)
    }

    /// The values of row-major codes, in f32.
    fn dequantized_rows(&self, x: &DeviceRows) -> Result<Buffer> {
        let y = self.gpu.alloc(4 * x.tokens * x.format.width())?;
        let outliers = x.outliers.from(0);
        self.kernels.launch(&Dequantize {
            codes: (&x.codes).into(),
            scales: (&x.scales).into(),
            outlier_codes: outliers.codes,
            outlier_scales: outliers.scales,
            outlier_values: outliers.values,
            groups: x.format.groups,
            outliers: x.format.outlier_channels,
            padded_outliers: x.outliers.padded(),
            rows_per_scale: 1,
            row_stride: 1,
            group_stride: x.scale_stride,
            y: (&y).into(),
            group_size: x.format.numbers.group_size,
            rows: x.tokens,
            to: Float::Single,
        })?;
        Ok(y)
    }

    /// Gradients of a linear's scales from those of its weights, `[rows, width]`.
    fn scale_gradients(&self, linear: &DeviceLinear, products: &Buffer) -> Result<LinearGradient> {
        let row = linear.format.row;
        let (rows, groups, width) = (linear.rows, row.groups, row.width());
        let count = linear.scale_rows() * groups;
        let scales = self.gpu.alloc(4 * count)?;
        self.kernels.launch(&ScaleGradients {
            d: products.into(),
            codes: linear.codes(),
            rows,
            width,
            groups,
            group_size: row.numbers.group_size,
            rows_per_scale: linear.format.rows_per_scale,
            to: (&scales).into(),
        })?;
        let outliers = linear.outliers();
        let mut outlier_scales = Vec::new();
        if let Some(own) = outliers.scales {
            let to = self.gpu.alloc(4 * rows)?;
            self.kernels.launch(&OutlierGradients {
                d: products.into(),
                codes: outliers.codes,
                padded: linear.shared.outliers.padded(),
                values: outliers.values,
                scales: Some(own),
                rows,
                width,
                outliers: row.outlier_channels,
                to: (&to).into(),
            })?;
            outlier_scales = to.download(0..4 * rows)?;
        }
        Ok(LinearGradient { scales: scales.download(0..4 * count)?, outlier_scales })
    }

    /// Passes `d_values` back through the quantizer, and returns the clip ratio's gradient by groups.
    fn quantizer_backward(
        &self,
        site: &DeviceSite,
        permuted: &Buffer,
        rows: &DeviceRows,
        d_values: &Buffer,
    ) -> Result<Vec<f32>> {
        let numbers = site.format.row.numbers;
        let (tokens, groups) = (rows.tokens, site.format.row.groups);
        let (least, greatest) = numbers.limits();
        let count = tokens.div_ceil(PART_ROWS);
        let parts = self.gpu.alloc(8 * count * groups)?;
        self.kernels.launch(&QuantizerBackward {
            x: permuted.into(),
            codes: (&rows.codes).into(),
            scales: (&rows.scales).into(),
            stride: rows.scale_stride,
            d: d_values.into(),
            tokens,
            width: site.format.width(),
            groups,
            group_size: numbers.group_size,
            least,
            greatest,
            clip: site.format.clip,
            parts: (&parts).into(),
        })?;
        self.part_sums(&parts, count, groups)
    }

    fn permutation_backward(
        &self,
        site: &DeviceSite,
        d_values: &Buffer,
        tokens: usize,
    ) -> Result<Hidden> {
        let format = &site.format;
        let group_size = format.row.numbers.group_size;
        let block = hadamard::block(group_size);
        let d_x = self.gpu.alloc(4 * tokens * format.channels)?;
        let scale = match format.transform {
            Transform::Hadamard => (1.0 / (block as f64).sqrt()) as f32,
            Transform::None => 0.0,
        };
        self.kernels.launch(&PermutationBackward {
            d: d_values.into(),
            order: (&*site.order).into(),
            width: format.width(),
            channels: format.channels,
            grouped: format.row.groups * group_size,
            block,
            scale,
            to: (&d_x).into(),
            rows: tokens,
        })?;
        Ok(Hidden::new(tokens, format.channels, d_x))
    }
}
