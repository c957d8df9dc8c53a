//! Planted errors, and how far two sides may be apart.

use half::f16;

use super::bounds::{attention_error, half_ulp, magnitude};
use super::*;
use crate::backend::{AttentionSpec, Memory, Quantization};
use crate::checkpoint::{Dtype, Tensor};
use crate::model::block::{Leaving, Site, Treatment};
use crate::model::experts::{Choice, Router};
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::kv::KvFormat;
use crate::quant::linear::OutlierBlock;
use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::rows::{OutlierRows, QuantizedRows};
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::weights::round_to_nearest;

const TOKENS: usize = 12;
const HIDDEN: usize = 64;

/// Values in -1..1.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn site(
    channels: usize,
    rows: &[usize],
    outlier_format: OutlierFormat,
    codebook: Codebook,
) -> QuantizedSite<QuantizedLinear> {
    let (group_size, outlier_channels) = (16, 20);
    let energy: Vec<f64> = random(channels, 3).into_iter().map(f64::from).collect();
    let row = RowFormat {
        numbers: NumberFormat { bits: 4, codebook, group_size, scale: ScaleFormat::SIGNED_F16 },
        groups: (channels - outlier_channels).div_ceil(group_size),
        outlier_channels,
        outlier_format,
    };
    let order = channel_order(&energy, true, outlier_channels, group_size);
    let format = SiteFormat { channels, order, row, clip: 0.95, transform: Transform::Hadamard };
    let linears = rows.iter().enumerate().map(|(at, &rows)| {
        let weights = random(rows * channels, at as u64);
        let permuted = format.permute_rows_plain(&weights, rows);
        let weights = row.weights(4, codebook, 1);
        Some(round_to_nearest(&permuted, rows, &weights, Scaling::clipped(1.0)).unwrap())
    });
    let linears = linears.collect();
    QuantizedSite { format, linears }
}

fn sites() -> Vec<QuantizedSite<QuantizedLinear>> {
    vec![
        site(HIDDEN, &[64, 32, 32], OutlierFormat::Int8, Codebook::Int),
        site(HIDDEN, &[64], OutlierFormat::F16, Codebook::Int),
        site(HIDDEN, &[96, 96], OutlierFormat::Fp8, Codebook::Fp4),
        site(96, &[64], OutlierFormat::Int8, Codebook::Fp4Bnb),
    ]
}

fn names() -> Vec<Vec<String>> {
    [&["q", "k", "v"][..], &["o"], &["gate", "up"], &["down"]]
        .map(|names| names.iter().map(|name| (*name).to_owned()).collect())
        .into()
}

fn block(cpu: &Cpu, sites: &[QuantizedSite<QuantizedLinear>]) -> Block<Cpu> {
    let ones = || cpu.upload(Matrix { rows: 1, columns: HIDDEN, data: vec![1.0; HIDDEN] }).unwrap();
    let site = |at: usize| {
        let packed =
            sites[at].linears.iter().flatten().map(|linear| cpu.pack(linear, None).unwrap());
        Site {
            at,
            name: format!("site {at}"),
            treatment: Treatment::Quantized(sites[at].format.clone()),
            linears: packed.map(Linear::Packed).collect(),
            biases: sites[at].linears.iter().map(|_| None).collect(),
            leaving: Leaving::unchanged(),
        }
    };
    Block {
        index: 0,
        norms: Some([ones(), ones()]),
        epsilon: 1e-5,
        key_mean: None,
        qk_norm: None,
        head_order: None,
        activation: Activation::Silu,
        router: None,
        sites: (0..sites.len()).map(site).collect(),
    }
}

fn spec() -> AttentionSpec {
    AttentionSpec {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        seq_len: TOKENS,
        sliding_window: None,
        scale: AttentionSpec::usual_scale(16),
        query_tables: None,
        cos: vec![1.0; TOKENS * 8].into(),
        sin: vec![0.0; TOKENS * 8].into(),
        kv: KvFormat { bits: 4, ..KvFormat::FULL },
    }
}

/// What is found where the device has other sites or another mean key than the checkpoint.
fn findings(
    change: impl FnOnce(&mut Vec<QuantizedSite<QuantizedLinear>>),
    key_mean: Option<&[f32]>,
) -> Findings {
    let cpu = Cpu::new().unwrap();
    let sites = sites();
    let mut planted = sites.clone();
    change(&mut planted);
    let block = block(&cpu, &sites);
    let mut comparison = Comparison::new(&cpu, &cpu, &block, &planted, names(), key_mean).unwrap();
    comparison.sites = &sites;
    comparison.run(&AttentionSpecs::alike(spec()), &mut states(&cpu)).unwrap()
}

/// Hidden states of one window.
fn states(cpu: &Cpu) -> <Cpu as Memory>::Hidden {
    cpu.upload(Matrix { rows: TOKENS, columns: HIDDEN, data: random(TOKENS * HIDDEN, 7) }).unwrap()
}

fn linear(
    sites: &mut [QuantizedSite<QuantizedLinear>],
    site: usize,
    linear: usize,
) -> &mut QuantizedLinear {
    sites[site].linears[linear].as_mut().unwrap()
}

#[test]
fn two_that_are_the_same_differ_in_nothing() {
    let found = findings(|_| {}, None);
    assert_eq!(found.faults, [""; 0]);
    assert_eq!((found.sites, found.linears), (4, 7));
    assert_eq!((found.product, found.attention), (0.0, 0.0));
}

#[test]
fn an_error_in_one_of_two_experts_is_found() {
    let cpu = Cpu::new().unwrap();
    let mut sites = sites();
    sites[2] = site(HIDDEN, &[96; 4], OutlierFormat::Fp8, Codebook::Fp4);
    sites.push(site(96, &[64], OutlierFormat::Int8, Codebook::Int));
    let experts = [&["q", "k", "v"][..], &["o"], &["gate 0", "up 0", "gate 1", "up 1"]];
    let outputs = [&["down 0"][..], &["down 1"]];
    let names: Vec<Vec<String>> = experts
        .iter()
        .chain(&outputs)
        .map(|names| names.iter().map(|&n| n.to_owned()).collect())
        .collect();
    let mut block = block(&cpu, &sites);
    let bytes: Vec<u8> = random(2 * HIDDEN, 5).into_iter().flat_map(f32::to_le_bytes).collect();
    let router = Tensor::in_memory("router", Dtype::F32, &[2, HIDDEN], &bytes);
    block.router = Some(Router {
        weight: cpu.dense(&cpu.load(router).unwrap(), None).unwrap(),
        choice: Choice { per_token: 1, normalized: true, scale: 1.0, sigmoid_bias: None },
        shared: None,
    });
    let mut planted = sites.clone();
    linear(&mut planted, 4, 0).codes[3] ^= 1;
    for (on_device, faults) in [(&sites, 0), (&planted, 1)] {
        let mut comparison =
            Comparison::new(&cpu, &cpu, &block, on_device, names.clone(), None).unwrap();
        comparison.sites = &sites;
        let found = comparison.run(&AttentionSpecs::alike(spec()), &mut states(&cpu)).unwrap();
        assert_eq!(found.faults.len(), faults, "{:?}", found.faults);
        assert!(
            found.faults.iter().all(|fault| fault.starts_with("down 1: ")),
            "{:?}",
            found.faults
        );
    }
}

#[test]
fn a_planted_error_is_found_where_it_is() {
    type Change = fn(&mut Vec<QuantizedSite<QuantizedLinear>>);
    let plants: [(Change, &str); 7] = [
        (|sites| linear(sites, 0, 1).codes[5] ^= 1, "k: "),
        (|sites| linear(sites, 2, 0).codes[40] = 12, "gate: "),
        (
            |sites| {
                let scale = &mut linear(sites, 3, 0).scales[9];
                // The next f16.
                *scale = f16::from_bits(scale.to_bits() + 1);
            },
            "down: ",
        ),
        (
            |sites| {
                let OutlierBlock::F16(values) = &mut linear(sites, 1, 0).outliers else { panic!() };
                values[0] = f16::from_f32(values[0].to_f32() * 1.01);
            },
            "o: ",
        ),
        (
            |sites| {
                let OutlierBlock::Int8 { codes, .. } = &mut linear(sites, 0, 0).outliers else {
                    panic!()
                };
                codes[19] ^= 1;
            },
            "q: ",
        ),
        (|sites| sites[0].format.clip = 0.94, "site 0: "),
        (|sites| sites[2].format.order.swap(3, 40), "site 2: "),
    ];
    for (change, place) in plants {
        let found = findings(change, None);
        assert_eq!(found.faults.len(), 1, "{place}: {:?}", found.faults);
        assert!(found.faults[0].starts_with(place), "{place}: {:?}", found.faults);
        let of_a_product = !place.starts_with("site");
        assert_eq!(found.faults[0].contains("results are out of bounds"), of_a_product);
        assert_eq!(found.product > 1.0, of_a_product, "{place}");
    }
    let found = findings(|_| {}, Some(&[0.3; 32]));
    assert_eq!(found.faults.len(), 1);
    assert!(found.faults[0].starts_with("attention before site 1 is off"), "{:?}", found.faults);
    assert!(found.attention > 1.0);
}

/// One token, one row, one group whose scales and codes make 3.0, and no outliers.
fn three() -> (QuantizedRows, QuantizedLinear) {
    let mut codes = vec![0i8; 16];
    codes[0] = 3;
    let numbers =
        NumberFormat { bits: 4, codebook: Codebook::Int, group_size: 16, scale: ScaleFormat::F16 };
    let format =
        RowFormat { numbers, groups: 1, outlier_channels: 0, outlier_format: OutlierFormat::Int8 };
    let rows = QuantizedRows {
        tokens: 1,
        format,
        codes: codes.clone(),
        scales: vec![0.5],
        outliers: OutlierRows::None,
    };
    codes[0] = 2;
    let linear = QuantizedLinear {
        rows: 1,
        format: format.weights(4, Codebook::Int, 1),
        codes,
        scales: vec![f16::ONE],
        outliers: OutlierBlock::None,
    };
    (rows, linear)
}

#[test]
fn a_result_may_be_off_by_the_bound_and_by_the_rounding_of_f16() {
    let (rows, linear) = three();
    let share = |found: f32, half| {
        let results = if half { Dtype::F16 } else { Dtype::F32 };
        let (worst, fault) = product_error(&rows, &linear, &[found], &[3.0], results);
        assert_eq!(fault.is_some(), worst > 1.0);
        worst
    };
    assert_eq!(magnitude(&rows, &linear, 0, 0), 3.0);
    let unit = 3.0 * 3.0 * 2f32.powi(-24);
    assert_eq!((share(3.0, false), share(3.0, true)), (0.0, 0.0));
    let off = share(3.0 + 2f32.powi(-22), false);
    assert!((off - f64::from(2f32.powi(-22) / unit)).abs() < 1e-6 && off < 1.0, "{off}");
    assert!(share(3.0 - 2f32.powi(-20), false) > 1.0);
    // Half of 2^-9, the distance of f16 numbers there.
    assert_eq!(share(3.0 + 2f32.powi(-10), true), 0.0);
    assert!(share(3.0 + 2f32.powi(-9), true) > 1.0);
    assert!(share(f32::NAN, true).is_infinite() && share(f32::INFINITY, false).is_infinite());
    assert_eq!(half_ulp(1.0), 2f64.powi(-11));
    assert_eq!(half_ulp(0.0), 2f64.powi(-25));
}

/// `tokens` results of 2.0 each: two groups of one product of 1.0, and no outliers.
fn twos(tokens: usize) -> (QuantizedRows, QuantizedLinear) {
    let numbers =
        NumberFormat { bits: 4, codebook: Codebook::Int, group_size: 16, scale: ScaleFormat::F16 };
    let format =
        RowFormat { numbers, groups: 2, outlier_channels: 0, outlier_format: OutlierFormat::Int8 };
    let mut codes = vec![0i8; 32];
    (codes[0], codes[16]) = (1, 1);
    let rows = QuantizedRows {
        tokens,
        format,
        codes: codes.repeat(tokens),
        scales: vec![1.0; 2 * tokens],
        outliers: OutlierRows::None,
    };
    let linear = QuantizedLinear {
        rows: 1,
        format: format.weights(4, Codebook::Int, 1),
        codes,
        scales: vec![f16::ONE; 2],
        outliers: OutlierBlock::None,
    };
    (rows, linear)
}

/// What a device may be off by: `(2 + 2) 2^-24 (1 + 1)`.
const BOUND_OF_TWO: f32 = 1.0 / (1 << 21) as f32;

#[test]
fn a_product_at_its_bound_holds_and_one_beyond_does_not() {
    let (rows, linear) = twos(1);
    let error = |found: f32| product_error(&rows, &linear, &[found], &[2.0], Dtype::F32);
    assert_eq!(error(2.0 + BOUND_OF_TWO), (1.0, None));
    assert_eq!(error(2.0 + BOUND_OF_TWO / 2.0), (0.5, None));
    let (worst, fault) = error(2.0 + 1.5 * BOUND_OF_TWO);
    assert_eq!(worst, 1.5);
    assert!(fault.unwrap().starts_with("1 of 1 results are out of bounds"));
    let (worst, fault) = product_error(&rows, &linear, &[2.0, 2.0], &[2.0], Dtype::F32);
    assert_eq!((worst, fault.as_deref()), (f64::INFINITY, Some("2 results")));
}

#[test]
fn the_worst_result_counts_and_every_wrong_one_is_counted() {
    let (rows, linear) = twos(3);
    let errors = |shares: [f32; 3]| {
        let found = shares.map(|share| 2.0 + share * BOUND_OF_TWO);
        product_error(&rows, &linear, &found, &[2.0; 3], Dtype::F32)
    };
    assert_eq!(errors([0.0, 0.5, 1.0]), (1.0, None));
    assert_eq!(errors([1.0, 0.5, 0.0]), (1.0, None));
    // A wrong one is counted after a worse one too.
    let (worst, fault) = errors([0.0, 3.0, 2.0]);
    assert_eq!(worst, 3.0);
    let fault = fault.unwrap();
    assert!(
        fault.starts_with("2 of 3 results are out of bounds, the first, of token 1 and row 0,"),
        "{fault}"
    );

    let many = |wrong: usize| {
        let (rows, linear) = twos(120);
        let found = (0..120).map(|at| if at < wrong { 3.0 } else { 2.0 });
        let found: Vec<f32> = found.collect();
        product_error(&rows, &linear, &found, &[2.0; 120], Dtype::F32).1.unwrap()
    };
    assert!(many(99).starts_with("99 of 120 results"));
    assert!(many(100).starts_with("100 or more of 120 results"));
}

#[test]
fn attention_may_be_off_by_what_its_heads_allow() {
    // Two heads of two tokens: values up to 2 and up to 0.5, queries of length 0 in the second.
    let spec = AttentionSpec {
        heads: 2,
        kv_heads: 2,
        head_dim: 4,
        seq_len: 2,
        sliding_window: None,
        scale: AttentionSpec::usual_scale(4),
        query_tables: None,
        cos: vec![1.0; 4].into(),
        sin: vec![0.0; 4].into(),
        kv: KvFormat::FULL,
    };
    let q = [3.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0].repeat(2);
    let k = [0.0, 8.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0].repeat(2);
    let v = [2.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0].repeat(2);
    let expected = [0.25f32; 16];
    let share = |at: usize, off: f32, mean: Option<&[f32]>| {
        let mut found = expected;
        found[at] += off;
        attention_error(&spec, Qkv { q: &q, k: &k, v: &v }, mean, &found, &expected)
    };
    assert_eq!(share(0, 0.0, None), 0.0);
    // 2^-8 and twice 2^-10 * 5 * 8 / 2, of 2.
    let allowed = 2.0 * (1.0 / 256.0 + 2.0 * 20.0 / 1024.0);
    assert!((share(9, 0.01, None) - 0.01 / allowed).abs() < 1e-6);
    assert!((share(4, 0.01, None) - 0.01 / (0.5 / 256.0)).abs() < 1e-4);
    assert!(share(9, 0.01, Some(&[1.0; 8])) < share(9, 0.01, None));
    assert!(share(15, f32::NAN, None).is_infinite());
}

#[test]
fn findings_of_blocks_add_up_and_keep_the_worst() {
    let found = |product: f64, worst: &str, attention: f64| Findings {
        sites: 4,
        linears: 7,
        product,
        worst: worst.to_owned(),
        attention,
        faults: Vec::new(),
    };
    let mut all = Findings::default();
    for block in [found(0.25, "a", 0.5), found(0.5, "b", 0.125), found(0.5, "c", 0.25)] {
        all.add(&block);
    }
    assert_eq!(
        all.summary(0),
        "codes of 12 sites identical, 21 products within 0.50 of the bound (b), attention within 0.50 of its tolerance"
    );
    assert_eq!(all.summary(2), "2 are wrong, of 12 sites and 21 products");
}
