/*! A quantized linear as the integer kernels read it: panels of 32 rows, 4 channels side by side.

One `vpdpbusd` multiplies 4 neighbouring channels of 16 rows with 4 codes of one token, so a
*chunk* is `[32 rows, 4 channels]`, 128 bytes: two AVX-512 registers, four of AVX2. The
instruction wants one unsigned operand. That is the weight here, stored with an offset (`code + 8`
or `code + 128`); what the offset adds to a sum is `offset * sum of the token's codes`, which a
kernel subtracts before it starts, for free.

Codes of up to 4 bits stay packed in memory: byte `i` of a chunk's 64 holds byte `i` of the
unpacked chunk in its low half and byte `64 + i` in its high half, so that unpacking is a mask
and a shift and no value crosses a lane. */

use bytemuck::{Pod, Zeroable};
use half::f16;
use rayon::prelude::*;

use crate::quant::codebook::Codebook;
use crate::quant::float::e4m3_value;
use crate::quant::linear::{OutlierBlock, QuantizedLinear};
use crate::quant::number::{LinearFormat, RowFormat};

/// Output rows in a panel.
pub(super) const PANEL: usize = 32;

/// Channels in a chunk.
pub(super) const CHUNK: usize = 4;

/// Channels that a kernel takes in one step: every group is a multiple of it, and outlier blocks
/// are filled up with zeros.
pub(super) const STEP: usize = 16;

/// What is added to a weight code of up to 4 bits to make it unsigned.
pub(super) const NIBBLE_OFFSET: i32 = 8;

/// What is added to a weight code of 8 bits to make it unsigned.
pub(super) const BYTE_OFFSET: i32 = 128;

/// A cache line: keeps every register-wide load of weights within one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// Lines in an unpacked chunk.
pub(super) const CHUNK_LINES: usize = PANEL * CHUNK / 64;

/// The run-time form of a [`QuantizedLinear`].
pub struct IntegerLinear {
    pub(super) rows: usize,
    pub(super) format: LinearFormat,
    /// Whether [`Self::codes`] holds packed nibbles.
    pub(super) nibbles: bool,
    /// Unsigned codes `[panels, chunks, 1 or 2 lines]`, the chunks of all groups in order.
    pub(super) codes: Vec<Line>,
    /// `[panels, groups, 32]`, zero for the rows that fill the last panel.
    pub(super) scales: Vec<f16>,
    pub(super) outliers: Outliers,
    /// The linear itself where the kernels cannot compute it: bitsandbytes' FP4, whose sixteenths do
    /// not fit bytes. The rest is then empty.
    pub(super) plain: Option<Box<QuantizedLinear>>,
}

/// The outlier block in panels.
pub(super) enum Outliers {
    None,
    /// Unsigned codes `[panels, chunks, 2 lines]` and scales `[panels, 32]`.
    Int8 {
        codes: Vec<Line>,
        scales: Vec<f16>,
    },
    /// Numbers of E4M3, `[panels, outliers, 32]`, and scales `[panels, 32]`.
    Fp8 {
        numbers: Vec<f16>,
        scales: Vec<f16>,
    },
    /// `[panels, outliers, 32]`.
    F16(Vec<f16>),
}

impl IntegerLinear {
    /// Re-lays a linear for the kernels.
    pub fn new(linear: &QuantizedLinear) -> Self {
        let format = linear.format;
        let RowFormat { numbers, groups, outlier_channels, .. } = format.row;
        if numbers.codebook == Codebook::Fp4Bnb {
            return Self {
                rows: linear.rows,
                format,
                nibbles: false,
                codes: Vec::new(),
                scales: Vec::new(),
                outliers: Outliers::None,
                plain: Some(Box::new(linear.clone())),
            };
        }
        let panels = linear.rows.div_ceil(PANEL);
        // FP4's codes are up to 12.
        let nibbles = numbers.bits <= 4 && numbers.codebook.is_int();
        let chunks = format.row.grouped_channels() / CHUNK;
        let mut codes =
            vec![Line([0; 64]); panels * chunks * if nibbles { 1 } else { CHUNK_LINES }];
        if !codes.is_empty() {
            let lines = codes.len() / panels;
            codes.par_chunks_mut(lines).enumerate().for_each(|(panel, lines)| {
                if nibbles {
                    let mut unpacked = vec![Line([0; 64]); chunks * CHUNK_LINES];
                    fill(&mut unpacked, &linear.codes, linear, panel, NIBBLE_OFFSET);
                    for (line, [low, high]) in lines.iter_mut().zip(unpacked.as_chunks().0) {
                        line.0 = std::array::from_fn(|i| low.0[i] | high.0[i] << 4);
                    }
                } else {
                    fill(lines, &linear.codes, linear, panel, BYTE_OFFSET);
                }
            });
        }
        let in_panels =
            |columns: usize, value: &dyn Fn(usize, usize) -> f16| {
                let mut values = Vec::with_capacity(panels * columns * PANEL);
                for panel in 0..panels {
                    for column in 0..columns {
                        values.extend((panel * PANEL..(panel + 1) * PANEL).map(|row| {
                            if row < linear.rows { value(row, column) } else { f16::ZERO }
                        }));
                    }
                }
                values
            };
        let scales = in_panels(groups, &|row, group| {
            linear.scales[row / format.rows_per_scale * groups + group]
        });
        let outliers = match &linear.outliers {
            OutlierBlock::None => Outliers::None,
            OutlierBlock::Int8 { codes, scales } => {
                let lines = outlier_channels.next_multiple_of(STEP) / CHUNK * CHUNK_LINES;
                let mut unpacked = vec![Line([0; 64]); panels * lines];
                for (panel, lines) in unpacked.chunks_mut(lines.max(1)).enumerate() {
                    fill(lines, codes, linear, panel, BYTE_OFFSET);
                }
                Outliers::Int8 { codes: unpacked, scales: in_panels(1, &|row, _| scales[row]) }
            }
            OutlierBlock::Fp8 { codes, scales } => {
                let number = |row: usize, channel: usize| {
                    f16::from_f32(e4m3_value(codes[row * outlier_channels + channel]))
                };
                Outliers::Fp8 {
                    numbers: in_panels(outlier_channels, &number),
                    scales: in_panels(1, &|row, _| scales[row]),
                }
            }
            OutlierBlock::F16(values) => {
                let value = |row, channel| values[row * outlier_channels + channel];
                Outliers::F16(in_panels(outlier_channels, &value))
            }
        };
        Self { rows: linear.rows, format, nibbles, codes, scales, outliers, plain: None }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// What the weights and scales take in memory.
    pub fn memory_bytes(&self) -> usize {
        let outliers = match &self.outliers {
            Outliers::None => 0,
            Outliers::Int8 { codes, scales } => size_of_val(&**codes) + size_of_val(&**scales),
            Outliers::Fp8 { numbers, scales } => size_of_val(&**numbers) + size_of_val(&**scales),
            Outliers::F16(values) => size_of_val(&**values),
        };
        let plain = self.plain.as_ref().map_or(0, |linear| linear.codes.len());
        plain + size_of_val(&*self.codes) + size_of_val(&*self.scales) + outliers
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The stored lines of some groups of a panel: unsigned bytes, or packed nibbles.
    pub(super) fn group_lines(&self, panel: usize, groups: std::ops::Range<usize>) -> &[Line] {
        let RowFormat { numbers, groups: all, .. } = self.format.row;
        let lines = numbers.group_size / CHUNK * if self.nibbles { 1 } else { CHUNK_LINES };
        &self.codes[(panel * all + groups.start) * lines..][..groups.len() * lines]
    }
}

/// Unpacks nibbles to chunks of unsigned bytes, twice as many lines.
#[inline(always)]
pub(super) fn unpack(packed: &[Line], unpacked: &mut [Line]) {
    for ([low, high], packed) in unpacked.as_chunks_mut().0.iter_mut().zip(packed) {
        for i in 0..64 {
            low.0[i] = packed.0[i] & 15;
            high.0[i] = packed.0[i] >> 4;
        }
    }
}

/// Writes the chunks of one panel: `codes` is `[rows, channels]`; missing rows and channels become
/// the offset, which is a code of zero.
fn fill(lines: &mut [Line], codes: &[i8], linear: &QuantizedLinear, panel: usize, offset: i32) {
    let channels = codes.len() / linear.rows.max(1);
    let chunks: &mut [[[u8; CHUNK]; PANEL]] = bytemuck::cast_slice_mut(lines);
    for row in 0..PANEL {
        let own_row = panel * PANEL + row;
        let own =
            if own_row < linear.rows { &codes[own_row * channels..][..channels] } else { &[] };
        for (chunk, chunks) in chunks.iter_mut().enumerate() {
            chunks[row] = std::array::from_fn(|lane| {
                let code = own.get(chunk * CHUNK + lane).copied().unwrap_or(0);
                (i32::from(code) + offset) as u8
            });
        }
    }
}
