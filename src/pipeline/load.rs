/*! Blocks from named tensors: as the source holds them, arranged for GPTQ's Hessians, or quantized. */

use super::plan::{BlockPlan, SitePlan};
use crate::backend::{AttentionSpec, Backend, Matrix};
use crate::checkpoint::linear::read_floats;
use crate::checkpoint::{Dtype, Tensor, TensorSpec, Tensors};
use crate::model::Architecture;
use crate::model::block::{Block, Linear, Site, Treatment};
use crate::model::sites::{SITES, SiteKind};
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

/// A block's weights where the backend computes, as the source has them: loaded once, used by every
/// stage.
pub struct BlockWeights<'a, B: Backend> {
    /// The block's number.
    pub index: usize,
    /// RMSNorm's weights before attention and before the MLP.
    norms: [Matrix; 2],
    /// The weights of each site's linears; none for a linear that is not in the source.
    pub sites: [Vec<Option<B::Weight<'a>>>; 4],
}

impl<'a, B: Backend> BlockWeights<'a, B> {
    /// Loads block `index`, all of it where `all` is true, or else only the linears for which
    /// `wanted(site, linear)` says so.
    pub fn load(
        backend: &B,
        tensors: &'a dyn Tensors,
        architecture: &Architecture,
        index: usize,
        wanted: impl Fn(usize, usize) -> bool,
    ) -> Result<Self> {
        let hidden = architecture.hidden;
        let [attn, mlp] = architecture.norm_names(index);
        let norm = |name: &str| {
            let data = expect(tensors, name, &[hidden])?.to_f32()?;
            Ok::<_, Error>(Matrix { rows: 1, columns: hidden, data })
        };
        let mut sites = [vec![], vec![], vec![], vec![]];
        for (at, spec) in architecture.sites(index).iter().enumerate() {
            for (linear, spec) in spec.linears.iter().enumerate() {
                let weight = if wanted(at, linear) {
                    let name = format!("{}.weight", spec.name);
                    let tensor = expect(tensors, &name, &[spec.rows, spec.columns])?;
                    Some(backend.load(tensor)?)
                } else {
                    None
                };
                sites[at].push(weight);
            }
        }
        Ok(Self { index, norms: [norm(&attn)?, norm(&mlp)?], sites })
    }

    /// The weight of a linear that was wanted.
    fn weight(&self, site: usize, linear: usize) -> &B::Weight<'a> {
        self.sites[site][linear].as_ref().expect("a linear that is used was asked for")
    }
}

/// A site of a quantized block: its order and format, and its linears; none where one stays as the
/// source has it. `Q` is the host's or a backend's form of a quantized linear.
#[derive(Clone, Debug)]
pub struct QuantizedSite<Q> {
    /// Its order and format.
    pub format: SiteFormat,
    /// Its linears.
    pub linears: Vec<Option<Q>>,
}

impl QuantizedSite<QuantizedLinear> {
    /// The same site on a backend.
    pub fn restore<B: Backend>(self, backend: &B) -> Result<QuantizedSite<B::Quantized>> {
        let Self { format, linears } = self;
        let restore =
            |linear: Option<QuantizedLinear>| linear.map(|linear| backend.restore(linear));
        let linears = linears.into_iter().map(|linear| restore(linear).transpose());
        Ok(QuantizedSite { format, linears: linears.collect::<Result<_>>()? })
    }
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

/// Asks the backend whether it computes with every format of a plan.
///
/// # Errors
/// The backend's, which names another way.
pub fn check_levels<B: Backend>(backend: &B, blocks: &[BlockPlan]) -> Result<()> {
    for site in blocks.iter().flatten() {
        let linears = site.linears.iter().map(|linear| (linear.bits, linear.levels));
        let quantized = linears.chain([(site.bits, site.levels)]).filter(|(bits, _)| *bits < 16);
        quantized.into_iter().try_for_each(|(_, levels)| backend.check_levels(levels))?;
    }
    Ok(())
}

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

/// A block in full precision.
pub fn source_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
) -> Result<Block<B>> {
    block(backend, architecture, weights, None, |site| {
        let linears = 0..weights.sites[site].len();
        let linears = linears
            .map(|linear| Ok(Linear::Dense(backend.dense(weights.weight(site, linear), None)?)));
        Ok((Treatment::Source, linears.collect::<Result<_>>()?))
    })
}

/// A block whose linears are still to be quantized: its sites order and quantize their activations, and
/// have no linears yet.
pub fn open_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    formats: &[SiteFormat],
    key_mean: Option<&[f32]>,
) -> Result<Block<B>> {
    block(backend, architecture, weights, key_mean, |site| {
        let format = &formats[site];
        Ok((treatment::<B>(format, backend.site(format)?), Vec::new()))
    })
}

/// A block with full-precision weights behind quantized activations: what GPTQ's Hessians are measured
/// on. It is only to be observed: the last site's linear, whose product nobody looks at and which is
/// the block's largest, is left out.
pub fn hessian_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    formats: &[SiteFormat],
    key_mean: Option<&[f32]>,
) -> Result<Block<B>> {
    block(backend, architecture, weights, key_mean, |site| {
        let format = &formats[site];
        let order = backend.site(format)?;
        let seen = match SITES[site] {
            SiteKind::MlpAct => 0,
            _ => weights.sites[site].len(),
        };
        let linears = (0..seen).map(|linear| {
            let weight = weights.weight(site, linear);
            Ok(Linear::Dense(backend.dense(weight, Some(&order))?))
        });
        let linears = linears.collect::<Result<_>>()?;
        Ok((treatment::<B>(format, order), linears))
    })
}

/// One site in its order, with full-precision weights but for `quantized`, a linear's number and its
/// weights. Activations are quantized as `format` says, or with `float` left in floating point.
pub fn arranged_site<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    at: usize,
    format: &SiteFormat,
    float: bool,
    quantized: Option<(usize, &B::Quantized)>,
) -> Result<Site<B>> {
    let order = backend.site(format)?;
    let linears = (0..weights.sites[at].len()).map(|linear| match quantized {
        Some((changed, codes)) if changed == linear => Ok(Linear::Dense(backend.dense_of(codes)?)),
        _ => Ok(Linear::Dense(backend.dense(weights.weight(at, linear), Some(&order))?)),
    });
    let linears = linears.collect::<Result<_>>()?;
    let treatment = if float { Treatment::Arranged(order) } else { treatment::<B>(format, order) };
    let name = architecture.sites(weights.index)[at].name.clone();
    Ok(Site { kind: SITES[at], name, treatment, linears })
}

/// A block as the checkpoint means it: the integer path, or with activations in floating point the
/// weights that the codes stand for.
pub fn quantized_block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    sites: &[QuantizedSite<B::Quantized>],
    key_mean: Option<&[f32]>,
) -> Result<Block<B>> {
    block(backend, architecture, weights, key_mean, |site| {
        let format = &sites[site].format;
        let order = backend.site(format)?;
        let linears = quantized_linears(backend, weights, site, &sites[site], &order)?;
        Ok((treatment::<B>(format, order), linears))
    })
}

/// The linears of one site of such a block.
pub fn quantized_linears<B: Backend>(
    backend: &B,
    weights: &BlockWeights<B>,
    site: usize,
    quantized: &QuantizedSite<B::Quantized>,
    order: &B::Site,
) -> Result<Vec<Linear<B>>> {
    let QuantizedSite { format, linears } = quantized;
    let linears = linears.iter().enumerate().map(|(linear, quantized)| match quantized {
        None => {
            let weight = weights.weight(site, linear);
            Ok(Linear::Dense(backend.dense(weight, Some(order))?))
        }
        Some(quantized) if format.bits == 16 => Ok(Linear::Dense(backend.dense_of(quantized)?)),
        Some(quantized) => Ok(Linear::Packed(backend.packed(quantized)?)),
    });
    linears.collect()
}

fn treatment<B: Backend>(format: &SiteFormat, site: B::Site) -> Treatment<B> {
    if format.bits == 16 { Treatment::Arranged(site) } else { Treatment::Quantized(site) }
}

fn block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    key_mean: Option<&[f32]>,
    mut fill: impl FnMut(usize) -> Result<(Treatment<B>, Vec<Linear<B>>)>,
) -> Result<Block<B>> {
    let names = architecture.sites(weights.index).map(|site| site.name);
    let mut site = |at: usize| {
        let (treatment, linears) = fill(at)?;
        Ok::<_, Error>(Site { kind: SITES[at], name: names[at].clone(), treatment, linears })
    };
    let key_mean = key_mean.map(|mean| {
        let data = mean.to_vec();
        backend.upload(Matrix { rows: 1, columns: data.len(), data })
    });
    Ok(Block {
        key_mean: key_mean.transpose()?,
        attn_norm: backend.upload(weights.norms[0].clone())?,
        mlp_norm: backend.upload(weights.norms[1].clone())?,
        epsilon: architecture.norm_epsilon,
        sites: [site(0)?, site(1)?, site(2)?, site(3)?],
    })
}

/// The tensor of a block's mean keys.
pub fn key_mean_spec(architecture: &Architecture, block: usize) -> TensorSpec {
    let shape = [architecture.kv_heads * architecture.head_dim];
    TensorSpec::new(architecture.key_mean_name(block), Dtype::F32, shape)
}

/// The mean keys of block `block` as a checkpoint holds them, where its cache is centred.
pub fn read_key_mean(
    stored: &impl crate::checkpoint::Stored,
    architecture: &Architecture,
    block: usize,
    kv: &KvFormat,
) -> Result<Option<Vec<f32>>> {
    let read = || read_floats(stored, &key_mean_spec(architecture, block));
    kv.is_centered().then(read).transpose()
}

/// A plan's sites with their linears read back from where they are stored.
pub fn read_sites(
    stored: &impl crate::checkpoint::Stored,
    plan: &[SitePlan],
) -> Result<Vec<QuantizedSite<QuantizedLinear>>> {
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
