//! The paged cache compared with the CPU: its codes are those of `quant::kv`, and what a last token attends to is what
//! attention over an entire window computes. Fresh device memory is NaN, so unused parts of pages are as well.

use half::f16;

use super::cache::{PAGE_TOKENS, PagedCache};
use super::tensor::Activation;
use super::tests::{Random, close, device};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::attention::{CachedHead, keys_of_cache};
use crate::backend::cpu::isa::Isa;
use crate::backend::{AttentionSpec, Forward, Matrix, Memory, Qkv};
use crate::quant::hadamard;
use crate::quant::kv::{self, KvFormat};

const INT4: KvFormat = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };

pub(super) fn spec(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    seq_len: usize,
    kv: KvFormat,
) -> AttentionSpec {
    let half = head_dim / 2;
    let angle = |i: usize| (i / half) as f32 * 100f32.powf(-((i % half) as f32) / half as f32);
    AttentionSpec {
        sliding_window: None,
        heads,
        kv_heads,
        head_dim,
        seq_len,
        scale: AttentionSpec::usual_scale(head_dim),
        query_tables: None,
        cos: (0..seq_len * half).map(|i| angle(i).cos()).collect(),
        sin: (0..seq_len * half).map(|i| angle(i).sin()).collect(),
        kv,
    }
}

/// Rows of the sequences' tokens `from..to`, one sequence after the other.
fn rows(sequences: &[Matrix], parts: &[(usize, usize)]) -> Matrix {
    let columns = sequences[0].columns;
    let part = |(sequence, (from, to)): (&Matrix, &(usize, usize))| {
        sequence.data[from * columns..to * columns].to_vec()
    };
    let data: Vec<f32> = sequences.iter().zip(parts).flat_map(part).collect();
    Matrix { rows: data.len() / columns, columns, data }
}

/// The byte of a page's keys or values that holds a token's channel, and whether it is in the byte's upper half, by the layout
/// in pages.cuh.
fn place_of(
    (head_dim, wide): (usize, bool),
    values: bool,
    token: usize,
    channel: usize,
) -> (usize, bool) {
    let (row, column) = if values { (channel % 16, token) } else { (token, channel % 16) };
    let lane = row % 8 * 4 + column % 8 / 2;
    let (register, odd) = (column / 8 * 2 + row / 8, column % 2);
    let (tile, tiles) = (channel / 16, head_dim / 16);
    let first = tile / 4 * 4;
    let at = first * 32 + lane * (tiles - first).min(4) + tile % 4;
    if wide {
        return (4 * (2 * at + register / 2) + odd * 2 + register % 2, false);
    }
    (4 * at + (odd * 4 + register) / 2, register % 2 == 1)
}

/// A token's codes, scale and zero point of a page.
fn codes_of(
    page: &[u8],
    (head_dim, wide): (usize, bool),
    values: bool,
    token: usize,
) -> (Vec<u8>, f32, u8) {
    let side = if wide { 16 * head_dim } else { 8 * head_dim };
    let code = |channel| {
        let (at, upper) = place_of((head_dim, wide), values, token, channel);
        let byte = page[usize::from(values) * side + at];
        match (wide, upper) {
            (true, _) => byte,
            (false, false) => byte & 15,
            (false, true) => byte >> 4,
        }
    };
    let number = |at: usize| {
        let bytes = [page[2 * side + 2 * at], page[2 * side + 2 * at + 1]];
        f16::from_le_bytes(bytes).to_f32()
    };
    let pair = token % 8 * 2 + token / 8;
    let (scale, zero) = if values {
        (32 + pair, 48 + token % 8 / 2 * 4 + token / 8 * 2 + token % 2)
    } else {
        (2 * pair, 2 * pair + 1)
    };
    ((0..head_dim).map(code).collect(), number(scale), number(zero) as u8)
}

/// Compares a sequence's codes with those of the CPU, from its keys and values before the rotary embedding.
fn check_codes(
    cache: &PagedCache,
    spec: &AttentionSpec,
    sequence: usize,
    keys_and_values: [&Matrix; 2],
    mean: Option<&Matrix>,
    what: &str,
) {
    let AttentionSpec { kv_heads, head_dim, kv, ref cos, ref sin, .. } = *spec;
    for head in 0..kv_heads {
        let own = keys_and_values.map(|x| -> Vec<f32> {
            let rows = x.data.chunks(kv_heads * head_dim);
            rows.flat_map(|row| row[head * head_dim..][..head_dim].to_vec()).collect()
        });
        let [mut keys, values] = own;
        let mean = mean.map_or(&[][..], |mean| &mean.data[head * head_dim..][..head_dim]);
        let unquantized = CachedHead { head_dim, format: &KvFormat::FULL, cos, sin };
        keys_of_cache(Isa::detect().unwrap(), &mut keys, &unquantized, mean);
        for (side, mut x) in [keys, values].into_iter().enumerate() {
            for (token, x) in x.chunks_mut(head_dim).enumerate() {
                if kv.rotate {
                    hadamard::transform(x);
                }
                let mut codes = vec![0; head_dim];
                let (scale, zero) = kv::quantize(&kv, x, &mut codes);
                let page = cache.page(sequence, token / PAGE_TOKENS, head).unwrap();
                let held = (head_dim, kv.bits > 4);
                let found = codes_of(&page, held, side == 1, token % PAGE_TOKENS);
                assert_eq!(found, (codes, scale, zero), "{what}, token {token}");
            }
        }
    }
}

#[test]
fn codes_are_those_of_the_cpu_and_decoding_is_its_attention() {
    let test = "codes_are_those_of_the_cpu_and_decoding_is_its_attention";
    let Some(cuda) = device(test) else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(11);
    let formats = [
        INT4,
        KvFormat { center: true, clip: 0.9, ..INT4 },
        KvFormat { rotate: false, bits: 3, ..INT4 },
        KvFormat { bits: 2, ..INT4 },
        KvFormat { bits: 8, center: true, ..INT4 },
        KvFormat { bits: 6, rotate: false, ..INT4 },
        KvFormat::FULL,
    ];
    let lengths = [1, 15, 16, 17, 300];
    for (heads, kv_heads, head_dim) in
        [(4, 4, 128), (8, 2, 64), (4, 1, 96), (18, 2, 128), (3, 3, 32), (2, 1, 80)]
    {
        for format in formats {
            let what = format!("{heads}/{kv_heads} x {head_dim} {format:?}");
            let spec = spec(heads, kv_heads, head_dim, 320, format);
            let mut tokens = |heads: usize| -> Vec<Matrix> {
                let columns = heads * head_dim;
                let of = |rows: &usize| Matrix {
                    rows: *rows,
                    columns,
                    data: random.values(rows * columns),
                };
                lengths.iter().map(of).collect()
            };
            let (q, k, v) = (tokens(heads), tokens(kv_heads), tokens(kv_heads));
            let columns = kv_heads * head_dim;
            let mean = Matrix { rows: 1, columns, data: random.values(columns) };
            let mean = format.center.then_some(mean);
            let on_device = mean.clone().map(|mean| cuda.upload(mean).unwrap());
            let mut cache = cuda.paged_cache(&spec, lengths.len(), 40, on_device).unwrap();
            // Most, then some, then the last tokens, one at a time.
            let upto = |thirds: usize| lengths.map(|length| (length * thirds / 3).min(length - 1));
            let stops = [[0; 5], upto(1), upto(2), upto(3), lengths];
            for stop in stops.windows(2) {
                let parts: Vec<(usize, usize)> = stop[0].into_iter().zip(stop[1]).collect();
                let added: Vec<usize> = parts.iter().map(|(from, to)| to - from).collect();
                let [k, v] = [&k, &v].map(|x| cuda.half_tensor(&rows(x, &parts)));
                cuda.append(&mut cache, &k, &v, &added).unwrap();
            }
            assert_eq!(cache.lengths(), lengths, "{what}");

            if format.is_quantized() {
                for sequence in 0..lengths.len() {
                    let [k, v] = [&k[sequence], &v[sequence]];
                    check_codes(&cache, &spec, sequence, [k, v], mean.as_ref(), &what);
                }
            }

            let last: Vec<(usize, usize)> =
                lengths.iter().map(|length| (length - 1, *length)).collect();
            let queries = cuda.half_tensor(&rows(&q, &last));
            let out: Activation = cuda.decode(&cache, &queries).unwrap();
            let found = cuda.values(&out);
            assert_eq!(found, cuda.values(&cuda.decode(&cache, &queries).unwrap()), "{what}");
            for (sequence, seq_len) in lengths.into_iter().enumerate() {
                let own = AttentionSpec { seq_len, ..spec.clone() };
                let [q, k, v] = [&q, &k, &v].map(|x| cpu.upload(x[sequence].clone()).unwrap());
                let mean = mean.clone().map(|mean| cpu.upload(mean).unwrap());
                let expected = cpu.attention(&own, None, Qkv { q, k, v }, mean.as_ref()).unwrap();
                let width = heads * head_dim;
                let expected = &expected.values()[(seq_len - 1) * width..];
                close(&found[sequence * width..][..width], expected, 3e-3, &what);
            }
        }
    }
}

/// Many pages of many heads, which a block makes several of, compared with the same tokens added a page at a time, a head a block; the
/// test above compares those with the CPU.
#[test]
fn heads_made_one_after_another_are_those_made_alone() {
    let test = "heads_made_one_after_another_are_those_made_alone";
    let Some(cuda) = device(test) else { return };
    let mut random = Random(12);
    for (kv_heads, head_dim, format) in [
        (19, 128, KvFormat { center: true, clip: 0.9, ..INT4 }),
        (18, 128, KvFormat { bits: 3, ..INT4 }),
        (18, 64, INT4),
    ] {
        let spec = spec(kv_heads, kv_heads, head_dim, 1400, format);
        let columns = kv_heads * head_dim;
        let lengths = [1393, 1040, 1100];
        let mut all = || -> Vec<Matrix> {
            let of = |rows| Matrix { rows, columns, data: random.values(rows * columns) };
            lengths.into_iter().map(of).collect()
        };
        let (k, v) = (all(), all());
        let mean = format.center.then(|| random.values(columns));
        let fill = |steps: &[[usize; 3]]| {
            let upload = |data| cuda.upload(Matrix { rows: 1, columns, data }).unwrap();
            let mut cache = cuda.paged_cache(&spec, 3, 264, mean.clone().map(upload)).unwrap();
            for stop in steps.windows(2) {
                let parts: Vec<(usize, usize)> = stop[0].into_iter().zip(stop[1]).collect();
                let added: Vec<usize> = parts.iter().map(|(from, to)| to - from).collect();
                let [k, v] = [&k, &v].map(|x| cuda.half_tensor(&rows(x, &parts)));
                cuda.append(&mut cache, &k, &v, &added).unwrap();
            }
            cache
        };
        // Begins and ends within pages.
        let some = [5, 0, 16];
        let together = fill(&[[0; 3], some, lengths]);
        let steps = (0..=88).map(|i| {
            std::array::from_fn(|sequence| (some[sequence] + 16 * i).min(lengths[sequence]))
        });
        let alone = fill(&std::iter::once([0; 3]).chain(steps).collect::<Vec<_>>());
        assert_eq!(together.lengths(), alone.lengths());
        for (sequence, length) in lengths.into_iter().enumerate() {
            // The last page holds tokens that no one has written.
            for page in 0..length / PAGE_TOKENS {
                for head in 0..kv_heads {
                    let [found, expected] =
                        [&together, &alone].map(|cache| cache.page(sequence, page, head).unwrap());
                    assert!(found == expected, "{format:?}, {sequence}, page {page}, head {head}");
                }
            }
        }
    }
}

#[test]
fn a_sliding_window_sees_what_it_sees_on_the_cpu() {
    let Some(cuda) = device("a_sliding_window_sees_what_it_sees_on_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(17);
    // Windows within a page, of entire pages, over several splits, and wider than a sequence.
    for (length, reach) in [(300, 1), (300, 16), (300, 37), (300, 299), (3000, 2000), (20, 64)] {
        for (heads, kv_heads, format) in [(4, 4, INT4), (8, 2, INT4), (4, 2, KvFormat::FULL)] {
            let mut spec = spec(heads, kv_heads, 64, length.max(reach) + 1, format);
            spec.sliding_window = Some(reach);
            let pages = length.div_ceil(PAGE_TOKENS);
            let mut cache = cuda.paged_cache(&spec, 1, pages, None).unwrap();
            let mut tokens = |heads: usize| {
                let columns = 64 * heads;
                Matrix { rows: length, columns, data: random.values(length * columns) }
            };
            let (q, k, v) = (tokens(heads), tokens(kv_heads), tokens(kv_heads));
            let [on_k, on_v] = [&k, &v].map(|x| cuda.half_tensor(x));
            cuda.append(&mut cache, &on_k, &on_v, &[length]).unwrap();
            let width = heads * 64;
            let last = q.data[(length - 1) * width..].to_vec();
            let last = cuda.half_tensor(&Matrix { rows: 1, columns: width, data: last });
            let found = cuda.values(&cuda.decode(&cache, &last).unwrap());
            let own = AttentionSpec { seq_len: length, ..spec };
            let [q, k, v] = [q, k, v].map(|x| cpu.upload(x).unwrap());
            let expected = cpu.attention(&own, None, Qkv { q, k, v }, None).unwrap();
            let expected = &expected.values()[(length - 1) * width..];
            close(
                &found,
                expected,
                3e-3,
                &format!("{reach} of {length}, {heads}/{kv_heads} {format:?}"),
            );
        }
    }
}

#[test]
fn a_long_sequence_gives_the_same_in_one_part_as_in_many() {
    let Some(cuda) = device("a_long_sequence_gives_the_same_in_one_part_as_in_many") else {
        return;
    };
    let mut random = Random(13);
    // More than 32 pages a warp where it is in one part, and not entire groups of them.
    let length = 5003;
    let int8 = KvFormat { bits: 8, ..INT4 };
    for (heads, format) in
        [(8, INT4), (2, INT4), (8, int8), (2, int8), (8, KvFormat::FULL), (2, KvFormat::FULL)]
    {
        let spec = spec(heads, 2, 64, length, format);
        let mut cache = cuda.paged_cache(&spec, 1, length.div_ceil(PAGE_TOKENS), None).unwrap();
        let mut tokens = |rows: usize, columns: usize| {
            cuda.half_tensor(&Matrix { rows, columns, data: random.values(rows * columns) })
        };
        let (k, v, q) = (tokens(length, 128), tokens(length, 128), tokens(1, heads * 64));
        cuda.append(&mut cache, &k, &v, &[length]).unwrap();
        let many = cuda.values(&cuda.decode(&cache, &q).unwrap());
        cache.unsplit();
        let one = cuda.values(&cuda.decode(&cache, &q).unwrap());
        close(&one, &many, 2e-3, &format!("{heads} heads {format:?}"));
    }
}

#[test]
fn an_empty_sequence_gives_zeros_and_a_full_cache_says_so() {
    let Some(cuda) = device("an_empty_sequence_gives_zeros_and_a_full_cache_says_so") else {
        return;
    };
    let spec = spec(2, 1, 64, 64, INT4);
    let mut cache = cuda.paged_cache(&spec, 2, 2, None).unwrap();
    let mut random = Random(12);
    let mut tokens = |rows: usize, columns: usize| {
        cuda.half_tensor(&Matrix { rows, columns, data: random.values(rows * columns) })
    };
    let (k, v) = (tokens(33, 64), tokens(33, 64));
    let error = cuda.append(&mut cache, &k, &v, &[0, 33]).unwrap_err();
    assert!(error.message().contains("too few pages"), "{error}");
    cuda.append(&mut cache, &k, &v, &[0, 32]).unwrap();
    let q = tokens(2, 128);
    let found = cuda.values(&cuda.decode(&cache, &q).unwrap());
    assert!(found[..128].iter().all(|value| *value == 0.0));
    assert!(found[128..].iter().all(|value| value.is_finite()));
}

#[test]
fn keys_quantized_before_the_embedding_and_odd_heads_are_refused() {
    let Some(cuda) = device("keys_quantized_before_the_embedding_and_odd_heads_are_refused") else {
        return;
    };
    for (head_dim, kv, what) in [
        (64, KvFormat { after_rope: false, ..INT4 }, "before it"),
        (256, INT4, "256"),
        (72, INT4, "72"),
    ] {
        let error = cuda.paged_cache(&spec(2, 2, head_dim, 16, kv), 1, 1, None).err().unwrap();
        assert!(error.message().contains(what), "{error}");
    }
}
