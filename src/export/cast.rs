/*! Floating-point tensors in another type, rounded once. */

use half::{bf16, f16};

use super::format::Part;
use super::model::ExportedModel;
use crate::Error;
use crate::checkpoint::{Dtype, Tensor, TensorBytes, TensorSpec};

/// Values converted together.
const VALUES: usize = 1 << 22;

/// A part that holds a stored tensor as the type `dtype`, F16 or BF16; a copy where it is of this type.
pub(super) fn part<'a>(model: &'a ExportedModel<'a>, tensor: Tensor<'a>, dtype: Dtype) -> Part<'a> {
    if tensor.dtype == dtype {
        return model.copied(tensor);
    }
    let make = move || {
        model.verify(tensor.name)?;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let width = tensor.len().checked_div(rows).unwrap_or(0).max(1);
        let step = (VALUES / width).max(1);
        let mut bytes = vec![0; tensor.len() * dtype.size_bytes()];
        for (part, out) in bytes.chunks_mut(step * width * dtype.size_bytes()).enumerate() {
            let first = part * step;
            let values = tensor.rows_f32(first..(first + step).min(rows))?;
            round(&values, dtype, out).ok_or_else(|| too_large(tensor.name, dtype))?;
        }
        tensor.release();
        Ok(vec![TensorBytes::from(bytes)])
    };
    Part { tensors: vec![TensorSpec::new(tensor.name, dtype, tensor.shape)], make: Box::new(make) }
}

/// Rounds finite values to F16 or BF16, to nearest, ties to even; none if one becomes infinite.
pub(super) fn round(values: &[f32], dtype: Dtype, out: &mut [u8]) -> Option<()> {
    let pairs = values.iter().zip(out.as_chunks_mut::<2>().0);
    let mut largest = 0;
    let infinity = match dtype {
        Dtype::BF16 => {
            for (value, out) in pairs {
                // As bf16::from_f32 for what is no NaN, but eight values at a time.
                let bits = value.to_bits();
                let rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
                largest = largest.max(rounded & 0x7fff);
                *out = rounded.to_le_bytes();
            }
            bf16::INFINITY.to_bits()
        }
        _ => {
            for (value, out) in pairs {
                let rounded = f16::from_f32(*value).to_bits();
                largest = largest.max(rounded & 0x7fff);
                *out = rounded.to_le_bytes();
            }
            f16::INFINITY.to_bits()
        }
    };
    (largest < infinity).then_some(())
}

/// The error of a value that a type does not hold.
pub(super) fn too_large(name: &str, dtype: Dtype) -> Error {
    Error::input(format!("{name} holds a weight beyond the range of {dtype}"))
        .hint("export with --dtype bf16, whose range is that of f32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_to_nearest_even_and_overflow_is_seen() {
        let rounded = |values: &[f32], dtype| {
            let mut out = vec![0; 2 * values.len()];
            round(values, dtype, &mut out).map(|()| out)
        };
        let values: Vec<f32> = (0..60_000u32)
            .map(|index| f32::from_bits(index.wrapping_mul(71_993) ^ index << 31))
            .filter(|value| value.abs() < 6e4)
            .chain([0.0, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 65_504.0])
            .collect();
        let bytes = |bits: &dyn Fn(f32) -> u16| -> Vec<u8> {
            values.iter().flat_map(|value| bits(*value).to_le_bytes()).collect()
        };
        let expected = bytes(&|value| bf16::from_f32(value).to_bits());
        assert_eq!(rounded(&values, Dtype::BF16), Some(expected));
        let expected = bytes(&|value| f16::from_f32(value).to_bits());
        assert_eq!(rounded(&values, Dtype::F16), Some(expected));
        assert_eq!(rounded(&[1.0, 65_520.0], Dtype::F16), None);
        assert!(rounded(&[1.0, 65_520.0], Dtype::BF16).is_some());
        assert_eq!(rounded(&[f32::MAX], Dtype::BF16), None);
    }
}
