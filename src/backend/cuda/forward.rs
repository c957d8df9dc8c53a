//! A block's operations. The larger ones stand in files of their own, under the same names.

use super::fused::{Columns, SiteCodes};
use super::gpu::Buffer;
use super::hopper::TiledProduct;
use super::kernels::elementwise::{
    Add, AddBias, AddRows, Convert, GeluMul, NormInPlace, RmsNorm, Scale, Select, SiluMul,
    SiluMulPermuted,
};
use super::kernels::{Float, product};
use super::product::Precision;
use super::quantize::{PermutedRows, SourceRows};
use super::tensor::{
    Activation, Dense, DeviceRows, DeviceSite, Hidden, Layout, PackedForm, PackedLinear, Slots,
    Weight,
};
use super::{ActivationPart, Cuda};
use crate::Result;
use crate::backend::{AttentionSpec, Forward, Placement, Qkv};

impl Forward for Cuda {
    type Rows = DeviceRows;
    type Dense = Dense;
    type Packed = PackedLinear;
    type Site = DeviceSite;

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Hidden> {
        check_rows(tokens, table.rows);
        self.embed_ids(table, &self.gpu.upload(tokens)?, tokens.len())
    }

    fn select_hidden(&self, x: &Hidden, rows: &[u32]) -> Result<Hidden> {
        let to = self.gpu.alloc(4 * rows.len() * x.columns)?;
        let from = SourceRows { values: x.float().into(), element: Float::Single, rows: x.rows };
        self.select(from, x.columns, rows, &to)?;
        Ok(Hidden::new(rows.len(), x.columns, to))
    }

    fn select_rows(&self, x: &Activation, rows: &[u32]) -> Result<Activation> {
        let to = self.half(rows.len(), x.columns)?;
        let from = SourceRows { values: x.half().into(), element: Float::Half, rows: x.rows };
        self.select(from, x.columns, rows, to.half())?;
        Ok(to)
    }

    fn rms_norm(&self, x: &Hidden, weight: &Hidden, epsilon: f32) -> Result<Activation> {
        let y = self.half(x.rows, x.columns)?;
        self.kernels.launch(&RmsNorm {
            x: x.float().into(),
            weight: weight.float().into(),
            n: x.columns,
            epsilon,
            y: y.half().into(),
            rows: x.rows,
        })?;
        Ok(y)
    }

    fn norm_in_place(&self, x: &mut Activation, weight: &Hidden, epsilon: f32) -> Result<()> {
        let vectors = x.count() / weight.columns;
        self.kernels.launch(&NormInPlace {
            x: x.half().into(),
            weight: weight.float().into(),
            vectors,
            n: weight.columns,
            epsilon,
        })
    }

    fn activation(&self, x: &Hidden) -> Result<Activation> {
        let y = self.half(x.rows, x.columns)?;
        // A value beyond f16 is infinite in `y`, which quantization reports with the site's name; what is counted here is
        // not read.
        let bad = self.gpu.alloc(8)?;
        self.kernels.launch(&Convert {
            x: x.float().into(),
            count: x.count() as i64,
            to: Some(y.half().into()),
            bad: (&bad).into(),
            element: Float::Single,
        })?;
        Ok(y)
    }

    fn gelu_mul(&self, gate: Activation, up: &Activation) -> Result<Activation> {
        assert!(
            gate.slots.is_none() && up.slots.is_none(),
            "gate and up are reordered for SiLU alone"
        );
        self.kernels.launch(&GeluMul {
            gate: gate.half().into(),
            up: up.half().into(),
            count: gate.count() as i64,
        })?;
        Ok(gate)
    }

    fn silu_mul(&self, gate: Activation, up: &Activation) -> Result<Activation> {
        if let Some(Slots { order, channels }) = &gate.slots {
            assert!(up.slots.is_some() && gate.columns == up.columns);
            let y = self.half(gate.rows, *channels)?;
            self.kernels.launch(&SiluMulPermuted {
                gate: (&gate.data).into(),
                up: (&up.data).into(),
                order: (&**order).into(),
                slots: gate.columns,
                channels: *channels,
                y: y.half().into(),
                rows: gate.rows,
            })?;
            return Ok(y);
        }
        let count = gate.count();
        self.kernels.launch(&SiluMul {
            gate: gate.half().into(),
            up: up.half().into(),
            count: count as i64,
        })?;
        Ok(gate)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        placement: Option<&Placement>,
        qkv: Qkv<Activation>,
        key_mean: Option<&Hidden>,
    ) -> Result<Activation> {
        let Some(Placement { windows, rows }) = placement else {
            return self.attention_of_windows(spec, &qkv, key_mean);
        };
        // Each is freed before the next is copied.
        let placed = |x: Activation| self.select_rows(&x, windows);
        let qkv = Qkv { q: placed(qkv.q)?, k: placed(qkv.k)?, v: placed(qkv.v)? };
        self.select_rows(&self.attention_of_windows(spec, &qkv, key_mean)?, rows)
    }

    fn permute(&self, x: &Activation, site: &DeviceSite) -> Result<Activation> {
        let y = self.half(x.rows, site.format.width())?;
        let element = Float::Half;
        let from = SourceRows { values: x.half().into(), element, rows: x.rows };
        self.permute_rows(from, site, PermutedRows { values: y.half().into(), element })?;
        Ok(y)
    }

    fn quantize(&self, x: &Activation, site: &DeviceSite, name: &str) -> Result<DeviceRows> {
        self.quantize(x, site, name)
    }

    fn norm_quantize(
        &self,
        x: &Hidden,
        weight: &Hidden,
        epsilon: f32,
        site: &DeviceSite,
        name: &str,
    ) -> Result<DeviceRows> {
        let codes = SiteCodes { site, layout: Layout::Tiled, name };
        if self.takes_tiles(&site.format.row)
            && let Some(rows) = self.norm_rows(x, weight, epsilon, codes)?
        {
            return Ok(rows);
        }
        self.quantize(&self.rms_norm(x, weight, epsilon)?, site, name)
    }

    fn silu_quantize(
        &self,
        gate: Activation,
        up: &Activation,
        site: &DeviceSite,
        name: &str,
    ) -> Result<DeviceRows> {
        let columns = if gate.slots.is_some() { Columns::Slots } else { Columns::Channels };
        let codes = SiteCodes { site, layout: Layout::Tiled, name };
        if self.takes_tiles(&site.format.row)
            && let Some(rows) = self.silu_rows(&gate, up, columns, codes)?
        {
            return Ok(rows);
        }
        self.quantize(&self.silu_mul(gate, up)?, site, name)
    }

    fn dequantize(&self, x: &DeviceRows) -> Result<Activation> {
        self.dequantize(x)
    }

    fn product(&self, x: &Activation, weight: &Dense) -> Result<Activation> {
        let y = self.half(x.rows, weight.rows)?;
        self.multiply(ActivationPart::all(x), weight, y.half(), Precision::HalfToHalf, false)?;
        Ok(y)
    }

    fn add_product(&self, x: &mut Hidden, y: &Activation, weight: &Dense) -> Result<()> {
        self.multiply(ActivationPart::all(y), weight, x.float(), Precision::HalfToFloat, true)
    }

    fn integer_product(&self, x: &DeviceRows, weight: &PackedLinear) -> Result<Activation> {
        let data = self.integer(x, weight, true)?;
        let slots = weight.slots.clone();
        Ok(Activation { slots, ..Activation::new(x.tokens, weight.rows, data) })
    }

    fn integer_products(
        &self,
        x: &DeviceRows,
        weights: &[&PackedLinear],
    ) -> Result<Vec<Activation>> {
        match self.tiled_together(x, weights) {
            None => weights.iter().map(|weight| self.integer_product(x, weight)).collect(),
            Some(all) => {
                let outputs = weights.iter().map(|weight| self.half(x.tokens, weight.rows));
                let outputs: Vec<Activation> = outputs.collect::<Result<_>>()?;
                let mut products = Vec::with_capacity(all.len());
                for (blocks, output) in all.into_iter().zip(&outputs) {
                    products.push(TiledProduct { blocks, rows: output.columns, to: &output.data });
                }
                self.tiled_products(x, &products, product::ProductOutput::Half)?;
                let slots = weights.iter().map(|weight| weight.slots.clone());
                Ok(outputs
                    .into_iter()
                    .zip(slots)
                    .map(|(y, slots)| Activation { slots, ..y })
                    .collect())
            }
        }
    }

    fn add_integer_product(
        &self,
        x: &mut Hidden,
        y: &DeviceRows,
        weight: &PackedLinear,
    ) -> Result<()> {
        // Products of rows in tiles add to what is there.
        if let (PackedForm::Blocks(blocks), Layout::Tiled) = (&weight.form, y.layout) {
            return self.tiled_product(
                y,
                blocks,
                weight.rows,
                x.float(),
                product::ProductOutput::Added,
            );
        }
        let product = self.integer_product(y, weight)?;
        self.add(x, &product, 1.0)
    }

    fn add_bias(&self, y: &mut Activation, bias: &Hidden) -> Result<()> {
        self.kernels.launch(&AddBias {
            y: y.half().into(),
            bias: bias.float().into(),
            n: y.columns,
            rows: y.rows,
        })
    }

    fn add(&self, x: &mut Hidden, y: &Activation, factor: f32) -> Result<()> {
        self.kernels.launch(&Add {
            x: x.float().into(),
            y: y.half().into(),
            count: x.count() as i64,
            factor,
        })
    }

    fn scale(&self, x: &mut Hidden, factor: f32) -> Result<()> {
        self.kernels.launch(&Scale { x: x.float().into(), count: x.count() as i64, factor })
    }

    fn add_rows(
        &self,
        x: &mut Hidden,
        y: &Activation,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()> {
        check_rows(rows, x.rows);
        let (targets, weights) = (self.gpu.upload(rows)?, self.gpu.upload(weights)?);
        self.kernels.launch(&AddRows {
            x: x.float().into(),
            y: y.half().into(),
            rows: (&targets).into(),
            weights: (&weights).into(),
            n: x.columns,
            target_rows: x.rows,
            count: rows.len(),
        })
    }
}

impl Cuda {
    /// The rows of `from` that `rows` names.
    fn select(
        &self,
        from: SourceRows<'_>,
        columns: usize,
        rows: &[u32],
        to: &Buffer,
    ) -> Result<()> {
        check_rows(rows, from.rows);
        self.select_named(from, columns, (&self.gpu.upload(rows)?, rows.len()), to)
    }

    /// The same of rows that were checked and uploaded.
    pub(super) fn select_named(
        &self,
        from: SourceRows<'_>,
        columns: usize,
        (rows, count): (&Buffer, usize),
        to: &Buffer,
    ) -> Result<()> {
        self.kernels.launch(&Select {
            x: from.values,
            rows: rows.into(),
            columns,
            y: to.into(),
            element: from.element,
            source_rows: from.rows,
            count,
        })
    }
}

/// Kernels take rows as they are named.
fn check_rows(rows: &[u32], count: usize) {
    let last = rows.iter().max();
    assert!(last.is_none_or(|last| (*last as usize) < count), "row {last:?} of {count}");
}
