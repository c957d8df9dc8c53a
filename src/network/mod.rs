/*! A network that runs: a block's weights on a backend, streams of hidden states, prefetch of the next
block, final norm and output head. It does not depend on stages or measurements. */

mod accounting;
mod blocks;
mod cautions;
mod decoder;
#[cfg(test)]
mod decoder_tests;
#[cfg(test)]
mod family_tests;
mod head;
pub mod memory;
mod model;
mod prefetch;
mod runnable;
mod stored;
mod stream;
mod tensors;
mod trained;
mod weights;

pub use accounting::{Network, check_counts, network, split_fused};
pub use blocks::BlockBuilder;
pub use cautions::caution;
pub use decoder::{Caches, Decoder, DecoderParts, page_bytes};
pub use head::OutputHead;
pub use model::Model;
pub use prefetch::{no_thread, prefetch};
pub use runnable::{LoadedBlock, Runnable, StoredBlock};
pub use stored::{
    PlannedTensor, QuantizedSite, check_codebook, key_mean_spec, planned_block, planned_tensors,
    read_key_mean, read_sites,
};
pub use stream::{CalibrationTokens, Stream, scale_embedding};
pub use tensors::{expect, final_norm, norm_weight};
pub use trained::{
    BlockValues, LinearValues, NetworkGradient, SiteValues, TrainedNetwork, trained_values,
};
pub use weights::BlockWeights;
