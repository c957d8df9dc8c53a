/*! `attention.cu`: causal attention over entire windows. */

use super::heads::{self, padded};
use super::{Defines, Family, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

/// Threads of a block.
const THREADS: usize = 128;

pub(super) const FAMILY: Family = Family {
    name: "attention",
    source: source!("attention"),
    only: None,
    tensor_core: Some("HMMA"),
    pdl: true,
    variants: |_| {
        [
            (128, false, false),
            (128, true, false),
            (128, true, true),
            (64, false, false),
            (64, false, true),
            (96, true, false),
            (20, true, false),
            (256, true, false),
            (256, true, true),
        ]
        .map(|(head_dim, rotated, windowed)| {
            AttentionProgram { head_dim, rotated, windowed }.defines()
        })
        .to_vec()
    },
    kernels: declared![FlashAttention],
};

/// What the file is compiled for.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct AttentionProgram {
    pub(in crate::backend::cuda) head_dim: usize,
    /// Whether values come in the basis of a Hadamard transform.
    pub(in crate::backend::cuda) rotated: bool,
    /// Whether a token does not see all before it.
    pub(in crate::backend::cuda) windowed: bool,
}

impl AttentionProgram {
    /// Queries of a block. Wide heads leave registers for half as many queries a warp, and so do windows.
    fn query_rows(&self) -> usize {
        if padded(self.head_dim) <= if self.windowed { 64 } else { 128 } { 128 } else { 64 }
    }

    /// Keys of a stage.
    fn key_rows(&self) -> usize {
        if padded(self.head_dim) <= 128 { 64 } else { 32 }
    }

    /// Bytes from row to row in shared memory. Eight rows of a matrix must lie in eight different groups of four banks: an odd
    /// number of 16-byte pieces does that; rows of multiples of 128 bytes are swizzled.
    fn pitch(&self) -> usize {
        let width = padded(self.head_dim);
        if width.is_multiple_of(64) { 2 * width } else { 2 * width + 16 }
    }

    fn defines(&self) -> Defines {
        let own = defines! {
            "WINDOWED": flag(self.windowed),
            "THREADS": THREADS,
            "QUERY_ROWS": self.query_rows(),
            "KEY_ROWS": self.key_rows(),
            "PITCH": self.pitch(),
        };
        [heads::common(self.head_dim, self.rotated), own].concat()
    }
}

kernel! {
    /// Attention on what `prepare.cu` makes.
    FlashAttention<'a> = ["flash_attention"] {
        q: In<'a, half::f16>[windows * heads * seq_len * padded(program.head_dim)],
        k: In<'a, half::f16>[windows * kv_heads * seq_len * padded(program.head_dim)],
        v: In<'a, half::f16>[windows * kv_heads * seq_len * padded(program.head_dim)],
        out: Out<'a, half::f16>[windows * seq_len * heads * program.head_dim],
        seq_len: usize,
        heads: usize,
        kv_heads: usize,
        scale: f32,
        reach: usize,
    }
    launch {
        program: AttentionProgram,
        windows: usize,
    }
}

impl Launch for FlashAttention<'_> {
    const FAMILY: Family = FAMILY;

    fn constants(&self) -> Defines {
        self.program.defines()
    }

    fn geometry(&self) -> Geometry {
        let (queries, keys) = (self.program.query_rows(), self.program.key_rows());
        let grid = (self.seq_len.div_ceil(queries), self.heads, self.windows);
        // The queries, and two stages of keys and of values.
        let shared_bytes = (queries + 4 * keys) * self.program.pitch();
        Geometry { shared_bytes, ..Geometry::grid(grid, THREADS) }
    }
}
