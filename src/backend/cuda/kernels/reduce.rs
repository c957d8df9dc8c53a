/*! `reduce.cu`: sums over tokens and over the vocabulary. */

use half::f16;

use super::{Defines, Family, THREADS, declared, defines, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Channels that a block sums.
const ENERGY_CHANNELS: usize = 64;

pub(super) const FAMILY: Family = Family {
    name: "reduce",
    source: source!("reduce"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| vec![constants()],
    kernels: declared![
        EnergyParts,
        KeyParts,
        SumParts,
        CrossEntropy,
        Argmax,
        DotParts,
        RelativeSquaredErrors,
        KlDivergence,
    ],
};

fn constants() -> Defines {
    defines! { "THREADS": THREADS, "ENERGY_CHANNELS": ENERGY_CHANNELS }
}

/// A launch of this file: its geometry.
macro_rules! launches {
    ($($name:ident: |$kernel:ident| $geometry:expr;)*) => {$(
        impl Launch for $name<'_> {
            const FAMILY: Family = FAMILY;

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
    /// Sums of the squares of each channel over parts of the tokens.
    EnergyParts<'a> = ["energy_parts"] {
        x: In<'a, f16>[tokens * channels],
        tokens: usize,
        channels: usize,
        tokens_per_part: usize,
        parts: Out<'a, f64>[tokens.div_ceil(tokens_per_part) * channels],
    }
}

kernel! {
    /// Sums of the embedded keys of each window and head over the tokens.
    KeyParts<'a> = ["key_parts"] {
        keys: In<'a, f16>[windows_and_heads * seq_len * width],
        seq_len: usize,
        head_dim: usize,
        width: usize,
        sums: Out<'a, f64>[windows_and_heads * head_dim],
    }
    launch { windows_and_heads: usize }
}

kernel! {
    /// Sums of parts, in order.
    SumParts<'a> = ["sum_parts"] {
        parts: In<'a, f64>[count * channels],
        count: usize,
        channels: usize,
        sums: Out<'a, f64>[channels],
    }
}

kernel! {
    /// Negative log likelihood of each row's target.
    CrossEntropy<'a> = ["cross_entropy"] {
        logits: In<'a, f32>[rows * vocabulary],
        targets: In<'a, u32>[rows],
        vocabulary: usize,
        nats: Out<'a, f64>[rows],
    }
    launch { rows: usize }
}

kernel! {
    /// The first of the largest logits of each row.
    Argmax<'a> = ["argmax"] {
        logits: In<'a, f32>[rows * vocabulary],
        vocabulary: usize,
        tokens: Out<'a, u32>[rows],
    }
    launch { rows: usize }
}

kernel! {
    /// Sums of `a * b` over parts.
    DotParts<'a> = ["dot_parts"] {
        a: In<'a, f32>[count as usize],
        b: In<'a, f32>[count as usize],
        count: i64,
        parts: Out<'a, f64>[part_count],
    }
    launch { part_count: usize }
}

kernel! {
    /// `|x - y|^2 / |y|^2` of each row.
    RelativeSquaredErrors<'a> = ["relative_squared_errors"] {
        x: In<'a, f32>[rows * columns],
        y: In<'a, f32>[rows * columns],
        columns: usize,
        errors: Out<'a, f64>[rows],
    }
    launch { rows: usize }
}

kernel! {
    /// The Kullback-Leibler divergence of each row's distribution.
    KlDivergence<'a> = ["kl_divergence"] {
        changed: In<'a, f32>[rows * vocabulary],
        logits: In<'a, f32>[rows * vocabulary],
        vocabulary: usize,
        nats: Out<'a, f64>[rows],
    }
    launch { rows: usize }
}

launches! {
    EnergyParts: |kernel| {
        let parts = kernel.tokens.div_ceil(kernel.tokens_per_part);
        Geometry::grid((kernel.channels.div_ceil(ENERGY_CHANNELS), parts, 1), THREADS)
    };
    KeyParts: |kernel| Geometry::line(kernel.windows_and_heads, THREADS);
    SumParts: |kernel| Geometry::over(kernel.channels, THREADS);
    CrossEntropy: |kernel| Geometry::line(kernel.rows, THREADS);
    Argmax: |kernel| Geometry::line(kernel.rows, THREADS);
    DotParts: |kernel| Geometry::line(kernel.part_count, THREADS);
    RelativeSquaredErrors: |kernel| Geometry::line(kernel.rows, THREADS);
    KlDivergence: |kernel| Geometry::line(kernel.rows, THREADS);
}
