/*! Sums of `y^T x`, and the correction of weights by them. */

use super::gpu::Buffer;
use super::launch::{Geometry, arguments};
use super::product::{Operand, Precision, Product};
use super::tensor::{Activation, Cross, Factor};
use super::{Cuda, THREADS};
use crate::Result;
use crate::backend::AccumulatedError;

impl Cuda {
    /// `C += y^T x`. In column-major order it is `X Y^T` with `X` `[columns, tokens]`.
    pub(super) fn add_cross_covariance(
        &self,
        cross: &Cross,
        y: &Activation,
        x: &Activation,
    ) -> Result<()> {
        let Cross { rows, columns, ref data } = *cross;
        assert!(y.columns == rows && x.columns == columns && x.rows == y.rows, "shapes of a sum");
        let operand = |pointer, stride, transposed| Operand { pointer, stride, transposed };
        self.products.run(&Product {
            m: columns,
            n: rows,
            k: x.rows,
            a: operand(x.half().pointer(), columns, false),
            b: operand(y.half().pointer(), rows, true),
            c: operand(data.pointer(), columns, false),
            add: true,
            precision: Precision::HalfToFloat,
        })
    }

    /// `W += share (W C_in + C_out) H^-1` for `weights` `[rows, n]`, arranged.
    pub(super) fn correct(
        &self,
        weights: &Buffer,
        rows: usize,
        drift: &AccumulatedError<Cross>,
        factor: &Factor,
    ) -> Result<()> {
        let n = factor.n;
        let AccumulatedError { inputs, outputs, share } = drift;
        assert!(inputs.rows == n && inputs.columns == n, "channels of the drift and the factor");
        let wanted = match outputs {
            None => self.gpu.zeros(4 * rows * n)?,
            Some(outputs) => {
                assert!(outputs.rows == rows && outputs.columns == n, "outputs of the drift");
                let wanted = self.gpu.alloc(4 * rows * n)?;
                wanted.copy_from(&outputs.data, 4 * rows * n)?;
                wanted
            }
        };
        let operand =
            |buffer: &Buffer| Operand { pointer: buffer.pointer(), stride: n, transposed: false };
        self.products.run(&Product {
            m: n,
            n: rows,
            k: n,
            a: operand(&inputs.data),
            b: operand(weights),
            c: operand(&wanted),
            add: true,
            precision: Precision::Tensor32,
        })?;
        // The factor is of the reversed Hessian: J H J = L L^T, so H^-1 w = J (L L^T)^-1 J w.
        let geometry =
            Geometry { grid: (rows, n.div_ceil(THREADS), 1), threads: THREADS, shared_bytes: 0 };
        let reversed = self.gpu.alloc(4 * rows * n)?;
        self.launch("gptq", "reverse_columns", geometry, arguments![&wanted, n, &reversed])?;
        drop(wanted);
        self.products.solve(&factor.data, n, &reversed, rows)?;
        self.launch("gptq", "add_reversed", geometry, arguments![weights, &reversed, n, *share])
    }
}
