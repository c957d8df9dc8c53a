/*! A quantized network in training: codes that stay, and scales, norms and clip ratios that change.

All blocks' codes are on the backend; what products read is laid out block by block, for each pass anew, since scales change
from step to step. */

use half::f16;

use super::blocks::BlockBuilder;
use super::runnable::{LoadedBlock, Runnable, StoredBlock};
use super::stored::QuantizedSite;
use super::tensors::expect;
use super::weights::BlockWeights;
use crate::backend::{Matrix, Train};
use crate::model::backward::{BlockCodes, BlockGradient};
use crate::model::block::{Block, Observer};
use crate::model::sites::{EMBEDDING, FINAL_NORM};
use crate::model::{Architecture, AttentionSpecs};
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::ScaleFormat;
use crate::{Error, Result};

/// The trained values of a quantized linear, as a checkpoint holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearValues {
    /// What scales of groups are rounded to; those of outliers are f16.
    pub scale: ScaleFormat,
    /// `[scale rows, groups]`.
    pub scales: Vec<f16>,
    /// `[rows]`; empty without outliers, or with outliers in f16.
    pub outlier_scales: Vec<f16>,
}

/// The trained values of a site.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteValues {
    /// Clip ratio of the activation; none where it has 16 bits.
    pub clip: Option<f32>,
    /// Its linears; none for an unquantized one.
    pub linears: Vec<Option<LinearValues>>,
}

/// The trained values of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockValues {
    /// The norms before attention and before the MLP, `[hidden]`.
    pub norms: [Vec<f32>; 2],
    /// QK-norm, `[head_dim]`, if there is one.
    pub qk_norms: Option<[Vec<f32>; 2]>,
    /// Its sites.
    pub sites: Vec<SiteValues>,
}

/// Gradients of everything that a network trains, of the sum of its tokens' losses.
pub struct NetworkGradient {
    /// Of its blocks.
    pub blocks: Vec<BlockGradient>,
    /// Of the last norm, `[hidden]`.
    pub final_norm: Vec<f32>,
}

struct TrainedBlock<'a, B: Train> {
    weights: BlockWeights<'a, B>,
    sites: Vec<QuantizedSite<B::Quantized>>,
    key_mean: Option<Vec<f32>>,
}

/// A quantized network in training, for windows of one length.
pub struct TrainedNetwork<'a, B: Train> {
    backend: &'a B,
    architecture: Architecture,
    attention: AttentionSpecs,
    embedding: B::Weight<'a>,
    blocks: Vec<TrainedBlock<'a, B>>,
    final_norm: B::Hidden,
    head: B::LossHead,
}

impl<'a, B: Train> TrainedNetwork<'a, B> {
    /// Loads all of a checkpoint.
    ///
    /// # Errors
    /// Input: a tensor cannot be read.
    pub fn load(model: &Runnable<'a, B>, seq_len: usize) -> Result<Self> {
        let Runnable { backend, tensors, ref architecture, kv, .. } = *model;
        let table = [architecture.vocabulary, architecture.hidden];
        let embedding = backend.load(expect(tensors, EMBEDDING, &table)?)?;
        let mut blocks = Vec::new();
        for index in 0..architecture.blocks {
            let (weights, StoredBlock { sites, key_mean }) = quantized(model, index)?;
            let sites = sites.into_iter().map(|site| site.restore(backend));
            blocks.push(TrainedBlock { weights, sites: sites.collect::<Result<_>>()?, key_mean });
        }
        let norm = expect(tensors, FINAL_NORM, &[architecture.hidden])?.to_f32()?;
        let head = backend.load(expect(tensors, architecture.head_name(), &table)?)?;
        Ok(Self {
            backend,
            attention: AttentionSpecs::of(architecture, kv, seq_len),
            architecture: architecture.clone(),
            embedding,
            blocks,
            final_norm: row(backend, norm)?,
            head: backend.loss_head(&head)?,
        })
    }

    /// Sets a block's values.
    pub fn set_block(&mut self, index: usize, values: &BlockValues) -> Result<()> {
        let block = &mut self.blocks[index];
        block.weights.set_norms(&values.norms, values.qk_norms.as_ref());
        for (site, values) in block.sites.iter_mut().zip(&values.sites) {
            if let Some(clip) = values.clip {
                site.format.clip = clip;
            }
            for (linear, values) in site.linears.iter_mut().zip(&values.linears) {
                if let (Some(linear), Some(values)) = (linear, values) {
                    self.backend.rescale(linear, &values.scales, &values.outlier_scales)?;
                }
            }
        }
        Ok(())
    }

    /// Sets the last norm.
    pub fn set_final_norm(&mut self, norm: &[f32]) -> Result<()> {
        self.final_norm = row(self.backend, norm.to_vec())?;
        Ok(())
    }

    /// The divergence of each of `tokens`, complete windows, from normed hidden states of the source, in nats.
    pub fn divergences(
        &self,
        tokens: &[u32],
        original: &B::Activation,
        checkpoint: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut x = self.backend.embed(&self.embedding, tokens)?;
        for block in &self.blocks {
            checkpoint()?;
            let running = self.running(block)?;
            running.forward(self.backend, &self.attention, &mut x, &mut Observer::none())?;
        }
        let normed = self.backend.rms_norm(&x, &self.final_norm, self.architecture.norm_epsilon)?;
        Ok(self.backend.divergence_backward(&normed, original, &self.head)?.0)
    }

    /// The divergence of each of `tokens`, and the gradients of their sum.
    pub fn gradients(
        &self,
        tokens: &[u32],
        original: &B::Activation,
        checkpoint: &mut dyn FnMut() -> Result<()>,
    ) -> Result<(Vec<f64>, NetworkGradient)> {
        let Self { backend, attention, .. } = self;
        let epsilon = self.architecture.norm_epsilon;
        let mut inputs = Vec::with_capacity(self.blocks.len());
        let mut x = backend.embed(&self.embedding, tokens)?;
        for block in &self.blocks {
            checkpoint()?;
            let running = self.running(block)?;
            let mut output = backend.duplicate(&x)?;
            running.forward(*backend, attention, &mut output, &mut Observer::none())?;
            inputs.push(std::mem::replace(&mut x, output));
        }
        let normed = backend.rms_norm(&x, &self.final_norm, epsilon)?;
        let (nats, d_normed) = backend.divergence_backward(&normed, original, &self.head)?;
        drop(normed);
        let (mut d_x, final_norm) =
            backend.rms_norm_backward(&x, &self.final_norm, epsilon, &d_normed, None)?;
        drop((x, d_normed));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, input) in self.blocks.iter().zip(inputs).rev() {
            checkpoint()?;
            let running = self.running(block)?;
            let (d_input, gradient) =
                running.backward(*backend, attention, &block.codes(), &input, d_x)?;
            d_x = d_input;
            blocks.push(gradient);
        }
        blocks.reverse();
        Ok((nats, NetworkGradient { blocks, final_norm }))
    }

    /// A block with its present values.
    fn running(&self, block: &TrainedBlock<'a, B>) -> Result<Block<B>> {
        let builder = BlockBuilder::new(self.backend, &self.architecture, &block.weights);
        let builder = builder.with_key_mean(block.key_mean.as_deref()).without_reordering();
        builder.quantized(&block.sites)
    }
}

impl<B: Train> TrainedBlock<'_, B> {
    fn codes(&self) -> BlockCodes<'_, B::Quantized> {
        self.sites.iter().map(|site| site.linears.iter().map(Option::as_ref).collect()).collect()
    }
}

impl BlockValues {
    /// Those that a checkpoint holds.
    fn of<B: Train>(
        weights: &BlockWeights<'_, B>,
        sites: &[QuantizedSite<QuantizedLinear>],
    ) -> Self {
        let (norms, qk_norms) = weights.norm_values();
        let site = |site: &QuantizedSite<QuantizedLinear>| {
            let linears = site.linears.iter();
            SiteValues {
                clip: (site.format.row.numbers.bits < 16).then_some(site.format.clip),
                linears: linears.map(|linear| linear.as_ref().map(LinearValues::of)).collect(),
            }
        };
        Self { norms, qk_norms, sites: sites.iter().map(site).collect() }
    }
}

impl LinearValues {
    fn of(linear: &QuantizedLinear) -> Self {
        let outlier_scales = match &linear.outliers {
            OutlierBlock::None | OutlierBlock::F16(_) => Vec::new(),
            OutlierBlock::Int8 { scales, .. } | OutlierBlock::Fp8 { scales, .. } => scales.clone(),
        };
        let scale = linear.format.row.numbers.scale;
        Self { scale, scales: linear.scales.clone(), outlier_scales }
    }
}

/// What is trained of a checkpoint, as it holds it: each block's values, and the last norm.
///
/// # Errors
/// Input: a tensor cannot be read.
pub fn trained_values<B: Train>(model: &Runnable<'_, B>) -> Result<(Vec<BlockValues>, Vec<f32>)> {
    let blocks = (0..model.architecture.blocks).map(|index| {
        let (weights, StoredBlock { sites, .. }) = quantized(model, index)?;
        Ok(BlockValues::of(&weights, &sites))
    });
    let blocks = blocks.collect::<Result<_>>()?;
    let norm = expect(model.tensors, FINAL_NORM, &[model.architecture.hidden])?;
    Ok((blocks, norm.to_f32()?))
}

/// A block of a checkpoint.
fn quantized<'a, B: Train>(
    model: &Runnable<'a, B>,
    index: usize,
) -> Result<(BlockWeights<'a, B>, StoredBlock)> {
    let LoadedBlock { weights, stored } = model.load(index)?;
    let stored = stored.ok_or_else(|| Error::input(format!("{} is not quantized", model.name)))?;
    Ok((weights, stored))
}

fn row<B: Train>(backend: &B, data: Vec<f32>) -> Result<B::Hidden> {
    backend.upload(Matrix { rows: 1, columns: data.len(), data })
}
