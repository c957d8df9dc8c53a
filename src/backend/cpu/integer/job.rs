//! One job of the integer product: some tokens times some panels of 32 rows.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::layout::{CHUNK, CHUNK_LINES, IntegerLinear, Line, Outliers, PANEL};
use super::{
    FloatBlock, IntegerBlock, Isa, PackedBlock, Prepared, float, integer, packed, unpack,
    unpacks_in_registers,
};
use crate::quant::rows::{OutlierRows, QuantizedRows};

/// Channels whose unpacked codes are multiplied with all tokens of a job before the next ones are
/// unpacked: 16 KB for a panel, a third of the first-level cache.
const RUN_CHANNELS: usize = 512;

/// The output matrix, which jobs write in disjoint rectangles.
pub(super) struct OutputMatrix {
    start: *mut f32,
    rows: usize,
}

// SAFETY: a job writes only its own tokens and panels, and no two jobs share both.
unsafe impl Sync for OutputMatrix {}

impl OutputMatrix {
    /// `y` `[tokens, rows]`.
    pub(super) fn new(y: &mut [f32], rows: usize) -> Self {
        Self { start: y.as_mut_ptr(), rows }
    }
}

/// Where the sums of one job's panel belong. The output lies outside the cache, so the kernels
/// store each tile when it is done: its few lines are in flight while the next tile computes.
pub(super) struct Destination {
    /// The first token's first row of the panel.
    pub(super) first: *mut f32,
    /// Distance between tokens.
    pub(super) stride: usize,
    /// Rows of the panel that exist.
    width: usize,
    /// Tokens of the job.
    tokens: usize,
}

impl Destination {
    /// Where `panel` of `tokens` lies.
    ///
    /// # Safety
    /// They lie within the output, and no other thread writes there while the result is used.
    unsafe fn new(output: &OutputMatrix, panel: usize, tokens: &Range<usize>) -> Self {
        Self {
            // SAFETY: by this function's contract the tokens and the panel are inside the output.
            first: unsafe { output.start.add(tokens.start * output.rows + panel * PANEL) },
            stride: output.rows,
            width: (output.rows - panel * PANEL).min(PANEL),
            tokens: tokens.len(),
        }
    }

    /// Stores the sums of some tokens, from the job's token `token` on.
    #[inline(always)]
    pub(super) fn store(&self, token: usize, acc: &[[f32; PANEL]]) {
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

/// What all jobs read, and where they write.
pub(super) struct Jobs<'a> {
    pub(super) isa: Isa,
    pub(super) x: &'a QuantizedRows,
    pub(super) prepared: Prepared,
    pub(super) w: &'a IntegerLinear,
    pub(super) output: OutputMatrix,
}

/// The memory of a job.
struct Scratch {
    /// Codes of a run, a byte each.
    codes: Vec<Line>,
    /// Scales of a run `[groups][32]`, or outliers' weights.
    scales: Vec<Line>,
}

impl Jobs<'_> {
    /// One job: all of `panels` for `tokens`.
    ///
    /// # Safety
    /// They lie within the operands, and no other thread may use this part of the output.
    pub(super) unsafe fn run(&self, tokens: Range<usize>, panels: Range<usize>) {
        let format = self.w.format.row;
        let run_groups = self.run_groups();
        let in_registers = unpacks_in_registers(self.isa, tokens.len());
        let unpacked_lines = run_groups * format.numbers.group_size / CHUNK * CHUNK_LINES;
        let mut scratch = Scratch {
            codes: vec![
                Line([0; 64]);
                if self.w.nibbles && !in_registers { unpacked_lines } else { 0 }
            ],
            scales: aligned_rows(run_groups.max(format.outlier_channels)),
        };
        let mut acc = aligned_rows(tokens.len());
        let acc: &mut [[f32; PANEL]] = bytemuck::cast_slice_mut(&mut acc);
        for panel in panels {
            acc.fill([0.0; PANEL]);
            // SAFETY: by this function's contract no other job has these panels and tokens, which are the output's.
            let out = unsafe { Destination::new(&self.output, panel, &tokens) };
            if format.groups == 0 && format.outlier_channels == 0 {
                out.store(0, acc);
            }
            self.add_groups(&tokens, panel, &mut scratch, acc, &out);
            if format.outlier_channels > 0 {
                self.add_outliers(&tokens, panel, &mut scratch, acc, &out);
            }
        }
    }

    /// Groups of a run.
    fn run_groups(&self) -> usize {
        let format = self.w.format.row;
        (RUN_CHANNELS / format.numbers.group_size).clamp(1, format.groups.max(1))
    }

    /// Adds all groups to the sums, and stores these where there are no outliers.
    fn add_groups(
        &self,
        tokens: &Range<usize>,
        panel: usize,
        scratch: &mut Scratch,
        acc: &mut [[f32; PANEL]],
        out: &Destination,
    ) {
        let Self { x, prepared, w, .. } = self;
        let format = w.format.row;
        let (all_groups, group_size) = (format.groups, format.numbers.group_size);
        let (run_groups, grouped) = (self.run_groups(), format.grouped_channels());
        if w.nibbles && unpacks_in_registers(self.isa, tokens.len()) && all_groups > 0 {
            let first = panel * all_groups * PANEL;
            let scale = tokens.start * all_groups;
            let block = PackedBlock {
                group_chunks: group_size / CHUNK,
                codes: w.group_lines(panel, 0..all_groups),
                scales: &w.scales[first..first + all_groups * PANEL],
                x_codes: &x.codes[tokens.start * grouped..],
                codes_stride: grouped,
                x_scales: &x.scales[scale..],
                starts: &prepared.starts[scale..],
                groups_stride: all_groups,
            };
            let last = format.outlier_channels == 0;
            packed(self.isa, &block, acc, last.then_some(out));
            return;
        }
        let all_scales: &mut [[f32; PANEL]] = bytemuck::cast_slice_mut(&mut scratch.scales);
        let mut group = 0;
        while group < all_groups {
            let groups = group..(group + run_groups).min(all_groups);
            let first = panel * all_groups + group;
            let scales = &mut all_scales[..groups.len()];
            w.scales[first * PANEL..][..groups.len() * PANEL]
                .convert_to_f32_slice(scales.as_flattened_mut());
            let mut codes = w.group_lines(panel, groups.clone());
            if w.nibbles {
                let unpacked = &mut scratch.codes[..codes.len() * CHUNK_LINES];
                unpack(self.isa, codes, unpacked);
                codes = unpacked;
            }
            let scale = tokens.start * all_groups + group;
            let block = IntegerBlock {
                nibbles: w.nibbles,
                group_chunks: group_size / CHUNK,
                codes: bytemuck::cast_slice(codes),
                scales,
                x_codes: &x.codes[tokens.start * grouped + group * group_size..],
                codes_stride: grouped,
                x_scales: &x.scales[scale..],
                starts: &prepared.starts[scale..],
                groups_stride: all_groups,
            };
            let last = groups.end == all_groups && format.outlier_channels == 0;
            integer(self.isa, &block, acc, last.then_some(out));
            group = groups.end;
        }
    }

    /// Adds the outliers, of which there are some, and stores the sums.
    fn add_outliers(
        &self,
        tokens: &Range<usize>,
        panel: usize,
        scratch: &mut Scratch,
        acc: &mut [[f32; PANEL]],
        out: &Destination,
    ) {
        let Self { isa, x, prepared, w, .. } = self;
        let channels = w.format.row.outlier_channels;
        let scales: &mut [[f32; PANEL]] = bytemuck::cast_slice_mut(&mut scratch.scales);
        match (&x.outliers, &w.outliers) {
            (
                OutlierRows::Int8 { scales: x_scales, .. },
                Outliers::Int8 { codes, scales: w_scales },
            ) => {
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
                integer(*isa, &block, acc, Some(out));
            }
            (OutlierRows::Fp8(values), Outliers::Fp8 { numbers, scales: w_scales }) => {
                let weights = unpacked_outliers(numbers, panel, &mut scales[..channels]);
                let mut row_scales = [0.0; PANEL];
                w_scales[panel * PANEL..][..PANEL].convert_to_f32_slice(&mut row_scales);
                for (weight, scale) in
                    weights.iter_mut().flat_map(|w| w.iter_mut().zip(&row_scales))
                {
                    *weight *= scale;
                }
                let x = &values[tokens.start * channels..tokens.end * channels];
                float(*isa, &FloatBlock { weights, x }, acc, Some(out));
            }
            (OutlierRows::F16(values), Outliers::F16(weights)) => {
                let weights = unpacked_outliers(weights, panel, &mut scales[..channels]);
                let x = &values[tokens.start * channels..tokens.end * channels];
                float(*isa, &FloatBlock { weights, x }, acc, Some(out));
            }
            _ => {}
        }
    }
}

/// The outliers' weights of a panel in f32, `[channels][32]`.
fn unpacked_outliers<'a>(
    weights: &[f16],
    panel: usize,
    to: &'a mut [[f32; PANEL]],
) -> &'a mut [[f32; PANEL]] {
    let values = to.len() * PANEL;
    weights[panel * values..][..values].convert_to_f32_slice(to.as_flattened_mut());
    to
}

/// Room for `count` rows of 32 values that start on a cache line each.
fn aligned_rows(count: usize) -> Vec<Line> {
    vec![Line([0; 64]); count * size_of::<[f32; PANEL]>() / size_of::<Line>()]
}
