//! Copies of hidden states, activations and weights to the device, within it and back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use half::f16;

use super::Cuda;
use super::gpu::Stream;
use super::tensor::{Activation, Hidden, HiddenValues, Home, Resident, Weight};
use crate::backend::{Matrix, Memory};
use crate::checkpoint;
use crate::{Error, Result};

/// A batch's activations inside a block, counted as f32: 16384 tokens of Llama-2-7B's widths, whose
/// products fill the largest devices.
const BATCH_BYTES: usize = 3_600_000_000;

impl Memory for Cuda {
    type Hidden = Hidden;
    type Activation = Activation;
    type Weight<'a> = Weight;

    const ON_HOST: bool = false;

    fn device(&self) -> String {
        format!("cuda:{} ({})", self.gpu.device.ordinal, self.gpu.device.name)
    }

    fn batch_bytes(&self) -> usize {
        BATCH_BYTES
    }

    fn stream_bytes(&self) -> usize {
        usize::try_from(self.gpu.limit_bytes() / 2).unwrap_or(usize::MAX).min(16 << 30)
    }

    fn upload(&self, matrix: Matrix) -> Result<Hidden> {
        let Matrix { rows, columns, data } = matrix;
        Ok(Hidden::new(rows, columns, self.gpu.upload(&data)?))
    }

    fn upload_activation(&self, matrix: Matrix) -> Result<Activation> {
        let Matrix { rows, columns, data } = matrix;
        let halves: Vec<u16> = data.into_iter().map(|x| f16::from_f32(x).to_bits()).collect();
        Ok(Activation::new(rows, columns, self.gpu.upload(&halves)?))
    }

    fn download(&self, x: &Hidden) -> Result<Matrix> {
        let Hidden { rows, columns, .. } = *x;
        let bytes = 4 * x.count();
        let data = match &x.values {
            HiddenValues::Resident(buffer) => buffer.download(0..bytes)?,
            HiddenValues::Offloaded(host) => bytemuck::cast_slice(host.as_slice()).to_vec(),
        };
        Ok(Matrix { rows, columns, data })
    }

    fn download_activation(&self, x: &Activation) -> Result<Matrix> {
        let Activation { rows, columns, .. } = *x;
        let halves = x.half().download::<u16>(0..2 * x.count())?;
        let data = halves.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect();
        Ok(Matrix { rows, columns, data })
    }

    fn duplicate(&self, x: &Hidden) -> Result<Hidden> {
        let bytes = 4 * x.count();
        let copy = self.gpu.alloc(bytes)?;
        match &x.values {
            HiddenValues::Resident(buffer) => copy.copy_from(buffer, bytes)?,
            HiddenValues::Offloaded(host) => copy.copy_all_up(0, host)?,
        }
        Ok(Hidden::new(x.rows, x.columns, copy))
    }

    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<Weight> {
        tensor.read_ahead();
        let (rows, columns) = (tensor.shape[0], tensor.shape[1..].iter().product());
        let data = Arc::new(self.gpu.alloc_on(Stream::Up, tensor.bytes.len())?);
        self.uploads
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .upload(tensor.bytes, &data)?;
        tensor.release();
        let weight = Weight { rows, columns, dtype: tensor.dtype, data };
        match self.convert(&weight, None, Stream::Up)? {
            None => Ok(weight),
            // The check on the host names the value.
            Some(_) => Err(tensor.check_finite(&|| Ok(())).err().unwrap_or_else(|| {
                Error::machine(format!("tensor `{}` changed on its way to the GPU", tensor.name))
            })),
        }
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        let limit = self.gpu.limit_bytes();
        if bytes > limit {
            return Err(Error::machine(format!(
                "{} has too little memory: a block's work takes about {bytes} bytes, {limit} may be used",
                self.gpu.device.name
            ))
            .hint("end what else uses the GPU, raise --gpu-memory, or run with --device cpu"));
        }
        self.offload_limit_bytes.store(limit - bytes, Ordering::Relaxed);
        Ok(())
    }

    fn offload(&self, x: &mut Hidden) -> Result<()> {
        let bytes = 4 * x.count();
        if matches!(x.home, Home::Undecided) {
            let limit = self.offload_limit_bytes.load(Ordering::Relaxed);
            let resident = Resident::take(bytes as u64, &self.offloaded_bytes, limit);
            x.home = resident.map_or(Home::Host, |resident| Home::Device { _resident: resident });
        }
        if matches!(x.home, Home::Host) {
            let host = self.gpu.pinned(bytes)?;
            let host = x.float().copy_down(0, host, bytes, Stream::Main)?.wait()?;
            x.values = HiddenValues::Offloaded(host);
        }
        Ok(())
    }

    fn reload(&self, x: &mut Hidden) -> Result<()> {
        if let HiddenValues::Offloaded(host) = &x.values {
            let buffer = self.gpu.alloc(4 * x.count())?;
            buffer.copy_all_up(0, host)?;
            x.values = HiddenValues::Resident(buffer);
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        self.gpu.wait(Stream::Main)
    }

    fn peak_bytes(&self) -> Option<u64> {
        Some(self.gpu.peak_bytes())
    }
}
