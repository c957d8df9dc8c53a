/*! `train_heads.cu`: the backward pass of what attention does to heads before its products. */

use half::f16;

use super::heads;
use super::{Defines, Family, THREADS, declared, defines, flag, kernel, source};
use crate::backend::cuda::launch::{Geometry, Launch};
use crate::backend::cuda::slice::{In, Out};

pub(super) const FAMILY: Family = Family {
    name: "train_heads",
    source: source!("train_heads", "heads"),
    only: None,
    tensor_core: None,
    pdl: false,
    variants: |_| {
        [
            (128, 16, false, true),
            (128, 4, true, true),
            (64, 4, false, false),
            (96, 4, true, false),
            (20, 8, true, true),
        ]
        .map(|(head_dim, kv_bits, rotated, after_rope)| {
            HeadsProgram { head_dim, kv_bits, rotated, after_rope }.defines()
        })
        .to_vec()
    },
    kernels: declared![OutputsByHead, QueriesBackward, KeysBackward, ValuesBackward],
};

/// What the file is compiled for: as prepare.cu.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct HeadsProgram {
    pub(in crate::backend::cuda) head_dim: usize,
    /// 16 where nothing is quantized.
    pub(in crate::backend::cuda) kv_bits: u8,
    /// Whether heads are quantized in the basis of a Hadamard transform.
    pub(in crate::backend::cuda) rotated: bool,
    /// Whether keys are quantized after the rotary embedding.
    pub(in crate::backend::cuda) after_rope: bool,
}

impl HeadsProgram {
    fn defines(&self) -> Defines {
        let own = defines! { "AFTER_ROPE": flag(self.after_rope), "THREADS": THREADS };
        [heads::quantized(self.head_dim, self.kv_bits, self.rotated), own].concat()
    }

    /// Values of `count` heads where they lie by heads.
    fn by_head(&self, count: usize) -> usize {
        count * heads::padded(self.head_dim)
    }

    fn geometry(&self, count: usize) -> Geometry {
        let lanes = heads::lanes(self.head_dim, self.rotated);
        Geometry::line(count.div_ceil(THREADS / lanes), THREADS)
    }
}

kernel! {
    /// Gradients of outputs, by heads.
    OutputsByHead<'a> = ["outputs_by_head"] {
        d: In<'a, f32>[tokens * heads * program.head_dim],
        tokens: usize,
        heads: usize,
        seq_len: usize,
        to: Out<'a, f32>[program.by_head(tokens * heads)],
    }
    launch { program: HeadsProgram }
}

kernel! {
    /// Gradients of queries.
    QueriesBackward<'a> = ["queries_backward"] {
        d: In<'a, f32>[program.by_head(tokens * heads)],
        cos: In<'a, f32>[seq_len * program.head_dim / 2],
        sin: In<'a, f32>[seq_len * program.head_dim / 2],
        tokens: usize,
        heads: usize,
        seq_len: usize,
        to: Out<'a, f32>[tokens * heads * program.head_dim],
    }
    launch { program: HeadsProgram }
}

kernel! {
    /// Gradients of keys.
    KeysBackward<'a> = ["keys_backward"] {
        k: In<'a, f16>[tokens * heads * program.head_dim],
        d: In<'a, f32>[program.by_head(tokens * heads)],
        cos: In<'a, f32>[seq_len * program.head_dim / 2],
        sin: In<'a, f32>[seq_len * program.head_dim / 2],
        mean: Option<In<'a, f32>>[heads * program.head_dim],
        clip: f32,
        tokens: usize,
        heads: usize,
        seq_len: usize,
        to: Out<'a, f32>[tokens * heads * program.head_dim],
    }
    launch { program: HeadsProgram }
}

kernel! {
    /// Gradients of values.
    ValuesBackward<'a> = ["values_backward"] {
        v: In<'a, f16>[tokens * heads * program.head_dim],
        d: In<'a, f32>[program.by_head(tokens * heads)],
        clip: f32,
        tokens: usize,
        heads: usize,
        seq_len: usize,
        to: Out<'a, f32>[tokens * heads * program.head_dim],
    }
    launch { program: HeadsProgram }
}

macro_rules! launches {
    ($($name:ident)*) => {$(
        impl Launch for $name<'_> {
            const FAMILY: Family = FAMILY;

            fn constants(&self) -> Defines {
                self.program.defines()
            }

            fn geometry(&self) -> Geometry {
                self.program.geometry(self.tokens * self.heads)
            }
        }
    )*};
}

launches! { OutputsByHead QueriesBackward KeysBackward ValuesBackward }
