/*! Activations in host memory, and the buffers they are made from.

A block's activations have the same few sizes again and again. Fresh pages cost more than the
arithmetic on them (0.25 ms a megabyte to map and clear), so a dropped tensor's buffer goes back to
its backend's pool. */

use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Matrix, Tensor};
use crate::checkpoint::Dtype;

/// Buffers of dropped tensors.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<Vec<Vec<f32>>>,
}

impl Pool {
    /// A buffer of `len` values, which hold whatever was in them before.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, but not one that would waste more than it saves.
        let best = (0..free.len())
            .filter(|&index| (len..=2 * len).contains(&free[index].capacity()))
            .min_by_key(|&index| free[index].capacity());
        let mut buffer = best.map(|index| free.swap_remove(index)).unwrap_or_default();
        drop(free);
        buffer.resize(len, 0.0);
        buffer
    }

    fn put_back(&self, buffer: Vec<f32>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }

    /// Frees every buffer.
    pub(super) fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Activations `[rows, columns]`, row-major.
pub struct HostTensor {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Vec<f32>,
    /// Where the buffer came from and returns to. None for one that was allocated elsewhere: the
    /// pool would grow by each of them, since fewer are taken out than come.
    pool: Option<Arc<Pool>>,
}

impl HostTensor {
    /// A tensor whose values are still to be written: every operation writes all of its output.
    pub(super) fn unwritten(pool: &Arc<Pool>, rows: usize, columns: usize) -> Self {
        Self { rows, columns, data: pool.take(rows * columns), pool: Some(Arc::clone(pool)) }
    }

    pub(super) fn from_matrix(matrix: Matrix) -> Self {
        let Matrix { rows, columns, data } = matrix;
        Self { rows, columns, data, pool: None }
    }

    /// The values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.data
    }
}

impl Tensor for HostTensor {
    const DTYPE: Dtype = Dtype::F32;

    fn rows(&self) -> usize {
        self.rows
    }
}

impl Drop for HostTensor {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.put_back(std::mem::take(&mut self.data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_holds_what_was_taken_from_it_and_no_more() {
        let pool = Arc::new(Pool::default());
        for _ in 0..3 {
            drop(HostTensor::unwritten(&pool, 4, 8));
            drop(HostTensor::from_matrix(Matrix { rows: 4, columns: 8, data: vec![0.0; 32] }));
        }
        assert_eq!(pool.free.lock().unwrap().len(), 1);
    }
}
