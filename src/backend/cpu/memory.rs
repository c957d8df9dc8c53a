//! Activations in host memory.

use super::{Cpu, HostTensor};
use crate::Result;
use crate::backend::{Matrix, Memory};
use crate::checkpoint;
use crate::machine::hand_back;

impl Memory for Cpu {
    type Hidden = HostTensor;
    type Activation = HostTensor;
    type Weight<'a> = checkpoint::Tensor<'a>;

    const ON_HOST: bool = true;

    fn device(&self) -> String {
        let threads = rayon::current_num_threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.isa.name())
    }

    fn batch_bytes(&self) -> usize {
        // Small batches stay near the caches and map fewer fresh pages; threads need enough rows to share.
        (1 + rayon::current_num_threads()) * (16 << 20)
    }

    fn stream_bytes(&self) -> usize {
        1 << 30
    }

    fn upload(&self, matrix: Matrix) -> Result<HostTensor> {
        Ok(HostTensor::from_matrix(matrix))
    }

    fn upload_activation(&self, matrix: Matrix) -> Result<HostTensor> {
        self.upload(matrix)
    }

    fn download(&self, x: &HostTensor) -> Result<Matrix> {
        Ok(Matrix { rows: x.rows, columns: x.columns, data: x.values().to_vec() })
    }

    fn download_activation(&self, x: &HostTensor) -> Result<Matrix> {
        self.download(x)
    }

    fn duplicate(&self, x: &HostTensor) -> Result<HostTensor> {
        let mut copy = self.tensor(x.rows, x.columns);
        copy.data.copy_from_slice(&x.data);
        Ok(copy)
    }

    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<checkpoint::Tensor<'a>> {
        Ok(tensor)
    }

    fn trim(&self) {
        self.pool.clear();
        // The allocator would keep up to 256 MB of it next to Hessians, which have maps of their own.
        hand_back();
    }
}
