/*! Quantized activations times quantized weights, in integers: what an Atom checkpoint computes.

[`plain`] is the specification. The fast kernels compute the same bits because nothing in it is left
open: the dot product of a group is exact, and what follows is one product and one fused
multiply-add a group, in order. They only choose which outputs to compute side by side.

One job is some tokens times some panels of 32 rows. For each panel and each run of groups whose
unpacked codes fit the first-level cache, the codes are unpacked once and multiplied with all
tokens of the job; the sums in f32 stay in the job's scratch between runs. */

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod job;
mod layout;
pub mod plain;
mod portable;
#[cfg(test)]
mod tests;

use half::f16;
use rayon::prelude::*;

pub use layout::IntegerLinear;

use super::isa::Isa;
use crate::quant::codebook::Codebook;
use crate::quant::number::RowFormat;
use crate::quant::rows::{OutlierRows, QuantizedRows};
use job::{Destination, Jobs, OutputMatrix};
use layout::{BYTE_OFFSET, CHUNK, Line, NIBBLE_OFFSET, Outliers, PANEL, STEP};

/// Most tokens in a job: their sums take 24 KB, and unpacking costs 1 % of the products.
const JOB_TOKENS: usize = 192;

/// Jobs a thread should have to choose from, so that all finish together.
const JOBS_PER_THREAD: usize = 4;

/// Bytes of weights that one thread has read before another is awake, for each tile of tokens.
const ALONE_BYTES: usize = 1 << 20;
/// Tokens of a tile of the fastest kernels.
const TILE_TOKENS: usize = 6;

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

/// As [`IntegerBlock`], with nibbles as they are stored, for a few tokens: unpacking them in registers costs less than
/// writing them to memory would.
struct PackedBlock<'a> {
    /// Chunks in a group.
    group_chunks: usize,
    /// `[groups, chunks]`.
    codes: &'a [Line],
    /// `[groups, 32]`.
    scales: &'a [f16],
    /// As [`IntegerBlock`] has them.
    x_codes: &'a [i8],
    codes_stride: usize,
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
    /// INT8 outlier codes with channels of zero up to a full chunk, `[tokens, channels]`.
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
    if x.tokens.div_ceil(TILE_TOKENS) * w.memory_bytes() <= ALONE_BYTES {
        let jobs = Jobs { isa, x, prepared, w, output: OutputMatrix::new(y, w.rows) };
        // SAFETY: one job has all tokens and panels.
        unsafe { jobs.run(0..x.tokens, 0..w.panels()) };
        return;
    }
    let wanted = rayon::current_num_threads() * JOBS_PER_THREAD;
    let tile_tokens = x.tokens.min(JOB_TOKENS);
    let tiles = x.tokens.div_ceil(tile_tokens);
    let job_panels = w.panels().div_ceil(wanted.div_ceil(tiles)).max(1);
    let bands = w.panels().div_ceil(job_panels);
    let jobs = Jobs { isa, x, prepared, w, output: OutputMatrix::new(y, w.rows) };
    (0..tiles * bands).into_par_iter().for_each(|job| {
        // Neighbouring jobs share the tokens, which are then in the cache that cores share.
        let (tile, band) = (job / bands, job % bands);
        let tokens = tile * tile_tokens..((tile + 1) * tile_tokens).min(x.tokens);
        let panels = band * job_panels..((band + 1) * job_panels).min(w.panels());
        // SAFETY: no two jobs share both tokens and panels.
        unsafe { jobs.run(tokens, panels) };
    });
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
        // SAFETY: the token is proof that the processor has the set; the lengths are checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::integer(block, acc, out) },
        _ => portable::integer(block, acc, out),
    }
}

/// Whether nibbles of so many tokens are unpacked in registers.
fn unpacks_in_registers(isa: Isa, tokens: usize) -> bool {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => tokens <= avx512::TILE,
        _ => false,
    }
}

/// As [`integer`], where [`unpacks_in_registers`].
fn packed(isa: Isa, block: &PackedBlock<'_>, acc: &mut [[f32; PANEL]], out: Option<&Destination>) {
    let groups = block.scales.len() / PANEL;
    let last = acc.len() - 1;
    assert_eq!(block.codes.len(), groups * block.group_chunks);
    let group_channels = block.group_chunks * CHUNK;
    assert!(group_channels.is_multiple_of(STEP));
    assert!(block.x_codes.len() >= last * block.codes_stride + groups * group_channels);
    assert!(block.x_scales.len() >= last * block.groups_stride + groups);
    assert!(block.starts.len() >= last * block.groups_stride + groups);
    match isa {
        // SAFETY: the token is proof that the processor has the set; the lengths are checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::packed(block, acc, out) },
        _ => unreachable!("this set unpacks nothing in registers"),
    }
}

/// As [`integer`].
fn float(isa: Isa, block: &FloatBlock<'_>, acc: &mut [[f32; PANEL]], out: Option<&Destination>) {
    assert_eq!(block.x.len(), acc.len() * block.weights.len());
    match isa {
        // SAFETY: the token is proof that the processor has the set; the length is checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => unsafe { avx512::float(block, acc, out) },
        // SAFETY: the token is proof that the processor has the set; the length is checked above.
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
        // SAFETY: the token is proof that the processor has the set.
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
        // SAFETY: the token is proof that the processor has the set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { avx2::starts(codes, size, offset, starts) },
        _ => portable::starts(codes, size, offset, starts),
    }
}
