/*! All sites of a block simultaneously, as the reference does it: the Hessians of a block are accumulated in one
pass with quantized activations and the source's weights, then its linears are quantized. */

use super::{BlockInput, PassedBlock, Streams};
use crate::Result;
use crate::backend::{Backend, Tensor};
use crate::model::block::{Observer, Seen};
use crate::network::{QuantizedSite, Stream};
use crate::pipeline::quantizer::{
    BlockQuantizer, QuantizedBlock, QuantizedLinears, SiteMatrices, formats,
};
use crate::pipeline::timing::Timing;
use crate::quant::site::SiteFormat;

/// Quantizes a block: by GPTQ on the quantized stream, without one by rounding.
pub(super) fn quantize<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    input: &BlockInput<'_, '_, B>,
    streams: &mut Streams<B>,
    timing: &mut Timing,
) -> Result<PassedBlock<B>> {
    let backend = quantizer.backend;
    let formats = formats(input.plan, &input.statistics.energies);
    let mut hessians = match &streams.quantized {
        None => formats.iter().map(|_| None).collect(),
        Some(stream) => timing.measure("hessians", || {
            let hessians = hessians(quantizer, input, &formats, stream)?;
            backend.wait()?;
            Ok::<_, crate::Error>(hessians)
        })?,
    };
    backend.trim();
    let mut block = QuantizedBlock::empty();
    let specs = quantizer.architecture.sites(input.weights.index);
    for (at, format) in formats.into_iter().enumerate() {
        quantizer.progress.check_stop()?;
        let matrices = SiteMatrices { hessian: hessians[at].take(), correction: None };
        let stage = if matrices.hessian.is_some() { "gptq" } else { "round" };
        let work = input.site(at, &specs[at]);
        let QuantizedLinears { linears, errors } = timing.measure(stage, || {
            let quantized = quantizer.quantize_site(&work, &format, matrices)?;
            backend.wait()?;
            Ok::<_, crate::Error>(quantized)
        })?;
        block.errors.extend(errors);
        block.sites.push(QuantizedSite { format, linears });
    }
    let pending = input.pending(quantizer, &block.sites, streams, timing)?;
    Ok(PassedBlock { block, pending })
}

/// `sum x^T x` at every site.
fn hessians<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    input: &BlockInput<'_, '_, B>,
    formats: &[SiteFormat],
    stream: &Stream<B>,
) -> Result<Vec<Option<B::Gram>>> {
    let backend = quantizer.backend;
    let block = input.builder(quantizer).observed(formats)?;
    let mut hessians =
        formats.iter().map(|format| backend.gram(format.width())).collect::<Result<Vec<_>>>()?;
    let mut tokens = vec![0; hessians.len()];
    for batch in &stream.batches {
        quantizer.progress.check_stop()?;
        let batch = backend.duplicate(batch)?;
        let mut see = |seen: Seen, x: &B::Activation| {
            let Seen::Site(site) = seen else { return Ok(()) };
            tokens[site] += x.rows();
            backend.add_gram(&mut hessians[site], x)
        };
        block.observe(backend, &quantizer.attention, batch, &mut Observer::new(&mut see))?;
    }
    let specs = quantizer.architecture.sites(input.weights.index);
    let sites = specs.iter().zip(tokens).zip(hessians);
    Ok(sites.map(|((spec, tokens), hessian)| quantizer.trusted(spec, tokens, hessian)).collect())
}
