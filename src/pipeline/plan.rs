/*! The plan: what becomes of every site and linear. Readable, editable, and stored in the
checkpoint, which is loaded by it. */

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checkpoint::linear::{order_spec, specs};
use crate::checkpoint::{FileKind, TensorSpec, read_named, utf8_text};
use crate::model::Architecture;
use crate::model::sites::{LinearSpec, SiteSpec};
use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::ranges::{BITS, CLIP, GROUP_SIZE, ROWS_PER_SCALE};
use crate::quant::site::{SiteFormat, Transform};
use crate::recipe::{Group, Order, Recipe};
use crate::{Error, Result};

/// What becomes of a linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearPlan {
    /// Full name without `.weight`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Bits of a code: 2, 3, 4, 8, or 16 to leave the linear as it is.
    pub bits: u8,
    /// What codes stand for.
    #[serde(rename = "format", default)]
    pub codebook: Codebook,
    /// Adjacent rows that share a scale.
    pub rows_per_scale: usize,
    /// Clip ratio of the groups.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip: f32,
    /// Relative output error, once it is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

impl LinearPlan {
    /// Gives it codes of `bits` bits: integers where its kind of number has no such width.
    pub fn set_width(&mut self, bits: u8) {
        self.bits = bits;
        if bits < 16 && !self.codebook.has_bits(bits) {
            self.codebook = Codebook::Int;
        }
    }
}

/// What becomes of a site's activation, and of the linears it feeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SitePlan {
    /// Full name.
    pub name: String,
    /// Input features.
    pub channels: usize,
    /// Channels in a group.
    pub group_size: usize,
    /// Channels in the outlier block.
    pub outlier_channels: usize,
    /// How outliers are held.
    pub outlier_format: OutlierFormat,
    /// Whether channels are sorted by energy.
    pub order: Order,
    /// Bits of an activation code, 16 for floating point.
    pub bits: u8,
    /// What the activation's codes stand for.
    #[serde(rename = "format", default)]
    pub codebook: Codebook,
    /// Clip ratio of the groups.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip: f32,
    /// Whether scales are signed, in activations and weights.
    #[serde(default)]
    pub signed_scales: bool,
    /// Transform of each group.
    pub transform: Transform,
    /// The linears it feeds, in the model's order.
    pub linears: Vec<LinearPlan>,
}

/// The sites of one block.
pub type BlockPlan = Vec<SitePlan>;

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

/// Whether a file is JSON with the version of a plan.
fn is_plan(path: &Path) -> bool {
    let read = fs_err::File::open(path).map(std::io::BufReader::new);
    let plan: Option<serde_json::Value> =
        read.ok().and_then(|file| serde_json::from_reader(file).ok());
    plan.is_some_and(|plan| plan["plan_version"].is_u64() && plan["blocks"].is_array())
}

/// The plan of a block by `recipe`.
///
/// # Errors
/// A group wider than a site, or as many outliers as channels.
pub fn plan_block(recipe: &Recipe, sites: &[SiteSpec]) -> Result<BlockPlan> {
    sites
        .iter()
        .map(|site| {
            let plan = SitePlan {
                name: site.name.clone(),
                channels: site.channels,
                group_size: group_size(recipe.group, site.channels, recipe.outliers),
                outlier_channels: recipe.outliers,
                outlier_format: recipe.outlier_format,
                order: recipe.order,
                bits: recipe.act_bits,
                codebook: recipe.act_format(),
                clip: recipe.clip_act,
                signed_scales: recipe.signed_scales,
                transform: recipe.transform,
                linears: site.linears.iter().map(|linear| plan_linear(recipe, linear)).collect(),
            };
            plan.check()?;
            Ok(plan)
        })
        .collect()
}

fn group_size(group: Group, channels: usize, outliers: usize) -> usize {
    match group {
        Group::Size(size) => size,
        Group::Row => channels.saturating_sub(outliers).next_multiple_of(16).max(16),
    }
}

fn plan_linear(recipe: &Recipe, linear: &LinearSpec) -> LinearPlan {
    LinearPlan {
        name: linear.name.clone(),
        rows: linear.rows,
        bits: recipe.bits,
        codebook: recipe.format,
        rows_per_scale: recipe.rows_per_scale,
        clip: recipe.clip_weight,
        error: None,
    }
}

impl SitePlan {
    fn check(&self) -> Result<()> {
        let Self { name, channels, group_size, outlier_channels, .. } = self;
        if outlier_channels >= channels {
            return Err(Error::input(format!(
                "{outlier_channels} outlier channels are as many as or more than the {channels} channels of {name}"
            ))
            .hint(format!("choose --outliers below {channels}")));
        }
        // A row's group may be rounded up to a multiple of 16.
        if *group_size > channels.next_multiple_of(16) || !GROUP_SIZE.holds(*group_size) {
            return Err(Error::input(format!(
                "a group of {group_size} does not fit the {channels} channels of {name}"
            ))
            .hint(format!("choose --group as a multiple of 16 up to {channels}, or `row`")));
        }
        let bits_and_clip = |name: &str, bits: u8, clip: f32| {
            BITS.check_named(format_args!("{name}: {bits} bits"), bits)?;
            CLIP.check_named(format_args!("{name}: clip ratio {clip}"), clip)
        };
        for LinearPlan { name, bits, clip, rows_per_scale, .. } in &self.linears {
            bits_and_clip(name, *bits, *clip)?;
            ROWS_PER_SCALE.check(format_args!("{name}: rows_per_scale"), *rows_per_scale)?;
        }
        bits_and_clip(name, self.bits, self.clip)?;
        let formats =
            self.linears.iter().map(|linear| (&linear.name, linear.bits, linear.codebook));
        let wrong =
            |(_, bits, codebook): &(&String, u8, Codebook)| *bits < 16 && !codebook.has_bits(*bits);
        if let Some((name, bits, codebook)) =
            formats.chain([(name, self.bits, self.codebook)]).find(wrong)
        {
            return Err(Error::input(format!(
                "{name}: there are no {} codes of {bits} bits",
                codebook.name()
            ))
            .hint("fp4 and fp4-bnb have 4 bits; the format of 2, 3 and 8 bits is int"));
        }
        let wide = |codebook: Codebook| codebook == Codebook::Fp4Bnb;
        if self.bits < 16
            && wide(self.codebook)
            && self.linears.iter().any(|linear| linear.bits < 16 && !wide(linear.codebook))
        {
            return Err(Error::input(format!(
                "{name}: activations of fp4-bnb feed weights of another format"
            ))
            .hint("activations of fp4-bnb need weights of fp4-bnb, which take any activations"));
        }
        Ok(())
    }

    /// The site with another outlier count; none if so many would be most of its channels.
    pub fn with_outliers(&self, outliers: usize, group: Group) -> Option<Self> {
        if outliers == self.outlier_channels {
            return Some(self.clone());
        }
        let group_size = group_size(group, self.channels, outliers);
        let fits = outliers <= self.channels / 2;
        fits.then(|| Self { outlier_channels: outliers, group_size, ..self.clone() })
    }

    /// Groups before the outlier block.
    pub fn groups(&self) -> usize {
        (self.channels - self.outlier_channels).div_ceil(self.group_size)
    }

    /// Channels with padding.
    pub fn width(&self) -> usize {
        self.row().width()
    }

    /// The site's format under the channel order `order`.
    pub fn format(&self, order: Vec<i32>) -> SiteFormat {
        let &Self { channels, clip, transform, .. } = self;
        SiteFormat { channels, order, row: self.row(), clip, transform }
    }

    /// How a row of the site's activation is held.
    pub fn row(&self) -> RowFormat {
        let &Self { bits, codebook, group_size, outlier_channels, outlier_format, .. } = self;
        let scale = if self.signed_scales { ScaleFormat::SignedF16 } else { ScaleFormat::F16 };
        let numbers = NumberFormat { bits, codebook, group_size, scale };
        RowFormat { numbers, groups: self.groups(), outlier_channels, outlier_format }
    }

    /// The channel order for channels of the given calibrated energies.
    pub fn order(&self, energy: &[f64]) -> Vec<i32> {
        channel_order(energy, self.order == Order::Energy, self.outlier_channels, self.group_size)
    }

    /// How the weights of one of its linears are held.
    pub fn weights(&self, linear: &LinearPlan) -> LinearFormat {
        self.row().weights(linear.bits, linear.codebook, linear.rows_per_scale)
    }

    /// Bytes of the tensors it is stored as; `source_bytes` are those of each linear left alone.
    pub fn stored_bytes(&self, source_bytes: &[u64]) -> u64 {
        let linears = self.linears.iter().zip(source_bytes).map(|(linear, source)| {
            let specs = || specs(&linear.name, linear.rows, &self.weights(linear));
            if linear.bits == 16 { *source } else { specs().iter().map(TensorSpec::bytes).sum() }
        });
        linears.sum::<u64>() + order_spec(&self.name, self.width()).bytes()
    }

    /// Bits all its linears take, scales and outliers included, and their weights' count. A linear
    /// that is left alone counts 16 bits a weight, the site's channel order once.
    pub fn bits_and_weights(&self) -> (u64, u64) {
        let mut bits = 32 * self.width() as u64;
        let mut weights = 0;
        for linear in &self.linears {
            weights += (linear.rows * self.channels) as u64;
            if linear.bits == 16 {
                bits += 16 * (linear.rows * self.channels) as u64;
                continue;
            }
            let groups = self.groups();
            let outlier_bits = match self.outlier_format {
                _ if self.outlier_channels == 0 => 0,
                OutlierFormat::Int8 | OutlierFormat::Fp8 => 8 * self.outlier_channels + 16,
                OutlierFormat::F16 => 16 * self.outlier_channels,
            };
            let row = groups * self.group_size * usize::from(linear.bits) + outlier_bits;
            let scales = linear.rows.div_ceil(linear.rows_per_scale) * groups * 16;
            bits += (linear.rows * row + scales) as u64;
        }
        (bits, weights)
    }
}

/// Average bits a weight of the linears takes, scales, outliers and channel orders included.
pub fn bits_per_weight(blocks: &[BlockPlan]) -> f64 {
    let (bits, weights) = blocks
        .iter()
        .flatten()
        .map(SitePlan::bits_and_weights)
        .fold((0, 0), |(bits, weights), (b, w)| (bits + b, weights + w));
    bits as f64 / weights.max(1) as f64
}

/// Refuses a plan that does not fit the network, naming the first difference.
pub fn check_plan(architecture: &Architecture, blocks: &[BlockPlan]) -> Result<()> {
    if blocks.len() != architecture.blocks {
        return Err(Error::input(format!(
            "the plan has {} blocks, the model {}",
            blocks.len(),
            architecture.blocks
        )));
    }
    for (index, block) in blocks.iter().enumerate() {
        let sites = architecture.sites(index);
        if block.len() != sites.len() {
            return Err(Error::input(format!(
                "the plan's block {index} has {} sites instead of {}",
                block.len(),
                sites.len()
            )));
        }
        for (plan, site) in block.iter().zip(&sites) {
            let planned = plan.linears.iter().map(|linear| (&linear.name, linear.rows));
            let expected = site.linears.iter().map(|linear| (&linear.name, linear.rows));
            if plan.name != site.name || plan.channels != site.channels || !planned.eq(expected) {
                return Err(Error::input(format!(
                    "the plan's site {} does not match the model's {}",
                    plan.name, site.name
                ))
                .hint("names, channels, rows and linears of a plan must stay as `atom plan` wrote them"));
            }
            plan.check()?;
        }
    }
    if blocks.iter().flatten().flat_map(|site| &site.linears).all(|linear| linear.bits == 16) {
        return Err(Error::input(
            "the plan leaves every linear at 16 bits: nothing would be quantized",
        ));
    }
    Ok(())
}

/// The plan of a whole network by `recipe`.
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
mod tests {
    use super::*;

    fn site(channels: usize) -> SiteSpec {
        SiteSpec {
            kind: crate::model::sites::SiteKind::MlpAct,
            name: "site".into(),
            expert: None,
            channels,
            linears: vec![LinearSpec {
                name: "down".into(),
                rows: 8,
                columns: channels,
                bias: false,
            }],
        }
    }

    fn recipe(group: Group, outliers: usize) -> Recipe {
        Recipe { group, outliers, rows_per_scale: 1, ..Recipe::paper() }
    }

    #[test]
    fn ragged_widths_are_padded_to_whole_groups() {
        let plan = &plan_block(&recipe(Group::Size(64), 64), &[site(172)]).unwrap()[0];
        assert_eq!((plan.groups(), plan.width()), (2, 192));
        let order = plan.order(&vec![1.0; 172]);
        assert_eq!(order.iter().filter(|&&channel| channel == -1).count(), 20);
        let row = &plan_block(&recipe(Group::Row, 0), &[site(172)]).unwrap()[0];
        assert_eq!((row.group_size, row.groups()), (176, 1));
    }

    #[test]
    fn impossible_groups_and_outliers_are_refused() {
        for (group, outliers, part) in [
            (Group::Size(256), 0, "group of 256"),
            (Group::Size(64), 172, "172 outlier"),
            (Group::Row, 500, "500 outlier"),
        ] {
            let error = plan_block(&recipe(group, outliers), &[site(172)]).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn every_format_fits_every_group() {
        for (format, act_bits) in [
            (Codebook::Int, 4),
            (Codebook::Fp4, 4),
            (Codebook::Fp4, 8),
            (Codebook::Fp4, 16),
            (Codebook::Fp4Bnb, 4),
            (Codebook::Fp4Bnb, 8),
        ] {
            for (group, width) in
                [(Group::Size(16), 181), (Group::Size(48), 197), (Group::Row, 181)]
            {
                let recipe = Recipe { format, act_bits, ..recipe(group, 5) };
                let site = &plan_block(&recipe, &[site(172)]).unwrap()[0];
                assert_eq!((site.width(), site.linears[0].codebook), (width, format));
                assert_eq!(site.codebook, if act_bits == 4 { format } else { Codebook::Int });
                site.format(site.order(&[1.0; 172])).check().unwrap();
                let linear = &site.linears[0];
                let specs =
                    crate::checkpoint::linear::specs("p", linear.rows, &site.weights(linear));
                let bytes: u64 = specs.iter().map(crate::checkpoint::TensorSpec::bytes).sum();
                assert_eq!(site.bits_and_weights().0, 8 * bytes + 32 * width as u64);
            }
        }
    }

    #[test]
    fn formats_that_do_not_go_together_are_refused() {
        let sound = |site: &SitePlan| site.check().map_err(|error| error.to_string());
        let recipe = Recipe { format: Codebook::Fp4Bnb, ..recipe(Group::Size(64), 0) };
        let plan = plan_block(&recipe, &[site(172)]).unwrap().remove(0);
        assert_eq!(sound(&plan), Ok(()));
        let mut eight = plan.clone();
        eight.linears[0].bits = 8;
        assert!(sound(&eight).unwrap_err().contains("no fp4-bnb codes of 8 bits"));
        let mut mixed = plan.clone();
        mixed.linears[0].codebook = Codebook::Int;
        assert!(sound(&mixed).unwrap_err().contains("feed weights of another format"));
        // A linear that is left alone takes any activations.
        mixed.linears[0].bits = 16;
        assert_eq!(sound(&mixed), Ok(()));
    }

    #[test]
    fn a_plan_without_formats_is_one_of_integers() {
        let plan = plan_block(&recipe(Group::Size(64), 0), &[site(172)]).unwrap();
        let mut json = serde_json::to_value(&plan).unwrap();
        for object in [0, 1] {
            let site = &mut json[0];
            let object = if object == 0 { site } else { &mut site["linears"][0] };
            assert_eq!(object.as_object_mut().unwrap().remove("format").unwrap(), "int");
        }
        assert_eq!(serde_json::from_value::<BlockPlan>(json).unwrap(), plan);
    }

    #[test]
    fn bits_count_scales_outliers_and_order() {
        let plan = plan_block(&recipe(Group::Size(64), 64), &[site(192)]).unwrap();
        // A row: 128 codes of 4 bits, 2 scales, 64 INT8 outliers with a scale; the order once.
        let bits = 8 * (128 * 4 + 2 * 16 + 64 * 8 + 16) + 192 * 32;
        assert_eq!(bits_per_weight(&[plan]), f64::from(bits) / f64::from(8 * 192));
    }
}
