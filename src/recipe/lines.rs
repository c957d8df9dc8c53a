/*! A recipe in a few words. */

use super::{Group, Order, Outliers, Recipe};
use crate::quant::codebook::Codebook;
use crate::quant::number::OutlierFormat;
use crate::quant::scale::ScaleGrid;
use crate::quant::site::Transform;

/// Weights, channels, activations and KV cache, a line each.
pub fn lines(recipe: &Recipe) -> String {
    [weights(recipe), channels(recipe), activations(recipe), cache(recipe)].join("\n")
}

fn weights(recipe: &Recipe) -> String {
    let group = match recipe.group {
        Group::Row => "one group a row".to_owned(),
        Group::Auto => "groups of 128 (narrow sites 64 or 32)".to_owned(),
        Group::Size(size) => format!("groups of {size}"),
    };
    let rounding = if recipe.gptq {
        let turn = match (recipe.sequential, recipe.correction) {
            (false, _) => String::new(),
            (true, 0.0) => ", sites in turn".to_owned(),
            (true, share) => format!(", sites in turn, correction {share}"),
        };
        format!("GPTQ (damping {}{turn})", recipe.damping)
    } else {
        "rounded to nearest".to_owned()
    };
    let shared = if recipe.rows_per_scale == 1 { "" } else { ", rows share scales by two" };
    let format = number_format(recipe.format, recipe.bits);
    let searched = if recipe.search_scales { " searched for" } else { "" };
    let scales = match scales(recipe) {
        Some(scales) => format!(", {scales}{searched}"),
        None if recipe.search_scales => ", scales searched for".to_owned(),
        None => String::new(),
    };
    format!("weights {format}, {group}, clip {}{scales}{shared}, {rounding}", recipe.clip_weight)
}

fn channels(recipe: &Recipe) -> String {
    let order = match recipe.order {
        Order::Energy => "channels ordered by energy",
        Order::None => "channels in the source's order",
    };
    let number = match recipe.outliers {
        Outliers::Count(0) => return format!("{order}, no outliers"),
        Outliers::Count(number) => number.to_string(),
        Outliers::Auto => "a 32nd of them (at most 128) as".to_owned(),
    };
    let format = match recipe.outlier_format {
        OutlierFormat::Int8 => "int8",
        OutlierFormat::Fp8 => "fp8",
        OutlierFormat::F16 => "f16",
    };
    format!("{order}, {number} outliers in {format}")
}

fn activations(recipe: &Recipe) -> String {
    // The transform of a group is applied to activations and weights alike, whatever their bits.
    let transform = match recipe.transform {
        Transform::None => "",
        Transform::Hadamard => ", Hadamard in each group",
    };
    match recipe.act_bits {
        16 => format!("activations in floating point{transform}"),
        bits => {
            let format = number_format(recipe.act_format(), bits);
            let scales = scales(recipe).map(|scales| format!(", {scales}")).unwrap_or_default();
            format!("activations {format}, clip {}{scales}{transform}", recipe.clip_act)
        }
    }
}

/// What is special of the scales: `signed bf16 scales`; none of unsigned f16.
fn scales(recipe: &Recipe) -> Option<String> {
    let grid = match recipe.scales {
        ScaleGrid::F16 => None,
        grid => Some(grid.name()),
    };
    let signed = recipe.signed_scales.then_some("signed");
    let words: Vec<&str> = signed.into_iter().chain(grid).collect();
    (!words.is_empty()).then(|| format!("{} scales", words.join(" ")))
}

/// `int4`, `fp4`, `fp4-bnb`.
fn number_format(codebook: Codebook, bits: u8) -> String {
    match codebook {
        Codebook::Int => format!("int{bits}"),
        other => other.name().to_owned(),
    }
}

fn cache(recipe: &Recipe) -> String {
    if recipe.kv_bits == 16 {
        return "KV cache in floating point".to_owned();
    }
    let place = if recipe.kv_after_rope { "after RoPE" } else { "before RoPE" };
    let rotated = if recipe.rotate_kv { ", heads rotated" } else { "" };
    let centered = if recipe.center_keys { ", keys centred" } else { "" };
    format!("KV cache int{}, {place}{rotated}{centered}, clip {}", recipe.kv_bits, recipe.clip_kv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_built_in_recipes_read_well() {
        assert_eq!(
            lines(&Recipe::paper()),
            "weights int4, groups of 128, clip 0.85, rows share scales by two, GPTQ (damping 0.01)\n\
             channels ordered by energy, 128 outliers in int8\n\
             activations int4, clip 0.9\n\
             KV cache int4, before RoPE, clip 1"
        );
        assert_eq!(
            lines(&Recipe::default_recipe()),
            "weights int4, groups of 128 (narrow sites 64 or 32), clip 0.95, signed scales, \
             GPTQ (damping 0.01, sites in turn, correction 0.5)\n\
             channels ordered by energy, a 32nd of them (at most 128) as outliers in int8\n\
             activations int4, clip 0.95, signed scales, Hadamard in each group\n\
             KV cache int4, after RoPE, heads rotated, keys centred, clip 1"
        );
    }

    #[test]
    fn scales_of_engines_are_named() {
        let text = lines(&Recipe::w4a16());
        assert!(text.starts_with(
            "weights int4, groups of 128, clip 1, signed bf16 scales searched for, GPTQ"
        ));
        let text = lines(&Recipe::mxfp4());
        assert!(text.contains("activations fp4, clip 1, power-of-two scales\n"), "{text}");
    }

    #[test]
    fn what_is_switched_off_is_said() {
        let recipe = Recipe {
            bits: 3,
            act_bits: 16,
            kv_bits: 16,
            group: Group::Row,
            outliers: Outliers::Count(0),
            order: Order::None,
            gptq: false,
            ..Recipe::paper()
        };
        assert_eq!(
            lines(&recipe),
            "weights int3, one group a row, clip 0.85, rows share scales by two, rounded to nearest\n\
             channels in the source's order, no outliers\n\
             activations in floating point\n\
             KV cache in floating point"
        );
    }
}
