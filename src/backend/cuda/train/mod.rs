/*! The backward pass on the device: gradients and products of them in f32, of which the tensor cores read 10 bits of mantissa. Gradients
have values beyond what f16 holds. */

mod attention;
mod site;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use half::f16;

use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::reduce::KlDivergence;
use super::kernels::train::{
    DivergenceBackward, NormBackward, NormWeightParts, PART_ROWS, SiluBackward, Widen,
};
use super::product::{Operand, Precision, Product};
use super::slice::{Any, In, Out};
use super::tensor::{Activation, Dense, DeviceLinear, DeviceRows, DeviceSite, Hidden, Weight};
use super::{ActivationPart, Cuda};
use crate::Result;
use crate::backend::{
    AttentionSpec, Memory, Qkv, Quantization, SiteGradient, Train, TrainedLinear,
};
use crate::quant::linear::OutlierBlock;

/// Bytes of logits held together, of both distributions.
const LOGITS_BYTES: usize = 512 << 20;

/// The output head, for products from both sides.
pub struct LossHead {
    /// Of `x W^T`.
    logits: Dense,
    /// Of `y W`, in f32.
    hidden: Buffer,
}

/// A matrix in f32, row-major: its memory, and values from row to row. As an operand it is its transpose.
#[derive(Clone, Copy)]
struct Floats<'a> {
    memory: In<'a, f32>,
    stride: usize,
}

impl<'a> Floats<'a> {
    fn new(memory: impl Into<In<'a, f32>>, stride: usize) -> Self {
        Self { memory: memory.into(), stride }
    }

    fn operand(self, transposed: bool) -> Operand<'a> {
        Operand { memory: self.memory.cast(), stride: self.stride, transposed }
    }
}

/// What becomes of the memory of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sum {
    Fresh,
    Added,
}

impl Train for Cuda {
    type Gradient = Hidden;
    type LossHead = LossHead;

    fn duplicate_activation(&self, x: &Activation) -> Result<Activation> {
        let copy = self.half(x.rows, x.columns)?;
        copy.half().copy_from(x.half(), 2 * x.count())?;
        Ok(copy)
    }

    fn rescale(
        &self,
        weight: &mut DeviceLinear,
        scales: &[f16],
        outlier_scales: &[f16],
    ) -> Result<()> {
        assert_eq!(weight.first_row, 0, "linears are trained one by one");
        assert_eq!(scales.len(), weight.scale_rows() * weight.format.row.groups);
        let outliers = &weight.shared.outliers;
        if outliers.scales.is_some() && outliers.values.is_some() {
            // FP8: the values that products read have the scale in them.
            let DeviceLinear { format, first_row, rows, .. } = *weight;
            let shared = Arc::clone(&weight.shared);
            let same = DeviceLinear { format, first_row, rows, shared, lost: None };
            let mut host = self.fetch(same)?;
            host.scales.copy_from_slice(scales);
            if let OutlierBlock::Fp8 { scales, .. } = &mut host.outliers {
                scales.copy_from_slice(outlier_scales);
            }
            *weight = Quantization::restore(self, host)?;
            return Ok(());
        }
        let floats = |scales: &[f16]| scales.iter().map(|scale| scale.to_f32()).collect::<Vec<_>>();
        weight.shared.scales.write(&floats(scales))?;
        match &outliers.scales {
            Some(own) => {
                assert_eq!(outlier_scales.len(), weight.rows);
                own.write(&floats(outlier_scales))
            }
            None => {
                assert!(outlier_scales.is_empty());
                Ok(())
            }
        }
    }

    fn loss_head(&self, weight: &Weight) -> Result<LossHead> {
        let logits = self.dense(weight, None)?;
        let hidden = self.widened_halves(In::from(&*logits.data), logits.rows * logits.columns)?;
        Ok(LossHead { logits, hidden })
    }

    fn divergence_backward(
        &self,
        x: &Activation,
        original: &Activation,
        head: &LossHead,
    ) -> Result<(Vec<f64>, Hidden)> {
        let (rows, vocabulary, hidden) = (x.rows, head.logits.rows, x.columns);
        let most = (LOGITS_BYTES / (8 * vocabulary)).clamp(1, rows.max(1));
        let [changed, logits] = [(); 2].map(|()| self.gpu.alloc(4 * most * vocabulary));
        let (changed, logits) = (changed?, logits?);
        let nats = self.gpu.alloc(8 * rows)?;
        let d_x = self.gpu.alloc(4 * rows * hidden)?;
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            for (x, to) in [(x, &changed), (original, &logits)] {
                let part = ActivationPart { x, first, count };
                self.multiply(part, &head.logits, to, Precision::HalfToFloat, false)?;
            }
            self.kernels.launch(&KlDivergence {
                changed: (&changed).into(),
                logits: (&logits).into(),
                vocabulary,
                nats: Out::from(&nats).skip(first),
                rows: count,
            })?;
            self.kernels.launch(&DivergenceBackward {
                changed: (&changed).into(),
                logits: (&logits).into(),
                vocabulary,
                rows: count,
            })?;
            let to = Floats::new(In::from(&d_x).skip(first * hidden), hidden);
            let d_logits = Floats::new(&changed, vocabulary);
            let weights = Floats::new(&head.hidden, hidden);
            self.times(d_logits, weights, to, [count, vocabulary, hidden], Sum::Fresh)?;
        }
        Ok((nats.download(0..8 * rows)?, Hidden::new(rows, hidden, d_x)))
    }

    fn output_gradient(&self, d_x: &Hidden) -> Result<Hidden> {
        self.duplicate(d_x)
    }

    fn rms_norm_backward(
        &self,
        x: &Hidden,
        weight: &Hidden,
        epsilon: f32,
        d_y: &Hidden,
        onto: Option<Hidden>,
    ) -> Result<(Hidden, Vec<f32>)> {
        let d_x = match onto {
            Some(onto) => onto,
            None => Hidden::new(x.rows, x.columns, self.gpu.zeros(4 * x.count())?),
        };
        let rows = NormRows { x: x.float().into(), element: Float::Single, count: x.rows };
        let d_weight = self.norm_backward(rows, weight, epsilon, d_y, &d_x)?;
        Ok((d_x, d_weight))
    }

    fn qk_norm_backward(
        &self,
        x: &Activation,
        weight: &Hidden,
        epsilon: f32,
        d_y: Hidden,
    ) -> Result<(Hidden, Vec<f32>)> {
        let d_x = Hidden::new(x.rows, x.columns, self.gpu.zeros(4 * x.count())?);
        // A head is a row of its own: heads of a token follow one another.
        let count = x.count() / weight.columns;
        let rows = NormRows { x: x.half().into(), element: Float::Half, count };
        let d_weight = self.norm_backward(rows, weight, epsilon, &d_y, &d_x)?;
        Ok((d_x, d_weight))
    }

    fn silu_mul_backward(
        &self,
        gate: &Activation,
        up: &Activation,
        d_z: Hidden,
    ) -> Result<[Hidden; 2]> {
        let d_gate = self.gpu.alloc(4 * gate.count())?;
        self.kernels.launch(&SiluBackward {
            gate: gate.half().into(),
            up: up.half().into(),
            count: gate.count() as i64,
            d_z: d_z.float().into(),
            d_gate: (&d_gate).into(),
        })?;
        Ok([Hidden::new(gate.rows, gate.columns, d_gate), d_z])
    }

    fn attention_backward(
        &self,
        spec: &AttentionSpec,
        qkv: &Qkv<Activation>,
        key_mean: Option<&Hidden>,
        d_heads: Hidden,
    ) -> Result<Qkv<Hidden>> {
        self.windows_backward(spec, qkv, key_mean, &d_heads)
    }

    fn site_backward(
        &self,
        site: &DeviceSite,
        linears: &[TrainedLinear<'_, Self>],
        x: &Activation,
        rows: Option<&DeviceRows>,
        d_outputs: &[Hidden],
    ) -> Result<(Hidden, SiteGradient)> {
        self.linears_backward(site, linears, (x, rows), d_outputs)
    }
}

/// What a norm normed, `[count, n]`.
struct NormRows<'a> {
    x: In<'a, Any>,
    element: Float,
    count: usize,
}

impl Cuda {
    /// Adds the gradient of a norm's input to `d_x`, and returns that of its weight.
    fn norm_backward(
        &self,
        NormRows { x, element, count: rows }: NormRows<'_>,
        weight: &Hidden,
        epsilon: f32,
        d_y: &Hidden,
        d_x: &Hidden,
    ) -> Result<Vec<f32>> {
        let n = weight.columns;
        let inverses = self.gpu.alloc(4 * rows)?;
        let d_y = d_y.float();
        self.kernels.launch(&NormBackward {
            x,
            weight: weight.float().into(),
            n,
            epsilon,
            d_y: d_y.into(),
            d_x: d_x.float().into(),
            inverses: (&inverses).into(),
            element,
            rows,
        })?;
        let count = rows.div_ceil(PART_ROWS);
        let parts = self.gpu.alloc(8 * count * n)?;
        self.kernels.launch(&NormWeightParts {
            x,
            d_y: d_y.into(),
            inverses: (&inverses).into(),
            rows,
            n,
            parts: (&parts).into(),
            element,
        })?;
        self.part_sums(&parts, count, n)
    }

    /// Sums of parts `[count, columns]`, in order.
    fn part_sums(&self, parts: &Buffer, count: usize, columns: usize) -> Result<Vec<f32>> {
        let mut sums = vec![0.0; columns];
        self.sum_parts(parts, count, &mut sums)?;
        Ok(sums.into_iter().map(|sum| sum as f32).collect())
    }

    /// f16 values as f32.
    fn widened_halves(&self, x: In<'_, f16>, count: usize) -> Result<Buffer> {
        let to = self.gpu.alloc(4 * count)?;
        self.kernels.launch(&Widen { x, count: count as i64, y: (&to).into() })?;
        Ok(to)
    }

    /// `c = a b` of `a` `[m, k]` and `b` `[k, n]`.
    fn times(
        &self,
        a: Floats<'_>,
        b: Floats<'_>,
        c: Floats<'_>,
        [m, k, n]: [usize; 3],
        sum: Sum,
    ) -> Result<()> {
        self.float_product([n, m, k], b.operand(false), a.operand(false), c, sum)
    }

    /// `c = a b^T` of `a` `[m, k]` and `b` `[n, k]`.
    fn times_transposed(
        &self,
        a: Floats<'_>,
        b: Floats<'_>,
        c: Floats<'_>,
        [m, k, n]: [usize; 3],
    ) -> Result<()> {
        self.float_product([n, m, k], b.operand(true), a.operand(false), c, Sum::Fresh)
    }

    /// `c = a^T b` of `a` `[k, m]` and `b` `[k, n]`.
    fn transposed_times(
        &self,
        a: Floats<'_>,
        b: Floats<'_>,
        c: Floats<'_>,
        [m, k, n]: [usize; 3],
        sum: Sum,
    ) -> Result<()> {
        self.float_product([n, m, k], b.operand(false), a.operand(true), c, sum)
    }

    fn float_product(
        &self,
        [m, n, k]: [usize; 3],
        a: Operand<'_>,
        b: Operand<'_>,
        c: Floats<'_>,
        sum: Sum,
    ) -> Result<()> {
        let c = c.operand(false);
        let (add, precision) = (sum == Sum::Added, Precision::Tensor32);
        self.products.run(&Product { m, n, k, a, b, c, add, precision })
    }
}
