//! Gram matrices, cross-covariances and other sums over calibration tokens. The larger operations stand in files of their
//! own, under the same names.

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::elementwise::{AddFloat, Difference, ScaleRows};
use super::tensor::{Activation, CrossCovariance, Hessian, Hidden};
use crate::Result;
use crate::backend::{AttentionSpec, Calibration};

impl Calibration for Cuda {
    type Gram = Hessian;
    type CrossCovariance = CrossCovariance;

    fn add_energy(&self, x: &Activation, energy: &mut [f64]) -> Result<()> {
        self.add_energy(x, energy)
    }

    fn add_key_sums(&self, spec: &AttentionSpec, k: &Activation, sums: &mut [f64]) -> Result<()> {
        self.add_key_sums(spec, k, sums)
    }

    fn gram(&self, channels: usize) -> Result<Hessian> {
        Ok(Hessian { n: channels, data: self.gpu.zeros(4 * channels * channels)? })
    }

    fn add_gram(&self, gram: &mut Hessian, x: &Activation) -> Result<()> {
        self.add_gram(gram, x)
    }

    fn join_gram(&self, gram: &mut Hessian, other: &Hessian) -> Result<()> {
        assert_eq!(gram.n, other.n, "channels of two Gram matrices");
        self.add_floats(&gram.data, &other.data, gram.n * gram.n)
    }

    fn cross_covariance(&self, rows: usize, columns: usize) -> Result<CrossCovariance> {
        Ok(CrossCovariance { rows, columns, data: self.gpu.zeros(4 * rows * columns)? })
    }

    fn add_cross_covariance(
        &self,
        cross: &mut CrossCovariance,
        y: &Activation,
        x: &Activation,
    ) -> Result<()> {
        self.add_cross_covariance(cross, y, x)
    }

    fn join_cross_covariance(
        &self,
        cross: &mut CrossCovariance,
        other: &CrossCovariance,
    ) -> Result<()> {
        let shape = |cross: &CrossCovariance| (cross.rows, cross.columns);
        assert_eq!(shape(cross), shape(other), "shapes of two cross-covariances");
        self.add_floats(&cross.data, &other.data, cross.rows * cross.columns)
    }

    fn difference(&self, x: &Activation, y: &Activation) -> Result<Activation> {
        let [x, y] =
            [x, y].map(|x| TensorValues { buffer: x.half(), rows: x.rows, columns: x.columns });
        self.subtracted(Float::Half, x, y)
    }

    fn hidden_difference(&self, x: &Hidden, y: &Hidden) -> Result<Activation> {
        let [x, y] =
            [x, y].map(|x| TensorValues { buffer: x.float(), rows: x.rows, columns: x.columns });
        self.subtracted(Float::Single, x, y)
    }

    fn scale_rows(&self, x: &mut Activation, weights: &[f32]) -> Result<()> {
        let weights = self.gpu.upload(weights)?;
        self.kernels.launch(&ScaleRows {
            x: x.half().into(),
            weights: (&weights).into(),
            n: x.columns,
            rows: x.rows,
        })
    }
}

/// A tensor's values, of either type.
struct TensorValues<'a> {
    buffer: &'a Buffer,
    rows: usize,
    columns: usize,
}

impl Cuda {
    /// `x += y`, `count` values in f32.
    fn add_floats(&self, x: &Buffer, y: &Buffer, count: usize) -> Result<()> {
        self.kernels.launch(&AddFloat { x: x.into(), y: y.into(), count: count as i64 })
    }

    /// `x - y`, in f16.
    fn subtracted(
        &self,
        element: Float,
        x: TensorValues<'_>,
        y: TensorValues<'_>,
    ) -> Result<Activation> {
        let TensorValues { rows, columns, .. } = x;
        assert_eq!((rows, columns), (y.rows, y.columns), "the difference of unlike tensors");
        let to = self.half(rows, columns)?;
        self.kernels.launch(&Difference {
            x: x.buffer.into(),
            y: y.buffer.into(),
            count: (rows * columns) as i64,
            to: to.half().into(),
            element,
        })?;
        Ok(to)
    }
}
