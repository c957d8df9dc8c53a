/*! Tensors, with their shapes checked. */

use crate::Result;
use crate::backend::{Backend, Matrix};
use crate::checkpoint::{Tensor, Tensors};

/// The tensor `name`, which must have this shape.
pub fn expect<'a>(tensors: &'a dyn Tensors, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
    let tensor = tensors.tensor(name)?;
    tensor.check_shape(shape)?;
    Ok(tensor)
}

/// A vector on the backend, as one row.
pub fn vector<B: Backend>(
    backend: &B,
    tensors: &dyn Tensors,
    name: &str,
    len: usize,
) -> Result<B::Hidden> {
    let data = expect(tensors, name, &[len])?.to_f32()?;
    backend.upload(Matrix { rows: 1, columns: len, data })
}
