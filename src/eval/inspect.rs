/*! What a checkpoint holds, told from its headers alone. */

use serde::{Deserialize, Serialize};

use crate::checkpoint::linear::specs;
use crate::checkpoint::plan::bits_per_weight;
use crate::checkpoint::{AtomCheckpoint, Manifest, Provenance, Source, TensorSpec};
use crate::hub::Hub;
use crate::model::{Architecture, read_manifest};
use crate::network::{Model, check_counts};
use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// Which of the two kinds of checkpoint a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// Written by `atom quantize`.
    Atom,
    /// Floating point, as published.
    Source,
}

impl CheckpointKind {
    /// `Atom checkpoint` or `source checkpoint`.
    pub fn description(self) -> &'static str {
        match self {
            Self::Atom => "Atom checkpoint",
            Self::Source => "source checkpoint",
        }
    }
}

/// One quantized linear.
#[derive(Clone, Debug, Serialize)]
pub struct InspectedLinear {
    /// The source's name of the linear, without `.weight`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features, outlier channels included, padding not.
    pub columns: usize,
    /// Bits of its codes.
    pub bits: u8,
    /// What they stand for.
    pub format: Codebook,
    /// Channels that share a scale.
    pub group_size: usize,
    /// Outlier channels.
    pub outliers: usize,
    /// Bytes of its tensors: codes, scales and outlier block.
    pub bytes: u64,
    /// Relative output error on the calibration windows, where it was recorded.
    pub error: Option<f64>,
}

/// The result of `atom inspect`. What only an Atom checkpoint has is none for a source.
#[derive(Clone, Debug, Serialize)]
pub struct InspectOutcome {
    /// Atom or source.
    pub kind: CheckpointKind,
    /// The model's name.
    pub name: String,
    /// As in `config.json`, e.g. `LlamaForCausalLM`.
    pub architecture: String,
    /// Decoder blocks.
    pub blocks: usize,
    /// Tensors in all shards.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bits a weight of the quantized linears takes, with scales, outliers and channel orders.
    pub bits_per_weight: Option<f64>,
    /// The recipe it was made by.
    pub recipe: Option<Recipe>,
    /// How keys and values are held, in words.
    pub kv: Option<String>,
    /// Name of the source it was made from.
    pub source: Option<String>,
    /// The calibration windows, in words.
    pub calibration: Option<String>,
    /// What it was trained on afterwards and what that gained, in words, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation: Option<String>,
    /// The program that wrote it, `atom 0.1.0`.
    pub tool_version: Option<String>,
    /// Every quantized linear, in the model's order; empty for a source.
    pub linears: Vec<InspectedLinear>,
}

/// What a checkpoint holds, from its JSON files and tensor headers.
///
/// # Errors
/// Kind `Input` if there is no such checkpoint, or its headers are damaged.
pub fn inspect(hub: &Hub<'_>, model: &str) -> Result<InspectOutcome> {
    match Model::open(hub, model, None)? {
        Model::Source(source) => inspect_source(&source),
        Model::Atom(checkpoint) => inspect_atom(&checkpoint),
    }
}

fn inspect_source(source: &Source) -> Result<InspectOutcome> {
    source.check_index()?;
    let file = source.config_file();
    let architecture = Architecture::read(source.config(), &file)?;
    // Other parts of a larger model have blocks of their own.
    if !source.is_part() {
        architecture.check_blocks(source.names(), &file)?;
    }
    check_counts(&architecture, source.names().count(), source.total_bytes()).map_err(|what| {
        Error::input(format!("{file}: {what}"))
            .hint("take the config.json that was published with the weights")
    })?;
    Ok(InspectOutcome {
        kind: CheckpointKind::Source,
        name: source.name().to_owned(),
        architecture: architecture_name(source.config()),
        blocks: architecture.blocks,
        tensors: source.names().count(),
        bytes: source.total_bytes(),
        bits_per_weight: None,
        recipe: None,
        kv: None,
        source: None,
        calibration: None,
        distillation: None,
        tool_version: None,
        linears: Vec::new(),
    })
}

fn inspect_atom(checkpoint: &AtomCheckpoint) -> Result<InspectOutcome> {
    let architecture = Architecture::read(checkpoint.config(), &checkpoint.config_file())?;
    let manifest = read_manifest(checkpoint, &architecture)?;
    let Manifest { kv, blocks, recipe, source, calibration, distillation, tool_version, .. } =
        manifest;
    let mut linears = Vec::new();
    for site in blocks.iter().flatten() {
        for linear in site.linears.iter().filter(|linear| linear.bits < 16) {
            linears.push(InspectedLinear {
                name: linear.name.clone(),
                rows: linear.rows,
                columns: site.channels,
                bits: linear.bits,
                format: linear.codebook,
                group_size: site.group_size,
                outliers: site.outlier_channels,
                bytes: specs(&linear.name, linear.rows, &site.weights(linear))
                    .iter()
                    .map(TensorSpec::bytes)
                    .sum(),
                error: linear.error,
            });
        }
    }
    Ok(InspectOutcome {
        kind: CheckpointKind::Atom,
        name: checkpoint.name().to_owned(),
        architecture: architecture_name(checkpoint.config()),
        blocks: architecture.blocks,
        tensors: checkpoint.names().count(),
        bytes: checkpoint.total_bytes(),
        bits_per_weight: Some(bits_per_weight(&blocks)),
        recipe: Some(recipe),
        kv: Some(kv_in_words(&kv)),
        source: Some(source.name),
        calibration: Some({
            let Provenance { dataset, samples, seq_len, seed, .. } = calibration;
            format!("{samples} windows of {seq_len} tokens of {dataset}, seed {seed}")
        }),
        distillation: distillation.map(|record| record.in_words()),
        tool_version: Some(format!("atom {tool_version}")),
        linears,
    })
}

/// What a `config.json` calls its network.
#[derive(Default, Deserialize)]
struct NetworkNames {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
}

/// The class of the network, or its family where no class is named.
fn architecture_name(config: &serde_json::Value) -> String {
    let NetworkNames { architectures, model_type } =
        NetworkNames::deserialize(config).unwrap_or_default();
    let class = architectures.into_iter().flatten().next();
    class.or(model_type).unwrap_or_else(|| "unknown".to_owned())
}

fn kv_in_words(kv: &KvFormat) -> String {
    if kv.bits == 16 {
        return "floating point".to_owned();
    }
    let place = if kv.after_rope { "after" } else { "before" };
    let rotated = if kv.rotate { ", heads rotated" } else { "" };
    format!("INT{} per token and head, keys {place} RoPE{rotated}", kv.bits)
}
