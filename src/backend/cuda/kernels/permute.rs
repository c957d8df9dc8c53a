/*! `permute.cu`: a site's channel order, its transform and its quantization, and the way back from codes to values. */

use super::{Defines, Family, Float, THREADS, declared, defines, flag, grid_name, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};
use crate::quant::codebook::Codebook;
use crate::quant::number::{OutlierFormat, RowFormat};
use crate::quant::scale::ScaleGrid;
use crate::quant::site::{SiteFormat, Transform};

/// Groups that are worked on in registers.
const IN_REGISTERS: [usize; 6] = [32, 64, 128, 256, 512, 1024];
/// Groups of which `quantize` takes two rows a block.
const PAIRED: [usize; 4] = [32, 64, 128, 256];
/// Shared memory that a row may be staged in: eight thread blocks fit an SM next to each other.
const STAGED_BYTES: usize = 24 << 10;
/// Bytes to a multiple of which a staged row is padded.
const ROW_MULTIPLE: usize = 16;
/// Words before the first of a staged pair: the last of them is zero.
const PAIR_HEAD_WORDS: usize = 4;
/// Shared memory that two rows may be staged in: three thread blocks fit an SM of 228 KiB next to
/// each other, one an SM of 100 KiB.
const PAIR_BYTES: usize = 64 << 10;
/// Shared memory of a block where groups are worked on there.
const GROUP_BYTES: usize = 96 << 10;

pub(super) const FAMILY: Family = Family {
    name: "permute",
    source: source!("permute"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| {
        let program = |group, hadamard, element, threads, paired| Program {
            group,
            hadamard,
            element,
            threads,
            paired,
            fp4: false,
            grid: ScaleGrid::F16,
            fp8: false,
        };
        let half = program(128, true, Float::Half, 256, true);
        let odd = program(48, true, Float::Half, 256, false);
        let all = [
            half,
            Program { paired: false, ..half },
            program(128, false, Float::Single, 256, false),
            program(32, false, Float::Half, 256, true),
            program(256, true, Float::Half, 256, true),
            program(64, true, Float::Bf16, 256, false),
            program(64, true, Float::Half, 256, true),
            program(1024, true, Float::Half, 256, false),
            program(48, true, Float::Single, 256, false),
            odd,
            program(176, false, Float::Bf16, 256, false),
            Program { fp4: true, fp8: true, ..half },
            Program { fp4: true, ..odd },
            Program { group: 16, fp4: true, grid: ScaleGrid::E4m3, hadamard: false, ..odd },
            Program { group: 32, fp4: true, grid: ScaleGrid::PowerOfTwo, ..half },
            Program { grid: ScaleGrid::Bf16, ..half },
        ];
        all.map(|program| program.defines()).to_vec()
    },
    kernels: declared![Permute, Quantize, Dequantize, EnergyErrors],
};

/// What the file is compiled for.
#[derive(Clone, Copy, Debug)]
struct Program {
    group: usize,
    hadamard: bool,
    /// Type of the rows; `quantize` takes f16 only.
    element: Float,
    threads: usize,
    /// Whether `quantize` takes two rows a block.
    paired: bool,
    fp4: bool,
    grid: ScaleGrid,
    fp8: bool,
}

impl Program {
    fn defines(&self) -> Defines {
        defines! {
            "GROUP": self.group,
            "TRANSFORM": flag(self.hadamard),
            "IN": self.element.name(),
            "CODES": flag(self.element == Float::Half),
            "THREADS": self.threads,
            "PAIRED": flag(self.paired),
            "FP4": flag(self.fp4),
            "FP8": flag(self.fp8),
            "SCALE_GRID": grid_name(self.grid),
            "IN_REGISTERS": flag(IN_REGISTERS.contains(&self.group)),
            "ROW_MULTIPLE": ROW_MULTIPLE,
            "PAIR_HEAD_WORDS": PAIR_HEAD_WORDS,
        }
    }
}

/// How rows of a site are permuted: the program, and its shared memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Permutation {
    program: Program,
    shared_bytes: usize,
    /// Whether a row is staged in shared memory.
    pub(in crate::backend::cuda) staged: bool,
    /// Shared memory of a pair of rows, where `quantize` takes two a block.
    pair_bytes: Option<usize>,
}

impl Permutation {
    /// For rows of a site whose values are of type `element`.
    pub(in crate::backend::cuda) fn new(format: &SiteFormat, element: Float) -> Self {
        let group_size = format.row.numbers.group_size;
        let row_bytes = format.channels * element.bytes();
        let (threads, group_bytes) = if IN_REGISTERS.contains(&group_size) {
            (THREADS, 0)
        } else {
            // As many warps as there is room for their groups.
            let warps = (GROUP_BYTES / (4 * group_size)).clamp(1, THREADS / 32);
            (32 * warps, 4 * group_size * warps)
        };
        let staged = row_bytes <= STAGED_BYTES;
        let row_bytes = if staged { row_bytes.next_multiple_of(ROW_MULTIPLE) } else { 0 };
        // A word a channel.
        let pair_bytes = 4 * (format.channels.next_multiple_of(4) + PAIR_HEAD_WORDS);
        let paired =
            element == Float::Half && PAIRED.contains(&group_size) && pair_bytes <= PAIR_BYTES;
        let program = Program {
            group: group_size,
            hadamard: format.transform == Transform::Hadamard,
            element,
            threads,
            paired,
            fp4: false,
            grid: ScaleGrid::F16,
            fp8: false,
        };
        Self {
            program,
            shared_bytes: row_bytes + group_bytes,
            staged,
            pair_bytes: paired.then_some(pair_bytes),
        }
    }

    /// The same for the codes, scales and outliers of `row`.
    pub(in crate::backend::cuda) fn with_format(self, row: &RowFormat) -> Self {
        let fp4 = row.numbers.codebook == Codebook::Fp4;
        let fp8 = row.outlier_format == OutlierFormat::Fp8;
        let grid = row.numbers.scale.grid;
        Self { program: Program { fp4, fp8, grid, ..self.program }, ..self }
    }

    /// The argument `staged` of `quantize`: where it takes two rows a block, how many there are.
    pub(in crate::backend::cuda) fn staged_of(&self, rows: usize) -> usize {
        if self.pair_bytes.is_some() { rows } else { usize::from(self.staged) }
    }

    fn geometry(&self, rows: usize) -> Geometry {
        Geometry { shared_bytes: self.shared_bytes, ..Geometry::line(rows, self.program.threads) }
    }
}

kernel! {
    /// Rows in the site's order, transformed, as f16 or f32.
    Permute<'a> = ["permute_to_half", "permute_to_float"] {
        x: In<'a, Any>[rows * channels * permutation.program.element.bytes()],
        order: In<'a, i32>[groups * permutation.program.group + outliers],
        channels: usize,
        groups: usize,
        outliers: usize,
        staged: bool,
        y: Out<'a, Any>[rows * (groups * permutation.program.group + outliers) * to.bytes()],
    }
    launch {
        permutation: Permutation,
        to: Float,
        rows: usize,
    }
}

impl Launch for Permute<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        usize::from(self.to == Float::Single)
    }

    fn constants(&self) -> Defines {
        self.permutation.program.defines()
    }

    fn geometry(&self) -> Geometry {
        self.permutation.geometry(self.rows)
    }
}

kernel! {
    /// Codes of rows.
    Quantize<'a> = ["quantize"] {
        x: In<'a, Any>[rows * channels * permutation.program.element.bytes()],
        order: In<'a, i32>[groups * permutation.program.group + outliers],
        channels: usize,
        groups: usize,
        outliers: usize,
        padded_outliers: usize,
        float_outliers: bool,
        staged: usize,
        clip: f32,
        top: f32,
        signed_scales: bool,
        scale_unit: f32,
        least: f32,
        greatest: f32,
        codes: Out<'a, i8>[rows * groups * permutation.program.group],
        scales: Out<'a, f32>[groups * scale_stride],
        scale_stride: usize,
        outlier_codes: Option<Out<'a, i8>>[rows * padded_outliers],
        outlier_scales: Option<Out<'a, f32>>[rows],
        outlier_values: Option<Out<'a, f32>>[rows * outliers],
        bad: Out<'a, u32>[1],
    }
    launch {
        permutation: Permutation,
        rows: usize,
    }
}

impl Launch for Quantize<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.permutation.program.defines()
    }

    fn geometry(&self) -> Geometry {
        match self.permutation.pair_bytes {
            Some(shared_bytes) => {
                let threads = self.permutation.program.threads;
                Geometry { shared_bytes, ..Geometry::line(self.rows.div_ceil(2), threads) }
            }
            None => self.permutation.geometry(self.rows),
        }
    }
}

kernel! {
    /// Values that codes stand for.
    Dequantize<'a> = ["dequantize_to_half", "dequantize_to_float"] {
        codes: In<'a, i8>[rows * groups * group_size],
        scales: In<'a, f32>[(rows.saturating_sub(1) / rows_per_scale) * row_stride + groups.saturating_sub(1) * group_stride + 1],
        outlier_codes: Option<In<'a, i8>>[rows * padded_outliers],
        outlier_scales: Option<In<'a, f32>>[rows],
        outlier_values: Option<In<'a, f32>>[rows * outliers],
        groups: usize,
        outliers: usize,
        padded_outliers: usize,
        rows_per_scale: usize,
        row_stride: usize,
        group_stride: usize,
        y: Out<'a, Any>[rows * (groups * group_size + outliers) * to.bytes()],
    }
    launch {
        group_size: usize,
        rows: usize,
        to: Float,
    }
}

impl Launch for Dequantize<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        usize::from(self.to == Float::Single)
    }

    fn constants(&self) -> Defines {
        // The transform and the type of rows play no part on the way back.
        Program {
            group: self.group_size,
            hadamard: false,
            element: Float::Half,
            threads: THREADS,
            paired: false,
            fp4: false,
            grid: ScaleGrid::F16,
            fp8: false,
        }
        .defines()
    }

    fn geometry(&self) -> Geometry {
        Geometry::line(self.rows, THREADS)
    }
}

kernel! {
    /// Per row of a weight, the error and the energy of its outputs where channels are uncorrelated.
    EnergyErrors<'a> = ["energy_errors"] {
        x: In<'a, Any>[rows * channels * permutation.program.element.bytes()],
        order: In<'a, i32>[groups * permutation.program.group + outliers],
        channels: usize,
        groups: usize,
        outliers: usize,
        padded_outliers: usize,
        staged: bool,
        codes: In<'a, i8>[rows * groups * permutation.program.group],
        scales: In<'a, f32>[rows.div_ceil(rows_per_scale) * groups],
        outlier_codes: Option<In<'a, i8>>[rows * padded_outliers],
        outlier_scales: Option<In<'a, f32>>[rows],
        outlier_values: Option<In<'a, f32>>[rows * outliers],
        rows_per_scale: usize,
        energy: In<'a, f64>[channels],
        sums: Out<'a, f64>[2 * rows],
    }
    launch {
        permutation: Permutation,
        rows: usize,
    }
}

impl Launch for EnergyErrors<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.permutation.program.defines()
    }

    fn geometry(&self) -> Geometry {
        self.permutation.geometry(self.rows)
    }
}
