/*! Channel energies of every site, measured on the stream through the original blocks. */

use crate::backend::{AttentionSpec, Backend, Tensor};
use crate::model::Architecture;
use crate::model::block::{Observer, Seen};
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
    pub attention: &'a AttentionSpec,
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
        let Self { backend, architecture, attention, progress } = *self;
        let block = BlockBuilder::new(backend, architecture, weights).source()?;
        let sites = architecture.sites(weights.index);
        let mut energies: Energies = sites.iter().map(|site| vec![0.0; site.channels]).collect();
        let mut sums = vec![0.0; attention.kv_heads * attention.head_dim];
        let mut tokens = 0;
        let mut heads = Vec::new();
        for batch in &mut stream.batches {
            progress.check_stop()?;
            tokens += batch.rows();
            let mut see = |seen: Seen, x: &B::Activation| match seen {
                Seen::Site(site) => backend.add_energy(x, &mut energies[site]),
                Seen::Keys => backend.add_key_sums(attention, x, &mut sums),
                _ => Ok(()),
            };
            match after {
                AfterBlock::Advanced => {
                    backend.reload(batch)?;
                    block.forward(backend, attention, batch, &mut Observer::new(&mut see))?;
                    backend.offload(batch)?;
                }
                AfterBlock::Unchanged => {
                    let mut copy = backend.duplicate(batch)?;
                    let observer = &mut Observer::new(&mut see);
                    heads.extend(block.observe_attention(backend, attention, &mut copy, observer)?);
                    block.observe_mlp(backend, copy, observer)?;
                }
            }
        }
        for (energy, site) in energies.iter().zip(sites) {
            check_finite(energy, &site.name)?;
        }
        let key_mean = sums.iter().map(|sum| (sum / tokens as f64) as f32).collect();
        Ok((Statistics { energies, key_mean }, heads))
    }
}

fn check_finite(energy: &[f64], site: &str) -> Result<()> {
    let Some(channel) = energy.iter().position(|energy| !energy.is_finite()) else { return Ok(()) };
    Err(Error::input(format!("channel {channel} of {site} is not finite in full precision")).hint(
        "the source's weights overflow on this text: is the checkpoint sound? On a GPU, \
         activations beyond f16 may be the reason: try --device cpu",
    ))
}
