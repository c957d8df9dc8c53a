//! Sums over calibration tokens. The larger ones stand in files of their own, under the same names.

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::elementwise::{Difference, ScaleRows};
use super::tensor::{Activation, Cross, Hessian, Hidden};
use crate::Result;
use crate::backend::{AttentionSpec, Calibration};

impl Calibration for Cuda {
    type Gram = Hessian;
    type CrossCovariance = Cross;

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

    fn cross_covariance(&self, rows: usize, columns: usize) -> Result<Cross> {
        Ok(Cross { rows, columns, data: self.gpu.zeros(4 * rows * columns)? })
    }

    fn add_cross_covariance(
        &self,
        cross: &mut Cross,
        y: &Activation,
        x: &Activation,
    ) -> Result<()> {
        self.add_cross_covariance(cross, y, x)
    }

    fn difference(&self, x: &Activation, y: &Activation) -> Result<Activation> {
        let shapes = [x, y].map(|x| [x.rows, x.columns]);
        self.subtracted(Float::Half, [x.half(), y.half()], shapes)
    }

    fn hidden_difference(&self, x: &Hidden, y: &Hidden) -> Result<Activation> {
        let shapes = [x, y].map(|x| [x.rows, x.columns]);
        self.subtracted(Float::Single, [x.float(), y.float()], shapes)
    }

    fn scale_rows(&self, x: &mut Activation, weights: &[f32]) -> Result<()> {
        let shares = self.gpu.upload(weights)?;
        self.kernels.launch(&ScaleRows {
            x: x.half().into(),
            weights: (&shares).into(),
            n: x.columns,
            rows: x.rows,
        })
    }
}

impl Cuda {
    /// The first less the second, in f16.
    fn subtracted(
        &self,
        element: Float,
        [left, right]: [&Buffer; 2],
        [shape, other]: [[usize; 2]; 2],
    ) -> Result<Activation> {
        assert_eq!(shape, other, "the difference of unlike tensors");
        let [rows, columns] = shape;
        let to = self.half(rows, columns)?;
        self.kernels.launch(&Difference {
            x: left.into(),
            y: right.into(),
            count: (rows * columns) as i64,
            to: to.half().into(),
            element,
        })?;
        Ok(to)
    }
}
