/*! Every kernel computes the bits of [`plain::linear`], whatever the shape, codes and thread count. */

use half::f16;

use super::*;
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};

/// A small generator, so that cases repeat exactly.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    /// A code in `least..=greatest`, one of both in a third of the cases.
    fn code(&mut self, least: i32, greatest: i32) -> i8 {
        match self.next() % 6 {
            0 => least as i8,
            1 => greatest as i8,
            _ => (least + (self.next() % (greatest - least + 1) as u32) as i32) as i8,
        }
    }

    /// A positive or zero f16.
    fn scale(&mut self) -> f16 {
        f16::from_f32((self.next() % 2000) as f32 * 1.7e-3)
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    rows: usize,
    groups: usize,
    group_size: usize,
    outliers: usize,
    outlier_format: OutlierFormat,
    weight_bits: u8,
    activation_bits: u8,
    /// Of activations and of weights; FP4 makes the bits 4.
    codebook: (Codebook, Codebook),
    rows_per_scale: usize,
}

const SMALL: Shape = Shape {
    tokens: 7,
    rows: 33,
    groups: 2,
    group_size: 32,
    outliers: 3,
    outlier_format: OutlierFormat::Int8,
    weight_bits: 4,
    activation_bits: 4,
    codebook: (Codebook::Int, Codebook::Int),
    rows_per_scale: 1,
};

fn limits(bits: u8) -> (i32, i32) {
    (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
}

/// Any code as one of E4M3's that is a number.
fn number(code: i8) -> u8 {
    match code as u8 {
        nan if nan & 0x7f == 0x7f => nan - 1,
        code => code,
    }
}

/// Random operands of a shape; `fill` replaces every code of a group where given, the activation's
/// first.
fn operands(shape: Shape, fill: Option<(i8, i8)>) -> (QuantizedRows, QuantizedLinear) {
    let mut random = Random(shape.tokens as u64 * 31 + shape.rows as u64);
    let Shape { tokens, rows, groups, group_size, outliers, .. } = shape;
    let mut codes = |count: usize, bits: u8, codebook: Codebook, fill: Option<i8>| -> Vec<i8> {
        let (least, greatest) = limits(bits);
        let mut code = || match codebook {
            Codebook::Int => random.code(least, greatest),
            _ => codebook.restored(random.code(-8, 7)),
        };
        (0..count).map(|_| fill.unwrap_or_else(&mut code)).collect()
    };
    let (x_codebook, w_codebook) = shape.codebook;
    let x_codes =
        codes(tokens * groups * group_size, shape.activation_bits, x_codebook, fill.map(|f| f.0));
    let w_codes =
        codes(rows * groups * group_size, shape.weight_bits, w_codebook, fill.map(|f| f.1));
    let x_outliers = codes(tokens * outliers, 8, Codebook::Int, None);
    let w_outliers = codes(rows * outliers, 8, Codebook::Int, None);
    let mut halves = |count: usize| -> Vec<f16> { (0..count).map(|_| random.scale()).collect() };
    let mut floats = |count| halves(count).into_iter().map(f16::to_f32).collect::<Vec<_>>();
    let row = |bits: u8, codebook: Codebook| RowFormat {
        numbers: NumberFormat { bits, codebook, group_size, scale: ScaleFormat::F16 },
        groups,
        outlier_channels: outliers,
        outlier_format: shape.outlier_format,
    };
    let x = QuantizedRows {
        tokens,
        format: row(shape.activation_bits, x_codebook),
        codes: x_codes,
        scales: floats(tokens * groups),
        outliers: match shape.outlier_format {
            _ if outliers == 0 => OutlierRows::None,
            OutlierFormat::Int8 => OutlierRows::Int8 { codes: x_outliers, scales: floats(tokens) },
            OutlierFormat::Fp8 => {
                let numbers = x_outliers.iter().map(|&code| e4m3_value(number(code)) * 1.375);
                OutlierRows::Fp8(numbers.collect())
            }
            OutlierFormat::F16 => OutlierRows::F16(floats(tokens * outliers)),
        },
    };
    let w = QuantizedLinear {
        rows,
        format: LinearFormat {
            row: row(shape.weight_bits, w_codebook),
            rows_per_scale: shape.rows_per_scale,
        },
        codes: w_codes,
        scales: halves(rows.div_ceil(shape.rows_per_scale) * groups),
        outliers: match shape.outlier_format {
            _ if outliers == 0 => OutlierBlock::None,
            OutlierFormat::Int8 => OutlierBlock::Int8 { codes: w_outliers, scales: halves(rows) },
            OutlierFormat::Fp8 => OutlierBlock::Fp8 {
                codes: w_outliers.into_iter().map(number).collect(),
                scales: halves(rows),
            },
            OutlierFormat::F16 => OutlierBlock::F16(halves(rows * outliers)),
        },
    };
    (x, w)
}

fn check(shape: Shape, fill: Option<(i8, i8)>) {
    let (x, w) = operands(shape, fill);
    let mut expected = vec![f32::NAN; shape.tokens * shape.rows];
    plain::linear(&x, &w, &mut expected);
    let panels = IntegerLinear::new(&w);
    for isa in Isa::available() {
        let mut y = vec![f32::NAN; expected.len()];
        linear(isa, &x, &panels, &mut y);
        let wrong = y.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(i) = wrong {
            let (token, row) = (i / shape.rows, i % shape.rows);
            panic!("{isa:?} {shape:?} token {token} row {row}: {} for {}", y[i], expected[i]);
        }
    }
}

#[test]
fn plain_is_the_sum_of_dequantized_products() {
    use Codebook::{Fp4, Fp4Bnb, Int};
    for codebook in [(Int, Int), (Fp4, Fp4), (Fp4Bnb, Fp4Bnb), (Int, Fp4Bnb)] {
        for outlier_format in [OutlierFormat::Int8, OutlierFormat::Fp8, OutlierFormat::F16] {
            sum_of_products(Shape { codebook, outlier_format, ..SMALL });
        }
    }
}

fn sum_of_products(shape: Shape) {
    let (x, w) = operands(shape, None);
    let mut y = vec![f32::NAN; x.tokens * w.rows];
    plain::linear(&x, &w, &mut y);
    let values = crate::quant::site::dequantize_rows_plain(&x);
    let width = w.format.row.grouped_channels() + w.format.row.outlier_channels;
    let weights = crate::quant::weights::dequantize(&w);
    for (i, y) in y.iter().enumerate() {
        let (token, row) = (i / w.rows, i % w.rows);
        let sum: f64 = (0..width)
            .map(|channel| {
                let weight = weights[row * width + channel];
                f64::from(weight) * f64::from(values[token * width + channel])
            })
            .sum();
        assert!((f64::from(*y) - sum).abs() <= 1e-4 * sum.abs().max(1e4), "{y} for {sum}");
    }
}

#[test]
fn every_row_and_token_count_gives_the_same_bits() {
    for tokens in [1, 2, 3, 5, 6, 7, 33] {
        for rows in [1, 31, 32, 33, 100, 192] {
            check(Shape { tokens, rows, ..SMALL }, None);
        }
    }
    check(Shape { tokens: JOB_TOKENS + 5, ..SMALL }, None);
}

#[test]
fn every_group_shape_gives_the_same_bits() {
    for groups in [0, 1, 2, 9] {
        for group_size in [16, 32, 48, 64, 128, 576] {
            for (weight_bits, activation_bits) in [(4, 4), (8, 8), (4, 8), (8, 4)] {
                let shape = Shape { groups, group_size, weight_bits, activation_bits, ..SMALL };
                check(shape, None);
            }
        }
    }
}

#[test]
fn every_number_format_gives_the_same_bits() {
    for weight_bits in [2, 3, 4, 8] {
        for activation_bits in [2, 3, 4, 8] {
            for rows_per_scale in [1, 2] {
                check(Shape { weight_bits, activation_bits, rows_per_scale, ..SMALL }, None);
            }
        }
    }
}

#[test]
fn every_outlier_block_gives_the_same_bits() {
    for outliers in [0, 1, 3, 4, 64, 128] {
        for outlier_format in [OutlierFormat::Int8, OutlierFormat::Fp8, OutlierFormat::F16] {
            for rows in [5, 64] {
                check(Shape { outliers, outlier_format, rows, ..SMALL }, None);
            }
        }
    }
}

#[test]
fn fp4_gives_the_same_bits_against_itself_and_integers() {
    use Codebook::{Fp4, Fp4Bnb, Int};
    for codebook in [(Fp4, Fp4), (Int, Fp4), (Fp4, Int), (Fp4Bnb, Fp4Bnb), (Int, Fp4Bnb)] {
        for (groups, group_size) in [(9, 16), (3, 48), (1, 176), (2, 576)] {
            for activation_bits in if codebook.0 == Int { &[4, 8][..] } else { &[4] } {
                for outlier_format in [OutlierFormat::Int8, OutlierFormat::Fp8] {
                    let activation_bits = *activation_bits;
                    let shape = Shape { codebook, groups, group_size, activation_bits, ..SMALL };
                    check(Shape { outlier_format, ..shape }, None);
                }
            }
        }
        let extreme = Shape { codebook, group_size: 576, ..SMALL };
        for x in [-12, 12] {
            let x = if codebook.0 == Int { x / 2 } else { x };
            let w = if codebook.1 == Int { 7 } else { 12 };
            check(extreme, Some((x, w)));
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    for weight_bits in [2, 3, 4, 8] {
        for activation_bits in [4, 8] {
            let (w, x) = (limits(weight_bits), limits(activation_bits));
            for x in [x.0, x.1] {
                for w in [w.0, w.1] {
                    let shape = Shape { weight_bits, activation_bits, group_size: 576, ..SMALL };
                    check(shape, Some((x as i8, w as i8)));
                }
            }
        }
    }
}

#[test]
fn the_thread_count_changes_no_bit() {
    let (x, w) = operands(Shape { tokens: 211, rows: 100, ..SMALL }, None);
    let w = IntegerLinear::new(&w);
    let isa = *Isa::available().last().unwrap();
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut y = vec![f32::NAN; x.tokens * w.rows()];
        pool.install(|| linear(isa, &x, &w, &mut y));
        y
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn four_bit_weights_stay_packed() {
    let shape = Shape { rows: 64, groups: 4, group_size: 128, outliers: 0, ..SMALL };
    let codes = 64 * 4 * 128;
    let scales = 64 * 4 * 2;
    let bytes = |weight_bits| {
        IntegerLinear::new(&operands(Shape { weight_bits, ..shape }, None).1).memory_bytes()
    };
    assert_eq!(bytes(4), codes / 2 + scales);
    assert_eq!(bytes(8), codes + scales);
}

#[test]
fn no_tokens_or_no_rows_is_no_work() {
    check(Shape { tokens: 0, ..SMALL }, None);
    check(Shape { rows: 0, ..SMALL }, None);
}

/// Prints the speed of each kernel on one thread; run by hand with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
#[expect(clippy::print_stdout, reason = "the figures are its result")]
fn speed() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for isa in Isa::available().into_iter().skip(2) {
        for bits in [4, 8] {
            for (rows, channels) in [(576, 576), (1536, 576), (576, 1536), (4096, 4096)] {
                let shape = Shape {
                    tokens: 2048,
                    rows,
                    groups: channels / 64 - 1,
                    group_size: 64,
                    outliers: 64,
                    weight_bits: bits,
                    activation_bits: bits,
                    ..SMALL
                };
                let (x, w) = operands(shape, None);
                let w = IntegerLinear::new(&w);
                let mut y = vec![0.0; x.tokens * rows];
                let mut best = f64::INFINITY;
                for _ in 0..if rows * channels > 1 << 22 { 3 } else { 10 } {
                    let start = std::time::Instant::now();
                    pool.install(|| linear(isa, &x, &w, &mut y));
                    best = best.min(start.elapsed().as_secs_f64());
                }
                let operations = 2.0 * (x.tokens * rows * channels) as f64;
                println!(
                    "{isa:?} W{bits}A{bits} [{rows}, {channels}]: {:.0} GOP/s",
                    operations / best / 1e9
                );
            }
        }
    }
}
