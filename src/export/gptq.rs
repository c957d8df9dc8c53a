/*! GPTQ's format, version 1: what vLLM, SGLang and GPTQModel load. Codes are packed along the input channels, `[in * bits /
32, out]`, and zero points are stored less one (AutoGPTQ's format of 2023, which `checkpoint_format: gptq` means). */

use rayon::prelude::*;
use serde_json::{Value, json};

use super::config::config;
use super::exact;
use super::format::{Container, Contents, Format, Part, Published};
use super::model::{ExportedModel, Piece, Subject};
use super::obstacle::{Obstacle, Obstacles};
use super::schemes::greatest_common_divisor;
use crate::Result;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{Dtype, TensorBytes, TensorSpec};
use crate::quant::codebook::Codebook;

/// GPTQ's format.
pub(super) struct Gptq;

impl Format for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn loaded_by(&self) -> &'static str {
        "vLLM, SGLang and GPTQModel"
    }

    fn recipes(&self) -> &'static [&'static str] {
        &["w4a16"]
    }

    fn obstacles(&self, subject: &Subject<'_>) -> Vec<Obstacle> {
        let mut obstacles = Obstacles::default();
        exact::check_sites(subject, &mut obstacles);
        let first = subject.quantized().next().map_or(4, |(_, linear)| linear.bits);
        for site in subject.sites() {
            obstacles.check(site.bits == 16, "act_bits", &site.name, site.bits, "16");
            for linear in &site.linears {
                let LinearPlan { name, rows, bits, codebook, .. } = linear;
                let known = [4, 8].contains(bits) && *bits == first;
                obstacles.check(known, "bits", name, bits, "4 or 8, the same in all linears");
                let is_int = *codebook == Codebook::Int;
                obstacles.check(is_int, "format", name, codebook.name(), "int");
                let packed = (rows * usize::from(*bits)).is_multiple_of(32);
                let needed = "a number that fills 32-bit words of zero points";
                obstacles.check(packed, "the number of output features", name, rows, needed);
            }
        }
        exact::check_scale_type(subject, &mut obstacles);
        obstacles.into_vec()
    }

    fn notes(&self, subject: &Subject<'_>) -> Vec<String> {
        exact::notes(subject)
    }

    fn published(&self) -> Published {
        Published {
            library: "transformers",
            tags: &["gptq", "vllm"],
            usage: &[("Serve it with vLLM", "vllm serve ORG/NAME")],
        }
    }

    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>> {
        let subject = model.subject();
        let sizes = subject.quantized().map(|(site, _)| site.group_size);
        let group = sizes.reduce(greatest_common_divisor).unwrap_or(1);
        let bits = subject.quantized().next().map_or(4, |(_, linear)| linear.bits);
        let part = |piece| match piece {
            Piece::Unquantized(tensor) => model.unquantized(tensor),
            Piece::Quantized(site, linear) => quantized(model, site, linear, group),
        };
        let parts = model.pieces()?.into_iter().map(part).collect();
        let quantization = quantization_config(bits, group);
        let config = config(model.checkpoint.config(), model.dtype, Some(quantization));
        Ok(Contents { parts, container: Container::Shards { config } })
    }
}

/// `quantization_config` of `config.json`. Version 1 has one group size: the one that divides all.
fn quantization_config(bits: u8, group: usize) -> Value {
    json!({
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": false,
        "sym": true,
        "lm_head": false,
        "checkpoint_format": "gptq",
    })
}

/// `qweight` I32 `[in * bits / 32, out]`, `qzeros` I32 `[in / group, out * bits / 32]`, `scales` `[in / group, out]`
/// and `g_idx` I32 `[in]`. A site's scales are repeated where `group` divides its own.
fn quantized<'a>(
    model: &'a ExportedModel<'a>,
    site: &'a SitePlan,
    linear: &'a LinearPlan,
    group: usize,
) -> Part<'a> {
    let LinearPlan { name, rows, bits, .. } = linear;
    let (rows, bits) = (*rows, usize::from(*bits));
    let (words, groups) = (site.channels * bits / 32, site.channels / group);
    let dtype = if model.dtype == Dtype::F32 { Dtype::F16 } else { model.dtype };
    let tensors = vec![
        TensorSpec::new(format!("{name}.qweight"), Dtype::I32, [words, rows]),
        TensorSpec::new(format!("{name}.qzeros"), Dtype::I32, [groups, rows * bits / 32]),
        TensorSpec::new(format!("{name}.scales"), dtype, [groups, rows]),
        TensorSpec::new(format!("{name}.g_idx"), Dtype::I32, [site.channels]),
    ];
    let make = move || {
        let codes = model.copy(&exact::codes_name(linear), exact::offset(linear))?;
        let qweight = transposed::<4>(&codes, rows, words);
        drop(codes);
        // The zero point is 2^(bits-1), of which version 1 stores one less.
        let zero: u8 = if bits == 4 { 0x77 } else { 0x7f };
        let qzeros = vec![zero; groups * rows * bits / 8];
        let scales = exact::scales_as(&exact::scales(model, site, linear)?, dtype, name)?;
        let scales = transposed::<2>(&scales, rows, site.groups());
        let repeat = site.group_size / group;
        let scales: Vec<u8> = scales
            .chunks_exact(2 * rows)
            .flat_map(|row| std::iter::repeat_n(row, repeat))
            .flatten()
            .copied()
            .collect();
        let g_idx = (0..site.channels).flat_map(|channel| ((channel / group) as u32).to_le_bytes());
        Ok([qweight, qzeros, scales, g_idx.collect()].map(TensorBytes::from).into())
    };
    Part { tensors, make: Box::new(make) }
}

/// The matrix `[rows, columns]` of elements of `N` bytes as `[columns, rows]`.
fn transposed<const N: usize>(matrix: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    /// Columns of a task: a cache line of the input holds them.
    const COLUMNS: usize = 16;
    let elements = matrix.as_chunks::<N>().0;
    let mut out = vec![0; matrix.len()];
    out.par_chunks_mut(COLUMNS * rows * N).enumerate().for_each(|(task, out)| {
        let out = out.as_chunks_mut::<N>().0;
        let first = task * COLUMNS;
        for row in 0..rows {
            for (own, out) in out.chunks_exact_mut(rows).enumerate() {
                out[row] = elements[row * columns + first + own];
            }
        }
    });
    out
}
