//! Every operation compared with the CPU's, over odd shapes. Fresh device memory is filled with NaN (gpu.rs),
//! so what a kernel does not write shows.

use half::f16;

use super::tensor::{Activation, DeviceRows, Hidden, Layout};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{AttentionSpec, Calibration, Forward, Matrix, Memory, Qkv, Quantization};
use crate::checkpoint::{Dtype, Tensor as Stored};
use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;
use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::rows::QuantizedRows;
use crate::quant::scale::ScaleGrid;
use crate::quant::site::{SiteFormat, Transform};

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
    pub(super) fn correlated(&mut self, rows: usize, columns: usize) -> Matrix {
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

impl Cuda {
    pub(super) fn half_tensor(&self, matrix: &Matrix) -> Activation {
        self.upload_activation(matrix.clone()).unwrap()
    }

    pub(super) fn values(&self, tensor: &impl OnHost) -> Vec<f32> {
        tensor.on_host(self).data
    }

    /// Codes and scales, after a check of the padding after the outliers.
    pub(super) fn rows_on_host(&self, rows: &DeviceRows) -> QuantizedRows {
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

pub(super) fn bytes_of(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A site of 4-bit integers.
pub(super) fn site(
    channels: usize,
    group_size: usize,
    outliers: usize,
    transform: Transform,
    outlier_format: OutlierFormat,
    random: &mut Random,
) -> SiteFormat {
    let energy: Vec<f64> = (0..channels).map(|_| f64::from(random.next())).collect();
    // Signed and not, among sites of one shape or another.
    let signed = channels.is_multiple_of(16) || outliers == 4;
    let scale = if signed { ScaleFormat::SIGNED_F16 } else { ScaleFormat::F16 };
    let row = RowFormat {
        numbers: NumberFormat { bits: 4, codebook: Codebook::Int, group_size, scale },
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
pub(super) fn sites(random: &mut Random) -> Vec<SiteFormat> {
    let others = [fp4_sites(random), grid_sites(random)].concat();
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
        site(channels, group, outliers, transform, format, random)
            .with(|format| format.row.numbers.bits = bits)
    })
    .chain(others)
    .collect()
}

/// Sites whose scales lie on other grids than f16: two rows a block, one, groups in shared memory.
fn grid_sites(random: &mut Random) -> Vec<SiteFormat> {
    use Codebook::{Fp4, Int};
    use ScaleGrid::{Bf16, E4m3, PowerOfTwo};
    use Transform::{Hadamard, None};
    [
        (172, 16, 0, Fp4, E4m3, -8, None),
        (576, 16, 0, Fp4, E4m3, -11, Hadamard),
        (576, 32, 64, Int, E4m3, -7, Hadamard),
        (1000, 96, 40, Int, E4m3, -9, None),
        (576, 32, 0, Fp4, PowerOfTwo, 0, None),
        (172, 48, 5, Fp4, PowerOfTwo, 0, Hadamard),
        (576, 64, 64, Int, Bf16, 0, Hadamard),
        (1000, 128, 33, Int, Bf16, 0, None),
    ]
    .into_iter()
    .map(|(channels, group, outliers, codebook, grid, exponent, transform)| {
        let int8 = OutlierFormat::Int8;
        site(channels, group, outliers, transform, int8, random).with(|format| {
            let numbers = &mut format.row.numbers;
            let signed = numbers.scale.signed && grid != PowerOfTwo;
            numbers.codebook = codebook;
            numbers.scale = ScaleFormat { grid, exponent, signed };
        })
    })
    .collect()
}

/// Sites whose activations are FP4: two rows a block, one, groups in shared memory, an entire row.
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
        site(channels, group, outliers, transform, format, random)
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
        cpu.add(&mut host, &cpu.upload(y.clone()).unwrap(), 1.0).unwrap();
        cuda.add(&mut device, &cuda.half_tensor(&y), 1.0).unwrap();
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
        let weights = random.values(taken.len());
        let own = cuda.select_rows(&cuda.half_tensor(&y), &taken).unwrap();
        let of_host = cpu.select_rows(&cpu.upload(y.clone()).unwrap(), &taken).unwrap();
        assert_eq!(cuda.values(&own), of_host.values(), "rows {what}");
        let (mut host, mut device) =
            (cpu.upload(x.clone()).unwrap(), cuda.upload(x.clone()).unwrap());
        cpu.add_rows(&mut host, &of_host, &taken, &weights).unwrap();
        cuda.add_rows(&mut device, &own, &taken, &weights).unwrap();
        close(&cuda.values(&device), host.values(), 1e-6, &format!("sum of rows {what}"));

        for head_dim in [columns, columns / 2].into_iter().filter(|n| *n > 0 && columns % n == 0) {
            let row = matrix_row(&mut random, head_dim);
            let (mut host, mut device) = (cpu.upload(y.clone()).unwrap(), cuda.half_tensor(&y));
            cpu.norm_in_place(&mut host, &cpu.upload(row.clone()).unwrap(), 1e-6).unwrap();
            cuda.norm_in_place(&mut device, &cuda.upload(row).unwrap(), 1e-6).unwrap();
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
                scale: AttentionSpec::usual_scale(head_dim),
                query_tables: None,
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

pub(super) fn matrix_row(random: &mut Random, columns: usize) -> Matrix {
    Matrix { rows: 1, columns, data: random.values(columns) }
}
