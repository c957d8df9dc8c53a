/*! A recipe: every setting that decides what a quantized checkpoint holds.

A TOML file or flags change single keys of a built-in recipe, so a recipe is resolved as tables and read back
strictly: an unknown key is an error, never ignored. */

mod built_in;
mod flags;
mod group;
mod lines;
mod outliers;

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;
use crate::quant::number::OutlierFormat;
use crate::quant::ranges::{BITS, CLIP, CORRECTION, COUNT, DAMPING, ROWS_PER_SCALE};
use crate::quant::scale::ScaleGrid;
use crate::quant::site::Transform;
use crate::{Error, Result};

use built_in::{built_in, built_in_names};
pub use group::Group;
use group::WIDEST_GROUP;
pub use lines::lines;
pub use outliers::Outliers;

/// The order of a site's channels before they are divided into groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Ascending calibrated energy, outlier channels last (Atom, section 4.1).
    Energy,
    /// As in the source; outlier channels, if any, are the source's last ones.
    None,
}

/// All settings of a quantization, in the order in which they are printed and stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Bits of a weight code: 2, 3, 4, 8, or 16 for unquantized linears.
    pub bits: u8,
    /// Bits of an activation code: 2, 3, 4, 8, or 16 for floating point.
    pub act_bits: u8,
    /// Bits of a cached key or value: 2, 3, 4, 8, or 16 for floating point.
    pub kv_bits: u8,
    /// The codebook of 4-bit weights and activations. Activations of 8 bits and the KV cache are integers
    /// with any of them.
    #[serde(default)]
    pub format: Codebook,
    /// Channels that share a scale.
    pub group: Group,
    /// Pad a site whose channels are no multiple of the group; otherwise its group is halved until they are, since
    /// engines know no padding.
    #[serde(default = "yes")]
    pub pad_groups: bool,
    /// Outlier channels of each site.
    pub outliers: Outliers,
    /// How outlier channels are held, in weights and activations.
    pub outlier_format: OutlierFormat,
    /// Channel order of the sites.
    pub order: Order,
    /// Clip ratio of activation groups.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip_act: f32,
    /// Clip ratio of weight groups.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip_weight: f32,
    /// Give scales a sign, so that the peak of each group falls on the least code (-8 of INT4).
    pub signed_scales: bool,
    /// The numbers that scales are rounded to.
    #[serde(default)]
    pub scales: ScaleGrid,
    /// Of several scales of a group of weights, take the one that costs the least; groups of at most 128 channels.
    #[serde(default)]
    pub search_scales: bool,
    /// Clip ratio of keys and values.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub clip_kv: f32,
    /// Adjacent output rows that share a weight scale: 1 or 2.
    pub rows_per_scale: usize,
    /// Transform of each group, in activations and weights.
    pub transform: Transform,
    /// Rotate K and V heads by a Hadamard transform before they are quantized.
    pub rotate_kv: bool,
    /// Quantize K after RoPE instead of before.
    pub kv_after_rope: bool,
    /// Subtract each head's mean key after the rotary embedding, before quantization.
    pub center_keys: bool,
    /// Choose weight codes by GPTQ instead of rounding to nearest.
    pub gptq: bool,
    /// GPTQ: quantize a block's sites sequentially, each on the output of the quantized sites before it, instead of
    /// simultaneously.
    pub sequential: bool,
    /// GPTQ, sequential: the share of the accumulated error in a linear's input and in the hidden states that its
    /// weights compensate, 0 to 1.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub correction: f32,
    /// GPTQ: share of the Hessian's mean diagonal that is added to the diagonal.
    #[serde(serialize_with = "crate::decimal::serialize")]
    pub damping: f32,
    /// GPTQ: calibration tokens that an expert's down projection needs; with fewer it is rounded to nearest.
    #[serde(default = "expert_tokens")]
    pub expert_tokens: usize,
}

/// Where a recipe was stored before groups could be left unpadded.
fn yes() -> bool {
    true
}

/// Where a recipe was stored before networks with experts were known.
fn expert_tokens() -> usize {
    256
}

impl Recipe {
    /// The recipe named `name`, or read from the TOML file of that path (its keys change `default`,
    /// or the recipe its key `base` names), with `overrides` applied last.
    pub fn resolve(name: &str, overrides: &Table) -> Result<Self> {
        let recipe = match built_in(name) {
            Some(recipe) => recipe,
            None if name.ends_with(".toml") => Self::from_file(name)?,
            None => {
                return Err(Error::input(format!("there is no recipe named `{name}`")).hint(
                    format!("built in are {}; a recipe file ends in .toml", built_in_names()),
                ));
            }
        };
        recipe.with(overrides, "on the command line")?.check()
    }

    fn from_file(path: &str) -> Result<Self> {
        let text = fs_err::read_to_string(path).map_err(|error| {
            Error::from(error).hint(format!(
                "give --recipe a TOML file that can be read, or {}",
                built_in_names()
            ))
        })?;
        let mut table: Table = text
            .parse()
            .map_err(|error| Error::input(format!("recipe {path} is not TOML: {error}")))?;
        let base = match table.remove("base") {
            None => Self::default_recipe(),
            Some(base) => base.as_str().and_then(built_in).ok_or_else(|| {
                Error::input(format!("recipe {path} has the unknown base {base}"))
                    .hint(format!("base is the name of a built-in recipe: {}", built_in_names()))
            })?,
        };
        base.with(&table, &format!("in {path}"))
    }

    /// This recipe with the keys of `changes` in place of its own.
    fn with(&self, changes: &Table, place: &str) -> Result<Self> {
        let mut table = self.to_table();
        for (key, value) in changes {
            if !table.contains_key(key) {
                let known: Vec<&str> = table.keys().map(String::as_str).collect();
                return Err(Error::input(format!("unknown recipe key `{key}` {place}"))
                    .hint(format!("the keys are {}", known.join(", "))));
            }
            // An integer is accepted as a ratio: `clip_act = 1`.
            let value = match (&table[key], value) {
                (toml::Value::Float(_), toml::Value::Integer(integer)) => {
                    toml::Value::Float(*integer as f64)
                }
                _ => value.clone(),
            };
            table.insert(key.clone(), value);
            // Read back after every key, so that an error names the key it comes from.
            Self::deserialize(table.clone()).map_err(|error| {
                Error::input(format!("recipe key `{key}` {place}: {}", error.message()))
            })?;
        }
        Self::deserialize(table).map_err(|error| Error::input(error.message().to_owned()))
    }

    fn to_table(&self) -> Table {
        Table::try_from(self).expect("a recipe has only TOML types")
    }

    /// The recipe as a TOML file that resolves to itself.
    pub fn to_toml(&self) -> String {
        self.to_table().to_string()
    }

    /// The recipe itself, if every setting is valid.
    pub fn check(self) -> Result<Self> {
        BITS.check("bits", self.bits)?;
        BITS.check("act_bits", self.act_bits)?;
        BITS.check("kv_bits", self.kv_bits)?;
        CLIP.check("clip_act", self.clip_act)?;
        CLIP.check("clip_weight", self.clip_weight)?;
        CLIP.check("clip_kv", self.clip_kv)?;
        ROWS_PER_SCALE.check("rows_per_scale", self.rows_per_scale)?;
        DAMPING.check("damping", self.damping)?;
        COUNT.check("expert_tokens", self.expert_tokens)?;
        if let Group::Size(size) = self.group {
            COUNT.check("group", size)?;
        }
        if let Outliers::Count(count) = self.outliers {
            COUNT.check("outliers", count)?;
        }
        CORRECTION.check("correction", self.correction)?;
        if self.center_keys && !self.kv_after_rope {
            return Err(Error::input("center_keys needs kv_after_rope").hint(
                "a mean key leaves the scores as they are after the rotary embedding only: set center_keys = false, or kv_after_rope = true",
            ));
        }
        if self.correction > 0.0 && !self.sequential {
            return Err(Error::input("correction needs sequential")
                .hint("only sites that are quantized sequentially can be corrected: set correction = 0, or sequential = true"));
        }
        self.scales.check(self.signed_scales)?;
        let format = self.format.name();
        if self.bits < 16 && !self.format.has_bits(self.bits) {
            return Err(Error::input(format!(
                "bits is {}; weights of the format {format} have 4",
                self.bits
            ))
            .hint(format!("choose --bits 4 with --format {format}, or --format int")));
        }
        if self.act_bits < 8 && !self.format.has_bits(self.act_bits) {
            return Err(Error::input(format!(
                "act_bits is {}; activations of the format {format} have 4",
                self.act_bits
            ))
            .hint(format!(
                "with --format {format} choose --act-bits 4, 8 (integers) or 16 (floating point)"
            )));
        }
        if self.bits == 16 {
            return Err(Error::input("bits is 16: nothing would be quantized")
                .hint("choose --bits 2, 3, 4 or 8; activations and KV cache may stay at 16"));
        }
        Ok(self)
    }

    /// The codebook of activations.
    pub fn act_format(&self) -> Codebook {
        if self.act_bits == 4 { self.format } else { Codebook::Int }
    }

    /// Channels that share a scale in a site of `channels`, of which so many are outliers.
    pub fn group_size(&self, channels: usize, outliers: usize) -> usize {
        self.group.of(channels.saturating_sub(outliers), self.pad_groups)
    }

    /// How keys and values are held.
    pub fn kv(&self) -> KvFormat {
        KvFormat {
            bits: self.kv_bits,
            clip: self.clip_kv,
            rotate: self.rotate_kv,
            after_rope: self.kv_after_rope,
            center: self.center_keys,
        }
    }

    /// Short name for output directories: `w4a4-g128`, `w4a4-fp4-g128`; automatic groups by those of wide sites.
    pub fn tag(&self) -> String {
        let group = match self.group {
            Group::Row => "row".to_owned(),
            Group::Auto => format!("g{WIDEST_GROUP}"),
            Group::Size(size) => format!("g{size}"),
        };
        let format = match self.format {
            Codebook::Int => String::new(),
            other => format!("-{}", other.name()),
        };
        let scales = match self.scales {
            ScaleGrid::F16 | ScaleGrid::Bf16 => String::new(),
            other => format!("-{}", other.name()),
        };
        format!("w{}a{}{format}{scales}-{group}", self.bits, self.act_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overrides(text: &str) -> Table {
        text.parse().unwrap()
    }

    #[test]
    fn a_recipe_written_as_toml_resolves_to_itself() {
        for name in built_in::NAMES {
            let recipe = Recipe::resolve(name, &Table::new()).unwrap();
            let again = recipe.with(&overrides(&recipe.to_toml()), "test").unwrap();
            assert_eq!(recipe, again);
        }
    }

    #[test]
    fn overrides_change_single_keys() {
        let recipe =
            Recipe::resolve("paper", &overrides("group = 64\noutliers = 64\nclip_act = 1"))
                .unwrap();
        assert_eq!(
            recipe,
            Recipe {
                group: Group::Size(64),
                outliers: Outliers::Count(64),
                clip_act: 1.0,
                ..Recipe::paper()
            }
        );
        let row = Recipe::resolve("paper", &overrides("group = \"row\"")).unwrap();
        assert_eq!(row.group, Group::Row);
    }

    #[test]
    fn fp4_goes_with_activations_of_4_8_and_16_bits() {
        for (act_bits, act_format, tag) in [
            (4, Codebook::Fp4, "w4a4-fp4-g64"),
            (8, Codebook::Int, "w4a8-fp4-g64"),
            (16, Codebook::Int, "w4a16-fp4-g64"),
        ] {
            let text = format!("format = \"fp4\"\nact_bits = {act_bits}\ngroup = 64");
            let recipe = Recipe::resolve("default", &overrides(&text)).unwrap();
            assert_eq!((recipe.act_format(), recipe.tag().as_str()), (act_format, tag));
        }
    }

    #[test]
    fn bad_settings_are_refused() {
        for (text, part) in [
            ("grup = 64", "unknown recipe key `grup`"),
            ("group = 0", "multiple of 16"),
            ("group = 24", "multiple of 16"),
            ("bits = 5", "bits is 5"),
            ("bits = 16", "nothing would be quantized"),
            ("clip_act = 1.5", "clip_act is 1.5"),
            ("gptq = 3", "gptq"),
            ("outliers = -1", "outliers must be a number of channels or \"auto\", not -1"),
            ("outliers = \"many\"", "or \"auto\", not \"many\""),
            ("format = \"fp5\"", "recipe key `format`"),
            ("format = \"fp4\"\nbits = 3", "bits is 3; weights of the format fp4 have 4"),
            (
                "format = \"fp4-bnb\"\nact_bits = 3",
                "act_bits is 3; activations of the format fp4-bnb",
            ),
            ("rows_per_scale = 3", "rows_per_scale is 3"),
            ("correction = 2", "correction is 2"),
            ("expert_tokens = 9000000000000000000", "expert_tokens is 9000000000000000000"),
            ("group = 9000000000000000000", "group is 9000000000000000000"),
            ("sequential = false", "correction needs sequential"),
            ("kv_after_rope = false", "center_keys needs kv_after_rope"),
        ] {
            let error = Recipe::resolve("default", &overrides(text)).unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert_eq!(error.kind(), crate::Kind::Input);
        }
    }
}
