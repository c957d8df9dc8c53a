/*! Sensitivity: what each width of a linear and each outlier count of a site would cost, measured once
beside the calibration and reused for every target.

Errors of different linears cannot be compared by themselves: half of one may be noise that the
next norm hides. So three things are measured, from near to far.

- **Error.** For each outlier count and width, the relative output error of each linear after GPTQ,
  `e(width, outliers)`, with the Hessian that the outlier count's order and quantized activations give.
- **Effect.** The block is run with this one linear quantized, all else in full precision, and the states it
  gives are compared with the original's, token by token: the mean of `|x' - x|^2 / |x|^2`. By token, because
  the norms that follow see each token by itself, and a first token of enormous states would drown all
  others. Squared errors of small independent changes add up, and grow with the square of the linear's error,
  so one run a linear serves every width: `effect * (e(width, outliers) / e(measured))^2`. Quantizing a
  site's activations alone has an effect of its own, measured for each outlier count.
- **Carry.** What becomes of a block's change on its way through the blocks behind it, which damp some and
  amplify others. For every block, states that this block alone changed (quantized as the recipe says)
  travel on beside the originals to the end, where their divergence from the original's predictions is
  taken: `carry = divergence / sum of the block's effects`.

The cost of a choice is `carry` times its effects: nats that a token's loss may be expected to grow by. */

use serde::{Deserialize, Serialize};

use super::energies::Energies;
use super::plan::plan_block;
use super::quantizer::{formats, round_all};
use crate::Result;
use crate::backend::{AttentionSpec, Backend, Unquantized};
use crate::checkpoint::Tensors;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::model::Architecture;
use crate::model::block::{Block, Observer, Seen, Site};
use crate::model::sites::SiteSpec;
use crate::network::{BlockBuilder, BlockWeights, OutputHead, QuantizedSite, Stream};
use crate::progress::Progress;
use crate::quant::site::SiteFormat;
use crate::recipe::Recipe;

/// Widths that are measured, any recipe's among them. 16 needs none: such a linear has no error.
pub const WIDTHS: [u8; 4] = [2, 3, 4, 8];

/// Tokens on which Hessians are measured: about as many as the widest sites have channels.
const HESSIAN_TOKENS: usize = 32_768;
/// Tokens on which effects and divergences are measured. Each token gives a positive number of
/// its own, so that few are enough.
pub(super) const EFFECT_TOKENS: usize = 4_096;

/// What `atom calibrate --sensitivity` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// The recipe it was measured under; `bits` and `outliers` are those of the effects and carries.
    pub recipe: Recipe,
    /// Widths of the errors.
    pub widths: Vec<u8>,
    /// Windows that Hessians were measured on.
    pub hessian_windows: usize,
    /// Windows that effects and divergences were measured on.
    pub effect_windows: usize,
    /// Bytes of the tensors that stay as the source has them, whatever the plan.
    pub kept_bytes: u64,
    /// Every block.
    pub blocks: Vec<BlockSensitivity>,
}

/// What was measured of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockSensitivity {
    /// Nats at the end for a unit of effect behind this block.
    pub carry: f64,
    /// Its sites.
    pub sites: Vec<SiteSensitivity>,
}

impl BlockSensitivity {
    /// The sum of its effects at the recipe's width and outlier count.
    pub fn effects(&self) -> f64 {
        let sites = self.sites.iter();
        sites.map(|site| site.counts[0].activation + site.effects.iter().sum::<f64>()).sum()
    }
}

/// What was measured of a site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteSensitivity {
    /// Effect of each linear at the recipe's width and outlier count.
    pub effects: Vec<f64>,
    /// Bytes of each linear's weights in the source.
    pub source_bytes: Vec<u64>,
    /// Outlier counts, the recipe's first.
    pub counts: Vec<CountSensitivity>,
}

/// More bytes than any network keeps in full precision.
const MAX_KEPT_BYTES: u64 = 1 << 50;

/// Greatest error, effect or carry that means anything: sums of products of three stay finite.
const MAX_COST: f64 = 1e60;

/// Whether a measured value is one that costs are made of.
fn is_cost(value: &f64) -> bool {
    (0.0..=MAX_COST).contains(value)
}

impl SiteSensitivity {
    /// Checks it against its site: `outliers` is the recipe's count, `widths` how many were measured.
    fn check(
        &self,
        spec: &SiteSpec,
        outliers: usize,
        widths: usize,
    ) -> std::result::Result<(), String> {
        let linears = spec.linears.len();
        if self.effects.len() != linears || self.source_bytes.len() != linears {
            let (effects, bytes) = (self.effects.len(), self.source_bytes.len());
            return Err(format!("has {effects} effects and {bytes} sizes for {linears} linears"));
        }
        if !self.effects.iter().all(is_cost) {
            return Err(format!("has the effects {:?}", self.effects));
        }
        let sizes = spec.linears.iter().zip(&self.source_bytes);
        for (linear, bytes) in sizes {
            let weights = (linear.rows * linear.columns) as u64;
            if ![2 * weights, 4 * weights].contains(bytes) {
                return Err(format!(
                    "has {bytes} bytes for the {weights} weights of {}",
                    linear.name
                ));
            }
        }
        if self.counts.first().is_none_or(|count| count.outliers != outliers) {
            return Err(format!("does not begin with the recipe's outlier count, {outliers}"));
        }
        for (at, count) in self.counts.iter().enumerate() {
            let outliers = count.outliers;
            if outliers >= spec.channels
                || self.counts[..at].iter().any(|own| own.outliers == outliers)
            {
                return Err(format!(
                    "has an outlier count {outliers} twice or beyond its channels"
                ));
            }
            let whole = count.errors.len() == linears
                && count.errors.iter().all(|errors| errors.len() == widths);
            let sound = count.errors.iter().flatten().chain([&count.activation]).all(is_cost);
            if !whole || !sound {
                return Err(format!(
                    "has no sound error of each linear and width at {outliers} outliers"
                ));
            }
        }
        Ok(())
    }

    /// What was measured of outlier count `outliers`, if it was.
    pub fn count(&self, outliers: usize) -> Option<&CountSensitivity> {
        self.counts.iter().find(|count| count.outliers == outliers)
    }
}

/// What was measured of an outlier count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CountSensitivity {
    /// The outlier count.
    pub outliers: usize,
    /// Effect of quantizing the activation alone.
    pub activation: f64,
    /// Relative output error of each linear at each width, `[linears][widths]`.
    pub errors: Vec<Vec<f64>>,
}

impl Sensitivity {
    /// Checks that it belongs to the network and that its numbers mean something; every other function
    /// relies on it.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self, architecture: &Architecture) -> std::result::Result<(), String> {
        let wrong = |what: String| Err(format!("its sensitivity {what}"));
        self.recipe
            .clone()
            .check()
            .map_err(|error| format!("its sensitivity's recipe: {error}"))?;
        let known = |bits: &u8| WIDTHS.contains(bits);
        let mut widths = self.widths.clone();
        widths.sort_unstable();
        widths.dedup();
        if widths.len() != self.widths.len() || !widths.iter().all(known) {
            return wrong(format!("has the widths {:?}", self.widths));
        }
        if self.recipe.bits != 16 && !self.widths.contains(&self.recipe.bits) {
            return wrong(format!("lacks the width of its recipe, {}", self.recipe.bits));
        }
        if self.kept_bytes > MAX_KEPT_BYTES {
            return wrong(format!("has {} bytes of kept tensors", self.kept_bytes));
        }
        if self.blocks.len() != architecture.blocks {
            let (own, network) = (self.blocks.len(), architecture.blocks);
            return wrong(format!("has {own} blocks, the network {network}"));
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let specs = architecture.sites(index);
            if block.sites.len() != specs.len() {
                let (own, network) = (block.sites.len(), specs.len());
                return wrong(format!("has {own} sites in block {index}, the network {network}"));
            }
            if !is_cost(&block.carry) {
                return wrong(format!("has the carry {} of block {index}", block.carry));
            }
            for (site, spec) in block.sites.iter().zip(&specs) {
                let found = site.check(spec, self.recipe.outliers, self.widths.len());
                found.or_else(|what| wrong(format!("of {} {what}", spec.name)))?;
            }
        }
        Ok(())
    }

    /// Effect of linear `linear` at `bits` bits under `count`: 0 at 16.
    pub fn effect(
        &self,
        site: &SiteSensitivity,
        count: &CountSensitivity,
        linear: usize,
        bits: u8,
    ) -> f64 {
        let at = |bits: u8| self.widths.iter().position(|width| *width == bits);
        let (Some(width), Some(measured)) = (at(bits), at(self.recipe.bits)) else { return 0.0 };
        let reference = site.counts[0].errors[linear][measured];
        if reference == 0.0 || site.effects[linear] == 0.0 {
            return 0.0;
        }
        let ratio = (count.errors[linear][width] / reference).powi(2);
        // An error of almost nothing must not make another's cost infinite.
        (site.effects[linear] * ratio).min(MAX_COST)
    }
}

/// What is measured, and with what.
pub struct Subject<'a, B: Backend> {
    /// Does the arithmetic.
    pub backend: &'a B,
    /// The source's tensors.
    pub tensors: &'a dyn Tensors,
    /// The network.
    pub architecture: &'a Architecture,
    /// Attention over full-precision keys and values.
    pub attention: &'a AttentionSpec,
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
pub struct Sensor<'a, B: Backend> {
    subject: Subject<'a, B>,
    /// Outlier counts, the recipe's first.
    counts: Vec<usize>,
    /// Original states of the windows that effects are measured on, ready for use.
    originals: Vec<B::Hidden>,
    /// Those of the windows that serve Hessians only.
    others: Stream<B>,
    /// For each block so far, the states of the first that this block alone changed.
    changed: Vec<Stream<B>>,
    windows: [usize; 2],
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
    pub fn new(subject: Subject<'a, B>, counts: &[usize], tokens: &[u32]) -> Result<Self> {
        let Subject { backend, tensors, architecture, attention, recipe, .. } = subject;
        let seq_len = attention.seq_len;
        let samples = tokens.len() / seq_len;
        let windows = [EFFECT_TOKENS, HESSIAN_TOKENS].map(|n| n.div_ceil(seq_len).min(samples));
        let (effect, rest) = tokens[..windows[1] * seq_len].split_at(windows[0] * seq_len);
        let embed =
            |tokens: &[u32]| Stream::embed(backend, tensors, architecture, tokens, seq_len, 0);
        let mut originals = embed(effect)?.batches;
        for batch in &mut originals {
            backend.reload(batch)?;
        }
        let mut all = vec![recipe.outliers];
        for count in counts {
            if !all.contains(count) {
                all.push(*count);
            }
        }
        Ok(Self {
            subject,
            counts: all,
            originals,
            others: embed(rest)?,
            changed: Vec::new(),
            windows,
            blocks: Vec::new(),
        })
    }

    /// Measures the next block.
    pub fn measure(&mut self, weights: &BlockWeights<B>, energies: &Energies) -> Result<()> {
        let Subject { backend, architecture, recipe, .. } = self.subject;
        let specs = architecture.sites(weights.index);
        let usual = plan_block(recipe, &specs)?;
        let builder = BlockBuilder::new(backend, architecture, weights);
        let mut source = builder.source()?;
        let after = self.outputs(&source)?;
        let mut sites =
            specs.iter().map(|spec| self.unmeasured(spec)).collect::<Result<Vec<_>>>()?;
        let mut quantized_sites = Vec::with_capacity(specs.len());
        for &outliers in &self.counts {
            let plans = usual.iter().map(|site| site.with_outliers(outliers, recipe.group));
            let wanted: Vec<bool> = plans.clone().map(|plan| plan.is_some()).collect();
            // A site that the count does not fit is passed through as usual, and not looked at.
            let plans: BlockPlan = plans
                .zip(&usual)
                .map(|(plan, usual)| plan.unwrap_or_else(|| usual.clone()))
                .collect();
            if !wanted.contains(&true) {
                continue;
            }
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
                let count = CountSensitivity { outliers, activation, errors };
                sites[at].counts.push(count);
                if outliers == recipe.outliers {
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
        self.carry_on(weights, &source, &quantized_sites)?;
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

    /// The states behind `block`.
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

    /// Mean of `|x' - x|^2 / |x|^2` over the tokens behind the block, x' with `site` in its place.
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

    /// `sum x^T x` at the sites that are `wanted`, behind quantized activations.
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
                    let (format, clip) = (plan.weights(&at_width), at_width.clip);
                    Unquantized { name: &linear.name, weight, format, clip }
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
    fn carry_on(
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
        self.changed.push(Stream { batches });
        Ok(())
    }

    /// What was measured, once every block was: `kept_bytes` is for the file.
    pub fn finish(mut self, kept_bytes: u64) -> Result<Sensitivity> {
        let Subject { backend, tensors, architecture, recipe, progress, .. } = self.subject;
        let head = OutputHead::load(backend, tensors, architecture)?;
        let normed = |x: &B::Hidden| head.normed(backend, x);
        let originals = self.originals.iter().map(normed).collect::<Result<Vec<_>>>()?;
        for (block, stream) in self.blocks.iter_mut().zip(std::mem::take(&mut self.changed)) {
            let mut divergences = Vec::new();
            for (mut batch, original) in stream.batches.into_iter().zip(&originals) {
                progress.check_stop()?;
                backend.reload(&mut batch)?;
                divergences.extend(backend.kl_divergence(
                    &normed(&batch)?,
                    original,
                    &head.weight,
                )?);
            }
            let effects = block.effects();
            // A rounding error below zero would make a cost negative.
            let divergence = mean(&divergences).max(0.0);
            block.carry = if effects > 0.0 { divergence / effects } else { 0.0 };
        }
        Ok(Sensitivity {
            recipe: recipe.clone(),
            widths: WIDTHS.to_vec(),
            effect_windows: self.windows[0],
            hessian_windows: self.windows[1],
            kept_bytes,
            blocks: self.blocks,
        })
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
