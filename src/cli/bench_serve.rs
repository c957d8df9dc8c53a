//! The flags of `atom bench serve`.

use clap::{Args, ValueEnum};

use super::args::DeviceFlag;
use super::values::{self, Device};
use crate::Result;
use crate::bench::{Batch, NetworkShape, RowKind, ServeSettings, SyntheticModel, Workload};
use crate::model::Architecture;

const SERVE_EXAMPLES: &str = "\
Examples:
  atom bench serve --workload atom --memory 24GB --equal-batch 32
  atom bench serve --blocks 1 --batch 2 --requests 2 --steps 1 --device cpu

Clocks are left as they are: what else runs on the GPU shows in the figures.";

#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct ServeFlags {
    /// Model whose shapes the network has; its weights are random
    #[arg(long, value_name = "MODEL", default_value = "llama-2-7b")]
    shape: String,
    /// Decoder blocks [default: as many as the model has]
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    blocks: Option<usize>,
    /// Requests: atom (the paper's, of a chat, 20 for each sequence), qserve (1024 tokens and 512 new ones, all at once), vllm
    /// (1000 of 1024 and 128), or a JSON file with a list of [prompt, output]
    #[arg(long, value_name = "atom|qserve|vllm|FILE.json", default_value = "atom")]
    workload: String,
    /// Requests for each sequence of the batch, for the workload atom
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    requests: Option<usize>,
    /// GPU memory that weights, cache and activations of a row have to fit into at its own batch
    #[arg(long, value_name = "SIZE", default_value = "24GB", value_parser = values::bytes)]
    memory: u64,
    /// Sequences at once: auto is the largest power of two that fits with the longest request reserved for each, max the
    /// largest number
    #[arg(long, value_name = "auto|max|N", default_value = "auto", value_parser = values::batch)]
    batch: Batch,
    /// Run all rows at this batch, too, with as much memory as that takes
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    equal_batch: Option<usize>,
    /// Batches of which a single step of decoding is timed, with 1024 cached tokens a sequence
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        value_parser = values::small_count,
        default_value = "1,64"
    )]
    steps: Vec<usize>,
    /// What 4 bits are compared with, the first one by all others: f16 and w8a8 (weights, activations and cache in INT8), or none
    #[arg(
        long,
        value_name = "f16,w8a8|none",
        value_delimiter = ',',
        default_value = "f16,w8a8",
        hide_possible_values = true
    )]
    baseline: Vec<Baseline>,
    /// Channels that share a scale, a multiple of 16
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::small_count)]
    group: usize,
    /// How many channels are outliers, in INT8
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::outliers)]
    outliers: usize,
    /// Runs of each row that the median is taken of
    #[arg(long, value_name = "N", default_value = "3", value_parser = values::small_count)]
    repeats: usize,
    /// Where it runs: auto (a GPU if there is one), cpu, cuda or cuda:N
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        env = "ATOM_DEVICE",
        hide_env_values = true
    )]
    device: Device,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Baseline {
    F16,
    W8a8,
    None,
}

impl ServeFlags {
    /// Where it runs: the memory is bounded by the measurement itself.
    pub(crate) fn device(&self) -> DeviceFlag {
        DeviceFlag { device: self.device, gpu_memory: None }
    }

    /// What is to be measured.
    pub(crate) fn settings(&self) -> Result<ServeSettings> {
        let model = SyntheticModel {
            shape: self.shape.clone(),
            blocks: self.blocks,
            samples: 0,
            seq_len: 0,
            directory: None,
        };
        let shape = NetworkShape {
            name: self.shape.clone(),
            architecture: Architecture::from_config(&model.config()?)?,
            group_size: self.group,
            outliers: self.outliers,
        };
        shape.check()?;
        let mut workload = Workload::named(&self.workload)?;
        if let Some(requests) = self.requests {
            workload = workload.with_requests(requests)?;
        }
        let baselines = self.baseline.iter().filter_map(|baseline| match baseline {
            Baseline::F16 => Some(RowKind::F16),
            Baseline::W8a8 => Some(RowKind::W8a8kv8),
            Baseline::None => None,
        });
        let rows = baselines.chain([RowKind::W4a4kv4]).collect();
        let Self { memory, batch, equal_batch, repeats, .. } = *self;
        let steps = self.steps.clone();
        Ok(ServeSettings { shape, workload, memory, batch, equal_batch, steps, rows, repeats })
    }
}
