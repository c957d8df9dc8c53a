/*! Blocks from named tensors: as the source holds them, arranged for GPTQ's Hessians, or quantized. */

use rayon::prelude::*;

use super::plan::SitePlan;
use crate::backend::{AttentionSpec, Backend, Matrix};
use crate::checkpoint::{Tensor, Tensors};
use crate::model::Architecture;
use crate::model::block::{Block, Linear, Site, Treatment};
use crate::model::sites::{LinearSpec, SITES, SiteKind};
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;
use crate::quant::weights::dequantize;
use crate::{Error, Result};

/// A site of a quantized block, on the host.
#[derive(Clone, Debug)]
pub struct QuantizedSite {
    /// Its order and format.
    pub format: SiteFormat,
    /// Its linears; none where one stays as the source has it.
    pub linears: Vec<Option<QuantizedLinear>>,
}

/// What attention needs to know for windows of `seq_len` tokens.
pub fn attention_spec(architecture: &Architecture, kv: KvFormat, seq_len: usize) -> AttentionSpec {
    let (cos, sin) = architecture.rope_tables(seq_len);
    AttentionSpec {
        heads: architecture.heads,
        kv_heads: architecture.kv_heads,
        head_dim: architecture.head_dim,
        seq_len,
        cos,
        sin,
        kv,
    }
}

/// Keys and values in floating point, as the source's own.
pub const FLOAT_KV: KvFormat = KvFormat { bits: 16, clip: 1.0, rotate: false, after_rope: false };

/// A tensor of the shape the architecture asks for.
pub fn expect<'a>(tensors: &'a dyn Tensors, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
    let tensor = tensors.tensor(name)?;
    if tensor.shape == shape {
        return Ok(tensor);
    }
    Err(Error::input(format!(
        "tensor `{name}` has shape {:?}, config.json makes it {shape:?}",
        tensor.shape
    ))
    .hint("config.json and the weights do not belong together: fetch the checkpoint again"))
}

/// A vector on the backend, as one row.
pub fn vector<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    name: &str,
    len: usize,
) -> Result<B::Tensor> {
    let data = expect(tensors, name, &[len])?.to_f32()?;
    backend.upload(Matrix { rows: 1, columns: len, data })
}

/// A linear's weight `[out, in]` on the host.
pub fn matrix(tensors: &dyn Tensors, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
    let tensor = expect(tensors, name, &[rows, columns])?;
    let data = tensor.to_f32()?;
    tensor.release();
    Ok(Matrix { rows, columns, data })
}

/// A linear's weight with its columns in the order of the site that feeds it, transformed.
pub fn arranged(tensors: &dyn Tensors, linear: &LinearSpec, format: &SiteFormat) -> Result<Matrix> {
    const ROWS: usize = 32;
    let name = format!("{}.weight", linear.name);
    let tensor = expect(tensors, &name, &[linear.rows, linear.columns])?;
    let width = format.width();
    let mut data = vec![0.0; linear.rows * width];
    data.par_chunks_mut(ROWS * width).enumerate().try_for_each(|(chunk, out)| {
        let first = chunk * ROWS;
        let rows = tensor.rows_f32(first..first + out.len() / width)?;
        for (row, out) in rows.chunks(linear.columns).zip(out.chunks_mut(width)) {
            format.arrange(row, out);
        }
        Ok::<(), Error>(())
    })?;
    tensor.release();
    Ok(Matrix { rows: linear.rows, columns: width, data })
}

/// Block `index` in full precision.
pub fn source_block<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    architecture: &Architecture,
    index: usize,
) -> Result<Block<B>> {
    block(backend, tensors, architecture, index, |site| {
        let spec = &architecture.sites(index)[site];
        let linears = spec.linears.iter().map(|linear| {
            let name = format!("{}.weight", linear.name);
            dense(backend, &matrix(tensors, &name, linear.rows, linear.columns)?)
        });
        Ok((Treatment::Source, linears.collect::<Result<_>>()?))
    })
}

/// Block `index` with full-precision weights behind quantized activations: what GPTQ's Hessians are
/// measured on. It is only to be observed: the last site's linear, whose product nobody looks at and
/// which is the block's largest, is left out.
pub fn hessian_block<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    architecture: &Architecture,
    index: usize,
    formats: &[SiteFormat],
) -> Result<Block<B>> {
    block(backend, tensors, architecture, index, |site| {
        let format = &formats[site];
        let spec = &architecture.sites(index)[site];
        let seen: &[LinearSpec] = match spec.kind {
            SiteKind::MlpAct => &[],
            _ => &spec.linears,
        };
        let linears = seen.iter().map(|linear| dense(backend, &arranged(tensors, linear, format)?));
        Ok((treatment(backend, format)?, linears.collect::<Result<_>>()?))
    })
}

/// Block `index` as the checkpoint means it: the integer path, or with activations in floating point
/// the weights that the codes stand for.
pub fn quantized_block<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    architecture: &Architecture,
    index: usize,
    sites: &[QuantizedSite],
) -> Result<Block<B>> {
    block(backend, tensors, architecture, index, |site| {
        let spec = &architecture.sites(index)[site];
        let QuantizedSite { format, linears } = &sites[site];
        let linears =
            linears.iter().zip(&spec.linears).map(|(quantized, linear)| match quantized {
                None => dense(backend, &arranged(tensors, linear, format)?),
                Some(quantized) if format.bits == 16 => dense(
                    backend,
                    &Matrix {
                        rows: quantized.rows,
                        columns: format.width(),
                        data: dequantize(quantized),
                    },
                ),
                Some(quantized) => Ok(Linear::Packed(backend.packed(quantized)?)),
            });
        Ok((treatment(backend, format)?, linears.collect::<Result<_>>()?))
    })
}

fn dense<B: Backend>(backend: &B, weight: &Matrix) -> Result<Linear<B>> {
    Ok(Linear::Dense(backend.dense(weight)?))
}

fn treatment<B: Backend>(backend: &B, format: &SiteFormat) -> Result<Treatment<B>> {
    let site = backend.site(format)?;
    Ok(if format.bits == 16 { Treatment::Arranged(site) } else { Treatment::Quantized(site) })
}

fn block<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    architecture: &Architecture,
    index: usize,
    mut fill: impl FnMut(usize) -> Result<(Treatment<B>, Vec<Linear<B>>)>,
) -> Result<Block<B>> {
    let norms = architecture.norm_names(index);
    let norm = |name: &str| vector(backend, tensors, name, architecture.hidden);
    let names = architecture.sites(index).map(|site| site.name);
    let mut site = |at: usize| {
        let (treatment, linears) = fill(at)?;
        Ok::<_, Error>(Site { kind: SITES[at], name: names[at].clone(), treatment, linears })
    };
    Ok(Block {
        attn_norm: norm(&norms[0])?,
        mlp_norm: norm(&norms[1])?,
        epsilon: architecture.norm_epsilon,
        sites: [site(0)?, site(1)?, site(2)?, site(3)?],
    })
}

/// A plan's sites with their linears read back from where they are stored.
pub fn read_sites(
    stored: &impl crate::checkpoint::Stored,
    plan: &[SitePlan],
) -> Result<Vec<QuantizedSite>> {
    plan.iter()
        .map(|site| {
            let order = crate::checkpoint::linear::read_order(
                stored,
                &site.name,
                site.channels,
                site.groups() * site.group_size,
                site.outlier_channels,
            )?;
            let linears = site.linears.iter().map(|linear| match linear.bits {
                16 => Ok(None),
                _ => crate::checkpoint::linear::from_tensors(
                    stored,
                    &linear.name,
                    &site.shape(linear),
                )
                .map(Some),
            });
            Ok(QuantizedSite {
                linears: linears.collect::<Result<_>>()?,
                format: site.format(order),
            })
        })
        .collect()
}
