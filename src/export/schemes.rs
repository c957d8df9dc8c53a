/*! How compressed-tensors says what each linear is: schemes, and the groups of linears that have one. */

use serde_json::{Value, json};

use super::model::Subject;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::quant::codebook::Codebook;
use crate::quant::scale::ScaleGrid;

/// How a linear's weights and its activation are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Integers with floating-point scales; activations in floating point.
    Integer {
        /// Bits of a code.
        bits: u8,
        /// Channels that share a scale.
        group: usize,
    },
    /// FP4 in groups of 16 with scales of E4M3.
    Nvfp4 {
        /// Whether the activation is quantized likewise.
        activations: bool,
    },
    /// FP4 in groups of 32 with powers of two as scales.
    Mxfp4 {
        /// Whether the activation is quantized likewise.
        activations: bool,
    },
}

impl Scheme {
    /// The name of the format in `config.json`.
    pub(super) fn format(self) -> &'static str {
        match self {
            Self::Integer { .. } => "pack-quantized",
            Self::Nvfp4 { .. } => "nvfp4-pack-quantized",
            Self::Mxfp4 { .. } => "mxfp4-pack-quantized",
        }
    }

    /// The group of `config.json` for the linears that `targets` match.
    fn group(self, targets: &[String]) -> Value {
        let mut weights = match self {
            Self::Integer { bits, group } => json!({
                "num_bits": bits, "type": "int", "symmetric": true, "strategy": "group",
                "group_size": group, "dynamic": false,
            }),
            Self::Nvfp4 { .. } => json!({
                "num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group",
                "group_size": 16, "dynamic": false, "scale_dtype": "torch.float8_e4m3fn",
            }),
            Self::Mxfp4 { .. } => json!({
                "num_bits": 4, "type": "float", "symmetric": true, "strategy": "group",
                "group_size": 32, "dynamic": false, "scale_dtype": "torch.uint8",
            }),
        };
        let mut group = json!({
            "targets": targets, "format": self.format(), "weights": weights.clone(),
            "input_activations": null,
        });
        let dynamic = match self {
            Self::Nvfp4 { activations: true } => json!("local"),
            Self::Mxfp4 { activations: true } => json!(true),
            _ => return group,
        };
        if dynamic == "local" {
            weights["observer"] = json!("static_minmax");
        }
        weights["dynamic"] = dynamic;
        group["input_activations"] = weights;
        group
    }
}

/// The schemes of a checkpoint.
pub(super) struct Schemes<'a> {
    linears: Vec<(Scheme, &'a LinearPlan)>,
}

impl<'a> Schemes<'a> {
    /// The schemes of the quantized linears of `subject`.
    pub(super) fn of(subject: &Subject<'a>) -> Self {
        let experts = expert_group(subject);
        let linears = subject.quantized().map(|(site, linear)| {
            let group = experts.filter(|_| is_expert(linear)).unwrap_or(site.group_size);
            (scheme(site, linear, group), linear)
        });
        Self { linears: linears.collect() }
    }

    /// The scheme of a quantized linear.
    pub(super) fn find(&self, linear: &LinearPlan) -> Option<Scheme> {
        let found = self.linears.iter().find(|(_, own)| own.name == linear.name);
        found.map(|(scheme, _)| *scheme)
    }

    /// The name of the format in `config.json`; none without quantized linears.
    pub(super) fn format(&self) -> Option<&'static str> {
        self.linears.first().map(|(scheme, _)| scheme.format())
    }

    /// `config_groups` of `config.json`, without their names. Linears are matched by their class where all are alike, by
    /// patterns of names where linears of the same kind are alike in all blocks, or else by names.
    pub(super) fn groups(&self) -> Vec<Value> {
        let mut schemes: Vec<Scheme> = Vec::new();
        for (scheme, _) in &self.linears {
            if !schemes.contains(scheme) {
                schemes.push(*scheme);
            }
        }
        if let [only] = schemes[..] {
            return vec![only.group(&["Linear".to_owned()])];
        }
        let split = self.linears.iter().any(|(scheme, linear)| {
            let pattern = pattern(linear);
            self.linears.iter().any(|(other, of)| other != scheme && self::pattern(of) == pattern)
        });
        let group = |scheme: &Scheme| {
            let own = self.linears.iter().filter(|(own, _)| own == scheme);
            let mut targets: Vec<String> = Vec::new();
            for (_, linear) in own {
                let by_name = split && !is_expert(linear);
                let target = if by_name { linear.name.clone() } else { pattern(linear) };
                if !targets.contains(&target) {
                    targets.push(target);
                }
            }
            scheme.group(&targets)
        };
        schemes.iter().map(group).collect()
    }
}

/// Whether it is one of an expert's linears, which programs fuse into one tensor.
pub(super) fn is_expert(linear: &LinearPlan) -> bool {
    linear.name.contains(".experts.")
}

/// The group that divides those of all experts, which have one scheme in every program.
fn expert_group(subject: &Subject<'_>) -> Option<usize> {
    let experts = subject.quantized().filter(|(_, linear)| is_expert(linear));
    experts.map(|(site, _)| site.group_size).reduce(greatest_common_divisor)
}

/// The greatest common divisor.
pub(super) fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

fn scheme(site: &SitePlan, linear: &LinearPlan, group: usize) -> Scheme {
    let activations = site.bits < 16;
    match (linear.codebook, site.scales) {
        (Codebook::Int, _) => Scheme::Integer { bits: linear.bits, group },
        (_, ScaleGrid::PowerOfTwo) => Scheme::Mxfp4 { activations },
        _ => Scheme::Nvfp4 { activations },
    }
}

/// A pattern that matches linears of the same kind in all blocks: `re:.*\.self_attn\.q_proj$`, all experts together.
fn pattern(linear: &LinearPlan) -> String {
    if is_expert(linear) {
        return r"re:.*\.experts\..*".to_owned();
    }
    let mut parts = linear.name.rsplit('.');
    let [own, module] = [parts.next(), parts.next()].map(Option::unwrap_or_default);
    format!(r"re:.*\.{module}\.{own}$")
}
