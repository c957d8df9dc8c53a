/*! Channel energies of every site, measured on the stream through the original blocks. */

use std::ops::Range;

use super::division::Division;
use crate::backend::{Backend, Tensor};
use crate::model::block::{Block, Observer, Seen};
use crate::model::sites::{ATTN_IN, MLP_IN};
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

/// The part of a block that a stream passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockPart {
    /// attn_in and attn_out.
    Attention,
    /// mlp_in and every mlp_act.
    Mlp,
}

impl BlockPart {
    /// The part that begins with a site of a block.
    pub(super) fn beginning_at(site: usize) -> Option<Self> {
        match site {
            ATTN_IN => Some(Self::Attention),
            MLP_IN => Some(Self::Mlp),
            _ => None,
        }
    }

    /// Its sites, of a block with so many.
    pub(super) fn sites(self, count: usize) -> Range<usize> {
        match self {
            Self::Attention => 0..MLP_IN,
            Self::Mlp => MLP_IN..count,
        }
    }
}

/// Carries streams through blocks in full precision, and measures on the way.
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
    /// Carries `stream` through a block, and measures all of the block.
    pub(super) fn measure(
        &self,
        weights: &BlockWeights<B>,
        stream: &mut Stream<B>,
    ) -> Result<Statistics> {
        let Self { backend, architecture, attention, .. } = *self;
        let block = BlockBuilder::new(backend, architecture, weights).source()?;
        let Stream { batches, chunks } = stream;
        self.sums(weights.index, chunks, |batch, observer| {
            let batch = &mut batches[batch];
            backend.reload(batch)?;
            block.forward(backend, attention, batch, observer)?;
            backend.offload(batch)?;
            Ok(batch.rows())
        })
    }

    /// The states of `stream` after a part of a block, and the statistics of that part: of other sites they are zero.
    pub(super) fn measure_part(
        &self,
        index: usize,
        block: &Block<B>,
        part: BlockPart,
        stream: &Stream<B>,
    ) -> Result<(Statistics, Stream<B>)> {
        let mut after = Vec::with_capacity(stream.batches.len());
        let statistics = self.sums(index, &stream.chunks, |batch, observer| {
            after.push(self.passed(block, part, &stream.batches[batch], observer)?);
            Ok(after[batch].rows())
        })?;
        Ok((statistics, Stream { batches: after, chunks: stream.chunks.clone() }))
    }

    /// The states of `stream` after a part of a block.
    pub(super) fn pass_part(
        &self,
        block: &Block<B>,
        part: BlockPart,
        stream: &Stream<B>,
    ) -> Result<Stream<B>> {
        let batches = stream.batches.iter().map(|batch| {
            self.progress.check_stop()?;
            self.passed(block, part, batch, &mut Observer::none())
        });
        Ok(Stream { batches: batches.collect::<Result<_>>()?, chunks: stream.chunks.clone() })
    }

    /// A batch after a part of a block.
    fn passed(
        &self,
        block: &Block<B>,
        part: BlockPart,
        batch: &B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<B::Hidden> {
        let Self { backend, attention, .. } = *self;
        let mut passed = backend.duplicate(batch)?;
        match part {
            BlockPart::Attention => block.attend(backend, attention, &mut passed, observer)?,
            BlockPart::Mlp => block.mlp(backend, &mut passed, observer)?,
        }
        backend.offload(&mut passed)?;
        Ok(passed)
    }

    /// What an observer sees while `pass` carries each batch of `chunks`, and returns its tokens.
    fn sums(
        &self,
        index: usize,
        chunks: &[Range<usize>],
        mut pass: impl FnMut(usize, &mut Observer<B>) -> Result<usize>,
    ) -> Result<Statistics> {
        let Self { backend, architecture, attention, division, progress } = *self;
        let sites = architecture.sites(index);
        let widths: Vec<usize> = sites.iter().map(|site| site.channels).collect();
        let mut sums = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let ChunkSums { mut tokens, mut keys, mut energies } =
                ChunkSums::zeros(&widths, attention);
            for batch in chunk.clone() {
                progress.check_stop()?;
                let mut see = |seen: Seen, x: &B::Activation| match seen {
                    Seen::Site(site) => backend.add_energy(x, &mut energies[site]),
                    Seen::Keys => backend.add_key_sums(attention.of_block(index), x, &mut keys),
                    _ => Ok(()),
                };
                tokens += pass(batch, &mut Observer::new(&mut see))? as f64;
            }
            sums.push(ChunkSums { tokens, keys, energies }.concat());
        }
        let all = division.reduce_vectors(&sums)?;
        let ChunkSums { tokens, keys, energies } = ChunkSums::of(&all, &widths, attention);
        for (energy, site) in energies.iter().zip(sites) {
            check_finite(energy, &site.name)?;
        }
        let key_mean = keys.iter().map(|sum| (sum / tokens) as f32).collect();
        Ok(Statistics { energies, key_mean })
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
