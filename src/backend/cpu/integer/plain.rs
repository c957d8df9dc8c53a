/*! What a quantized linear means: the specification of the integer path.

Every other kernel, on any device, is tested for equality with this one, bit by bit. */

use rayon::prelude::*;

use crate::quant::codebook::Codebook;
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::RowFormat;
use crate::quant::rows::{OutlierRows, QuantizedRows};

/// `y = x * w^T`, with `y` `[tokens, rows]`. For each output: the exact integer dot product of
/// each group, `acc = fma(s_x * s_w, dot, acc)` in f32 with the groups ascending from `acc = 0`,
/// and last the outlier block, the same for INT8, `acc = fma(x, w, acc)` channel by channel for FP8 and
/// f16, where an FP8 weight is its number times the row's scale.
///
/// bitsandbytes' FP4 has sixteenths: its dot product is counted in them, and `s_x * s_w` is multiplied
/// with their size, a power of two.
///
/// A dot product fits i32 by far: 28672 channels (the widest layer of the family) of codes of
/// magnitude 128 make 2^28.8, and of 192 sixteenths 2^30.
///
/// # Panics
/// If `x` and `w` have different groups, or outliers of different number or kind.
pub fn linear(x: &QuantizedRows, w: &QuantizedLinear, y: &mut [f32]) {
    let RowFormat { numbers, groups, outlier_channels: outliers, .. } = w.format.row;
    let (size, codebook, x_codebook) =
        (numbers.group_size, numbers.codebook, x.format.numbers.codebook);
    assert_eq!((x.format.numbers.group_size, x.format.groups), (size, groups), "groups of x and w");
    assert_eq!(x.format.outlier_channels, outliers, "outliers of x and w");
    assert_eq!(y.len(), x.tokens * w.rows, "length of y");
    let unit = x_codebook.unit() * codebook.unit();
    let tokens = y.par_chunks_mut(w.rows.max(1)).enumerate();
    tokens.for_each(|(token, y)| {
        for (row, y) in y.iter_mut().enumerate() {
            let mut acc = 0.0_f32;
            for group in 0..groups {
                let (x_group, w_group) = (token * groups + group, row * groups + group);
                let integer = dot(
                    (x_codebook, &x.codes[x_group * size..][..size]),
                    (codebook, &w.codes[w_group * size..][..size]),
                );
                let scale = x.scales[x_group] * w.scale(row, group) * unit;
                acc = scale.mul_add(integer as f32, acc);
            }
            let (x_own, w_own) = (token * outliers, row * outliers);
            acc = match (&x.outliers, &w.outliers) {
                (OutlierRows::None, OutlierBlock::None) => acc,
                (
                    OutlierRows::Int8 { codes: x_codes, scales: x_scales },
                    OutlierBlock::Int8 { codes: w_codes, scales: w_scales },
                ) => {
                    let integer = dot(
                        (Codebook::Int, &x_codes[x_own..][..outliers]),
                        (Codebook::Int, &w_codes[w_own..][..outliers]),
                    );
                    (x_scales[token] * w_scales[row].to_f32()).mul_add(integer as f32, acc)
                }
                (OutlierRows::Fp8(x), OutlierBlock::Fp8 { codes, scales }) => {
                    let scale = scales[row].to_f32();
                    let pairs = x[x_own..][..outliers].iter().zip(&codes[w_own..][..outliers]);
                    pairs.fold(acc, |acc, (x, &w)| x.mul_add(e4m3_value(w) * scale, acc))
                }
                (OutlierRows::F16(x), OutlierBlock::F16(w)) => {
                    let pairs = x[x_own..][..outliers].iter().zip(&w[w_own..][..outliers]);
                    pairs.fold(acc, |acc, (x, w)| x.mul_add(w.to_f32(), acc))
                }
                _ => panic!("the outliers of x and w are of different kinds"),
            };
            *y = acc;
        }
    });
}

/// The exact dot product of two groups of codes.
fn dot((x_codebook, x): (Codebook, &[i8]), (w_codebook, w): (Codebook, &[i8])) -> i32 {
    x.iter().zip(w).map(|(&x, &w)| x_codebook.in_units(x) * w_codebook.in_units(w)).sum()
}
