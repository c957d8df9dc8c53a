//! Steps of mixed sequences compared with the CPU, which computes them with the code of attention over windows.

use super::cache_tests::spec;
use super::tests::{Random, close, device};
use crate::backend::cpu::Cpu;
use crate::backend::{AttentionSpec, Decode, DecodeStep, Matrix, Memory, Qkv, SequenceStep};
use crate::quant::kv::KvFormat;

const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };

/// A step of these `(held, added)`; a sequence without new tokens is left out. A page of sequence i is every third one.
fn step(backend: &impl Decode, counts: &[(usize, usize)]) -> DecodeStep {
    let pages = |own: u32| {
        let needed = 300usize.div_ceil(backend.page_tokens()) as u32;
        (0..needed).map(|page| page * counts.len() as u32 + own).collect()
    };
    let sequences = counts.iter().enumerate().filter(|(_, (_, added))| *added > 0);
    let sequences = sequences.map(|(own, (held, added))| SequenceStep {
        pages: pages(own as u32),
        held: *held,
        added: *added,
    });
    DecodeStep { sequences: sequences.collect() }
}

/// What a backend's cache makes of steps.
struct Decoding<'a, B: Decode> {
    backend: &'a B,
    spec: &'a AttentionSpec,
    cache: B::Cache,
    mean: Option<B::Hidden>,
}

impl<'a, B: Decode> Decoding<'a, B> {
    fn new(backend: &'a B, spec: &'a AttentionSpec, mean: Option<&Matrix>) -> Self {
        let pages = 4 * 300usize.div_ceil(backend.page_tokens());
        let cache = backend.cache(spec, pages).unwrap();
        let mean = mean.map(|mean| backend.upload(mean.clone()).unwrap());
        Self { backend, spec, cache, mean }
    }

    fn attend(&mut self, counts: &[(usize, usize)], qkv: &[Matrix; 3]) -> Vec<f32> {
        let Self { backend, spec, cache, mean } = self;
        let step = step(*backend, counts);
        let step = backend.begin_step(&step, &vec![0; step.tokens()]).unwrap();
        let [q, k, v] = qkv.clone().map(|x| backend.upload_activation(x).unwrap());
        let qkv = Qkv { q, k, v };
        let out = backend.cached_attention(spec, cache, &step, qkv, mean.as_ref()).unwrap();
        backend.download_activation(&out).unwrap().data
    }
}

/// Rounds to what the device's results are held in.
fn random_rows(random: &mut Random, rows: usize, columns: usize) -> Matrix {
    Matrix { rows, columns, data: random.values(rows * columns) }
}

#[test]
fn steps_of_newcomers_and_decodes_agree_with_the_cpu() {
    let Some(cuda) = device("steps_of_newcomers_and_decodes_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(21);
    let formats = [
        INT4,
        KvFormat { center: true, bits: 3, clip: 0.9, ..INT4 },
        KvFormat { bits: 8, ..INT4 },
        KvFormat::FULL,
    ];
    // New tokens of four sequences. Some begin together with one length, some with another, some go on.
    let steps: [[usize; 4]; 7] = [
        [40, 0, 40, 1],
        [1, 17, 1, 1],
        [1, 1, 5, 0],
        [1, 1, 1, 33],
        [0, 200, 1, 1],
        [1, 1, 1, 1],
        [16, 0, 0, 0],
    ];
    for (heads, kv_heads, head_dim) in [(4, 4, 128), (8, 2, 64), (4, 1, 96), (18, 2, 128)] {
        for kv in formats {
            let spec = spec(heads, kv_heads, head_dim, 300, kv);
            let columns = kv_heads * head_dim;
            let mean = kv.center.then(|| random_rows(&mut random, 1, columns));
            let mut on_device = Decoding::new(&cuda, &spec, mean.as_ref());
            let mut on_host = Decoding::new(&cpu, &spec, mean.as_ref());
            let mut held = [0; 4];
            for (number, added) in steps.iter().enumerate() {
                let counts: Vec<(usize, usize)> = held.into_iter().zip(*added).collect();
                let tokens = added.iter().sum();
                let qkv = [heads * head_dim, columns, columns]
                    .map(|columns| random_rows(&mut random, tokens, columns));
                let found = on_device.attend(&counts, &qkv);
                let expected = on_host.attend(&counts, &qkv);
                let what = format!("{heads}/{kv_heads} x {head_dim} {kv:?}, step {number}");
                close(&found, &expected, 3e-3, &what);
                held.iter_mut().zip(added).for_each(|(held, added)| *held += added);
            }
        }
    }
}

#[test]
fn a_decoded_token_has_the_same_bits_whatever_the_others_are() {
    let Some(cuda) = device("a_decoded_token_has_the_same_bits_whatever_the_others_are") else {
        return;
    };
    let mut random = Random(22);
    for (heads, kv) in [(4, INT4), (8, KvFormat::FULL)] {
        let spec = spec(heads, 4, 64, 300, kv);
        let rows = |random: &mut Random, tokens: usize| {
            [heads * 64, 256, 256].map(|columns| random_rows(random, tokens, columns))
        };
        let (prompt, next) = (rows(&mut random, 120), rows(&mut random, 1));
        let mut results = Vec::new();
        // The first sequence among others of other lengths; it is the second in the last run.
        for (others, first) in [([5, 250], true), ([200, 1], true), ([30, 3], false)] {
            let mut decoding = Decoding::new(&cuda, &spec, None);
            let [a, b] = others;
            let place = |own, (a, b)| if first { [own, a, b] } else { [a, own, b] };
            let counts = place((0, 120), ((0, a), (0, b)));
            let others = rows(&mut random, a + b);
            let joined = |own: &[Matrix; 3], others: &[Matrix; 3], before: usize| {
                [0, 1, 2].map(|i| {
                    let (own, others) = (&own[i], &others[i]);
                    let (head, tail) = others.data.split_at(before * own.columns);
                    let data = [head, &own.data, tail].concat();
                    Matrix { rows: own.rows + others.rows, columns: own.columns, data }
                })
            };
            decoding.attend(&counts, &joined(&prompt, &others, if first { 0 } else { a }));
            let counts = place((120, 1), ((a, 1), (b, 1)));
            let others = rows(&mut random, 2);
            let out = decoding.attend(&counts, &joined(&next, &others, usize::from(!first)));
            let width = heads * 64;
            let at = if first { 0 } else { width };
            results.push(out[at..at + width].iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
        assert!(results[0] == results[1] && results[1] == results[2], "{kv:?}");
    }
}

#[test]
fn logits_are_not_rounded_to_halves() {
    let Some(cuda) = device("logits_are_not_rounded_to_halves") else { return };
    use crate::checkpoint::{Dtype, Tensor};
    let mut random = Random(23);
    let (x, weight) = (random_rows(&mut random, 3, 64), random_rows(&mut random, 40, 64));
    let bytes = super::tests::bytes_of(&weight.data, Dtype::F16);
    let tensor = Tensor::in_memory("head", Dtype::F16, &[40, 64], &bytes);
    let head = cuda.head(&cuda.load(tensor).unwrap()).unwrap();
    let found = cuda.logits(&cuda.half_tensor(&x), &head).unwrap();
    let product = |row: usize, column: usize| -> f64 {
        let pairs = x.data[row * 64..][..64].iter().zip(&weight.data[column * 64..][..64]);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let expected: Vec<f32> = (0..120).map(|at| product(at / 40, at % 40) as f32).collect();
    assert_eq!((found.rows, found.columns), (3, 40));
    close(&found.data, &expected, 1e-5, "logits");
}
