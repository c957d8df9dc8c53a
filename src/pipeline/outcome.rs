/*! What the pipeline's stages return: plain data, serialized as the `--json` objects. */

use std::path::PathBuf;

use serde::Serialize;

use super::allocated::Allocated;
use super::channels::SiteChannels;
use super::distill::DistillOutcome;
use super::sensitivity::Sensitivity;
use crate::card::Perplexity;
use crate::model::Architecture;
use crate::recipe::Recipe;

/// One quantized linear.
#[derive(Clone, Debug, Serialize)]
pub struct LinearOutcome {
    /// The source's name of the linear, without `.weight`.
    pub name: String,
    /// Bits of its codes.
    pub bits: u8,
    /// Relative output error on the calibration windows, `||(W - Q) x|| / ||W x||`.
    pub error: f64,
}

/// Seconds spent in one stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageSeconds {
    /// `calibrate`, `hessians`, `gptq`, `write`, ...
    pub stage: String,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Perplexity of the source and of the quantized checkpoint on the same windows.
#[derive(Clone, Debug, Serialize)]
pub struct PerplexityChange {
    /// Name of the text set.
    pub dataset: String,
    /// Windows measured.
    pub windows: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Of the source.
    pub before: f64,
    /// Of the checkpoint.
    pub after: f64,
}

impl PerplexityChange {
    /// The measurement as a model card has it.
    pub fn measured(&self) -> Perplexity {
        let Self { dataset, windows, seq_len, before, after } = self.clone();
        Perplexity { dataset, windows, seq_len, before, after }
    }
}

/// The result of `atom quantize` and `atom pack`.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizeOutcome {
    /// The checkpoint's directory.
    pub out: PathBuf,
    /// The source's name.
    pub model: String,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens in a calibration window.
    pub seq_len: usize,
    /// Wall-clock seconds of the whole run.
    pub seconds: f64,
    /// Seconds by stage, in order.
    #[serde(serialize_with = "stage_map")]
    pub stage_seconds: Vec<StageSeconds>,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Highest device memory; none on the CPU.
    pub peak_gpu_bytes: Option<u64>,
    /// Bits a weight of the linears takes, with scales, outliers and channel orders.
    pub bits_per_weight: f64,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the checkpoint's tensors.
    pub out_bytes: u64,
    /// `cpu (avx512)` and the like.
    pub device: String,
    /// Blocks found finished by `--resume`.
    pub resumed_blocks: usize,
    /// Every quantized linear, in the model's order.
    pub linears: Vec<LinearOutcome>,
    /// What it cost in accuracy, unless the measurement was turned off.
    pub perplexity: Option<PerplexityChange>,
    /// The command that publishes the checkpoint.
    pub upload: String,
    /// The sites of the linears with the greatest errors.
    pub worst_sites: Vec<SiteChannels>,
    /// How bits were allocated, where the run did so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Allocated>,
    /// What distillation gained, where the run ended with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distillation: Option<Box<DistillOutcome>>,
}

impl QuantizeOutcome {
    /// The same with what distillation gained.
    pub fn distilled(self, distilled: DistillOutcome) -> Self {
        Self { distillation: Some(Box::new(distilled)), ..self }
    }
}

fn stage_map<S: serde::Serializer>(
    stages: &[StageSeconds],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(stages.iter().map(|stage| (&stage.stage, stage.seconds)))
}

/// What `--dry-run` found: everything that can be known without arithmetic.
#[derive(Clone, Debug, Serialize)]
pub struct DryRun {
    /// Where the checkpoint would be.
    pub out: PathBuf,
    /// The source's name.
    pub model: String,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Decoder blocks.
    pub blocks: usize,
    /// Linears to be quantized.
    pub linears: usize,
    /// Calibration windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the checkpoint's tensors.
    pub out_bytes: u64,
    /// Bits a weight of the quantized linears would take.
    pub bits_per_weight: f64,
    /// Memory the run would need at its peak, estimated.
    pub memory_bytes: u64,
    /// Bytes of disk that the run would still reserve.
    pub needed_disk_bytes: u64,
    /// Free bytes where the checkpoint would be written.
    pub free_disk_bytes: u64,
    /// Blocks that an unfinished run of the same job has finished.
    pub finished_blocks: usize,
}

/// The result of `atom calibrate` and `atom plan`.
#[derive(Clone, Debug, Serialize)]
pub struct FileOutcome {
    /// The file written.
    pub out: PathBuf,
    /// The source's name.
    pub model: String,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Sites described.
    pub sites: usize,
    /// Linears described.
    pub linears: usize,
    /// Planned bits a weight, if the file is a plan.
    pub bits_per_weight: Option<f64>,
    /// What of sensitivity the file holds, if it is a calibration with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Measured>,
    /// How bits were allocated, if the file is a plan for a target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Allocated>,
}

/// What `atom calibrate --sensitivity` measured.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The recipe it holds for.
    pub recipe: Recipe,
    /// Widths, ascending.
    pub widths: Vec<u8>,
    /// Outlier counts, the recipe's first.
    pub outlier_counts: Vec<usize>,
    /// Windows that Hessians were measured on.
    pub hessian_windows: usize,
    /// Windows that effects and KL divergences were measured on.
    pub effect_windows: usize,
    /// Nats that the recipe's width and outlier count everywhere are expected to cost a token.
    pub uniform_nats: f64,
    /// The same by block.
    pub block_nats: Vec<f64>,
}

impl Measured {
    /// What `sensitivity` holds.
    pub(super) fn of(sensitivity: &Sensitivity) -> Self {
        let mut outlier_counts: Vec<usize> = Vec::new();
        for site in sensitivity.blocks.iter().flat_map(|block| &block.sites) {
            for count in &site.counts {
                if !outlier_counts.contains(&count.outliers) {
                    outlier_counts.push(count.outliers);
                }
            }
        }
        let block_nats: Vec<f64> =
            sensitivity.blocks.iter().map(|block| block.carry * block.effects()).collect();
        Self {
            recipe: sensitivity.recipe.clone(),
            widths: sensitivity.widths.clone(),
            outlier_counts,
            hessian_windows: sensitivity.hessian_windows,
            effect_windows: sensitivity.effect_windows,
            uniform_nats: block_nats.iter().sum(),
            block_nats,
        }
    }
}

/// Linears of a network.
pub(super) fn count_linears(architecture: &Architecture) -> usize {
    let sites = (0..architecture.blocks).flat_map(|block| architecture.sites(block));
    sites.map(|site| site.linears.len()).sum()
}
