use super::*;
use crate::quant::{hadamard, kv};

const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
const FORMATS: [KvFormat; 5] = [
    KvFormat::FULL,
    INT4,
    KvFormat { rotate: false, ..INT4 },
    KvFormat { after_rope: false, ..INT4 },
    KvFormat { rotate: false, after_rope: false, clip: 0.9, ..INT4 },
];

struct Case {
    spec: AttentionSpec,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// A layer whose tables are still to be made.
fn spec(heads: usize, kv_heads: usize, head_dim: usize, seq_len: usize) -> AttentionSpec {
    AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        seq_len,
        sliding_window: None,
        scale: AttentionSpec::usual_scale(head_dim),
        query_tables: None,
        cos: [].into(),
        sin: [].into(),
        kv: KvFormat::FULL,
    }
}

/// Attention of windows that follow one another.
fn attention_of_all(isa: Isa, spec: &AttentionSpec, qkv: Qkv<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; qkv.q.len()];
    let rows: Vec<u32> = (0..(out.len() / (spec.heads * spec.head_dim)) as u32).collect();
    attention(isa, spec, &consecutive_windows(&rows, spec.seq_len), qkv, None, &mut out);
    out
}

impl Case {
    fn new(spec: AttentionSpec, windows: usize) -> Self {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, .. } = spec;
        let wave = |rows: usize, columns: usize, seed: usize| -> Vec<f32> {
            (0..rows * columns).map(|i| ((i * (i + seed) % 1009) as f32 * 0.7).sin()).collect()
        };
        let half = head_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 100f32.powf(-((i % half) as f32) / half as f32);
        let tokens = windows * seq_len;
        Self {
            spec: AttentionSpec {
                cos: (0..seq_len * half).map(|i| angle(i).cos()).collect(),
                sin: (0..seq_len * half).map(|i| angle(i).sin()).collect(),
                ..spec
            },
            q: wave(tokens, heads * head_dim, 3),
            k: wave(tokens, kv_heads * head_dim, 5),
            v: wave(tokens, kv_heads * head_dim, 11),
        }
    }

    fn qkv(&self) -> Qkv<&[f32]> {
        Qkv { q: &self.q, k: &self.k, v: &self.v }
    }

    fn run(&self, isa: Isa, format: &KvFormat, threads: usize) -> Vec<f32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let spec = AttentionSpec { kv: *format, ..self.spec.clone() };
        pool.install(|| attention_of_all(isa, &spec, self.qkv()))
    }

    /// Attention by straight loops, one query at a time.
    fn reference(&self, format: &KvFormat) -> Vec<f32> {
        let AttentionSpec { heads, kv_heads, head_dim, seq_len, ref cos, ref sin, .. } = self.spec;
        let reach = self.spec.sliding_window.unwrap_or(seq_len);
        let half = head_dim / 2;
        let rope = |x: &[f32], position: usize| -> Vec<f32> {
            (0..head_dim)
                .map(|i| {
                    let table = position * half + i % half;
                    let other = if i < half { -x[i + half] } else { x[i - half] };
                    x[i] * cos[table] + other * sin[table]
                })
                .collect()
        };
        let cached = |x: &[f32]| -> Vec<f32> {
            let mut x = x.to_vec();
            if format.bits < 16 {
                (0..usize::from(format.rotate)).for_each(|_| hadamard::transform(&mut x));
                kv::round_trip(format, &mut x);
                (0..usize::from(format.rotate)).for_each(|_| hadamard::transform(&mut x));
            }
            x
        };
        let mut out = vec![0.0; self.q.len()];
        for row in 0..self.q.len() / (heads * head_dim) {
            let (position, window) = (row % seq_len, row / seq_len * seq_len);
            for head in 0..heads {
                let at = (row * heads + head) * head_dim;
                let query = rope(&self.q[at..][..head_dim], position);
                let kv_at = |t| ((window + t) * kv_heads + head / (heads / kv_heads)) * head_dim;
                let first = (position + 1).saturating_sub(reach);
                let scores: Vec<f64> = (first..=position)
                    .map(|t| {
                        let key = &self.k[kv_at(t)..][..head_dim];
                        let key = if format.after_rope {
                            cached(&rope(key, t))
                        } else {
                            rope(&cached(key), t)
                        };
                        let dot: f32 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                        (f64::from(dot) / (head_dim as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                for (t, score) in (first..).zip(&scores) {
                    let value = cached(&self.v[kv_at(t)..][..head_dim]);
                    for (out, value) in out[at..].iter_mut().zip(value) {
                        *out += (score / total) as f32 * value;
                    }
                }
            }
        }
        out
    }
}

/// Codes can fall on either side of a tie, so quantized cases are compared by their mean.
#[test]
fn it_agrees_with_straight_loops() {
    for (spec, windows) in [
        (spec(4, 2, 32, 7), 3),
        (spec(9, 3, 64, 21), 1),
        (spec(1, 1, 96, 49), 2),
        (spec(1, 1, 128, 60), 1),
        (spec(2, 1, 2, 1), 2),
        (AttentionSpec { sliding_window: Some(5), ..spec(4, 2, 32, 60) }, 2),
        (AttentionSpec { sliding_window: Some(50), ..spec(2, 2, 16, 101) }, 1),
    ] {
        let case = Case::new(spec, windows);
        for format in FORMATS {
            let (ours, reference) = (case.run(Isa::Portable, &format, 1), case.reference(&format));
            let errors = ours.iter().zip(&reference).map(|(a, b)| f64::from((a - b).abs()));
            let worst = errors.clone().fold(0.0, f64::max);
            let mean = errors.sum::<f64>() / ours.len() as f64;
            let limit = if format.is_quantized() { 0.05 } else { 1e-5 };
            assert!(worst < limit && mean < 1e-5, "{:?} {format:?} {worst:e} {mean:e}", case.spec);
        }
    }
}

#[test]
fn every_set_and_thread_count_gives_the_same_bits() {
    for (spec, windows) in [(spec(4, 2, 32, 53), 2), (spec(3, 1, 96, 101), 1)] {
        let case = Case::new(spec, windows);
        for format in FORMATS {
            let bits = |out: Vec<f32>| out.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let expected = bits(case.run(Isa::Plain, &format, 1));
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let ours = bits(case.run(isa, &format, threads));
                    assert!(ours == expected, "{isa:?} {:?} {format:?} {threads}", case.spec);
                }
            }
        }
    }
}

#[test]
fn a_row_in_several_windows_gives_the_bits_of_each() {
    // A window of 60 tokens, one that begins with 50 of them, and one of 3 tokens of its own.
    let case = Case::new(spec(4, 2, 32, 60), 2);
    // Other rows are in none.
    let shared = |rows: std::ops::Range<u32>| (0..50).chain(rows);
    let placement = Placement {
        windows: shared(50..60).chain(shared(60..70)).chain(110..113).chain([112; 57]).collect(),
        rows: (60..110)
            .chain(50..60)
            .chain(110..120)
            .chain([u32::MAX; 40])
            .chain(120..123)
            .chain([u32::MAX; 7])
            .collect(),
    };
    let Case { q, k, v, .. } = &case;
    for kv in [KvFormat::FULL, INT4] {
        let spec = AttentionSpec { kv, ..case.spec.clone() };
        for isa in Isa::available() {
            let mut ours = vec![f32::NAN; q.len()];
            let windows = placed_windows(&placement, 60);
            attention(isa, &spec, &windows, case.qkv(), None, &mut ours);
            let place = |x: &[f32], width: usize| -> Vec<f32> {
                let rows = placement.windows.iter();
                rows.flat_map(|row| x[*row as usize * width..][..width].to_vec()).collect()
            };
            let (q, k, v) = (place(q, 128), place(k, 64), place(v, 64));
            let expected = attention_of_all(isa, &spec, Qkv { q: &q, k: &k, v: &v });
            for (row, place) in placement.rows.iter().enumerate() {
                let ours = &ours[row * 128..][..128];
                match expected.get(*place as usize * 128..).map(|expected| &expected[..128]) {
                    Some(expected) => assert_eq!(ours, expected, "{isa:?} row {row}"),
                    None => assert!(ours[0].is_nan()),
                }
            }
        }
    }
}

#[test]
fn the_future_and_other_windows_do_not_matter() {
    let mut case = Case::new(spec(2, 1, 32, 55), 2);
    let before = case.run(Isa::Portable, &INT4, 2);
    for row in [50, 51, 52, 53, 54, 60] {
        case.k[row * 32..][..32].fill(1e3);
        case.v[row * 32..][..32].fill(-1e3);
    }
    let after = case.run(Isa::Portable, &INT4, 2);
    for row in 0..110 {
        let same = before[row * 64..][..64] == after[row * 64..][..64];
        assert_eq!(same, row < 50 || (55..60).contains(&row), "row {row}");
    }
}
