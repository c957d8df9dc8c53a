/*! Bits where they matter: from a calibration's sensitivity and a target to the plan of every block. */

use super::allocated::{Allocated, Expected, Favoured, OutlierShare, WidthShare};
use super::plan::plan_block;
use super::sensitivity::{BlockSensitivity, Sensitivity, SiteSensitivity};
use crate::checkpoint::plan::{BlockPlan, SitePlan, bits_per_weight};
use crate::model::Architecture;
use crate::quant::allocation::{self, Choice};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// How large the result may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Average bits a weight of the linears, scales, outliers and orders included.
    Bits(f64),
    /// Bytes of the entire checkpoint.
    Bytes(u64),
}

/// What may be chosen, and how large the result may be.
#[derive(Clone, Debug)]
pub struct Allocating {
    /// The target.
    pub target: Target,
    /// Widths to choose among; 16 leaves a linear as it is.
    pub widths: Vec<u8>,
    /// Outlier counts to choose among; none for all that were measured.
    pub outlier_counts: Option<Vec<usize>>,
}

/// Bytes of headers and of `atom.json` that a linear takes next to its tensors, at most.
const LINEAR_DESCRIPTION_BYTES: u64 = 2000;
/// The same for a site and the tensors around it.
const SITE_DESCRIPTION_BYTES: u64 = 1000;

/// The blocks' plans that the target allows and that cost least.
///
/// # Errors
/// A sensitivity of another recipe or without what is to be chosen among; a target below the least.
pub fn allocate(
    sensitivity: &Sensitivity,
    architecture: &Architecture,
    recipe: &Recipe,
    allocating: &Allocating,
) -> Result<(Vec<BlockPlan>, Allocated)> {
    check_recipe(sensitivity, recipe)?;
    let widths = widths_of(sensitivity, allocating)?;
    let counts = counts_of(sensitivity, allocating)?;
    let usual = (0..architecture.blocks)
        .map(|block| plan_block(recipe, &architecture.sites(block)))
        .collect::<Result<Vec<_>>>()?;
    let measured = || {
        usual.iter().zip(&sensitivity.blocks).flat_map(|(plan, block)| {
            plan.iter().zip(&block.sites).map(move |(plan, site)| Options {
                sensitivity,
                block,
                site,
                plan,
            })
        })
    };
    let options: Vec<Vec<Planned>> =
        measured().map(|site| site.all(&widths, &counts, recipe, allocating.target)).collect();
    let choices: Vec<Vec<Choice>> =
        options.iter().map(|site| site.iter().map(|planned| planned.choice).collect()).collect();
    let linears: usize = usual.iter().flatten().map(|site| site.linears.len()).sum();
    let described = linears as u64 * LINEAR_DESCRIPTION_BYTES
        + choices.len() as u64 * SITE_DESCRIPTION_BYTES
        + sensitivity.kept_bytes;
    let weights: u64 = usual.iter().flatten().map(|site| site.bits_and_weights().1).sum();
    let budget = match allocating.target {
        Target::Bits(bits) => (bits * weights as f64).floor() as u64,
        Target::Bytes(bytes) => 8 * bytes.saturating_sub(described),
    };
    let found = allocation::allocate(&choices, budget)
        .map_err(|least| too_small(allocating.target, least, weights, described))?;
    let chosen = measured().zip(&options).zip(&found.chosen);
    let mut chosen = chosen.map(|((site, planned), at)| site.treated(&planned[*at], recipe));
    let blocks: Vec<BlockPlan> = sensitivity
        .blocks
        .iter()
        .map(|block| chosen.by_ref().take(block.sites.len()).collect())
        .collect();
    let uniform_nats = measured().map(|site| site.nats(site.plan)).sum();
    let stored = blocks.iter().flatten().zip(measured());
    let stored: u64 = stored.map(|(plan, site)| plan.stored_bytes(&site.site.source_bytes)).sum();
    let allocated = Allocated {
        target_bits: match allocating.target {
            Target::Bits(bits) => Some(bits),
            Target::Bytes(_) => None,
        },
        target_bytes: match allocating.target {
            Target::Bits(_) => None,
            Target::Bytes(bytes) => Some(bytes),
        },
        checkpoint_bytes: stored + described,
        planned: Expected { bits_per_weight: bits_per_weight(&blocks), nats: found.cost },
        uniform: Expected { bits_per_weight: bits_per_weight(&usual), nats: uniform_nats },
        least_nats: found.bound,
        widths: WidthShare::of(&blocks),
        outliers: OutlierShare::of(&blocks),
        favoured: favoured(&blocks, measured()),
    };
    Ok((blocks, allocated))
}

/// A site with what was measured of it.
struct Options<'a> {
    sensitivity: &'a Sensitivity,
    block: &'a BlockSensitivity,
    site: &'a SiteSensitivity,
    /// Its plan by the recipe.
    plan: &'a SitePlan,
}

/// So many combinations of widths of a site's linears are tried one by one.
const COMBINATIONS: usize = 1 << 14;

/// One way to treat a site.
struct Planned {
    outliers: usize,
    /// Of each of its linears.
    widths: Vec<u8>,
    choice: Choice,
}

impl Options<'_> {
    /// Every outlier count with every width of each linear. Of the linears of many experts, whose combinations are
    /// without number, only with those that are not both larger and worse than another.
    fn all(
        &self,
        widths: &[u8],
        counts: &[usize],
        recipe: &Recipe,
        target: Target,
    ) -> Vec<Planned> {
        let linears = self.plan.linears.len();
        let mut all = Vec::new();
        for outliers in counts {
            let measured = self.site.count(*outliers).is_some();
            let plan = self.plan.with_outliers(*outliers, recipe).filter(|_| measured);
            let Some(plan) = plan else { continue };
            let combinations = widths.len().checked_pow(linears as u32);
            match combinations.filter(|count| *count <= COMBINATIONS) {
                Some(count) => {
                    all.extend(
                        (0..count).map(|index| self.combination(&plan, widths, index, target)),
                    );
                }
                None => all.extend(self.combined(&plan, widths, target)),
            }
        }
        all
    }

    /// The combination of widths of this number: its digits, the first linear's the least.
    fn combination(&self, plan: &SitePlan, widths: &[u8], index: usize, target: Target) -> Planned {
        let mut rest = index;
        let digits = plan.linears.iter().map(|_| {
            let width = widths[rest % widths.len()];
            rest /= widths.len();
            width
        });
        let (widths, outliers) = (digits.collect::<Vec<u8>>(), plan.outlier_channels);
        let plan = with_widths(plan, &widths);
        let bits = size(&plan, &self.site.source_bytes, target);
        let choice = Choice { bits, cost: self.nats(&plan) };
        Planned { outliers, widths, choice }
    }

    /// The combinations of widths of which none is both larger and worse than another: what is stored of a linear,
    /// and what it costs, does not depend on the others.
    fn combined(&self, plan: &SitePlan, widths: &[u8], target: Target) -> Vec<Planned> {
        let outliers = plan.outlier_channels;
        let count = self.site.count(outliers);
        let count = count.expect("only measured outlier counts are planned");
        let mut alone = SitePlan { linears: Vec::new(), ..plan.clone() };
        let shared = size(&alone, &[], target);
        let mut parts = Vec::new();
        for (at, linear) in plan.linears.iter().enumerate() {
            let choice = |width: &u8| {
                alone.linears = vec![linear.clone()];
                alone.linears[0].set_width(*width);
                let bits = size(&alone, &self.site.source_bytes[at..=at], target) - shared;
                Choice { bits, cost: self.sensitivity.effect(self.site, count, at, *width) }
            };
            parts.push(widths.iter().map(choice).collect());
        }
        let planned = |(sum, chosen): (Choice, Vec<usize>)| Planned {
            outliers,
            widths: chosen.iter().map(|at| widths[*at]).collect(),
            choice: Choice {
                bits: shared + sum.bits,
                cost: self.block.carry * (count.activation + sum.cost),
            },
        };
        allocation::combined(&parts).into_iter().map(planned).collect()
    }

    /// The site's plan treated so.
    fn treated(&self, planned: &Planned, recipe: &Recipe) -> SitePlan {
        let plan = self.plan.with_outliers(planned.outliers, recipe);
        with_widths(&plan.expect("it was planned with so many"), &planned.widths)
    }

    /// What a plan of the site, of a measured outlier count, may be expected to cost.
    fn nats(&self, plan: &SitePlan) -> f64 {
        let count = self.site.count(plan.outlier_channels);
        let count = count.expect("only measured outlier counts are planned");
        let linears = plan
            .linears
            .iter()
            .enumerate()
            .map(|(at, linear)| self.sensitivity.effect(self.site, count, at, linear.bits));
        self.block.carry * (count.activation + linears.sum::<f64>())
    }

    /// What one linear costs as the recipe has it.
    fn linear_nats(&self, linear: usize) -> f64 {
        self.block.carry * self.site.effects[linear]
    }
}

/// The plan with these widths of its linears.
fn with_widths(plan: &SitePlan, widths: &[u8]) -> SitePlan {
    let mut plan = plan.clone();
    for (linear, width) in plan.linears.iter_mut().zip(widths) {
        linear.set_width(*width);
    }
    plan
}

/// What a plan takes of the target, in bits; `source_bytes` are those of its linears as they are.
fn size(plan: &SitePlan, source_bytes: &[u64], target: Target) -> u64 {
    match target {
        Target::Bits(_) => plan.bits_and_weights().0,
        Target::Bytes(_) => 8 * plan.stored_bytes(source_bytes),
    }
}

/// Refuses a sensitivity that was measured with other settings: all but width and outlier count, which are
/// chosen, and the KV cache and what GPTQ aims at, which have no part in it.
fn check_recipe(sensitivity: &Sensitivity, recipe: &Recipe) -> Result<()> {
    let table = |recipe: &Recipe| {
        let table = serde_json::to_value(recipe).expect("a recipe has only JSON types");
        table.as_object().expect("a recipe is a table").clone()
    };
    let (measured, wanted) = (table(&sensitivity.recipe), table(recipe));
    let free = [
        "kv_bits",
        "clip_kv",
        "rotate_kv",
        "kv_after_rope",
        "center_keys",
        "sequential",
        "correction",
    ];
    let differing: Vec<String> = wanted
        .iter()
        .filter(|(key, value)| !free.contains(&key.as_str()) && measured.get(*key) != Some(*value))
        .map(|(key, value)| match measured.get(key) {
            Some(measured) => format!("{key} was {measured} and is now {value}"),
            None => format!("{key} is new"),
        })
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::input(format!(
        "the sensitivity was measured with other settings: {}",
        differing.join(", ")
    ))
    .hint("plan with the recipe flags of the calibration, or measure again with `atom calibrate --sensitivity` and these"))
}

fn widths_of(sensitivity: &Sensitivity, allocating: &Allocating) -> Result<Vec<u8>> {
    let unknown = |bits: &&u8| **bits != 16 && !sensitivity.widths.contains(bits);
    if let Some(bits) = allocating.widths.iter().find(unknown) {
        let known: Vec<String> = sensitivity.widths.iter().map(u8::to_string).collect();
        return Err(Error::usage(format!("{bits} bits were not measured"))
            .hint(format!("choose --widths among {} and 16", known.join(", "))));
    }
    let mut widths = allocating.widths.clone();
    widths.sort_unstable();
    widths.dedup();
    Ok(widths)
}

/// Outlier counts to choose among. The recipe's is always one of them: a site that is too narrow for
/// others has it.
fn counts_of(sensitivity: &Sensitivity, allocating: &Allocating) -> Result<Vec<usize>> {
    let sites = sensitivity.blocks.iter().flat_map(|block| &block.sites);
    let mut measured: Vec<usize> =
        sites.flat_map(|site| &site.counts).map(|count| count.outliers).collect();
    measured.sort_unstable();
    measured.dedup();
    let Some(wanted) = &allocating.outlier_counts else { return Ok(measured) };
    if let Some(count) = wanted.iter().find(|count| !measured.contains(count)) {
        let known: Vec<String> = measured.iter().map(usize::to_string).collect();
        return Err(Error::usage(format!("{count} outliers were not measured")).hint(format!(
            "choose --outlier-counts among {}, or measure with `atom calibrate --sensitivity --outlier-counts {count}`",
            known.join(", ")
        )));
    }
    let mut counts = wanted.clone();
    let narrow =
        |site: &&SiteSensitivity| site.counts.iter().all(|count| !wanted.contains(&count.outliers));
    let sites = sensitivity.blocks.iter().flat_map(|block| &block.sites);
    counts.extend(sites.filter(narrow).map(|site| site.counts[0].outliers));
    counts.sort_unstable();
    counts.dedup();
    Ok(counts)
}

fn too_small(target: Target, least: u64, weights: u64, described: u64) -> Error {
    let hint =
        "or allow smaller --widths or fewer --outlier-counts, or calibrate with a larger --group";
    match target {
        Target::Bits(bits) => {
            // Rounded up, so that the number shown is one that can be asked for.
            let least = (least as f64 / weights as f64 * 1000.0).ceil() / 1000.0;
            Error::input(format!(
                "{bits} bits a weight are too few: the smallest plan takes {least}, scales, outliers and orders included"
            ))
            .hint(format!("ask for --target-bits {least} or more, {hint}"))
        }
        Target::Bytes(bytes) => {
            let least = least.div_ceil(8) + described;
            Error::input(format!(
                "{bytes} bytes are too few: the smallest plan takes {least}, of which {described} are what is never quantized"
            ))
            .hint(format!("ask for --target-size {least} or more, {hint}"))
        }
    }
}

/// Linears named by a report.
const FAVOURED: usize = 5;

/// The linears of the greatest width, the most sensitive first.
fn favoured<'a>(
    blocks: &[BlockPlan],
    measured: impl Iterator<Item = Options<'a>>,
) -> Vec<Favoured> {
    let mut all: Vec<Favoured> = blocks
        .iter()
        .flatten()
        .zip(measured)
        .flat_map(|(plan, site)| {
            let named = plan.linears.iter().enumerate();
            let favoured = named.map(move |(at, linear)| Favoured {
                name: linear.name.clone(),
                bits: linear.bits,
                nats: site.linear_nats(at),
            });
            favoured.collect::<Vec<_>>()
        })
        .collect();
    all.sort_by(|a, b| b.bits.cmp(&a.bits).then(b.nats.total_cmp(&a.nats)));
    all.truncate(FAVOURED);
    all
}
