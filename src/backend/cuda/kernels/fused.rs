/*! `fused.cu`: codes of a site from a norm, from gate and up, or from f16 rows, in one kernel; those of few rows are in
[`few`](super::few). */

use super::hopper_layout::{PANEL, SCALE_GROUPS};
use super::{Defines, Family, declared, defines, flag, grid_name, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};
use crate::quant::scale::ScaleGrid;

/// Stages that there are barriers for.
const MOST_STAGES: usize = 16;
/// Shared memory before the order: three barriers of 8 bytes and 8 factors of 4 bytes a stage.
const HEAD_BYTES: usize = (3 * 8 + 8 * 4) * MOST_STAGES;
/// Bytes before a staged row: the last of them are zeros, and what an order's -1 picks.
pub(super) const BEFORE: usize = 16;
/// Bytes to a multiple of which a staged row is padded; rows of a unit begin `ROW_MULTIPLE / tokens` bytes apart modulo it, so that lanes
/// of different rows never meet in a bank.
const ROW_MULTIPLE: usize = 128;
/// Rows of a unit where rows come permuted.
const PERMUTED_TOKENS: usize = 8;
/// Warps of a block: a quarter of an SM's registers is enough for 80 of each thread of 6 warps, or 96 of 5.
const WARPS: usize = 24;
const GATHERING_SILU_WARPS: usize = 20;

pub(super) const FAMILY: Family = Family {
    name: "fused",
    source: source!("fused", "codes"),
    only: None,
    tensor_core: None,
    pdl: true,
    variants: |_| programs().map(|program| program.defines()).to_vec(),
    kernels: declared![FusedQuantize],
};

/// Programs that stand for all others.
pub(super) fn programs() -> [Program; 8] {
    let all = |kind, group, hadamard, ordered, tokens, tiled, magnitudes| Program {
        kind,
        group,
        hadamard,
        ordered,
        tokens,
        tiled,
        magnitudes,
        fp4: false,
        grid: ScaleGrid::F16,
    };
    [
        all(Kind::Norm, 128, true, true, 4, true, true),
        all(Kind::Norm, 64, true, true, 1, false, false),
        all(Kind::Half, 128, true, true, 8, true, true),
        all(Kind::Half, 32, false, true, 2, true, false),
        all(Kind::Silu, 128, true, false, 8, true, true),
        all(Kind::Silu, 128, true, true, 1, true, false),
        Program { fp4: true, ..all(Kind::Silu, 64, true, true, 4, false, false) },
        Program {
            fp4: true,
            grid: ScaleGrid::PowerOfTwo,
            ..all(Kind::Norm, 32, true, true, 4, false, false)
        },
    ]
}

/// What a row becomes codes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend::cuda) enum Kind {
    /// RMSNorm of f32 rows.
    Norm,
    /// f16 rows as they are.
    Half,
    /// f16 rows of gate and up.
    Silu,
}

/// What the file is compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Program {
    pub(in crate::backend::cuda) kind: Kind,
    pub(in crate::backend::cuda) group: usize,
    pub(in crate::backend::cuda) hadamard: bool,
    /// Whether the kernel permutes; otherwise rows come in the site's order.
    pub(in crate::backend::cuda) ordered: bool,
    /// Rows of a unit.
    pub(in crate::backend::cuda) tokens: usize,
    /// Whether codes are tiled as the products for Hopper read them.
    pub(in crate::backend::cuda) tiled: bool,
    /// Whether codes are signs and magnitudes.
    pub(in crate::backend::cuda) magnitudes: bool,
    pub(in crate::backend::cuda) fp4: bool,
    pub(in crate::backend::cuda) grid: ScaleGrid,
}

impl Program {
    /// Warps of a block at most.
    fn warps(&self) -> usize {
        if self.kind == Kind::Silu && self.ordered { GATHERING_SILU_WARPS } else { WARPS }
    }

    /// Slots of entire panels.
    fn slots(&self, groups: usize, outliers: usize) -> usize {
        ((groups * self.group).div_ceil(PANEL) + outliers.div_ceil(PANEL)) * PANEL
    }

    /// Bytes of a norm's weight, a number a slot, or of `values` values of up.
    fn other_bytes(&self, values: usize, groups: usize, outliers: usize) -> usize {
        match self.kind {
            Kind::Norm => 4 * self.slots(groups, outliers),
            Kind::Silu => 2 * values,
            Kind::Half => 0,
        }
    }

    /// The macros of codes.cuh.
    pub(super) fn codes_defines(&self) -> Defines {
        let mut all = defines! {
            "FROM": self.kind as u8,
            "GROUP": self.group,
            "TRANSFORM": flag(self.hadamard),
            "ORDERED": flag(self.ordered),
            "TILED": flag(self.tiled),
            "MAGNITUDES": flag(self.magnitudes),
            "FP4": flag(self.fp4),
            "SCALE_GRID": grid_name(self.grid),
            "PANEL": PANEL,
            "SCALE_GROUPS": SCALE_GROUPS,
        };
        if self.ordered {
            all.extend(defines! { "BEFORE": BEFORE });
        }
        all
    }

    fn defines(&self) -> Defines {
        let own = defines! { "TOKENS": self.tokens, "WARPS": self.warps() };
        let staging = if self.ordered {
            defines! {
                "MOST_STAGES": MOST_STAGES,
                "HEAD_BYTES": HEAD_BYTES,
                "ROW_MULTIPLE": ROW_MULTIPLE,
            }
        } else {
            defines! {
                "STAGE_STRIDE": STAGE_STRIDE,
                "STAGE_BYTES": STAGE_BYTES,
            }
        };
        [self.codes_defines(), own, staging].concat()
    }
}

/// Where rows come permuted: bytes from row to row of a staged panel, and of a warp's stage: gates, then up.
const STAGE_STRIDE: usize = 2 * PANEL + 128 / PERMUTED_TOKENS;
const STAGE_BYTES: usize = 2 * PERMUTED_TOKENS * STAGE_STRIDE;

/// How fused.cu or few.cu is launched.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct FusedPlan {
    /// Whether it is few.cu.
    pub(in crate::backend::cuda) few: bool,
    /// Rows of a unit.
    pub(in crate::backend::cuda) tokens: usize,
    pub(in crate::backend::cuda) slice_panels: usize,
    pub(in crate::backend::cuda) stages: usize,
    pub(in crate::backend::cuda) geometry: Geometry,
}

/// What a device has.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Room {
    pub(in crate::backend::cuda) multiprocessors: usize,
    pub(in crate::backend::cuda) shared_bytes: usize,
}

/// The rows to be quantized.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Shape {
    pub(in crate::backend::cuda) kind: Kind,
    pub(in crate::backend::cuda) rows: usize,
    /// The source's channels.
    pub(in crate::backend::cuda) channels: usize,
    /// Panels of the groups and of the outliers.
    pub(in crate::backend::cuda) panels: [usize; 2],
}

impl FusedPlan {
    /// For rows that come permuted: each warp stages panels of its own.
    pub(in crate::backend::cuda) fn permuted(shape: Shape, room: Room) -> Self {
        let [panels, outlier_panels] = shape.panels;
        let warps = (room.shared_bytes / (2 * STAGE_BYTES)).min(WARPS) / 4 * 4;
        let items = shape.rows.div_ceil(PERMUTED_TOKENS) * (panels + outlier_panels.min(1));
        Self {
            few: false,
            tokens: PERMUTED_TOKENS,
            slice_panels: panels,
            stages: 2,
            geometry: Geometry {
                shared_bytes: 2 * STAGE_BYTES * warps,
                ..Geometry::line(room.multiprocessors.min(items), 32 * warps)
            },
        }
    }

    /// For rows of the source's channels; none where not even one row has room.
    pub(in crate::backend::cuda) fn gathering(shape: Shape, room: Room) -> Option<Self> {
        let Shape { kind, rows, channels, panels: [panels, outlier_panels] } = shape;
        let blocks = room.multiprocessors;
        let (element, inputs, by_slot, warps) = match kind {
            Kind::Norm => (4, 1, 8, WARPS),
            Kind::Half => (2, 1, 4, WARPS),
            Kind::Silu => (2, 2, 4, GATHERING_SILU_WARPS),
        };
        let head = HEAD_BYTES + (panels + outlier_panels) * PANEL * by_slot;
        let stage = |tokens: usize| {
            let row = (channels * element).next_multiple_of(ROW_MULTIPLE) + ROW_MULTIPLE / tokens;
            BEFORE + inputs * tokens * row
        };
        let stages = |tokens: usize| {
            room.shared_bytes.checked_sub(head).map_or(0, |left| left / stage(tokens))
        };
        // As many rows as leave nearly every block a unit, and room for the next one.
        let fills = |tokens: usize| 10 * rows.div_ceil(tokens) >= 9 * blocks;
        let enough = |&tokens: &usize| stages(tokens) >= 2 && fills(tokens);
        // Of few rows a unit may be mostly empty; a norm's sums then take longer.
        let few: &[usize] = if kind == Kind::Norm { &[2, 1] } else { &[4, 2, 1] };
        let fits = |&tokens: &usize| stages(tokens) >= 1;
        let tokens = [8, 4, 2].into_iter().find(enough).or(few.iter().copied().find(fits))?;
        let units = rows.div_ceil(tokens);
        // Few rows are shared out among several blocks each.
        let slices = (blocks / units.max(1)).clamp(1, panels.div_ceil(8 / tokens).max(1));
        let slice_panels = panels.div_ceil(slices).next_multiple_of(8 / tokens).max(1);
        let slices = panels.div_ceil(slice_panels).max(1);
        let stages = stages(tokens).min(MOST_STAGES).min(units.max(1));
        (stages > 0).then(|| Self {
            few: false,
            tokens,
            slice_panels,
            stages,
            geometry: Geometry {
                shared_bytes: head + stages * stage(tokens),
                ..Geometry::grid(((blocks / slices).clamp(1, units.max(1)), slices, 1), 32 * warps)
            },
        })
    }
}

kernel! {
    /// Codes of rows.
    FusedQuantize<'a> = ["fused_quantize"] {
        x: In<'a, Any>[tokens * columns * if program.kind == Kind::Norm { 4 } else { 2 }],
        other: Option<In<'a, Any>>[program.other_bytes(tokens * columns, groups, outliers)],
        slots: Option<In<'a, i32>>[program.slots(groups, outliers)],
        tokens: usize,
        columns: usize,
        groups: usize,
        outliers: usize,
        slice_panels: usize,
        stages: usize,
        epsilon: f32,
        clip: f32,
        top: f32,
        inverse_top: f32,
        signed_scales: bool,
        scale_unit: f32,
        least: f32,
        greatest: f32,
        codes: Out<'a, i8>[tokens * groups * program.group],
        scales: Out<'a, f32>[if program.tiled { groups.next_multiple_of(SCALE_GROUPS) * scale_stride / 2 } else { groups * scale_stride }],
        scale_stride: usize,
        outlier_codes: Option<Out<'a, i8>>[tokens * outliers],
        outlier_scales: Option<Out<'a, f32>>[tokens],
        padded_outliers: usize,
        bad: Out<'a, u32>[1],
    }
    launch {
        program: Program,
        geometry: Geometry,
    }
}

impl Launch for FusedQuantize<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}
