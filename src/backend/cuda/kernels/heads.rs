/*! What `heads.cuh` and `common.cuh` are compiled with: how a head lies in memory and in registers. */

use super::{Defines, defines, flag};

/// Values of a head in memory: a multiple of the depth of one matrix instruction.
pub(in crate::backend::cuda) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Whether a lane holds quads of a head's values.
pub(super) fn in_quads(head_dim: usize, rotated: bool) -> bool {
    head_dim.is_multiple_of(16) && (!rotated || head_dim.is_power_of_two())
}

/// Lanes that hold a head.
pub(super) fn lanes(head_dim: usize, rotated: bool) -> usize {
    if in_quads(head_dim, rotated) { (head_dim / 8).next_power_of_two() } else { 32 }
}

/// The macros of common.cuh for heads.
pub(super) fn common(head_dim: usize, rotated: bool) -> Defines {
    defines! {
        "HEAD_DIM": head_dim,
        "PADDED_HEAD": padded(head_dim),
        "ROTATED": flag(rotated),
    }
}

/// The macros of heads.cuh; `kv_bits` is 16 where nothing is quantized.
pub(super) fn quantized(head_dim: usize, kv_bits: u8, rotated: bool) -> Defines {
    let own = defines! {
        "KV_BITS": kv_bits,
        "QUADS": flag(in_quads(head_dim, rotated)),
        "HEAD_LANES": lanes(head_dim, rotated),
    };
    [common(head_dim, rotated), own].concat()
}
