//! Where tensors live, and how they get there and back.

use crate::Result;
use crate::checkpoint::{self, Dtype};

/// A matrix on the host, row-major `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f32>,
}

/// Rows of values on a backend: tokens, or windows' tokens one after the other.
pub trait Tensor: Send + Sync {
    /// The type of the values.
    const DTYPE: Dtype;

    /// How many rows there are.
    fn rows(&self) -> usize;
}

/// The memory of a device.
///
/// A backend may run ahead of its caller: its work is done when a method returns values
/// to the host, or [`wait`](Self::wait) returns.
pub trait Memory: Sync {
    /// Hidden states `[tokens, hidden]` between the blocks, and vectors as one row.
    type Hidden: Tensor;
    /// What the operations inside a block produce, `[tokens, channels]`.
    type Activation: Tensor;
    /// A source's weight `[out, in]`, in its own type and channel order. It may borrow the file.
    type Weight<'a>: Send + Sync;

    /// Whether tensors are in the host's memory.
    const ON_HOST: bool;

    /// The device for a person: `cpu (avx512, 2 threads)`.
    fn device(&self) -> String;
    /// Bytes that a batch's activations inside a block may take, counted as f32: enough that each
    /// operation fills the device. Results do not depend on it.
    fn batch_bytes(&self) -> usize;
    /// Bytes of hidden states that an evaluation may hold together. Results do not depend on it.
    fn stream_bytes(&self) -> usize;

    /// Copies a host matrix to the device.
    fn upload(&self, matrix: Matrix) -> Result<Self::Hidden>;
    /// Copies a host matrix to where the operations inside a block take it, rounded to their type.
    fn upload_activation(&self, matrix: Matrix) -> Result<Self::Activation>;
    /// Hidden states on the host.
    fn download(&self, x: &Self::Hidden) -> Result<Matrix>;
    /// An activation on the host.
    fn download_activation(&self, x: &Self::Activation) -> Result<Matrix>;
    /// Copies hidden states, offloaded or not; the copy is ready for use.
    fn duplicate(&self, x: &Self::Hidden) -> Result<Self::Hidden>;
    /// Brings a weight to the device, or only notes where it is. Safe to call from another thread than
    /// the one that computes.
    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<Self::Weight<'a>>;

    /// Announces how much memory a block's work takes next to the hidden states, before these are made.
    ///
    /// # Errors
    /// A machine error if there is not so much.
    fn reserve(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }
    /// Announces that `x` is not used for a while: a backend whose memory is short may move it to the
    /// host's.
    fn offload(&self, _x: &mut Self::Hidden) -> Result<()> {
        Ok(())
    }
    /// Undoes [`offload`](Self::offload). No other operation takes offloaded hidden states but
    /// [`duplicate`](Self::duplicate) and [`download`](Self::download).
    fn reload(&self, _x: &mut Self::Hidden) -> Result<()> {
        Ok(())
    }
    /// Frees what the backend keeps for reuse.
    fn trim(&self) {}
    /// Returns when all work is done.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    /// Most device memory in use so far; none where the device's memory is the host's.
    fn peak_bytes(&self) -> Option<u64> {
        None
    }
}
