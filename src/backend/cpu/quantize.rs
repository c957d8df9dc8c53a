/*! Activations -> codes, fast: the bits of `quant::site`'s definitions.

There is one body for all instruction sets, which the compiler vectorises for each. The bits agree
because every step is exact or correctly rounded by itself: maxima, the butterflies of the
transform in their fixed order, one product a value. Rounding half to even is an addition (for
integers here, for floating-point formats in `quant::float`): with
`|v| <= 127`, the sum `1.5 * 2^23 + v` has a unit in the last place of 1, so its low byte is the
code in two's complement. */

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::isa::Isa;
use crate::Result;
use crate::quant::codebook::Codebook;
use crate::quant::float::E4M3;
use crate::quant::grid::{Peak, inverse};
use crate::quant::hadamard;
use crate::quant::number::{OutlierFormat, RowFormat};
use crate::quant::rows::{OutlierRows, QuantizedRows};
use crate::quant::site::{
    self, GREATEST_INT8, PADDING, SiteFormat, Transform, absmax, code_of, fp8_of, scale_of,
};

/// Tokens that a thread takes at a time.
const TILE_TOKENS: usize = 16;

/// `1.5 * 2^23`.
const ROUNDER: f32 = 12_582_912.0;

/// Quantizes activations `[tokens, channels]`: the bits of [`site::quantize_rows_plain`].
///
/// # Errors
/// The same as [`site::quantize_rows_plain`].
///
/// # Panics
/// If `x` is not `[tokens, channels]` or the format fails [`SiteFormat::check`].
pub fn quantize_rows(
    isa: Isa,
    x: &[f32],
    tokens: usize,
    format: &SiteFormat,
) -> Result<QuantizedRows> {
    assert_eq!(x.len(), tokens * format.channels, "length of x");
    if isa == Isa::Plain {
        return site::quantize_rows_plain(x, tokens, format);
    }
    let RowFormat { groups, outlier_channels: outliers, .. } = format.row;
    let int8 = format.row.outliers() == Some(OutlierFormat::Int8);
    let floats = outliers > 0 && !int8;
    let mut codes = vec![0; tokens * format.row.grouped_channels()];
    let mut scales = vec![0.0; tokens * groups];
    let mut outlier_codes = vec![0; if int8 { tokens * outliers } else { 0 }];
    let mut outlier_scales = vec![0.0; if int8 { tokens } else { 0 }];
    let mut outlier_values = vec![0.0; if floats { tokens * outliers } else { 0 }];

    let mut rest = Tile {
        x,
        codes: &mut codes,
        scales: &mut scales,
        outlier_codes: &mut outlier_codes,
        outlier_scales: &mut outlier_scales,
        outlier_values: &mut outlier_values,
    };
    let mut tiles = Vec::with_capacity(tokens.div_ceil(TILE_TOKENS));
    for first in (0..tokens).step_by(TILE_TOKENS) {
        tiles.push(rest.split_off(TILE_TOKENS.min(tokens - first), tokens - first));
    }
    let slots = Slots::new(format);
    let sound = tiles.into_par_iter().all(|tile| match isa {
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { quantize_tile_avx512(tile, format, &slots) },
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { quantize_tile_avx2(tile, format, &slots) },
        _ => quantize_tile(tile, format, &slots),
    });
    if !sound {
        // It finds the first value that is wrong and says so.
        return site::quantize_rows_plain(x, tokens, format);
    }
    Ok(QuantizedRows {
        tokens,
        format: format.row,
        codes,
        scales,
        outliers: match format.row.outliers() {
            None => OutlierRows::None,
            Some(OutlierFormat::Int8) => {
                OutlierRows::Int8 { codes: outlier_codes, scales: outlier_scales }
            }
            Some(OutlierFormat::Fp8) => OutlierRows::Fp8(outlier_values),
            Some(OutlierFormat::F16) => OutlierRows::F16(outlier_values),
        },
    })
}

/// Brings rows `[tokens, channels]` into the site's order and transforms their groups,
/// `[tokens, width]`: the bits of [`SiteFormat::permute`]. Writes all of `permuted`.
///
/// # Panics
/// If `x` is not `[tokens, channels]`, `permuted` not `[tokens, width]`, or the format fails
/// [`SiteFormat::check`].
pub fn permute_rows(isa: Isa, x: &[f32], tokens: usize, format: &SiteFormat, permuted: &mut [f32]) {
    assert_eq!(x.len(), tokens * format.channels, "length of x");
    assert_eq!(permuted.len(), tokens * format.width(), "length of permuted");
    if isa == Isa::Plain {
        permuted.copy_from_slice(&format.permute_rows_plain(x, tokens));
        return;
    }
    let slots = Slots::new(format);
    if format.channels > 0 {
        let rows = x.par_chunks_exact(format.channels).with_min_len(TILE_TOKENS);
        rows.zip(permuted.par_chunks_exact_mut(format.width())).for_each(|(row, out)| match isa {
            // SAFETY: the token is proof that the processor has the set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => unsafe { permute_avx512(row, format, &slots, out) },
            // SAFETY: the token is proof that the processor has the set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => unsafe { permute_avx2(row, format, &slots, out) },
            _ => permute(row, format, &slots, out),
        });
    }
}

/// What the codes mean, `[tokens, width]`: the bits of [`site::dequantize_rows_plain`]. Writes all of
/// `values`.
///
/// # Panics
/// If `values` is not `[tokens, width]`.
pub fn dequantize_rows(isa: Isa, rows: &QuantizedRows, values: &mut [f32]) {
    let width = rows.format.width();
    assert_eq!(values.len(), rows.tokens * width, "length of values");
    if isa == Isa::Plain || width == 0 {
        values.copy_from_slice(&site::dequantize_rows_plain(rows));
        return;
    }
    let outputs = values.par_chunks_exact_mut(width).with_min_len(TILE_TOKENS);
    outputs.enumerate().for_each(|(token, out)| match isa {
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { dequantize_avx512(rows, token, out) },
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { dequantize_avx2(rows, token, out) },
        _ => dequantize(rows, token, out),
    });
}

/// A channel order ready to gather with: checked once, so that the gather need not.
struct Slots {
    /// The channel of each slot, 0 for padding; each below `channels`.
    sources: Vec<u32>,
    /// The slots of padding.
    padding: Vec<usize>,
    /// Channels of the rows to gather from.
    channels: usize,
}

impl Slots {
    fn new(format: &SiteFormat) -> Self {
        let channels = format.channels;
        assert_eq!(format.width(), format.row.width());
        assert!(channels > 0 || format.width() == 0, "a site without channels");
        let source = |&channel: &i32| {
            let source = if channel == PADDING { 0 } else { channel as u32 };
            assert!((source as usize) < channels, "a channel order beyond the channels");
            source
        };
        let padding = (0..format.width()).filter(|&slot| format.order[slot] == PADDING);
        Self {
            sources: format.order.iter().map(source).collect(),
            padding: padding.collect(),
            channels,
        }
    }
}

/// Some tokens: their activations and where the codes go.
struct Tile<'a> {
    x: &'a [f32],
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    outlier_codes: &'a mut [i8],
    outlier_scales: &'a mut [f32],
    outlier_values: &'a mut [f32],
}

impl<'a> Tile<'a> {
    /// Takes the first `tokens` of the `all` tokens in this tile.
    fn split_off(&mut self, tokens: usize, all: usize) -> Self {
        fn take<'a, T>(slice: &mut &'a mut [T], tokens: usize, all: usize) -> &'a mut [T] {
            let length = slice.len() / all * tokens;
            let (taken, rest) = std::mem::take(slice).split_at_mut(length);
            *slice = rest;
            taken
        }
        let (x, rest) = self.x.split_at(self.x.len() / all * tokens);
        self.x = rest;
        Self {
            x,
            codes: take(&mut self.codes, tokens, all),
            scales: take(&mut self.scales, tokens, all),
            outlier_codes: take(&mut self.outlier_codes, tokens, all),
            outlier_scales: take(&mut self.outlier_scales, tokens, all),
            outlier_values: take(&mut self.outlier_values, tokens, all),
        }
    }
}

/// Quantizes a tile; false if a value or a scale is not finite.
#[inline(always)]
fn quantize_tile(tile: Tile<'_>, format: &SiteFormat, slots: &Slots) -> bool {
    let RowFormat { numbers, groups, outlier_channels: outliers, outlier_format } = format.row;
    let grouped = format.row.grouped_channels();
    let limits = numbers.limits();
    let mut permuted = vec![0.0; format.width()];
    let mut halves = vec![f16::ZERO; outliers];
    for (token, row) in tile.x.chunks_exact(format.channels.max(1)).enumerate() {
        permute(row, format, slots, &mut permuted);
        let (values, tail) = permuted.split_at(grouped);
        let codes = tile.codes[token * grouped..][..grouped].chunks_exact_mut(numbers.group_size);
        let values = values.chunks_exact(numbers.group_size);
        let scales = &mut tile.scales[token * groups..][..groups];
        for ((values, codes), scale) in values.zip(codes).zip(scales) {
            *scale = format.scale(Peak::of(values));
            if !scale.is_finite() {
                return false;
            }
            encode(numbers.codebook, values, inverse(*scale), limits, codes);
        }
        if let Some(scale) = tile.outlier_scales.get_mut(token) {
            *scale = scale_of(absmax(tail), 1.0, GREATEST_INT8);
            if !scale.is_finite() {
                return false;
            }
            let codes = &mut tile.outlier_codes[token * outliers..][..outliers];
            encode(Codebook::Int, tail, inverse(*scale), (-GREATEST_INT8, GREATEST_INT8), codes);
        } else if !tile.outlier_values.is_empty() {
            let values = &mut tile.outlier_values[token * outliers..][..outliers];
            if outlier_format == OutlierFormat::Fp8 {
                let scale = scale_of(absmax(tail), 1.0, E4M3.highest);
                if !scale.is_finite() {
                    return false;
                }
                let inverse = inverse(scale);
                for (to, &value) in values.iter_mut().zip(tail) {
                    *to = fp8_of(value, inverse, scale);
                }
                continue;
            }
            halves.convert_from_f32_slice(tail);
            halves.convert_to_f32_slice(values);
            if !absmax(values).is_finite() {
                return false;
            }
        }
    }
    true
}

/// Rounds and clamps: [`site::code_of`] of finite values.
#[inline(always)]
fn encode(
    codebook: Codebook,
    values: &[f32],
    inverse: f32,
    (least, greatest): (f32, f32),
    codes: &mut [i8],
) {
    if !codebook.is_int() {
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = code_of(codebook, value, inverse, (least, greatest));
        }
        return;
    }
    for (code, value) in codes.iter_mut().zip(values) {
        let value = value * inverse;
        // Clamping first results in the same code, as the limits are integers. These comparisons are
        // one instruction each.
        let value = if value > least { value } else { least };
        let value = if value < greatest { value } else { greatest };
        *code = (value + ROUNDER).to_bits() as i8;
    }
}

/// [`SiteFormat::permute`].
#[inline(always)]
fn permute(row: &[f32], format: &SiteFormat, slots: &Slots, out: &mut [f32]) {
    assert_eq!((row.len(), out.len()), (slots.channels, slots.sources.len()));
    gather(row, slots, out);
    for &slot in &slots.padding {
        out[slot] = 0.0;
    }
    if format.transform == Transform::Hadamard {
        let grouped = &mut out[..format.row.grouped_channels()];
        grouped.chunks_exact_mut(format.row.numbers.group_size).for_each(|group| {
            match group.len() {
                // With the length known, the compiler unrolls the usual groups.
                64 => hadamard::transform(&mut group[..64]),
                128 => hadamard::transform(&mut group[..128]),
                _ => hadamard::transform(group),
            }
        });
    }
}

/// Fills `out` with the sources' values, one load each. Compiled apart, for the plainest instruction
/// set: the gather instructions of the wider ones are several times slower than these loads, on
/// Zen 4 by design and on Intel since the microcode that closes its gather leak.
#[inline(never)]
fn gather(row: &[f32], slots: &Slots, out: &mut [f32]) {
    assert_eq!((row.len(), out.len()), (slots.channels, slots.sources.len()));
    for (value, &source) in out.iter_mut().zip(&slots.sources) {
        // SAFETY: `Slots::new` checked every source against `channels`, the length of `row`.
        *value = unsafe { *row.get_unchecked(source as usize) };
    }
}

/// One token of [`dequantize_rows`].
#[inline(always)]
fn dequantize(rows: &QuantizedRows, token: usize, out: &mut [f32]) {
    let RowFormat { numbers, groups, outlier_channels: outliers, .. } = rows.format;
    let size = numbers.group_size;
    let (grouped, tail) = out.split_at_mut(groups * size);
    for (group, out) in grouped.chunks_exact_mut(size).enumerate() {
        let at = token * groups + group;
        decode(numbers.codebook, &rows.codes[at * size..][..size], rows.scales[at], out);
    }
    let own = token * outliers..(token + 1) * outliers;
    match &rows.outliers {
        OutlierRows::None => {}
        OutlierRows::Int8 { codes, scales } => {
            decode(Codebook::Int, &codes[own], scales[token], tail);
        }
        OutlierRows::Fp8(values) | OutlierRows::F16(values) => tail.copy_from_slice(&values[own]),
    }
}

#[inline(always)]
fn decode(codebook: Codebook, codes: &[i8], scale: f32, out: &mut [f32]) {
    for (value, &code) in out.iter_mut().zip(codes) {
        *value = codebook.value(code) * scale;
    }
}

/// Compiles a function for AVX2 and for AVX-512.
macro_rules! for_instruction_sets {
    ($($name:ident, $avx2:ident, $avx512:ident ($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {$(
        /// # Safety
        /// The processor has AVX2, FMA and F16C.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $avx2($($argument: $kind),*) $(-> $result)? {
            $name($($argument),*)
        }

        /// # Safety
        /// The processor has AVX-512 F, BW, VL and DQ, FMA and F16C.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
        unsafe fn $avx512($($argument: $kind),*) $(-> $result)? {
            $name($($argument),*)
        }
    )*};
}

for_instruction_sets! {
    quantize_tile, quantize_tile_avx2, quantize_tile_avx512
        (tile: Tile<'_>, format: &SiteFormat, slots: &Slots) -> bool;
    permute, permute_avx2, permute_avx512
        (row: &[f32], format: &SiteFormat, slots: &Slots, out: &mut [f32]);
    dequantize, dequantize_avx2, dequantize_avx512
        (rows: &QuantizedRows, token: usize, out: &mut [f32]);
}

#[cfg(test)]
mod tests;
