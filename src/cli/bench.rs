/*! `atom bench`: speed, compared with a baseline measured in the same run. */

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use super::args::{DeviceFlag, with_backend};
use super::bench_serve::ServeFlags;
use super::distill::DistillFlag;
use super::ranks::RanksFlags;
use super::recipe::RecipeFlags;
use super::report_flag::ReportFlag;
use super::{Output, Ui, values};
use crate::bench::{self, AttentionSettings, GemmSettings, PrefillSettings, SyntheticModel};
use crate::checkpoint::{FileKind, Inputs, OutputFile};
use crate::model::Architecture;
use crate::quant::codebook::Codebook;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom bench cpu
  atom bench prefill --shape llama-2-7b --blocks 2 --tokens 256";

const CPU_EXAMPLES: &str = "\
Examples:
  atom bench cpu
  atom bench cpu --threads 1 --json";

const SYNTHETIC_EXAMPLES: &str = "\
Examples:
  atom bench quantize --shape llama-2-7b --blocks 2 --samples 4
  atom bench quantize --shape llama-2-70b --blocks 1 --device cuda
  atom bench quantize --shape llama-2-7b --blocks 4 --distill 163840";

const GEMM_EXAMPLES: &str = "\
Examples:
  atom bench gemm --shape llama-2-7b --tokens 16,2048
  atom bench gemm --shape all --tokens 1,64,2048 --svg gemm.svg

Clocks are left as they are: what else runs on the GPU shows in the figures.";

const ATTENTION_EXAMPLES: &str = "\
Examples:
  atom bench attention --batch 8 --context 4096 --bits 3
  atom bench attention --shape all --context 4096,32768 --svg attention.svg

Clocks are left as they are: what else runs on the GPU shows in the figures.";

const PREFILL_EXAMPLES: &str = "\
Examples:
  atom bench prefill --shape llama-2-7b --tokens 2048
  atom bench prefill --blocks 2 --tokens 256 --device cpu";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
    /// Write the figures as a page of HTML too, which loads nothing from elsewhere
    #[arg(long, value_name = "FILE", global = true, help_heading = "Output")]
    report: Option<PathBuf>,
    /// Replace the picture or the page that is there
    #[arg(long, global = true, help_heading = "Output")]
    overwrite: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A token's attention over the GPU's cache in 2 to 4 bits, at models' heads, beside the cache in f16
    Attention(AttentionFlags),
    /// Matrix products and integer kernels, beside faer's f32 product in builds with the feature bench-faer
    #[command(after_help = CPU_EXAMPLES)]
    Cpu,
    /// The GPU's integer product at models' shapes, beside cuBLASLt in f16, INT8 and FP8
    Gemm(GemmFlags),
    /// A window through a model's blocks, on the integer kernels and in full precision
    Prefill(PrefillFlags),
    /// Speed and memory of `quantize` on a synthetic checkpoint of a known model's widths
    Quantize(Box<SyntheticFlags>),
    /// Tokens a second at a fixed memory, in f16, INT8 and 4 bits: continuous batching of a workload's requests
    Serve(Box<ServeFlags>),
}

#[derive(Args, Debug)]
#[command(after_help = SYNTHETIC_EXAMPLES)]
struct SyntheticFlags {
    /// Model whose widths the checkpoint has
    #[arg(long, value_name = "MODEL", default_value = "llama-2-7b")]
    shape: String,
    /// Decoder blocks [default: as many as the model has]
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    blocks: Option<usize>,
    /// Calibration windows, of --seq-len tokens each
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::small_count)]
    samples: usize,
    /// Tokens in a window
    #[arg(
        long,
        value_name = "TOKENS",
        default_value = "2048",
        value_parser = values::small_window
    )]
    seq_len: usize,
    /// Directory for the checkpoint and the result [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    recipe: RecipeFlags,
    #[command(flatten)]
    training: DistillFlag,
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    ranks: RanksFlags,
}

#[derive(Args, Debug)]
#[command(after_help = GEMM_EXAMPLES)]
struct GemmFlags {
    /// Model whose linears are measured, or all
    #[arg(
        long,
        value_name = "llama-2-7b|llama-2-13b|llama-2-70b|mixtral-8x7b|all",
        default_value = "llama-2-7b"
    )]
    shape: String,
    /// Tokens in each of the products
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        value_parser = values::small_count,
        default_value = "1,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
    )]
    tokens: Vec<usize>,
    /// Channels that share a scale, a multiple of 16
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::small_count)]
    group: usize,
    /// How many channels are outliers, in INT8
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::outliers)]
    outliers: usize,
    /// Kind of number that 4-bit codes are
    #[arg(long, value_name = "int|fp4", default_value = "int", hide_possible_values = true)]
    format: Format,
    /// Bits of a weight
    #[arg(long, value_name = "2|3|4|8", default_value_t = 4)]
    bits: u8,
    /// Bits of an activation
    #[arg(long, value_name = "2|3|4|8", default_value_t = 4)]
    act_bits: u8,
    /// Write a picture (SVG) of how many times as fast as f16 the products are
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlag,
}

#[derive(Args, Debug)]
#[command(after_help = ATTENTION_EXAMPLES)]
struct AttentionFlags {
    /// Model whose heads attention has, or all
    #[arg(
        long,
        value_name = "llama-2-7b|llama-2-13b|llama-2-70b|mixtral-8x7b|all",
        default_value = "llama-2-7b"
    )]
    shape: String,
    /// Tokens of each sequence
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        value_parser = values::small_count,
        default_value = "4096,8192,16384,32768"
    )]
    context: Vec<usize>,
    /// Sequences that share a step
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        value_parser = values::small_count,
        default_value = "1,8,64"
    )]
    batch: Vec<usize>,
    /// Bits of a key's or value's code
    #[arg(long, value_name = "2|3|4", default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=4))]
    bits: u8,
    /// Write a picture (SVG) of how many times as fast as f16 it is
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlag,
}

#[derive(Args, Debug)]
#[command(after_help = PREFILL_EXAMPLES)]
struct PrefillFlags {
    /// Model whose shapes the blocks have
    #[arg(long, value_name = "MODEL", default_value = "llama-2-7b")]
    shape: String,
    /// Decoder blocks [default: as many as the model has]
    #[arg(long, value_name = "N", value_parser = values::small_count)]
    blocks: Option<usize>,
    /// Tokens of the window
    #[arg(
        long,
        value_name = "N",
        default_value = "2048",
        value_parser = values::small_window
    )]
    tokens: usize,
    /// Channels that share a scale, a multiple of 16
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::small_count)]
    group: usize,
    /// How many channels are outliers, in INT8
    #[arg(long, value_name = "N", default_value = "128", value_parser = values::outliers)]
    outliers: usize,
    /// Bits of a key's or value's code; 16 leaves the cache alone
    #[arg(long, value_name = "2..8|16", default_value_t = 4)]
    kv_bits: u8,
    /// Runs of which the median counts
    #[arg(long, value_name = "N", default_value = "7", value_parser = values::small_count)]
    repeats: usize,
    #[command(flatten)]
    device: DeviceFlag,
}

impl PrefillFlags {
    fn settings(&self) -> Result<PrefillSettings> {
        let &Self { blocks, tokens, group, outliers, kv_bits, repeats, .. } = self;
        if !matches!(kv_bits, 2..=8 | 16) {
            return Err(Error::usage(format!("a cache has no codes of {kv_bits} bits"))
                .hint("give --kv-bits 2 to 8, or 16"));
        }
        let shape = self.shape.clone();
        let model = SyntheticModel { shape, blocks, samples: 1, seq_len: tokens, directory: None };
        Ok(PrefillSettings {
            architecture: Architecture::from_config(&model.config()?)?,
            shape: model.shape,
            tokens,
            group_size: group,
            outliers,
            kv_bits,
            repeats,
        })
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Int,
    Fp4,
}

impl GemmFlags {
    fn settings(&self) -> Result<GemmSettings> {
        Ok(GemmSettings {
            models: bench::gemm_models(&self.shape)?,
            tokens: self.tokens.clone(),
            group_size: self.group,
            outliers: self.outliers,
            codebook: match self.format {
                Format::Int => Codebook::Int,
                Format::Fp4 => Codebook::Fp4,
            },
            bits: self.bits,
            act_bits: self.act_bits,
        })
    }
}

/// What `--svg` writes.
const PICTURE: FileKind = FileKind { name: "an SVG picture", recognizes: is_svg };

fn is_svg(path: &Path) -> bool {
    let mut head = String::new();
    let read = fs_err::File::open(path).and_then(|file| file.take(1024).read_to_string(&mut head));
    read.is_ok() && head.contains("<svg")
}

/// The file of the picture, if there is to be one; checked before anything is measured.
fn picture(path: Option<&Path>, overwrite: bool) -> Result<Option<OutputFile>> {
    let check = |path| OutputFile::check(path, &PICTURE, overwrite, Inputs::default());
    path.map(check).transpose()
}

impl Arguments {
    /// Which ranks share the work, where ranks can.
    pub(crate) fn ranks(&self) -> Option<&RanksFlags> {
        match &self.what {
            What::Quantize(flags) => Some(&flags.ranks),
            _ => None,
        }
    }
}

pub(crate) fn run(
    arguments: &Arguments,
    typed: &[OsString],
    ui: &Ui,
    output: &Output,
) -> Result<()> {
    let page = ReportFlag { report: arguments.report.clone() };
    let page = page.check(arguments.overwrite, Inputs::default())?;
    let outcome = match &arguments.what {
        What::Attention(flags) => {
            let settings = AttentionSettings {
                models: bench::attention_models(&flags.shape)?,
                contexts: flags.context.clone(),
                batches: flags.batch.clone(),
                bits: flags.bits,
            };
            let picture = picture(flags.svg.as_deref(), arguments.overwrite)?;
            let measured = bench::attention(&*flags.device.open_cuda()?, &settings, ui)?;
            if let Some(file) = picture {
                file.write(measured.chart().svg().as_bytes())?;
            }
            measured.outcome()
        }
        What::Cpu => bench::cpu()?,
        What::Gemm(flags) => {
            let settings = flags.settings()?;
            settings.check()?;
            let picture = picture(flags.svg.as_deref(), arguments.overwrite)?;
            let measured = bench::gemm(&*flags.device.open_cuda()?, &settings, ui)?;
            if let Some(file) = picture {
                file.write(measured.chart().svg().as_bytes())?;
            }
            measured.outcome()
        }
        What::Prefill(flags) => {
            let settings = flags.settings()?;
            let backend = flags.device.open()?;
            with_backend!(&backend, ui, backend => bench::prefill(backend, &settings, ui))?
        }
        What::Serve(flags) => {
            let settings = flags.settings(ui)?;
            let picture = picture(flags.svg(), arguments.overwrite)?;
            let backend = flags.device().open()?;
            let outcome =
                with_backend!(&backend, ui, backend => bench::serve(backend, &settings, ui))?;
            if let Some(file) = picture {
                file.write(outcome.chart().svg().as_bytes())?;
            }
            ui.close();
            output.write(&outcome)?;
            return page.write(&outcome, None);
        }
        What::Quantize(flags) => {
            let model = SyntheticModel {
                shape: flags.shape.clone(),
                blocks: flags.blocks,
                samples: flags.samples,
                seq_len: flags.seq_len,
                directory: flags.dir.clone(),
            };
            model.known_shape()?;
            flags.training.check(flags.seq_len)?;
            let recipe = flags.recipe.resolve()?;
            let outcome = flags.ranks.share(&flags.device, typed, ui, |team| {
                let backend = team.open(&flags.device)?;
                flags.training.check_ranks(&backend)?;
                let outcome = with_backend!(&backend, ui, backend => {
                    bench::quantize(backend, &model, &recipe, flags.training.distill, ui)
                })?;
                Ok(team.is_first().then_some(outcome))
            })?;
            let Some(outcome) = outcome else { return Ok(()) };
            outcome
        }
    };
    ui.close();
    output.write(&outcome)?;
    page.write(&outcome, None)
}
