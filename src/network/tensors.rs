/*! Tensors, with their shapes checked. */

use crate::Result;
use crate::backend::{Backend, Matrix};
use crate::checkpoint::{Tensor, Tensors};
use crate::model::Architecture;
use crate::model::sites::FINAL_NORM;

/// The tensor `name`, which must have this shape.
pub fn expect<'a>(tensors: &'a dyn Tensors, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
    let tensor = tensors.tensor(name)?;
    tensor.check_shape(shape)?;
    Ok(tensor)
}

/// The weight of a norm as it is multiplied with: some families store it less one.
pub fn norm_weight(
    tensors: &dyn Tensors,
    architecture: &Architecture,
    name: &str,
    len: usize,
) -> Result<Vec<f32>> {
    let mut weight = expect(tensors, name, &[len])?.to_f32()?;
    if architecture.norms.unit_offset {
        weight.iter_mut().for_each(|weight| *weight += 1.0);
    }
    Ok(weight)
}

/// The weight of the last norm on a backend, `[1, hidden]`. A factor of the logits is part of it, since head and logits are
/// linear in what the norm returns.
pub fn final_norm<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    architecture: &Architecture,
) -> Result<B::Hidden> {
    let columns = architecture.hidden;
    let mut data = norm_weight(tensors, architecture, FINAL_NORM, columns)?;
    let factor = architecture.multipliers.logits;
    if factor != 1.0 {
        data.iter_mut().for_each(|weight| *weight *= factor);
    }
    backend.upload(Matrix { rows: 1, columns, data })
}
