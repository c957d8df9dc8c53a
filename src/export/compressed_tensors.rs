/*! compressed-tensors: what vLLM, SGLang and transformers load.

Integers are `pack-quantized`, FP4 with scales of E4M3 in groups of 16 `nvfp4-pack-quantized`, and FP4 with powers of two in
groups of 32 `mxfp4-pack-quantized`. Names, types and shapes are those of compressed-tensors 0.17; docs/exports.md has
them with a reader. */

use serde_json::{Map, Value, json};

use super::config::config;
use super::exact;
use super::format::{Container, Contents, Format, LOAD, Part, Published};
use super::model::{ExportedModel, Piece, Subject};
use super::obstacle::{Obstacle, Obstacles};
use super::schemes::{Scheme, Schemes, is_expert};
use crate::Result;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{Dtype, TensorBytes, TensorSpec};
use crate::quant::codebook::Codebook;
use crate::quant::scale::ScaleGrid;

/// compressed-tensors.
pub(super) struct CompressedTensors;

impl Format for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn loaded_by(&self) -> &'static str {
        "vLLM, SGLang and transformers"
    }

    fn recipes(&self) -> &'static [&'static str] {
        &["w4a16", "nvfp4", "mxfp4"]
    }

    fn obstacles(&self, subject: &Subject<'_>) -> Vec<Obstacle> {
        let mut obstacles = Obstacles::default();
        exact::check_sites(subject, &mut obstacles);
        let first = subject.quantized().next().map(|(_, linear)| linear);
        let expert = subject.quantized().map(|(_, linear)| linear).find(|linear| is_expert(linear));
        for (site, linear) in subject.quantized() {
            let alike = first.is_none_or(|first| first.codebook == linear.codebook);
            let needed = "the same in all linears";
            obstacles.check(alike, "format", &linear.name, linear.codebook.name(), needed);
            if let Some(expert) = expert.filter(|_| is_expert(linear)) {
                let needed = format_args!("{}, as all experts'", expert.bits);
                let alike = linear.bits == expert.bits;
                obstacles.check(alike, "bits", &linear.name, linear.bits, needed);
            }
            match linear.codebook {
                Codebook::Int => {
                    let packed = [2, 4, 8].contains(&linear.bits);
                    obstacles.check(packed, "bits", &linear.name, linear.bits, "2, 4 or 8");
                    obstacles.check(site.bits == 16, "act_bits", &site.name, site.bits, "16");
                }
                Codebook::Fp4 => check_fp4(site, &mut obstacles),
                Codebook::Fp4Bnb => {
                    obstacles.check(false, "format", &linear.name, "fp4-bnb", "int or fp4");
                }
            }
        }
        if first.is_some_and(|linear| linear.codebook == Codebook::Int) {
            exact::check_scale_type(subject, &mut obstacles);
        }
        obstacles.into_vec()
    }

    fn notes(&self, subject: &Subject<'_>) -> Vec<String> {
        let mut notes = exact::notes(subject);
        let unlike = |site: &&SitePlan| {
            site.linears.iter().any(|linear| linear.bits != site.linears[0].bits)
        };
        if let Some(site) = subject.sites().find(unlike) {
            notes.push(format!(
                "the linears of {} have different widths: transformers loads them, but vLLM and SGLang fuse them and do not",
                site.name
            ));
        }
        let format = Schemes::of(subject).format();
        if format.is_some_and(|format| format != "pack-quantized") && subject.dtype != Dtype::BF16 {
            notes.push(format!(
                "transformers makes BF16 of FP4, and this model is {}: load it there with dtype=\"bfloat16\", or export with --dtype bf16",
                subject.dtype
            ));
        }
        if format == Some("nvfp4-pack-quantized") && subject.architecture.experts.is_some() {
            notes.push(
                "transformers 5.17 reads no global scales of experts: load this with vLLM".into(),
            );
        } else if subject.architecture.experts.is_some()
            && subject.sites().any(|site| site.bits < 16)
        {
            notes.push("transformers 5.17 does not quantize the activations of experts".into());
        }
        notes
    }

    fn published(&self) -> Published {
        Published {
            library: "transformers",
            tags: &["compressed-tensors", "vllm"],
            usage: &[("Serve it with vLLM", "vllm serve ORG/NAME"), LOAD],
        }
    }

    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>> {
        let schemes = Schemes::of(&model.subject());
        let part = |piece| match piece {
            Piece::Unquantized(tensor) => model.unquantized(tensor),
            Piece::Quantized(site, linear) => match schemes.find(linear) {
                Some(Scheme::Nvfp4 { activations }) => nvfp4(model, site, linear, activations),
                Some(Scheme::Mxfp4 { .. }) => mxfp4(model, site, linear),
                Some(Scheme::Integer { group, .. }) => integers(model, site, linear, group),
                None => unreachable!("{} is quantized", linear.name),
            },
        };
        let parts = model.pieces()?.into_iter().map(part).collect();
        let quantization = quantization_config(&model.subject(), &schemes);
        let config = config(model.checkpoint.config(), model.dtype, Some(quantization));
        Ok(Contents { parts, container: Container::Shards { config } })
    }
}

fn check_fp4(site: &SitePlan, obstacles: &mut Obstacles) {
    let known = [(ScaleGrid::E4m3, 16), (ScaleGrid::PowerOfTwo, 32)];
    let found = known.into_iter().find(|(grid, _)| *grid == site.scales);
    let grids = "e4m3 or power-of-two";
    obstacles.check(found.is_some(), "scales", &site.name, site.scales.name(), grids);
    if let Some((grid, size)) = found {
        let needed = format_args!("{size} with scales = \"{}\"", grid.name());
        obstacles.check(site.group_size == size, "group", &site.name, site.group_size, needed);
    }
    let quantized = site.bits < 16;
    let same = !quantized || (site.bits == 4 && site.codebook == Codebook::Fp4);
    obstacles.check(same, "act_bits", &site.name, site.bits, "4 or 16");
    obstacles.check(!quantized || site.clip == 1.0, "clip_act", &site.name, site.clip, "1");
}

/// `quantization_config` of `config.json`.
fn quantization_config(subject: &Subject<'_>, schemes: &Schemes<'_>) -> Value {
    let mut ignore = vec!["lm_head"];
    if subject.architecture.experts.is_some() {
        // The router.
        ignore.push("re:.*gate$");
    }
    let linears = subject.sites().flat_map(|site| &site.linears);
    ignore.extend(linears.filter(|linear| linear.bits == 16).map(|linear| linear.name.as_str()));
    let groups = schemes.groups().into_iter().enumerate();
    let groups: Map<String, Value> =
        groups.map(|(index, group)| (format!("group_{index}"), group)).collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": schemes.format(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    })
}

/// Integers: `weight_packed` I32 `[rows, channels * bits / 32]` of `code + 2^(bits-1)`, lowest bits first;
/// `weight_scale` `[rows, channels / group]`; `weight_shape`. A site's scales are repeated where `group` divides its own.
fn integers<'a>(
    model: &'a ExportedModel<'a>,
    site: &'a SitePlan,
    linear: &'a LinearPlan,
    group: usize,
) -> Part<'a> {
    let LinearPlan { name, rows, bits, .. } = linear;
    let columns = site.channels * usize::from(*bits) / 32;
    let tensors = vec![
        TensorSpec::new(format!("{name}.weight_packed"), Dtype::I32, [*rows, columns]),
        TensorSpec::new(
            format!("{name}.weight_scale"),
            model.dtype,
            [*rows, site.channels / group],
        ),
        TensorSpec::new(format!("{name}.weight_shape"), Dtype::I64, [2]),
    ];
    let make = move || {
        let scales = exact::scales(model, site, linear)?;
        let repeated: Vec<_> = scales
            .iter()
            .flat_map(|scale| std::iter::repeat_n(*scale, site.group_size / group))
            .collect();
        let scales = exact::scales_as(&repeated, model.dtype, name)?;
        let shape = [*rows, site.channels].map(|length| (length as u64).to_le_bytes());
        let codes = exact::codes(model, linear, exact::offset(linear))?;
        Ok(vec![codes, scales.into(), shape.concat().into()])
    };
    Part { tensors, make: Box::new(make) }
}

/// `weight_packed` U8 `[rows, channels / 2]` and `weight_scale`: the bits of E2M1 are what a checkpoint holds.
fn fp4_specs(site: &SitePlan, linear: &LinearPlan, scales: Dtype) -> Vec<TensorSpec> {
    let LinearPlan { name, rows, .. } = linear;
    vec![
        TensorSpec::new(format!("{name}.weight_packed"), Dtype::U8, [*rows, site.channels / 2]),
        TensorSpec::new(format!("{name}.weight_scale"), scales, [*rows, site.groups()]),
    ]
}

/// The divisor by which a weight is E2M1 times E4M3: a checkpoint counts E2M1 doubled, with scales of `2^exponent`.
fn global_scale(exponent: Option<i8>) -> Vec<u8> {
    2f32.powi(-1 - i32::from(exponent.unwrap_or(0))).to_le_bytes().to_vec()
}

/// NVFP4: codes and scales as they are stored, and the power of two as `weight_global_scale`, a divisor.
fn nvfp4<'a>(
    model: &'a ExportedModel<'a>,
    site: &'a SitePlan,
    linear: &'a LinearPlan,
    activations: bool,
) -> Part<'a> {
    let name = &linear.name;
    let mut tensors = fp4_specs(site, linear, Dtype::F8E4m3);
    tensors.push(TensorSpec::new(format!("{name}.weight_global_scale"), Dtype::F32, [1]));
    if activations {
        tensors.push(TensorSpec::new(format!("{name}.input_global_scale"), Dtype::F32, [1]));
    }
    let make = move || {
        let scales = exact::stored_scales(model, site, linear, 1)?;
        let global_scales = [Some(site.weight_exponent), activations.then_some(site.act_exponent)];
        let made = global_scales.into_iter().flatten().map(global_scale);
        let made = std::iter::once(scales).chain(made).map(TensorBytes::from);
        Ok(std::iter::once(exact::codes(model, linear, 0)?).chain(made).collect())
    };
    Part { tensors, make: Box::new(make) }
}

/// MXFP4: codes as they are stored; scales of undoubled E2M1, one exponent more. E8M0 has no zero: a group
/// of zeros gets the scale 1.
fn mxfp4<'a>(model: &'a ExportedModel<'a>, site: &'a SitePlan, linear: &'a LinearPlan) -> Part<'a> {
    const ONE: u8 = 127;
    let tensors = fp4_specs(site, linear, Dtype::U8);
    let make = move || {
        let mut codes = model.copy(&exact::codes_name(linear), 0)?;
        let mut scales = exact::stored_scales(model, site, linear, 1)?;
        for (scale, codes) in scales.iter_mut().zip(codes.chunks_mut(site.group_size / 2)) {
            if *scale == 0 {
                codes.fill(0);
                *scale = ONE;
            } else {
                *scale += 1;
            }
        }
        Ok([codes, scales].map(TensorBytes::from).into())
    };
    Part { tensors, make: Box::new(make) }
}
