//! Sums and quantized linears, from one GPU to another: through NCCL, or on request through the hosts' memory.

use std::sync::Arc;

use super::Cuda;
use super::gpu::Buffer;
use super::nccl::Communicator;
use super::tensor::{Codes, CrossCovariance, DeviceLinear, Hessian};
use crate::Result;
use crate::backend::Exchange;
use crate::checkpoint::linear_message::{LinearMessage, to_message};
use crate::quant::number::LinearFormat;
use crate::ranks::Collectives;

/// The environment variable that has GPUs exchange through the hosts' memory.
pub const NCCL_VARIABLE: &str = "ATOM_NCCL";

/// Bytes that go through the host's memory together.
const PIECE: usize = 64 << 20;

impl Exchange for Cuda {
    fn ranks(&self) -> &dyn Collectives {
        &*self.ranks
    }

    fn join(&mut self, ranks: Arc<dyn Collectives>) -> Result<()> {
        let through_hosts = std::env::var_os(NCCL_VARIABLE).is_some_and(|value| value == "0");
        if ranks.ranks() > 1 && !through_hosts {
            self.communicator = Some(Communicator::connect(&self.gpu, &*ranks)?);
        }
        self.ranks = ranks;
        Ok(())
    }

    fn send_gram(&self, to: usize, gram: &Hessian) -> Result<()> {
        self.send(to, &gram.data, 4 * gram.n * gram.n)
    }

    fn receive_gram(&self, from: usize, gram: &mut Hessian) -> Result<()> {
        self.receive(from, &gram.data, 4 * gram.n * gram.n)
    }

    fn send_cross_covariance(&self, to: usize, cross: &CrossCovariance) -> Result<()> {
        self.send(to, &cross.data, 4 * cross.rows * cross.columns)
    }

    fn receive_cross_covariance(&self, from: usize, cross: &mut CrossCovariance) -> Result<()> {
        self.receive(from, &cross.data, 4 * cross.rows * cross.columns)
    }

    fn broadcast_quantized(
        &self,
        root: usize,
        own: Option<DeviceLinear>,
        (rows, format): (usize, LinearFormat),
    ) -> Result<DeviceLinear> {
        let Some(communicator) = &self.communicator else {
            let message = match &own {
                None => Vec::new(),
                Some(own) => to_message(&self.fetch(own.same())?),
            };
            let message =
                LinearMessage { rows, format, bytes: &self.ranks.broadcast(root, message)? };
            return match own {
                Some(own) => Ok(own),
                None => self.restore(message.linear()?),
            };
        };
        if let Some(own) = own {
            broadcast_codes(communicator, root, &own.shared, LinearPart::of(&own))?;
            return Ok(own);
        }
        let row = format.row;
        let mut codes = Codes {
            codes: self.gpu.alloc(rows * row.grouped_channels())?,
            scales: self.gpu.alloc(4 * format.scale_rows(rows) * row.groups)?,
            outliers: self.outliers(&row, rows)?,
            ready: self.gpu.mark()?,
        };
        let part = LinearPart { format, first_row: 0, rows };
        broadcast_codes(communicator, root, &codes, part)?;
        codes.ready = self.gpu.mark()?;
        Ok(DeviceLinear { format, first_row: 0, rows, shared: Arc::new(codes), lost: None })
    }
}

/// The rows of a linear among some codes.
#[derive(Clone, Copy)]
struct LinearPart {
    format: LinearFormat,
    first_row: usize,
    rows: usize,
}

impl LinearPart {
    fn of(linear: &DeviceLinear) -> Self {
        let DeviceLinear { format, first_row, rows, .. } = *linear;
        Self { format, first_row, rows }
    }
}

/// Sends a linear's part of the codes of rank `root` to the others, who have room for it.
fn broadcast_codes(
    communicator: &Communicator,
    root: usize,
    codes: &Codes,
    part: LinearPart,
) -> Result<()> {
    let LinearPart { format, first_row, rows } = part;
    let Codes { codes, scales, outliers, .. } = codes;
    let broadcast = |buffer: &Buffer, first: usize, row_bytes: usize, rows: usize| {
        communicator.broadcast(root, buffer, first * row_bytes, rows * row_bytes)
    };
    let row = format.row;
    broadcast(codes, first_row, row.grouped_channels(), rows)?;
    let first_scale = first_row / format.rows_per_scale;
    broadcast(scales, first_scale, 4 * row.groups, format.scale_rows(rows))?;
    if let Some(codes) = &outliers.codes {
        broadcast(codes, first_row, outliers.padded(), rows)?;
    }
    if let Some(scales) = &outliers.scales {
        broadcast(scales, first_row, 4, rows)?;
    }
    if let Some(values) = &outliers.values {
        broadcast(values, first_row, 4 * outliers.channels, rows)?;
    }
    Ok(())
}

impl Cuda {
    /// Sends the first bytes of a buffer.
    fn send(&self, to: usize, from: &Buffer, bytes: usize) -> Result<()> {
        if let Some(communicator) = &self.communicator {
            return communicator.send(to, from, bytes);
        }
        for first in (0..bytes).step_by(PIECE) {
            self.ranks.send(to, &from.download::<u8>(first..(first + PIECE).min(bytes))?)?;
        }
        Ok(())
    }

    /// Overwrites the first bytes of a buffer.
    fn receive(&self, from: usize, to: &Buffer, bytes: usize) -> Result<()> {
        if let Some(communicator) = &self.communicator {
            return communicator.receive(from, to, bytes);
        }
        for first in (0..bytes).step_by(PIECE) {
            let mut piece = vec![0u8; PIECE.min(bytes - first)];
            self.ranks.receive(from, &mut piece)?;
            to.write_at(first, &piece)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
