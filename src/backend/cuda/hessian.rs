/*! `sum x^T x` on the tensor cores, its factor, and quadratic forms with it. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::gptq::{Diagonal, Divisors, Flip, Mirror, Subtract, UnitUpper};
use super::kernels::reduce::DotParts;
use super::product::{Operand, Precision, Product};
use super::slice::In;
use super::tensor::{Activation, Factor, Hessian, Quantized, Site, Weight};
use crate::Result;
use crate::backend::{self, Damping};
use crate::quant::gptq::DAMPING_LADDER;

/// Columns that are accumulated by one product, down to the matrix's last row: half of the work above
/// the diagonal is left out, and each product still fills the device.
const STRIP: usize = 2048;
/// Rows of weights whose product with the Hessian is held at once.
const ERROR_ROWS: usize = 4096;
/// Partial sums of a dot product.
const PARTS: usize = 512;

impl Cuda {
    /// `H += x^T x`. In column-major order `x` is `X` `[channels, tokens]`, and a strip of columns of
    /// `X X^T` from its diagonal down is the upper triangle's rows in ours.
    pub(super) fn add_gram(&self, hessian: &Hessian, x: &Activation) -> Result<()> {
        let n = hessian.n;
        assert_eq!(x.columns, n, "channels of x and of H");
        for first in (0..n).step_by(STRIP) {
            let columns = STRIP.min(n - first);
            let memory = In::from(x.half()).skip(2 * first);
            let operand = |transposed| Operand { memory, stride: n, transposed };
            self.products.run(&Product {
                m: n - first,
                n: columns,
                k: x.rows,
                a: operand(false),
                b: operand(true),
                c: Operand {
                    memory: In::from(&hessian.data).skip(4 * (first * n + first)),
                    stride: n,
                    transposed: false,
                },
                add: true,
                precision: Precision::HalfToFloat,
            })?;
        }
        Ok(())
    }

    pub(super) fn cholesky(
        &self,
        hessian: &Hessian,
        damping: f32,
    ) -> Result<Option<(Factor, Damping)>> {
        let n = hessian.n;
        let h = &hessian.data;
        self.kernels.launch(&Mirror { h: h.into(), n })?;
        let diagonal = self.gpu.alloc(4 * n)?;
        self.kernels.launch(&Diagonal { h: h.into(), n, to: (&diagonal).into() })?;
        let values = diagonal.download::<f32>(0..4 * n)?;
        let live = values.iter().map(|&value| f64::from(if value > 0.0 { value } else { 1.0 }));
        let mean = live.sum::<f64>() / n as f64;
        if !mean.is_finite() {
            return Ok(None);
        }
        let data = self.gpu.alloc(4 * n * n)?;
        for (failures, step) in DAMPING_LADDER.iter().enumerate() {
            let share = damping * step;
            let damp = (f64::from(share) * mean) as f32;
            self.kernels.launch(&Flip { h: h.into(), n, damp, to: (&data).into() })?;
            if !self.products.cholesky(&data, n)? {
                continue;
            }
            // The diagonal's buffer has served.
            self.kernels.launch(&Divisors { l: (&data).into(), n, to: (&diagonal).into() })?;
            let divisors = diagonal.download::<f32>(0..4 * n)?;
            if divisors.iter().all(|value| value.is_finite() && *value > 0.0) {
                self.kernels.launch(&UnitUpper {
                    l: (&data).into(),
                    divisors: (&diagonal).into(),
                    n,
                })?;
                let factor = Factor { n, data, pivots: diagonal, damp };
                return Ok(Some((factor, Damping { share, failures })));
            }
        }
        Ok(None)
    }

    /// `sqrt(tr(E H E^T) / tr(W H W^T))`. A sweep has found the first; the second is a number to be
    /// read, for which the tensor cores are precise enough.
    pub(super) fn output_error(
        &self,
        hessian: &Hessian,
        site: &Site,
        weight: &Weight,
        quantized: &Quantized,
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
}
