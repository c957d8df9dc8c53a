//! A block's operations. The larger ones stand in files of their own, under the same names.

use super::Cuda;
use super::fused::Columns;
use super::gpu::Buffer;
use super::kernels::elementwise::{
    Add, AddBias, AddRows, Embed, HeadNorm, RmsNorm, Select, SiluMul, SiluMulPermuted,
};
use super::kernels::{Float, product};
use super::product::Precision;
use super::tensor::{Activation, Dense, Form, Hidden, Layout, Packed, Rows, Site, Slots, Weight};
use crate::Result;
use crate::backend::{AttentionSpec, Forward, Placement, Qkv};

impl Forward for Cuda {
    type Rows = Rows;
    type Dense = Dense;
    type Packed = Packed;
    type Site = Site;

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Hidden> {
        let (rows, columns) = (tokens.len(), table.columns);
        let y = self.gpu.alloc(4 * rows * columns)?;
        let tokens = self.gpu.upload(tokens)?;
        self.kernels.launch(&Embed {
            table: (&*table.data).into(),
            tokens: (&tokens).into(),
            hidden: columns,
            y: (&y).into(),
            element: table.element(),
            vocabulary: table.rows,
            count: rows,
        })?;
        Ok(Hidden::new(rows, columns, y))
    }

    fn select_hidden(&self, x: &Hidden, rows: &[u32]) -> Result<Hidden> {
        let to = self.gpu.alloc(4 * rows.len() * x.columns)?;
        self.select(Float::Single, x.float(), x.columns, rows, &to)?;
        Ok(Hidden::new(rows.len(), x.columns, to))
    }

    fn select_rows(&self, x: &Activation, rows: &[u32]) -> Result<Activation> {
        let to = self.half(rows.len(), x.columns)?;
        self.select(Float::Half, x.half(), x.columns, rows, to.half())?;
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

    fn qk_norm(&self, x: &mut Activation, weight: &Hidden, epsilon: f32) -> Result<()> {
        let heads = x.count() / weight.columns;
        self.kernels.launch(&HeadNorm {
            x: x.half().into(),
            weight: weight.float().into(),
            heads,
            n: weight.columns,
            epsilon,
        })
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

    fn permute(&self, x: &Activation, site: &Site) -> Result<Activation> {
        let y = self.half(x.rows, site.format.width())?;
        let (from, to) = ((x.half().into(), Float::Half), (y.half().into(), Float::Half));
        self.permute_rows(from, x.rows, site, to)?;
        Ok(y)
    }

    fn quantize(&self, x: &Activation, site: &Site, name: &str) -> Result<Rows> {
        self.quantize(x, site, name)
    }

    fn norm_quantize(
        &self,
        x: &Hidden,
        weight: &Hidden,
        epsilon: f32,
        site: &Site,
        name: &str,
    ) -> Result<Rows> {
        if self.takes_tiles(&site.format.row)
            && let Some(rows) = self.norm_rows(x, weight, epsilon, site, Layout::Tiled, name)?
        {
            return Ok(rows);
        }
        self.quantize(&self.rms_norm(x, weight, epsilon)?, site, name)
    }

    fn silu_quantize(
        &self,
        gate: Activation,
        up: &Activation,
        site: &Site,
        name: &str,
    ) -> Result<Rows> {
        let columns = if gate.slots.is_some() { Columns::Slots } else { Columns::Channels };
        if self.takes_tiles(&site.format.row)
            && let Some(rows) = self.silu_rows(&gate, up, columns, site, Layout::Tiled, name)?
        {
            return Ok(rows);
        }
        self.quantize(&self.silu_mul(gate, up)?, site, name)
    }

    fn dequantize(&self, x: &Rows) -> Result<Activation> {
        self.dequantize(x)
    }

    fn product(&self, x: &Activation, weight: &Dense) -> Result<Activation> {
        let y = self.half(x.rows, weight.rows)?;
        self.multiply(x, weight, y.half(), Precision::HalfToHalf, false)?;
        Ok(y)
    }

    fn add_product(&self, x: &mut Hidden, y: &Activation, weight: &Dense) -> Result<()> {
        self.multiply(y, weight, x.float(), Precision::HalfToFloat, true)
    }

    fn integer_product(&self, x: &Rows, weight: &Packed) -> Result<Activation> {
        let data = self.integer(x, weight, true)?;
        let slots = weight.slots.clone();
        Ok(Activation { slots, ..Activation::new(x.tokens, weight.rows, data) })
    }

    fn add_integer_product(&self, x: &mut Hidden, y: &Rows, weight: &Packed) -> Result<()> {
        // The other product's kernel has no such sum.
        if let (Form::Blocks(blocks), Layout::Tiled) = (&weight.form, y.layout)
            && product::is_for_many(y.tokens)
        {
            return self.tiled_product(y, blocks, weight.rows, x.float(), product::Output::Added);
        }
        let product = self.integer_product(y, weight)?;
        self.add(x, &product)
    }

    fn add_bias(&self, y: &mut Activation, bias: &Hidden) -> Result<()> {
        self.kernels.launch(&AddBias {
            y: y.half().into(),
            bias: bias.float().into(),
            n: y.columns,
            rows: y.rows,
        })
    }

    fn add(&self, x: &mut Hidden, y: &Activation) -> Result<()> {
        self.kernels.launch(&Add {
            x: x.float().into(),
            y: y.half().into(),
            count: x.count() as i64,
        })
    }

    fn add_rows(
        &self,
        x: &mut Hidden,
        y: &Activation,
        rows: &[u32],
        weights: &[f32],
    ) -> Result<()> {
        let (of, shares) = (self.gpu.upload(rows)?, self.gpu.upload(weights)?);
        self.kernels.launch(&AddRows {
            x: x.float().into(),
            y: y.half().into(),
            rows: (&of).into(),
            weights: (&shares).into(),
            n: x.columns,
            count: rows.len(),
        })
    }
}

impl Cuda {
    /// The rows of `from` that `rows` names.
    fn select(
        &self,
        element: Float,
        from: &Buffer,
        columns: usize,
        rows: &[u32],
        to: &Buffer,
    ) -> Result<()> {
        let named = self.gpu.upload(rows)?;
        self.kernels.launch(&Select {
            x: from.into(),
            rows: (&named).into(),
            columns,
            y: to.into(),
            element,
            count: rows.len(),
        })
    }
}
