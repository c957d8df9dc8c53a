//! Each operation of the backward pass compared with the CPU's, over odd shapes.

use half::f16;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::quantization_tests::random_codes;
use crate::backend::cuda::tests::{Random, bytes_of, device, matrix_row, sites};
use crate::backend::{
    AttentionSpec, Forward, Matrix, Memory, Qkv, Quantization, SiteGradient, Train, TrainedLinear,
};
use crate::checkpoint::{Dtype, Tensor as Stored};
use crate::quant::codebook::Codebook;
use crate::quant::kv::KvFormat;

const EPSILON: f32 = 1e-5;

/// `|a - b| <= share |b|`: products are of numbers with 10 bits of mantissa.
fn near(found: &[f32], expected: &[f32], share: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let apart = length(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    let all = length(&mut expected.iter().map(|b| f64::from(*b)));
    // A clipped group alone has no gradient at all.
    assert!(apart <= share * all, "{what}: {apart} of {all}");
}

fn random(rows: usize, columns: usize, random: &mut Random) -> Matrix {
    // What f16 holds, so that both backends read the same.
    let values = random.values(rows * columns).into_iter();
    Matrix { rows, columns, data: values.map(|x| f16::from_f32(x).to_f32()).collect() }
}

fn host(cuda: &Cuda, x: &impl super::super::tests::OnHost) -> Vec<f32> {
    cuda.values(x)
}

#[test]
fn norms_have_the_cpus_gradients() {
    let Some(cuda) = device("norms_have_the_cpus_gradients") else { return };
    let cpu = Cpu::new().unwrap();
    let mut source = Random(41);
    for (rows, n) in [(1, 1), (3, 7), (130, 67), (65, 576), (7, 4096)] {
        let what = format!("{rows} x {n}");
        let [x, d_y, onto] = [(); 3].map(|()| random(rows, n, &mut source));
        let weight = matrix_row(&mut source, n);
        let of = |m: &Matrix| cpu.upload(m.clone()).unwrap();
        let expected =
            cpu.rms_norm_backward(&of(&x), &of(&weight), EPSILON, &of(&d_y), Some(of(&onto)));
        let (expected_x, expected_weight) = expected.unwrap();
        let of = |m: &Matrix| cuda.upload(m.clone()).unwrap();
        let found =
            cuda.rms_norm_backward(&of(&x), &of(&weight), EPSILON, &of(&d_y), Some(of(&onto)));
        let (found_x, found_weight) = found.unwrap();
        near(&host(&cuda, &found_x), expected_x.values(), 1e-5, &what);
        near(&found_weight, &expected_weight, 1e-5, &what);
        let (fresh, _) =
            cuda.rms_norm_backward(&of(&x), &of(&weight), EPSILON, &of(&d_y), None).unwrap();
        let sum: Vec<f32> =
            host(&cuda, &fresh).iter().zip(&onto.data).map(|(d, onto)| d + onto).collect();
        near(&sum, expected_x.values(), 1e-5, &what);
    }
    let (x, d_y) = (random(70, 3 * 20, &mut source), random(70, 3 * 20, &mut source));
    let weight = matrix_row(&mut source, 20);
    let of = |m: &Matrix| cpu.upload(m.clone()).unwrap();
    let (expected_x, expected_weight) =
        cpu.qk_norm_backward(&of(&x), &of(&weight), EPSILON, of(&d_y)).unwrap();
    let of = |m: &Matrix| cuda.upload(m.clone()).unwrap();
    let (found_x, found_weight) =
        cuda.qk_norm_backward(&cuda.half_tensor(&x), &of(&weight), EPSILON, of(&d_y)).unwrap();
    near(&host(&cuda, &found_x), expected_x.values(), 1e-5, "heads");
    near(&found_weight, &expected_weight, 1e-5, "heads");
}

#[test]
fn silu_has_the_cpus_gradients() {
    let Some(cuda) = device("silu_has_the_cpus_gradients") else { return };
    let cpu = Cpu::new().unwrap();
    let mut source = Random(42);
    let [mut gate, up, d_z] = [(); 3].map(|()| random(37, 111, &mut source));
    gate.data.iter_mut().for_each(|gate| *gate *= 16.0);
    let of = |m: &Matrix| cpu.upload(m.clone()).unwrap();
    let expected = cpu.silu_mul_backward(&of(&gate), &of(&up), of(&d_z)).unwrap();
    let of = |m: &Matrix| cuda.half_tensor(m);
    let d_z = cuda.upload(d_z).unwrap();
    let found = cuda.silu_mul_backward(&of(&gate), &of(&up), d_z).unwrap();
    for (found, expected) in found.iter().zip(&expected) {
        near(&host(&cuda, found), expected.values(), 1e-5, "silu");
    }
}

#[test]
fn the_divergence_has_the_cpus_gradient() {
    let Some(cuda) = device("the_divergence_has_the_cpus_gradient") else { return };
    let cpu = Cpu::new().unwrap();
    let mut source = Random(43);
    for (rows, hidden, vocabulary) in [(1, 3, 2), (5, 11, 37), (101, 64, 1009)] {
        let what = format!("{rows} x {hidden} x {vocabulary}");
        let [x, original] = [(); 2].map(|()| random(rows, hidden, &mut source));
        let bytes = bytes_of(&random(vocabulary, hidden, &mut source).data, Dtype::F16);
        let shape = [vocabulary, hidden];
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let of = |m: &Matrix| cpu.upload(m.clone()).unwrap();
        let head = cpu.loss_head(&stored).unwrap();
        let (nats, expected) = cpu.divergence_backward(&of(&x), &of(&original), &head).unwrap();
        let head = cuda.loss_head(&cuda.load(stored).unwrap()).unwrap();
        let of = |m: &Matrix| cuda.half_tensor(m);
        let (found_nats, found) = cuda.divergence_backward(&of(&x), &of(&original), &head).unwrap();
        let floats = |nats: &[f64]| nats.iter().map(|nats| *nats as f32).collect::<Vec<_>>();
        near(&floats(&found_nats), &floats(&nats), 1e-4, &what);
        near(&host(&cuda, &found), expected.values(), 2e-3, &what);
    }
}

#[test]
fn attention_has_the_cpus_gradients() {
    let Some(cuda) = device("attention_has_the_cpus_gradients") else { return };
    let cpu = Cpu::new().unwrap();
    let mut source = Random(44);
    let int4 = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    let formats = [
        KvFormat::FULL,
        KvFormat { clip: 0.8, ..int4 },
        KvFormat { rotate: false, bits: 8, ..int4 },
        KvFormat { after_rope: false, ..int4 },
        KvFormat { rotate: false, after_rope: false, clip: 0.9, ..int4 },
    ];
    for (heads, kv_heads, head_dim, seq_len, windows, sliding_window) in [
        (4, 2, 32, 7, 3, None),
        (9, 3, 64, 200, 2, None),
        (1, 1, 96, 65, 2, None),
        (2, 1, 2, 1, 2, None),
        (3, 3, 20, 129, 1, None),
        (4, 2, 64, 300, 1, Some(70)),
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
            let mut operand = |heads: usize| random(tokens, heads * head_dim, &mut source);
            let [q, k, v, d] =
                [operand(heads), operand(kv_heads), operand(kv_heads), operand(heads)];
            let mean = matrix_row(&mut source, kv_heads * head_dim);
            let centered = kv.is_quantized() && kv.after_rope && head_dim != 96;
            let of = |m: &Matrix| cpu.upload(m.clone()).unwrap();
            let own = centered.then(|| of(&mean));
            let qkv = Qkv { q: of(&q), k: of(&k), v: of(&v) };
            let expected = cpu.attention_backward(&spec, &qkv, own.as_ref(), of(&d)).unwrap();
            let of = |m: &Matrix| cuda.half_tensor(m);
            let qkv = Qkv { q: of(&q), k: of(&k), v: of(&v) };
            let own = centered.then(|| cuda.upload(mean).unwrap());
            let d = cuda.upload(d).unwrap();
            let found = cuda.attention_backward(&spec, &qkv, own.as_ref(), d).unwrap();
            // With one token the weights are 1 whatever the scores are.
            if seq_len > 1 {
                assert!(expected.q.values().iter().any(|d| *d != 0.0), "{what}");
                near(&host(&cuda, &found.q), expected.q.values(), 1e-2, &format!("q of {what}"));
                near(&host(&cuda, &found.k), expected.k.values(), 1e-2, &format!("k of {what}"));
            }
            near(&host(&cuda, &found.v), expected.v.values(), 1e-2, &format!("v of {what}"));
        }
    }
}

#[test]
fn sites_have_the_cpus_gradients() {
    let Some(cuda) = device("sites_have_the_cpus_gradients") else { return };
    let cpu = Cpu::new().unwrap();
    let mut source = Random(45);
    for (at, format) in sites(&mut source).into_iter().enumerate() {
        let tokens = [1, 67, 130][at % 3];
        let what = format!("{tokens} tokens, {format:?}");
        let numbers = format.row.numbers;
        let bits = if numbers.codebook == Codebook::Fp4 { 4 } else { [4, 3, 8, 2][at % 4] };
        let codebook = numbers.codebook;
        let formats = [1, 2].map(|rows| format.row.weights(bits, codebook, rows));
        let codes = formats.map(|format| random_codes(&format, 33, &mut source));
        let x = source.activations(tokens, format.channels);
        let d_outputs = [(); 2].map(|()| random(tokens, 33, &mut source));
        let quantizes = at % 4 != 3;
        let expected = {
            let x = cpu.upload(x.clone()).unwrap();
            let rows = quantizes.then(|| cpu.quantize(&x, &format, "").unwrap());
            let linears = codes.each_ref().map(TrainedLinear::Quantized);
            let d = d_outputs.each_ref().map(|d| cpu.upload(d.clone()).unwrap());
            let (d_x, gradient) =
                cpu.site_backward(&format, &linears, &x, rows.as_ref(), &d).unwrap();
            (d_x.values().to_vec(), gradient)
        };
        let site = cuda.site(&format).unwrap();
        let x = cuda.half_tensor(&x);
        let rows = quantizes.then(|| cuda.quantize(&x, &site, "").unwrap());
        let restored = codes.map(|codes| {
            // Other scales first, which `rescale` replaces.
            let (scales, own) = (codes.scales.clone(), codes.outliers.clone());
            let mut other = codes;
            other.scales.iter_mut().for_each(|scale| *scale = f16::from_f32(0.25));
            let mut restored = Quantization::restore(&cuda, other).unwrap();
            let outlier_scales = match own {
                crate::quant::linear::OutlierBlock::Int8 { scales, .. }
                | crate::quant::linear::OutlierBlock::Fp8 { scales, .. } => scales,
                _ => Vec::new(),
            };
            cuda.rescale(&mut restored, &scales, &outlier_scales).unwrap();
            restored
        });
        let linears = restored.each_ref().map(TrainedLinear::Quantized);
        let d = d_outputs.each_ref().map(|d| cuda.upload(d.clone()).unwrap());
        let (d_x, found) = cuda.site_backward(&site, &linears, &x, rows.as_ref(), &d).unwrap();
        near(&host(&cuda, &d_x), &expected.0, 3e-3, &what);
        compare(&found, &expected.1, &what);
    }
}

fn compare(found: &SiteGradient, expected: &SiteGradient, what: &str) {
    assert_eq!(found.clips.is_empty(), expected.clips.is_empty(), "{what}");
    if !expected.clips.is_empty() {
        near(&found.clips, &expected.clips, 5e-3, &format!("clips of {what}"));
    }
    for (found, expected) in found.linears.iter().zip(&expected.linears) {
        near(&found.scales, &expected.scales, 5e-3, &format!("scales of {what}"));
        assert_eq!(found.outlier_scales.len(), expected.outlier_scales.len(), "{what}");
        if !expected.outlier_scales.is_empty() {
            let of = format!("outliers of {what}");
            near(&found.outlier_scales, &expected.outlier_scales, 5e-3, &of);
        }
    }
}
