/*! `few.cu`: as `fused.cu`, for few rows. */

use super::fused::{self, BEFORE, FusedPlan, FusedQuantize, Kind, Program, Shape};
use super::{Defines, Family, declared, defines, source};
use crate::backend::cuda::launch::{Argument, Arguments, Geometry, Launch};

/// Rows at most: of more, fused.cu makes the codes sooner.
const MOST_ROWS: usize = 128;
/// Panels of a block. Outliers are one more.
const BLOCK_PANELS: usize = 8;
const MOST_THREADS: usize = 32 * (BLOCK_PANELS + 1);

pub(super) const FAMILY: Family = Family {
    name: "few",
    source: source!("few", "codes"),
    variants: |_| fused::programs().into_iter().filter(takes).map(|own| defines_of(&own)).collect(),
    kernels: declared![FewQuantize],
    ..fused::FAMILY
};

/// Whether there is such a kernel: gate and up are not gathered.
fn takes(program: &Program) -> bool {
    program.kind != Kind::Silu || !program.ordered
}

fn defines_of(program: &Program) -> Defines {
    [program.codes_defines(), defines! { "MOST_THREADS": MOST_THREADS }].concat()
}

/// The arguments of `fused.cu`.
pub(in crate::backend::cuda) struct FewQuantize<'a>(pub(in crate::backend::cuda) FusedQuantize<'a>);

impl Arguments for FewQuantize<'_> {
    const ENTRIES: &'static [&'static str] = &["few_quantize"];

    fn parameters() -> Vec<(&'static str, Vec<String>)> {
        FusedQuantize::parameters()
    }

    fn arguments(&self) -> Vec<Argument> {
        self.0.arguments()
    }
}

impl Launch for FewQuantize<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        defines_of(&self.0.program)
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry
    }
}

/// For few rows; none where fused.cu makes the codes. With `permuted`, rows come in the site's order.
pub(in crate::backend::cuda) fn plan(
    shape: Shape,
    permuted: bool,
    shared_bytes: usize,
) -> Option<FusedPlan> {
    let Shape { kind, rows, channels, panels: [panels, outlier_panels] } = shape;
    let staged = match kind {
        Kind::Norm => BEFORE + 4 * channels,
        Kind::Half => BEFORE + 2 * channels,
        Kind::Silu if permuted => 0,
        Kind::Silu => return None,
    };
    // The norm's factor is static.
    if rows > MOST_ROWS || staged + 16 > shared_bytes {
        return None;
    }
    let slices = (panels / BLOCK_PANELS).max(1);
    let slice_panels = panels.div_ceil(slices).max(1);
    let slices = panels.div_ceil(slice_panels).max(1);
    let warps = (slice_panels + outlier_panels.min(1)).min(BLOCK_PANELS + 1);
    let geometry = Geometry::grid((rows, slices, 1), 32 * warps);
    let geometry = Geometry { shared_bytes: staged, ..geometry };
    Some(FusedPlan { few: true, tokens: 1, slice_panels, stages: 1, geometry })
}
