/*! Verification of an Atom checkpoint: that every byte is what was written and means something, that the device
computes with it what the CPU's integer path does, then what it costs in perplexity, on the integer path. */

use serde::Serialize;

use super::integrity::{files, tensor_checks};
use super::kernels::kernel_checks;
use super::perplexity::PerplexityOutcome;
use super::{atom_perplexity, perplexity_of};
use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::{AtomCheckpoint, Manifest};
use crate::model::{Architecture, read_manifest};
use crate::network::{Model, caution, check_codebook};
use crate::progress::Progress;
use crate::text::Evaluation;

/// One line of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it held.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

/// The result of `atom verify`.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyOutcome {
    /// Name of the checkpoint.
    pub model: String,
    /// Whether every check held.
    pub ok: bool,
    /// Every check.
    pub checks: Vec<Check>,
    /// Of the checkpoint, if it was measured.
    pub perplexity: Option<f64>,
    /// Of the reference, if there is one.
    pub reference_perplexity: Option<f64>,
    /// `perplexity / reference_perplexity - 1`.
    pub increase: Option<f64>,
    /// Why the device's kernels were not compared with the CPU's integer path, where they were not.
    pub kernels_unchecked: Option<String>,
    /// What it ran on.
    pub device: String,
}

/// Whether the device's kernels are compared with the CPU's integer path.
pub enum KernelCheck {
    /// On these windows.
    On(Evaluation),
    /// No, and why.
    Off(String),
}

/// Limits that make an evaluation a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Highest perplexity.
    pub max_ppl: Option<f64>,
    /// Highest relative increase over the reference, 0.1 for 10 %.
    pub max_ppl_increase: Option<f64>,
}

/// What is verified, and how far.
pub struct Verification<'a> {
    /// The checkpoint.
    pub checkpoint: &'a AtomCheckpoint,
    /// Whether kernels are compared.
    pub kernels: &'a KernelCheck,
    /// The text on which perplexity is measured, if it is.
    pub evaluation: Option<&'a Evaluation>,
    /// The model that perplexity is compared with, if there is one.
    pub reference: Option<&'a Model>,
    /// What perplexity is held against.
    pub limits: Limits,
}

/// Verifies a checkpoint: integrity, the device's kernels, then its perplexity compared with that of the reference.
pub fn verify<B: Backend>(
    backend: &B,
    verification: &Verification<'_>,
    progress: &dyn Progress,
) -> Result<VerifyOutcome> {
    let checkpoint = verification.checkpoint;
    let mut checks = vec![check("files", files(checkpoint))];
    let intact = checks[0].ok;
    let architecture = match Architecture::read(checkpoint.config(), &checkpoint.config_file()) {
        Ok(architecture) => architecture,
        Err(error) if intact => return Err(error),
        // A changed config.json is a failed check, whatever else it is.
        Err(error) => {
            checks.push(check("config", Err::<String, _>(error)));
            return Ok(unmeasured(checkpoint, backend, checks));
        }
    };
    verification.check_texts(intact, progress)?;
    let seq_len = verification.evaluation.map_or(0, |evaluation| evaluation.seq_len);
    caution(checkpoint, &architecture, seq_len, progress);
    let manifest = read_manifest(checkpoint, &architecture);
    let planned = manifest.as_ref().map(|Manifest { blocks, .. }| {
        let sites = blocks.iter().flatten().count();
        format!("{} blocks, {sites} sites, as config.json has them", blocks.len())
    });
    checks.push(check("plan", planned));
    let manifest = manifest.ok();
    if let Some(manifest) = &manifest {
        checks.extend(tensor_checks(checkpoint, &architecture, manifest, progress));
    }
    progress.check_stop()?;

    // What a damaged checkpoint computes says nothing.
    let sound = manifest.filter(|_| checks.iter().all(|check| check.ok));
    let mut outcome = unmeasured(checkpoint, backend, checks);
    verification.compare_kernels(backend, sound.as_ref(), &mut outcome, progress)?;
    if sound.is_some() {
        verification.measure_perplexity(backend, &mut outcome, progress)?;
    }
    checkpoint.check_unchanged()?;
    Ok(outcome)
}

impl Verification<'_> {
    /// Finds out that there is no tokenizer for a text, and where the files are `intact` that a text is too short, before
    /// gigabytes are hashed. What a changed tokenizer makes of a text says nothing.
    fn check_texts(&self, intact: bool, progress: &dyn Progress) -> Result<()> {
        let of_kernels = match self.kernels {
            KernelCheck::On(text) => Some(text),
            KernelCheck::Off(_) => None,
        };
        for text in self.evaluation.into_iter().chain(of_kernels) {
            let tokenizer = self.checkpoint.tokenizer()?;
            if intact {
                text.tokens(&tokenizer, &self.checkpoint.tokenizer_path(), progress)?;
            }
        }
        Ok(())
    }

    /// Adds the checks of the kernels, or why there are none, to the outcome of a checkpoint that is `sound` with this
    /// manifest.
    fn compare_kernels<B: Backend>(
        &self,
        backend: &B,
        sound: Option<&Manifest>,
        outcome: &mut VerifyOutcome,
        progress: &dyn Progress,
    ) -> Result<()> {
        let why = match (self.kernels, sound) {
            (KernelCheck::Off(why), _) => why.clone(),
            (KernelCheck::On(_), None) => "the checkpoint is not sound".to_owned(),
            (KernelCheck::On(text), Some(manifest)) => {
                match check_codebook(backend, &manifest.blocks) {
                    Ok(()) => {
                        outcome.add(kernel_checks(backend, self.checkpoint, text, progress)?);
                        return Ok(());
                    }
                    Err(why) => why.to_string(),
                }
            }
        };
        outcome.kernels_unchecked = Some(why);
        Ok(())
    }

    /// Adds perplexity and its checks to the outcome, where a text is given.
    fn measure_perplexity<B: Backend>(
        &self,
        backend: &B,
        outcome: &mut VerifyOutcome,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Some(evaluation) = self.evaluation else { return Ok(()) };
        let measured = atom_perplexity(backend, self.checkpoint, evaluation, progress)?;
        outcome.perplexity = Some(measured.perplexity);
        if let Some(reference) = self.reference {
            let reference = perplexity_of(backend, reference, evaluation, progress)?;
            outcome.reference_perplexity = Some(reference.perplexity);
            outcome.increase = Some(measured.perplexity / reference.perplexity - 1.0);
        }
        outcome.add(perplexity_checks(&measured, outcome, self.limits));
        Ok(())
    }
}

impl VerifyOutcome {
    fn add(&mut self, checks: Vec<Check>) {
        self.checks.extend(checks);
        self.ok = self.checks.iter().all(|check| check.ok);
    }
}

/// The outcome of these checks alone.
fn unmeasured<B: Backend>(
    checkpoint: &AtomCheckpoint,
    backend: &B,
    checks: Vec<Check>,
) -> VerifyOutcome {
    VerifyOutcome {
        model: checkpoint.name().to_owned(),
        ok: checks.iter().all(|check| check.ok),
        checks,
        perplexity: None,
        reference_perplexity: None,
        increase: None,
        kernels_unchecked: None,
        device: backend.device(),
    }
}

/// A check, from what was found.
pub(super) fn check(
    name: &str,
    found: std::result::Result<String, impl std::fmt::Display>,
) -> Check {
    let (ok, detail) = match found {
        Ok(detail) => (true, detail),
        Err(error) => (false, error.to_string()),
    };
    Check { name: name.to_owned(), ok, detail }
}

fn perplexity_checks(
    measured: &PerplexityOutcome,
    outcome: &VerifyOutcome,
    limits: Limits,
) -> Vec<Check> {
    let found = measured.perplexity;
    let against = outcome.reference_perplexity.map_or(String::new(), |reference| {
        format!(", reference {reference:.4} ({:+.2} %)", 100.0 * (found / reference - 1.0))
    });
    let mut checks = vec![Check {
        name: "perplexity".to_owned(),
        ok: found.is_finite(),
        detail: format!(
            "{found:.4} on {} window{} of {}{against}",
            measured.windows,
            if measured.windows == 1 { "" } else { "s" },
            measured.dataset
        ),
    }];
    if let Some(limit) = limits.max_ppl {
        checks.push(Check {
            name: "max-ppl".to_owned(),
            ok: found <= limit,
            detail: format!("{found:.4} against a limit of {limit}"),
        });
    }
    if let (Some(limit), Some(increase)) = (limits.max_ppl_increase, outcome.increase) {
        checks.push(Check {
            name: "max-ppl-increase".to_owned(),
            ok: increase <= limit,
            detail: format!(
                "{:+.2} % against a limit of {:+.2} %",
                100.0 * increase,
                100.0 * limit
            ),
        });
    }
    checks
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
