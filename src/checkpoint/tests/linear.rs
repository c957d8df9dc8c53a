use super::*;
use crate::checkpoint::linear::{
    from_tensors, order_spec, order_tensor, read_order, specs as linear_specs, to_tensors,
};
use crate::checkpoint::{AtomCheckpoint, Options, Stored, Writer};
use crate::quant::codebook::Codebook;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::scale::ScaleGrid;
use half::f16;
use serde_json::json;

const PREFIX: &str = "model.layers.0.self_attn.q_proj";
const SITE: &str = "model.layers.0.self_attn.attn_in";

/// Every combination of formats, rows that share a scale and outlier formats.
fn linears() -> Vec<QuantizedLinear> {
    let f16s = |n: usize| (0..n).map(|i| f16::from_f32(i as f32 / 8.0)).collect::<Vec<_>>();
    let i8s = |n: usize| (0..n).map(|i| (i * 37 % 255) as u8 as i8).map(|c| c.max(-127)).collect();
    let (rows, group_size, groups) = (5usize, 16, 3);
    let outliers = [
        (0, OutlierFormat::Int8, OutlierBlock::None),
        (4, OutlierFormat::Int8, OutlierBlock::Int8 { codes: i8s(20), scales: f16s(5) }),
        (4, OutlierFormat::F16, OutlierBlock::F16(f16s(20))),
        (
            4,
            OutlierFormat::Fp8,
            OutlierBlock::Fp8 { codes: (0..20).map(|i| i * 13).collect(), scales: f16s(5) },
        ),
    ];
    let mut linears = Vec::new();
    use Codebook::{Fp4, Fp4Bnb, Int};
    for (bits, codebook) in [(2u8, Int), (3, Int), (4, Int), (8, Int), (4, Fp4), (4, Fp4Bnb)] {
        for rows_per_scale in [1, 2] {
            for (outlier_channels, outlier_format, outliers) in outliers.clone() {
                let bits_of = |i: usize| (i * 101 % 251) as u8 as i8 >> (8 - bits);
                let codes = (0..240).map(|i| codebook.restored(bits_of(i))).collect();
                let scales = f16s(rows.div_ceil(rows_per_scale) * groups);
                let numbers = NumberFormat { bits, codebook, group_size, scale: ScaleFormat::F16 };
                let row = RowFormat { numbers, groups, outlier_channels, outlier_format };
                let format = LinearFormat { row, rows_per_scale };
                linears.push(QuantizedLinear { rows, format, codes, scales, outliers });
            }
        }
    }
    linears.extend(linears_of_other_grids());
    linears
}

/// Linears whose scales are stored as bytes.
fn linears_of_other_grids() -> Vec<QuantizedLinear> {
    let (rows, group_size, groups) = (5, 16, 3);
    let fp4 = (ScaleGrid::PowerOfTwo, 0, Codebook::Fp4);
    let e4m3 = [-15, -9, 7].map(|exponent| (ScaleGrid::E4m3, exponent, Codebook::Int));
    let linear = |(grid, exponent, codebook)| {
        let scale = ScaleFormat { grid, exponent, signed: grid == ScaleGrid::E4m3 };
        let numbers = NumberFormat { bits: 4, codebook, group_size, scale };
        let outlier_format = OutlierFormat::Int8;
        let row = RowFormat { numbers, groups, outlier_channels: 0, outlier_format };
        let bytes = [0, 0x01, 0x08, 0x7e, 0x38, 0xfe, 0x86];
        let powers = [0, 103, 127, 142, 120];
        let byte = |i: usize| if scale.signed { bytes[i % 7] } else { powers[i % 5] };
        QuantizedLinear {
            rows,
            format: LinearFormat { row, rows_per_scale: 1 },
            codes: (0..rows * groups * group_size)
                .map(|i| codebook.restored((i % 8) as i8))
                .collect(),
            scales: (0..rows * groups).map(|i| scale.of_byte(byte(i))).collect(),
            outliers: OutlierBlock::None,
        }
    };
    [fp4].into_iter().chain(e4m3).map(linear).collect()
}

/// Tensors in memory, of the forms that their own specs say.
struct Memory(Vec<(TensorSpec, Vec<u8>)>);

impl Stored for Memory {
    fn fetch(&self, spec: &TensorSpec) -> crate::Result<std::borrow::Cow<'_, [u8]>> {
        match self.0.iter().find(|(found, _)| found == spec) {
            Some((_, bytes)) => Ok(bytes.into()),
            None => Err(Error::input(format!("no {} {}", spec.name, spec.form()))),
        }
    }
}

#[test]
fn a_linear_is_what_it_was_written_as() {
    for linear in linears() {
        let (rows, format) = (linear.rows, linear.format);
        let (specs, tensors) = (linear_specs(PREFIX, rows, &format), to_tensors(PREFIX, &linear));
        assert_eq!(specs.len(), tensors.len());
        let memory = Memory(
            specs
                .into_iter()
                .zip(tensors)
                .map(|(spec, (name, bytes))| {
                    assert_eq!((&spec.name, spec.bytes()), (&name, bytes.len() as u64));
                    (spec, bytes)
                })
                .collect(),
        );
        assert_eq!(from_tensors(&memory, PREFIX, rows, &format).unwrap(), linear);
    }
}

#[test]
fn names_types_and_shapes_are_those_of_the_format() {
    let linear = &linears()[9]; // 3 bits, one scale a row, INT8 outliers
    assert_eq!((linear.format.row.numbers.bits, linear.format.rows_per_scale), (3, 1));
    let forms: Vec<String> = linear_specs("p", linear.rows, &linear.format)
        .iter()
        .map(|spec| format!("{} {}", spec.name, spec.form()))
        .collect();
    assert_eq!(
        forms,
        [
            "p.weight_codes U8 [5, 18]",
            "p.weight_scales F16 [5, 3]",
            "p.outlier_codes I8 [5, 4]",
            "p.outlier_scales F16 [5]"
        ]
    );
}

#[test]
fn a_linear_comes_back_from_the_work_and_from_the_finished_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    let linear = &linears()[17];
    let (rows, format) = (linear.rows, linear.format);
    let order: Vec<i32> = (0..48).chain([-1, -1]).rev().chain([49, 48, 50, 51]).collect();
    let mut specs = linear_specs(PREFIX, rows, &format);
    specs.push(order_spec(SITE, order.len()));
    let mut writer =
        Writer::create(&super::to(&out, false), specs, &json!({}), Options::default(), &|| Ok(()))
            .unwrap();
    let mut tensors = to_tensors(PREFIX, linear);
    tensors.push(order_tensor(SITE, &order));
    writer.write_block("0", tensors, Value::Null).unwrap();
    assert_eq!(from_tensors(&writer, PREFIX, rows, &format).unwrap(), *linear);
    let message = "tensor `model.layers.0.self_attn.q_proj.weight_codes` is U8 [5, 24], \
                   expected U8 [6, 24]";
    assert_eq!(from_tensors(&writer, PREFIX, 6, &format).unwrap_err().message(), message);
    writer.finish(&json!({}), &manifest(), &[]).unwrap();

    let checkpoint = AtomCheckpoint::open(&out).unwrap();
    assert_eq!(from_tensors(&checkpoint, PREFIX, rows, &format).unwrap(), *linear);
    assert_eq!(read_order(&checkpoint, SITE, 52, 50, 4).unwrap(), order);
    let wrong = LinearFormat { row: RowFormat { groups: 4, ..format.row }, ..format };
    let error = from_tensors(&checkpoint, PREFIX, rows, &wrong).unwrap_err();
    assert!(error.message().ends_with("is U8 [5, 24], expected U8 [5, 32]"));
    assert!(error.message().starts_with("tensor `model.layers.0.self_attn.q_proj.weight_codes`"));
}

#[test]
fn damaged_scales_and_codes_are_named() {
    let linear = &linears()[1];
    let (rows, format) = (linear.rows, linear.format);
    let damage = |at: usize, bytes: &[u8]| {
        let tensors = to_tensors("p", linear);
        let mut tensors: Vec<_> = linear_specs("p", rows, &format)
            .into_iter()
            .zip(tensors.into_iter().map(|t| t.1))
            .collect();
        tensors[at].1[2..2 + bytes.len()].copy_from_slice(bytes);
        from_tensors(&Memory(tensors), "p", rows, &format).unwrap_err().message().to_string()
    };
    assert_eq!(damage(1, &[0, 0x7c]), "tensor `p.weight_scales` holds inf at 1");
    assert_eq!(damage(3, &[1, 0x7e]), "tensor `p.outlier_scales` holds NaN at 1");
    assert_eq!(damage(2, &[0x80]), "tensor `p.outlier_codes` holds -128, not a code");
    let fp8 = &linears()[3];
    let (rows, format) = (fp8.rows, fp8.format);
    let mut tensors = to_tensors("p", fp8);
    tensors[2].1[7] = 0xff;
    let tensors =
        linear_specs("p", rows, &format).into_iter().zip(tensors.into_iter().map(|t| t.1));
    let error = from_tensors(&Memory(tensors.collect()), "p", rows, &format).unwrap_err();
    assert_eq!(error.message(), "tensor `p.outlier_codes` holds a code that is no number");
}

#[test]
fn an_order_holds_every_channel_once_and_pads_only_its_groups() {
    let read = |order: &[i32]| {
        let memory = Memory(vec![(order_spec("s", 6), order_tensor("s", order).1)]);
        read_order(&memory, "s", 4, 4, 2).map_err(|error| error.message().to_string())
    };
    assert_eq!(read(&[3, 0, -1, -1, 1, 2]).unwrap(), [3, 0, -1, -1, 1, 2]);
    let refusals: [([i32; 6], &str); 5] = [
        ([3, 0, -1, 1, -1, 2], "-1 at 4, which is neither a channel nor padding"),
        ([3, 0, -2, -1, 1, 2], "-2 at 2, which is neither a channel nor padding"),
        ([3, 0, 4, -1, 1, 2], "4 at 2, but there are 4 channels"),
        ([3, 0, 3, -1, 1, 2], "3 at 2, a channel that occurred before"),
        ([3, 0, -1, -1, 1, 1], "1 at 5, a channel that occurred before"),
    ];
    for (order, message) in refusals {
        assert_eq!(read(&order).unwrap_err(), format!("tensor `s.order` has {message}"));
    }
    let lacking = Memory(vec![(order_spec("s", 6), order_tensor("s", &[3, 0, -1, -1, 1, 2]).1)]);
    let error = read_order(&lacking, "s", 5, 4, 2).unwrap_err();
    assert_eq!(error.message(), "tensor `s.order` lacks channel 4");
}
