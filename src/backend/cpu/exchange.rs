//! Sums and quantized linears as bytes.

use std::ops::Range;
use std::sync::Arc;

use super::{Cpu, Hessian};
use crate::Result;
use crate::backend::{Exchange, Matrix};
use crate::checkpoint::linear_message::{LinearMessage, to_message};
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;
use crate::ranks::Collectives;

/// Values of a matrix that are sent together.
const PIECE: usize = 1 << 20;

impl Exchange for Cpu {
    fn ranks(&self) -> &dyn Collectives {
        &*self.ranks
    }

    fn join(&mut self, ranks: Arc<dyn Collectives>) -> Result<()> {
        self.ranks = ranks;
        Ok(())
    }

    fn send_gram(&self, to: usize, gram: &Hessian) -> Result<()> {
        // The lower triangle alone: rows that are sent together are as many as fill a piece.
        for rows in pieces_of_rows(gram.n) {
            let lower = rows.flat_map(|i| &gram.lower[i * gram.n..=i * gram.n + i]);
            let piece: Vec<f32> = lower.copied().collect();
            self.ranks.send(to, bytemuck::cast_slice(&piece))?;
        }
        Ok(())
    }

    fn receive_gram(&self, from: usize, gram: &mut Hessian) -> Result<()> {
        let n = gram.n;
        for rows in pieces_of_rows(n) {
            let mut piece = vec![0.0f32; rows.clone().map(|i| i + 1).sum()];
            self.ranks.receive(from, bytemuck::cast_slice_mut(&mut piece))?;
            let mut rest = &piece[..];
            for i in rows {
                let (row, after) = rest.split_at(i + 1);
                gram.lower[i * n..=i * n + i].copy_from_slice(row);
                rest = after;
            }
        }
        Ok(())
    }

    fn send_cross_covariance(&self, to: usize, cross: &Matrix) -> Result<()> {
        let mut pieces = cross.data.chunks(PIECE);
        pieces.try_for_each(|piece| self.ranks.send(to, bytemuck::cast_slice(piece)))
    }

    fn receive_cross_covariance(&self, from: usize, cross: &mut Matrix) -> Result<()> {
        let mut pieces = cross.data.chunks_mut(PIECE);
        pieces.try_for_each(|piece| self.ranks.receive(from, bytemuck::cast_slice_mut(piece)))
    }

    fn broadcast_quantized(
        &self,
        root: usize,
        own: Option<QuantizedLinear>,
        (rows, format): (usize, LinearFormat),
    ) -> Result<QuantizedLinear> {
        let message = own.as_ref().map_or_else(Vec::new, to_message);
        let bytes = &self.ranks.broadcast(root, message)?;
        own.map_or_else(|| LinearMessage { rows, format, bytes }.linear(), Ok)
    }
}

/// Rows of the lower triangle of `[n, n]` that are sent together.
fn pieces_of_rows(n: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = (PIECE / n.max(1)).max(1);
    (0..n).step_by(rows).map(move |first| first..(first + rows).min(n))
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
