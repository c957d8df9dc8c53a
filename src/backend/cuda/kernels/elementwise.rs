/*! `elementwise.cu`: embedding, norm, activation, residual, and the conversion of weights. */

use half::f16;

use super::{Defines, Family, Float, THREADS, declared, defines, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{Any, In, Out};

/// Values that a thread adds, and that it multiplies by their SiLU: 16 bytes.
const ADDED: usize = 4;
const SILU_VALUES: usize = 8;
/// Values that a thread converts at least, and thread blocks at most.
const CONVERTED: usize = 16;
const CONVERT_BLOCKS: usize = 2048;

pub(super) const FAMILY: Family = Family {
    name: "elementwise",
    source: source!("elementwise"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| vec![constants()],
    kernels: declared![
        Embed,
        Select,
        RmsNorm,
        Difference,
        SiluMul,
        SiluMulPermuted,
        GeluMul,
        Add,
        AddFloat,
        AddBias,
        NormInPlace,
        Scale,
        ScaleRows,
        AddRows,
        Convert,
    ],
};

fn constants() -> Defines {
    defines! { "THREADS": THREADS, "ADDED": ADDED, "SILU_VALUES": SILU_VALUES }
}

/// A launch of this file: its entry and its geometry.
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

kernel! {
    /// Rows of a table that tokens name, in f32.
    Embed<'a> = ["embed_half", "embed_bf16", "embed_float"] {
        table: In<'a, Any>[vocabulary * hidden * element.bytes()],
        tokens: In<'a, u32>[count],
        hidden: usize,
        y: Out<'a, f32>[count * hidden],
    }
    launch {
        element: Float,
        vocabulary: usize,
        count: usize,
    }
}

kernel! {
    /// Rows that `rows` names.
    Select<'a> = ["select_half", "select_float"] {
        x: In<'a, Any>[source_rows * columns * element.bytes()],
        rows: In<'a, u32>[count],
        columns: usize,
        y: Out<'a, Any>[count * columns * element.bytes()],
    }
    launch {
        element: Float,
        source_rows: usize,
        count: usize,
    }
}

kernel! {
    /// RMSNorm of each row, to f16.
    RmsNorm<'a> = ["rms_norm"] {
        x: In<'a, f32>[rows * n],
        weight: In<'a, f32>[n],
        n: usize,
        epsilon: f32,
        y: Out<'a, f16>[rows * n],
    }
    launch { rows: usize }
}

kernel! {
    /// `x - y` in f16, held within its range.
    Difference<'a> = ["difference_half", "difference_float"] {
        x: In<'a, Any>[count as usize * element.bytes()],
        y: In<'a, Any>[count as usize * element.bytes()],
        count: i64,
        to: Out<'a, f16>[count as usize],
    }
    launch { element: Float }
}

kernel! {
    /// `gate = silu(gate) * up`, in place.
    SiluMul<'a> = ["silu_mul_half"] {
        gate: Out<'a, f16>[count as usize],
        up: In<'a, f16>[count as usize],
        count: i64,
    }
}

kernel! {
    /// `silu(gate) * up` of rows in a site's order, in the source's.
    SiluMulPermuted<'a> = ["silu_mul_permuted"] {
        gate: In<'a, f16>[rows * slots],
        up: In<'a, f16>[rows * slots],
        order: In<'a, i32>[slots],
        slots: usize,
        channels: usize,
        y: Out<'a, f16>[rows * channels],
    }
    launch { rows: usize }
}

kernel! {
    /// `gate = gelu(gate) * up`, in place.
    GeluMul<'a> = ["gelu_mul_half"] {
        gate: Out<'a, f16>[count as usize],
        up: In<'a, f16>[count as usize],
        count: i64,
    }
}

kernel! {
    /// `x += factor * y`.
    Add<'a> = ["add_half"] {
        x: Out<'a, f32>[count as usize],
        y: In<'a, f16>[count as usize],
        count: i64,
        factor: f32,
    }
}

kernel! {
    /// `x *= factor`.
    Scale<'a> = ["scale_float"] {
        x: Out<'a, f32>[count as usize],
        count: i64,
        factor: f32,
    }
}

kernel! {
    /// `x += y` in f32.
    AddFloat<'a> = ["add_float"] {
        x: Out<'a, f32>[count as usize],
        y: In<'a, f32>[count as usize],
        count: i64,
    }
}

kernel! {
    /// Adds a bias to each row.
    AddBias<'a> = ["add_bias_half"] {
        y: Out<'a, f16>[rows * n],
        bias: In<'a, f32>[n],
        n: usize,
    }
    launch { rows: usize }
}

kernel! {
    /// RMSNorm of vectors, heads or entire rows, in place.
    NormInPlace<'a> = ["norm_in_place"] {
        x: Out<'a, f16>[vectors * n],
        weight: In<'a, f32>[n],
        vectors: usize,
        n: usize,
        epsilon: f32,
    }
}

kernel! {
    /// Multiplies each row by its weight.
    ScaleRows<'a> = ["scale_rows_half"] {
        x: Out<'a, f16>[rows * n],
        weights: In<'a, f32>[rows],
        n: usize,
    }
    launch { rows: usize }
}

kernel! {
    /// `x[rows[i]] += weights[i] * y[i]`.
    AddRows<'a> = ["add_rows_half"] {
        x: Out<'a, f32>[target_rows * n],
        y: In<'a, f16>[count * n],
        rows: In<'a, u32>[count],
        weights: In<'a, f32>[count],
        n: usize,
    }
    launch {
        target_rows: usize,
        count: usize,
    }
}

kernel! {
    /// Checks values, and with `to` converts them to f16.
    Convert<'a> = ["convert_half", "convert_bf16", "convert_float"] {
        x: In<'a, Any>[count as usize * element.bytes()],
        count: i64,
        to: Option<Out<'a, f16>>[count as usize],
        bad: Out<'a, u64>[1],
    }
    launch { element: Float }
}

/// The entry of a kernel for half and float only.
fn of_two(element: Float) -> usize {
    match element {
        Float::Half => 0,
        Float::Single => 1,
        Float::Bf16 => unreachable!("activations are f16 or f32"),
    }
}

launches! {
    Embed: |kernel| kernel.element as usize, Geometry::line(kernel.count, THREADS);
    Select: |kernel| of_two(kernel.element), Geometry::line(kernel.count, THREADS);
    RmsNorm: |kernel| 0, Geometry::line(kernel.rows, THREADS);
    Difference: |kernel| of_two(kernel.element), Geometry::over(kernel.count as usize, THREADS);
    SiluMul: |kernel| 0, Geometry::over((kernel.count as usize).div_ceil(SILU_VALUES), THREADS);
    SiluMulPermuted: |kernel| 0, Geometry::line(kernel.rows, THREADS);
    Add: |kernel| 0, Geometry::over((kernel.count as usize).div_ceil(ADDED), THREADS);
    AddFloat: |kernel| 0, Geometry::over((kernel.count as usize).div_ceil(ADDED), THREADS);
    AddBias: |kernel| 0, Geometry::line(kernel.rows, THREADS);
    GeluMul: |kernel| 0, Geometry::over(kernel.count as usize, THREADS);
    Scale: |kernel| 0, Geometry::over(kernel.count as usize, THREADS);
    NormInPlace: |kernel| 0, Geometry::line(kernel.vectors.div_ceil(THREADS / 32), THREADS);
    ScaleRows: |kernel| 0, Geometry::line(kernel.rows, THREADS);
    AddRows: |kernel| 0, Geometry::line(kernel.count, THREADS);
    Convert: |kernel| kernel.element as usize, {
        let blocks = (kernel.count as usize).div_ceil(THREADS * CONVERTED);
        Geometry::line(blocks.clamp(1, CONVERT_BLOCKS), THREADS)
    };
}
