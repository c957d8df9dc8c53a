/*! Tensors of the shapes that a network asks for. */

use crate::backend::{Backend, Matrix};
use crate::checkpoint::{Tensor, Tensors};
use crate::{Error, Result};

/// A tensor of the shape the architecture asks for.
pub fn expect<'a>(tensors: &'a dyn Tensors, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
    let tensor = tensors.tensor(name)?;
    if tensor.shape == shape {
        return Ok(tensor);
    }
    Err(Error::input(format!(
        "{} has shape {:?}, config.json makes it {shape:?}",
        tensor.title(),
        tensor.shape
    ))
    .hint("config.json and the weights do not belong together: fetch the checkpoint again"))
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
