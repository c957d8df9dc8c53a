/*! The sites of a block sequentially: the Hessian of a site is accumulated on activations that already carry the
quantization error of the sites before it; the target is the original output.

Both streams go through the block together, a site at a time, the source's ahead by attention or the MLP: its energies are
measured on the way, and its states after a site are the target of the linear that adds to them. No product of the source is
computed twice, and of the quantized block only gate and up where their output is too wide to be stored. Experts are
sites one after the other: each sees the tokens that the router of the quantized block sends to it, on both streams, and
its outputs are not stored. */

use std::ops::Range;

use super::pass::Pass;
use super::{BlockInput, PassedBlock, PlannedBlock, Streams, divides};
use crate::Result;
use crate::backend::Backend;
use crate::model::Architecture;
use crate::model::sites::{SiteKind, SiteSpec};
use crate::pipeline::energies::BlockPart;
use crate::pipeline::parts::SiteParts;
use crate::pipeline::quantizer::{BlockQuantizer, QuantizedBlock};
use crate::pipeline::timing::Timing;

/// Device memory that the cross-covariances of the widest site, of all chunks and of one, and what o or down reads of all
/// `tokens` take.
pub(super) fn more_bytes(architecture: &Architecture, tokens: usize) -> u64 {
    let hidden = architecture.hidden;
    let widest = architecture.largest_block().iter().map(|site| site.channels).max().unwrap_or(0);
    let heads = 2 * tokens * architecture.heads * architecture.head_dim;
    let codes = if stores_codes(tokens, widest, hidden) { tokens * widest } else { 0 };
    (4 * 2 * hidden * widest + heads.max(codes)) as u64
}

/// Whether the codes that down reads of all `tokens` are stored on a device: where they and its sums take no more than the
/// source's stream took a second time before.
pub(super) fn stores_codes(tokens: usize, width: usize, hidden: usize) -> bool {
    tokens * width + 2 * 4 * width * (width + hidden) <= 4 * tokens * hidden
}

/// Quantizes a block and carries both streams through it; the quantized one not to its end if it is the last.
pub(super) fn quantize<'a, 'w, B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    input: &BlockInput<'a, 'w, B>,
    streams: &mut Streams<B>,
    timing: &mut Timing,
) -> Result<PassedBlock<'a, 'w, B>> {
    let backend = quantizer.backend;
    let specs = quantizer.architecture.sites(input.weights.index);
    let mut planned = PlannedBlock::unmeasured(input, &specs);
    let mut pass = Pass::new(quantizer, input, &planned, streams)?;
    let mut made = QuantizedBlock::empty();
    let (own, ranks) = (quantizer.division.ranks.rank(), quantizer.division.ranks.ranks());
    for sites in rounds(&specs, ranks) {
        if let Some(part) = BlockPart::beginning_at(sites.start) {
            timing.measure("calibrate", || {
                pass.begin(part, input, &mut planned)?;
                backend.wait()
            })?;
        }
        let parts = |at: usize| match divides(at) {
            true => SiteParts::divided(specs[at].linears.len(), ranks),
            false => SiteParts::whole(specs[at].linears.len(), owner(at, &sites, ranks)),
        };
        // Of the sites of a round each rank quantizes one at most.
        let mut matrices = None;
        for at in sites.clone() {
            timing.measure("hessians", || {
                let made = pass.matrices(at, &specs[at], &planned, &parts(at))?;
                matrices = made.or(matrices.take());
                backend.wait()
            })?;
        }
        backend.trim();
        let mut quantized = None;
        for at in sites.clone() {
            let Some(matrices) = matrices.take_if(|_| parts(at).of(own).next().is_some()) else {
                continue;
            };
            quantized = timing.measure("gptq", || {
                let work = planned.site(at, &specs[at]);
                let quantized =
                    quantizer.quantize_site(&work, &planned.format(at), matrices, &parts(at))?;
                backend.wait()?;
                Ok::<_, crate::Error>(Some(quantized))
            })?;
        }
        for at in sites.clone() {
            timing.measure("gptq", || {
                let own = quantized.take_if(|_| parts(at).of(own).next().is_some());
                let shared = quantizer.share(&planned.site(at, &specs[at]), &parts(at), own)?;
                made.push(planned.format(at), shared);
                pass.close_site(at, &planned, &made.sites[at])?;
                backend.wait()
            })?;
            timing.measure("propagate", || {
                if specs[at].kind == SiteKind::AttnOut {
                    pass.add_heads()?;
                } else if at + 1 == specs.len() {
                    pass.add_mlp()?;
                }
                backend.wait()
            })?;
        }
    }
    drop(pass);
    Ok(PassedBlock { planned, block: made, pending: None })
}

/// The sites in the order in which they are quantized. Those of a round depend on earlier rounds alone, so each of so
/// many ranks can quantize one of them: the experts' own.
fn rounds(specs: &[SiteSpec], ranks: usize) -> Vec<Range<usize>> {
    let mut rounds: Vec<Range<usize>> = Vec::new();
    for (at, spec) in specs.iter().enumerate() {
        let joins = |round: &&mut Range<usize>| {
            spec.expert.is_some() && specs[round.start].expert.is_some() && round.len() < ranks
        };
        match rounds.last_mut().filter(joins) {
            Some(round) => round.end = at + 1,
            None => rounds.push(at..at + 1),
        }
    }
    rounds
}

/// The rank that quantizes a site of a round.
fn owner(at: usize, round: &Range<usize>, ranks: usize) -> usize {
    if round.len() > 1 { at - round.start } else { at % ranks }
}

/// Whether the accumulated error of a site's `width` inputs is corrected, where `tokens` tokens reach the site: least
/// squares with more unknowns than tokens would overfit.
pub(super) fn corrects(correction: f32, tokens: usize, width: usize) -> bool {
    correction > 0.0 && tokens >= width
}
