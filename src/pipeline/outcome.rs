/*! What the pipeline's stages return: plain data, serialized as the `--json` objects. */

use std::path::PathBuf;

use serde::Serialize;

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

/// The result of `atom quantize` and `atom pack`.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizeOutcome {
    /// The checkpoint's directory.
    pub out: PathBuf,
    /// The source's name.
    pub model: String,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Wall-clock seconds of the whole run.
    pub seconds: f64,
    /// Seconds by stage, in order.
    #[serde(serialize_with = "stage_map")]
    pub stage_seconds: Vec<StageSeconds>,
    /// Highest resident memory of the process.
    pub peak_rss_bytes: u64,
    /// Highest device memory; none on the CPU.
    pub peak_gpu_bytes: Option<u64>,
    /// Bits a weight of the quantized linears takes, with scales, outliers and channel orders.
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
    /// Free bytes where the checkpoint would be written.
    pub free_disk_bytes: u64,
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
}
