/*! What becomes of every site and linear of a network: the part of a plan that is stored in a checkpoint, which is loaded by it. */

use serde::{Deserialize, Serialize};

use super::TensorSpec;
use super::linear::{order_spec, specs};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::ranges::{
    BITS, CLIP, E4M3_EXPONENTS, GROUP_SIZE, ROWS_PER_SCALE, SEARCHED_GROUP,
};
use crate::quant::scale::ScaleGrid;
use crate::quant::site::{SiteFormat, Transform};
use crate::recipe::{Order, Recipe};
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
    /// Whether of several scales of a group the one is taken that costs the least.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub search_scales: bool,
    /// Relative output error, once it is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

impl LinearPlan {
    /// How its scales are chosen.
    pub fn scaling(&self) -> Scaling {
        Scaling { clip: self.clip, search: self.search_scales }
    }

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
    /// The numbers that scales are rounded to, in activations and weights.
    #[serde(default, skip_serializing_if = "is_f16")]
    pub scales: ScaleGrid,
    /// The exponent of the power of two that scales of E4M3 have as a factor, in the activation; chosen when
    /// linears are quantized where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act_exponent: Option<i8>,
    /// The same of the weights of all its linears, which engines fuse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_exponent: Option<i8>,
    /// Transform of each group.
    pub transform: Transform,
    /// The linears it feeds, in the model's order.
    pub linears: Vec<LinearPlan>,
}

fn is_f16(scales: &ScaleGrid) -> bool {
    *scales == ScaleGrid::F16
}

/// The sites of one block.
pub type BlockPlan = Vec<SitePlan>;

impl SitePlan {
    /// Refuses settings that may not be chosen or do not go together.
    ///
    /// # Errors
    /// Input: the site or linear, what is wrong, and what may be chosen.
    pub fn check(&self) -> Result<()> {
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
        let searched = self.linears.iter().find(|linear| linear.search_scales);
        if let Some(linear) = searched.filter(|_| *group_size > SEARCHED_GROUP) {
            return Err(Error::input(format!(
                "{}: scales of groups of {group_size} channels are not searched",
                linear.name
            ))
            .hint(format!("choose --group {SEARCHED_GROUP} or less with search_scales = true")));
        }
        self.scales.check(self.signed_scales).map_err(|error| error.context(name))?;
        for (setting, exponent) in
            [("act_exponent", self.act_exponent), ("weight_exponent", self.weight_exponent)]
        {
            if let Some(exponent) = exponent {
                E4M3_EXPONENTS.check(format_args!("{name}: {setting}"), exponent)?;
            }
        }
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

    /// Refuses a site whose scales cannot be read for want of an exponent.
    ///
    /// # Errors
    /// Input, naming the site and the field.
    pub fn check_complete(&self) -> Result<()> {
        if self.scales != ScaleGrid::E4m3 {
            return Ok(());
        }
        let missing = match (self.act_exponent, self.weight_exponent) {
            (None, _) if self.bits < 16 => "act_exponent",
            (_, None) if self.linears.iter().any(|linear| linear.bits < 16) => "weight_exponent",
            _ => return Ok(()),
        };
        Err(Error::input(format!("{}: its scales are E4M3, but `{missing}` is missing", self.name)))
    }

    /// The site with another outlier count; none if so many would be most of its channels.
    pub fn with_outliers(&self, outliers: usize, recipe: &Recipe) -> Option<Self> {
        if outliers == self.outlier_channels {
            return Some(self.clone());
        }
        let group_size = recipe.group_size(self.channels, outliers);
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
        let scale = self.scale(self.act_exponent);
        let numbers = NumberFormat { bits, codebook, group_size, scale };
        RowFormat { numbers, groups: self.groups(), outlier_channels, outlier_format }
    }

    /// The channel order for channels of the given calibrated energies.
    pub fn order(&self, energy: &[f64]) -> Vec<i32> {
        channel_order(energy, self.order == Order::Energy, self.outlier_channels, self.group_size)
    }

    /// How the weights of one of its linears are held.
    pub fn weights(&self, linear: &LinearPlan) -> LinearFormat {
        let mut format = self.row().weights(linear.bits, linear.codebook, linear.rows_per_scale);
        format.row.numbers.scale = self.scale(self.weight_exponent);
        format
    }

    fn scale(&self, exponent: Option<i8>) -> ScaleFormat {
        ScaleFormat {
            grid: self.scales,
            exponent: exponent.unwrap_or(0),
            signed: self.signed_scales,
        }
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
            let scale_bits = if self.scales.is_stored_as_byte() { 8 } else { 16 };
            let scales = linear.rows.div_ceil(linear.rows_per_scale) * groups * scale_bits;
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
