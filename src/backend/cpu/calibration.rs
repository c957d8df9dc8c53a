//! Sums over calibration tokens, each element's in the tokens' order.

use rayon::prelude::*;

use super::gemm_pack::Panels;
use super::gram::{gram_add, gram_add_packed};
use super::{CHUNK, Cpu, Hessian, HostTensor, ROWS, attention, cross_covariance};
use crate::Result;
use crate::backend::{AttentionSpec, Calibration, Matrix};

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

    fn add_gram_and_cross(
        &self,
        gram: &mut Hessian,
        cross: &mut Matrix,
        y: &HostTensor,
        x: &HostTensor,
    ) -> Result<()> {
        let panels = Panels::from_columns(&x.data, x.rows, x.columns, x.columns);
        gram_add_packed(self.isa, &panels, &mut gram.lower);
        cross_covariance::add_packed(self.isa, cross, &y.data, &panels);
        Ok(())
    }

    fn join_cross_covariance(&self, cross: &mut Matrix, other: &Matrix) -> Result<()> {
        assert_eq!(cross.data.len(), other.data.len(), "shapes of two cross-covariances");
        let parts = cross.data.par_chunks_mut(CHUNK).zip(other.data.par_chunks(CHUNK));
        parts.for_each(|(to, from)| add(to, from));
        Ok(())
    }

    fn difference(&self, x: &HostTensor, y: &HostTensor) -> Result<HostTensor> {
        assert_eq!((x.rows, x.columns), (y.rows, y.columns), "the difference of unlike tensors");
        let mut difference = self.tensor(x.rows, x.columns);
        let operands = x.data.par_chunks(CHUNK).zip(y.data.par_chunks(CHUNK));
        difference.data.par_chunks_mut(CHUNK).zip(operands).for_each(|(to, (x, y))| {
            for (to, (x, y)) in to.iter_mut().zip(x.iter().zip(y)) {
                *to = x - y;
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

#[cfg(test)]
mod tests {
    use super::super::gemm::tests::random;
    use super::*;

    #[test]
    fn sums_together_have_the_bits_of_sums_apart() {
        for isa in super::super::isa::Isa::available() {
            let cpu = Cpu::with_isa(isa);
            for (tokens, n, rows) in [(1, 1, 1), (33, 70, 5), (130, 65, 129), (7, 130, 64)] {
                let tensor = |columns: usize, seed: u64| {
                    let data = random(tokens * columns, seed);
                    HostTensor::from_matrix(Matrix { rows: tokens, columns, data })
                };
                let (x, y) = (tensor(n, 1), tensor(rows, 2));
                let zeros = || (cpu.gram(n).unwrap(), cpu.cross_covariance(rows, n).unwrap());
                let (mut gram, mut cross) = zeros();
                let (mut gram_apart, mut cross_apart) = zeros();
                for _ in 0..2 {
                    cpu.add_gram_and_cross(&mut gram, &mut cross, &y, &x).unwrap();
                    cpu.add_gram(&mut gram_apart, &x).unwrap();
                    cpu.add_cross_covariance(&mut cross_apart, &y, &x).unwrap();
                }
                assert!(gram.lower == gram_apart.lower, "{isa:?} {tokens} {n}");
                assert!(cross.data == cross_apart.data, "{isa:?} {tokens} {n} {rows}");
            }
        }
    }
}
