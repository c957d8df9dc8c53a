use super::*;
use crate::quant::codebook::Codebook;
use crate::quant::linear::OutlierBlock;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat, ScaleFormat};

/// Four rows of 64 channels in padded groups of 48 or whole ones of 32 or 64.
fn linear(bits: u8, group_size: usize, groups: usize, rows_per_scale: usize) -> QuantizedLinear {
    let scale = ScaleFormat::SIGNED_F16;
    let numbers = NumberFormat { bits, codebook: Codebook::Int, group_size, scale };
    let outlier_format = OutlierFormat::Int8;
    let row = RowFormat { numbers, groups, outlier_channels: 0, outlier_format };
    let format = LinearFormat { row, rows_per_scale };
    let least = -(1i32 << (bits - 1));
    let code = |at: usize| (least + (at * 7 % (1 << bits)) as i32) as i8;
    let scale = |at: usize| f16::from_f32((at as f32 - 2.5) / 64.0);
    let scale_count = 4 / rows_per_scale * groups;
    QuantizedLinear {
        rows: 4,
        format,
        codes: (0..4 * groups * group_size).map(code).collect(),
        scales: (0..scale_count).map(scale).collect(),
        outliers: OutlierBlock::None,
    }
}

/// What ggml's `dequantize_row_q4_0` and `dequantize_row_q8_0` compute.
fn dequantized(bytes: &[u8], kind: TensorType) -> Vec<f32> {
    let blocks = bytes.chunks(kind.row_bytes(BLOCK));
    let values = blocks.flat_map(|block| {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let q = |at: usize| match kind {
            TensorType::Q8_0 => i32::from(block[2 + at] as i8),
            _ if at < 16 => i32::from(block[2 + at] & 15) - 8,
            _ => i32::from(block[2 + at - 16] >> 4) - 8,
        };
        (0..BLOCK).map(move |at| q(at) as f32 * d).collect::<Vec<_>>()
    });
    values.collect()
}

#[test]
fn blocks_are_codes_and_scales_to_the_bit() {
    for (bits, kind) in [(4, TensorType::Q4_0), (8, TensorType::Q8_0)] {
        for (group, groups) in [(32, 2), (64, 1), (96, 1)] {
            for rows_per_scale in [1, 2] {
                let linear = linear(bits, group, groups, rows_per_scale);
                let weights = crate::quant::weights::dequantize(&linear);
                let width = groups * group;
                for order in [RowOrder::Source, RowOrder::Pairs { head_dim: 4 }] {
                    let bytes = pack(&linear, 64, kind, order);
                    assert_eq!(bytes.len(), 4 * kind.row_bytes(64));
                    let found = dequantized(&bytes, kind);
                    for (row, found) in found.chunks(64).enumerate() {
                        let source = order.source_row(row);
                        assert_eq!(*found, weights[source * width..source * width + 64]);
                    }
                }
            }
        }
    }
}

#[test]
fn pairs_of_the_rotary_embedding_become_neighbours() {
    let order = RowOrder::Pairs { head_dim: 6 };
    let rows: Vec<usize> = (0..12).map(|row| order.source_row(row)).collect();
    assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
}

#[test]
fn unquantized_values_are_stored_as_asked() {
    let values: Vec<f32> = (0..32).map(|at| (at as f32 - 15.5) / 3.0).collect();
    let half = store(&values, TensorType::F16).unwrap();
    assert_eq!(half[..2], f16::from_f32(values[0]).to_le_bytes());
    assert_eq!(store(&values, TensorType::F32).unwrap().len(), 128);
    let rounded = dequantized(&store(&values, TensorType::Q8_0).unwrap(), TensorType::Q8_0);
    let step = 15.5 / 3.0 / 127.0;
    for (rounded, value) in rounded.iter().zip(&values) {
        // Half a step, and what f16 changes of the scale.
        assert!((rounded - value).abs() <= step * 0.51 + value.abs() / 2048.0, "{value}");
    }
    assert_eq!(store(&[0.0; 32], TensorType::Q8_0).unwrap(), [0; 34]);
    assert!(store(&[1e5; 32], TensorType::F16).is_none());
    assert!(store(&[1e8; 32], TensorType::Q8_0).is_none());
}
