/*! `atom bench quantize`: the entire pipeline on a synthetic checkpoint, from files to a file, and each
stage compared with what the device does with a block's products alone. */

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::rate::{
    attention_operations, expert_share, product_operations, products, site_operations,
};
use super::{BenchOutcome, Device, SyntheticModel};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Train};
use crate::checkpoint::{AtomCheckpoint, Destination, Inputs, Source};
use crate::eval::source_perplexity;
use crate::model::Architecture;
use crate::model::sites::{SiteKind, SiteSpec};
use crate::pipeline::distill::{Distillation, DistillationWindows, RATES, distill};
use crate::pipeline::outcome::QuantizeOutcome;
use crate::pipeline::{Calibration, Output, Quantization, quantize as run};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::text::{Evaluation, Split, TextSet};
use crate::{Error, Result};

/// Tokens on which the products' own rate is measured.
const RATE_TOKENS: usize = 16_384;

/// Times of a device's own kernels.
pub trait KernelTimes {
    /// Seconds of each kernel so far, where they are timed.
    fn kernel_seconds(&self) -> Vec<(String, f64)>;
}

impl KernelTimes for Cpu {
    fn kernel_seconds(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

impl KernelTimes for Cuda {
    fn kernel_seconds(&self) -> Vec<(String, f64)> {
        self.gpu().kernel_seconds()
    }
}

/// One figure.
#[derive(Serialize)]
struct Figure {
    figure: String,
    value: Value,
    /// What was reached of the rate of the block's products alone.
    share: Option<f64>,
}

/// Writes the model, quantizes it by `recipe`, distills the checkpoint on `distilled` tokens if there are to be any, and returns
/// seconds by stage, memory and sizes.
pub fn quantize<B: Train + KernelTimes + Device>(
    backend: &B,
    model: &SyntheticModel,
    recipe: &Recipe,
    distilled: Option<usize>,
    progress: &dyn Progress,
) -> Result<BenchOutcome> {
    let known = model.known_shape()?;
    let ranks = backend.ranks();
    let temporary = tempfile::tempdir()?;
    let directory = model.directory.as_deref().unwrap_or(temporary.path());
    // That of the first rank, for all.
    let directory = ranks.broadcast(0, directory.as_os_str().as_bytes().to_vec())?;
    let directory = PathBuf::from(OsString::from_vec(directory));
    let source = directory.join(&model.shape);
    if ranks.is_first() {
        if source.exists() {
            return Err(Error::usage(format!("{} exists already", source.display()))
                .hint("name another directory with --dir"));
        }
        progress.info(&format!("writing random weights to {}", source.display()));
        model.write(&source)?;
    }
    ranks.barrier()?;
    let source = Source::open(&source)?;
    let architecture = Architecture::read(source.config(), &source.config_file())?;
    let tokens = model.samples * model.seq_len;
    let rate = products(backend, &architecture, tokens.min(RATE_TOKENS))?;
    backend.trim();

    let calibration = Calibration {
        text: TextSet::sample_of_length(Split::Calibration, text_bytes(model)),
        samples: model.samples,
        seq_len: model.seq_len,
        seed: 0,
    };
    let out = directory.join(format!("{}-atom", model.shape));
    let output = output_to(out);
    let quantization = Quantization {
        source: &source,
        calibration: &calibration,
        recipe,
        output: &output,
        evaluation: None,
    };
    let outcome = run(backend, &quantization, progress)?;

    let figure = |name: &str, value: Value| Figure { figure: name.to_owned(), value, share: None };
    let mut figures = vec![
        figure("device", json!(outcome.device)),
        figure("ranks", json!(ranks.ranks())),
        figure("product rate TFLOP/s", json!(rate / 1e12)),
        figure("seconds", json!(outcome.seconds)),
    ];
    let blocks = architecture.blocks as f64;
    for stage in &outcome.stage_seconds {
        let operations = stage_operations(&stage.stage, &architecture, model, recipe);
        figures.push(Figure {
            figure: format!("{} seconds", stage.stage),
            value: json!(stage.seconds),
            share: operations.map(|operations| operations / stage.seconds / rate),
        });
    }
    figures.push(figure("seconds a block", json!(outcome.seconds / blocks)));
    if known.blocks != architecture.blocks {
        let total = outcome.seconds / blocks * known.blocks as f64;
        figures.push(figure(&format!("seconds a block x {}", known.blocks), json!(total)));
    }
    figures.extend(sizes(&outcome).map(|(name, value)| figure(name, value)));
    if let Some(tokens) = distilled {
        figures.extend(distillation(
            backend,
            &source,
            &outcome.out,
            (model.seq_len, tokens),
            progress,
        )?);
    }
    figures.extend(evaluation(backend, &source, model, rate, progress)?);
    let kernels = backend.kernel_seconds().into_iter();
    figures.extend(kernels.map(|(name, seconds)| figure(&name, json!(seconds))));
    Ok(BenchOutcome::of(&figures))
}

fn output_to(out: PathBuf) -> Output {
    let destination = Destination { out, overwrite: false, inputs: Inputs::default() };
    Output { destination, resume: false }
}

/// Distills the checkpoint: seconds of all and of a step, and memory. Random weights have nothing to gain, so that its size and
/// not its result is measured.
fn distillation<B: Train + Device>(
    backend: &B,
    source: &Source,
    quantized: &Path,
    (seq_len, tokens): (usize, usize),
    progress: &dyn Progress,
) -> Result<Vec<Figure>> {
    backend.trim();
    backend.restart_peak();
    let text = TextSet::sample(Split::Calibration);
    let mut out = quantized.as_os_str().to_owned();
    out.push("-distilled");
    let distillation = Distillation {
        checkpoint: &AtomCheckpoint::open(quantized)?,
        source,
        windows: DistillationWindows::Drawn { text: &text, seq_len, seed: 0 },
        tokens,
        rates: RATES,
        output: &output_to(out.into()),
        always_writes: true,
    };
    let outcome = distill(backend, &distillation, progress)?;
    let figure = |name: &str, value: Value| Figure { figure: name.to_owned(), value, share: None };
    Ok(vec![
        figure("distill seconds", json!(outcome.seconds)),
        figure("distill steps", json!(outcome.steps)),
        figure("seconds a step", json!(outcome.step_seconds)),
        figure("distill peak RSS bytes", json!(outcome.peak_rss_bytes)),
        figure("distill peak device bytes", json!(outcome.peak_gpu_bytes)),
    ])
}

fn sizes(outcome: &QuantizeOutcome) -> [(&'static str, Value); 5] {
    [
        ("peak RSS bytes", json!(outcome.peak_rss_bytes)),
        ("peak device bytes", json!(outcome.peak_gpu_bytes)),
        ("bytes read", json!(outcome.source_bytes)),
        ("bytes written", json!(outcome.out_bytes)),
        ("bits per weight", json!(outcome.bits_per_weight)),
    ]
}

/// Bytes of a text that holds all windows. The sample is short; how often it comes does not change the work.
fn text_bytes(model: &SyntheticModel) -> usize {
    8 * model.samples * model.seq_len
}

/// Perplexity of the source on as many windows as it was calibrated on: tokens a second, and the share
/// of the products' rate.
fn evaluation<B: Backend>(
    backend: &B,
    source: &Source,
    model: &SyntheticModel,
    rate: f64,
    progress: &dyn Progress,
) -> Result<[Figure; 2]> {
    let text = TextSet::sample_of_length(Split::Evaluation, text_bytes(model));
    let (seq_len, windows) = (model.seq_len, Some(model.samples));
    let evaluation = Evaluation { text, seq_len, windows };
    let architecture = Architecture::read(source.config(), &source.config_file())?;
    let outcome = source_perplexity(backend, source, &evaluation, progress)?;
    let head = 2.0 * (architecture.hidden * architecture.vocabulary) as f64;
    let operations = product_operations(&architecture) * architecture.blocks as f64 + head;
    Ok([
        Figure {
            figure: "eval-ppl seconds".to_owned(),
            value: json!(outcome.seconds),
            share: Some(operations * outcome.tokens_per_second / rate),
        },
        Figure {
            figure: "eval-ppl tokens/s".to_owned(),
            value: json!(outcome.tokens_per_second),
            share: None,
        },
    ])
}

/// Multiplications and additions of a stage, where it consists of them.
fn stage_operations(
    stage: &str,
    architecture: &Architecture,
    model: &SyntheticModel,
    recipe: &Recipe,
) -> Option<f64> {
    let tokens = (model.samples * model.seq_len) as f64;
    let blocks = architecture.blocks as f64;
    let sites = architecture.sites(0);
    let attention = attention_operations(architecture, model.seq_len);
    let pass = product_operations(architecture) + attention;
    let sparse = architecture.experts_of(0).is_some();
    let of = |kind: SiteKind| -> f64 {
        let own = sites.iter().filter(|site| site.kind == kind);
        own.map(|site| site_operations(architecture, site)).sum()
    };
    let [attn_in, attn_out] = [SiteKind::AttnIn, SiteKind::AttnOut].map(of);
    let [mlp_in, mlp_act] = [SiteKind::MlpIn, SiteKind::MlpAct].map(of);
    // Of `rows` of a matrix as wide as each site: half of x^T x, which is symmetric, is as many as the site has channels.
    let sums = |rows: &dyn Fn(&SiteSpec) -> usize| -> f64 {
        let of_site = |site: &SiteSpec| {
            let share =
                if site.kind == SiteKind::MlpAct { expert_share(architecture) } else { 1.0 };
            share * rows(site) as f64 * site.channels as f64
        };
        sites.iter().map(of_site).sum()
    };
    let squares = sums(&|site| site.channels);
    let in_turn = recipe.gptq && recipe.sequential;
    let corrected = in_turn && recipe.correction > 0.0;
    match stage {
        "calibrate" => Some(blocks * tokens * pass),
        "propagate" if in_turn => {
            let mlp = if sparse { mlp_in + mlp_act } else { mlp_act };
            Some(tokens * (blocks * attn_out + (blocks - 1.0) * mlp))
        }
        "propagate" if recipe.gptq => Some((blocks - 1.0) * tokens * pass),
        "hessians" if in_turn => {
            let pass = attn_in + attention + mlp_in;
            // Accumulated errors are of the inputs of several linears, or of the outputs of one.
            let correction = sums(&|site| match site.linears.len() {
                1 => architecture.hidden,
                _ => site.channels,
            });
            // What the source's experts compute of the tokens that the quantized block's router sends to them.
            let source = if sparse { mlp_in + mlp_act } else { 0.0 };
            let correction = if corrected { 2.0 * correction + source } else { 0.0 };
            Some(blocks * tokens * (pass + squares + correction))
        }
        "hessians" => Some(blocks * tokens * (pass - mlp_act + squares)),
        "gptq" => {
            let site = |site: &SiteSpec| {
                let rows: usize = site.linears.iter().map(|linear| linear.rows).sum();
                let n = site.channels as f64;
                // The factor, the sweep, and the quadratic form of the weights; the accumulated error's product and solution.
                let correction = if corrected { 4.0 } else { 0.0 };
                n.powi(3) / 3.0 + (3.0 + correction) * rows as f64 * n * n
            };
            Some(blocks * sites.iter().map(site).sum::<f64>())
        }
        _ => None,
    }
}
