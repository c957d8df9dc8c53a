/*! The backward pass on the CPU.

Each operation is the equation that [`Train`] states, in f32, with sums in an order that no thread count changes: products are
chains of [`super::gemm`], sums over tokens run in chunks of fixed size. `tests.rs` compares every gradient with finite
differences of the forward function in f64. */

mod attention;
mod divergence;
mod elementwise;
mod site;
#[cfg(test)]
mod tests;

use half::f16;
use rayon::prelude::*;

use super::gemm_pack::Panels;
use super::{CHUNK, Cpu, HostTensor, weights};
use crate::Result;
use crate::backend::{AttentionSpec, Forward, Qkv, SiteGradient, Train, TrainedLinear};
use crate::checkpoint::Tensor;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::rows::QuantizedRows;
use crate::quant::site::SiteFormat;

/// The output head, for products from both sides.
pub struct LossHead {
    /// Of `x W^T`: the logits.
    logits: Panels,
    /// Of `y W`: their gradient.
    hidden: Panels,
}

impl Train for Cpu {
    type Gradient = HostTensor;
    type LossHead = LossHead;

    fn duplicate_activation(&self, x: &HostTensor) -> Result<HostTensor> {
        let mut copy = self.tensor(x.rows, x.columns);
        let chunks = copy.data.par_chunks_mut(CHUNK).zip(x.data.par_chunks(CHUNK));
        chunks.for_each(|(to, from)| to.copy_from_slice(from));
        Ok(copy)
    }

    fn rescale(
        &self,
        weight: &mut QuantizedLinear,
        scales: &[f16],
        outlier_scales: &[f16],
    ) -> Result<()> {
        weight.scales.copy_from_slice(scales);
        match &mut weight.outliers {
            OutlierBlock::Int8 { scales, .. } | OutlierBlock::Fp8 { scales, .. } => {
                scales.copy_from_slice(outlier_scales);
            }
            OutlierBlock::None | OutlierBlock::F16(_) => assert!(outlier_scales.is_empty()),
        }
        Ok(())
    }

    fn loss_head(&self, weight: &Tensor<'_>) -> Result<LossHead> {
        let (rows, columns) = (weight.shape[0], weight.shape[1]);
        let values = weight.to_f32()?;
        let hidden = Panels::from_columns(&values, rows, columns, columns);
        drop(values);
        Ok(LossHead { logits: weights::panels(weight, None)?, hidden })
    }

    fn divergence_backward(
        &self,
        x: &HostTensor,
        original: &HostTensor,
        head: &LossHead,
    ) -> Result<(Vec<f64>, HostTensor)> {
        let mut d_x = self.tensor(x.rows, x.columns);
        let nats =
            divergence::backward(self.isa, &x.data, &original.data, x.columns, head, &mut d_x.data);
        Ok((nats, d_x))
    }

    fn output_gradient(&self, d_x: &HostTensor) -> Result<HostTensor> {
        self.duplicate_activation(d_x)
    }

    fn rms_norm_backward(
        &self,
        x: &HostTensor,
        weight: &HostTensor,
        epsilon: f32,
        d_y: &HostTensor,
        onto: Option<HostTensor>,
    ) -> Result<(HostTensor, Vec<f32>)> {
        let mut d_x = onto.unwrap_or_else(|| {
            let mut zeros = self.tensor(x.rows, x.columns);
            zeros.data.fill(0.0);
            zeros
        });
        let d_weight = elementwise::add_norm_backward(
            &x.data,
            &weight.data,
            epsilon,
            &d_y.data,
            &mut d_x.data,
        );
        Ok((d_x, d_weight))
    }

    fn qk_norm_backward(
        &self,
        x: &HostTensor,
        weight: &HostTensor,
        epsilon: f32,
        d_y: HostTensor,
    ) -> Result<(HostTensor, Vec<f32>)> {
        let mut d_x = self.tensor(x.rows, x.columns);
        d_x.data.fill(0.0);
        // A head is a row of its own: heads of a token follow one another.
        let d_weight = elementwise::add_norm_backward(
            &x.data,
            &weight.data,
            epsilon,
            &d_y.data,
            &mut d_x.data,
        );
        Ok((d_x, d_weight))
    }

    fn silu_mul_backward(
        &self,
        gate: &HostTensor,
        up: &HostTensor,
        mut d_z: HostTensor,
    ) -> Result<[HostTensor; 2]> {
        let mut d_gate = self.tensor(gate.rows, gate.columns);
        let values = gate.data.par_chunks(CHUNK).zip(up.data.par_chunks(CHUNK));
        let gradients = d_z.data.par_chunks_mut(CHUNK).zip(d_gate.data.par_chunks_mut(CHUNK));
        values.zip(gradients).for_each(|((gate, up), (d_z, d_gate))| {
            elementwise::silu_mul_backward(self.isa, gate, up, d_z, d_gate);
        });
        Ok([d_gate, d_z])
    }

    fn attention_backward(
        &self,
        spec: &AttentionSpec,
        qkv: &Qkv<HostTensor>,
        key_mean: Option<&HostTensor>,
        d_heads: HostTensor,
    ) -> Result<Qkv<HostTensor>> {
        let like = |x: &HostTensor| self.tensor(x.rows, x.columns);
        let mut gradients = Qkv { q: like(&qkv.q), k: like(&qkv.k), v: like(&qkv.v) };
        let Qkv { q, k, v } = qkv;
        let values = Qkv { q: &q.data[..], k: &k.data[..], v: &v.data[..] };
        let Qkv { q, k, v } = &mut gradients;
        let to = Qkv { q: &mut q.data[..], k: &mut k.data[..], v: &mut v.data[..] };
        let mean = key_mean.map(|mean| &mean.data[..]);
        attention::backward(self.isa, spec, values, mean, &d_heads.data, to);
        Ok(gradients)
    }

    fn site_backward(
        &self,
        site: &SiteFormat,
        linears: &[TrainedLinear<'_, Self>],
        x: &HostTensor,
        rows: Option<&QuantizedRows>,
        d_outputs: &[HostTensor],
    ) -> Result<(HostTensor, SiteGradient)> {
        let permuted = self.permute(x, site)?;
        let values = rows.map(|rows| self.dequantize(rows)).transpose()?;
        let read = values.as_ref().unwrap_or(&permuted);
        let mut d_values = self.tensor(x.rows, site.width());
        let mut gradient = SiteGradient::default();
        let inputs = Panels::from_columns(&read.data, x.rows, site.width(), site.width());
        for (number, (linear, d_y)) in linears.iter().zip(d_outputs).enumerate() {
            let accumulate = number > 0;
            site::add_input_gradient(self.isa, linear, d_y, &mut d_values, accumulate);
            gradient.linears.push(site::scale_gradients(self.isa, linear, d_y, &inputs));
        }
        if let Some(rows) = rows {
            gradient.clips = site::through_quantizer(site, &permuted, rows, &mut d_values);
        }
        let mut d_x = self.tensor(x.rows, x.columns);
        site::permute_back(site, &mut d_values, &mut d_x);
        Ok((d_x, gradient))
    }
}
