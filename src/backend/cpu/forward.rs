//! A block's operations, rows in parallel.

use rayon::prelude::*;

use super::attention::{self, consecutive_windows, placed_windows};
use super::gemm::par_gemm;
use super::gemm_pack::{Panels, Rows};
use super::integer::{self, IntegerLinear};
use super::{CHUNK, Cpu, HostTensor, ROWS, elementwise, quantize};
use crate::backend::{AttentionSpec, Forward, Matrix, Placement, Qkv};
use crate::checkpoint;
use crate::quant::rows::QuantizedRows;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

impl Forward for Cpu {
    type Rows = QuantizedRows;
    type Dense = Panels;
    type Packed = IntegerLinear;
    type Site = SiteFormat;

    fn embed(&self, table: &checkpoint::Tensor<'_>, tokens: &[u32]) -> Result<HostTensor> {
        let columns = table.shape[1];
        let mut data = vec![0.0; tokens.len() * columns];
        data.par_chunks_mut(columns).zip(tokens).try_for_each(|(row, &token)| {
            let token = token as usize;
            row.copy_from_slice(&table.rows_f32(token..token + 1)?);
            Ok::<(), Error>(())
        })?;
        table.release();
        Ok(HostTensor::from_matrix(Matrix { rows: tokens.len(), columns, data }))
    }

    fn select_hidden(&self, x: &HostTensor, rows: &[u32]) -> Result<HostTensor> {
        self.select_rows(x, rows)
    }

    fn select_rows(&self, x: &HostTensor, rows: &[u32]) -> Result<HostTensor> {
        let n = x.columns;
        let mut y = self.tensor(rows.len(), n);
        y.data.par_chunks_mut(n * ROWS).zip(rows.par_chunks(ROWS)).for_each(|(y, rows)| {
            for (y, &row) in y.chunks_mut(n).zip(rows) {
                y.copy_from_slice(&x.data[row as usize * n..][..n]);
            }
        });
        Ok(y)
    }

    fn rms_norm(&self, x: &HostTensor, weight: &HostTensor, epsilon: f32) -> Result<HostTensor> {
        let mut y = self.tensor(x.rows, x.columns);
        let n = x.columns;
        y.data.par_chunks_mut(n * ROWS).zip(x.data.par_chunks(n * ROWS)).for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(n).zip(x.chunks(n)) {
                elementwise::rms_norm(self.isa, x, &weight.data, epsilon, y);
            }
        });
        Ok(y)
    }

    fn norm_in_place(&self, x: &mut HostTensor, weight: &HostTensor, epsilon: f32) -> Result<()> {
        x.data.par_chunks_mut(x.columns).for_each(|row| {
            let mut normed = vec![0.0; weight.columns];
            for head in row.chunks_mut(weight.columns) {
                elementwise::rms_norm(self.isa, head, &weight.data, epsilon, &mut normed);
                head.copy_from_slice(&normed);
            }
        });
        Ok(())
    }

    fn activation(&self, x: &HostTensor) -> Result<HostTensor> {
        let mut y = self.tensor(x.rows, x.columns);
        y.data.copy_from_slice(&x.data);
        Ok(y)
    }

    fn gelu_mul(&self, mut gate: HostTensor, up: &HostTensor) -> Result<HostTensor> {
        gate.data
            .par_chunks_mut(CHUNK)
            .zip(up.data.par_chunks(CHUNK))
            .for_each(|(gate, up)| elementwise::gelu_mul(self.isa, gate, up));
        Ok(gate)
    }

    fn silu_mul(&self, mut gate: HostTensor, up: &HostTensor) -> Result<HostTensor> {
        gate.data
            .par_chunks_mut(CHUNK)
            .zip(up.data.par_chunks(CHUNK))
            .for_each(|(gate, up)| elementwise::silu_mul(self.isa, gate, up));
        Ok(gate)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        placement: Option<&Placement>,
        qkv: Qkv<HostTensor>,
        key_mean: Option<&HostTensor>,
    ) -> Result<HostTensor> {
        let Qkv { q, k, v } = &qkv;
        let mut out = self.tensor(q.rows, q.columns);
        let rows: Vec<u32>;
        let windows = match placement {
            Some(placement) => placed_windows(placement, spec.seq_len),
            None => {
                rows = (0..q.rows as u32).collect();
                consecutive_windows(&rows, spec.seq_len)
            }
        };
        let qkv = Qkv { q: &q.data[..], k: &k.data[..], v: &v.data[..] };
        let key_mean = key_mean.map(|mean| &mean.data[..]);
        attention::attention(self.isa, spec, &windows, qkv, key_mean, &mut out.data);
        Ok(out)
    }

    fn permute(&self, x: &HostTensor, site: &SiteFormat) -> Result<HostTensor> {
        let mut y = self.tensor(x.rows, site.width());
        quantize::permute_rows(self.isa, &x.data, x.rows, site, &mut y.data);
        Ok(y)
    }

    fn quantize(&self, x: &HostTensor, site: &SiteFormat, name: &str) -> Result<QuantizedRows> {
        quantize::quantize_rows(self.isa, &x.data, x.rows, site)
            .map_err(|error| error.context(format!("activations of {name}")))
    }

    fn norm_quantize(
        &self,
        x: &HostTensor,
        weight: &HostTensor,
        epsilon: f32,
        site: &SiteFormat,
        name: &str,
    ) -> Result<QuantizedRows> {
        self.quantize(&self.rms_norm(x, weight, epsilon)?, site, name)
    }

    fn silu_quantize(
        &self,
        gate: HostTensor,
        up: &HostTensor,
        site: &SiteFormat,
        name: &str,
    ) -> Result<QuantizedRows> {
        self.quantize(&self.silu_mul(gate, up)?, site, name)
    }

    fn dequantize(&self, x: &QuantizedRows) -> Result<HostTensor> {
        let mut y = self.tensor(
            x.tokens,
            x.format.groups * x.format.numbers.group_size + x.format.outlier_channels,
        );
        quantize::dequantize_rows(self.isa, x, &mut y.data);
        Ok(y)
    }

    fn product(&self, x: &HostTensor, weight: &Panels) -> Result<HostTensor> {
        let mut y = self.tensor(x.rows, weight.n());
        let rows = Rows::new(&x.data, x.rows, x.columns);
        par_gemm(self.isa, rows, weight, &mut y.data, weight.n(), false);
        Ok(y)
    }

    fn add_product(&self, x: &mut HostTensor, y: &HostTensor, weight: &Panels) -> Result<()> {
        self.add(x, &self.product(y, weight)?, 1.0)
    }

    fn integer_product(&self, x: &QuantizedRows, weight: &IntegerLinear) -> Result<HostTensor> {
        let mut y = self.tensor(x.tokens, weight.rows());
        integer::linear(self.isa, x, weight, &mut y.data);
        Ok(y)
    }

    fn add_integer_product(
        &self,
        x: &mut HostTensor,
        y: &QuantizedRows,
        weight: &IntegerLinear,
    ) -> Result<()> {
        self.add(x, &self.integer_product(y, weight)?, 1.0)
    }

    fn add_bias(&self, y: &mut HostTensor, bias: &HostTensor) -> Result<()> {
        y.data.par_chunks_mut(bias.columns).for_each(|row| {
            for (y, bias) in row.iter_mut().zip(bias.data.iter()) {
                *y += bias;
            }
        });
        Ok(())
    }

    fn add(&self, x: &mut HostTensor, y: &HostTensor, factor: f32) -> Result<()> {
        x.data.par_chunks_mut(CHUNK).zip(y.data.par_chunks(CHUNK)).for_each(|(x, y)| {
            for (x, y) in x.iter_mut().zip(y) {
                *x += factor * y;
            }
        });
        Ok(())
    }

    fn scale(&self, x: &mut HostTensor, factor: f32) -> Result<()> {
        x.data.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|x| *x *= factor));
        Ok(())
    }

    fn add_rows(
        &self,
        x: &mut HostTensor,
        y: &HostTensor,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()> {
        let n = x.columns;
        for ((row, weight), y) in rows.iter().zip(weights).zip(y.data.chunks(n)) {
            for (x, y) in x.data[*row as usize * n..][..n].iter_mut().zip(y) {
                *x += weight * y;
            }
        }
        Ok(())
    }
}
