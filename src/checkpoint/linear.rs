/*! Quantized linears and channel orders as named tensors.

A linear `model.layers.0.self_attn.q_proj` is stored as `.weight_codes`, `.weight_scales` and, if
its site has outlier channels, `.outlier_codes` with `.outlier_scales` or `.outlier_weights`. A
site `model.layers.0.self_attn.attn_in` is stored as its `.order`. */

use half::f16;
use rayon::prelude::*;

use super::packing::{pack, row_bytes, unpack};
use super::{Dtype, Stored, TensorSpec};
use crate::quant::float::e4m3_value;
use crate::quant::levels::Levels;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::site::OutlierFormat;
use crate::{Error, Result};

/// What has to be known of a quantized linear to lay out or to read its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Output features.
    pub rows: usize,
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// What codes stand for.
    pub levels: Levels,
    /// Channels in a group.
    pub group_size: usize,
    /// Groups in a row.
    pub groups: usize,
    /// Adjacent rows that share one scale: 1 or 2.
    pub rows_per_scale: usize,
    /// Outlier channels; 0 for none, whatever the format.
    pub outlier_channels: usize,
    /// How they are stored.
    pub outlier_format: OutlierFormat,
}

impl LinearShape {
    /// The shape of an existing linear.
    pub fn of(linear: &QuantizedLinear) -> Self {
        let (outlier_channels, outlier_format) = match linear.outliers {
            OutlierBlock::None => (0, OutlierFormat::Int8),
            OutlierBlock::Int8 { .. } => (linear.outlier_channels, OutlierFormat::Int8),
            OutlierBlock::Fp8 { .. } => (linear.outlier_channels, OutlierFormat::Fp8),
            OutlierBlock::F16(_) => (linear.outlier_channels, OutlierFormat::F16),
        };
        Self {
            rows: linear.rows,
            bits: linear.bits,
            levels: linear.levels,
            group_size: linear.group_size,
            groups: linear.groups,
            rows_per_scale: linear.rows_per_scale,
            outlier_channels,
            outlier_format,
        }
    }

    /// Channels before the outliers, padding included.
    pub fn grouped_channels(&self) -> usize {
        self.groups * self.group_size
    }

    fn codes(&self, prefix: &str) -> TensorSpec {
        let bytes = row_bytes(self.grouped_channels(), self.bits);
        TensorSpec::new(format!("{prefix}.weight_codes"), Dtype::U8, [self.rows, bytes])
    }

    fn scales(&self, prefix: &str) -> TensorSpec {
        let rows = self.rows.div_ceil(self.rows_per_scale.max(1));
        TensorSpec::new(format!("{prefix}.weight_scales"), Dtype::F16, [rows, self.groups])
    }

    fn outlier_codes(&self, prefix: &str) -> TensorSpec {
        let shape = [self.rows, self.outlier_channels];
        let fp8 = self.outlier_format == OutlierFormat::Fp8;
        let dtype = if fp8 { Dtype::F8E4m3 } else { Dtype::I8 };
        TensorSpec::new(format!("{prefix}.outlier_codes"), dtype, shape)
    }

    fn outlier_scales(&self, prefix: &str) -> TensorSpec {
        TensorSpec::new(format!("{prefix}.outlier_scales"), Dtype::F16, [self.rows])
    }

    fn outlier_weights(&self, prefix: &str) -> TensorSpec {
        let shape = [self.rows, self.outlier_channels];
        TensorSpec::new(format!("{prefix}.outlier_weights"), Dtype::F16, shape)
    }
}

/// The tensors that a linear of this shape is stored as.
pub fn specs(prefix: &str, shape: &LinearShape) -> Vec<TensorSpec> {
    let mut specs = vec![shape.codes(prefix), shape.scales(prefix)];
    match shape.outlier_format {
        _ if shape.outlier_channels == 0 => {}
        OutlierFormat::Int8 | OutlierFormat::Fp8 => {
            specs.extend([shape.outlier_codes(prefix), shape.outlier_scales(prefix)]);
        }
        OutlierFormat::F16 => specs.push(shape.outlier_weights(prefix)),
    }
    specs
}

/// The tensors of a linear, `(name, bytes)`, in the order of [`specs`].
pub fn to_tensors(prefix: &str, linear: &QuantizedLinear) -> Vec<(String, Vec<u8>)> {
    let name = |part: &str| format!("{prefix}.{part}");
    let pack = |codes| pack(codes, linear.rows, linear.grouped_channels(), linear.bits);
    let codes = if linear.levels.is_int() {
        pack(&linear.codes)
    } else {
        let stored = linear.codes.par_iter().map(|&code| linear.levels.stored(code));
        pack(&stored.collect::<Vec<i8>>())
    };
    let mut tensors =
        vec![(name("weight_codes"), codes), (name("weight_scales"), f16_bytes(&linear.scales))];
    match &linear.outliers {
        _ if linear.outlier_channels == 0 => {}
        OutlierBlock::None => {}
        OutlierBlock::Int8 { codes, scales } => tensors.extend([
            (name("outlier_codes"), bytemuck::cast_slice(codes).to_vec()),
            (name("outlier_scales"), f16_bytes(scales)),
        ]),
        OutlierBlock::Fp8 { codes, scales } => tensors.extend([
            (name("outlier_codes"), codes.clone()),
            (name("outlier_scales"), f16_bytes(scales)),
        ]),
        OutlierBlock::F16(values) => tensors.push((name("outlier_weights"), f16_bytes(values))),
    }
    tensors
}

/// Reads a linear back. A tensor of another type or shape, a scale that is no number, an outlier
/// code of -128 or an FP8 one of NaN are errors that name the tensor.
pub fn from_tensors(
    stored: &impl Stored,
    prefix: &str,
    shape: &LinearShape,
) -> Result<QuantizedLinear> {
    let spec = shape.codes(prefix);
    let bytes = stored.fetch(&spec)?;
    let mut codes = unpack(&bytes, shape.rows, shape.grouped_channels(), shape.bits)
        .map_err(|error| error.context(format!("tensor `{}` cannot be unpacked", spec.name)))?;
    if !shape.levels.is_int() {
        codes.par_iter_mut().for_each(|code| *code = shape.levels.restored(*code));
    }
    let scales = read_f16(stored, &shape.scales(prefix))?;
    let outliers = match shape.outlier_format {
        _ if shape.outlier_channels == 0 => OutlierBlock::None,
        OutlierFormat::Int8 => {
            let spec = shape.outlier_codes(prefix);
            let codes: Vec<i8> = bytemuck::cast_slice(&stored.fetch(&spec)?).to_vec();
            // Integer kernels multiply absolute values, and -128 has none in 8 bits.
            if codes.contains(&i8::MIN) {
                let message = format!("tensor `{}` holds -128, not a code", spec.name);
                return Err(Error::input(message).hint("the file is damaged: copy it again"));
            }
            OutlierBlock::Int8 { codes, scales: read_f16(stored, &shape.outlier_scales(prefix))? }
        }
        OutlierFormat::Fp8 => {
            let spec = shape.outlier_codes(prefix);
            let codes = stored.fetch(&spec)?.to_vec();
            if codes.iter().any(|&code| e4m3_value(code).is_nan()) {
                let message = format!("tensor `{}` holds a code that is no number", spec.name);
                return Err(Error::input(message).hint("the file is damaged: copy it again"));
            }
            OutlierBlock::Fp8 { codes, scales: read_f16(stored, &shape.outlier_scales(prefix))? }
        }
        OutlierFormat::F16 => OutlierBlock::F16(read_f16(stored, &shape.outlier_weights(prefix))?),
    };
    Ok(QuantizedLinear {
        rows: shape.rows,
        bits: shape.bits,
        levels: shape.levels,
        group_size: shape.group_size,
        groups: shape.groups,
        rows_per_scale: shape.rows_per_scale,
        codes,
        scales,
        outlier_channels: shape.outlier_channels,
        outliers,
    })
}

/// The tensor of a site's channel order, of `length` entries: grouped channels with padding, then
/// outliers.
pub fn order_spec(site: &str, length: usize) -> TensorSpec {
    TensorSpec::new(format!("{site}.order"), Dtype::I32, [length])
}

/// Reads a vector of f32, which must be finite.
pub fn read_floats(stored: &impl Stored, spec: &TensorSpec) -> Result<Vec<f32>> {
    let bytes = stored.fetch(spec)?;
    let values: Vec<f32> =
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => Err(Error::input(format!("tensor `{}` is not finite at {at}", spec.name))
            .hint("the file is damaged: copy it again")),
    }
}

/// The tensor of a site's channel order, `(name, bytes)`.
pub fn order_tensor(site: &str, order: &[i32]) -> (String, Vec<u8>) {
    let bytes = order.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    (format!("{site}.order"), bytes)
}

/// Reads a site's channel order: `grouped` entries, where -1 is padding, then `outliers`. Each of
/// the `channels` channels must occur once.
pub fn read_order(
    stored: &impl Stored,
    site: &str,
    channels: usize,
    grouped: usize,
    outliers: usize,
) -> Result<Vec<i32>> {
    let spec = order_spec(site, grouped + outliers);
    let bytes = stored.fetch(&spec)?;
    let order: Vec<i32> = bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    let mut seen = vec![false; channels];
    for (place, &entry) in order.iter().enumerate() {
        let wrong = |what: &str| {
            Error::input(format!("tensor `{}` has {entry} at {place}, {what}", spec.name))
                .hint("the file is damaged: copy it again")
        };
        match usize::try_from(entry) {
            Err(_) if entry == -1 && place < grouped => {}
            Err(_) => return Err(wrong("which is neither a channel nor padding")),
            Ok(channel) if channel >= channels => {
                return Err(wrong(&format!("but there are {channels} channels")));
            }
            Ok(channel) if std::mem::replace(&mut seen[channel], true) => {
                return Err(wrong("a channel that occurred before"));
            }
            Ok(_) => {}
        }
    }
    match seen.iter().position(|seen| !seen) {
        None => Ok(order),
        Some(channel) => {
            Err(Error::input(format!("tensor `{}` lacks channel {channel}", spec.name))
                .hint("the file is damaged: copy it again"))
        }
    }
}

fn f16_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn read_f16(stored: &impl Stored, spec: &TensorSpec) -> Result<Vec<f16>> {
    let bytes = stored.fetch(spec)?;
    let values: Vec<f16> =
        bytes.as_chunks::<2>().0.iter().map(|pair| f16::from_le_bytes(*pair)).collect();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let message = format!("tensor `{}` holds {} at {at}", spec.name, values[at]);
            Err(Error::input(message).hint("the file is damaged: copy it again"))
        }
    }
}
