/*! Gram matrices `sum x^T x` on the tensor cores, and their Cholesky factors. */

use super::Cuda;
use super::kernels::gptq::{Diagonal, Divisors, Flip, Mirror, UnitUpper};
use super::product::{Operand, Precision, Product};
use super::slice::In;
use super::tensor::{Activation, Factor, Hessian};
use crate::Result;
use crate::backend::Damping;
use crate::quant::gptq::DAMPING_LADDER;

/// Columns that are accumulated by one product, down to the matrix's last row: half of the work above
/// the diagonal is left out, and each product still fills the device.
const STRIP: usize = 2048;
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
            if !self.solver.cholesky(&data, n)? {
                continue;
            }
            // The diagonal's buffer is free again.
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
}
