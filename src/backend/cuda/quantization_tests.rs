//! Codes, integer products, Hessians and GPTQ compared with the CPU's, over odd shapes.

use half::f16;

use super::tensor::{DeviceLinear, Hessian, Layout};
use super::tests::{Random, bytes_of, close, device, sites};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{
    AccumulatedError, Calibration, Damping, ErrorKind, Forward, Matrix, Memory, Quantization,
    Unquantized,
};
use crate::checkpoint::{Dtype, Tensor as Stored};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;
use crate::quant::ranges::SEARCHED_GROUP;
use crate::quant::site::SiteFormat;
use crate::quant::weights::dequantize;

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
    // The first error is returned, once, to who waits.
    let _sound = cuda.quantize(&cuda.half_tensor(&random.activations(4, 64)), &site, "a").unwrap();
    for name in ["b", "c"] {
        let _unsound = cuda.quantize(&cuda.half_tensor(&x), &site, name).unwrap();
    }
    let error = cuda.wait().err().unwrap();
    assert!(error.message().contains("activations of b: the activation of token 2 "), "{error}");
    cuda.wait().unwrap();
    // More kernels than there are flags.
    for _ in 0..1100 {
        let _rows =
            cuda.quantize(&cuda.half_tensor(&random.activations(1, 64)), &site, "d").unwrap();
    }
    cuda.wait().unwrap();
}

/// A weight of random codes after a site.
pub(super) fn random_codes(
    format: &LinearFormat,
    rows: usize,
    random: &mut Random,
) -> QuantizedLinear {
    let weights = random.values(rows * format.row.width());
    crate::quant::weights::round_to_nearest(&weights, rows, format, Scaling::clipped(0.85)).unwrap()
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
            // FP4 weights with FP4 activations and with some of the integers.
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

#[test]
fn the_accumulated_error_is_corrected_as_on_the_cpu() {
    let Some(cuda) = device("the_accumulated_error_is_corrected_as_on_the_cpu") else { return };
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
        let host_wanted = cpu.permute(&host(&x0), &format).unwrap();
        let mut host_hessian = cpu.gram(width).unwrap();
        cpu.add_gram(&mut host_hessian, &host_seen).unwrap();
        let (host_factor, _) = cpu.cholesky(&mut host_hessian, 0.01).unwrap().unwrap();
        let site = cuda.site(&format).unwrap();
        let seen = cuda.permute(&cuda.half_tensor(&x), &site).unwrap();
        let wanted = cuda.permute(&cuda.half_tensor(&x0), &site).unwrap();
        let hessian = cuda.gram(width).unwrap();
        cuda.add_gram(&hessian, &seen).unwrap();
        let (factor, _) = cuda.cholesky(&hessian, 0.01).unwrap().unwrap();
        let weights = random.values(rows * width);
        let states = [&before, &after].map(|m| cuda.upload(m.clone()).unwrap());
        let cases = [
            (ErrorKind::Inputs, cpu.difference(&host_wanted, &host_seen).unwrap()),
            (ErrorKind::Outputs, cpu.hidden_difference(&host(&before), &host(&after)).unwrap()),
        ];
        for (kind, host_lost) in cases {
            let lost = match kind {
                ErrorKind::Inputs => cuda.difference(&wanted, &seen).unwrap(),
                ErrorKind::Outputs => cuda.hidden_difference(&states[0], &states[1]).unwrap(),
            };
            let of = if kind == ErrorKind::Inputs { width } else { rows };
            let cross = cpu.cross_covariance(of, width).unwrap();
            let mut host_error = AccumulatedError { cross, kind, share: 0.5 };
            cpu.add_cross_covariance(&mut host_error.cross, &host_lost, &host_seen).unwrap();
            let cross = cuda.cross_covariance(of, width).unwrap();
            let error = AccumulatedError { cross, kind, share: 0.5 };
            cuda.add_cross_covariance(&error.cross, &lost, &seen).unwrap();
            let mut expected = Matrix { rows, columns: width, data: weights.clone() };
            cpu.correct(&mut expected, &host_error, &host_hessian, &host_factor);
            let corrected = cuda.gpu.upload(&weights).unwrap();
            cuda.correct(&corrected, rows, &error, &hessian, &factor).unwrap();
            let found = corrected.download::<f32>(0..4 * rows * width).unwrap();
            assert_alike(&format, kind, [&found, &expected.data, &weights], host_seen.values());
        }
    }
}

/// Corrected weights, expected and original ones `[rows, width]`, compared by their outputs on tokens: directions that hardly
/// occur are as good as free.
fn assert_alike(
    format: &SiteFormat,
    kind: ErrorKind,
    [found, expected, weights]: [&[f32]; 3],
    seen: &[f32],
) {
    let width = format.width();
    let outputs = |left: &[f32], right: &[f32]| -> f64 {
        let change: Vec<f32> = left.iter().zip(right).map(|(a, b)| a - b).collect();
        let token = |x: &[f32]| -> f64 {
            let row = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            change.chunks(width).map(|w| f64::from(row(w)).powi(2)).sum()
        };
        seen.chunks(width).map(token).sum()
    };
    let (wrong, made) = (outputs(found, expected), outputs(expected, weights));
    let share = (wrong / made).sqrt();
    assert!(
        made > 0.0 && share < 0.02,
        "{format:?} {kind:?}: {share} of the correction is another"
    );
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
        let permuted = cuda.permute(&cuda.half_tensor(&x), &site).unwrap();
        let hessian = cuda.gram(width).unwrap();
        cuda.add_gram(&hessian, &permuted).unwrap();
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
        let search = at % 3 == 1 && format.row.numbers.group_size <= SEARCHED_GROUP;
        let scaling = Scaling { clip: 0.85, search };
        for ((stored, weight), format) in stored.iter().zip(&weights).zip(formats) {
            host_linears.push(Unquantized { name: "w", weight: stored, format, scaling });
            linears.push(Unquantized { name: "w", weight, format, scaling });
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
            // What the sweep has added up is what a product with the Hessian returns.
            let again = DeviceLinear { lost: None, ..found };
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
