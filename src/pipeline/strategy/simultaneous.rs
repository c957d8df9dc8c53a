/*! All sites of a block simultaneously, as the reference does it: the Hessians of a block are accumulated in one
pass with quantized activations and the source's weights, then its linears are quantized. */

use super::{BlockInput, PassedBlock, PlannedBlock, Streams};
use crate::Result;
use crate::backend::{Backend, Tensor};
use crate::model::block::{Observer, Seen};
use crate::network::Stream;
use crate::pipeline::division::SiteSums;
use crate::pipeline::parts::SiteParts;
use crate::pipeline::quantizer::{BlockQuantizer, QuantizedBlock, SiteMatrices, formats};
use crate::pipeline::timing::Timing;
use crate::quant::site::SiteFormat;

/// Quantizes a block: by GPTQ on the quantized stream, without one by rounding.
pub(super) fn quantize<'a, 'w, B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    input: &BlockInput<'a, 'w, B>,
    streams: &mut Streams<B>,
    timing: &mut Timing,
) -> Result<PassedBlock<'a, 'w, B>> {
    let backend = quantizer.backend;
    let planned = input.measured(quantizer, streams, timing)?;
    let formats = formats(&planned.plan, &planned.statistics.energies);
    let specs = quantizer.architecture.sites(input.weights.index);
    let parts = planned.parts(quantizer.division.ranks.ranks());
    let mut hessians = match &streams.quantized {
        None => formats.iter().map(|_| None).collect(),
        Some(stream) => timing.measure("hessians", || {
            let hessians = hessians(quantizer, &planned, &formats, &parts, stream)?;
            backend.wait()?;
            Ok::<_, crate::Error>(hessians)
        })?,
    };
    backend.trim();
    let own = quantizer.division.ranks.rank();
    let mut quantized = Vec::with_capacity(specs.len());
    for (at, format) in formats.iter().enumerate() {
        quantizer.progress.check_stop()?;
        if parts[at].of(own).next().is_none() {
            quantized.push(None);
            continue;
        }
        let matrices = match hessians[at].take() {
            None => SiteMatrices { hessian: None, correction: None, notes: Vec::new() },
            Some(SiteSums { tokens, gram, .. }) => quantizer.trusted(&specs[at], tokens, gram),
        };
        let stage = if matrices.hessian.is_some() { "gptq" } else { "round" };
        let work = planned.site(at, &specs[at]);
        quantized.push(Some(timing.measure(stage, || {
            let quantized = quantizer.quantize_site(&work, format, matrices, &parts[at])?;
            backend.wait()?;
            Ok::<_, crate::Error>(quantized)
        })?));
    }
    let mut block = QuantizedBlock::empty();
    for (at, (format, quantized)) in formats.into_iter().zip(quantized).enumerate() {
        let shared = quantizer.share(&planned.site(at, &specs[at]), &parts[at], quantized)?;
        block.push(format, shared);
    }
    let pending = planned.pending(quantizer, &block.sites, input.is_last, streams, timing)?;
    Ok(PassedBlock { planned, block, pending })
}

/// `sum x^T x` at every site, on the ranks that quantize a part of it.
fn hessians<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    planned: &PlannedBlock<'_, '_, B>,
    formats: &[SiteFormat],
    parts: &[SiteParts],
    stream: &Stream<B>,
) -> Result<Vec<Option<SiteSums<B>>>> {
    let backend = quantizer.backend;
    let block = planned.builder(quantizer).observed(formats)?;
    let zeros = |site: usize| {
        Ok(SiteSums { tokens: 0, gram: backend.gram(formats[site].width())?, correction: None })
    };
    let owners: Vec<usize> = parts.iter().map(SiteParts::owner).collect();
    let sums = quantizer.division.reduce(backend, &owners, zeros, |chunk, sums| {
        for batch in &stream.batches[stream.chunks[chunk].clone()] {
            quantizer.progress.check_stop()?;
            let batch = backend.duplicate(batch)?;
            let mut see = |seen: Seen, x: &B::Activation| {
                let Seen::Site(site) = seen else { return Ok(()) };
                let SiteSums { tokens, gram, .. } = &mut sums[site];
                *tokens += x.rows() as u64;
                backend.add_gram(gram, x)
            };
            block.observe(backend, &quantizer.attention, batch, &mut Observer::new(&mut see))?;
        }
        Ok(())
    })?;
    let spread = sums.into_iter().zip(parts).enumerate().map(|(site, (sums, parts))| {
        quantizer.division.spread(backend, parts, sums, || zeros(site))
    });
    spread.collect()
}
