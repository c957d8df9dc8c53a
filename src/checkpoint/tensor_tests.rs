use super::*;
use half::bf16;

fn tensor<'a>(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Tensor<'a> {
    Tensor { name: "w", dtype, shape, bytes, file: "d/m", map: None, first_row: 0 }
}

#[test]
fn every_float_type_converts_at_any_alignment() {
    let expected: Vec<f32> = (0..300).map(|i| (i as f32 - 150.0) / 8.0).collect();
    let f16s: Vec<u8> = expected.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    let bf16s: Vec<u8> = expected.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let f32s: Vec<u8> = expected.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bf16_expected: Vec<f32> = expected.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    for shift in 0..4 {
        let shifted = |bytes: &[u8]| [&vec![0; shift], bytes].concat();
        let t = |dtype, bytes: &[u8]| {
            let bytes = shifted(bytes);
            tensor(dtype, &[30, 10], &bytes[shift..]).to_f32().unwrap()
        };
        assert_eq!(t(Dtype::F16, &f16s), expected);
        assert_eq!(t(Dtype::BF16, &bf16s), bf16_expected);
        assert_eq!(t(Dtype::F32, &f32s), expected);
    }
    let whole = tensor(Dtype::F32, &[30, 10], &f32s);
    assert_eq!(whole.rows_f32(7..9).unwrap(), expected[70..90]);
    assert!(whole.rows_f32(30..30).unwrap().is_empty());
    assert!(whole.rows_f32(29..31).is_err());
}

#[test]
fn a_damaged_value_is_named_with_its_position() {
    let mut values = vec![1f32; VALUES_PER_TASK + 100];
    values[VALUES_PER_TASK + 42] = f32::NAN;
    values[VALUES_PER_TASK + 50] = f32::INFINITY;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = [(VALUES_PER_TASK + 100) / 2, 2];
    let w = tensor(Dtype::F32, &shape, &bytes);
    let row = (VALUES_PER_TASK + 42) / 2;
    let error = w.to_f32().unwrap_err();
    assert_eq!(error.message(), format!("tensor `w` of d/m holds NaN at [{row}, 0]"));
    assert_eq!(
        w.rows_f32(row + 1..row + 20).unwrap_err().message(),
        format!("tensor `w` of d/m holds inf at [{}, 0]", row + 4)
    );
    assert!(w.rows_f32(0..row).is_ok());
}

#[test]
fn codes_are_not_numbers() {
    let error = tensor(Dtype::U8, &[2], &[1, 2]).to_f32().unwrap_err();
    assert_eq!(error.message(), "tensor `w` of d/m is U8 [2], not F16, BF16 or F32");
}
