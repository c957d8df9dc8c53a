//! Sums over calibration tokens. The larger ones stand in files of their own, under the same names.

use super::gpu::Buffer;
use super::launch::{Geometry, arguments};
use super::tensor::{Activation, Cross, Hessian, Hidden};
use super::{Cuda, THREADS};
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
        self.subtracted("difference_half", [x.half(), y.half()], shapes)
    }

    fn hidden_difference(&self, x: &Hidden, y: &Hidden) -> Result<Activation> {
        let shapes = [x, y].map(|x| [x.rows, x.columns]);
        self.subtracted("difference_float", [x.float(), y.float()], shapes)
    }

    fn scale_rows(&self, x: &mut Activation, weights: &[f32]) -> Result<()> {
        let shares = self.gpu.upload(weights)?;
        self.launch(
            "elementwise",
            "scale_rows_half",
            Geometry::line(x.rows, THREADS),
            arguments![x.half(), &shares, x.columns],
        )
    }
}

impl Cuda {
    /// The first less the second, in f16.
    fn subtracted(
        &self,
        entry: &str,
        [left, right]: [&Buffer; 2],
        [shape, other]: [[usize; 2]; 2],
    ) -> Result<Activation> {
        assert_eq!(shape, other, "the difference of unlike tensors");
        let [rows, columns] = shape;
        let to = self.half(rows, columns)?;
        self.launch(
            "elementwise",
            entry,
            Geometry::over(rows * columns, THREADS),
            arguments![left, right, (rows * columns) as i64, to.half()],
        )?;
        Ok(to)
    }
}
