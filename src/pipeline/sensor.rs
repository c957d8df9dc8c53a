/*! Takes the measurements of [`sensitivity`](super::sensitivity), block by block next to the calibration. */

use super::energies::Energies;
use super::exponents::with_exponents;
use super::plan::plan_block;
use super::quantizer::{formats, round_all};
use super::sensitivity::{
    BlockSensitivity, CountSensitivity, EFFECT_TOKENS, HESSIAN_TOKENS, Sensitivity,
    SiteSensitivity, WIDTHS,
};
use crate::Result;
use crate::backend::{Backend, Unquantized};
use crate::checkpoint::Tensors;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::model::block::{Block, Observer, Seen, Site};
use crate::model::sites::SiteSpec;
use crate::model::{Architecture, AttentionSpecs};
use crate::network::{BlockBuilder, BlockWeights, OutputHead, QuantizedSite, Stream};
use crate::progress::Progress;
use crate::quant::site::SiteFormat;
use crate::recipe::Recipe;

/// What is measured, and with what.
pub(super) struct Subject<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// The source's tensors.
    pub tensors: &'a dyn Tensors,
    /// The network.
    pub architecture: &'a Architecture,
    /// Attention over full-precision keys and values.
    pub attention: &'a AttentionSpecs,
    /// How linears are quantized.
    pub recipe: &'a Recipe,
    /// Asked whether to stop.
    pub progress: &'a dyn Progress,
}

impl<B: Backend> Clone for Subject<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Subject<'_, B> {}

/// Takes the measurements, block by block.
pub(super) struct Sensor<'a, B: Backend> {
    subject: Subject<'a, B>,
    /// Outlier counts, the recipe's first.
    counts: Vec<Option<usize>>,
    /// Original states of the windows that effects are measured on, ready for use.
    originals: Vec<B::Hidden>,
    /// Those of the windows that serve Hessians only.
    others: Stream<B>,
    /// For each block so far, the states of the first that this block alone changed.
    changed: Vec<Stream<B>>,
    effect_windows: usize,
    hessian_windows: usize,
    /// Tokens that energies are summed over.
    tokens: usize,
    blocks: Vec<BlockSensitivity>,
}

/// A site's linears at one outlier count: errors `[linears][widths]`, and what they became at the
/// recipe's width.
struct Measured<Q> {
    errors: Vec<Vec<f64>>,
    reference: Vec<Q>,
}

impl<'a, B: Backend> Sensor<'a, B> {
    /// A sensor for `tokens`, the calibration's windows of `attention.seq_len`. `counts` are tried
    /// wherever a site is wide enough for them, and the recipe's everywhere.
    pub(super) fn new(subject: Subject<'a, B>, counts: &[usize], tokens: &[u32]) -> Result<Self> {
        let Subject { backend, tensors, architecture, attention, .. } = subject;
        let seq_len = attention.seq_len();
        let samples = tokens.len() / seq_len;
        let [effect_windows, hessian_windows] =
            [EFFECT_TOKENS, HESSIAN_TOKENS].map(|n| n.div_ceil(seq_len).min(samples));
        let (effect, rest) = tokens[..hessian_windows * seq_len].split_at(effect_windows * seq_len);
        let embed =
            |tokens: &[u32]| Stream::embed(backend, tensors, architecture, tokens, seq_len, 0);
        let mut originals = embed(effect)?.batches;
        for batch in &mut originals {
            backend.reload(batch)?;
        }
        let mut all = vec![None];
        for count in counts {
            if !all.contains(&Some(*count)) {
                all.push(Some(*count));
            }
        }
        Ok(Self {
            subject,
            counts: all,
            originals,
            others: embed(rest)?,
            changed: Vec::new(),
            effect_windows,
            hessian_windows,
            tokens: tokens.len(),
            blocks: Vec::new(),
        })
    }

    /// Measures the next block.
    pub(super) fn measure(&mut self, weights: &BlockWeights<B>, energies: &Energies) -> Result<()> {
        let Subject { backend, tensors, architecture, recipe, progress, .. } = self.subject;
        let specs = architecture.sites(weights.index);
        let usual = plan_block(recipe, &specs)?;
        let builder = BlockBuilder::new(backend, architecture, weights);
        let mut source = builder.source()?;
        let after = self.outputs(&source)?;
        let mut sites =
            specs.iter().map(|spec| self.unmeasured(spec)).collect::<Result<Vec<_>>>()?;
        let mut quantized_sites = Vec::with_capacity(specs.len());
        for &count in &self.counts {
            let plans = usual.iter().map(|site| match count {
                None => Some(site.clone()),
                // Measured as the recipe's own.
                Some(count) if count == site.outlier_channels => None,
                Some(count) => site.with_outliers(count, recipe),
            });
            let wanted: Vec<bool> = plans.clone().map(|plan| plan.is_some()).collect();
            // A site that the count does not fit or that has it anyway is passed through as usual, and not looked at.
            let plans: BlockPlan = plans
                .zip(&usual)
                .map(|(plan, usual)| plan.unwrap_or_else(|| usual.clone()))
                .collect();
            if !wanted.contains(&true) {
                continue;
            }
            let plans = with_exponents(&plans, tensors, energies, self.tokens, progress)?;
            let formats = formats(&plans, energies);
            let hessians = self.hessians(weights, &formats, &wanted)?;
            for (at, hessian) in hessians.into_iter().enumerate() {
                let Some(hessian) = hessian else { continue };
                self.subject.progress.check_stop()?;
                let format = &formats[at];
                let errors = self.errors(weights, at, &plans[at], format, hessian)?;
                let Measured { errors, reference } = errors;
                let changed = builder.quantized_activation(at, format)?;
                let activation = self.effect(&mut source, at, changed, &after)?;
                let outliers = plans[at].outlier_channels;
                sites[at].counts.push(CountSensitivity { outliers, activation, errors });
                if count.is_none() {
                    for quantized in reference.iter().enumerate() {
                        let site = builder.one_quantized_linear(at, format, quantized)?;
                        let effect = self.effect(&mut source, at, site, &after)?;
                        sites[at].effects.push(effect);
                    }
                    let linears = reference.into_iter().map(Some).collect();
                    quantized_sites.push(QuantizedSite { format: format.clone(), linears });
                }
            }
            backend.trim();
        }
        self.blocks.push(BlockSensitivity { carry: 0.0, sites });
        self.advance(weights, &source, &quantized_sites)?;
        self.originals = after;
        Ok(())
    }

    /// A site of which nothing is known yet but its size.
    fn unmeasured(&self, spec: &SiteSpec) -> Result<SiteSensitivity> {
        let bytes = spec
            .linears
            .iter()
            .map(|linear| Ok(self.subject.tensors.tensor(&linear.weight())?.bytes.len() as u64));
        let source_bytes = bytes.collect::<Result<_>>()?;
        Ok(SiteSensitivity { effects: Vec::new(), source_bytes, counts: Vec::new() })
    }

    /// The states after `block`.
    fn outputs(&self, block: &Block<B>) -> Result<Vec<B::Hidden>> {
        let Subject { backend, attention, progress, .. } = self.subject;
        let outputs = self.originals.iter().map(|batch| {
            progress.check_stop()?;
            let mut batch = backend.duplicate(batch)?;
            block.forward(backend, attention, &mut batch, &mut Observer::none())?;
            Ok(batch)
        });
        outputs.collect()
    }

    /// Mean of `|x' - x|^2 / |x|^2` over the tokens after the block, x' with `site` in its place.
    fn effect(
        &self,
        block: &mut Block<B>,
        at: usize,
        site: Site<B>,
        after: &[B::Hidden],
    ) -> Result<f64> {
        let original = std::mem::replace(&mut block.sites[at], site);
        let changed = self.outputs(block);
        block.sites[at] = original;
        let mut changes = Vec::new();
        for (changed, original) in changed?.iter().zip(after) {
            changes.extend(self.subject.backend.relative_squared_error(changed, original)?);
        }
        Ok(mean(&changes))
    }

    /// `sum x^T x` at the sites that are `wanted`, on quantized activations.
    fn hessians(
        &self,
        weights: &BlockWeights<B>,
        formats: &[SiteFormat],
        wanted: &[bool],
    ) -> Result<Vec<Option<B::Gram>>> {
        let Subject { backend, architecture, attention, progress, .. } = self.subject;
        let block = BlockBuilder::new(backend, architecture, weights).observed(formats)?;
        let mut hessians = formats
            .iter()
            .zip(wanted)
            .map(|(format, wanted)| wanted.then(|| backend.gram(format.width())).transpose())
            .collect::<Result<Vec<_>>>()?;
        for batch in self.originals.iter().chain(&self.others.batches) {
            progress.check_stop()?;
            let batch = backend.duplicate(batch)?;
            let mut see = |seen: Seen, x: &B::Activation| {
                let Seen::Site(site) = seen else { return Ok(()) };
                match &mut hessians[site] {
                    Some(hessian) => backend.add_gram(hessian, x),
                    None => Ok(()),
                }
            };
            block.observe(backend, attention, batch, &mut Observer::new(&mut see))?;
        }
        Ok(hessians)
    }

    /// Quantizes a site's linears at every width.
    fn errors(
        &self,
        weights: &BlockWeights<B>,
        at: usize,
        plan: &SitePlan,
        format: &SiteFormat,
        mut hessian: B::Gram,
    ) -> Result<Measured<B::Quantized>> {
        let Subject { backend, recipe, .. } = self.subject;
        let site = backend.site(format)?;
        let factor = backend.cholesky(&mut hessian, recipe.damping)?.filter(|_| recipe.gptq);
        let mut errors = vec![Vec::with_capacity(WIDTHS.len()); plan.linears.len()];
        let mut reference = Vec::new();
        for bits in &WIDTHS {
            let unquantized: Vec<Unquantized<B::Weight<'_>>> = plan
                .linears
                .iter()
                .zip(&weights.sites[at])
                .map(|(linear, weight)| {
                    let mut at_width = linear.clone();
                    at_width.set_width(*bits);
                    let weight = weight.as_ref().expect("every weight is loaded to be measured");
                    let (format, scaling) = (plan.weights(&at_width), at_width.scaling());
                    Unquantized { name: &linear.name, weight, format, scaling }
                })
                .collect();
            let quantized = match &factor {
                Some((factor, _)) => backend.gptq(&unquantized, &site, &hessian, factor, None)?,
                None => round_all(backend, &unquantized, &site, &hessian)?,
            };
            for ((_, error), errors) in quantized.iter().zip(&mut errors) {
                errors.push(*error);
            }
            if *bits == recipe.bits {
                reference = quantized.into_iter().map(|(quantized, _)| quantized).collect();
            }
        }
        Ok(Measured { errors, reference })
    }

    /// Takes all states past the block: those that no block changed are left to the caller.
    fn advance(
        &mut self,
        weights: &BlockWeights<B>,
        source: &Block<B>,
        sites: &[QuantizedSite<B::Quantized>],
    ) -> Result<()> {
        let Subject { backend, architecture, attention, progress, .. } = self.subject;
        for stream in self.changed.iter_mut().chain([&mut self.others]) {
            stream.advance(backend, attention, source, || progress.check_stop())?;
        }
        let block = BlockBuilder::new(backend, architecture, weights).quantized(sites)?;
        let mut batches = self.outputs(&block)?;
        for batch in &mut batches {
            backend.offload(batch)?;
        }
        self.changed.push(Stream::of(batches));
        Ok(())
    }

    /// What was measured, once every block was: `kept_bytes` is for the file.
    pub(super) fn finish(mut self, kept_bytes: u64) -> Result<Sensitivity> {
        let Subject { backend, tensors, architecture, recipe, progress, .. } = self.subject;
        let head = OutputHead::load(backend, tensors, architecture)?;
        let normed = |x: &B::Hidden| head.normed(backend, x);
        let originals = self.originals.iter().map(normed).collect::<Result<Vec<_>>>()?;
        for (block, stream) in self.blocks.iter_mut().zip(std::mem::take(&mut self.changed)) {
            let mut divergence = Vec::new();
            for (mut batch, original) in stream.batches.into_iter().zip(&originals) {
                progress.check_stop()?;
                backend.reload(&mut batch)?;
                divergence.extend(backend.kl_divergence(
                    &normed(&batch)?,
                    original,
                    &head.weight,
                )?);
            }
            let effects = block.effects();
            // A rounding error below zero would make a cost negative.
            let divergence = mean(&divergence).max(0.0);
            block.carry = if effects > 0.0 { divergence / effects } else { 0.0 };
        }
        Ok(Sensitivity {
            recipe: recipe.clone(),
            widths: WIDTHS.to_vec(),
            effect_windows: self.effect_windows,
            hessian_windows: self.hessian_windows,
            kept_bytes,
            blocks: self.blocks,
        })
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
