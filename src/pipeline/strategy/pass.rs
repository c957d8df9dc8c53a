/*! Both streams on their way through a block whose sites are quantized sequentially, and the sums that are made of them. */

use std::ops::Range;

use super::sequential::{corrects, stores_codes};
use super::visit::Visit;
use super::{BlockInput, PlannedBlock, Streams, meter};
use crate::Result;
use crate::backend::{AccumulatedError, Backend, ErrorKind};
use crate::model::Architecture;
use crate::model::block::{Block, Input, Observer, Site};
use crate::model::experts::RoutedTokens;
use crate::model::sites::{ATTN_OUT, MLP_ACT, MLP_IN, SiteKind, SiteSpec};
use crate::network::{QuantizedSite, Stream};
use crate::pipeline::division::SiteSums;
use crate::pipeline::energies::BlockPart;
use crate::pipeline::fallbacks::Fallback;
use crate::pipeline::parts::SiteParts;
use crate::pipeline::quantizer::{BlockQuantizer, Note, SiteMatrices};

/// The same of the source and of the quantized block.
pub(super) struct Pair<T> {
    pub(super) source: T,
    pub(super) quantized: T,
}

/// Both streams on their way through a block.
pub(super) struct Pass<'a, B: Backend> {
    quantizer: &'a BlockQuantizer<'a, B>,
    blocks: Pair<Block<B>>,
    streams: Pair<&'a mut Stream<B>>,
    /// The source's stream after the part of the block that is being quantized, until it moves there.
    after: Option<Stream<B>>,
    /// What the linear of the site at hand reads of each batch of the quantized stream, where that is stored.
    stored: Vec<Input<B>>,
    /// After attention, the tokens of each batch that the router of the quantized block sends to each expert.
    routed: Vec<Vec<RoutedTokens>>,
    is_last: bool,
}

impl<'a, B: Backend> Pass<'a, B> {
    pub(super) fn new(
        quantizer: &'a BlockQuantizer<'a, B>,
        input: &BlockInput<'_, '_, B>,
        planned: &PlannedBlock<'_, '_, B>,
        streams: &'a mut Streams<B>,
    ) -> Result<Self> {
        let builder = planned.builder(quantizer);
        // The mean keys of the quantized block are not known yet.
        let blocks = Pair { source: builder.source()?, quantized: builder.open()? };
        let (Some(source), Some(quantized)) = (&mut streams.source, &mut streams.quantized) else {
            unreachable!("sequential quantization carries both streams");
        };
        Ok(Self {
            quantizer,
            blocks,
            streams: Pair { source, quantized },
            after: None,
            stored: Vec::new(),
            routed: Vec::new(),
            is_last: input.is_last,
        })
    }

    /// Carries the source's stream through a part of the block, measures what is not known of it, and plans its sites.
    pub(super) fn begin(
        &mut self,
        part: BlockPart,
        input: &BlockInput<'_, '_, B>,
        planned: &mut PlannedBlock<'_, '_, B>,
    ) -> Result<()> {
        let Self { quantizer, blocks, streams, after, .. } = self;
        let (meter, index) = (meter(quantizer), input.weights.index);
        let sites = part.sites(planned.statistics.energies.len());
        let passed = match input.known {
            Some(_) => meter.pass_part(&blocks.source, part, streams.source)?,
            None => {
                let (measured, passed) =
                    meter.measure_part(index, &blocks.source, part, streams.source)?;
                let energies = measured.energies.into_iter();
                for (at, energy) in energies.enumerate().filter(|(at, _)| sites.contains(at)) {
                    planned.statistics.energies[at] = energy;
                }
                if part == BlockPart::Attention {
                    planned.statistics.key_mean = measured.key_mean;
                }
                passed
            }
        };
        *after = Some(passed);
        planned.plan.extend((input.planned)(sites.clone(), &planned.statistics)?);
        let builder = planned.builder(quantizer);
        if part == BlockPart::Attention {
            blocks.quantized = builder.open()?;
        }
        for at in sites {
            blocks.quantized.sites.push(builder.open_site(at, &planned.format(at))?);
        }
        Ok(())
    }

    /// A site's Hessian and accumulated error, on the streams as they reach it, on the ranks that quantize a part.
    pub(super) fn matrices(
        &mut self,
        at: usize,
        spec: &SiteSpec,
        planned: &PlannedBlock<'_, '_, B>,
        parts: &SiteParts,
    ) -> Result<Option<SiteMatrices<B>>> {
        let width = planned.plan[at].width();
        let kind = error_kind(self.quantizer.architecture, spec);
        // The target of outputs is where the source's stream is after the site.
        let moves = adds(spec) && spec.expert.is_none();
        if moves && kind == ErrorKind::Outputs {
            self.move_source();
        }
        let keeps = self.keeps(at, spec, planned);
        let Self { quantizer, blocks, streams, stored, routed, .. } = self;
        let backend = quantizer.backend;
        let possible = corrects(quantizer.recipe.correction, quantizer.tokens, width);
        let zeros = || {
            let correction = possible.then(|| empty_correction(quantizer, spec, width));
            let gram = backend.gram(width)?;
            Ok(SiteSums { tokens: 0, gram, correction: correction.transpose()? })
        };
        let bias = possible.then(|| negated_bias(backend, &blocks.source.sites[at])).transpose()?;
        let bias = bias.flatten();
        let chunks = streams.source.chunks.clone();
        let sums = quantizer.division.reduce(
            backend,
            &[parts.owner()],
            |_| zeros(),
            |chunk, sums| {
                for_batches(quantizer, streams, chunks[chunk].clone(), |batch, states| {
                    let routed = spec.expert.map(|expert| &routed[batch][expert]);
                    if routed.is_some_and(RoutedTokens::is_empty) {
                        return Ok(());
                    }
                    let bias = bias.as_ref();
                    let visit = Visit { quantizer, blocks, spec, at, routed, bias };
                    let read = visit.add(&states, &mut sums[0])?;
                    if keeps {
                        stored.push(read);
                    }
                    Ok(())
                })
            },
        )?;
        let sums = sums.into_iter().flatten().next();
        let sums = quantizer.division.spread(backend, parts, sums, zeros)?;
        let quantizer = self.quantizer;
        if moves && kind == ErrorKind::Inputs {
            self.move_source();
        }
        Ok(sums.map(|sums| trusted(quantizer, spec, width, sums)))
    }

    /// The source's stream moves to where it is after the part of the block.
    fn move_source(&mut self) {
        let after = self.after.take();
        *self.streams.source = after.expect("every part of a block is passed before its sites");
    }

    /// Whether what the linear of a site reads is stored until it is quantized: of attn_out always, since attention is much
    /// of a block's work, of a dense mlp_act if it is in codes that the forward pass finds too.
    fn keeps(&self, at: usize, spec: &SiteSpec, planned: &PlannedBlock<'_, '_, B>) -> bool {
        let site = &planned.plan[at];
        match spec.kind {
            SiteKind::AttnOut => true,
            SiteKind::MlpAct if spec.expert.is_none() && !self.is_last => {
                let in_codes = site.bits < 16 && site.linears.iter().all(|linear| linear.bits < 16);
                let BlockQuantizer { architecture, tokens, .. } = self.quantizer;
                in_codes && (B::ON_HOST || stores_codes(*tokens, site.width(), architecture.hidden))
            }
            _ => false,
        }
    }

    /// Gives the quantized block the linears of a site, laid out for products.
    pub(super) fn close_site(
        &mut self,
        at: usize,
        planned: &PlannedBlock<'_, '_, B>,
        site: &QuantizedSite<B::Quantized>,
    ) -> Result<()> {
        let order = self.quantizer.backend.site(&site.format)?;
        let sites = &mut self.blocks.quantized.sites;
        let feeds = if at == MLP_IN { &sites[MLP_ACT..] } else { &[] };
        let feeds: Vec<_> = feeds.iter().map(Site::order).collect();
        let builder = planned.builder(self.quantizer);
        sites[at].linears = builder.quantized_linears(at, site, &order, &feeds)?;
        Ok(())
    }

    /// Adds attention's output to the quantized stream, and where there are experts, finds out the tokens of each.
    pub(super) fn add_heads(&mut self) -> Result<()> {
        let Self { quantizer, blocks, streams, stored, routed, .. } = self;
        let backend = quantizer.backend;
        let block = &blocks.quantized;
        let site = &block.sites[ATTN_OUT];
        for (batch, read) in streams.quantized.batches.iter_mut().zip(std::mem::take(stored)) {
            quantizer.progress.check_stop()?;
            backend.reload(batch)?;
            site.add_onto(backend, &read, batch)?;
            if let Some(router) = &block.router {
                let normed = block.entering(backend, MLP_IN, batch)?;
                routed.push(router.route(backend, &normed)?);
            }
            backend.offload(batch)?;
        }
        Ok(())
    }

    /// Adds the MLP's output to the quantized stream, if it is used; the source's is after the block then.
    pub(super) fn add_mlp(&mut self) -> Result<()> {
        if self.after.is_some() {
            self.move_source();
        }
        let Self { quantizer, blocks, streams, stored, is_last, .. } = self;
        if *is_last {
            return Ok(());
        }
        let backend = quantizer.backend;
        let block = &blocks.quantized;
        let mut stored = std::mem::take(stored).into_iter();
        for batch in &mut streams.quantized.batches {
            quantizer.progress.check_stop()?;
            backend.reload(batch)?;
            match stored.next() {
                Some(read) => block.sites[MLP_ACT].add_onto(backend, &read, batch)?,
                None => block.mlp(backend, batch, &mut Observer::none())?,
            }
            backend.offload(batch)?;
        }
        Ok(())
    }
}

/// Whether the one linear of a site adds to the hidden states.
fn adds(spec: &SiteSpec) -> bool {
    matches!(spec.kind, SiteKind::AttnOut | SiteKind::MlpAct)
}

/// What a site's linears are corrected by. After a norm an output cannot compensate the error of the hidden states: the norm
/// takes its size out of it.
fn error_kind(architecture: &Architecture, spec: &SiteSpec) -> ErrorKind {
    match adds(spec) && architecture.norms.after.is_none() {
        true => ErrorKind::Outputs,
        false => ErrorKind::Inputs,
    }
}

/// What a site is quantized by, of its sums.
fn trusted<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    spec: &SiteSpec,
    width: usize,
    sums: SiteSums<B>,
) -> SiteMatrices<B> {
    let SiteSums { tokens, gram, correction } = sums;
    let SiteMatrices { hessian, mut notes, .. } = quantizer.trusted(spec, tokens, gram);
    let share = quantizer.recipe.correction;
    let corrected = corrects(share, tokens as usize, width);
    if share > 0.0 && !corrected && hessian.is_some() {
        let found = format!("{tokens} tokens for {width} channels");
        notes.push(Note(Fallback::NoCorrection, found));
    }
    SiteMatrices { hessian, correction: correction.filter(|_| corrected), notes }
}

/// A site's accumulated error before the first token: of its outputs where one linear adds them to the hidden states, of
/// its inputs where several linears read them.
fn empty_correction<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    spec: &SiteSpec,
    width: usize,
) -> Result<AccumulatedError<B::CrossCovariance>> {
    let BlockQuantizer { backend, architecture, recipe, .. } = quantizer;
    let kind = error_kind(architecture, spec);
    let rows = if kind == ErrorKind::Outputs { architecture.hidden } else { width };
    let cross = backend.cross_covariance(rows, width)?;
    Ok(AccumulatedError { cross, kind, share: recipe.correction })
}

/// What is added to the outputs of a site's one linear to be without its bias, if it has one.
fn negated_bias<B: Backend>(backend: &B, site: &Site<B>) -> Result<Option<B::Hidden>> {
    let [Some(bias)] = &site.biases[..] else { return Ok(None) };
    let mut bias = backend.download(bias)?;
    bias.data.iter_mut().for_each(|value| *value = -*value);
    backend.upload(bias).map(Some)
}

/// Calls `work` with some batches of both streams and their numbers.
fn for_batches<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    streams: &mut Pair<&mut Stream<B>>,
    range: Range<usize>,
    mut work: impl FnMut(usize, Pair<&mut B::Hidden>) -> Result<()>,
) -> Result<()> {
    let backend = quantizer.backend;
    let source = &mut streams.source.batches[range.clone()];
    let batches = source.iter_mut().zip(&mut streams.quantized.batches[range.clone()]);
    for (batch, (source, quantized)) in range.zip(batches) {
        quantizer.progress.check_stop()?;
        backend.reload(source)?;
        backend.reload(quantized)?;
        work(batch, Pair { source: &mut *source, quantized: &mut *quantized })?;
        backend.offload(source)?;
        backend.offload(quantized)?;
    }
    Ok(())
}
