/*! Sensitivity: what each width of a linear and each outlier count of a site would cost, measured once
next to the calibration and reused for every target.

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
- **Carry.** What becomes of a block's change on its way through the blocks after it, which damp some and
  amplify others. For every block, states that this block alone changed (quantized as the recipe says)
  travel next to the originals to the end, where the KL divergence of their predictions from the original's
  is taken: `carry = KL divergence / sum of the block's effects`.

The cost of a choice is `carry` times its effects: nats that a token's loss may be expected to grow by. */

use serde::{Deserialize, Serialize};

use crate::model::Architecture;
use crate::model::sites::SiteSpec;
use crate::recipe::Recipe;

/// Widths that are measured, any recipe's among them. 16 needs none: such a linear has no error.
pub const WIDTHS: [u8; 4] = [2, 3, 4, 8];

/// Tokens on which Hessians are measured: about as many as the widest sites have channels.
pub(super) const HESSIAN_TOKENS: usize = 32_768;
/// Tokens on which effects and KL divergences are measured. Each token gives a positive number of
/// its own, so that few are enough.
pub(super) const EFFECT_TOKENS: usize = 4_096;

/// What `atom calibrate --sensitivity` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// The recipe it was measured under; its `bits` and its outliers of each site are those of the effects and carries.
    pub recipe: Recipe,
    /// Widths of the errors.
    pub widths: Vec<u8>,
    /// Windows that Hessians were measured on.
    pub hessian_windows: usize,
    /// Windows that effects and KL divergences were measured on.
    pub effect_windows: usize,
    /// Bytes of the tensors that stay as the source has them, whatever the plan.
    pub kept_bytes: u64,
    /// Every block.
    pub blocks: Vec<BlockSensitivity>,
}

/// What was measured of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockSensitivity {
    /// Nats at the end for a unit of effect after this block.
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
const MAX_UNQUANTIZED_BYTES: u64 = 1 << 50;

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
        if self.kept_bytes > MAX_UNQUANTIZED_BYTES {
            return wrong(format!("has {} bytes of unquantized tensors", self.kept_bytes));
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
                let outliers = self.recipe.outliers.of(spec.channels);
                let found = site.check(spec, outliers, self.widths.len());
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
