/*! Quantized linears and channel orders as named tensors.

A linear `model.layers.0.self_attn.q_proj` is stored as `.weight_codes`, `.weight_scales` and, if
its site has outlier channels, `.outlier_codes` with `.outlier_scales` or `.outlier_weights`. A
site `model.layers.0.self_attn.attn_in` is stored as its `.order`. */

use half::f16;
use rayon::prelude::*;

use super::packing::{pack, row_bytes, unpack};
use super::{Dtype, Stored, TensorSpec};
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, OutlierFormat, ScaleFormat};
use crate::quant::scale::ScaleGrid;
use crate::{Error, Result};

/// The tensors of one linear.
struct Specs<'a> {
    prefix: &'a str,
    rows: usize,
    format: &'a LinearFormat,
}

impl Specs<'_> {
    fn of(&self, part: &str, dtype: Dtype, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec::new(format!("{}.{part}", self.prefix), dtype, shape)
    }

    fn codes(&self) -> TensorSpec {
        let row = &self.format.row;
        let bytes = row_bytes(row.grouped_channels(), row.numbers.bits);
        self.of("weight_codes", Dtype::U8, [self.rows, bytes])
    }

    fn scales(&self) -> TensorSpec {
        let shape = [self.format.scale_rows(self.rows), self.format.row.groups];
        let dtype = match self.format.row.numbers.scale.grid {
            ScaleGrid::F16 | ScaleGrid::Bf16 => Dtype::F16,
            ScaleGrid::E4m3 => Dtype::F8E4m3,
            ScaleGrid::PowerOfTwo => Dtype::U8,
        };
        self.of("weight_scales", dtype, shape)
    }

    fn outlier_codes(&self, dtype: Dtype) -> TensorSpec {
        self.of("outlier_codes", dtype, [self.rows, self.format.row.outlier_channels])
    }

    fn outlier_scales(&self) -> TensorSpec {
        self.of("outlier_scales", Dtype::F16, [self.rows])
    }

    fn outlier_weights(&self) -> TensorSpec {
        self.of("outlier_weights", Dtype::F16, [self.rows, self.format.row.outlier_channels])
    }
}

/// The tensors that a linear of `rows` output rows is stored as.
pub fn specs(prefix: &str, rows: usize, format: &LinearFormat) -> Vec<TensorSpec> {
    let specs = Specs { prefix, rows, format };
    let mut all = vec![specs.codes(), specs.scales()];
    match format.row.outliers() {
        None => {}
        Some(OutlierFormat::Int8) => {
            all.extend([specs.outlier_codes(Dtype::I8), specs.outlier_scales()]);
        }
        Some(OutlierFormat::Fp8) => {
            all.extend([specs.outlier_codes(Dtype::F8E4m3), specs.outlier_scales()]);
        }
        Some(OutlierFormat::F16) => all.push(specs.outlier_weights()),
    }
    all
}

/// The tensors of a linear, `(name, bytes)`, in the order of [`specs`].
pub fn to_tensors(prefix: &str, linear: &QuantizedLinear) -> Vec<(String, Vec<u8>)> {
    let name = |part: &str| format!("{prefix}.{part}");
    let (row, numbers) = (&linear.format.row, linear.format.row.numbers);
    let pack = |codes| pack(codes, linear.rows, row.grouped_channels(), numbers.bits);
    let codes = if numbers.codebook.is_int() {
        pack(&linear.codes)
    } else {
        let stored = linear.codes.par_iter().map(|&code| numbers.codebook.stored(code));
        pack(&stored.collect::<Vec<i8>>())
    };
    let bytes = |&scale: &f16| numbers.scale.byte(scale);
    let scales = linear.scales.iter().map(bytes).collect::<Option<Vec<u8>>>();
    let scales = scales.unwrap_or_else(|| f16_bytes(&linear.scales));
    let mut tensors = vec![(name("weight_codes"), codes), (name("weight_scales"), scales)];
    match &linear.outliers {
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
    rows: usize,
    format: &LinearFormat,
) -> Result<QuantizedLinear> {
    let specs = Specs { prefix, rows, format };
    let numbers = format.row.numbers;
    let spec = specs.codes();
    let bytes = stored.fetch(&spec)?;
    let mut codes = unpack(&bytes, rows, format.row.grouped_channels(), numbers.bits)
        .map_err(|error| error.context(format!("tensor `{}` cannot be unpacked", spec.name)))?;
    if !numbers.codebook.is_int() {
        codes.par_iter_mut().for_each(|code| *code = numbers.codebook.restored(*code));
    }
    let scales = read_scales(stored, &specs.scales(), numbers.scale)?;
    let outliers = match format.row.outliers() {
        None => OutlierBlock::None,
        Some(OutlierFormat::Int8) => {
            let spec = specs.outlier_codes(Dtype::I8);
            let codes: Vec<i8> = bytemuck::cast_slice(&stored.fetch(&spec)?).to_vec();
            // Integer kernels multiply absolute values, and -128 has none in 8 bits.
            if codes.contains(&i8::MIN) {
                let message = format!("tensor `{}` holds -128, not a code", spec.name);
                return Err(Error::input(message).hint("the file is damaged: copy it again"));
            }
            OutlierBlock::Int8 { codes, scales: read_f16(stored, &specs.outlier_scales())? }
        }
        Some(OutlierFormat::Fp8) => {
            let spec = specs.outlier_codes(Dtype::F8E4m3);
            let codes = stored.fetch(&spec)?.to_vec();
            if codes.iter().any(|&code| e4m3_value(code).is_nan()) {
                let message = format!("tensor `{}` holds a code that is no number", spec.name);
                return Err(Error::input(message).hint("the file is damaged: copy it again"));
            }
            OutlierBlock::Fp8 { codes, scales: read_f16(stored, &specs.outlier_scales())? }
        }
        Some(OutlierFormat::F16) => OutlierBlock::F16(read_f16(stored, &specs.outlier_weights())?),
    };
    Ok(QuantizedLinear { rows, format: *format, codes, scales, outliers })
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

fn read_scales(stored: &impl Stored, spec: &TensorSpec, format: ScaleFormat) -> Result<Vec<f16>> {
    if spec.dtype == Dtype::F16 {
        return read_f16(stored, spec);
    }
    let scales = stored.fetch(spec)?.iter().map(|&byte| format.of_byte(byte)).collect();
    finite(scales, spec)
}

fn read_f16(stored: &impl Stored, spec: &TensorSpec) -> Result<Vec<f16>> {
    let bytes = stored.fetch(spec)?;
    finite(bytes.as_chunks::<2>().0.iter().map(|pair| f16::from_le_bytes(*pair)).collect(), spec)
}

/// Refuses values of the tensor `spec` that are no numbers.
fn finite(values: Vec<f16>, spec: &TensorSpec) -> Result<Vec<f16>> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let message = format!("tensor `{}` holds {} at {at}", spec.name, values[at]);
            Err(Error::input(message).hint("the file is damaged: copy it again"))
        }
    }
}
