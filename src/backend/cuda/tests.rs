//! Every operation beside the CPU's, over odd shapes. Fresh device memory is filled with NaN (gpu.rs),
//! so what a kernel does not write shows.

use half::f16;

use super::tensor::{Activation, Hessian, Hidden, Layout, Quantized, Rows, Values};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{
    AccumulatedError, AttentionSpec, Calibration, Damping, Forward, Matrix, Measurement, Memory,
    Qkv, Quantization, Unquantized,
};
use crate::checkpoint::{Dtype, Tensor as Stored};
use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::rows::QuantizedRows;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::weights::dequantize;

/// The first device; none, loudly, where there is no driver. Whatever else is missing fails.
pub(crate) fn device(test: &str) -> Option<Cuda> {
    match libraries::driver() {
        Ok(_) => Some(Cuda::open(0, None).unwrap()),
        Err(error) => {
            skipped(test, &error.to_string());
            None
        }
    }
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// About normal, of deviation 1, exact in f16.
    pub(super) fn value(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.next() as f32 / (1u32 << 31) as f32 - 0.5).sum();
        f16::from_f32(sum * 1.7).to_f32()
    }

    pub(super) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// Activations of a few directions and some noise: feedback from channel to channel is most of what
    /// GPTQ does on them.
    fn correlated(&mut self, rows: usize, columns: usize) -> Matrix {
        const DIRECTIONS: usize = 8;
        let own = self.activations(rows, columns);
        let directions = self.values(DIRECTIONS * columns);
        let mut data = own.data;
        for row in data.chunks_mut(columns) {
            let weights = self.values(DIRECTIONS);
            for (column, value) in row.iter_mut().enumerate() {
                let shared = weights.iter().enumerate();
                let shared = shared.map(|(at, weight)| weight * directions[at * columns + column]);
                *value = f16::from_f32(0.3 * *value + 3.0 * shared.sum::<f32>()).to_f32();
            }
        }
        Matrix { rows, columns, data }
    }

    /// Channels of very different magnitudes, as activations have them.
    pub(super) fn activations(&mut self, rows: usize, columns: usize) -> Matrix {
        let scales: Vec<f32> = (0..columns).map(|_| (self.value() * 1.5).exp()).collect();
        let data = (0..rows * columns)
            .map(|at| f16::from_f32(self.value() * scales[at % columns]).to_f32())
            .collect();
        Matrix { rows, columns, data }
    }
}

/// What a test looks at.
pub(super) trait OnHost {
    fn on_host(&self, cuda: &Cuda) -> Matrix;
}

impl OnHost for Hidden {
    fn on_host(&self, cuda: &Cuda) -> Matrix {
        cuda.download(self).unwrap()
    }
}

impl OnHost for Activation {
    fn on_host(&self, cuda: &Cuda) -> Matrix {
        cuda.download_activation(self).unwrap()
    }
}

/// A target for each row.
fn targets(tokens: &[u32]) -> Vec<(u32, u32)> {
    (0..).zip(tokens.iter().copied()).collect()
}

impl Cuda {
    pub(super) fn half_tensor(&self, matrix: &Matrix) -> Activation {
        self.upload_activation(matrix.clone()).unwrap()
    }

    pub(super) fn values(&self, tensor: &impl OnHost) -> Vec<f32> {
        tensor.on_host(self).data
    }

    /// Codes and scales, after a look at what lies behind the outliers.
    pub(super) fn rows_on_host(&self, rows: &Rows) -> QuantizedRows {
        if let (Some(codes), Layout::RowMajor) = (&rows.outliers.codes, rows.layout) {
            let (channels, padded) = (rows.outliers.channels, rows.outliers.padded());
            let codes = codes.download::<i8>(0..rows.tokens * padded).unwrap();
            assert!(codes.chunks(padded).all(|row| row[channels..].iter().all(|&c| c == 0)));
        }
        let fetched = self.fetch_rows(rows).unwrap();
        let again = self.restore_rows(&fetched).unwrap();
        assert_eq!(self.fetch_rows(&again).unwrap(), fetched, "there and back");
        fetched
    }
}

/// `|a - b| <= share * max |b|` everywhere, and no NaN.
pub(super) fn close(found: &[f32], expected: &[f32], share: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let near = (found - expected).abs() <= share * most;
        assert!(near, "{what}: {found} for {expected} at {at}, greatest {most}");
    }
}

fn bytes_of(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

pub(super) fn site(
    channels: usize,
    group_size: usize,
    outliers: usize,
    bits: u8,
    transform: Transform,
    outlier_format: OutlierFormat,
    random: &mut Random,
) -> SiteFormat {
    let energy: Vec<f64> = (0..channels).map(|_| f64::from(random.next())).collect();
    // Signed and not, among sites of one shape or another.
    let signed = channels.is_multiple_of(16) || outliers == 4;
    let scale = if signed { ScaleFormat::SignedF16 } else { ScaleFormat::F16 };
    let row = RowFormat {
        numbers: NumberFormat { bits, codebook: Codebook::Int, group_size, scale },
        groups: (channels - outliers).div_ceil(group_size),
        outlier_channels: outliers,
        outlier_format,
    };
    let order = channel_order(&energy, true, outliers, group_size);
    let format = SiteFormat { channels, order, row, clip: 0.9, transform };
    format.check().unwrap();
    format
}

/// Sites of odd widths, groups and outliers.
fn sites(random: &mut Random) -> Vec<SiteFormat> {
    let fp4 = fp4_sites(random);
    use OutlierFormat::{F16, Fp8, Int8};
    use Transform::{Hadamard, None};
    [
        (1, 16, 0, 4, None, Int8),
        (64, 64, 0, 4, Hadamard, Int8),
        (172, 176, 0, 4, None, Int8),
        (172, 16, 5, 8, Hadamard, Int8),
        (172, 48, 4, 3, Hadamard, F16),
        (576, 64, 64, 4, Hadamard, Int8),
        (576, 128, 33, 4, None, F16),
        (576, 32, 0, 2, Hadamard, Int8),
        (1000, 96, 40, 4, Hadamard, Int8),
        (1536, 256, 128, 8, Hadamard, Int8),
        (2100, 1024, 1, 4, Hadamard, Int8),
        (4096, 3968, 128, 4, None, Int8),
        (11008, 128, 128, 4, Hadamard, Int8),
        (172, 32, 12, 4, Hadamard, Fp8),
        (1000, 96, 40, 8, None, Fp8),
    ]
    .into_iter()
    .map(|(channels, group, outliers, bits, transform, format)| {
        site(channels, group, outliers, bits, transform, format, random)
    })
    .chain(fp4)
    .collect()
}

/// Sites whose activations are FP4: two rows a block, one, groups in shared memory, a whole row.
fn fp4_sites(random: &mut Random) -> Vec<SiteFormat> {
    use OutlierFormat::{F16, Fp8, Int8};
    use Transform::{Hadamard, None};
    [
        (1, 16, 0, None, Int8),
        (172, 16, 5, Hadamard, Fp8),
        (172, 48, 4, None, F16),
        (172, 176, 0, Hadamard, Int8),
        (576, 64, 64, Hadamard, Int8),
        (1000, 128, 33, Hadamard, Fp8),
        (2100, 1024, 1, None, Int8),
    ]
    .into_iter()
    .map(|(channels, group, outliers, transform, format)| {
        site(channels, group, outliers, 4, transform, format, random)
            .with(|format| format.row.numbers.codebook = Codebook::Fp4)
    })
    .collect()
}

#[test]
fn norms_activations_and_sums_agree_with_the_cpu() {
    let Some(cuda) = device("norms_activations_and_sums_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(1);
    for (rows, columns) in [(1, 1), (3, 2), (7, 64), (5, 172), (33, 576), (2, 11008), (300, 30)] {
        let what = format!("{rows} x {columns}");
        let x = random.activations(rows, columns);
        let y = random.activations(rows, columns);
        let weight = Matrix { rows: 1, columns, data: random.values(columns) };

        let (host, device) = (cpu.upload(x.clone()).unwrap(), cuda.upload(x.clone()).unwrap());
        let norm = |b: &Matrix| (cpu.upload(b.clone()).unwrap(), cuda.upload(b.clone()).unwrap());
        let (host_weight, device_weight) = norm(&weight);
        let expected = cpu.rms_norm(&host, &host_weight, 1e-5).unwrap();
        let found = cuda.rms_norm(&device, &device_weight, 1e-5).unwrap();
        close(&cuda.values(&found), expected.values(), 6e-4, &format!("norm {what}"));

        let (mut host, mut device) = (host, device);
        cpu.add(&mut host, &cpu.upload(y.clone()).unwrap()).unwrap();
        cuda.add(&mut device, &cuda.half_tensor(&y)).unwrap();
        assert_eq!(cuda.values(&device), host.values(), "sum {what}");
        let copy = cuda.duplicate(&device).unwrap();
        assert_eq!(cuda.values(&copy), host.values(), "copy {what}");

        let up = cpu.upload(y.clone()).unwrap();
        let expected = cpu.silu_mul(cpu.upload(x.clone()).unwrap(), &up).unwrap();
        let found = cuda.silu_mul(cuda.half_tensor(&x), &cuda.half_tensor(&y)).unwrap();
        close(&cuda.values(&found), expected.values(), 1e-3, &format!("silu {what}"));

        let (mut host, mut device) = (cpu.upload(y.clone()).unwrap(), cuda.half_tensor(&y));
        cpu.add_bias(&mut host, &host_weight).unwrap();
        cuda.add_bias(&mut device, &device_weight).unwrap();
        close(&cuda.values(&device), host.values(), 6e-4, &format!("bias {what}"));

        // Of rows, from the last on, every second one.
        let taken: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let shares = random.values(taken.len());
        let own = cuda.select_rows(&cuda.half_tensor(&y), &taken).unwrap();
        let of_host = cpu.select_rows(&cpu.upload(y.clone()).unwrap(), &taken).unwrap();
        assert_eq!(cuda.values(&own), of_host.values(), "rows {what}");
        let (mut host, mut device) =
            (cpu.upload(x.clone()).unwrap(), cuda.upload(x.clone()).unwrap());
        cpu.add_rows(&mut host, &of_host, &taken, &shares).unwrap();
        cuda.add_rows(&mut device, &own, &taken, &shares).unwrap();
        close(&cuda.values(&device), host.values(), 1e-6, &format!("sum of rows {what}"));

        for head_dim in [columns, columns / 2].into_iter().filter(|n| *n > 0 && columns % n == 0) {
            let row = matrix_row(&mut random, head_dim);
            let (mut host, mut device) = (cpu.upload(y.clone()).unwrap(), cuda.half_tensor(&y));
            cpu.qk_norm(&mut host, &cpu.upload(row.clone()).unwrap(), 1e-6).unwrap();
            cuda.qk_norm(&mut device, &cuda.upload(row).unwrap(), 1e-6).unwrap();
            close(&cuda.values(&device), host.values(), 1e-3, &format!("heads {what}"));
        }

        let (mut host_energy, mut energy) = (vec![1.0; columns], vec![1.0; columns]);
        cpu.add_energy(&cpu.upload(x.clone()).unwrap(), &mut host_energy).unwrap();
        cuda.add_energy(&cuda.half_tensor(&x), &mut energy).unwrap();
        for (found, expected) in energy.iter().zip(&host_energy) {
            assert!((found / expected - 1.0).abs() < 1e-5, "energy {what}: {found} {expected}");
        }
    }
}

#[test]
fn embeddings_and_products_agree_with_the_cpu() {
    let Some(cuda) = device("embeddings_and_products_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(2);
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        for (m, n, k) in [(1, 1, 1), (1, 7, 64), (5, 172, 172), (33, 64, 577), (130, 300, 1536)] {
            let what = format!("{m} x {n} x {k} {dtype:?}");
            let bytes = bytes_of(&random.values(n * k), dtype);
            let shape = [n, k];
            let stored = Stored::in_memory("w", dtype, &shape, &bytes);
            let (host, weight) = (cpu.load(stored).unwrap(), cuda.load(stored).unwrap());
            let x = Matrix { rows: m, columns: k, data: random.values(m * k) };
            let expected =
                cpu.product(&cpu.upload(x.clone()).unwrap(), &cpu.dense(&host, None).unwrap());
            let dense = cuda.dense(&weight, None).unwrap();
            let found = cuda.product(&cuda.half_tensor(&x), &dense).unwrap();
            let expected = expected.unwrap();
            close(&cuda.values(&found), expected.values(), 1e-3, &what);
            let ones = Matrix { rows: m, columns: n, data: vec![1.0; m * n] };
            let mut sum = cuda.upload(ones).unwrap();
            cuda.add_product(&mut sum, &cuda.half_tensor(&x), &dense).unwrap();
            let expected: Vec<f32> = expected.values().iter().map(|value| value + 1.0).collect();
            close(&cuda.values(&sum), &expected, 1e-3, &format!("1 + {what}"));

            let tokens: Vec<u32> = (0..m).map(|i| (i * 5 % n) as u32).collect();
            let expected = cpu.embed(&host, &tokens).unwrap();
            let found = cuda.embed(&weight, &tokens).unwrap();
            assert_eq!(cuda.values(&found), expected.values(), "embed {what}");
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let Some(cuda) = device("weights_that_are_not_finite_are_named") else { return };
    let shape = [3, 50];
    for (value, dtype) in
        [(f32::NAN, Dtype::F32), (f32::INFINITY, Dtype::BF16), (f32::NAN, Dtype::F16)]
    {
        let mut values = vec![1.0; 150];
        values[107] = value;
        let bytes = bytes_of(&values, dtype);
        let error = cuda.load(Stored::in_memory("w", dtype, &shape, &bytes)).err().unwrap();
        assert_eq!(error.message(), format!("tensor `w` holds {value} at [2, 7]"));
    }
    let mut values = vec![1.0; 150];
    values[149] = 1e6;
    let bytes = bytes_of(&values, Dtype::F32);
    let weight = cuda.load(Stored::in_memory("w", Dtype::F32, &shape, &bytes)).unwrap();
    let error = cuda.dense(&weight, None).err().unwrap();
    assert!(error.message().contains("row 2, column 49"), "{error}");
}

#[test]
fn codes_and_scales_are_the_cpus_bits() {
    let Some(cuda) = device("codes_and_scales_are_the_cpus_bits") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(3);
    for format in sites(&mut random) {
        for tokens in [1, 6, 67] {
            let what =
                format!("{tokens} of {} in {}", format.channels, format.row.numbers.group_size);
            let mut x = random.activations(tokens, format.channels);
            // A group of zeros.
            x.data[..format.channels.min(16)].fill(0.0);
            let site = cuda.site(&format).unwrap();
            let host = cpu.upload(x.clone()).unwrap();
            let expected = cpu.quantize(&host, &format, "").unwrap();
            let tensor = cuda.half_tensor(&x);
            let rows = cuda.quantize(&tensor, &site, "").unwrap();
            assert_eq!(cuda.rows_on_host(&rows), expected, "{what}");
            let values = cuda.dequantize(&rows).unwrap();
            let expected = cpu.dequantize(&expected).unwrap();
            close(&cuda.values(&values), expected.values(), 5e-4, &what);
            let permuted = cuda.permute(&tensor, &site).unwrap();
            let expected = cpu.permute(&host, &format).unwrap();
            close(&cuda.values(&permuted), expected.values(), 5e-4, &what);
        }
    }
    let format = &sites(&mut random)[1];
    let mut x = random.activations(4, 64);
    x.data[2 * 64 + 3] = f32::NAN;
    let site = cuda.site(format).unwrap();
    // Whoever waits is told, once, of the first.
    let _sound = cuda.quantize(&cuda.half_tensor(&random.activations(4, 64)), &site, "a").unwrap();
    for name in ["b", "c"] {
        let _unsound = cuda.quantize(&cuda.half_tensor(&x), &site, name).unwrap();
    }
    let error = cuda.wait().err().unwrap();
    assert!(error.message().contains("activations of b: the activation of token 2 "), "{error}");
    cuda.wait().unwrap();
    // More kernels than there are cells.
    for _ in 0..1100 {
        let _rows =
            cuda.quantize(&cuda.half_tensor(&random.activations(1, 64)), &site, "d").unwrap();
    }
    cuda.wait().unwrap();
}

/// A weight of random codes behind a site.
pub(super) fn random_codes(
    format: &LinearFormat,
    rows: usize,
    random: &mut Random,
) -> QuantizedLinear {
    let weights = random.values(rows * format.row.width());
    crate::quant::weights::round_to_nearest(&weights, rows, format, 0.85).unwrap()
}

#[test]
fn integer_products_are_the_cpus_bits() {
    let Some(mut cuda) = device("integer_products_are_the_cpus_bits") else { return };
    // Every device computes with nibbles, if need be by other instructions.
    for narrow in [Narrow::Bytes, Narrow::Nibbles] {
        cuda.narrow = narrow;
        products_are_the_cpus_bits(&cuda);
    }
}

fn products_are_the_cpus_bits(cuda: &Cuda) {
    let cpu = Cpu::new().unwrap();
    let mut random = Random(4);
    for (at, format) in sites(&mut random).into_iter().enumerate() {
        let site = cuda.site(&format).unwrap();
        for (tokens, rows) in [(1, 1), (1, 130), (17, 3), (129, 65), (300, 257)] {
            if format.channels > 4000 && tokens > 20 {
                continue;
            }
            let numbers = format.row.numbers;
            let bits = if numbers.codebook == Codebook::Fp4 { 4 } else { [4, 3, 8, 2][at % 4] };
            // FP4 weights behind FP4 activations and behind some of the integers.
            let fp4 = bits == 4 && (numbers.codebook == Codebook::Fp4 || at % 8 == 0);
            let codebook = if fp4 { Codebook::Fp4 } else { Codebook::Int };
            let weights = format.row.weights(bits, codebook, 1 + at % 2);
            let linear = random_codes(&weights, rows, &mut random);
            let x = random.activations(tokens, format.channels);
            let host = cpu.quantize(&cpu.upload(x.clone()).unwrap(), &format, "").unwrap();
            let expected = cpu.integer_product(&host, &cpu.pack(&linear, None).unwrap()).unwrap();
            let x = cuda.quantize(&cuda.half_tensor(&x), &site, "").unwrap();
            let quantized = cuda.restore(linear.clone()).unwrap();
            let packed = cuda.pack(&quantized, None).unwrap();
            let what = format!("{tokens} x {rows}, {format:?}");
            let narrow = numbers.bits <= 4 && numbers.codebook == Codebook::Int;
            let paired = narrow && numbers.group_size % 32 == 0 && cuda.narrow == Narrow::Nibbles;
            assert_eq!(x.layout == Layout::Nibbles, paired, "{what}");
            let found = cuda.integer(&x, &packed, false).unwrap();
            let found = found.download::<f32>(0..4 * tokens * rows).unwrap();
            assert_eq!(found, expected.values(), "{what}");
            let found = cuda.values(&cuda.integer_product(&x, &packed).unwrap());
            let expected: Vec<f32> =
                expected.values().iter().map(|v| f16::from_f32(*v).to_f32()).collect();
            assert_eq!(found, expected, "{what}, in f16");

            let dense = cuda.dense_of(&quantized).unwrap();
            let bits = dense.data.download::<u16>(0..2 * rows * format.width()).unwrap();
            let values: Vec<f32> =
                bits.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect();
            close(&values, &dequantize(&linear), 5e-4, &what);
            assert_eq!(cuda.fetch(quantized).unwrap(), linear, "{what}");
        }
    }
}

#[test]
fn attention_agrees_with_the_cpu() {
    let Some(cuda) = device("attention_agrees_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(5);
    let int4 = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    let formats = [
        KvFormat::FULL,
        int4,
        KvFormat { rotate: false, ..int4 },
        KvFormat { after_rope: false, bits: 8, ..int4 },
        KvFormat { rotate: false, after_rope: false, clip: 0.9, ..int4 },
    ];
    for (heads, kv_heads, head_dim, seq_len, windows, sliding_window) in [
        (4, 2, 32, 7, 3, None),
        (9, 3, 64, 200, 2, None),
        (1, 1, 96, 65, 2, None),
        (8, 2, 128, 300, 1, None),
        (2, 1, 2, 1, 2, None),
        (3, 3, 20, 129, 1, None),
        (2, 2, 256, 70, 1, None),
        (4, 2, 64, 300, 2, Some(1)),
        (4, 2, 64, 300, 2, Some(70)),
        (2, 1, 128, 400, 1, Some(64)),
        (2, 1, 128, 400, 1, Some(65)),
        (2, 2, 256, 170, 1, Some(33)),
        (2, 1, 96, 50, 1, Some(50)),
    ] {
        for kv in formats {
            let what =
                format!("{heads}/{kv_heads} x {head_dim} x {seq_len} {sliding_window:?} {kv:?}");
            let half = head_dim / 2;
            let angle =
                |i: usize| (i / half) as f32 * 100f32.powf(-((i % half) as f32) / half as f32);
            let spec = AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                seq_len,
                sliding_window,
                cos: (0..seq_len * half).map(|i| angle(i).cos()).collect(),
                sin: (0..seq_len * half).map(|i| angle(i).sin()).collect(),
                kv,
            };
            let tokens = windows * seq_len;
            let mut matrix = |heads: usize| {
                let columns = heads * head_dim;
                Matrix { rows: tokens, columns, data: random.values(tokens * columns) }
            };
            let operands = [matrix(heads), matrix(kv_heads), matrix(kv_heads)];
            let [q, k, v] = operands.each_ref().map(|m| cpu.upload(m.clone()).unwrap());
            let mean = matrix_row(&mut random, kv_heads * head_dim);
            let centered = kv.is_quantized() && kv.after_rope && head_dim != 96;
            let host_mean = cpu.upload(mean.clone()).unwrap();
            let own_mean = cuda.upload(mean).unwrap();
            let host_mean = centered.then_some(&host_mean);
            let mut host_sums = vec![1.0; kv_heads * head_dim];
            cpu.add_key_sums(&spec, &k, &mut host_sums).unwrap();
            let expected = cpu.attention(&spec, None, Qkv { q, k, v }, host_mean).unwrap();
            let [q, k, v] = operands.each_ref().map(|m| cuda.half_tensor(m));
            let own_mean = centered.then_some(&own_mean);
            let mut sums = vec![1.0; kv_heads * head_dim];
            cuda.add_key_sums(&spec, &k, &mut sums).unwrap();
            let found = cuda.attention(&spec, None, Qkv { q, k, v }, own_mean).unwrap();
            close(&cuda.values(&found), expected.values(), 3e-3, &what);
            let floats = |sums: &[f64]| sums.iter().map(|sum| *sum as f32).collect::<Vec<f32>>();
            close(&floats(&sums), &floats(&host_sums), 3e-3, &format!("keys of {what}"));
        }
    }
}

#[test]
fn losses_agree_with_the_cpu() {
    let Some(cuda) = device("losses_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(6);
    for (windows, seq_len, hidden, vocabulary) in
        [(1, 2, 64, 3), (3, 17, 172, 1000), (2, 100, 64, 32007)]
    {
        let rows = windows * seq_len;
        let bytes = bytes_of(&random.values(vocabulary * hidden), Dtype::F16);
        let shape = [vocabulary, hidden];
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let x = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let tokens: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocabulary) as u32).collect();
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let host = cpu.upload(x.clone()).unwrap();
        let expected = cpu.cross_entropy(&host, &head, &tokens, seq_len).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let found = cuda.cross_entropy(&cuda.half_tensor(&x), &head, &tokens, seq_len).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn predictions_of_selected_rows_agree_with_the_cpu() {
    let Some(cuda) = device("predictions_of_selected_rows_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(13);
    for (rows, hidden, vocabulary) in [(1, 16, 3), (5, 64, 1000), (33, 172, 32_007)] {
        let bytes = bytes_of(&random.values(vocabulary * hidden), Dtype::F16);
        let shape = [vocabulary, hidden];
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let x = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let selected: Vec<u32> = (0..3 * rows).map(|i| (i * 7 % rows) as u32).collect();
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let host = cpu.select_rows(&cpu.upload(x.clone()).unwrap(), &selected).unwrap();
        let floats = cuda.select_hidden(&cuda.upload(x.clone()).unwrap(), &selected).unwrap();
        assert_eq!(cuda.values(&floats), host.values());
        let halves = cuda.select_rows(&cuda.half_tensor(&x), &selected).unwrap();
        // A row's likeliest token, some other, and the likeliest of the row before.
        let every: Vec<u32> = (0..vocabulary as u32).collect();
        let likeliest = |row: usize| {
            let row = cpu.select_rows(&host, &vec![row as u32; vocabulary]).unwrap();
            let found = cpu.predict(&row, &head, &targets(&every)).unwrap();
            found.iter().position(|prediction| prediction.argmax).unwrap() as u32
        };
        let tokens: Vec<u32> = (0..3 * rows)
            .map(|row| if row % 2 == 0 { likeliest(row) } else { (row * 7919 % vocabulary) as u32 })
            .collect();
        let expected = cpu.predict(&host, &head, &targets(&tokens)).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let found = cuda.predict(&halves, &head, &targets(&tokens)).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let (found_nats, nats) = (found.nats, expected.nats);
            assert!((found_nats - nats).abs() < 1e-3 * nats.abs().max(1.0), "{found_nats} {nats}");
            assert_eq!(found.argmax, expected.argmax);
        }
        assert!(expected.iter().step_by(2).all(|prediction| prediction.argmax));
    }
    // Of equal logits the first counts, wherever in the row they stand.
    let vocabulary = 3000;
    let mut weights = vec![0f32; vocabulary];
    weights[700] = 1.0;
    weights[2900] = 1.0;
    let bytes = bytes_of(&weights, Dtype::F16);
    let shape = [vocabulary, 1];
    let head = cuda.load(Stored::in_memory("head", Dtype::F16, &shape, &bytes)).unwrap();
    let head = cuda.dense(&head, None).unwrap();
    let x = cuda.half_tensor(&Matrix { rows: 3, columns: 1, data: vec![1.0, 1.0, -1.0] });
    let found = cuda.predict(&x, &head, &targets(&[700, 2900, 0])).unwrap();
    let argmax: Vec<bool> = found.iter().map(|prediction| prediction.argmax).collect();
    assert_eq!(argmax, [true, false, true]);
}

#[test]
fn changes_and_divergences_agree_with_the_cpu() {
    let Some(cuda) = device("changes_and_divergences_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(11);
    for (rows, hidden, vocabulary) in
        [(1, 16, 3), (5, 64, 1000), (33, 576, 4099), (700, 32, 50_000)]
    {
        let original = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let changed =
            original.data.iter().map(|x| f16::from_f32(x + random.value() / 8.0).to_f32());
        let mut changed = Matrix { rows, columns: hidden, data: changed.collect() };
        // A row that stays as it is.
        changed.data[..hidden].copy_from_slice(&original.data[..hidden]);
        let on_cpu = |matrix: &Matrix| cpu.upload(matrix.clone()).unwrap();
        let on_gpu = |matrix: &Matrix| cuda.upload(matrix.clone()).unwrap();
        let expected = cpu.relative_squared_error(&on_cpu(&changed), &on_cpu(&original)).unwrap();
        let found = cuda.relative_squared_error(&on_gpu(&changed), &on_gpu(&original)).unwrap();
        assert_eq!(found.len(), rows);
        assert_eq!((found[0], expected[0]), (0.0, 0.0));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-9 * expected, "{found} {expected}");
        }

        let shape = [vocabulary, hidden];
        let bytes: Vec<u8> = (0..vocabulary * hidden)
            .flat_map(|_| f16::from_f32(random.value() / (hidden as f32).sqrt()).to_le_bytes())
            .collect();
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let expected = cpu.kl_divergence(&on_cpu(&changed), &on_cpu(&original), &head).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let (changed, original) = (cuda.half_tensor(&changed), cuda.half_tensor(&original));
        let found = cuda.kl_divergence(&changed, &original, &head).unwrap();
        assert_eq!(found.len(), rows);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 2e-6 + 1e-3 * expected, "{found} {expected}");
        }
    }
}

#[test]
fn hessians_and_their_factors_are_what_they_are_called() {
    let Some(cuda) = device("hessians_and_their_factors_are_what_they_are_called") else { return };
    let mut random = Random(7);
    for (n, tokens) in [(1, 5), (33, 200), (172, 300), (576, 900)] {
        let hessian = cuda.gram(n).unwrap();
        let mut sum = vec![0f64; n * n];
        for _ in 0..2 {
            let x = Matrix { rows: tokens, columns: n, data: random.values(tokens * n) };
            cuda.add_gram(&hessian, &cuda.half_tensor(&x)).unwrap();
            for row in x.data.chunks(n) {
                for (i, a) in row.iter().enumerate() {
                    for (j, b) in row.iter().enumerate() {
                        sum[i * n + j] += f64::from(*a) * f64::from(*b);
                    }
                }
            }
        }
        let (factor, damping) = cuda.cholesky(&hessian, 0.01).unwrap().unwrap();
        assert_eq!(damping, Damping { share: 0.01, failures: 0 });
        let found = hessian.data.download::<f32>(0..4 * n * n).unwrap();
        let expected: Vec<f32> = sum.iter().map(|v| *v as f32).collect();
        close(&found, &expected, 1e-4, &format!("H of {n}"));

        // H R^-T = R D is upper triangular: solve by columns of R from the right.
        let r = factor.data.download::<f32>(0..4 * n * n).unwrap();
        let damp = 0.01 * (0..n).map(|i| sum[i * n + i]).sum::<f64>() / n as f64;
        let mut m = sum.clone();
        (0..n).for_each(|i| m[i * n + i] += damp);
        let most = m.iter().fold(0f64, |most, v| most.max(v.abs()));
        for j in (0..n).rev() {
            for i in 0..j {
                let above = f64::from(r[i * n + j]);
                for row in 0..n {
                    m[row * n + i] -= m[row * n + j] * above;
                }
            }
        }
        for i in 1..n {
            for j in 0..i {
                assert!(m[i * n + j].abs() < 2e-4 * most, "{n}: {i} {j} {}", m[i * n + j]);
            }
        }
    }

    // Eigenvalues 3 and -1: damping must exceed 1. A channel that no token used does not matter.
    let matrix = |values: [f32; 4]| Hessian { n: 2, data: cuda.gpu.upload(&values).unwrap() };
    let (_, damping) = cuda.cholesky(&matrix([1.0, 2.0, 0.0, 1.0]), 0.05).unwrap().unwrap();
    assert_eq!(damping, Damping { share: 0.05 * 30.0, failures: 3 });
    assert!(cuda.cholesky(&matrix([1.0, 2.0, 0.0, 1.0]), 0.001).unwrap().is_none());
    assert!(cuda.cholesky(&matrix([4.0, 0.0, 0.0, 0.0]), 0.01).unwrap().is_some());
}

fn matrix_row(random: &mut Random, columns: usize) -> Matrix {
    Matrix { rows: 1, columns, data: random.values(columns) }
}

#[test]
fn drift_is_corrected_as_on_the_cpu() {
    let Some(cuda) = device("drift_is_corrected_as_on_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(12);
    let mut all = sites(&mut random);
    all.retain(|format| format.channels <= 2100);
    for format in all {
        let (width, channels, rows) = (format.width(), format.channels, 77);
        let tokens = 2 * width + 3;
        let x = random.correlated(tokens, channels);
        let mut x0 = x.clone();
        x0.data
            .iter_mut()
            .for_each(|x| *x = f16::from_f32(*x * 1.1 + 0.1 * random.value()).to_f32());
        let mut state =
            || Matrix { rows: tokens, columns: rows, data: random.values(tokens * rows) };
        let (before, after) = (state(), state());

        let host = |m: &Matrix| cpu.upload(m.clone()).unwrap();
        let host_seen = cpu.permute(&host(&x), &format).unwrap();
        let wanted = cpu.permute(&host(&x0), &format).unwrap();
        let mut host_hessian = cpu.gram(width).unwrap();
        cpu.add_gram(&mut host_hessian, &host_seen).unwrap();
        let (host_factor, _) = cpu.cholesky(&mut host_hessian, 0.01).unwrap().unwrap();
        let mut host_drift = AccumulatedError {
            inputs: cpu.cross_covariance(width, width).unwrap(),
            outputs: Some(cpu.cross_covariance(rows, width).unwrap()),
            share: 0.5,
        };
        let difference = cpu.difference(&wanted, &host_seen).unwrap();
        cpu.add_cross_covariance(&mut host_drift.inputs, &difference, &host_seen).unwrap();
        let lost = cpu.hidden_difference(&host(&before), &host(&after)).unwrap();
        cpu.add_cross_covariance(host_drift.outputs.as_mut().unwrap(), &lost, &host_seen).unwrap();

        let site = cuda.site(&format).unwrap();
        let seen = cuda.permute(&cuda.half_tensor(&x), &site).unwrap();
        let wanted = cuda.permute(&cuda.half_tensor(&x0), &site).unwrap();
        let hessian = cuda.gram(width).unwrap();
        cuda.add_gram(&hessian, &seen).unwrap();
        let (factor, _) = cuda.cholesky(&hessian, 0.01).unwrap().unwrap();
        let mut drift = AccumulatedError {
            inputs: cuda.cross_covariance(width, width).unwrap(),
            outputs: Some(cuda.cross_covariance(rows, width).unwrap()),
            share: 0.5,
        };
        let difference = cuda.difference(&wanted, &seen).unwrap();
        cuda.add_cross_covariance(&drift.inputs, &difference, &seen).unwrap();
        let states = [before, after].map(|m| cuda.upload(m).unwrap());
        let lost = cuda.hidden_difference(&states[0], &states[1]).unwrap();
        cuda.add_cross_covariance(drift.outputs.as_mut().unwrap(), &lost, &seen).unwrap();

        let weights = random.values(rows * width);
        let mut expected = Matrix { rows, columns: width, data: weights.clone() };
        cpu.correct(&mut expected, &host_drift, &host_factor);
        let corrected = cuda.gpu.upload(&weights).unwrap();
        cuda.correct(&corrected, rows, &drift, &factor).unwrap();
        let found = corrected.download::<f32>(0..4 * rows * width).unwrap();
        // Directions that hardly occur are as good as free: what counts is the output on the tokens.
        let outputs = |left: &[f32], right: &[f32]| -> f64 {
            let change: Vec<f32> = left.iter().zip(right).map(|(a, b)| a - b).collect();
            let token = |x: &[f32]| -> f64 {
                let row = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
                change.chunks(width).map(|w| f64::from(row(w)).powi(2)).sum()
            };
            host_seen.values().chunks(width).map(token).sum()
        };
        let (wrong, made) = (outputs(&found, &expected.data), outputs(&expected.data, &weights));
        let share = (wrong / made).sqrt();
        assert!(made > 0.0 && share < 0.02, "{format:?}: {share} of the correction is another");
    }
}

#[test]
fn gptq_makes_the_cpus_decisions() {
    let Some(cuda) = device("gptq_makes_the_cpus_decisions") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(8);
    let mut all = sites(&mut random);
    all.retain(|format| format.channels <= 2100);
    let mut ratios = Vec::new();
    for (at, format) in all.into_iter().enumerate() {
        let (width, channels) = (format.width(), format.channels);
        let tokens = 2 * width + 3;
        let x = random.correlated(tokens, channels);
        let host = cpu.permute(&cpu.upload(x.clone()).unwrap(), &format).unwrap();
        let mut host_hessian = cpu.gram(width).unwrap();
        cpu.add_gram(&mut host_hessian, &host).unwrap();
        let site = cuda.site(&format).unwrap();
        let arranged = cuda.permute(&cuda.half_tensor(&x), &site).unwrap();
        let hessian = cuda.gram(width).unwrap();
        cuda.add_gram(&hessian, &arranged).unwrap();
        let (host_factor, _) = cpu.cholesky(&mut host_hessian, 0.01).unwrap().unwrap();
        let (factor, _) = cuda.cholesky(&hessian, 0.01).unwrap().unwrap();

        // Two linears of one format, and one of another.
        let shapes = [[64, channels], [135, channels], [77, channels]];
        let bytes: Vec<Vec<u8>> =
            shapes.iter().map(|s| bytes_of(&random.values(s[0] * s[1]), Dtype::BF16)).collect();
        let stored: Vec<Stored<'_>> = shapes
            .iter()
            .zip(&bytes)
            .map(|(shape, bytes)| Stored::in_memory("w", Dtype::BF16, shape, bytes))
            .collect();
        let weights: Vec<Weight> = stored.iter().map(|s| cuda.load(*s).unwrap()).collect();
        let formats = [4, 4, 3].map(|bits| {
            let codebook = if bits == 4 { format.row.numbers.codebook } else { Codebook::Int };
            format.row.weights(bits, codebook, 1 + at % 2)
        });
        let mut host_linears = Vec::new();
        let mut linears = Vec::new();
        for ((stored, weight), format) in stored.iter().zip(&weights).zip(formats) {
            host_linears.push(Unquantized { name: "w", weight: stored, format, clip: 0.85 });
            linears.push(Unquantized { name: "w", weight, format, clip: 0.85 });
        }
        let expected = cpu.gptq(&host_linears, &format, &host_hessian, &host_factor, None).unwrap();
        let sweep = || cuda.gptq(&linears, &site, &hessian, &factor, None).unwrap();
        let (found, again) = (sweep(), sweep());
        for ((((expected, host_error), (found, error)), (second, _)), (stored, weight)) in
            expected.iter().zip(found).zip(again).zip(stored.iter().zip(&weights))
        {
            let what = format!("{format:?}, {} rows", expected.rows);
            let product = cpu.output_error(&host_hessian, &format, stored, expected).unwrap();
            assert!((host_error / product - 1.0).abs() < 1e-6, "{what}: {host_error} {product}");
            // Hessians differ in the last bits, a few codes with them, and all that follows those.
            assert!((error / host_error - 1.0).abs() < 0.1, "{what}: {error} {host_error}");
            ratios.push(error / host_error);
            // What the sweep has added up is what a product with the Hessian gives.
            let again = Quantized { lost: None, ..found };
            let product = cuda.output_error(&hessian, &site, weight, &again).unwrap();
            assert!((error / product - 1.0).abs() < 2e-3, "{what}: {error} {product}");
            let found = cuda.fetch(again).unwrap();
            assert_eq!(found, cuda.fetch(second).unwrap(), "{what}: a second run differs");
            let equal = found.codes.iter().zip(&expected.codes).filter(|(a, b)| a == b).count();
            let share = equal as f64 / expected.codes.len() as f64;
            assert!(share > 0.9, "{what}: {share} of the codes are equal");
        }

        let energy: Vec<f64> = (0..channels).map(|_| f64::from(random.next() % 1000)).collect();
        for (host_linear, linear) in host_linears.iter().zip(&linears) {
            let expected = cpu.round(host_linear, &format).unwrap();
            let found = cuda.round(linear, &site).unwrap();
            let host_error =
                cpu.energy_error(&energy, &format, host_linear.weight, &expected).unwrap();
            let error = cuda.energy_error(&energy, &site, linear.weight, &found).unwrap();
            assert!((error - host_error).abs() <= 1e-5 * host_error, "{error} {host_error}");
            assert_eq!(cuda.fetch(found).unwrap(), expected, "{format:?} rounded");
        }
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!((mean - 1.0).abs() < 0.01, "errors are {mean} of the CPU's: {ratios:?}");
}

#[test]
fn what_does_not_fit_is_offloaded_or_refused() {
    let test = "what_does_not_fit_is_offloaded_or_refused";
    let Some(cuda) = device(test) else { return };
    let mut random = Random(9);
    let matrix = Matrix { rows: 50, columns: 100, data: random.values(5000) };
    cuda.reserve(cuda.gpu.limit_bytes() - 30_000).unwrap();
    let mut tensors: Vec<Hidden> = (0..2).map(|_| cuda.upload(matrix.clone()).unwrap()).collect();
    for _ in 0..2 {
        tensors.iter_mut().for_each(|tensor| cuda.offload(tensor).unwrap());
        assert!(matches!(tensors[0].values, Values::Resident(_)), "20 of 30 KB");
        assert!(matches!(tensors[1].values, Values::Offloaded(_)), "40 of 30 KB");
        let copy = cuda.duplicate(&tensors[1]).unwrap();
        assert_eq!(cuda.values(&copy), matrix.data);
        for tensor in &mut tensors {
            cuda.reload(tensor).unwrap();
            assert_eq!(cuda.values(tensor), matrix.data);
        }
    }
    drop(tensors);
    assert_eq!(cuda.offloaded_bytes.load(std::sync::atomic::Ordering::Relaxed), 0);

    let error = cuda.reserve(1 << 60).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::Machine);
    assert!(error.message().contains("too little memory"), "{error}");
    let error = cuda.gpu.alloc(1 << 50).err().unwrap();
    assert_eq!(error.kind(), crate::Kind::Machine);
    assert!(error.message().contains("bytes were needed"), "{error}");
    // And it goes on.
    assert_eq!(cuda.values(&cuda.upload(matrix.clone()).unwrap()), matrix.data);
    let small = Cuda::open(0, Some(200 << 20)).unwrap();
    assert!(small.gpu.alloc(300 << 20).is_err() && small.gpu.alloc(100 << 20).is_ok());
    assert!(Cuda::open(0, Some(1 << 50)).is_err());
}

#[test]
fn codes_without_kernels_are_refused() {
    let Some(cuda) = device("codes_without_kernels_are_refused") else { return };
    let mut random = Random(10);
    let format = sites(&mut random)[1].clone();
    let format = format.with(|format| format.row.numbers.codebook = Codebook::Fp4Bnb);
    let weights = format.row.weights(4, Codebook::Fp4Bnb, 1);
    let linear = random_codes(&weights, 3, &mut random);
    for error in [cuda.site(&format).err().unwrap(), cuda.restore(linear).err().unwrap()] {
        assert_eq!(error.kind(), crate::Kind::Machine);
        assert!(error.message().contains("no kernels for fp4-bnb"), "{error}");
    }
}
