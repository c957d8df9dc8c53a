/*! Blocks from named tensors: as the source holds them, arranged for GPTQ's Hessians, or quantized. */

use super::plan::{BlockPlan, SitePlan};
use crate::backend::{AttentionSpec, Backend, Matrix};
use crate::checkpoint::linear::read_floats;
use crate::checkpoint::{Dtype, Tensor, TensorSpec, Tensors};
use crate::model::Architecture;
use crate::model::block::{Block, Linear, Site, Treatment};
use crate::model::experts::Router;
use crate::model::sites::{LinearSpec, MLP_ACT, MLP_IN, SiteKind};
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
    /// Those of query and key heads, where there are any.
    head_norms: Option<[Matrix; 2]>,
    /// The router's weight, where there are experts.
    router: Option<B::Weight<'a>>,
    /// The weights of each site's linears; none for a linear that is not in the source.
    pub sites: Vec<Vec<Option<B::Weight<'a>>>>,
    /// The bias of each, if it has one.
    biases: Vec<Vec<Option<Matrix>>>,
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
        let row = |name: &str, columns: usize| {
            let data = expect(tensors, name, &[columns])?.to_f32()?;
            Ok::<_, Error>(Matrix { rows: 1, columns, data })
        };
        let pair = |[first, second]: [String; 2], columns| {
            Ok::<_, Error>([row(&first, columns)?, row(&second, columns)?])
        };
        let norms = pair(architecture.norm_names(index), hidden)?;
        let head_norms = architecture.head_norm_names(index);
        let head_norms = head_norms.map(|names| pair(names, architecture.head_dim)).transpose()?;
        let router = match (architecture.router_name(index), architecture.experts_of(index)) {
            (Some(name), Some(experts)) => {
                Some(backend.load(expect(tensors, &name, &[experts.count, hidden])?)?)
            }
            _ => None,
        };
        let (mut sites, mut biases) = (Vec::new(), Vec::new());
        for (at, spec) in architecture.sites(index).iter().enumerate() {
            let weight = |(linear, spec): (usize, &LinearSpec)| {
                let shape = [spec.rows, spec.columns];
                let load = || backend.load(expect(tensors, &spec.weight(), &shape)?);
                wanted(at, linear).then(load).transpose()
            };
            let weights = spec.linears.iter().enumerate().map(weight);
            sites.push(weights.collect::<Result<_>>()?);
            let bias =
                |spec: &LinearSpec| spec.bias().map(|name| row(&name, spec.rows)).transpose();
            biases.push(spec.linears.iter().map(bias).collect::<Result<_>>()?);
        }
        Ok(Self { index, norms, head_norms, router, sites, biases })
    }

    /// The biases of a site's linears on the backend.
    fn biases(&self, backend: &B, site: usize) -> Result<Vec<Option<B::Hidden>>> {
        let biases = self.biases[site].iter();
        biases.map(|bias| bias.clone().map(|bias| backend.upload(bias)).transpose()).collect()
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
        sliding_window: architecture.sliding_window,
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
        "{} has shape {:?}, config.json makes it {shape:?}",
        tensor.title(),
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
) -> Result<B::Hidden> {
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
    let specs = architecture.sites(weights.index);
    block(backend, architecture, weights, key_mean, |site| {
        let format = &formats[site];
        let order = backend.site(format)?;
        let seen = match specs[site].kind {
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
    Ok(Site { at, name, treatment, linears, biases: weights.biases(backend, at)? })
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
    let orders = sites.iter().map(|site| backend.site(&site.format));
    let orders = orders.collect::<Result<Vec<_>>>()?;
    let linears = (0..sites.len()).map(|at| {
        let feeds = if at == MLP_IN { orders[MLP_ACT..].iter().collect() } else { Vec::new() };
        quantized_linears(backend, weights, at, &sites[at], &orders[at], &feeds)
    });
    let linears = linears.collect::<Result<Vec<_>>>()?;
    let mut made = orders.into_iter().zip(linears);
    block(backend, architecture, weights, key_mean, |site| {
        let (order, linears) = made.next().expect("sites come in order");
        Ok((treatment::<B>(&sites[site].format, order), linears))
    })
}

/// The linears of one site of such a block. Of mlp_in, `feeds` are the sites that its pairs of gate and up enter.
pub fn quantized_linears<B: Backend>(
    backend: &B,
    weights: &BlockWeights<B>,
    site: usize,
    quantized: &QuantizedSite<B::Quantized>,
    order: &B::Site,
    feeds: &[&B::Site],
) -> Result<Vec<Linear<B>>> {
    let QuantizedSite { format, linears } = quantized;
    // Both of a pair in one order, and no bias in another.
    let alike =
        linears.iter().all(Option::is_some) && weights.biases[site].iter().all(Option::is_none);
    let feeds = |linear: usize| feeds.get(linear / 2).copied().filter(|_| alike);
    let linears = linears.iter().enumerate().map(|(linear, quantized)| match quantized {
        None => {
            let weight = weights.weight(site, linear);
            Ok(Linear::Dense(backend.dense(weight, Some(order))?))
        }
        Some(quantized) if format.row.numbers.bits == 16 => {
            Ok(Linear::Dense(backend.dense_of(quantized)?))
        }
        Some(quantized) => Ok(Linear::Packed(backend.pack(quantized, feeds(linear))?)),
    });
    linears.collect()
}

fn treatment<B: Backend>(format: &SiteFormat, site: B::Site) -> Treatment<B> {
    if format.row.numbers.bits == 16 {
        Treatment::Arranged(site)
    } else {
        Treatment::Quantized(site)
    }
}

fn block<B: Backend>(
    backend: &B,
    architecture: &Architecture,
    weights: &BlockWeights<B>,
    key_mean: Option<&[f32]>,
    mut fill: impl FnMut(usize) -> Result<(Treatment<B>, Vec<Linear<B>>)>,
) -> Result<Block<B>> {
    let sites = architecture.sites(weights.index).into_iter().enumerate().map(|(at, spec)| {
        let (treatment, linears) = fill(at)?;
        let biases = weights.biases(backend, at)?;
        Ok::<_, Error>(Site { at, name: spec.name, treatment, linears, biases })
    });
    let sites = sites.collect::<Result<_>>()?;
    let experts = architecture.experts_of(weights.index);
    let router = experts.zip(weights.router.as_ref()).map(|(experts, weight)| {
        let weight = backend.dense(weight, None)?;
        let (per_token, normalized) = (experts.per_token, experts.normalized);
        Ok::<_, Error>(Router { weight, per_token, normalized })
    });
    let head_norms = weights
        .head_norms
        .clone()
        .map(|[of_q, of_k]| Ok::<_, Error>([backend.upload(of_q)?, backend.upload(of_k)?]));
    let key_mean = key_mean.map(|mean| {
        let data = mean.to_vec();
        backend.upload(Matrix { rows: 1, columns: data.len(), data })
    });
    Ok(Block {
        key_mean: key_mean.transpose()?,
        attn_norm: backend.upload(weights.norms[0].clone())?,
        mlp_norm: backend.upload(weights.norms[1].clone())?,
        epsilon: architecture.norm_epsilon,
        head_norms: head_norms.transpose()?,
        router: router.transpose()?,
        sites,
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
                    linear.rows,
                    &site.weights(linear),
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
