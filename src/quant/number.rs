/*! How numbers are held: what a code stands for, how many codes share a scale, and what a scale is.

These types are the only description of it, for the plan, the checkpoint and every backend: [`LinearFormat`] for
a linear's weights, [`RowFormat`] for a site's activations. */

use serde::{Deserialize, Serialize};

use super::codebook::Codebook;
pub use super::scale::ScaleFormat;
use super::scale::{ScaleGrid, power_below};

/// A group of codes that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumberFormat {
    /// Bits of a code: 2, 3, 4 or 8; 16 leaves the numbers in floating point.
    pub bits: u8,
    /// What codes stand for.
    pub codebook: Codebook,
    /// Channels that share a scale.
    pub group_size: usize,
    /// What the scale is.
    pub scale: ScaleFormat,
}

impl NumberFormat {
    /// The least and the greatest number of a group, in units of the scale.
    #[inline(always)]
    pub fn limits(&self) -> (f32, f32) {
        self.codebook.limits(self.bits)
    }

    /// Whether scales have a sign. Scales of 8-bit codes have none, since the range is symmetric.
    #[inline(always)]
    pub fn has_signs(&self) -> bool {
        self.scale.signed && self.codebook.is_int() && self.bits < 8
    }

    /// The magnitude that a group's (clipped) absmax becomes, in units of the scale before it is rounded to
    /// its grid. With power-of-two scales it is the greatest power of two among the numbers (OCP Microscaling
    /// Formats 1.0, section 6.3).
    #[inline(always)]
    pub fn top(&self) -> f32 {
        let (least, greatest) = self.limits();
        match self.scale.grid {
            ScaleGrid::PowerOfTwo => power_below(greatest),
            _ if self.has_signs() => -least,
            _ => greatest,
        }
    }
}

/// How the outlier channels are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutlierFormat {
    /// INT8 codes, one scale a token (activations) or a row (weights).
    Int8,
    /// FP8 (E4M3) times one scale a token (activations) or a row (weights).
    Fp8,
    /// Values rounded to f16.
    F16,
}

/// A row of weights or of activations in a site's channel order: groups of codes, then the outlier
/// channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowFormat {
    /// The numbers of the groups.
    pub numbers: NumberFormat,
    /// Groups in a row.
    pub groups: usize,
    /// Outlier channels; 0 for none.
    pub outlier_channels: usize,
    /// How outlier channels are stored.
    pub outlier_format: OutlierFormat,
}

impl RowFormat {
    /// Channels before the outliers, padding included.
    pub fn grouped_channels(&self) -> usize {
        self.groups * self.numbers.group_size
    }

    /// Channels with padding and outliers.
    pub fn width(&self) -> usize {
        self.grouped_channels() + self.outlier_channels
    }

    /// The format of weights that rows of this format are multiplied with: the same groups, kind of scale and
    /// outlier channels.
    pub fn weights(&self, bits: u8, codebook: Codebook, rows_per_scale: usize) -> LinearFormat {
        let numbers = NumberFormat { bits, codebook, ..self.numbers };
        LinearFormat { row: Self { numbers, ..*self }, rows_per_scale }
    }

    /// The outliers' format; none without outlier channels.
    pub fn outliers(&self) -> Option<OutlierFormat> {
        (self.outlier_channels > 0).then_some(self.outlier_format)
    }
}

/// The weights of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearFormat {
    /// One output row.
    pub row: RowFormat,
    /// Adjacent rows that share a group's scale: 1, or 2 as in the reference's kernels.
    pub rows_per_scale: usize,
}

impl LinearFormat {
    /// Rows of scales that `rows` output rows have.
    pub fn scale_rows(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows_per_scale)
    }
}
