/*! The fast functions compute the bits of `quant::site` for every shape, format and magnitude. */

use proptest::prelude::ProptestConfig;

use super::*;
use crate::quant::number::{NumberFormat, ScaleFormat};
use crate::quant::scale::ScaleGrid;
use crate::quant::site::{dequantize_rows_plain, quantize_rows_plain};

/// A format with a scrambled order whose padding lies among the groups.
fn format(channels: usize, group_size: usize, outliers: usize) -> SiteFormat {
    let outliers = outliers.min(channels);
    let groups = (channels - outliers).div_ceil(group_size);
    let step = (1..).find(|step| gcd(7 * step + 4, channels) == 1).unwrap() * 7 + 4;
    let scrambled: Vec<i32> = (0..channels).map(|i| (i * step % channels) as i32).collect();
    let (grouped, last) = scrambled.split_at(channels - outliers);
    let mut order = grouped.to_vec();
    while order.len() < groups * group_size {
        order.insert(order.len() / 2, PADDING);
    }
    order.extend(last);
    let row = RowFormat {
        numbers: NumberFormat {
            bits: 4,
            codebook: Codebook::Int,
            group_size,
            scale: ScaleFormat::F16,
        },
        groups,
        outlier_channels: outliers,
        outlier_format: OutlierFormat::Int8,
    };
    SiteFormat { channels, order, row, clip: 1.0, transform: Transform::Hadamard }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Rows of very different kinds: usual, tiny, denormal, huge, zeros, exact halves.
fn activations(tokens: usize, channels: usize) -> Vec<f32> {
    let value = |i: usize| {
        let wave = (i as f32 * 0.731).sin() + (i % 11) as f32 * 0.1 - 0.4;
        match i / channels % 7 {
            0 | 1 => wave,
            2 => wave * 1e-6,
            3 => wave * 1e-41,
            4 => wave * 3e3,
            5 => 0.0,
            _ => (i % 15) as f32 - 7.5,
        }
    };
    (0..tokens * channels).map(value).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn check(tokens: usize, format: &SiteFormat) {
    format.check().unwrap();
    let x = activations(tokens, format.channels);
    let expected = quantize_rows_plain(&x, tokens, format).unwrap();
    let permuted = format.permute_rows_plain(&x, tokens);
    let restored = dequantize_rows_plain(&expected);
    for isa in Isa::available() {
        let rows = quantize_rows(isa, &x, tokens, format).unwrap();
        assert_eq!(rows, expected, "{isa:?} {format:?}");
        assert_eq!(bits(&rows.scales), bits(&expected.scales));
        let mut found = vec![f32::NAN; permuted.len()];
        permute_rows(isa, &x, tokens, format, &mut found);
        assert_eq!(bits(&found), bits(&permuted), "{isa:?}");
        found.fill(f32::NAN);
        dequantize_rows(isa, &rows, &mut found);
        assert_eq!(bits(&found), bits(&restored), "{isa:?}");
    }
}

#[test]
fn every_shape_gives_the_same_bits() {
    for channels in [1, 2, 15, 33, 100, 576, 1000] {
        for group_size in [16, 32, 48, 64, 128, 576] {
            for outliers in [0, 1, 64, 100] {
                check(7, &format(channels, group_size, outliers));
            }
        }
    }
    for codebook in [Codebook::Fp4, Codebook::Fp4Bnb] {
        for (channels, group_size, outliers) in [(172, 16, 0), (172, 48, 5), (172, 176, 0)] {
            let format = format(channels, group_size, outliers).with(|format| {
                format.row.numbers.codebook = codebook;
                format.row.outlier_format = OutlierFormat::Fp8;
            });
            check(7, &format);
        }
    }
    for tokens in [0, 1, 16, 35] {
        check(tokens, &format(100, 32, 10));
    }
}

#[test]
fn every_format_gives_the_same_bits() {
    use Codebook::{Fp4, Fp4Bnb, Int};
    use OutlierFormat::{F16, Fp8, Int8};
    for (bits, codebook) in [(2, Int), (3, Int), (4, Int), (8, Int), (4, Fp4), (4, Fp4Bnb)] {
        for clip in [1.0, 0.85, 1e-9] {
            for outlier_format in [Int8, Fp8, F16] {
                for transform in [Transform::None, Transform::Hadamard] {
                    let mut format = SiteFormat { clip, transform, ..format(333, 64, 40) };
                    let scale = match outlier_format {
                        Fp8 => ScaleFormat::F16,
                        _ => ScaleFormat::SIGNED_F16,
                    };
                    format.row.numbers = NumberFormat { bits, codebook, group_size: 64, scale };
                    format.row.outlier_format = outlier_format;
                    check(14, &format);
                }
            }
        }
    }
}

#[test]
fn every_grid_of_scales_gives_the_same_bits() {
    use ScaleGrid::{Bf16, E4m3, PowerOfTwo};
    for (grid, exponent) in [(Bf16, 0), (E4m3, -8), (E4m3, -15), (E4m3, 7), (PowerOfTwo, 0)] {
        for codebook in [Codebook::Int, Codebook::Fp4] {
            for (channels, group_size, outliers) in [(172, 16, 0), (333, 48, 40), (576, 64, 0)] {
                let format = format(channels, group_size, outliers).with(|format| {
                    let numbers = &mut format.row.numbers;
                    let signed = grid != PowerOfTwo;
                    numbers.codebook = codebook;
                    numbers.scale = ScaleFormat { grid, exponent, signed };
                });
                check(18, &format);
            }
        }
    }
}

#[test]
fn errors_are_those_of_the_definition() {
    let format = format(100, 32, 10);
    for (at, value) in [(2 * 100, f32::NAN), (57, f32::NEG_INFINITY), (1999, 1e30)] {
        for outlier_format in [OutlierFormat::Int8, OutlierFormat::Fp8, OutlierFormat::F16] {
            let format = format.clone().with(|format| format.row.outlier_format = outlier_format);
            let mut x = activations(20, 100);
            x[at] = value;
            let expected = quantize_rows_plain(&x, 20, &format).unwrap_err();
            for isa in Isa::available() {
                let error = quantize_rows(isa, &x, 20, &format).unwrap_err();
                assert_eq!(error.message(), expected.message(), "{isa:?}");
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_values_give_the_same_bits(
        x in proptest::collection::vec(-6e4_f32..6e4, 3 * 50),
        exponent in -50..1_i32,
    ) {
        let format = SiteFormat { transform: Transform::None, ..format(50, 16, 5) };
        let fp = format.clone().with(|format| {
            format.row.outlier_format = OutlierFormat::Fp8;
            format.row.numbers.codebook = Codebook::Fp4;
        });
        let x: Vec<f32> = x.iter().map(|value| value * 2_f32.powi(exponent)).collect();
        for format in [format, fp] {
            let expected = quantize_rows_plain(&x, 3, &format).unwrap();
            for isa in Isa::available() {
                assert_eq!(quantize_rows(isa, &x, 3, &format).unwrap(), expected);
            }
        }
    }
}

/// Prints nanoseconds a value on one thread; run by hand with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
#[expect(clippy::print_stdout, reason = "the figures are its result")]
fn speed() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (tokens, channels) = (512, 4096);
    let x: Vec<f32> = (0..tokens * channels).map(|i| (i as f32 * 0.731).sin()).collect();
    for isa in Isa::available().into_iter().skip(1) {
        for transform in [Transform::None, Transform::Hadamard] {
            for group_size in [64, 128] {
                let format = SiteFormat { transform, ..format(channels, group_size, 64) };
                let mut best = f64::INFINITY;
                for _ in 0..8 {
                    let start = std::time::Instant::now();
                    let rows = pool.install(|| quantize_rows(isa, &x, tokens, &format).unwrap());
                    best = best.min(start.elapsed().as_secs_f64());
                    assert_eq!(rows.tokens, tokens);
                }
                let nanoseconds = best * 1e9 / x.len() as f64;
                println!("{isa:?} {transform:?} group {group_size}: {nanoseconds:.2} ns/value");
            }
        }
    }
}
