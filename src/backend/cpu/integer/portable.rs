/*! The panel kernels without intrinsics: for other processors, and to compare with the fast ones. */

use super::layout::{CHUNK, Line, PANEL, unpack};
use super::{Destination, FloatBlock, IntegerBlock, group_starts};

/// See [`IntegerBlock`].
pub(super) fn integer(
    block: &IntegerBlock<'_>,
    acc: &mut [[f32; PANEL]],
    out: Option<&Destination>,
) {
    let chunks: &[[[u8; CHUNK]; PANEL]] = bytemuck::cast_slice(block.codes);
    for (token, acc) in acc.iter_mut().enumerate() {
        for (group, chunks) in chunks.chunks_exact(block.group_chunks).enumerate() {
            let at = token * block.groups_stride + group;
            let mut sums = [block.starts[at]; PANEL];
            let first = token * block.codes_stride + group * block.group_chunks * CHUNK;
            let codes = &block.x_codes[first..][..block.group_chunks * CHUNK];
            for (weights, x) in chunks.iter().zip(codes.as_chunks::<CHUNK>().0) {
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    for (&weight, &x) in weights.iter().zip(x) {
                        *sum += i32::from(weight) * i32::from(x);
                    }
                }
            }
            let scales = &block.scales[group];
            for ((acc, sum), scale) in acc.iter_mut().zip(sums).zip(scales) {
                *acc = (block.x_scales[at] * scale).mul_add(sum as f32, *acc);
            }
        }
    }
    if let Some(out) = out {
        out.store(0, acc);
    }
}

/// See [`FloatBlock`].
pub(super) fn float(block: &FloatBlock<'_>, acc: &mut [[f32; PANEL]], out: Option<&Destination>) {
    for (acc, x) in acc.iter_mut().zip(block.x.chunks_exact(block.weights.len())) {
        for (x, weights) in x.iter().zip(block.weights) {
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = x.mul_add(*weight, *acc);
            }
        }
    }
    if let Some(out) = out {
        out.store(0, acc);
    }
}

/// See [`unpack`].
pub(super) fn unpack_lines(packed: &[Line], unpacked: &mut [Line]) {
    unpack(packed, unpacked);
}

/// See [`group_starts`].
pub(super) fn starts(codes: &[i8], size: usize, offset: i32, starts: &mut [i32]) {
    group_starts(codes, size, offset, starts);
}
