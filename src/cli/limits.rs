/*! Limits on perplexity, which turn a measurement into a check (exit code 1). */

use clap::Args;

use super::values;
use crate::eval::Limits;
use crate::{Error, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct MaxPerplexity {
    /// Fail (exit code 1) if the perplexity exceeds X
    #[arg(long, value_name = "X", value_parser = values::perplexity)]
    pub(crate) max_ppl: Option<f64>,
}

impl MaxPerplexity {
    /// Fails if `measured` is above the limit, or is not a number.
    pub(crate) fn check(&self, measured: f64) -> Result<()> {
        match self.max_ppl {
            Some(most) if measured.is_nan() || measured > most => {
                Err(Error::check(format!("perplexity {measured:.4} exceeds --max-ppl {most}")))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct MaxIncrease {
    /// Fail (exit code 1) if the perplexity rises by more than this ratio; 0.1 is 10 %
    #[arg(long, value_name = "R", value_parser = values::increase)]
    pub(crate) max_ppl_increase: Option<f64>,
}

impl MaxIncrease {
    /// Fails if `after` is above `before` by more than the limit, or either is not a number.
    pub(crate) fn check(&self, before: f64, after: f64) -> Result<()> {
        let increase = after / before - 1.0;
        match self.max_ppl_increase {
            Some(most) if increase.is_nan() || increase > most => Err(Error::check(format!(
                "perplexity rose from {before:.4} to {after:.4}, by {:.2} %, which exceeds \
                 --max-ppl-increase {most} ({:.2} %)",
                increase * 100.0,
                most * 100.0
            ))),
            _ => Ok(()),
        }
    }
}

/// Both limits, as the library takes them.
pub(crate) fn limits(perplexity: &MaxPerplexity, increase: &MaxIncrease) -> Limits {
    Limits { max_ppl: perplexity.max_ppl, max_ppl_increase: increase.max_ppl_increase }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn a_limit_holds_at_its_value_and_fails_above_it() {
        let limit = MaxPerplexity { max_ppl: Some(20.0) };
        assert!(limit.check(20.0).is_ok());
        assert_eq!(limit.check(20.1).unwrap_err().kind(), Kind::Check);
        assert!(limit.check(f64::NAN).is_err());
        assert!(MaxPerplexity { max_ppl: None }.check(f64::NAN).is_ok());
    }

    #[test]
    fn an_increase_is_relative() {
        let limit = MaxIncrease { max_ppl_increase: Some(0.25) };
        assert!(limit.check(20.0, 25.0).is_ok());
        let error = limit.check(20.0, 26.0).unwrap_err();
        assert_eq!(
            error.message(),
            "perplexity rose from 20.0000 to 26.0000, by 30.00 %, which exceeds \
             --max-ppl-increase 0.25 (25.00 %)"
        );
        assert!(limit.check(20.0, f64::INFINITY).is_err());
    }
}
