/*! The definition, checked against values worked out by hand. */

use super::*;
use crate::quant::number::ScaleFormat;
use crate::quant::scale::ScaleGrid;

fn format(order: Vec<i32>, group_size: usize, outlier_channels: usize) -> SiteFormat {
    let row = RowFormat {
        numbers: NumberFormat {
            bits: 4,
            codebook: Codebook::Int,
            group_size,
            scale: ScaleFormat::F16,
        },
        groups: (order.len() - outlier_channels) / group_size,
        outlier_channels,
        outlier_format: OutlierFormat::Int8,
    };
    let channels = order.iter().filter(|&&channel| channel >= 0).count();
    SiteFormat { channels, order, row, clip: 1.0, transform: Transform::None }
}

/// 14 channels, four slots of padding, two outliers.
fn small() -> SiteFormat {
    let mut order: Vec<i32> = (2..14).rev().collect();
    order.extend([-1; 4]);
    order.extend([1, 0]);
    format(order, 16, 2)
}

#[test]
fn a_sound_format_passes_and_each_error_is_named() {
    small().check().unwrap();
    let broken = |change: &dyn Fn(&mut SiteFormat)| {
        let mut format = small();
        change(&mut format);
        format.check().unwrap_err().to_string()
    };
    assert!(broken(&|format| format.row.numbers.bits = 5).contains("bits is 5"));
    assert!(broken(&|format| format.clip = f32::NAN).contains("clip ratio"));
    assert!(broken(&|format| format.clip = 0.0).contains("clip ratio"));
    assert!(
        broken(&|format| format.row.numbers.group_size = 18).contains("must be a multiple of 16")
    );
    assert!(
        broken(&|format| format.row.numbers.group_size = 0).contains("must be a multiple of 16")
    );
    assert!(broken(&|format| format.row.groups = usize::MAX).contains("18 entries"));
    assert!(broken(&|format| format.order[0] = 2).contains("channel 2 occurs twice"));
    assert!(broken(&|format| format.order[0] = 14).contains("entry 0"));
    assert!(broken(&|format| format.order[0] = -2).contains("is -2"));
    assert!(broken(&|format| format.order[17] = -1).contains("entry 17"));
    assert!(broken(&|format| format.order[0] = -1).contains("channel 13 is missing"));
}

#[test]
fn permuting_reorders_pads_and_transforms_the_groups_only() {
    let row: Vec<f32> = (0..14).map(|channel| channel as f32 + 1.0).collect();
    let mut format = small();
    let permuted = format.permute_rows_plain(&row, 1);
    assert_eq!(permuted[..3], [14.0, 13.0, 12.0]);
    assert_eq!(permuted[11..], [3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 1.0]);
    format.transform = Transform::Hadamard;
    let transformed = format.permute_rows_plain(&row, 1);
    assert_eq!(transformed[0], permuted[..16].iter().sum::<f32>() / 4.0);
    assert_eq!(transformed[16..], [2.0, 1.0]);
}

#[test]
fn scales_of_other_grids_are_those_of_nvfp4_and_mxfp4() {
    // E2M1 is held doubled: a scale here is half of theirs.
    let mut row = [0.0; 14];
    row[2..6].copy_from_slice(&[6.2, -3.1, 1.0, 0.3]);
    let mut nvfp4 = small();
    nvfp4.row.numbers.codebook = Codebook::Fp4;
    nvfp4.row.numbers.scale =
        ScaleFormat { grid: ScaleGrid::E4m3, exponent: -3, ..ScaleFormat::F16 };
    // 6.2 / 6 * 4 is 4.13: the nearest number of E4M3 is 4.
    let rows = quantize_rows_plain(&row, 1, &nvfp4).unwrap();
    assert_eq!((rows.scales[0], &rows.codes[8..12]), (0.5, &[1, 2, -6, 12][..]));
    let mut mxfp4 = nvfp4.clone();
    mxfp4.row.numbers.scale = ScaleFormat { grid: ScaleGrid::PowerOfTwo, ..ScaleFormat::F16 };
    // 6.2 lies between 4 and 7: its scale is 4 / 4.
    let rows = quantize_rows_plain(&row, 1, &mxfp4).unwrap();
    assert_eq!((rows.scales[0], &rows.codes[8..12]), (0.5, &[1, 2, -6, 12][..]));
    row[2] = 7.0;
    let rows = quantize_rows_plain(&row, 1, &mxfp4).unwrap();
    assert_eq!((rows.scales[0], &rows.codes[8..12]), (1.0, &[0, 1, -3, 8][..]));
}

#[test]
fn codes_are_rounded_half_to_even_with_the_rounded_scale() {
    let mut row = [0.0; 14];
    row[2..8].copy_from_slice(&[7.0, 2.5, -2.5, 3.5, -7.0, 0.4]);
    row[..2].copy_from_slice(&[-127.0, 63.5]);
    let rows = quantize_rows_plain(&row, 1, &small()).unwrap();
    assert_eq!(rows.scales, [1.0]);
    assert_eq!(rows.codes[6..12], [0, -7, 4, -2, 2, 7]);
    let expected = OutlierRows::Int8 { codes: vec![64, -127], scales: vec![1.0] };
    assert_eq!(rows.outliers, expected);
    // 1/7 is no f16: the codes follow from the scale that is stored.
    row[2..8].copy_from_slice(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let rows = quantize_rows_plain(&row, 1, &small()).unwrap();
    assert_eq!(rows.scales, [f16::from_f32(1.0 / 7.0).to_f32()]);
    assert_ne!(rows.scales, [1.0 / 7.0]);
}

#[test]
fn fp4_and_fp8_are_rounded_to_their_own_numbers() {
    let mut row = [0.0; 14];
    row[2..8].copy_from_slice(&[6.0, 2.5, -3.5, 5.0, 1.25, -0.25]);
    row[..2].copy_from_slice(&[-448.0, 17.0]);
    let fp4 = small().with(|format| {
        format.row.numbers.codebook = Codebook::Fp4;
        format.row.outlier_format = OutlierFormat::Fp8;
    });
    let rows = quantize_rows_plain(&row, 1, &fp4).unwrap();
    // Scales are those of halves: 6 is 12 of them. Ties go to 2, -4, 4, 1 and 0.
    assert_eq!(rows.scales, [0.5]);
    assert_eq!(rows.codes[6..12], [0, 2, 8, -8, 4, 12]);
    assert_eq!(rows.outliers, OutlierRows::Fp8(vec![16.0, -448.0]));
    row[2..8].copy_from_slice(&[12.0, 2.5, -3.5, 5.1, 1.25, -0.04]);
    let bnb = fp4.with(|format| format.row.numbers.codebook = Codebook::Fp4Bnb);
    let rows = quantize_rows_plain(&row, 1, &bnb).unwrap();
    assert_eq!(rows.scales, [1.0]);
    assert_eq!(rows.codes[6..12], [-1, 2, 6, -3, 2, 12]);
    assert_eq!(dequantize_rows_plain(&rows)[6..8], [-0.0625, 2.0]);
    assert!(bnb.with(|format| format.row.numbers.bits = 8).check().is_err());
}

#[test]
fn clipping_saturates_at_the_limits_of_the_format() {
    for (bits, least, greatest) in [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -127, 127)] {
        let mut row = [0.0; 14];
        row[2..4].copy_from_slice(&[100.0, -100.0]);
        let format = small().with(|format| {
            (format.row.numbers.bits, format.clip) = (bits, 0.5);
        });
        let rows = quantize_rows_plain(&row, 1, &format).unwrap();
        assert_eq!(rows.codes[10..12], [least, greatest], "{bits} bits");
    }
}

#[test]
fn zeros_have_scale_zero_and_nonfinite_values_are_named() {
    let mut x = vec![0.0; 3 * 14];
    let rows = quantize_rows_plain(&x, 3, &small()).unwrap();
    assert_eq!((rows.scales, rows.codes), (vec![0.0; 3], vec![0; 48]));
    x[14 + 5] = f32::NAN;
    let error = quantize_rows_plain(&x, 3, &small()).unwrap_err();
    assert_eq!(error.message(), "the activation of token 1, channel 5 is NaN");
    x[14 + 5] = 1e6;
    let error = quantize_rows_plain(&x, 3, &small()).unwrap_err();
    assert!(error.message().contains("scale of group 0 of token 1"));
    (x[14 + 5], x[28]) = (0.0, 1e5);
    assert!(quantize_rows_plain(&x, 3, &small()).is_ok());
    let halves = small().with(|format| format.row.outlier_format = OutlierFormat::F16);
    assert!(quantize_rows_plain(&x, 3, &halves).is_err());
}

#[test]
fn dequantizing_is_within_half_a_step() {
    let x: Vec<f32> = (0..28).map(|i| (i as f32 * 1.7).sin()).collect();
    for outlier_format in [OutlierFormat::Int8, OutlierFormat::Fp8, OutlierFormat::F16] {
        let format = small().with(|format| format.row.outlier_format = outlier_format);
        let rows = quantize_rows_plain(&x, 2, &format).unwrap();
        let permuted = format.permute_rows_plain(&x, 2);
        let restored = dequantize_rows_plain(&rows);
        assert_eq!(restored.len(), permuted.len());
        for (value, expected) in restored.iter().zip(permuted) {
            assert!((value - expected).abs() <= 0.0723, "{value} for {expected}");
        }
    }
}

#[test]
fn a_signed_scale_brings_the_peak_to_the_least_code() {
    let mut format = format((0..16).collect(), 16, 0);
    format.row.numbers.scale = ScaleFormat::SIGNED_F16;
    let mut row = vec![0.5; 16];
    row[3] = 4.0;
    row[5] = -2.0;
    let quantized = |format: &SiteFormat, row: &[f32]| {
        let rows = quantize_rows_plain(row, 1, format).unwrap();
        (rows.scales[0], rows.codes)
    };
    let (scale, codes) = quantized(&format, &row);
    assert_eq!((scale, codes[0], codes[3], codes[5]), (-0.5, -1, -8, 4));
    // Of equal magnitudes the negative one decides.
    row[5] = -4.0;
    let (scale, codes) = quantized(&format, &row);
    assert_eq!((scale, codes[0], codes[3], codes[5]), (0.5, 1, 7, -8));
    let (scale, codes) = quantized(&format, &[0.0; 16]);
    assert_eq!((scale.to_bits(), codes), (0, vec![0; 16]));
    // INT8 and FP4 have as many codes on either side.
    row[5] = 0.0;
    format.row.numbers.bits = 8;
    assert!(quantized(&format, &row).0 > 0.0);
    format.row.numbers.bits = 4;
    format.row.numbers.codebook = Codebook::Fp4;
    assert!(quantized(&format, &row).0 > 0.0);
}
