use super::super::attention::{attention, consecutive_windows};
use super::*;
use crate::quant::kv::KvFormat;

const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
const FORMATS: [KvFormat; 8] = [
    KvFormat::FULL,
    INT4,
    KvFormat { bits: 2, ..INT4 },
    KvFormat { bits: 3, ..INT4 },
    KvFormat { bits: 8, rotate: false, ..INT4 },
    KvFormat { after_rope: false, ..INT4 },
    KvFormat { rotate: false, after_rope: false, clip: 0.9, ..INT4 },
    KvFormat { center: true, ..INT4 },
];

/// A layer of these heads, and queries, keys and values of `tokens` tokens.
struct Case {
    spec: AttentionSpec,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mean: Option<Vec<f32>>,
}

impl Case {
    fn new(heads: [usize; 2], head_dim: usize, tokens: usize, kv: KvFormat, seed: usize) -> Self {
        let [heads, kv_heads] = heads;
        let wave = |columns: usize, seed: usize| -> Vec<f32> {
            (0..tokens * columns).map(|i| ((i * (i + seed) % 1009) as f32 * 0.7).sin()).collect()
        };
        let half = head_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 100f32.powf(-((i % half) as f32) / half as f32);
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            seq_len: tokens,
            sliding_window: None,
            scale: AttentionSpec::usual_scale(head_dim),
            query_tables: None,
            cos: (0..tokens * half).map(|i| angle(i).cos()).collect(),
            sin: (0..tokens * half).map(|i| angle(i).sin()).collect(),
            kv,
        };
        let mean = kv
            .is_centered()
            .then(|| (0..kv_heads * head_dim).map(|i| (i as f32 * 0.3).cos() * 0.5).collect());
        let (q, k) = (wave(heads * head_dim, seed + 3), wave(kv_heads * head_dim, seed + 5));
        Self { spec, q, k, v: wave(kv_heads * head_dim, seed + 11), mean }
    }

    /// Attention over the entire window.
    fn prefill(&self, isa: Isa) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.q.len()];
        let rows: Vec<u32> = (0..self.spec.seq_len as u32).collect();
        let windows = consecutive_windows(&rows, self.spec.seq_len);
        let qkv = Qkv { q: &self.q[..], k: &self.k[..], v: &self.v[..] };
        attention(isa, &self.spec, &windows, qkv, self.mean.as_deref(), &mut out);
        out
    }

    fn rows(&self, tokens: std::ops::Range<usize>) -> [&[f32]; 3] {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let part = |x, heads| part(x, heads * head_dim, tokens.clone());
        [part(&self.q, heads), part(&self.k, kv_heads), part(&self.v, kv_heads)]
    }
}

fn part(x: &[f32], columns: usize, tokens: std::ops::Range<usize>) -> &[f32] {
    &x[tokens.start * columns..tokens.end * columns]
}

/// Decodes `cases`, sequences that share a layer, in steps: `steps[i][j]` tokens of sequence j in step i.
fn decode(isa: Isa, cases: &[Case], page_tokens: usize, steps: &[Vec<usize>]) -> Vec<Vec<f32>> {
    let longest = cases.iter().map(|case| case.spec.seq_len).max().unwrap();
    let spec = &cases.iter().find(|case| case.spec.seq_len == longest).unwrap().spec;
    let each = longest.div_ceil(page_tokens);
    let count = cases.len() * each;
    let mut cache = PagedCache::new(spec, page_tokens, count);
    // Pages of a sequence lie apart, and in no order.
    let coprime = |stride: &usize| {
        !(2..=*stride).any(|d| stride.is_multiple_of(d) && count.is_multiple_of(d))
    };
    let stride = (7..).find(coprime).unwrap();
    let page = |index: usize| (index * stride % count) as u32;
    let mut held = vec![0; cases.len()];
    let mut outs = vec![Vec::new(); cases.len()];
    for step in steps {
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let mut sequences = Vec::new();
        let present: Vec<usize> = (0..cases.len()).filter(|i| step[*i] > 0).collect();
        for &i in &present {
            let [own_q, own_k, own_v] = cases[i].rows(held[i]..held[i] + step[i]);
            q.extend_from_slice(own_q);
            k.extend_from_slice(own_k);
            v.extend_from_slice(own_v);
            let pages = (0..each).map(|number| page(number * cases.len() + i)).collect();
            sequences.push(SequenceStep { pages, held: held[i], added: step[i] });
        }
        let mut out = vec![f32::NAN; q.len()];
        let qkv = Qkv { q: &q[..], k: &k[..], v: &v[..] };
        let mean = cases[0].mean.as_deref();
        cached_attention(isa, spec, &mut cache, &DecodeStep { sequences }, qkv, mean, &mut out);
        let mut out = &out[..];
        for &i in &present {
            let (own, rest) = out.split_at(step[i] * spec.heads * spec.head_dim);
            outs[i].extend_from_slice(own);
            out = rest;
            held[i] += step[i];
        }
    }
    outs
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn decoding_has_the_bits_of_attention_over_the_window() {
    let isa = Isa::detect().unwrap();
    for kv in FORMATS {
        for (heads, head_dim) in [([4, 2], 16), ([3, 1], 64), ([2, 2], 128), ([2, 1], 20)] {
            let case = Case::new(heads, head_dim, 150, kv, 0);
            let expected = bits(&case.prefill(isa));
            let one_by_one = vec![vec![1]; 150];
            let prompt_first: Vec<_> = [vec![100]].into_iter().chain(vec![vec![1]; 50]).collect();
            let parts = vec![vec![3], vec![64], vec![60], vec![23]];
            for steps in [one_by_one, prompt_first, parts] {
                for page_tokens in [8, 16, 64] {
                    let found = decode(isa, std::slice::from_ref(&case), page_tokens, &steps);
                    assert!(
                        bits(&found[0]) == expected,
                        "{kv:?} {heads:?} x {head_dim}, pages of {page_tokens}"
                    );
                }
            }
        }
    }
}

#[test]
fn other_sequences_of_a_step_change_no_bit() {
    let isa = Isa::detect().unwrap();
    for kv in FORMATS {
        let cases = [(30, 0), (90, 7), (71, 19)]
            .map(|(tokens, seed)| Case::new([4, 2], 32, tokens, kv, seed));
        let mut steps = vec![vec![20, 0, 0], vec![1, 80, 0], vec![0, 1, 70], vec![1, 1, 1]];
        steps.extend(vec![vec![1, 1, 0]; 8]);
        let found = decode(isa, &cases, 16, &steps);
        for (case, found) in cases.iter().zip(&found) {
            let expected = case.prefill(isa);
            assert!(found.len() > 64 && bits(found) == bits(&expected[..found.len()]), "{kv:?}");
        }
    }
}

#[test]
fn a_sliding_window_sees_what_it_sees_over_the_window() {
    let isa = Isa::detect().unwrap();
    for kv in [FORMATS[0], FORMATS[1], FORMATS[5]] {
        for reach in [1, 5, 64, 65, 100] {
            let mut case = Case::new([4, 2], 32, 170, kv, 3);
            case.spec.sliding_window = Some(reach);
            let expected = bits(&case.prefill(isa));
            let mut steps = vec![vec![40]];
            steps.extend(vec![vec![1]; 100]);
            steps.push(vec![30]);
            let found = decode(isa, &[case], 64, &steps);
            assert!(bits(&found[0]) == expected, "{kv:?} reach {reach}");
        }
    }
}

#[test]
fn a_page_takes_the_bytes_of_its_codes() {
    let kv = |bits| KvFormat { bits, ..INT4 };
    let bytes = |kv| page_bytes(&Case::new([4, 2], 64, 1, kv, 0).spec, 64);
    // 64 tokens of 2 heads of 64 channels, keys and values; 3 bytes of scale and zero point each.
    let values = 2 * 2 * 64 * 64;
    let numbers = 2 * 2 * 64 * 3;
    for bits in [2, 3, 4, 8] {
        assert_eq!(bytes(kv(bits)), values * usize::from(bits) / 8 + numbers);
    }
    assert_eq!(bytes(KvFormat::FULL), 4 * values);
}
