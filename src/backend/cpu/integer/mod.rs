/*! Quantized activations times quantized weights, in integers: what an Atom checkpoint computes.

[`plain`] is the specification. The fast kernels give the same bits because nothing in it is left
open: the dot product of a group is exact, and what follows is one product and one fused
multiply-add a group, in order. They only choose which outputs to compute side by side.

One job is some tokens times some panels of 32 rows. For each panel and each run of groups whose
unpacked codes fit the first-level cache, the codes are unpacked once and multiplied with all
tokens of the job; the sums in f32 wait in the job's scratch between runs. */

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod layout;
pub mod plain;
mod portable;
#[cfg(test)]
mod tests;

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

pub use layout::IntegerLinear;

use super::isa::Isa;
use crate::quant::codebook::Codebook;
use crate::quant::number::RowFormat;
use crate::quant::rows::{OutlierRows, QuantizedRows};
use layout::{BYTE_OFFSET, CHUNK, CHUNK_LINES, Line, NIBBLE_OFFSET, Outliers, PANEL, STEP};

/// Channels whose unpacked codes are multiplied with all tokens of a job before the next ones are
/// unpacked: 16 KB for a panel, a third of the first-level cache.
const RUN_CHANNELS: usize = 512;

/// Most tokens in a job: their sums take 24 KB, and unpacking costs 1 % of the products.
const JOB_TOKENS: usize = 192;

/// Jobs a thread should have to choose from, so that all finish together.
const JOBS_PER_THREAD: usize = 4;

/// Some groups of one panel, and the activations of some tokens that they are multiplied with:
/// `acc[t][r] = fma(x_scales[t, g] * scales[g][r], starts[t, g] + dot(t, g, r), acc[t][r])` for
/// each group `g`, ascending, where `dot` takes the weights as unsigned.
struct IntegerBlock<'a> {
    /// Whether all weights are at most 15, which lets 16-bit sums be exact.
    nibbles: bool,
    /// Chunks in a group.
    group_chunks: usize,
    /// Unsigned weights `[groups, chunks, 32, 4]`.
    codes: &'a [u8],
    /// Weight scales `[groups][32]`.
    scales: &'a [[f32; PANEL]],
    /// Codes of the first token from the first group on, and the distance between tokens.
    x_codes: &'a [i8],
    codes_stride: usize,
    /// Scales and starting values of the first token from the first group on, and the distance
    /// between tokens.
    x_scales: &'a [f32],
    starts: &'a [i32],
    groups_stride: usize,
}

/// The FP8 or f16 outliers of one panel: `acc[t][r] = fma(x[t, c], weights[c][r], acc[t][r])` for each
/// channel `c`, ascending.
struct FloatBlock<'a> {
    weights: &'a [[f32; PANEL]],
    /// `[tokens, channels]`.
    x: &'a [f32],
}

/// What the kernels need of the activations beyond [`QuantizedRows`].
struct Prepared {
    /// `-offset * sum of codes`, `[tokens, groups]`: takes back what the weights' offset adds.
    starts: Vec<i32>,
    /// INT8 outlier codes with channels of zero up to a whole chunk, `[tokens, channels]`.
    outlier_codes: Vec<i8>,
    /// Channels in [`Self::outlier_codes`].
    outlier_stride: usize,
    /// As `starts`, `[tokens]`.
    outlier_starts: Vec<i32>,
}

/// `y = x * w^T`, with `y` `[tokens, rows]`, all of which is written: the bits of [`plain::linear`].
/// [`Isa::Plain`] runs the portable kernels, since `w` is already in panels. bitsandbytes' FP4 is
/// computed by [`plain::linear`] itself.
///
/// # Panics
/// If `x` and `w` have different groups, or outliers of different number or kind.
pub fn linear(isa: Isa, x: &QuantizedRows, w: &IntegerLinear, y: &mut [f32]) {
    let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
    let own = &w.format.row;
    let sizes = (own.numbers.group_size, own.groups);
    assert_eq!((numbers.group_size, groups), sizes, "groups of x and w");
    assert_eq!(outlier_channels, own.outlier_channels, "outliers of x and w");
    let grouped = x.format.grouped_channels();
    let of_tokens = |width| x.tokens.checked_mul(width);
    assert_eq!(Some(y.len()), of_tokens(w.rows), "length of y");
    assert_eq!(Some(x.codes.len()), of_tokens(grouped), "length of the codes of x");
    assert_eq!(Some(x.scales.len()), of_tokens(groups), "length of the scales of x");
    if let Some(w) = &w.plain {
        plain::linear(x, w, y);
        return;
    }
    assert!(numbers.codebook != Codebook::Fp4Bnb, "weights of other numbers than the activations'");
    let kinds_agree = match (&x.outliers, &w.outliers) {
        (OutlierRows::None, Outliers::None) => true,
        (OutlierRows::Int8 { codes, scales }, Outliers::Int8 { .. }) => {
            Some(codes.len()) == of_tokens(outlier_channels) && scales.len() == x.tokens
        }
        (OutlierRows::Fp8(values), Outliers::Fp8 { .. })
        | (OutlierRows::F16(values), Outliers::F16(_)) => {
            Some(values.len()) == of_tokens(outlier_channels)
        }
        _ => false,
    };
    assert!(kinds_agree, "the outliers of x and w are of different kinds or lengths");
    if y.is_empty() {
        return;
    }
    let prepared = prepare(isa, x, w);
    let wanted = rayon::current_num_threads() * JOBS_PER_THREAD;
    let tile_tokens = x.tokens.min(JOB_TOKENS);
    let tiles = x.tokens.div_ceil(tile_tokens);
    let job_panels = w.panels().div_ceil(wanted.div_ceil(tiles)).max(1);
    let bands = w.panels().div_ceil(job_panels);
    let output = Output { start: y.as_mut_ptr(), rows: w.rows };
    (0..tiles * bands).into_par_iter().for_each(|job| {
        // Neighbouring jobs share the tokens, which are then in the cache that cores share.
        let (tile, band) = (job / bands, job % bands);
        let tokens = tile * tile_tokens..((tile + 1) * tile_tokens).min(x.tokens);
        let panels = band * job_panels..((band + 1) * job_panels).min(w.panels());
        run(isa, x, &prepared, w, tokens, panels, &output);
    });
}

/// The output matrix, which jobs write in disjoint rectangles.
struct Output {
    start: *mut f32,
    rows: usize,
}

// SAFETY: a job writes only its own tokens and panels, and no two jobs share both.
unsafe impl Sync for Output {}

/// Where the sums of one job's panel belong. The output lies outside the cache, so the kernels
/// store each tile when it is done: its few lines travel while the next tile computes.
struct Destination {
    /// The first token's first row of the panel.
    first: *mut f32,
    /// Distance between tokens.
    stride: usize,
    /// Rows of the panel that exist.
    width: usize,
    /// Tokens of the job.
    tokens: usize,
}

impl Destination {
    /// The place of `panel` for `tokens`.
    ///
    /// # Safety
    /// They lie within the output, and no other thread writes there while the result is used.
    unsafe fn new(output: &Output, panel: usize, tokens: &std::ops::Range<usize>) -> Self {
        Self {
            // SAFETY: the caller's promise.
            first: unsafe { output.start.add(tokens.start * output.rows + panel * PANEL) },
            stride: output.rows,
            width: (output.rows - panel * PANEL).min(PANEL),
            tokens: tokens.len(),
        }
    }

    /// Stores the sums of some tokens, from the job's token `token` on.
    #[inline(always)]
    fn store(&self, token: usize, acc: &[[f32; PANEL]]) {
        assert!(token + acc.len() <= self.tokens);
        for (token, acc) in (token..).zip(acc) {
            // SAFETY: the token and `width` rows belong to this job, as `new` was promised.
            unsafe {
                let out = self.first.add(token * self.stride);
                if self.width == PANEL {
                    out.cast::<[f32; PANEL]>().write(*acc);
                } else {
                    out.copy_from_nonoverlapping(acc.as_ptr(), self.width);
                }
            }
        }
    }
}

/// One job: all of `panels` for `tokens`.
fn run(
    isa: Isa,
    x: &QuantizedRows,
    prepared: &Prepared,
    w: &IntegerLinear,
    tokens: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
    output: &Output,
) {
    let RowFormat { numbers, groups: all_groups, outlier_channels, .. } = w.format.row;
    let group_size = numbers.group_size;
    let run_groups = (RUN_CHANNELS / group_size).clamp(1, all_groups.max(1));
    let unpacked_lines = run_groups * group_size / CHUNK * CHUNK_LINES;
    let mut unpacked = vec![Line([0; 64]); if w.nibbles { unpacked_lines } else { 0 }];
    let mut scales = aligned_rows(run_groups.max(outlier_channels));
    let scales: &mut [[f32; PANEL]] = bytemuck::cast_slice_mut(&mut scales);
    let mut acc = aligned_rows(tokens.len());
    let acc: &mut [[f32; PANEL]] = bytemuck::cast_slice_mut(&mut acc);
    let grouped = w.format.row.grouped_channels();
    for panel in panels {
        acc.fill([0.0; PANEL]);
        // SAFETY: panel and tokens belong to this job alone.
        let out = unsafe { Destination::new(output, panel, &tokens) };
        if all_groups == 0 && outlier_channels == 0 {
            out.store(0, acc);
        }
        let mut group = 0;
        while group < all_groups {
            let groups = group..(group + run_groups).min(all_groups);
            let first = panel * all_groups + group;
            let scales = &mut scales[..groups.len()];
            w.scales[first * PANEL..][..groups.len() * PANEL]
                .convert_to_f32_slice(scales.as_flattened_mut());
            let mut codes = w.group_lines(panel, groups.clone());
            if w.nibbles {
                let unpacked = &mut unpacked[..codes.len() * CHUNK_LINES];
                unpack(isa, codes, unpacked);
                codes = unpacked;
            }
            let place = tokens.start * all_groups + group;
            let block = IntegerBlock {
                nibbles: w.nibbles,
                group_chunks: group_size / CHUNK,
                codes: bytemuck::cast_slice(codes),
                scales,
                x_codes: &x.codes[tokens.start * grouped + group * group_size..],
                codes_stride: grouped,
                x_scales: &x.scales[place..],
                starts: &prepared.starts[place..],
                groups_stride: all_groups,
            };
            let last = groups.end == all_groups && outlier_channels == 0;
            integer(isa, &block, acc, last.then_some(&out));
            group = groups.end;
        }
        match (&x.outliers, &w.outliers) {
            (
                OutlierRows::Int8 { scales: x_scales, .. },
                Outliers::Int8 { codes, scales: w_scales },
            ) if outlier_channels > 0 => {
                let chunks = prepared.outlier_stride / CHUNK;
                let lines = &codes[panel * chunks * CHUNK_LINES..][..chunks * CHUNK_LINES];
                let scales = &mut scales[..1];
                w_scales[panel * PANEL..][..PANEL].convert_to_f32_slice(scales.as_flattened_mut());
                let block = IntegerBlock {
                    nibbles: false,
                    group_chunks: chunks,
                    codes: bytemuck::cast_slice(lines),
                    scales,
                    x_codes: &prepared.outlier_codes[tokens.start * prepared.outlier_stride..],
                    codes_stride: prepared.outlier_stride,
                    x_scales: &x_scales[tokens.start..],
                    starts: &prepared.outlier_starts[tokens.start..],
                    groups_stride: 1,
                };
                integer(isa, &block, acc, Some(&out));
            }
            (OutlierRows::Fp8(values), Outliers::Fp8 { numbers: weights, scales: w_scales })
                if outlier_channels > 0 =>
            {
                let channels = outlier_channels;
                let unpacked = &mut scales[..channels];
                weights[panel * channels * PANEL..][..channels * PANEL]
                    .convert_to_f32_slice(unpacked.as_flattened_mut());
                let mut row_scales = [0.0; PANEL];
                w_scales[panel * PANEL..][..PANEL].convert_to_f32_slice(&mut row_scales);
                for (weight, scale) in
                    unpacked.iter_mut().flat_map(|w| w.iter_mut().zip(&row_scales))
                {
                    *weight *= scale;
                }
                let x = &values[tokens.start * channels..tokens.end * channels];
                float(isa, &FloatBlock { weights: unpacked, x }, acc, Some(&out));
            }
            (OutlierRows::F16(values), Outliers::F16(weights)) if outlier_channels > 0 => {
                let channels = outlier_channels;
                let unpacked = &mut scales[..channels];
                weights[panel * channels * PANEL..][..channels * PANEL]
                    .convert_to_f32_slice(unpacked.as_flattened_mut());
                let x = &values[tokens.start * channels..tokens.end * channels];
                float(isa, &FloatBlock { weights: unpacked, x }, acc, Some(&out));
            }
            _ => {}
        }
    }
}

/// Room for `count` rows of 32 values that start on a cache line each.
fn aligned_rows(count: usize) -> Vec<Line> {
    vec![Line([0; 64]); count * size_of::<[f32; PANEL]>() / size_of::<Line>()]
}

/// Sums the codes of each group and pads the outliers.
fn prepare(isa: Isa, x: &QuantizedRows, w: &IntegerLinear) -> Prepared {
    let offset = if w.nibbles { NIBBLE_OFFSET } else { BYTE_OFFSET };
    let RowFormat { numbers, outlier_channels, .. } = x.format;
    let group_size = numbers.group_size;
    let mut group_sums = vec![0; x.scales.len()];
    /// Groups that a thread sums at a time.
    const GROUPS: usize = 1024;
    group_sums
        .par_chunks_mut(GROUPS)
        .zip(x.codes.par_chunks(GROUPS * group_size))
        .for_each(|(sums, codes)| starts(isa, codes, group_size, offset, sums));
    let (mut outlier_codes, mut outlier_starts) = (Vec::new(), Vec::new());
    let outlier_stride = outlier_channels.next_multiple_of(STEP);
    if let OutlierRows::Int8 { codes, .. } = &x.outliers
        && outlier_channels > 0
    {
        outlier_codes = vec![0; x.tokens * outlier_stride];
        let rows = codes.chunks_exact(outlier_channels);
        for (padded, codes) in outlier_codes.chunks_exact_mut(outlier_stride).zip(rows) {
            padded[..codes.len()].copy_from_slice(codes);
        }
        outlier_starts = vec![0; x.tokens];
        starts(isa, &outlier_codes, outlier_stride, BYTE_OFFSET, &mut outlier_starts);
    }
    Prepared { starts: group_sums, outlier_codes, outlier_stride, outlier_starts }
}

/// `-offset * sum of codes` of each group of `size` codes.
#[inline(always)]
fn group_starts(codes: &[i8], size: usize, offset: i32, starts: &mut [i32]) {
    for (start, codes) in starts.iter_mut().zip(codes.chunks_exact(size)) {
        *start = -offset * codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    }
}

/// Checks the lengths that the kernels rely on and calls the one for `isa`.
fn integer(
    isa: Isa,
    block: &IntegerBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    let groups = block.scales.len();
    let last = acc.len() - 1;
    let group_channels = block.group_chunks * CHUNK;
    assert_eq!(block.codes.len(), groups * group_channels * PANEL);
    assert!(group_channels.is_multiple_of(STEP));
    assert!(block.x_codes.len() >= last * block.codes_stride + groups * group_channels);
    assert!(block.x_scales.len() >= last * block.groups_stride + groups);
    assert!(block.starts.len() >= last * block.groups_stride + groups);
    match isa {
        // SAFETY: the token is proof that the processor has the set; the lengths are checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::integer(block, acc, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::integer(block, acc, out) },
        _ => portable::integer(block, acc, out),
    }
}

/// As [`integer`].
fn float(isa: Isa, block: &FloatBlock<'_>, acc: &mut [[f32; PANEL]], out: Option<&Destination>) {
    assert_eq!(block.x.len(), acc.len() * block.weights.len());
    match isa {
        // SAFETY: as in `integer`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::float(block, acc, out) },
        // SAFETY: as in `integer`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::float(block, acc, out) },
        _ => portable::float(block, acc, out),
    }
}

/// Calls [`layout::unpack`] compiled for `isa`.
fn unpack(isa: Isa, packed: &[Line], unpacked: &mut [Line]) {
    match isa {
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::unpack_lines(packed, unpacked) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::unpack_lines(packed, unpacked) },
        _ => portable::unpack_lines(packed, unpacked),
    }
}

/// Calls [`group_starts`] compiled for `isa`.
fn starts(isa: Isa, codes: &[i8], size: usize, offset: i32, starts: &mut [i32]) {
    match isa {
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::starts(codes, size, offset, starts) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::starts(codes, size, offset, starts) },
        _ => portable::starts(codes, size, offset, starts),
    }
}
