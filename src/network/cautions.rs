/*! Warnings before a run: inputs that are valid but whose results may mean little. */

use crate::checkpoint::Tensors;
use crate::model::Architecture;
use crate::model::sites::FINAL_NORM;
use crate::progress::Progress;

/// Warns of windows of `seq_len` tokens that are longer than the model's positions, of norms that are all zero, and of
/// a repository's own code that is not run; each once.
pub fn caution(
    tensors: &dyn Tensors,
    architecture: &Architecture,
    seq_len: usize,
    progress: &dyn Progress,
) {
    if let Some(remark) = &architecture.remark {
        progress.warn(remark);
    }
    let positions = architecture.positions();
    if seq_len > positions {
        progress.warn(&format!(
            "windows of {seq_len} tokens are longer than the {positions} positions that the model was made for \
             (`max_position_embeddings`): its predictions beyond them mean little; give --seq-len {positions} or \
             less"
        ));
    }
    let zero = zero_norms(tensors, architecture);
    if let Some(first) = zero.first() {
        let count = zero.len();
        progress.warn(&format!(
            "all weights of a norm are zero, in {count} of the model's norms, first in `{first}`: nothing passes \
             them; is the checkpoint sound?"
        ));
    }
}

/// Names of the norms whose weights are all zero. A norm that cannot be read is an error where it is used.
fn zero_norms(tensors: &dyn Tensors, architecture: &Architecture) -> Vec<String> {
    let of_block = |block| {
        let heads = architecture.qk_norm_names(block).into_iter().flatten();
        architecture.norm_names(block).into_iter().chain(heads)
    };
    let names = (0..architecture.blocks).flat_map(of_block).chain([FINAL_NORM.to_owned()]);
    let zero = if architecture.norms.unit_offset { -1.0 } else { 0.0 };
    let is_zero = |name: &String| {
        let values = tensors.tensor(name).and_then(|tensor| tensor.to_f32());
        values.is_ok_and(|values| !values.is_empty() && values.iter().all(|value| *value == zero))
    };
    names.filter(is_zero).collect()
}
