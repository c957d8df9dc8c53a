/*! The powers of two that scales of E4M3 are multiplied with: one for a site's activation, one for the weights of all
its linears, since engines fuse those (q, k and v; gate and up).

E4M3 has 15 powers of two at full precision. The window is put so that its top is above the greatest scale there will be;
what lies far below has fewer bits, and what lies above saturates. */

use crate::Result;
use crate::checkpoint::Tensors;
use crate::checkpoint::plan::{BlockPlan, SitePlan};
use crate::progress::Progress;
use crate::quant::float::E4M3;
use crate::quant::ranges::E4M3_EXPONENTS;
use crate::quant::scale::ScaleGrid;

/// What GPTQ may add to the greatest weight.
const WEIGHT_MARGIN: f64 = 2.0;

/// The greatest magnitude of an activation, over the root mean square of its loudest channel: values that stand out in
/// one token of 2048 have 45 of it.
const PEAK: f64 = 64.0;

/// The plan of a block with the exponents that it leaves open. `energies` are those of its sites over `tokens` tokens,
/// `tensors` the source's.
///
/// # Errors
/// What the source cannot be read for.
pub(super) fn with_exponents(
    plan: &[SitePlan],
    tensors: &dyn Tensors,
    energies: &[Vec<f64>],
    tokens: usize,
    progress: &dyn Progress,
) -> Result<BlockPlan> {
    let complete = |(site, energy): (&SitePlan, &Vec<f64>)| {
        let mut site = site.clone();
        if site.scales == ScaleGrid::E4m3 {
            if site.act_exponent.is_none() && site.bits < 16 {
                let loudest = energy.iter().copied().fold(0.0, f64::max);
                let peak = PEAK * (loudest / tokens.max(1) as f64).sqrt();
                let numbers = site.row().numbers;
                site.act_exponent = Some(exponent(peak * f64::from(site.clip / numbers.top())));
            }
            if site.weight_exponent.is_none() {
                site.weight_exponent =
                    Some(exponent(WEIGHT_MARGIN * greatest_scale(&site, tensors, progress)?));
            }
        }
        Ok(site)
    };
    plan.iter().zip(energies).map(complete).collect()
}

/// The greatest scale that the site's linears have when they are rounded.
fn greatest_scale(site: &SitePlan, tensors: &dyn Tensors, progress: &dyn Progress) -> Result<f64> {
    let mut greatest = 0.0f64;
    for linear in site.linears.iter().filter(|linear| linear.bits < 16) {
        let numbers = site.weights(linear).row.numbers;
        let absmax = tensors
            .tensor(&format!("{}.weight", linear.name))?
            .absmax(&|| progress.check_stop())?;
        greatest = greatest.max(f64::from(absmax * linear.clip / numbers.top()));
    }
    Ok(greatest)
}

/// The least exponent whose greatest number is not below `greatest`.
fn exponent(greatest: f64) -> i8 {
    let fits = |exponent: &i8| f64::from(E4M3.highest) * 2f64.powi((*exponent).into()) >= greatest;
    let mut exponents = (i8::MIN..=i8::MAX).filter(|exponent| E4M3_EXPONENTS.holds(*exponent));
    let last = exponents.clone().next_back().expect("the range is not empty");
    exponents.find(fits).unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_ends_above_the_greatest_scale() {
        assert_eq!(exponent(448.0), 0);
        assert_eq!(exponent(448.1), 1);
        assert_eq!(exponent(1.75), -8);
        assert_eq!(exponent(0.0), -15);
        assert_eq!(exponent(1e9), 7);
    }
}
