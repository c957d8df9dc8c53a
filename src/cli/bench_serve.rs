//! The flags of `atom bench serve`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::args::DeviceFlag;
use super::values::{self, Device};
use crate::bench::{Batch, NetworkShape, RowKind, ServeSettings, SyntheticModel, Workload};
use crate::hub::Hub;
use crate::model::Architecture;
use crate::network::Model;
use crate::progress::Progress;
use crate::{Error, Result};

const SERVE_EXAMPLES: &str = "\
Examples:
  atom bench serve --workload atom --memory 24GB --equal-batch 32
  atom bench serve --blocks 1 --batch 2 --requests 2 --steps 1 --device cpu
  atom bench serve --model ./Llama --workload vllm --batch max --svg serve.svg

Clocks are left as they are: what else runs on the GPU shows in the figures.";

#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct ServeFlags {
    /// Model whose shapes the network has; its weights are random
    #[arg(long, value_name = "MODEL", default_value = "llama-2-7b", conflicts_with = "model")]
    shape: String,
    /// Take the shapes of the network from this model's config.json instead: a directory, the bundled tiny-llama, or what
    /// the Hub's cache holds. The weights are random all the same
    #[arg(long, value_name = "DIR", conflicts_with = "blocks")]
    model: Option<String>,
    /// Decoder blocks [default: as many as the model has]
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    blocks: Option<usize>,
    /// Requests: atom (the paper's, of a chat, 20 for each sequence), qserve (1024 tokens and 512 new ones for each, all sent at the start), vllm
    /// (1000 of 1024 and 128), or a JSON file with a list of [prompt, output]
    #[arg(long, value_name = "atom|qserve|vllm|FILE.json", default_value = "atom")]
    workload: String,
    /// Requests for each sequence of the batch, for the workload atom
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    requests: Option<usize>,
    /// GPU memory that weights, cache and activations of a row have to fit into at its own batch
    #[arg(long, value_name = "SIZE", default_value = "24GB", value_parser = values::bytes)]
    memory: u64,
    /// Sequences that run together: auto is the largest power of two that fits with the longest request reserved for each, max the
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
    /// What 4 bits are compared with, the first one by all others: f16 and w8a8 (weights, activations and cache in INT8), or
    /// none. There is no kernel of weights in 4 bits with activations in f16, so w4a16 is refused
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
    /// Write a picture (SVG) of the tokens a second against the batch
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
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
    W4a16,
    None,
}

impl ServeFlags {
    /// Where it runs: the memory is bounded by the measurement itself.
    pub(crate) fn device(&self) -> DeviceFlag {
        DeviceFlag { device: self.device, gpu_memory: None }
    }

    /// The file of the picture.
    pub(crate) fn svg(&self) -> Option<&Path> {
        self.svg.as_deref()
    }

    /// The name and the network of what is served.
    fn network(&self, progress: &dyn Progress) -> Result<(String, Architecture)> {
        let Some(model) = &self.model else {
            let model = SyntheticModel {
                shape: self.shape.clone(),
                blocks: self.blocks,
                samples: 0,
                seq_len: 0,
                directory: None,
            };
            return Ok((self.shape.clone(), Architecture::from_config(&model.config()?)?));
        };
        let model = Model::open(&Hub::from_env(true, progress)?, model, None)?;
        let architecture = Architecture::read(model.config(), &model.path_of("config.json"))?;
        Ok((model.name().to_owned(), architecture))
    }

    /// What is to be measured.
    pub(crate) fn settings(&self, progress: &dyn Progress) -> Result<ServeSettings> {
        if self.baseline.iter().any(|baseline| matches!(baseline, Baseline::W4a16)) {
            return Err(Error::usage(
                "w4a16 cannot be measured: there is no kernel of weights in 4 bits with activations in f16",
            )
            .hint("such checkpoints decode with weights in f16, as the baseline f16 does"));
        }
        let (name, architecture) = self.network(progress)?;
        let shape =
            NetworkShape { name, architecture, group_size: self.group, outliers: self.outliers };
        shape.check()?;
        let mut workload = Workload::named(&self.workload)?;
        if let Some(requests) = self.requests {
            workload = workload.with_requests(requests)?;
        }
        let baselines = self.baseline.iter().filter_map(|baseline| match baseline {
            Baseline::F16 => Some(RowKind::F16),
            Baseline::W8a8 => Some(RowKind::W8a8kv8),
            Baseline::W4a16 | Baseline::None => None,
        });
        let rows = baselines.chain([RowKind::W4a4kv4]).collect();
        let Self { memory, batch, equal_batch, repeats, .. } = *self;
        let steps = self.steps.clone();
        Ok(ServeSettings { shape, workload, memory, batch, equal_batch, steps, rows, repeats })
    }
}
