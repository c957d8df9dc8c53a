//! What distillation refuses before any work.

use crate::checkpoint::{AtomCheckpoint, Dtype, Manifest, Source};
use crate::model::Architecture;
use crate::model::sites::FINAL_NORM;
use crate::{Error, Result};

/// Refuses what cannot be trained.
///
/// # Errors
/// Input: the network has experts, or something else that the backward pass does not compute.
pub fn check_trainable(architecture: &Architecture) -> Result<()> {
    let what = match &architecture.experts {
        None => architecture.not_plain().map(str::to_owned),
        Some(experts) => Some(format!("experts, and this one has {} in a block", experts.count)),
    };
    what.map_or(Ok(()), |what| {
        Err(Error::input(format!("distillation trains no network with {what}"))
            .hint("leave --distill out: the checkpoint is complete without it"))
    })
}

/// Refuses a source that the checkpoint was not made from, and a checkpoint that is distilled already.
pub(super) fn check_source(
    checkpoint: &AtomCheckpoint,
    manifest: &Manifest,
    source: &Source,
) -> Result<()> {
    if manifest.distillation.is_some() {
        return Err(Error::input(format!("{} is distilled already", checkpoint.title()))
            .hint("give the checkpoint that it was made from, with more --tokens"));
    }
    if source.fingerprint()? != manifest.source.fingerprint {
        return Err(Error::input(format!(
            "{} was not made from {}, but from `{}`, or from another version of it",
            checkpoint.title(),
            source.name(),
            manifest.source.name
        ))
        .hint("give --reference the source that the checkpoint was quantized from"));
    }
    let mut linears = manifest.blocks.iter().flatten().flat_map(|site| &site.linears);
    if linears.all(|linear| linear.bits == 16) {
        return Err(Error::input(format!("no linear of {} is quantized", checkpoint.title()))
            .hint("there is nothing to distill: it computes what its source computes"));
    }
    Ok(())
}

/// The type that norms are stored in.
pub(super) fn norm_type(checkpoint: &AtomCheckpoint, architecture: &Architecture) -> Result<Dtype> {
    let blocks = 0..architecture.blocks;
    let names = blocks.flat_map(|block| {
        let qk_norms = architecture.qk_norm_names(block).into_iter().flatten();
        architecture.norm_names(block).into_iter().chain(qk_norms)
    });
    let last = checkpoint.tensor(FINAL_NORM)?.dtype;
    for name in names {
        let dtype = checkpoint.tensor(&name)?.dtype;
        if dtype != last {
            return Err(Error::input(format!(
                "`{name}` is {}, and `{FINAL_NORM}` {}: distillation wants norms of one type",
                dtype.name(),
                last.name()
            ))
            .hint("convert the source's norms to one type, and quantize it again"));
        }
    }
    Ok(last)
}
