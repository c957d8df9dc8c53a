/*! Channel energies of every site, measured on the stream through the original blocks. */

use super::division::Division;
use crate::backend::{Backend, Tensor};
use crate::model::block::{Block, Observer, Seen};
use crate::model::{Architecture, AttentionSpecs};
use crate::network::{BlockBuilder, BlockWeights, Stream};
use crate::progress::Progress;
use crate::{Error, Result};

/// Sum of squares of each channel of a block's sites over the calibration tokens: the diagonal of GPTQ's Hessian up
/// to a factor (outlier.py, metric `hessian`). An expert's mlp_act sees the tokens that go there, and mlp_in a token once
/// for each of its experts.
pub type Energies = Vec<Vec<f64>>;

/// What calibration finds out about a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Of its sites.
    pub energies: Energies,
    /// The mean over the tokens of the embedded keys, `[kv_heads * head_dim]`.
    pub key_mean: Vec<f32>,
}

/// What a measurement leaves of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterBlock {
    /// The states after the block.
    Advanced,
    /// The states before the block, as they were.
    Unchanged,
}

/// Measures blocks in full precision.
pub(super) struct EnergyMeter<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// The network.
    pub architecture: &'a Architecture,
    /// Attention over keys and values as the source has them.
    pub attention: &'a AttentionSpecs,
    /// Whose windows the stream holds.
    pub division: Division<'a>,
    /// Asked whether to stop.
    pub progress: &'a dyn Progress,
}

impl<B: Backend> EnergyMeter<'_, B> {
    /// Measures a block on `stream`. Of a stream that is left unchanged it also returns what attn_out sees of each batch:
    /// attention over entire windows is much of a block's work, and the stream passes it again.
    pub(super) fn measure(
        &self,
        weights: &BlockWeights<B>,
        stream: &mut Stream<B>,
        after: AfterBlock,
    ) -> Result<(Statistics, Vec<B::Activation>)> {
        let Self { backend, architecture, attention, division, .. } = *self;
        let block = BlockBuilder::new(backend, architecture, weights).source()?;
        let sites = architecture.sites(weights.index);
        let widths: Vec<usize> = sites.iter().map(|site| site.channels).collect();
        let mut heads = Vec::new();
        let mut chunks = Vec::with_capacity(stream.chunks.len());
        for chunk in &stream.chunks {
            let mut sums = ChunkSums::zeros(&widths, attention);
            for batch in &mut stream.batches[chunk.clone()] {
                heads.extend(self.add(&block, batch, &mut sums, after)?);
            }
            chunks.push(sums.concat());
        }
        let all = division.reduce_vectors(&chunks)?;
        let ChunkSums { tokens, keys, energies } = ChunkSums::of(&all, &widths, attention);
        for (energy, site) in energies.iter().zip(sites) {
            check_finite(energy, &site.name)?;
        }
        let key_mean = keys.iter().map(|sum| (sum / tokens) as f32).collect();
        Ok((Statistics { energies, key_mean }, heads))
    }

    /// Adds a batch; what attn_out sees of it, where the batch is left unchanged.
    fn add(
        &self,
        block: &Block<B>,
        batch: &mut B::Hidden,
        sums: &mut ChunkSums,
        after: AfterBlock,
    ) -> Result<Option<B::Activation>> {
        let Self { backend, attention, progress, .. } = *self;
        progress.check_stop()?;
        let ChunkSums { tokens, keys, energies } = sums;
        *tokens += batch.rows() as f64;
        let mut see = |seen: Seen, x: &B::Activation| match seen {
            Seen::Site(site) => backend.add_energy(x, &mut energies[site]),
            Seen::Keys => backend.add_key_sums(attention.of_block(block.index), x, keys),
            _ => Ok(()),
        };
        let observer = &mut Observer::new(&mut see);
        match after {
            AfterBlock::Advanced => {
                backend.reload(batch)?;
                block.forward(backend, attention, batch, observer)?;
                backend.offload(batch)?;
                Ok(None)
            }
            AfterBlock::Unchanged => {
                let mut copy = backend.duplicate(batch)?;
                let heads = block.observe_attention(backend, attention, &mut copy, observer)?;
                block.observe_mlp(backend, copy, observer)?;
                Ok(heads)
            }
        }
    }
}

/// What is summed over the tokens of a chunk, or of all.
struct ChunkSums {
    /// How many tokens there are.
    tokens: f64,
    /// The embedded keys.
    keys: Vec<f64>,
    energies: Energies,
}

impl ChunkSums {
    fn zeros(widths: &[usize], attention: &AttentionSpecs) -> Self {
        let zeros = |length: usize| vec![0.0; length];
        let keys = zeros(attention.of_block(0).kv_heads * attention.of_block(0).head_dim);
        Self { tokens: 0.0, keys, energies: widths.iter().map(|width| zeros(*width)).collect() }
    }

    /// All of it one after the other.
    fn concat(self) -> Vec<f64> {
        let Self { tokens, keys, energies } = self;
        [vec![tokens], keys, energies.concat()].concat()
    }

    /// Undoes [`concat`](Self::concat).
    fn of(all: &[f64], widths: &[usize], attention: &AttentionSpecs) -> Self {
        let mut sums = Self::zeros(widths, attention);
        let mut values = all.iter().copied();
        let Self { tokens, keys, energies } = &mut sums;
        for sum in std::iter::once(tokens).chain(keys).chain(energies.iter_mut().flatten()) {
            *sum = values.next().expect("as many as there are sums");
        }
        sums
    }
}

fn check_finite(energy: &[f64], site: &str) -> Result<()> {
    let Some(channel) = energy.iter().position(|energy| !energy.is_finite()) else { return Ok(()) };
    Err(Error::input(format!("channel {channel} of {site} is not finite in full precision")).hint(
        "the source's weights overflow on this text: is the checkpoint sound? On a GPU, \
         activations beyond f16 may be the reason: try --device cpu",
    ))
}
