//! Backward of a site and its linears.

use rayon::prelude::*;

use super::super::gemm::{PANEL, Panels, Part, Rows, par_gemm};
use super::super::isa::Isa;
use super::super::{Cpu, HostTensor};
use crate::backend::{LinearGradient, TrainedLinear};
use crate::quant::float::e4m3_value;
use crate::quant::grid::inverse;
use crate::quant::hadamard;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::rows::QuantizedRows;
use crate::quant::site::{PADDING, SiteFormat, Transform};
use crate::quant::weights::dequantize;

/// Tokens whose parts of a clip ratio's gradient are summed up first.
const TOKENS: usize = 64;

/// `d_x^ = d_y W`, or `d_x^ += d_y W`.
pub(super) fn add_input_gradient(
    isa: Isa,
    linear: &TrainedLinear<'_, Cpu>,
    d_y: &HostTensor,
    d_values: &mut HostTensor,
    accumulate: bool,
) {
    let width = d_values.columns;
    let weights = match linear {
        TrainedLinear::Quantized(linear) => dequantize(linear),
        TrainedLinear::Unquantized(dense) => unpacked(dense),
    };
    let panels = Panels::from_columns(&weights, d_y.columns, width, width);
    let d_y = Rows::new(&d_y.data, d_y.rows, d_y.columns);
    par_gemm(isa, d_y, &panels, &mut d_values.data, width, accumulate);
}

/// The rows of a weight that was packed for products `x W^T`.
fn unpacked(dense: &Panels) -> Vec<f32> {
    let (rows, width) = (dense.n(), dense.k());
    let mut weights = vec![0.0; rows * width];
    let part = Part::from(dense);
    weights.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, weights)| {
        let lines = part.panel(row / PANEL).chunks_exact(PANEL);
        weights.iter_mut().zip(lines).for_each(|(weight, line)| *weight = line[row % PANEL]);
    });
    weights
}

/// Gradients of a linear's scales, from those of its output and the `[tokens, width]` values of its input.
pub(super) fn scale_gradients(
    isa: Isa,
    linear: &TrainedLinear<'_, Cpu>,
    d_y: &HostTensor,
    inputs: &Panels,
) -> LinearGradient {
    let TrainedLinear::Quantized(linear) = linear else { return LinearGradient::default() };
    let width = inputs.n();
    let mut products = vec![0.0; linear.rows * width];
    let d_y = Rows::transposed(&d_y.data, d_y.columns);
    par_gemm(isa, d_y, inputs, &mut products, width, false);
    let scales = group_sums(linear, &products);
    let outlier_scales = match &linear.outliers {
        OutlierBlock::None | OutlierBlock::F16(_) => Vec::new(),
        OutlierBlock::Int8 { codes, .. } => outlier_sums(linear, &products, |at| codes[at].into()),
        OutlierBlock::Fp8 { codes, .. } => {
            outlier_sums(linear, &products, |at| e4m3_value(codes[at]))
        }
    };
    LinearGradient { scales, outlier_scales }
}

/// `sum of D[r, k] n_w[r, k]` over each scale's rows and group.
fn group_sums(linear: &QuantizedLinear, products: &[f32]) -> Vec<f32> {
    let row = linear.format.row;
    let (group, grouped, width) = (row.numbers.group_size, row.grouped_channels(), row.width());
    let mut sums = vec![0.0; linear.scales.len()];
    sums.par_chunks_mut(row.groups.max(1)).enumerate().for_each(|(scale_row, sums)| {
        let first = scale_row * linear.format.rows_per_scale;
        for row in first..linear.rows.min(first + linear.format.rows_per_scale) {
            let codes = linear.codes[row * grouped..][..grouped].chunks(group);
            let products = products[row * width..][..grouped].chunks(group);
            for ((sum, codes), products) in sums.iter_mut().zip(codes).zip(products) {
                let terms = codes.iter().zip(products);
                let value = |code| linear.format.row.numbers.codebook.value(code);
                *sum += terms.map(|(code, product)| value(*code) * product).sum::<f32>();
            }
        }
    });
    sums
}

/// The same of each row's outliers, whose numbers `value` returns.
fn outlier_sums(
    linear: &QuantizedLinear,
    products: &[f32],
    value: impl Fn(usize) -> f32,
) -> Vec<f32> {
    let (width, count) = (linear.format.row.width(), linear.format.row.outlier_channels);
    let rows = products.chunks(width).enumerate();
    let sum = |(row, products): (usize, &[f32])| {
        let products = products[width - count..].iter().enumerate();
        products.map(|(at, product)| value(row * count + at) * product).sum()
    };
    rows.map(sum).collect()
}

/// Passes `d_values` `[tokens, width]` back through the quantizer of `permuted`, which `rows` came from: values that were
/// clipped have no gradient. Returns the gradient of the clip ratio, by groups.
pub(super) fn through_quantizer(
    site: &SiteFormat,
    permuted: &HostTensor,
    rows: &QuantizedRows,
    d_values: &mut HostTensor,
) -> Vec<f32> {
    let (width, groups) = (site.width(), site.row.groups);
    let (numbers, grouped) = (site.row.numbers, site.row.grouped_channels());
    let limits = numbers.limits();
    let parts =
        permuted.data.par_chunks(width * TOKENS).zip(rows.codes.par_chunks(grouped * TOKENS));
    let gradients = d_values.data.par_chunks_mut(width * TOKENS);
    let parts = parts.zip(gradients.zip(rows.scales.par_chunks(groups * TOKENS)));
    let sums = parts.map(|((values, codes), (d_values, scales))| {
        let mut sums = vec![0.0f64; groups];
        let tokens = values.chunks(width).zip(codes.chunks(grouped));
        for ((values, codes), (d_values, scales)) in
            tokens.zip(d_values.chunks_mut(width).zip(scales.chunks(groups)))
        {
            for (group, sum) in sums.iter_mut().enumerate() {
                let own = group * numbers.group_size..(group + 1) * numbers.group_size;
                let scale = scales[group];
                if scale == 0.0 {
                    continue;
                }
                let inverse = inverse(scale);
                let mut of_scale = 0.0;
                let terms = values[own.clone()].iter().zip(&codes[own.clone()]);
                for ((value, code), d_value) in terms.zip(&mut d_values[own]) {
                    let place = value * inverse;
                    let number = numbers.codebook.value(*code);
                    if (limits.0..=limits.1).contains(&place) {
                        of_scale += *d_value * (number - place);
                    } else {
                        of_scale += *d_value * number;
                        *d_value = 0.0;
                    }
                }
                *sum += f64::from(of_scale * (scale / site.clip));
            }
        }
        sums
    });
    let sums: Vec<Vec<f64>> = sums.collect();
    (0..groups).map(|group| sums.iter().map(|sums| sums[group]).sum::<f64>() as f32).collect()
}

/// The transposes of transform and permutation, from `[tokens, width]` to `[tokens, channels]`.
pub(super) fn permute_back(site: &SiteFormat, d_values: &mut HostTensor, d_x: &mut HostTensor) {
    let (width, grouped) = (site.width(), site.row.grouped_channels());
    let rows = d_values.data.par_chunks_mut(width).zip(d_x.data.par_chunks_mut(site.channels));
    rows.for_each(|(d_values, d_x)| {
        if site.transform == Transform::Hadamard {
            let groups = d_values[..grouped].chunks_exact_mut(site.row.numbers.group_size);
            groups.for_each(hadamard::transform);
        }
        for (channel, d_value) in site.order.iter().zip(d_values) {
            if *channel != PADDING {
                d_x[*channel as usize] = *d_value;
            }
        }
    });
}
