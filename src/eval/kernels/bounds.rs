/*! How much results of a device may differ from those of the CPU's integer path.

**Products.** Sums in f32 depend on their order. With G terms `s p` (a group's scales times its exact sum, or an
outlier), two orders differ by no more than `(G + 2) 2^-24 sum |s p|`, and by half a unit in the last place where a
device rounds its results to f16.

**Attention** is in floating point on both sides. A result is a mean of the head's values, so that its error is
counted in units of the greatest of these. A device may round queries and keys to f16, which moves a score by up to
`d = 2^-10 |q| |k| / sqrt(head_dim)`, and a mean's weights by twice that: `2^-8 + 2 d` are allowed, the first for what
else is rounded. */

use half::f16;

use crate::backend::{AttentionSpec, Qkv};
use crate::checkpoint::Dtype;
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::RowFormat;
use crate::quant::rows::{OutlierRows, QuantizedRows};

/// What attention may differ by where scores are small, in units of the head's greatest value: eight times what
/// rounding that to f16 costs.
const ATTENTION_TOLERANCE: f64 = 1.0 / 256.0;
/// What rounding queries and keys to f16 moves a score by, in units of the product of their lengths.
const SCORE_TOLERANCE: f64 = 1.0 / 1024.0;

/// Results out of bounds that are counted before a linear is given up.
const MANY: usize = 100;

/// What is different in `found`, in a few words.
pub(crate) fn code_fault(found: &QuantizedRows, expected: &QuantizedRows) -> Option<String> {
    fn differences<T: PartialEq>(what: &str, found: &[T], expected: &[T]) -> Option<String> {
        if found.len() != expected.len() {
            return Some(format!("{} {what} where there are {}", found.len(), expected.len()));
        }
        let mut differ = (0..found.len()).filter(|&at| found[at] != expected[at]);
        let first = differ.next()?;
        Some(format!(
            "{} of {} {what} differ, the first at {first}",
            1 + differ.count(),
            found.len()
        ))
    }
    let outliers = match (&found.outliers, &expected.outliers) {
        (OutlierRows::None, OutlierRows::None) => None,
        (
            OutlierRows::Int8 { codes: found, scales: found_scales },
            OutlierRows::Int8 { codes: expected, scales: expected_scales },
        ) => differences("outliers' codes", found, expected)
            .or_else(|| differences("outliers' scales", found_scales, expected_scales)),
        (OutlierRows::Fp8(found), OutlierRows::Fp8(expected))
        | (OutlierRows::F16(found), OutlierRows::F16(expected)) => {
            differences("outliers", found, expected)
        }
        _ => Some("outliers are of another kind".to_owned()),
    };
    let faults = [
        differences("codes", &found.codes, &expected.codes),
        differences("scales", &found.scales, &expected.scales),
        outliers,
    ];
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    (!faults.is_empty()).then(|| faults.join(", "))
}

/// The greatest error of a product in units of its bound, and what is wrong if that is more than 1. The device's
/// results are of the type `results`.
pub(crate) fn product_error(
    x: &QuantizedRows,
    weight: &QuantizedLinear,
    found: &[f32],
    expected: &[f32],
    results: Dtype,
) -> (f64, Option<String>) {
    let half = results == Dtype::F16;
    let (mut worst, mut wrong, mut first) = (0f64, 0, 0);
    if found.len() != expected.len() {
        return (f64::INFINITY, Some(format!("{} results", found.len())));
    }
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let best = if half { f16::from_f32(expected).to_f32() } else { expected };
        if found == best {
            continue;
        }
        let rounding = if half { half_ulp(found.abs().max(expected.abs())) } else { 0.0 };
        let error = (f64::from(found) - f64::from(expected)).abs() - rounding;
        if error <= 0.0 {
            continue;
        }
        // The sum is no greater than the sum of magnitudes: most results need no closer look.
        let unit = (terms(x) + 2) as f64 * 2f64.powi(-24);
        if error / (unit * f64::from(expected.abs())) <= worst.min(1.0) {
            continue;
        }
        let (token, row) = (at / weight.rows, at % weight.rows);
        let share = error / (unit * magnitude(x, weight, token, row));
        let share = if share.is_nan() { f64::INFINITY } else { share };
        worst = worst.max(share);
        if share > 1.0 {
            first = if wrong == 0 { at } else { first };
            wrong += 1;
            if wrong == MANY {
                break;
            }
        }
    }
    let fault = (wrong > 0).then(|| {
        let count = if wrong == MANY { format!("{MANY} or more") } else { wrong.to_string() };
        let (token, row) = (first / weight.rows, first % weight.rows);
        format!(
            "{count} of {} results are out of bounds, the first, of token {token} and row {row}, is {} where the \
             CPU has {}",
            found.len(),
            found[first],
            expected[first]
        )
    });
    (worst, fault)
}

/// How many products a result is the sum of, a group's sum of codes being one.
fn terms(x: &QuantizedRows) -> usize {
    x.format.groups
        + match x.outliers {
            OutlierRows::None => 0,
            OutlierRows::Int8 { .. } => 1,
            OutlierRows::Fp8(_) | OutlierRows::F16(_) => x.format.outlier_channels,
        }
}

/// The sum of these products' magnitudes, for one result.
pub(super) fn magnitude(
    x: &QuantizedRows,
    weight: &QuantizedLinear,
    token: usize,
    row: usize,
) -> f64 {
    let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
    let (group_size, own) = (numbers.group_size, weight.format.row.numbers);
    let dot = |x: &[i8], w: &[i8], x_value: &dyn Fn(i8) -> f32, w_value: &dyn Fn(i8) -> f32| {
        x.iter().zip(w).map(|(x, w)| f64::from(x_value(*x)) * f64::from(w_value(*w))).sum::<f64>()
    };
    let mut sum = 0.0;
    for group in 0..groups {
        let of_x = &x.codes[(token * groups + group) * group_size..][..group_size];
        let of_w = &weight.codes[(row * groups + group) * group_size..][..group_size];
        let values = (|code| numbers.codebook.value(code), |code| own.codebook.value(code));
        let scales = x.scales[token * groups + group] * weight.scale(row, group);
        sum += (f64::from(scales) * dot(of_x, of_w, &values.0, &values.1)).abs();
    }
    let of_x = token * outlier_channels..(token + 1) * outlier_channels;
    let of_w = row * outlier_channels..(row + 1) * outlier_channels;
    let floats = |x: &[f32], weight: &dyn Fn(usize) -> f32| {
        let products =
            x.iter().zip(of_w.clone()).map(|(x, at)| f64::from(*x) * f64::from(weight(at)));
        products.map(f64::abs).sum::<f64>()
    };
    sum + match (&x.outliers, &weight.outliers) {
        (
            OutlierRows::Int8 { codes, scales },
            OutlierBlock::Int8 { codes: own, scales: of_rows },
        ) => {
            let scales = f64::from(scales[token]) * of_rows[row].to_f64();
            (scales * dot(&codes[of_x], &own[of_w], &f32::from, &f32::from)).abs()
        }
        (OutlierRows::Fp8(values), OutlierBlock::Fp8 { codes, scales }) => {
            floats(&values[of_x], &|at| e4m3_value(codes[at]) * scales[row].to_f32())
        }
        (OutlierRows::F16(values), OutlierBlock::F16(weights)) => {
            floats(&values[of_x], &|at| weights[at].to_f32())
        }
        _ => 0.0,
    }
}

/// Half a unit in the last place that an f16 of this magnitude has.
pub(super) fn half_ulp(magnitude: f32) -> f64 {
    let exponent = f64::from(magnitude).max(f64::from(f16::MIN_POSITIVE)).log2().floor();
    2f64.powf(exponent - 11.0)
}

/// The greatest error of attention on these queries, keys and values, each in units of what is allowed there.
pub(super) fn attention_error(
    spec: &AttentionSpec,
    operands: Qkv<&[f32]>,
    mean: Option<&[f32]>,
    found: &[f32],
    expected: &[f32],
) -> f64 {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
    let Qkv { q, k, v } = operands;
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let greatest = |head: &[f32]| head.iter().fold(0f32, |most, x| most.max(x.abs()));
    let length = |head: &[f32]| head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    // Of each head over all tokens: its greatest value, and its longest key.
    let mut values = vec![0f32; kv_heads];
    let mut keys = vec![0f64; kv_heads];
    for (at, (k, v)) in k.chunks(head_dim).zip(v.chunks(head_dim)).enumerate() {
        let head = at % kv_heads;
        values[head] = values[head].max(greatest(v));
        let centre = mean.map_or(0.0, |mean| length(&mean[head * head_dim..][..head_dim]));
        keys[head] = keys[head].max(length(k) + centre);
    }
    let mut worst = 0f64;
    let results = found.chunks(head_dim).zip(expected.chunks(head_dim)).zip(q.chunks(head_dim));
    for (at, ((found, expected), q)) in results.enumerate() {
        let head = at % heads / (heads / kv_heads);
        let score = SCORE_TOLERANCE * length(q) * keys[head] / (head_dim as f64).sqrt();
        let allowed = (ATTENTION_TOLERANCE + 2.0 * score) * f64::from(values[head]);
        for (found, expected) in found.iter().zip(expected).filter(|(x, y)| x != y) {
            let share = f64::from((found - expected).abs()) / allowed;
            worst = if share.is_nan() { f64::INFINITY } else { worst.max(share) };
        }
    }
    worst
}
