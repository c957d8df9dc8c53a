/*! CrossCovariance-covariances `y^T x`, and the correction of weights for the accumulated error. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::gptq::{AddReversed, ReverseColumns, Subtract};
use super::product::{Operand, Precision, Product};
use super::tensor::{Activation, CrossCovariance, Factor, Hessian};
use crate::Result;
use crate::backend::{AccumulatedError, ErrorKind};

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

    /// `W += share (W C) H^-1`, or `W += share (C - W H) H^-1`, for `weights` `[rows, n]`, permuted, as the kind of error says.
    pub(super) fn correct(
        &self,
        weights: &Buffer,
        rows: usize,
        error: &AccumulatedError<CrossCovariance>,
        hessian: &Hessian,
        factor: &Factor,
    ) -> Result<()> {
        let n = factor.n;
        let AccumulatedError { cross, kind, share } = error;
        let expected = if *kind == ErrorKind::Inputs { n } else { rows };
        let found = [cross.rows, cross.columns, hessian.n];
        assert_eq!(found, [expected, n, n], "shapes of the accumulated error and the weights");
        let times = |right: &Buffer| -> Result<Buffer> {
            let product = self.gpu.alloc(4 * rows * n)?;
            let operand = |memory| Operand { memory, stride: n, transposed: false };
            self.products.run(&Product {
                m: n,
                n: rows,
                k: n,
                a: operand(right.into()),
                b: operand(weights.into()),
                c: operand((&product).into()),
                add: false,
                precision: Precision::Tensor32,
            })?;
            Ok(product)
        };
        let wanted = match kind {
            ErrorKind::Inputs => times(&cross.data)?,
            ErrorKind::Outputs => {
                let wanted = self.gpu.alloc(4 * rows * n)?;
                wanted.copy_from(&cross.data, 4 * rows * n)?;
                let own = times(&hessian.data)?;
                let count = (rows * n) as i64;
                self.kernels.launch(&Subtract { x: (&wanted).into(), y: (&own).into(), count })?;
                wanted
            }
        };
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
