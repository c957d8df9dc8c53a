/*! The plan: what a recipe makes of every site and linear, and the file that holds it, which is there to be read and edited. */

use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::checkpoint::plan::{BlockPlan, LinearPlan, SitePlan};
use crate::checkpoint::{FileKind, read_named, utf8_text};
use crate::model::Architecture;
use crate::model::sites::{LinearSpec, SiteSpec};
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// The calibration a plan was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationFile {
    /// Relative to the plan's own directory, or absolute.
    pub path: PathBuf,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// The file that `atom plan` writes and `atom pack` obeys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// Version of this file's format.
    pub plan_version: u32,
    /// Name of the model it was made for.
    pub model: String,
    /// The recipe it was made by; decides what is not said below.
    pub recipe: Recipe,
    /// Where channel energies and windows come from.
    pub calibration: CalibrationFile,
    /// Every block's sites.
    pub blocks: Vec<BlockPlan>,
}

/// Version of the plan file's format.
pub const PLAN_VERSION: u32 = 1;

/// What a [`PlanFile`] is written as.
pub const PLAN_FILE: FileKind = FileKind { name: "a plan", recognizes: is_plan };

/// What only a plan has, of any version.
#[derive(Deserialize)]
struct PlanOutline {
    #[serde(rename = "plan_version")]
    _version: u64,
    #[serde(rename = "blocks")]
    _blocks: Vec<IgnoredAny>,
}

/// Whether a file is JSON with the version of a plan.
fn is_plan(path: &Path) -> bool {
    let read = fs_err::File::open(path).map(std::io::BufReader::new);
    read.is_ok_and(|file| serde_json::from_reader::<_, PlanOutline>(file).is_ok())
}

/// The plan of a block by `recipe`.
///
/// # Errors
/// A group wider than a site, or as many outliers as channels.
pub fn plan_block(recipe: &Recipe, sites: &[SiteSpec]) -> Result<BlockPlan> {
    sites
        .iter()
        .map(|site| {
            let outlier_channels = recipe.outliers.of(site.channels);
            let plan = SitePlan {
                name: site.name.clone(),
                channels: site.channels,
                group_size: recipe.group_size(site.channels, outlier_channels),
                outlier_channels,
                outlier_format: recipe.outlier_format,
                order: recipe.order,
                bits: recipe.act_bits,
                codebook: recipe.act_format(),
                clip: recipe.clip_act,
                signed_scales: recipe.signed_scales,
                scales: recipe.scales,
                act_exponent: None,
                weight_exponent: None,
                transform: recipe.transform,
                linears: site.linears.iter().map(|linear| plan_linear(recipe, linear)).collect(),
            };
            plan.check()?;
            check_padding(recipe, &plan)?;
            Ok(plan)
        })
        .collect()
}

/// Refuses a site that the recipe's groups do not fit without padding.
fn check_padding(recipe: &Recipe, site: &SitePlan) -> Result<()> {
    let grouped = site.channels - site.outlier_channels;
    if recipe.pad_groups || grouped.is_multiple_of(site.group_size) {
        return Ok(());
    }
    Err(Error::input(format!(
        "the {grouped} channels of {} are no multiple of {}, and this recipe pads no groups",
        site.name, site.group_size
    ))
    .hint("engines do not load such a linear in groups: set pad_groups = true to quantize it all the same"))
}

fn plan_linear(recipe: &Recipe, linear: &LinearSpec) -> LinearPlan {
    LinearPlan {
        name: linear.name.clone(),
        rows: linear.rows,
        bits: recipe.bits,
        codebook: recipe.format,
        rows_per_scale: recipe.rows_per_scale,
        clip: recipe.clip_weight,
        search_scales: recipe.search_scales,
        error: None,
    }
}

/// The plan of an entire network by `recipe`.
pub fn plan_network(recipe: &Recipe, architecture: &Architecture) -> Result<Vec<BlockPlan>> {
    (0..architecture.blocks).map(|block| plan_block(recipe, &architecture.sites(block))).collect()
}

/// The longest plan that is read, in bytes: that of the largest networks has some 50 MB.
const MAX_BYTES: u64 = 512 << 20;

/// Reads a plan, or the part of it that `T` describes.
///
/// # Errors
/// Bad input that names the file and the place in it.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let make_one = |error: Error| error.hint("make one with `atom plan`");
    let bytes = read_named(path, MAX_BYTES).map_err(make_one)?;
    let text = utf8_text(&bytes, &path.display().to_string())?;
    serde_json::from_slice(text).map_err(|error| {
        make_one(Error::input(format!("{} is not a plan: {error}", path.display())))
    })
}

impl PlanFile {
    /// Reads a plan and says where its calibration file lies.
    pub fn read(path: &Path) -> Result<(Self, PathBuf)> {
        let mut plan: Self = read_json(path)?;
        if plan.plan_version != PLAN_VERSION {
            return Err(Error::input(format!(
                "{} has plan version {}; this program reads version {PLAN_VERSION}",
                path.display(),
                plan.plan_version
            )));
        }
        // The cache's settings stand in the recipe only, and plans are there to be edited.
        plan.recipe = plan.recipe.check().map_err(|error| {
            error.context(format!("the recipe of {} cannot be", path.display()))
        })?;
        let calibration = path.parent().unwrap_or(Path::new(".")).join(&plan.calibration.path);
        Ok((plan, calibration))
    }

    /// The keys and values every quantized key and value is held by.
    pub fn kv(&self) -> KvFormat {
        self.recipe.kv()
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
