/*! The sites of a block sequentially: the Hessian of a site is accumulated on activations that already carry the
quantization error of the sites before it; the target is the original output.

Both streams go through the block together, a site at a time. No product is computed twice except gate and up of the
quantized block, whose output is too wide to be stored. Experts are sites one after the other: each sees the tokens
that the router of the quantized block sends to it, on both streams, and its outputs are not stored. */

use std::ops::Range;

use super::{BlockInput, PassedBlock, Streams, divides};
use crate::Result;
use crate::backend::{AccumulatedError, Backend, Tensor};
use crate::model::Architecture;
use crate::model::block::{Block, Observer, Site};
use crate::model::experts::RoutedTokens;
use crate::model::sites::{ATTN_IN, ATTN_OUT, MLP_ACT, MLP_IN, SiteKind, SiteSpec};
use crate::network::{BlockBuilder, QuantizedSite, Stream};
use crate::pipeline::division::SiteSums;
use crate::pipeline::fallbacks::Fallback;
use crate::pipeline::parts::SiteParts;
use crate::pipeline::quantizer::{BlockQuantizer, Note, QuantizedBlock, SiteMatrices, formats};
use crate::pipeline::timing::Timing;
use crate::quant::site::SiteFormat;

/// Device memory that the cross-covariances of the widest site, of all chunks and of one, and attention's outputs of all
/// `tokens` take.
pub(super) fn more_bytes(architecture: &Architecture, tokens: usize) -> u64 {
    let widest = architecture.largest_block().iter().map(|site| site.channels).max().unwrap_or(0);
    let cross = widest * (widest + architecture.hidden);
    let heads = 2 * tokens * architecture.heads * architecture.head_dim;
    (4 * 2 * cross + 2 * heads) as u64
}

/// Quantizes a block and carries both streams through it; not to its end if it is the last.
pub(super) fn quantize<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    input: &BlockInput<'_, '_, B>,
    streams: &mut Streams<B>,
    timing: &mut Timing,
) -> Result<PassedBlock<B>> {
    let backend = quantizer.backend;
    let formats = formats(input.plan, &input.statistics.energies);
    let specs = quantizer.architecture.sites(input.weights.index);
    let mut pass = Pass::new(quantizer, input, streams, &formats)?;
    let mut made = QuantizedBlock::empty();
    let (own, ranks) = (quantizer.division.ranks.rank(), quantizer.division.ranks.ranks());
    let mut formats = formats.into_iter();
    for sites in rounds(&specs, ranks) {
        let parts = |at: usize| match divides(at) {
            true => SiteParts::divided(specs[at].linears.len(), ranks),
            false => SiteParts::whole(specs[at].linears.len(), owner(at, &sites, ranks)),
        };
        // Of the sites of a round each rank quantizes one at most.
        let mut matrices = None;
        for at in sites.clone() {
            let width = input.plan[at].width();
            timing.measure("hessians", || {
                let made = pass.matrices(at, &specs[at], width, &parts(at))?;
                matrices = made.or(matrices.take());
                backend.wait()
            })?;
        }
        backend.trim();
        let formats: Vec<SiteFormat> = formats.by_ref().take(sites.len()).collect();
        let mut quantized = None;
        for (at, format) in sites.clone().zip(&formats) {
            let Some(matrices) = matrices.take_if(|_| parts(at).of(own).next().is_some()) else {
                continue;
            };
            quantized = timing.measure("gptq", || {
                let work = input.site(at, &specs[at]);
                let quantized = quantizer.quantize_site(&work, format, matrices, &parts(at))?;
                backend.wait()?;
                Ok::<_, crate::Error>(Some(quantized))
            })?;
        }
        for (at, format) in sites.clone().zip(formats) {
            timing.measure("gptq", || {
                let own = quantized.take_if(|_| parts(at).of(own).next().is_some());
                made.push(format, quantizer.share(&input.site(at, &specs[at]), &parts(at), own)?);
                pass.close_site(at, &made.sites[at])?;
                backend.wait()
            })?;
            timing.measure("propagate", || {
                if specs[at].kind == SiteKind::AttnOut {
                    pass.add_heads()?;
                } else if at + 1 == specs.len() && !input.is_last {
                    pass.add_mlp()?;
                }
                backend.wait()
            })?;
        }
    }
    Ok(PassedBlock { block: made, pending: None })
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

/// The same of the source and of the quantized block.
struct Pair<T> {
    source: T,
    quantized: T,
}

/// Both streams on their way through a block.
struct Pass<'a, 'w, B: Backend> {
    quantizer: &'a BlockQuantizer<'a, B>,
    builder: BlockBuilder<'a, 'w, B>,
    blocks: Pair<Block<B>>,
    streams: Pair<&'a mut Stream<B>>,
    /// What attn_out sees of each batch on the source's stream, where that is known.
    source_heads: std::vec::IntoIter<B::Activation>,
    /// What attn_out sees of each batch, while o is quantized.
    heads: Vec<Pair<B::Activation>>,
    /// After attention, the tokens of each batch that the router of the quantized block sends to each expert.
    routed: Vec<Vec<RoutedTokens>>,
    is_last: bool,
}

impl<'a, 'w, B: Backend> Pass<'a, 'w, B> {
    fn new(
        quantizer: &'a BlockQuantizer<'a, B>,
        input: &BlockInput<'a, 'w, B>,
        streams: &'a mut Streams<B>,
        formats: &[SiteFormat],
    ) -> Result<Self> {
        let builder = input.builder(quantizer);
        let blocks = Pair { source: builder.source()?, quantized: builder.open(formats)? };
        let source_heads = std::mem::take(&mut streams.source_heads).into_iter();
        let (Some(source), Some(quantized)) = (&mut streams.source, &mut streams.quantized) else {
            unreachable!("sequential quantization carries both streams");
        };
        Ok(Self {
            quantizer,
            builder,
            blocks,
            streams: Pair { source, quantized },
            source_heads,
            heads: Vec::new(),
            routed: Vec::new(),
            is_last: input.is_last,
        })
    }

    /// A site's Hessian and accumulated error, on the streams as they reach it, on the ranks that quantize a part. What attn_out sees
    /// is stored; without experts, the source's stream leaves the block at its last site.
    fn matrices(
        &mut self,
        at: usize,
        spec: &SiteSpec,
        width: usize,
        parts: &SiteParts,
    ) -> Result<Option<SiteMatrices<B>>> {
        let Self { quantizer, blocks, streams, source_heads, heads, routed, is_last, .. } = self;
        let backend = quantizer.backend;
        let share_of_error = quantizer.recipe.correction;
        let possible = corrects(share_of_error, quantizer.tokens, width);
        let zeros = || {
            let correction = possible.then(|| empty_correction(quantizer, spec, width));
            let gram = backend.gram(width)?;
            Ok(SiteSums { tokens: 0, gram, correction: correction.transpose()? })
        };
        let chunks = streams.source.chunks.clone();
        let sums = quantizer.division.reduce(
            backend,
            &[parts.owner()],
            |_| zeros(),
            |chunk, sums| {
                let SiteSums { tokens, gram, correction } = &mut sums[0];
                for_batches(quantizer, streams, chunks[chunk].clone(), |batch, states| {
                    let routed = spec.expert.map(|expert| &routed[batch][expert]);
                    if routed.is_some_and(RoutedTokens::is_empty) {
                        return Ok(());
                    }
                    let visit = Visit { quantizer, blocks, spec, at, routed };
                    let known =
                        if spec.kind == SiteKind::AttnOut { source_heads.next() } else { None };
                    let inputs = visit.inputs(&states, known)?;
                    *tokens += inputs.quantized.rows() as u64;
                    let seen = visit.seen(&inputs.quantized)?;
                    backend.add_gram(gram, &seen)?;
                    if let Some(correction) = correction {
                        visit.add_error(correction, &states, &inputs.source, &seen)?;
                    }
                    match spec.kind {
                        SiteKind::AttnOut => heads.push(inputs),
                        SiteKind::MlpAct if spec.expert.is_none() && !*is_last => {
                            let (site, unobserved) =
                                (&blocks.source.sites[at], &mut Observer::none());
                            site.apply_onto(backend, inputs.source, states.source, unobserved)?
                        }
                        _ => {}
                    }
                    Ok(())
                })
            },
        )?;
        let sums = sums.into_iter().flatten().next();
        let sums = quantizer.division.spread(backend, parts, sums, zeros)?;
        Ok(sums.map(|sums| trusted(quantizer, spec, width, sums)))
    }

    /// Gives the quantized block the linears of a site, laid out for products.
    fn close_site(&mut self, at: usize, site: &QuantizedSite<B::Quantized>) -> Result<()> {
        let order = self.quantizer.backend.site(&site.format)?;
        let sites = &mut self.blocks.quantized.sites;
        let feeds = if at == MLP_IN { &sites[MLP_ACT..] } else { &[] };
        let feeds: Vec<_> = feeds.iter().map(Site::order).collect();
        sites[at].linears = self.builder.quantized_linears(at, site, &order, &feeds)?;
        Ok(())
    }

    /// Adds attention's output to both streams, and where there are experts, finds out the tokens of each.
    fn add_heads(&mut self) -> Result<()> {
        let Self { quantizer, blocks, streams, heads, routed, .. } = self;
        let backend = quantizer.backend;
        let mut heads = std::mem::take(heads).into_iter();
        let all = 0..streams.source.batches.len();
        for_batches(quantizer, streams, all, |_, states| {
            let Pair { source, quantized } = heads.next().expect("as many as batches");
            let unobserved = &mut Observer::none();
            let site = &blocks.source.sites[ATTN_OUT];
            site.apply_onto(backend, source, states.source, unobserved)?;
            let block = &blocks.quantized;
            block.sites[ATTN_OUT].apply_onto(backend, quantized, states.quantized, unobserved)?;
            if let Some(router) = &block.router {
                let normed = block.entering(backend, MLP_IN, states.quantized)?;
                routed.push(router.route(backend, &normed)?);
            }
            Ok(())
        })
    }

    /// Adds the MLP's output to the quantized stream; where there are experts, to both.
    fn add_mlp(&mut self) -> Result<()> {
        let Self { quantizer, blocks, streams, .. } = self;
        let backend = quantizer.backend;
        let all = 0..streams.source.batches.len();
        for_batches(quantizer, streams, all, |_, states| {
            let unobserved = &mut Observer::none();
            if blocks.source.router.is_some() {
                blocks.source.mlp(backend, states.source, unobserved)?;
            }
            // As the forward pass does it, which a resumed run repeats.
            blocks.quantized.mlp(backend, states.quantized, unobserved)
        })
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

/// The cross-covariances of a site's accumulated error, before the first token.
fn empty_correction<B: Backend>(
    quantizer: &BlockQuantizer<'_, B>,
    spec: &SiteSpec,
    width: usize,
) -> Result<AccumulatedError<B::CrossCovariance>> {
    let BlockQuantizer { backend, architecture, recipe, .. } = quantizer;
    // After a norm an output cannot compensate the error of the hidden states: the norm takes its size out of it.
    let adds = matches!(spec.kind, SiteKind::AttnOut | SiteKind::MlpAct)
        && architecture.norms.after.is_none();
    let outputs = adds.then(|| backend.cross_covariance(architecture.hidden, width)).transpose()?;
    Ok(AccumulatedError {
        inputs: backend.cross_covariance(width, width)?,
        outputs,
        share: recipe.correction,
    })
}

/// One batch of both streams at one site.
struct Visit<'v, B: Backend> {
    quantizer: &'v BlockQuantizer<'v, B>,
    blocks: &'v Pair<Block<B>>,
    spec: &'v SiteSpec,
    at: usize,
    /// The tokens that reach an expert's own site.
    routed: Option<&'v RoutedTokens>,
}

impl<B: Backend> Visit<'_, B> {
    /// The activations that enter the site; of attn_out the source's may be known.
    fn inputs(
        &self,
        states: &Pair<&mut B::Hidden>,
        known: Option<B::Activation>,
    ) -> Result<Pair<B::Activation>> {
        let BlockQuantizer { backend, attention, full_attention, .. } = self.quantizer;
        let (before, after) = (&*states.source, &*states.quantized);
        let Pair { source, quantized: block } = self.blocks;
        let unobserved = &mut Observer::none();
        let entering = |site| {
            Ok::<_, crate::Error>([
                source.entering(*backend, site, before)?,
                block.entering(*backend, site, after)?,
            ])
        };
        let [source, quantized] = match self.spec.kind {
            SiteKind::AttnIn => entering(ATTN_IN)?,
            SiteKind::AttnOut => [
                match known {
                    Some(heads) => heads,
                    None => source.heads(*backend, full_attention, before, unobserved)?,
                },
                block.heads(*backend, attention, after, unobserved)?,
            ],
            SiteKind::MlpIn => entering(MLP_IN)?,
            SiteKind::MlpAct => match self.spec.expert.zip(self.routed) {
                None => [
                    source.gated(*backend, before, unobserved)?,
                    block.gated(*backend, after, unobserved)?,
                ],
                Some((expert, routed)) => {
                    let [of_source, of_block] = entering(MLP_IN)?;
                    [
                        source.gated_of(*backend, expert, &of_source, routed, unobserved)?,
                        block.gated_of(*backend, expert, &of_block, routed, unobserved)?,
                    ]
                }
            },
        };
        Ok(Pair { source, quantized })
    }

    /// An activation of the quantized block as the site's linears see it. The output of an expert is scaled by the
    /// routing weight of the token, and so are its errors.
    fn seen(&self, x: &B::Activation) -> Result<B::Activation> {
        let backend = self.quantizer.backend;
        let mut seen = self.blocks.quantized.sites[self.at].seen(backend, x)?;
        if let Some(RoutedTokens { weights, .. }) = self.routed {
            backend.scale_rows(&mut seen, weights)?;
        }
        Ok(seen)
    }

    /// Adds the error that the batch carries: of the site's inputs, where `x0` is the source's and `seen` the quantized
    /// block's, and of the hidden states, where the site adds to them.
    fn add_error(
        &self,
        correction: &mut AccumulatedError<B::CrossCovariance>,
        states: &Pair<&mut B::Hidden>,
        x0: &B::Activation,
        seen: &B::Activation,
    ) -> Result<()> {
        let (backend, block) = (self.quantizer.backend, &self.blocks.quantized);
        let AccumulatedError { inputs, outputs, .. } = correction;
        let mut wanted = backend.permute(x0, block.sites[self.at].order())?;
        if let Some(RoutedTokens { weights, .. }) = self.routed {
            backend.scale_rows(&mut wanted, weights)?;
        }
        backend.add_cross_covariance(inputs, &backend.difference(&wanted, seen)?, seen)?;
        let Some(outputs) = outputs else { return Ok(()) };
        let mut lost = backend.hidden_difference(states.source, states.quantized)?;
        if let (Some(routed), Some(router)) = (self.routed, &block.router) {
            // Each of a token's experts corrects its part.
            let part = vec![1.0 / router.of_a_token() as f32; routed.tokens.len()];
            lost = backend.select_rows(&lost, &routed.tokens)?;
            backend.scale_rows(&mut lost, &part)?;
        }
        let factor = block.sites[self.at].leaving.factor;
        if factor != 1.0 {
            // The output is multiplied before it is added.
            let part = vec![1.0 / factor; lost.rows()];
            backend.scale_rows(&mut lost, &part)?;
        }
        backend.add_cross_covariance(outputs, &lost, seen)
    }
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
