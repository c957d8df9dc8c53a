/*! How the calibration windows of a run are divided among its ranks, and how sums over them are made. */

use super::parts::SiteParts;
use crate::Result;
use crate::backend::{AccumulatedError, Backend};
use crate::network::CalibrationTokens;
use crate::ranks::{Chunks, Collectives, Step};

/// The ranks of a run and the windows of each.
#[derive(Clone, Copy)]
pub(super) struct Division<'a> {
    /// The ranks.
    pub(super) ranks: &'a dyn Collectives,
    /// The chunks of windows.
    pub(super) chunks: Chunks,
}

/// What a site's linears are quantized by: sums over the tokens that reach it.
pub(super) struct SiteSums<B: Backend> {
    /// How many tokens there are.
    pub(super) tokens: u64,
    /// `sum x^T x`.
    pub(super) gram: B::Gram,
    /// The accumulated error, where it is to be corrected.
    pub(super) correction: Option<AccumulatedError<B::CrossCovariance>>,
}

impl<'a> Division<'a> {
    /// The division of `windows`.
    pub(super) fn new(ranks: &'a dyn Collectives, windows: usize) -> Self {
        Self { ranks, chunks: Chunks::new(windows, ranks.ranks()) }
    }

    /// This rank's part of calibration windows of `seq_len` tokens.
    pub(super) fn windows<'t>(&self, tokens: &'t [u32], seq_len: usize) -> CalibrationTokens<'t> {
        CalibrationTokens { tokens, seq_len, chunks: self.chunks, rank: self.ranks.rank() }
    }

    /// The sums of some sites over all windows, each on the rank that owns it. `zeros` makes those of a site before the
    /// first token, and `sum` adds to all of them the windows of this rank's chunk at a position.
    pub(super) fn reduce<B: Backend>(
        &self,
        backend: &B,
        owners: &[usize],
        zeros: impl Fn(usize) -> Result<SiteSums<B>>,
        mut sum: impl FnMut(usize, &mut [SiteSums<B>]) -> Result<()>,
    ) -> Result<Vec<Option<SiteSums<B>>>> {
        let own = self.ranks.rank();
        let mut sums: Vec<Option<SiteSums<B>>> = owners.iter().map(|_| None).collect();
        let mut parts = Vec::new();
        for step in self.chunks.steps(own) {
            let chunk = match step {
                Step::Sum(at) => {
                    parts = (0..owners.len()).map(&zeros).collect::<Result<_>>()?;
                    sum(at, &mut parts)?;
                    continue;
                }
                Step::Add(chunk) => chunk,
            };
            let from = self.chunks.rank(chunk);
            // Those of this rank's chunk, if it is one.
            let parts = if from == own { std::mem::take(&mut parts) } else { Vec::new() };
            let mut parts = parts.into_iter();
            for (site, (sums, owner)) in sums.iter_mut().zip(owners).enumerate() {
                let part = match (parts.next(), *owner == own) {
                    (Some(part), true) => part,
                    (Some(part), false) => {
                        part.send(backend, *owner)?;
                        continue;
                    }
                    (None, true) => zeros(site)?.received(backend, from)?,
                    (None, false) => continue,
                };
                match sums {
                    None => *sums = Some(part),
                    Some(sums) => sums.add(backend, &part)?,
                }
            }
        }
        Ok(sums)
    }

    /// A site's sums on all ranks that quantize a part of it, where its owner has them.
    pub(super) fn spread<B: Backend>(
        &self,
        backend: &B,
        parts: &SiteParts,
        own: Option<SiteSums<B>>,
        zeros: impl Fn() -> Result<SiteSums<B>>,
    ) -> Result<Option<SiteSums<B>>> {
        let rank = self.ranks.rank();
        match own {
            Some(own) => {
                let mut others = parts.others().into_iter();
                others.try_for_each(|other| own.send(backend, other))?;
                Ok(Some(own))
            }
            None if parts.others().contains(&rank) => {
                zeros()?.received(backend, parts.owner()).map(Some)
            }
            None => Ok(None),
        }
    }

    /// The sum over all chunks of vectors of one length, of which this rank has those of its own chunks, in the order
    /// in which they are added.
    pub(super) fn reduce_vectors(&self, own: &[Vec<f64>]) -> Result<Vec<f64>> {
        let own: Vec<f64> = own.concat();
        let all = self.ranks.gather_all(bytemuck::cast_slice(&own).to_vec())?;
        let mut unread: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
        let mut sum: Vec<f64> = Vec::new();
        let mut left: Vec<usize> = (0..all.len()).map(|rank| self.chunks.own(rank).len()).collect();
        for chunk in self.chunks.order() {
            let rank = self.chunks.rank(chunk);
            let (bytes, after) = unread[rank].split_at(unread[rank].len() / left[rank]);
            unread[rank] = after;
            left[rank] -= 1;
            let values = bytes.as_chunks().0.iter().map(|bytes| f64::from_ne_bytes(*bytes));
            if sum.is_empty() {
                sum.extend(values);
            } else {
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(sum)
    }
}

impl<B: Backend> SiteSums<B> {
    fn add(&mut self, backend: &B, other: &Self) -> Result<()> {
        self.tokens += other.tokens;
        backend.join_gram(&mut self.gram, &other.gram)?;
        let (Some(own), Some(other)) = (&mut self.correction, &other.correction) else {
            return Ok(());
        };
        backend.join_cross_covariance(&mut own.cross, &other.cross)
    }

    fn send(&self, backend: &B, to: usize) -> Result<()> {
        backend.ranks().send(to, &self.tokens.to_le_bytes())?;
        backend.send_gram(to, &self.gram)?;
        match &self.correction {
            Some(error) => backend.send_cross_covariance(to, &error.cross),
            None => Ok(()),
        }
    }

    /// The sums that another rank sends, in the place of zeros.
    fn received(mut self, backend: &B, from: usize) -> Result<Self> {
        let mut tokens = [0; 8];
        backend.ranks().receive(from, &mut tokens)?;
        self.tokens = u64::from_le_bytes(tokens);
        backend.receive_gram(from, &mut self.gram)?;
        if let Some(error) = &mut self.correction {
            backend.receive_cross_covariance(from, &mut error.cross)?;
        }
        Ok(self)
    }
}
