/*! `atom bench gemm`: the integer product at the shapes of known models, compared with cuBLASLt's products in f16, INT8
and FP8 and with a plain read of the same bytes.

Everything is on random data and by medians of graph replays, over operand sets that are used one after another, so that
none is in L2 when it is used again. Of cuBLASLt's kernels the fastest counts, found by trying those that its
heuristic names: a user who takes the first is slower. Clocks are left as they are. */

use serde::Serialize;
use serde_json::{Map, json};

use super::cpu::{Product, identity_site};
use super::device::Timer;
use super::svg::{Chart, Series};
use super::{BenchOutcome, GemmModel};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::gpu::Buffer;
use crate::backend::cuda::measure::Random;
use crate::backend::cuda::product::{Operand, Precision, Product as CublasProduct};
use crate::backend::cuda::tensor::{DeviceRows, DeviceSite, PackedLinear};
use crate::backend::cuda::timing::rotation;
use crate::backend::{Memory, Quantization, Unquantized};
use crate::progress::Progress;
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::number::{LinearFormat, NumberFormat, RowFormat};
use crate::quant::site::SiteFormat;
use crate::{Error, Result};

/// Up to so many tokens a product is bound by memory, and its part of a read's rate is reported.
const FEW_TOKENS: usize = 64;
/// Kernels of cuBLASLt that are tried.
const CHOICES: usize = 8;
/// Bytes of the read and the copy that the device's rates are measured by.
const STREAMED_BYTES: usize = 1 << 30;

/// What is measured.
#[derive(Clone, Debug)]
pub struct GemmSettings {
    /// Models whose linears are measured.
    pub models: Vec<GemmModel>,
    /// Tokens of each product.
    pub tokens: Vec<usize>,
    /// Channels that share a scale.
    pub group_size: usize,
    /// Outlier channels in INT8.
    pub outliers: usize,
    /// What 4-bit codes stand for.
    pub codebook: Codebook,
    /// Bits of a weight.
    pub bits: u8,
    /// Bits of an activation.
    pub act_bits: u8,
}

impl GemmSettings {
    /// Checks the formats for every linear.
    ///
    /// # Errors
    /// A usage error where there are no such formats.
    pub fn check(&self) -> Result<()> {
        let mut linears = self.models.iter().flat_map(GemmModel::linears);
        linears.try_for_each(|(_, _, channels)| self.formats(channels).map(drop))
    }

    /// A site and its weights in these formats.
    ///
    /// # Errors
    /// A usage error where there are no such formats.
    fn formats(&self, channels: usize) -> Result<(SiteFormat, LinearFormat)> {
        let usage =
            |what: String| Error::usage(what).hint("`atom bench gemm --help` shows the flags");
        for bits in [self.bits, self.act_bits] {
            let codebook = self.codebook_of(bits);
            if !codebook.has_bits(bits) {
                return Err(usage(format!(
                    "there are no {} codes of {bits} bits",
                    codebook.name()
                )));
            }
        }
        if self.outliers >= channels {
            let outliers = self.outliers;
            return Err(usage(format!("{outliers} outliers leave nothing of {channels} channels")));
        }
        let mut site = identity_site(channels, self.group_size, self.outliers);
        let (bits, codebook) = (self.act_bits, self.codebook_of(self.act_bits));
        site.row.numbers = NumberFormat { bits, codebook, ..site.row.numbers };
        site.check().map_err(|error| usage(error.to_string()))?;
        let weights = site.row.weights(self.bits, self.codebook_of(self.bits), 1);
        Ok((site, weights))
    }

    /// FP4 has 4 bits; other widths next to it are integers, as in a recipe.
    fn codebook_of(&self, bits: u8) -> Codebook {
        if bits == 4 { self.codebook } else { Codebook::Int }
    }

    /// `w4a4 g128 o128 int`.
    fn name(&self) -> String {
        let Self { bits, act_bits, group_size, outliers, codebook, .. } = self;
        format!("w{bits}a{act_bits} g{group_size} o{outliers} {}", codebook.name())
    }
}

/// Bytes that a product in these formats reads and writes at least.
fn least_bytes(site: &SiteFormat, weights: &LinearFormat, Product { m, n, .. }: Product) -> usize {
    let row = |format: &RowFormat| {
        let outliers = format.outlier_channels;
        let scales = format.groups + usize::from(outliers > 0);
        let codes = format.grouped_channels() * usize::from(format.numbers.bits) / 8;
        codes + outliers + 2 * scales
    };
    n * row(&weights.row) + m * row(&site.row) + 2 * m * n
}

/// One product, times in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct GemmRow {
    /// Model and linear.
    pub name: String,
    /// Tokens.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Of the integer product.
    pub us: f64,
    /// Of cuBLASLt in f16.
    pub fp16_us: Option<f64>,
    /// Of cuBLASLt in INT8; none where it has no kernel.
    pub int8_us: Option<f64>,
    /// Of cuBLASLt in FP8; none where it has no kernel.
    pub fp8_us: Option<f64>,
    /// How many times as fast as f16 the integer product is.
    pub vs_fp16: Option<f64>,
    /// As INT8.
    pub vs_int8: Option<f64>,
    /// As FP8.
    pub vs_fp8: Option<f64>,
    /// 10^12 multiplications and additions a second of the integer product.
    pub tflops: f64,
    /// What is reached of the rate of a plain read of as many bytes as the formats take; for few tokens.
    pub read_share: Option<f64>,
    /// What is reached of the best rate of cuBLASLt in FP8 in the same run.
    pub fp8_peak_share: Option<f64>,
}

/// The result of `atom bench gemm`.
pub struct GemmOutcome {
    rows: Vec<GemmRow>,
    facts: Map<String, serde_json::Value>,
}

impl GemmOutcome {
    /// Rows and facts as every measurement has them.
    pub fn outcome(&self) -> BenchOutcome {
        BenchOutcome { facts: self.facts.clone(), ..BenchOutcome::of(&self.rows) }
    }

    /// How many times as fast as f16, against tokens, a line for each linear.
    pub fn chart(&self) -> Chart {
        let point = |row: &GemmRow| Some((row.name.clone(), (row.m as f64, row.vs_fp16?)));
        let series = Series::by_name(self.rows.iter().filter_map(point));
        let fact = |key: &str| self.facts.get(key).and_then(|value| value.as_str()).unwrap_or("");
        Chart {
            title: format!("{} against cuBLASLt fp16, {}", fact("format"), fact("device")),
            x_title: "tokens".to_owned(),
            y_title: "times as fast".to_owned(),
            doubling_x: true,
            mark: Some((1.0, "cuBLASLt fp16".to_owned())),
            series,
        }
    }
}

/// Measures every linear of the models with every number of tokens.
pub fn gemm(cuda: &Cuda, settings: &GemmSettings, progress: &dyn Progress) -> Result<GemmOutcome> {
    let linears: Vec<_> = settings.models.iter().flat_map(GemmModel::linears).collect();
    settings.check()?;
    let timer = Timer { cuda };
    let mut rows = Vec::new();
    progress.begin("bench gemm", linears.len());
    for (name, n, k) in linears {
        let times = measure(&timer, settings, n, k, progress)?;
        rows.extend(times.into_iter().map(|times| times.row(&name)));
        progress.advance(&name);
    }
    progress.end();

    let rate = |row: &GemmRow, us: f64| 2.0 * (row.m * row.n) as f64 * row.k as f64 / us / 1e6;
    let fp8 = rows.iter().filter_map(|row| Some(rate(row, row.fp8_us?)));
    let fp8_peak = fp8.fold(None, |best: Option<f64>, rate| Some(best.unwrap_or(0.0).max(rate)));
    for row in &mut rows {
        row.fp8_peak_share = fp8_peak.map(|peak| row.tflops / peak);
    }
    let read = STREAMED_BYTES as f64 / timer.read(STREAMED_BYTES)?;
    let copy = 2.0 * STREAMED_BYTES as f64 / timer.copy(STREAMED_BYTES)?;
    let facts = [
        ("device", json!(cuda.device())),
        ("format", json!(settings.name())),
        ("codes of 4 bits by", json!(cuda.multiplies_by())),
        ("plain read TB/s", json!(read / 1e12)),
        ("plain copy TB/s", json!(copy / 1e12)),
        ("best fp8 of cuBLASLt TFLOP/s", json!(fp8_peak)),
    ];
    let facts = facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Ok(GemmOutcome { rows, facts })
}

/// Seconds of one product.
struct Times {
    product: Product,
    ours: f64,
    /// f16, INT8, FP8.
    library: [Option<f64>; 3],
    /// Of a plain read of the bytes that the formats take.
    read: Option<f64>,
}

impl Times {
    fn row(&self, name: &str) -> GemmRow {
        let Self { product: Product { m, n, k }, ours, library, read } = *self;
        let us = |seconds: f64| seconds * 1e6;
        GemmRow {
            name: name.to_owned(),
            m,
            n,
            k,
            us: us(ours),
            fp16_us: library[0].map(us),
            int8_us: library[1].map(us),
            fp8_us: library[2].map(us),
            vs_fp16: library[0].map(|seconds| seconds / ours),
            vs_int8: library[1].map(|seconds| seconds / ours),
            vs_fp8: library[2].map(|seconds| seconds / ours),
            tflops: 2.0 * (m * n) as f64 * k as f64 / ours / 1e12,
            read_share: read.map(|seconds| seconds / ours),
            fp8_peak_share: None,
        }
    }
}

/// One linear with every number of tokens.
fn measure(
    timer: &Timer,
    settings: &GemmSettings,
    n: usize,
    k: usize,
    progress: &dyn Progress,
) -> Result<Vec<Times>> {
    let (site_format, weight_format) = settings.formats(k)?;
    let products = settings.tokens.iter().map(|&m| Product { m, n, k });
    let mut times: Vec<Times> = products
        .map(|product| Times { product, ours: 0.0, library: [None; 3], read: None })
        .collect();
    {
        let site = timer.cuda.site(&site_format)?;
        let of_weights = least_bytes(&site_format, &weight_format, Product { m: 0, n, k });
        let weights = (0..rotation(of_weights))
            .map(|set| packed(timer.cuda, &site, weight_format, n, k, set))
            .collect::<Result<Vec<_>>>()?;
        timer.settle()?;
        for times in &mut times {
            progress.check_stop()?;
            times.ours = integer(timer, &site, &weights, times.product)?;
            if times.product.m <= FEW_TOKENS {
                let bytes = least_bytes(&site_format, &weight_format, times.product);
                times.read = Some(timer.read(bytes.next_multiple_of(16))?);
            }
        }
    }
    for (at, (precision, random)) in BASELINES.into_iter().enumerate() {
        let bytes = precision.bytes().0 * n * k;
        let weights = (0..rotation(bytes))
            .map(|set| timer.cuda.random(random, bytes, set))
            .collect::<Result<Vec<_>>>()?;
        timer.settle()?;
        for times in &mut times {
            progress.check_stop()?;
            times.library[at] = library(timer, precision, random, &weights, times.product)?;
        }
    }
    Ok(times)
}

const BASELINES: [(Precision, Random); 3] = [
    (Precision::HalfToHalf, Random::Half),
    (Precision::Int8, Random::Int8),
    (Precision::Fp8, Random::Fp8),
];

/// A random weight, quantized and laid out for the kernels.
fn packed(
    cuda: &Cuda,
    site: &DeviceSite,
    format: LinearFormat,
    rows: usize,
    columns: usize,
    seed: usize,
) -> Result<PackedLinear> {
    let weight = &cuda.random_weight(rows, columns, seed)?;
    let linear =
        Unquantized { name: "a random weight", weight, format, scaling: Scaling::clipped(1.0) };
    let quantized = cuda.round(&linear, site)?;
    cuda.pack(&quantized, None)
}

/// As many as are used one after another, but no more than there are weights.
fn sets<T>(bytes: usize, weights: usize, make: impl Fn(usize) -> Result<T>) -> Result<Vec<T>> {
    (0..rotation(bytes).min(weights)).map(make).collect()
}

fn integer(
    timer: &Timer,
    site: &DeviceSite,
    weights: &[PackedLinear],
    Product { m, n, k }: Product,
) -> Result<f64> {
    let cuda = timer.cuda;
    let activations =
        |set| cuda.quantize(&cuda.random_activations(m, k, set)?, site, "random values");
    let x: Vec<DeviceRows> = sets(m * k, weights.len(), activations)?;
    let to: Vec<Buffer> = sets(2 * m * n, weights.len(), |_| cuda.gpu().alloc(2 * m * n))?;
    timer.seconds(weights.len(), |set| {
        cuda.integer_into(&x[set % x.len()], &weights[set], &to[set % to.len()], true)
    })
}

/// By the fastest kernel of cuBLASLt; none where it has none.
fn library(
    timer: &Timer,
    precision: Precision,
    random: Random,
    weights: &[Buffer],
    Product { m, n, k }: Product,
) -> Result<Option<f64>> {
    let cuda = timer.cuda;
    let (inputs, outputs) = precision.bytes();
    let (x_bytes, to_bytes) = (inputs * m * k, outputs * m * n);
    let x = sets(x_bytes, weights.len(), |set| cuda.random(random, x_bytes, set))?;
    let to = sets(to_bytes, weights.len(), |_| cuda.gpu().alloc(to_bytes))?;
    let operand = |memory, stride, transposed| Operand { memory, stride, transposed };
    // Column-major: `y^T = w x^T`.
    let product = |set: usize| CublasProduct {
        m: n,
        n: m,
        k,
        a: operand((&weights[set]).into(), k, true),
        b: operand((&x[set % x.len()]).into(), k, false),
        c: operand((&to[set % to.len()]).into(), n, false),
        add: false,
        precision,
    };
    let products = cuda.products();
    let plan = products.plan(&product(0), CHOICES)?;
    timer.fastest(plan.choices(), weights.len(), |choice, set| {
        products.run_choice(&product(set), &plan, choice)
    })
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
