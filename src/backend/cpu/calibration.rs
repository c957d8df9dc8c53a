//! Sums over calibration tokens, each element's in the tokens' order.

use rayon::prelude::*;

use super::gram::gram_add;
use super::{CHUNK, Cpu, Hessian, HostTensor, ROWS, attention, cross_covariance};
use crate::Result;
use crate::backend::{AttentionSpec, Calibration, Matrix, Memory};

impl Calibration for Cpu {
    type Gram = Hessian;
    type CrossCovariance = Matrix;

    fn add_energy(&self, x: &HostTensor, energy: &mut [f64]) -> Result<()> {
        // Columns in parallel and tokens in order, so that no sum depends on threads or batches.
        energy.par_chunks_mut(ROWS).enumerate().for_each(|(chunk, energy)| {
            for row in x.data.chunks(x.columns) {
                for (energy, &x) in energy.iter_mut().zip(&row[chunk * ROWS..]) {
                    *energy += f64::from(x) * f64::from(x);
                }
            }
        });
        Ok(())
    }

    fn add_key_sums(&self, spec: &AttentionSpec, k: &HostTensor, sums: &mut [f64]) -> Result<()> {
        attention::add_keys(self.isa, spec, &k.data, sums);
        Ok(())
    }

    fn gram(&self, channels: usize) -> Result<Hessian> {
        Ok(Hessian { n: channels, lower: vec![0.0; channels * channels] })
    }

    fn add_gram(&self, gram: &mut Hessian, x: &HostTensor) -> Result<()> {
        gram_add(self.isa, &x.data, x.rows, x.columns, &mut gram.lower);
        Ok(())
    }

    fn join_gram(&self, gram: &mut Hessian, other: &Hessian) -> Result<()> {
        let n = gram.n;
        assert_eq!(n, other.n, "channels of two Gram matrices");
        // Nothing above the diagonal is ever written.
        let rows = gram.lower.par_chunks_mut(n).zip(other.lower.par_chunks(n)).enumerate();
        rows.for_each(|(i, (to, from))| add(&mut to[..=i], &from[..=i]));
        Ok(())
    }

    fn cross_covariance(&self, rows: usize, columns: usize) -> Result<Matrix> {
        Ok(Matrix { rows, columns, data: vec![0.0; rows * columns] })
    }

    fn add_cross_covariance(
        &self,
        cross: &mut Matrix,
        y: &HostTensor,
        x: &HostTensor,
    ) -> Result<()> {
        cross_covariance::add(self.isa, cross, &y.data, &x.data, x.rows);
        Ok(())
    }

    fn join_cross_covariance(&self, cross: &mut Matrix, other: &Matrix) -> Result<()> {
        assert_eq!(cross.data.len(), other.data.len(), "shapes of two cross-covariances");
        let parts = cross.data.par_chunks_mut(CHUNK).zip(other.data.par_chunks(CHUNK));
        parts.for_each(|(to, from)| add(to, from));
        Ok(())
    }

    fn difference(&self, x: &HostTensor, y: &HostTensor) -> Result<HostTensor> {
        let mut difference = self.duplicate(x)?;
        difference.data.par_chunks_mut(CHUNK).zip(y.data.par_chunks(CHUNK)).for_each(|(x, y)| {
            for (x, y) in x.iter_mut().zip(y) {
                *x -= y;
            }
        });
        Ok(difference)
    }

    fn hidden_difference(&self, x: &HostTensor, y: &HostTensor) -> Result<HostTensor> {
        self.difference(x, y)
    }

    fn scale_rows(&self, x: &mut HostTensor, weights: &[f32]) -> Result<()> {
        x.data.par_chunks_mut(x.columns).zip(weights).for_each(|(row, weight)| {
            row.iter_mut().for_each(|value| *value *= weight);
        });
        Ok(())
    }
}

/// `x += y`.
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
