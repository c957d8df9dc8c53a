/*! How bits were allocated, for reports. */

use serde::Serialize;

use crate::checkpoint::plan::BlockPlan;

/// A plan's size and what it may be expected to cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Expected {
    /// Average bits a weight of the linears.
    pub bits_per_weight: f64,
    /// Nats that the loss of a token may be expected to grow by: about the growth of ln perplexity.
    pub nats: f64,
}

/// How many linears have a width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WidthShare {
    /// The width.
    pub bits: u8,
    /// Linears of that width.
    pub linears: usize,
    /// Their weights.
    pub weights: u64,
}

impl WidthShare {
    /// The widths of a plan, ascending.
    pub(super) fn of(blocks: &[BlockPlan]) -> Vec<Self> {
        let mut shares: Vec<Self> = Vec::new();
        for site in blocks.iter().flatten() {
            for linear in &site.linears {
                let weights = (linear.rows * site.channels) as u64;
                match shares.iter_mut().find(|share| share.bits == linear.bits) {
                    Some(share) => {
                        share.linears += 1;
                        share.weights += weights;
                    }
                    None => shares.push(Self { bits: linear.bits, linears: 1, weights }),
                }
            }
        }
        shares.sort_by_key(|share| share.bits);
        shares
    }
}

/// How many sites have an outlier count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OutlierShare {
    /// The outlier count.
    pub outliers: usize,
    /// Sites with so many.
    pub sites: usize,
}

impl OutlierShare {
    /// The outlier counts of a plan, ascending.
    pub(super) fn of(blocks: &[BlockPlan]) -> Vec<Self> {
        let mut shares: Vec<Self> = Vec::new();
        for site in blocks.iter().flatten() {
            match shares.iter_mut().find(|share| share.outliers == site.outlier_channels) {
                Some(share) => share.sites += 1,
                None => shares.push(Self { outliers: site.outlier_channels, sites: 1 }),
            }
        }
        shares.sort_by_key(|share| share.outliers);
        shares
    }
}

/// A linear and its width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Favoured {
    /// Its name.
    pub name: String,
    /// Its width.
    pub bits: u8,
    /// Nats it would have cost at the recipe's width.
    pub nats: f64,
}

/// What the solver decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Allocated {
    /// Average bits asked for, if the target was one of bits.
    pub target_bits: Option<f64>,
    /// Bytes asked for, if the target was one of size.
    pub target_bytes: Option<u64>,
    /// Bytes of the planned checkpoint's tensors, files next to them and headers at most.
    pub checkpoint_bytes: u64,
    /// The plan.
    pub planned: Expected,
    /// The recipe's width and outlier count everywhere.
    pub uniform: Expected,
    /// The least that any plan within the target could be expected to cost: what the solver proved.
    pub least_nats: f64,
    /// Linears by width, ascending.
    pub widths: Vec<WidthShare>,
    /// Sites by outlier count, ascending.
    pub outliers: Vec<OutlierShare>,
    /// Linears that got the most bits, the most sensitive first.
    pub favoured: Vec<Favoured>,
}
