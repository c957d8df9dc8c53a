/*! Recipe flags: each changes one key of the recipe that `--recipe` names. */

use std::path::Path;

use clap::{Args, ValueEnum};
use toml::{Table, Value};

use super::values;
use crate::recipe::Recipe;
use crate::{Error, Kind, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Recipe")]
pub(crate) struct RecipeFlags {
    /// Settings to start from: default, paper, one of an engine (w4a16, q4_0, nvfp4, mxfp4), or a TOML
    /// file; the flags below change single ones
    #[arg(long, value_name = "RECIPE", default_value = "default")]
    recipe: String,
    /// Bits of a weight [default recipe: 4]
    #[arg(long, value_name = "2|3|4|8")]
    bits: Option<u8>,
    /// Bits of an activation; 16 leaves activations as they are [default recipe: 4]
    #[arg(long, value_name = "2|3|4|8|16")]
    act_bits: Option<u8>,
    /// Bits of a cached key or value; 16 leaves the cache as it is [default recipe: 4]
    #[arg(long, value_name = "2|3|4|8|16")]
    kv_bits: Option<u8>,
    /// Kind of number that 4-bit codes of weights and activations are [default recipe: int]
    #[arg(long, value_name = "int|fp4|fp4-bnb", hide_possible_values = true)]
    format: Option<Format>,
    /// Channels that share a scale, a multiple of 16; `row` for all; `auto` for 128, in narrow sites 64 or 32, so that there are four groups [default recipe: auto]
    #[arg(long, value_name = "N|row|auto", value_parser = values::group)]
    group: Option<Value>,
    /// How many channels of an activation are outliers, held in higher precision; `auto` for a 32nd of them, rounded up to a multiple of 16, at most 128 [default recipe: auto]
    #[arg(long, value_name = "N|auto", value_parser = values::recipe_outliers)]
    outliers: Option<Value>,
    /// How outlier channels are held [default recipe: int8]
    #[arg(long, value_name = "int8|fp8|fp16", hide_possible_values = true)]
    outlier_format: Option<OutlierFormat>,
    /// Clip ratio of activation groups: their scale covers this share of the largest magnitude, above 0
    /// and at most 1 [default recipe: 0.95]
    #[arg(long, value_name = "RATIO")]
    clip_act: Option<f64>,
    /// Clip ratio of weight groups, likewise [default recipe: 0.95]
    #[arg(long, value_name = "RATIO")]
    clip_weight: Option<f64>,
    /// Clip ratio of keys and values, likewise [default recipe: 1]
    #[arg(long, value_name = "RATIO")]
    clip_kv: Option<f64>,
    /// Round weights to nearest instead of choosing them by GPTQ
    #[arg(long)]
    no_gptq: bool,
    /// Keep channels in the order the source has them
    #[arg(long)]
    no_order: bool,
    /// GPTQ damping, as a share of the Hessian's mean diagonal [default recipe: 0.01]
    #[arg(long, value_name = "SHARE")]
    damping: Option<f64>,
    /// Transform of each group before it is quantized [default recipe: hadamard]
    #[arg(long, value_name = "none|hadamard", hide_possible_values = true)]
    transform: Option<Transform>,
    /// Adjacent output rows that share a weight scale [default recipe: 1]
    #[arg(long, value_name = "1|2")]
    rows_per_scale: Option<u8>,
    /// Any key of a recipe file, e.g. `correction=0.25`; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::assignment)]
    set: Vec<(String, Value)>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Int,
    Fp4,
    Fp4Bnb,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutlierFormat {
    Int8,
    Fp8,
    #[value(alias = "f16")]
    Fp16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Transform {
    None,
    Hadamard,
}

impl RecipeFlags {
    /// The recipe's file, if `--recipe` names one.
    pub(crate) fn file(&self) -> Option<&Path> {
        Some(Path::new(&self.recipe)).filter(|path| path.is_file())
    }

    /// The recipe all flags add up to.
    ///
    /// # Errors
    /// Kind `Input` where the recipe file is at fault, `Usage` where a flag is.
    pub(crate) fn resolve(&self) -> Result<Recipe> {
        let changes = self.changes();
        Recipe::resolve(&self.recipe, &changes).map_err(|error| self.blame(error, &changes))
    }

    /// Whether any of the flags was given.
    pub(crate) fn given(&self) -> bool {
        self.recipe != "default" || !self.changes().is_empty()
    }

    /// A recipe that is sound without the flags was broken by a flag, and a name that is no file's
    /// is a slip on the command line: both are wrong usage, while a bad file is bad input.
    fn blame(&self, error: Error, changes: &Table) -> Error {
        let named_file = self.recipe.ends_with(".toml");
        let sound = !changes.is_empty() && Recipe::resolve(&self.recipe, &Table::new()).is_ok();
        if error.kind() != Kind::Input || (named_file && !sound) {
            return error;
        }
        let usage = Error::usage(error.to_string());
        match error.hint_text() {
            Some(hint) => usage.hint(hint),
            None => usage.hint("`atom quantize --help` lists what each recipe flag takes"),
        }
    }

    /// The recipe keys that flags change.
    fn changes(&self) -> Table {
        let whole = |number: Option<u8>| number.map(|number| Value::Integer(number.into()));
        let word = |word: &str| Value::String(word.to_owned());
        let keys = [
            ("bits", whole(self.bits)),
            ("act_bits", whole(self.act_bits)),
            ("kv_bits", whole(self.kv_bits)),
            (
                "format",
                self.format.map(|format| match format {
                    Format::Int => word("int"),
                    Format::Fp4 => word("fp4"),
                    Format::Fp4Bnb => word("fp4-bnb"),
                }),
            ),
            ("group", self.group.clone()),
            ("outliers", self.outliers.clone()),
            (
                "outlier_format",
                self.outlier_format.map(|format| match format {
                    OutlierFormat::Int8 => word("int8"),
                    OutlierFormat::Fp8 => word("fp8"),
                    OutlierFormat::Fp16 => word("f16"),
                }),
            ),
            ("order", self.no_order.then(|| word("none"))),
            ("clip_act", self.clip_act.map(Value::Float)),
            ("clip_weight", self.clip_weight.map(Value::Float)),
            ("clip_kv", self.clip_kv.map(Value::Float)),
            ("rows_per_scale", whole(self.rows_per_scale)),
            (
                "transform",
                self.transform.map(|transform| match transform {
                    Transform::None => word("none"),
                    Transform::Hadamard => word("hadamard"),
                }),
            ),
            ("gptq", self.no_gptq.then_some(Value::Boolean(false))),
            ("damping", self.damping.map(Value::Float)),
        ];
        let flags = keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        flags.chain(self.set.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::quant::codebook::Codebook;
    use crate::quant::{number, site};
    use crate::recipe::{Group, Order, Outliers};

    #[derive(Parser)]
    #[command(args_override_self = true)]
    struct Line {
        #[command(flatten)]
        recipe: RecipeFlags,
    }

    fn resolve(line: &str) -> Result<Recipe> {
        let words = std::iter::once("atom").chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap().recipe.resolve()
    }

    #[test]
    fn every_flag_reaches_its_key() {
        let recipe = resolve(
            "--recipe paper --bits 3 --act-bits 8 --kv-bits 16 --group row --outliers 64 \
             --outlier-format fp16 --clip-act 0.7 --clip-weight 0.6 --clip-kv 0.5 --no-gptq \
             --no-order --damping 0.02 --transform hadamard --rows-per-scale 1 \
             --set signed_scales=true --set kv_after_rope=true",
        )
        .unwrap();
        let expected = Recipe {
            bits: 3,
            act_bits: 8,
            kv_bits: 16,
            group: Group::Row,
            outliers: Outliers::Count(64),
            outlier_format: number::OutlierFormat::F16,
            order: Order::None,
            clip_act: 0.7,
            clip_weight: 0.6,
            clip_kv: 0.5,
            rows_per_scale: 1,
            transform: site::Transform::Hadamard,
            gptq: false,
            damping: 0.02,
            signed_scales: true,
            kv_after_rope: true,
            ..Recipe::paper()
        };
        assert_eq!(recipe, expected);
    }

    #[test]
    fn each_format_has_its_flag() {
        for (name, codebook) in
            [("int", Codebook::Int), ("fp4", Codebook::Fp4), ("fp4-bnb", Codebook::Fp4Bnb)]
        {
            assert_eq!(resolve(&format!("--format {name}")).unwrap().format, codebook);
            assert_eq!(codebook.name(), name);
        }
        let fp8 = resolve("--outlier-format fp8").unwrap().outlier_format;
        assert_eq!(fp8, number::OutlierFormat::Fp8);
    }

    #[test]
    fn outliers_are_a_number_or_auto() {
        let outliers = |line: &str| resolve(line).unwrap().outliers;
        assert_eq!(outliers("--recipe paper --outliers auto"), Outliers::Auto);
        assert_eq!(outliers("--outliers 0"), Outliers::Count(0));
        for wrong in ["-1", "many", "1.5"] {
            assert!(Line::try_parse_from(["atom", "--outliers", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn without_flags_the_recipe_is_the_default_and_the_last_of_a_flag_wins() {
        assert_eq!(resolve("").unwrap(), Recipe::default_recipe());
        assert_eq!(resolve("--group 64 --group 32").unwrap().group, Group::Size(32));
    }

    #[test]
    fn the_flags_of_a_recipe_resolve_to_it() {
        for (line, flags) in [
            ("", ""),
            ("--recipe w4a16", "--recipe w4a16"),
            (
                "--recipe paper --group 64 --no-gptq",
                "--recipe paper --set gptq=false --set group=64",
            ),
            ("--group row --clip-act 0.8", "--set clip_act=0.8 --set group=row"),
        ] {
            let recipe = resolve(line).unwrap();
            assert_eq!(recipe.flags().join(" "), flags);
            assert_eq!(resolve(flags).unwrap(), recipe);
        }
    }

    #[test]
    fn a_bad_flag_is_wrong_usage_and_a_bad_file_bad_input() {
        for line in ["--bits 5", "--group 0", "--group 24", "--clip-act 1.5", "--recipe papr"] {
            assert_eq!(resolve(line).unwrap_err().kind(), Kind::Usage, "{line}");
        }
        assert_eq!(resolve("--format fp4 --bits 8").unwrap_err().kind(), Kind::Usage);
        for line in ["--recipe absent.toml", "--recipe absent.toml --bits 5"] {
            assert_eq!(resolve(line).unwrap_err().kind(), Kind::Input, "{line}");
        }
    }
}
