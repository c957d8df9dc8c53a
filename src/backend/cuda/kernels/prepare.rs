/*! `prepare.cu`: queries, keys and values as the products of attention read them. */

use super::heads::{self, padded};
use super::{Defines, Family, THREADS, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Heads of a token that the same lanes take, where a lane holds quads.
const QUAD_HEADS: usize = 4;

pub(super) const FAMILY: Family = Family {
    name: "prepare",
    source: source!("prepare", "heads"),
    only: None,
    tensor_core: None,
    pdl: true,
    variants: |_| {
        [
            (128, 16, false, true),
            (128, 4, true, true),
            (64, 4, false, false),
            (96, 4, true, false),
            (20, 8, true, true),
            (256, 4, true, true),
        ]
        .map(|(head_dim, kv_bits, rotated, after_rope)| {
            PrepareProgram { head_dim, kv_bits, rotated, after_rope }.defines()
        })
        .to_vec()
    },
    kernels: declared![Prepare],
};

/// What the file is compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct PrepareProgram {
    pub(in crate::backend::cuda) head_dim: usize,
    /// 16 where nothing is quantized.
    pub(in crate::backend::cuda) kv_bits: u8,
    /// Whether heads are quantized in the basis of a Hadamard transform.
    pub(in crate::backend::cuda) rotated: bool,
    /// Whether keys are quantized after the rotary embedding.
    pub(in crate::backend::cuda) after_rope: bool,
}

impl PrepareProgram {
    fn defines(&self) -> Defines {
        let own = defines! {
            "AFTER_ROPE": flag(self.after_rope),
            "THREADS": THREADS,
            "QUAD_HEADS": QUAD_HEADS,
        };
        [heads::quantized(self.head_dim, self.kv_bits, self.rotated), own].concat()
    }
}

/// What heads are to attention.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) enum Role {
    Queries,
    Keys,
    Values,
}

kernel! {
    /// Heads of `tokens` tokens, before the rotary embedding.
    Prepare<'a> = ["prepare_queries", "prepare_keys", "prepare_values"] {
        x: In<'a, half::f16>[tokens.saturating_sub(1) * row_stride as usize + heads * program.head_dim],
        row_stride: i64,
        cos: In<'a, f32>[seq_len * program.head_dim / 2],
        sin: In<'a, f32>[seq_len * program.head_dim / 2],
        out: Out<'a, half::f16>[tokens * heads * padded(program.head_dim)],
        tokens: usize,
        heads: usize,
        seq_len: usize,
        clip: f32,
        mean: Option<In<'a, f32>>[heads * program.head_dim],
    }
    launch {
        role: Role,
        program: PrepareProgram,
    }
}

impl Launch for Prepare<'_> {
    const FAMILY: Family = FAMILY;

    fn entry(&self) -> usize {
        self.role as usize
    }

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        let PrepareProgram { head_dim, rotated, .. } = self.program;
        let together = if heads::in_quads(head_dim, rotated) { QUAD_HEADS } else { 1 };
        let tasks = self.tokens * self.heads.div_ceil(together);
        Geometry::line(tasks.div_ceil(THREADS / heads::lanes(head_dim, rotated)), THREADS)
    }
}
