/*! How large the channels of a site are: what makes it easy or hard to quantize. */

use serde::Serialize;

use crate::checkpoint::plan::{BlockPlan, SitePlan};

/// How many linears' sites are shown.
const WORST: usize = 8;

/// Shares of a site's channels, by size, at which the distribution is kept: close together at the end, where outliers are.
const SHARES: [f64; 19] = [
    0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99,
    0.995, 1.0,
];

/// The site that a linear reads, and how large its channels are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SiteChannels {
    /// The linear.
    pub linear: String,
    /// The site's name.
    pub site: String,
    /// Channels.
    pub channels: usize,
    /// Of them outliers.
    pub outliers: usize,
    /// Shares of the channels, from the smallest channel on.
    pub shares: Vec<f64>,
    /// The root mean square over the calibration tokens of the channel at each share, in units of the root mean square of the site.
    pub rms: Vec<f64>,
}

/// The root mean squares of [`SiteChannels`], by the energies of a site's channels; none of a site that saw nothing.
pub(super) fn distribution(energies: &[f64]) -> Vec<f64> {
    let mean = energies.iter().sum::<f64>() / energies.len() as f64;
    if !mean.is_normal() {
        return Vec::new();
    }
    let mut sorted = energies.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = (sorted.len() - 1) as f64;
    SHARES.iter().map(|share| (sorted[(share * last).round() as usize] / mean).sqrt()).collect()
}

/// The sites of the worst linears, each once. `distributions` are those of every block's sites, and `blocks` have the errors.
pub(super) fn worst_sites(
    blocks: &[BlockPlan],
    distributions: &[Vec<Vec<f64>>],
) -> Vec<SiteChannels> {
    let sites = blocks.iter().zip(distributions).flat_map(|(block, known)| block.iter().zip(known));
    let worst_of = |site: &SitePlan| {
        let errors = site.linears.iter().filter_map(|linear| Some((linear.error?, &linear.name)));
        errors.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(error, name)| (error, name.clone()))
    };
    let mut found: Vec<_> = sites
        .filter(|(_, rms)| !rms.is_empty())
        .filter_map(|(site, rms)| worst_of(site).map(|worst| (worst, site, rms)))
        .collect();
    found.sort_by(|a, b| b.0.0.total_cmp(&a.0.0));
    let shown = found.into_iter().take(WORST).map(|((_, linear), site, rms)| SiteChannels {
        linear,
        site: site.name.clone(),
        channels: site.channels,
        outliers: site.outlier_channels,
        shares: SHARES.to_vec(),
        rms: rms.clone(),
    });
    shown.collect()
}

#[cfg(test)]
#[path = "channels_tests.rs"]
mod tests;
