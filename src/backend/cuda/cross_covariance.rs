/*! CrossCovariance-covariances `y^T x`, and the correction of weights for the accumulated error. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::gptq::{AddReversed, ReverseColumns};
use super::product::{Operand, Precision, Product};
use super::tensor::{Activation, CrossCovariance, Factor};
use crate::Result;
use crate::backend::AccumulatedError;

impl Cuda {
    /// `C += y^T x`. In column-major order it is `X Y^T` with `X` `[columns, tokens]`.
    pub(super) fn add_cross_covariance(
        &self,
        cross: &CrossCovariance,
        y: &Activation,
        x: &Activation,
    ) -> Result<()> {
        let CrossCovariance { rows, columns, ref data } = *cross;
        assert!(
            y.columns == rows && x.columns == columns && x.rows == y.rows,
            "shapes of a cross-covariance"
        );
        let operand = |memory, stride, transposed| Operand { memory, stride, transposed };
        self.products.run(&Product {
            m: columns,
            n: rows,
            k: x.rows,
            a: operand(x.half().into(), columns, false),
            b: operand(y.half().into(), rows, true),
            c: operand(data.into(), columns, false),
            add: true,
            precision: Precision::HalfToFloat,
        })
    }

    /// `W += share (W C_in + C_out) H^-1` for `weights` `[rows, n]`, permuted.
    pub(super) fn correct(
        &self,
        weights: &Buffer,
        rows: usize,
        error: &AccumulatedError<CrossCovariance>,
        factor: &Factor,
    ) -> Result<()> {
        let n = factor.n;
        let AccumulatedError { inputs, outputs, share } = error;
        assert!(
            inputs.rows == n && inputs.columns == n,
            "channels of the accumulated error and the factor"
        );
        let wanted = match outputs {
            None => self.gpu.zeros(4 * rows * n)?,
            Some(outputs) => {
                assert!(
                    outputs.rows == rows && outputs.columns == n,
                    "outputs of the accumulated error"
                );
                let wanted = self.gpu.alloc(4 * rows * n)?;
                wanted.copy_from(&outputs.data, 4 * rows * n)?;
                wanted
            }
        };
        let operand = |memory| Operand { memory, stride: n, transposed: false };
        self.products.run(&Product {
            m: n,
            n: rows,
            k: n,
            a: operand((&inputs.data).into()),
            b: operand(weights.into()),
            c: operand((&wanted).into()),
            add: true,
            precision: Precision::Tensor32,
        })?;
        // The factor is of the reversed Hessian: J H J = L L^T, so H^-1 w = J (L L^T)^-1 J w.
        let reversed = self.gpu.alloc(4 * rows * n)?;
        self.kernels.launch(&ReverseColumns {
            x: (&wanted).into(),
            n,
            to: (&reversed).into(),
            rows,
        })?;
        drop(wanted);
        self.solver.solve(&factor.data, n, &reversed, rows)?;
        self.kernels.launch(&AddReversed {
            weights: weights.into(),
            change: (&reversed).into(),
            n,
            share: *share,
            rows,
        })
    }
}
