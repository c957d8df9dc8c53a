/*! Rows of weights as llama.cpp stores them: ggml's blocks of 32 codes with an f16 scale d, and plain floats.

`Q4_0` is `w = (q - 8) d` with q of 0 to 15, `Q8_0` is `w = q d` with q of -128 to 127. A code of ours is `q - 8` or q, and our
scale is d, sign included, so both are copied and nothing is rounded. */

use half::f16;
use rayon::prelude::*;

use super::container::TensorType;
use crate::quant::linear::QuantizedLinear;

/// Codes that share a scale.
pub(super) const BLOCK: usize = 32;

/// The order of a linear's rows in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As in the source.
    Source,
    /// The two channels that the rotary embedding turns together are neighbours: channel i of a head of `head_dim` comes
    /// before channel `i + head_dim / 2`. The order of llama.cpp's `llama`.
    Pairs { head_dim: usize },
}

impl RowOrder {
    /// The source's row at row `row` of the file.
    pub(super) fn source_row(self, row: usize) -> usize {
        match self {
            Self::Source => row,
            Self::Pairs { head_dim } => {
                let (head, inside) = (row / head_dim, row % head_dim);
                head * head_dim + inside % 2 * (head_dim / 2) + inside / 2
            }
        }
    }
}

/// The bytes of a quantized linear whose first `channels` codes of a row are the source's channels in their order, in groups
/// of a multiple of 32.
///
/// # Panics
/// If `kind` is no type of blocks.
pub(super) fn pack(
    linear: &QuantizedLinear,
    channels: usize,
    kind: TensorType,
    order: RowOrder,
) -> Vec<u8> {
    let row_format = &linear.format.row;
    let (width, group) = (row_format.grouped_channels(), row_format.numbers.group_size);
    let row_bytes = kind.row_bytes(channels);
    let mut bytes = vec![0; linear.rows * row_bytes];
    bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(row, out)| {
        let source = order.source_row(row);
        let codes = &linear.codes[source * width..source * width + channels];
        let first_scale = source / linear.format.rows_per_scale * row_format.groups;
        let block_bytes = kind.row_bytes(BLOCK);
        let blocks = codes.as_chunks::<BLOCK>().0.iter().zip(out.chunks_mut(block_bytes));
        for (block, (codes, out)) in blocks.enumerate() {
            let scale = linear.scales[first_scale + block * BLOCK / group];
            let (d, q) = out.split_at_mut(2);
            d.copy_from_slice(&scale.to_le_bytes());
            match kind {
                TensorType::Q4_0 => pack_nibbles(codes, q),
                TensorType::Q8_0 => q.copy_from_slice(bytemuck::cast_slice(codes)),
                TensorType::F32 | TensorType::F16 => unreachable!("floats have no codes"),
            }
        }
    });
    bytes
}

/// The first half of a block in the low nibbles, the second in the high ones.
fn pack_nibbles(codes: &[i8; BLOCK], out: &mut [u8]) {
    let (low, high) = codes.split_at(BLOCK / 2);
    for ((&low, &high), out) in low.iter().zip(high).zip(out) {
        *out = (low + 8) as u8 | ((high + 8) as u8) << 4;
    }
}

/// Unquantized values as a type: F32 and F16 value by value, `Q8_0` by rounding each block of 32 to the scale `absmax / 127`, halves
/// away from zero, as ggml's reference does. None if a value is beyond the range of f16.
///
/// # Panics
/// If `kind` is `Q4_0`, or the values are no complete blocks.
pub(super) fn store(values: &[f32], kind: TensorType) -> Option<Vec<u8>> {
    match kind {
        TensorType::F32 => Some(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        TensorType::F16 => {
            let halves = values.iter().map(|&value| f16::from_f32(value));
            let mut finite = true;
            let bytes = halves.inspect(|half| finite &= half.is_finite());
            let bytes = bytes.flat_map(f16::to_le_bytes).collect();
            finite.then_some(bytes)
        }
        TensorType::Q8_0 => round_to_q8(values),
        TensorType::Q4_0 => unreachable!("unquantized tensors are never rounded to 4 bits"),
    }
}

fn round_to_q8(values: &[f32]) -> Option<Vec<u8>> {
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    assert!(rest.is_empty(), "{} values are no complete blocks", values.len());
    let size = TensorType::Q8_0.row_bytes(BLOCK);
    let mut bytes = vec![0; blocks.len() * size];
    let in_range = blocks.par_iter().zip(bytes.par_chunks_mut(size)).map(|(values, out)| {
        let peak = values.iter().fold(0.0f32, |peak, value| peak.max(value.abs()));
        let scale = peak / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let (d, q) = out.split_at_mut(2);
        let stored = f16::from_f32(scale);
        d.copy_from_slice(&stored.to_le_bytes());
        for (q, value) in q.iter_mut().zip(values) {
            *q = (value * inverse).round() as i8 as u8;
        }
        stored.is_finite()
    });
    in_range.reduce(|| true, |all, one| all && one).then_some(bytes)
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
