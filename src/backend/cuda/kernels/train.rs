/*! `train.cu`: the backward pass without its products and heads. */

use half::f16;

use super::{Defines, Family, Float, THREADS, declared, defines, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};

/// Rows of a part of a sum over tokens.
pub(in crate::backend::cuda) const PART_ROWS: usize = 64;
const WARPS: usize = THREADS / 32;

pub(super) const FAMILY: Family = Family {
    name: "train",
    source: source!("train"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| vec![constants()],
    kernels: declared![
        Widen,
        NormBackward,
        NormWeightParts,
        SiluBackward,
        DivergenceBackward,
        WeightsBackward,
        QuantizerBackward,
        PermutationBackward,
        ScaleGradients,
        OutlierGradients,
    ],
};

fn constants() -> Defines {
    defines! { "THREADS": THREADS, "PART_ROWS": PART_ROWS }
}

kernel! {
    /// f16 as f32.
    Widen<'a> = ["widen"] {
        x: In<'a, f16>[count as usize],
        count: i64,
        y: Out<'a, f32>[count as usize],
    }
}

kernel! {
    /// Adds the gradient of RMSNorm's input, `[rows, n]`.
    NormBackward<'a> = ["norm_backward_float", "norm_backward_half"] {
        x: In<'a, Any>[rows * n * element.bytes()],
        weight: In<'a, f32>[n],
        n: usize,
        epsilon: f32,
        d_y: In<'a, f32>[rows * n],
        d_x: Out<'a, f32>[rows * n],
        inverses: Out<'a, f32>[rows],
    }
    launch {
        element: Float,
        rows: usize,
    }
}

kernel! {
    /// Parts of the gradient of RMSNorm's weight.
    NormWeightParts<'a> = ["norm_weight_parts_float", "norm_weight_parts_half"] {
        x: In<'a, Any>[rows * n * element.bytes()],
        d_y: In<'a, f32>[rows * n],
        inverses: In<'a, f32>[rows],
        rows: usize,
        n: usize,
        parts: Out<'a, f64>[rows.div_ceil(PART_ROWS) * n],
    }
    launch { element: Float }
}

kernel! {
    /// Gradients of gate and up.
    SiluBackward<'a> = ["silu_backward"] {
        gate: In<'a, f16>[count as usize],
        up: In<'a, f16>[count as usize],
        count: i64,
        d_z: Out<'a, f32>[count as usize],
        d_gate: Out<'a, f32>[count as usize],
    }
}

kernel! {
    /// The gradient of logits.
    DivergenceBackward<'a> = ["divergence_backward"] {
        changed: Out<'a, f32>[rows * vocabulary],
        logits: In<'a, f32>[rows * vocabulary],
        vocabulary: usize,
    }
    launch { rows: usize }
}

kernel! {
    /// A head's weights and the gradient of its scores.
    WeightsBackward<'a> = ["weights_backward"] {
        scores: Out<'a, f32>[tokens * tokens],
        d_weights: Out<'a, f32>[tokens * tokens],
        tokens: usize,
        reach: usize,
        factor: f32,
    }
}

kernel! {
    /// Back through the quantizer of activations.
    QuantizerBackward<'a> = ["quantizer_backward"] {
        x: In<'a, f32>[tokens * width],
        codes: In<'a, i8>[tokens * groups * group_size],
        scales: In<'a, f32>[groups.saturating_sub(1) * stride + tokens],
        stride: usize,
        d: Out<'a, f32>[tokens * width],
        tokens: usize,
        width: usize,
        groups: usize,
        group_size: usize,
        least: f32,
        greatest: f32,
        clip: f32,
        parts: Out<'a, f64>[tokens.div_ceil(PART_ROWS) * groups],
    }
}

kernel! {
    /// Back through transform and permutation.
    PermutationBackward<'a> = ["permutation_backward"] {
        d: In<'a, f32>[rows * width],
        order: In<'a, i32>[width],
        width: usize,
        channels: usize,
        grouped: usize,
        block: usize,
        scale: f32,
        to: Out<'a, f32>[rows * channels],
    }
    launch { rows: usize }
}

kernel! {
    /// Gradients of scales of groups.
    ScaleGradients<'a> = ["scale_gradients"] {
        d: In<'a, f32>[rows * width],
        codes: In<'a, i8>[rows * groups * group_size],
        rows: usize,
        width: usize,
        groups: usize,
        group_size: usize,
        rows_per_scale: usize,
        to: Out<'a, f32>[rows.div_ceil(rows_per_scale) * groups],
    }
}

kernel! {
    /// Gradients of scales of outliers.
    OutlierGradients<'a> = ["outlier_gradients"] {
        d: In<'a, f32>[rows * width],
        codes: Option<In<'a, i8>>[rows * padded],
        padded: usize,
        values: Option<In<'a, f32>>[rows * outliers],
        scales: Option<In<'a, f32>>[rows],
        rows: usize,
        width: usize,
        outliers: usize,
        to: Out<'a, f32>[rows],
    }
}

/// A launch of this file: which entry it is, and its geometry.
macro_rules! launches {
    ($($name:ident: |$kernel:ident| $entry:expr, $geometry:expr;)*) => {$(
        impl Launch for $name<'_> {
            const FAMILY: Family = FAMILY;

            fn entry(&self) -> usize {
                let $kernel = self;
                let _ = $kernel;
                $entry
            }

            fn constants(&self) -> Defines {
                constants()
            }

            fn geometry(&self) -> Geometry {
                let $kernel = self;
                $geometry
            }
        }
    )*};
}

launches! {
    Widen: |kernel| 0, Geometry::over(kernel.count as usize, THREADS);
    NormBackward: |kernel| usize::from(kernel.element == Float::Half), Geometry::line(kernel.rows, THREADS);
    NormWeightParts: |kernel| usize::from(kernel.element == Float::Half),
        Geometry::grid((kernel.n.div_ceil(THREADS), kernel.rows.div_ceil(PART_ROWS), 1), THREADS);
    SiluBackward: |kernel| 0, Geometry::over(kernel.count as usize, THREADS);
    DivergenceBackward: |kernel| 0, Geometry::line(kernel.rows, THREADS);
    WeightsBackward: |kernel| 0, Geometry::line(kernel.tokens, THREADS);
    QuantizerBackward: |kernel| 0,
        Geometry::grid((kernel.groups, kernel.tokens.div_ceil(PART_ROWS), 1), THREADS);
    PermutationBackward: |kernel| 0,
        Geometry { shared_bytes: 4 * kernel.width, ..Geometry::line(kernel.rows, THREADS) };
    ScaleGradients: |kernel| 0,
        Geometry::line((kernel.rows.div_ceil(kernel.rows_per_scale) * kernel.groups).div_ceil(WARPS), THREADS);
    OutlierGradients: |kernel| 0, Geometry::line(kernel.rows.div_ceil(WARPS), THREADS);
}
