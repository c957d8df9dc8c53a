/*! What cost accuracy and was not asked for, collected over all sites: one warning for each kind, with how often
it happened and where first. */

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::progress::Progress;

/// A kind of fallback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Fallback {
    /// Too few tokens came to an expert for GPTQ.
    FewTokens {
        /// What it is to have (`expert_tokens`).
        wanted: usize,
    },
    /// Fewer tokens than channels: the accumulated error is not corrected.
    NoCorrection,
    /// No Cholesky factor at any damping.
    NoFactor,
    /// A Cholesky factor at a higher damping only.
    Damping,
}

/// What happened so far, a kind after the other.
#[derive(Default)]
pub(super) struct Fallbacks(Mutex<Vec<Seen>>);

struct Seen {
    kind: Fallback,
    sites: usize,
    /// The first site, and what was found there.
    first: String,
}

impl Fallbacks {
    /// Notes a fallback at `site`, where `found` says what in a few words.
    pub(super) fn note(&self, kind: Fallback, site: &str, found: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.iter_mut().find(|seen| seen.kind == kind) {
            Some(seen) => seen.sites += 1,
            None => all.push(Seen { kind, sites: 1, first: format!("{site}: {found}") }),
        }
    }

    /// Warns of each kind, and forgets it.
    pub(super) fn warn(&self, progress: &dyn Progress) {
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        all.iter().for_each(|seen| progress.warn(&seen.sentence()));
    }
}

impl Seen {
    fn sentence(&self) -> String {
        let Self { kind, sites, first } = self;
        let (one, several) = match kind {
            Fallback::FewTokens { .. } => ("expert", "experts"),
            _ => ("site", "sites"),
        };
        let what = match kind {
            Fallback::FewTokens { wanted } => format!(
                "rounded to nearest, since fewer than {wanted} calibration tokens (`expert_tokens`) came to \
                 them: give more with --samples"
            ),
            Fallback::NoCorrection => "without a correction of the accumulated error of their inputs, since there are fewer \
                                calibration tokens than channels: give more with --samples or --seq-len"
                .to_owned(),
            Fallback::NoFactor => "rounded to nearest instead of GPTQ, since their Hessians have no Cholesky \
                                   factor at any damping"
                .to_owned(),
            Fallback::Damping => {
                "with a higher damping than asked for, without which their Hessians have no Cholesky factor"
                    .to_owned()
            }
        };
        let noun = if *sites == 1 { one } else { several };
        let where_first = if *sites == 1 { "it is" } else { "the first is" };
        format!("{sites} {noun} {what}; {where_first} {first}")
    }
}

#[cfg(test)]
#[path = "fallbacks_tests.rs"]
mod tests;
