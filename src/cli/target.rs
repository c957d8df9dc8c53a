/*! Flags that say how large the result may be, and what may be chosen to get there. */

use clap::Args;

use super::values;
use crate::pipeline::allocate::{Allocating, Target};

/// Outlier counts that are measured and tried in addition to the recipe's.
pub(crate) const OUTLIER_COUNTS: [usize; 4] = [0, 32, 64, 128];

#[derive(Args, Debug)]
#[command(next_help_heading = "Allocation")]
pub(crate) struct TargetFlags {
    /// Give each linear the width, and each site the outlier count, that cost least within this
    /// average of bits a weight, such as 4.5, with scales, outliers and orders
    #[arg(long, value_name = "BITS", value_parser = values::target_bits, group = "target")]
    target_bits: Option<f64>,
    /// The same within this size of the whole checkpoint, such as 120MB, 3.5GB or 3GiB
    #[arg(long, value_name = "SIZE", value_parser = values::bytes, group = "target")]
    target_size: Option<u64>,
    /// Widths to choose among, in bits; 16 leaves a linear as it is [default: 2,3,4,8]
    #[arg(
        long,
        value_name = "BITS,...",
        value_delimiter = ',',
        value_parser = values::width,
        requires = "target"
    )]
    widths: Vec<u8>,
}

impl TargetFlags {
    /// What the flags ask for, if they ask for a target; `outlier_counts` are those to choose among.
    pub(crate) fn allocating(&self, outlier_counts: Option<Vec<usize>>) -> Option<Allocating> {
        let target = match (self.target_bits, self.target_size) {
            (Some(bits), _) => Target::Bits(bits),
            (None, Some(bytes)) => Target::Bytes(bytes),
            (None, None) => return None,
        };
        let widths = if self.widths.is_empty() { vec![2, 3, 4, 8] } else { self.widths.clone() };
        Some(Allocating { target, widths, outlier_counts })
    }
}
