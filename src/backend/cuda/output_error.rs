/*! What quantization costs in a linear's outputs: by the Hessian, or by channel energies. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::gptq::Subtract;
use super::kernels::permute::{EnergyErrors, Permutation};
use super::kernels::reduce::DotParts;
use super::product::{Operand, Precision, Product};
use super::slice::In;
use super::tensor::{DeviceLinear, DeviceSite, Hessian, Weight};
use crate::Result;
use crate::backend;

/// Rows of weights whose product with the Hessian is held together.
const ERROR_ROWS: usize = 4096;
/// Partial sums of a dot product.
const PARTS: usize = 512;

impl Cuda {
    /// `sqrt(tr(E H E^T) / tr(W H W^T))`. A sweep has computed the first; for the second, which is only
    /// reported, the tensor cores are precise enough.
    pub(super) fn output_error(
        &self,
        hessian: &Hessian,
        site: &DeviceSite,
        weight: &Weight,
        quantized: &DeviceLinear,
    ) -> Result<f64> {
        let original = self.permuted(weight, site, Float::Single)?;
        let total = self.energy_of(&original, weight.rows, hessian, Precision::Tensor32)?;
        let lost = match quantized.lost {
            Some(lost) => lost,
            None => {
                let error = self.dequantized(quantized, Float::Single)?;
                let count = weight.rows * hessian.n;
                self.kernels.launch(&Subtract {
                    x: (&error).into(),
                    y: (&original).into(),
                    count: count as i64,
                })?;
                self.energy_of(&error, weight.rows, hessian, Precision::Float)?
            }
        };
        backend::output_error(lost, total)
    }

    /// `tr(W H W^T)` for `weights` `[rows, n]` in f32; the Hessian is mirrored.
    fn energy_of(
        &self,
        weights: &Buffer,
        rows: usize,
        hessian: &Hessian,
        precision: Precision,
    ) -> Result<f64> {
        let n = hessian.n;
        let product = self.gpu.alloc(4 * n * rows.min(ERROR_ROWS))?;
        let parts = self.gpu.alloc(8 * PARTS)?;
        let mut sum = 0.0;
        for first in (0..rows).step_by(ERROR_ROWS) {
            let rows = ERROR_ROWS.min(rows - first);
            let operand = |memory| Operand { memory, stride: n, transposed: false };
            self.products.run(&Product {
                m: n,
                n: rows,
                k: n,
                a: operand((&hessian.data).into()),
                b: operand(In::from(weights).skip(4 * first * n)),
                c: operand((&product).into()),
                add: false,
                precision,
            })?;
            self.kernels.launch(&DotParts {
                a: (&product).into(),
                b: In::from(weights).skip(first * n),
                count: (rows * n) as i64,
                parts: (&parts).into(),
                part_count: PARTS,
            })?;
            sum += parts.download::<f64>(0..8 * PARTS)?.iter().sum::<f64>();
        }
        Ok(sum)
    }

    /// The relative output error of uncorrelated channels, from energies.
    pub(super) fn energy_error(
        &self,
        energy: &[f64],
        site: &DeviceSite,
        weight: &Weight,
        quantized: &DeviceLinear,
    ) -> Result<f64> {
        let format = &site.format;
        let energy = self.gpu.upload(energy)?;
        let sums = self.gpu.alloc(16 * weight.rows)?;
        let outliers = quantized.outliers();
        let permutation = Permutation::new(format, weight.element());
        self.kernels.launch(&EnergyErrors {
            x: (&*weight.data).into(),
            order: (&*site.order).into(),
            channels: format.channels,
            groups: format.row.groups,
            outliers: format.row.outlier_channels,
            padded_outliers: quantized.shared.outliers.padded(),
            staged: permutation.staged,
            codes: quantized.codes(),
            scales: quantized.scales(),
            outlier_codes: outliers.codes,
            outlier_scales: outliers.scales,
            outlier_values: outliers.values,
            rows_per_scale: quantized.format.rows_per_scale,
            energy: (&energy).into(),
            sums: (&sums).into(),
            permutation,
            rows: weight.rows,
        })?;
        let sums = sums.download::<f64>(0..16 * weight.rows)?;
        let (lost, total) =
            sums.chunks(2).fold((0.0, 0.0), |(lost, total), row| (lost + row[0], total + row[1]));
        Ok(if total > 0.0 { (lost / total).sqrt() } else { 0.0 })
    }
}
