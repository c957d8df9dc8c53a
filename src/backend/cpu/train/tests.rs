//! Every gradient against central differences, in f64, of the forward function with the residues of roundings held constant.

use super::super::isa::Isa;
use super::*;
use crate::backend::{LinearGradient, Matrix, Measurement, Quantization};
use crate::checkpoint::{Dtype, Tensor as StoredTensor};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::hadamard;
use crate::quant::kv::{self, KvFormat};
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::site::{PADDING, Transform};
use crate::quant::weights::{dequantize, round_to_nearest};

fn wave(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * (i + 2 * seed + 3) % 1013) as f32 * 0.61 + seed as f32).sin()).collect()
}

fn tensor(rows: usize, columns: usize, seed: usize) -> HostTensor {
    HostTensor::from_matrix(Matrix { rows, columns, data: wave(rows * columns, seed) })
}

fn copy(x: &HostTensor) -> HostTensor {
    HostTensor::from_matrix(Matrix { rows: x.rows, columns: x.columns, data: x.data.clone() })
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn dot(x: &[f64], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * f64::from(*y)).sum()
}

/// Compares `gradient` at `x` with differences of `loss` along single values and along all of them together.
fn check(what: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-4;
    assert_eq!(x.len(), gradient.len(), "{what}");
    let base = wide(x);
    let norm = wide(gradient).iter().map(|d| d * d).sum::<f64>().sqrt();
    assert!(norm > 0.0, "{what}: there is no gradient");
    let slope = |direction: &[f64]| {
        let at = |step: f64| {
            let moved: Vec<f64> = base.iter().zip(direction).map(|(x, d)| x + step * d).collect();
            loss(&moved)
        };
        (at(STEP) - at(-STEP)) / (2.0 * STEP)
    };
    let near = |found: f64, expected: f64, which: &str| {
        let tolerance = 1e-4 * norm;
        assert!((found - expected).abs() < tolerance, "{what} {which}: {found} for {expected}");
    };
    let stride = (x.len() / 16).max(1) | 1;
    for i in (0..x.len()).step_by(stride) {
        let mut direction = vec![0.0; x.len()];
        direction[i] = 1.0;
        near(gradient[i].into(), slope(&direction), &i.to_string());
    }
    for seed in 0..3 {
        let direction = wide(&wave(x.len(), 90 + seed));
        let length = direction.iter().map(|d| d * d).sum::<f64>().sqrt();
        let direction: Vec<f64> = direction.iter().map(|d| d / length).collect();
        near(dot(&direction, gradient), slope(&direction), "together");
    }
}

fn norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let rows = x.chunks(weight.len()).map(|x| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let inverse = 1.0 / (mean + epsilon).sqrt();
        x.iter().zip(weight).map(move |(x, w)| x * inverse * w).collect::<Vec<_>>()
    });
    rows.flatten().collect()
}

#[test]
fn norms_have_the_gradient_of_the_definition() {
    let cpu = Cpu::new().unwrap();
    for (rows, n) in [(1, 1), (3, 7), (130, 67), (5, 64)] {
        let (x, w, d_y, before) =
            (tensor(rows, n, 1), tensor(1, n, 2), tensor(rows, n, 3), tensor(rows, n, 4));
        let (d_x, d_w) = cpu.rms_norm_backward(&x, &w, 0.1, &d_y, Some(copy(&before))).unwrap();
        let d_x: Vec<f32> = d_x.data.iter().zip(&before.data).map(|(d, b)| d - b).collect();
        let loss = |x: &[f64], w: &[f64]| dot(&norm(x, w, 0.1), &d_y.data);
        check("x", &x.data, &d_x, |moved| loss(moved, &wide(&w.data)));
        check("weight", &w.data, &d_w, |moved| loss(&wide(&x.data), moved));
    }
    let (x, w, d_y) = (tensor(5, 3 * 6, 1), tensor(1, 6, 2), tensor(5, 3 * 6, 3));
    let (d_x, d_w) = cpu.qk_norm_backward(&x, &w, 0.1, copy(&d_y)).unwrap();
    let loss = |x: &[f64], w: &[f64]| dot(&norm(x, w, 0.1), &d_y.data);
    check("x of heads", &x.data, &d_x.data, |moved| loss(moved, &wide(&w.data)));
    check("weight of heads", &w.data, &d_w, |moved| loss(&wide(&x.data), moved));
}

#[test]
fn silu_has_the_gradient_of_the_definition() {
    let cpu = Cpu::new().unwrap();
    let (gate, up, d_z) = (tensor(3, 37, 1), tensor(3, 37, 2), tensor(3, 37, 3));
    let [d_gate, d_up] = cpu.silu_mul_backward(&gate, &up, copy(&d_z)).unwrap();
    let loss = |gate: &[f64], up: &[f64]| {
        let z = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
        dot(&z.collect::<Vec<_>>(), &d_z.data)
    };
    check("gate", &gate.data, &d_gate.data, |moved| loss(moved, &wide(&up.data)));
    check("up", &up.data, &d_up.data, |moved| loss(&wide(&gate.data), moved));
}

#[test]
fn the_divergence_is_the_measured_one_and_has_its_gradient() {
    let cpu = Cpu::new().unwrap();
    for (rows, hidden, vocabulary) in [(1, 3, 2), (5, 11, 37), (101, 7, 70)] {
        let weight = wave(vocabulary * hidden, 5);
        let bytes: Vec<u8> = weight.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = [vocabulary, hidden];
        let stored = StoredTensor::in_memory("head", Dtype::F32, &shape, &bytes);
        let (x, original) = (tensor(rows, hidden, 1), tensor(rows, hidden, 2));
        let head = cpu.loss_head(&stored).unwrap();
        let (nats, d_x) = cpu.divergence_backward(&x, &original, &head).unwrap();
        let dense = cpu.dense(&stored, None).unwrap();
        assert_eq!(nats, cpu.kl_divergence(&x, &original, &dense).unwrap());
        let log_softmax = |x: &[f64]| {
            let logit = |w: &[f32]| dot(x, w);
            let logits: Vec<f64> = weight.chunks(hidden).map(logit).collect();
            let sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            logits.into_iter().map(move |logit| logit - sum).collect::<Vec<_>>()
        };
        let original = wide(&original.data);
        check("hidden states", &x.data, &d_x.data, |moved| {
            let rows = moved.chunks(hidden).zip(original.chunks(hidden));
            let row = |(x, y)| {
                let (p, q) = (log_softmax(y), log_softmax(x));
                p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
            };
            rows.map(row).sum()
        });
    }
}

/// The orthonormal transform in f64.
fn transformed(x: &mut [f64]) {
    let block = hadamard::block(x.len());
    for values in x.chunks_mut(block) {
        let from = values.to_vec();
        for (i, value) in values.iter_mut().enumerate() {
            let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            let sum: f64 = from.iter().enumerate().map(|(j, x)| sign(j) * x).sum();
            *value = sum / (block as f64).sqrt();
        }
    }
}

/// Values of a cache as functions of what goes in, with roundings and ranges as they are at a base point.
#[derive(Clone)]
struct Frozen {
    /// For each value, whether it is clipped, and what is added to it, or in its place.
    values: Vec<(bool, f64)>,
}

impl Frozen {
    fn at(format: &KvFormat, base: &[f64], head_dim: usize) -> Self {
        if !format.is_quantized() {
            return Self { values: vec![(false, 0.0); base.len()] };
        }
        let mut values = Vec::new();
        for head in base.chunks(head_dim) {
            let x: Vec<f32> = head.iter().map(|x| *x as f32).collect();
            let mut codes = vec![0; head_dim];
            let (scale, zero) = kv::quantize(format, &x, &mut codes);
            let mut trip = x.clone();
            kv::round_trip(format, &mut trip);
            let top = f64::from((1u32 << format.bits) - 1);
            for (x, value) in head.iter().zip(trip) {
                let place = x / f64::from(scale) + f64::from(zero);
                let clipped = !(0.0..=top).contains(&place);
                values.push((clipped, f64::from(value) - if clipped { 0.0 } else { *x }));
            }
        }
        Self { values }
    }

    fn of(&self, x: &[f64]) -> Vec<f64> {
        let values = x.iter().zip(&self.values);
        values.map(|(x, (clipped, add))| if *clipped { *add } else { x + add }).collect()
    }
}

/// Attention in f64, one query at a time.
struct PlainAttention<'a> {
    spec: &'a AttentionSpec,
    mean: Option<&'a [f32]>,
}

impl PlainAttention<'_> {
    fn embed(&self, heads: &mut [f64], count: usize) {
        let AttentionSpec { head_dim, seq_len, ref cos, ref sin, .. } = *self.spec;
        let half = head_dim / 2;
        for (row, head) in heads.chunks_mut(head_dim).enumerate() {
            let at = row / count % seq_len * half;
            for i in 0..half {
                let (c, s) = (f64::from(cos[at + i]), f64::from(sin[at + i]));
                let (x, y) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (x * c - y * s, y * c + x * s);
            }
        }
    }

    fn is_rotated(&self) -> bool {
        self.spec.kv.is_quantized() && self.spec.kv.rotate
    }

    fn rotate(&self, heads: &mut [f64]) {
        if self.is_rotated() {
            heads.chunks_mut(self.spec.head_dim).for_each(transformed);
        }
    }

    /// Keys and values as they are quantized.
    fn to_cache(&self, k: &[f64], v: &[f64]) -> [Vec<f64>; 2] {
        let (mut k, mut v) = (k.to_vec(), v.to_vec());
        if self.spec.kv.after_rope {
            self.embed(&mut k, self.spec.kv_heads);
            for row in k.chunks_mut(self.spec.kv_heads * self.spec.head_dim) {
                let means = self.mean.into_iter().flatten();
                row.iter_mut().zip(means).for_each(|(k, mean)| *k -= f64::from(*mean));
            }
        }
        self.rotate(&mut k);
        self.rotate(&mut v);
        [k, v]
    }

    fn run(&self, [q, k, v]: [&[f64]; 3], frozen: &[Frozen; 2]) -> Vec<f64> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = *self.spec;
        let mut q = q.to_vec();
        self.embed(&mut q, heads);
        let [k, v] = self.to_cache(k, v);
        let (mut k, v) = (frozen[0].of(&k), frozen[1].of(&v));
        if self.spec.kv.after_rope {
            self.rotate(&mut q);
        } else {
            self.rotate(&mut k);
            self.embed(&mut k, kv_heads);
        }
        let mut out = vec![0.0; q.len()];
        let reach = self.spec.sliding_window.unwrap_or(seq_len);
        for (row, out) in out.chunks_mut(head_dim).enumerate() {
            let (token, head) = (row / heads, row % heads);
            let position = token % seq_len;
            let seen = token - position.min(reach - 1)..=token;
            let of = |from: &[f64], token: usize| {
                let at = (token * kv_heads + head / (heads / kv_heads)) * head_dim;
                from[at..at + head_dim].to_vec()
            };
            let query = &q[row * head_dim..][..head_dim];
            let score = |token| {
                let key = of(&k, token);
                let product: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                (product / (head_dim as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = seen.clone().map(score).collect();
            let sum: f64 = weights.iter().sum();
            for (weight, token) in weights.iter().zip(seen) {
                let value = of(&v, token);
                out.iter_mut().zip(value).for_each(|(out, v)| *out += weight / sum * v);
            }
        }
        self.rotate(&mut out);
        out
    }
}

#[test]
fn attention_has_the_gradient_of_the_definition() {
    let cpu = Cpu::new().unwrap();
    const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    let formats = [
        KvFormat::FULL,
        INT4,
        KvFormat { rotate: false, clip: 0.7, ..INT4 },
        KvFormat { after_rope: false, clip: 0.8, bits: 3, ..INT4 },
        KvFormat { center: true, clip: 0.9, ..INT4 },
    ];
    let shapes = [(1, 1, 6, 1, 1), (4, 2, 6, 5, 2), (3, 1, 8, 53, 1), (2, 2, 12, 7, 3)];
    for (kv, (shape, window)) in formats
        .iter()
        .zip(shapes.iter().cycle())
        .flat_map(|(kv, shape)| [None, Some(3)].map(|window| (*kv, (*shape, window))))
    {
        let (heads, kv_heads, head_dim, seq_len, windows) = shape;
        let (tokens, half) = (seq_len * windows, head_dim / 2);
        let angle = |i: usize| (i / half) as f32 * 0.3f32.powi((i % half) as i32);
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            seq_len,
            sliding_window: window,
            scale: AttentionSpec::usual_scale(head_dim),
            query_tables: None,
            cos: (0..seq_len * half).map(|i| angle(i).cos()).collect(),
            sin: (0..seq_len * half).map(|i| angle(i).sin()).collect(),
            kv,
        };
        let qkv = Qkv {
            q: tensor(tokens, heads * head_dim, 1),
            k: tensor(tokens, kv_heads * head_dim, 2),
            v: tensor(tokens, kv_heads * head_dim, 3),
        };
        let mean = kv.center.then(|| tensor(1, kv_heads * head_dim, 4));
        let d_heads = tensor(tokens, heads * head_dim, 5);
        let found = cpu.attention_backward(&spec, &qkv, mean.as_ref(), copy(&d_heads)).unwrap();
        let plain = PlainAttention { spec: &spec, mean: mean.as_ref().map(|mean| &mean.data[..]) };
        let base = [&qkv.q, &qkv.k, &qkv.v].map(|x| wide(&x.data));
        let cached = plain.to_cache(&base[1], &base[2]);
        let frozen = cached.map(|x| Frozen::at(&kv, &x, head_dim));
        let outputs = plain.run([&base[0], &base[1], &base[2]], &frozen);
        let copies = Qkv { q: copy(&qkv.q), k: copy(&qkv.k), v: copy(&qkv.v) };
        let own = cpu.attention(&spec, None, copies, mean.as_ref()).unwrap();
        for (found, expected) in own.data.iter().zip(&outputs) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{kv:?}: the outputs differ");
        }
        let gradients = [&found.q, &found.k, &found.v];
        for (at, what) in ["queries", "keys", "values"].into_iter().enumerate() {
            // One token sees itself alone: its score changes nothing.
            if seq_len == 1 && at < 2 {
                assert!(gradients[at].data.iter().all(|d| d.abs() < 1e-6), "{what}");
                continue;
            }
            let x = base[at].iter().map(|x| *x as f32).collect::<Vec<_>>();
            check(&format!("{what} {kv:?} {shape:?}"), &x, &gradients[at].data, |moved| {
                let mut all = [&base[0][..], &base[1], &base[2]];
                all[at] = moved;
                dot(&plain.run(all, &frozen), &d_heads.data)
            });
        }
    }
}

/// A site of `channels` with linears, in a changed format.
struct SiteCase {
    site: SiteFormat,
    linears: Vec<QuantizedLinear>,
    x: HostTensor,
    d_outputs: Vec<HostTensor>,
}

impl SiteCase {
    fn new(numbers: NumberFormat, outliers: OutlierFormat, transform: Transform) -> Self {
        let (channels, outlier_channels, groups) = (41, 3, 3);
        let padding = groups * numbers.group_size + outlier_channels - channels;
        let shuffled = (0..channels as i32).map(|i| (i * 17 + 5) % channels as i32);
        let order = std::iter::repeat_n(PADDING, padding).chain(shuffled).collect();
        let row = RowFormat { numbers, groups, outlier_channels, outlier_format: outliers };
        let site = SiteFormat { channels, order, row, clip: 0.8, transform };
        site.check().unwrap();
        let linear = |(number, (rows, rows_per_scale)): (usize, (usize, usize))| {
            let weights = wave(rows * site.width(), 20 + number);
            let numbers = NumberFormat { bits: numbers.bits.min(4), ..numbers };
            let row = RowFormat { numbers, ..row };
            let format = LinearFormat { row, rows_per_scale };
            round_to_nearest(&weights, rows, &format, Scaling::clipped(0.9)).unwrap()
        };
        let linears: Vec<_> = [(5, 1), (7, 2)].into_iter().enumerate().map(linear).collect();
        // More tokens than a part of a sum has.
        let tokens = 67;
        let mut x = tensor(tokens, channels, 1);
        // A group of zeros has scale 0.
        x.data[..channels].fill(0.0);
        let d_outputs = linears.iter().map(|linear| tensor(tokens, linear.rows, 30)).collect();
        Self { site, linears, x, d_outputs }
    }

    /// The permuted and transformed activation in f64.
    fn permuted(&self, x: &[f64]) -> Vec<f64> {
        let (group, grouped) = (self.site.row.numbers.group_size, self.site.row.grouped_channels());
        let rows = x.chunks(self.site.channels).flat_map(|x| {
            let slot = |channel: &i32| if *channel == PADDING { 0.0 } else { x[*channel as usize] };
            let mut row: Vec<f64> = self.site.order.iter().map(slot).collect();
            if self.site.transform == Transform::Hadamard {
                row[..grouped].chunks_mut(group).for_each(transformed);
            }
            row
        });
        rows.collect()
    }

    /// Values as linears read them: `read` are those at the base point, `clips` each group's ratio.
    fn values(
        &self,
        x: &[f64],
        clips: &[f64],
        base: &[f64],
        read: &[f32],
        scales: &[f32],
    ) -> Vec<f64> {
        let (width, groups) = (self.site.width(), self.site.row.groups);
        let numbers = self.site.row.numbers;
        let limits = numbers.limits();
        let value = |(at, x): (usize, &f64)| {
            let (token, slot) = (at / width, at % width);
            let group = slot / numbers.group_size;
            let residue = f64::from(read[at]) - base[at];
            if group >= groups || numbers.bits == 16 || scales[token * groups + group] == 0.0 {
                return x + residue;
            }
            let scale = f64::from(scales[token * groups + group]);
            let place = base[at] / scale;
            let factor = clips[group] / f64::from(self.site.clip);
            if (f64::from(limits.0)..=f64::from(limits.1)).contains(&place) {
                x + residue * factor
            } else {
                f64::from(read[at]) * factor
            }
        };
        x.iter().enumerate().map(value).collect()
    }

    fn loss(&self, values: &[f64], weights: &[Vec<f64>]) -> f64 {
        let width = self.site.width();
        let linears = weights.iter().zip(&self.d_outputs);
        let of_linear = |(weights, d_y): (&Vec<f64>, &HostTensor)| -> f64 {
            let rows = values.chunks(width).zip(d_y.data.chunks(d_y.columns));
            let row = |(x, d_y): (&[f64], &[f32])| -> f64 {
                let outputs = weights.chunks(width).zip(d_y);
                let product = |w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
                outputs.map(|(w, d_y)| product(w) * f64::from(*d_y)).sum()
            };
            rows.map(row).sum()
        };
        linears.map(of_linear).sum()
    }

    fn run(&self) {
        let cpu = Cpu::new().unwrap();
        let is_quantized = self.site.row.numbers.bits < 16;
        let rows = is_quantized.then(|| cpu.quantize(&self.x, &self.site, "it").unwrap());
        let linears: Vec<_> = self.linears.iter().map(TrainedLinear::Quantized).collect();
        let backward = |cpu: &Cpu, linears: &[TrainedLinear<'_, Cpu>]| {
            cpu.site_backward(&self.site, linears, &self.x, rows.as_ref(), &self.d_outputs).unwrap()
        };
        let (d_x, gradient) = backward(&cpu, &linears);
        let base = self.permuted(&wide(&self.x.data));
        let read = match &rows {
            Some(rows) => cpu.dequantize(rows).unwrap(),
            None => cpu.permute(&self.x, &self.site).unwrap(),
        };
        let scales = rows.as_ref().map_or(&[][..], |rows| &rows.scales);
        let weights: Vec<_> = self.linears.iter().map(|linear| wide(&dequantize(linear))).collect();
        let clips = vec![self.site.clip; self.site.row.groups];
        let values = |x: &[f64], clips: &[f64]| self.values(x, clips, &base, &read.data, scales);
        check("x", &self.x.data, &d_x.data, |moved| {
            self.loss(&values(&self.permuted(moved), &wide(&clips)), &weights)
        });
        if is_quantized {
            check("clips", &clips, &gradient.clips, |moved| {
                self.loss(&values(&base, moved), &weights)
            });
        } else {
            assert!(gradient.clips.is_empty());
        }
        let read = wide(&read.data);
        for (number, linear) in self.linears.iter().enumerate() {
            self.check_scales(number, linear, &gradient.linears[number], &read, &weights);
        }
        // The same weights without codes pass the same gradient back.
        let dense: Vec<_> =
            self.linears.iter().map(|linear| cpu.dense_of(linear).unwrap()).collect();
        let dense: Vec<_> = dense.iter().map(TrainedLinear::Unquantized).collect();
        let (same, none) = backward(&cpu, &dense);
        assert_eq!(same.data, d_x.data);
        assert_eq!(none.linears, vec![LinearGradient::default(); 2]);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (same, again) = pool.install(|| backward(&Cpu::with_isa(isa), &linears));
                assert_eq!((&same.data, &again), (&d_x.data, &gradient), "{isa:?} {threads}");
            }
        }
    }

    /// Compares the gradients of a linear's scales.
    fn check_scales(
        &self,
        number: usize,
        linear: &QuantizedLinear,
        gradient: &LinearGradient,
        values: &[f64],
        weights: &[Vec<f64>],
    ) {
        let (width, groups) = (self.site.width(), self.site.row.groups);
        let group_size = self.site.row.numbers.group_size;
        let with = |scaled: &dyn Fn(usize, usize) -> Option<f64>| {
            let mut all = weights.to_vec();
            for (at, weight) in all[number].iter_mut().enumerate() {
                if let Some(factor) = scaled(at / width, at % width) {
                    *weight *= factor;
                }
            }
            self.loss(values, &all)
        };
        let scales: Vec<f32> = linear.scales.iter().map(|scale| scale.to_f32()).collect();
        check("scales", &scales, &gradient.scales, |moved| {
            with(&|row, slot| {
                let group = slot / group_size;
                let at = row / linear.format.rows_per_scale * groups + group;
                (group < groups).then(|| moved[at] / f64::from(scales[at]))
            })
        });
        match &linear.outliers {
            OutlierBlock::Int8 { scales, .. } | OutlierBlock::Fp8 { scales, .. } => {
                let scales: Vec<f32> = scales.iter().map(|scale| scale.to_f32()).collect();
                check("outlier scales", &scales, &gradient.outlier_scales, |moved| {
                    with(&|row, slot| {
                        (slot >= groups * group_size).then(|| moved[row] / f64::from(scales[row]))
                    })
                });
            }
            OutlierBlock::None | OutlierBlock::F16(_) => {
                assert!(gradient.outlier_scales.is_empty());
            }
        }
    }
}

#[test]
fn a_site_has_the_gradient_of_the_definition() {
    use OutlierFormat::{F16, Fp8, Int8};
    let signed = |bits, codebook, scale| NumberFormat { bits, codebook, group_size: 16, scale };
    let int = |bits| signed(bits, Codebook::Int, ScaleFormat::SIGNED_F16);
    SiteCase::new(int(4), Int8, Transform::Hadamard).run();
    SiteCase::new(int(3), Fp8, Transform::None).run();
    SiteCase::new(int(8), F16, Transform::Hadamard).run();
    SiteCase::new(int(16), Int8, Transform::Hadamard).run();
    SiteCase::new(signed(4, Codebook::Int, ScaleFormat::F16), Int8, Transform::Hadamard).run();
    SiteCase::new(signed(4, Codebook::Fp4, ScaleFormat::F16), Fp8, Transform::Hadamard).run();
    SiteCase::new(signed(4, Codebook::Fp4Bnb, ScaleFormat::F16), F16, Transform::None).run();
}

#[test]
fn other_scales_are_what_products_see() {
    let case = SiteCase::new(
        NumberFormat {
            bits: 4,
            codebook: Codebook::Int,
            group_size: 16,
            scale: ScaleFormat::SIGNED_F16,
        },
        OutlierFormat::Int8,
        Transform::None,
    );
    let mut linear = case.linears[1].clone();
    let twice = |scales: &[f16]| -> Vec<f16> {
        scales.iter().map(|scale| f16::from_f32(2.0 * scale.to_f32())).collect()
    };
    let OutlierBlock::Int8 { scales, .. } = &linear.outliers else { panic!("not INT8") };
    let (scales, outlier_scales) = (twice(&linear.scales), twice(scales));
    Cpu::new().unwrap().rescale(&mut linear, &scales, &outlier_scales).unwrap();
    let doubled: Vec<f32> = dequantize(&case.linears[1]).iter().map(|w| 2.0 * w).collect();
    assert_eq!(dequantize(&linear), doubled);
}
