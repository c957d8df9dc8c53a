/*! `atom verify`: integrity of an Atom checkpoint, the GPU's kernels on it, then its perplexity against limits. */

use std::path::Path;

use clap::Args;

use super::args::{
    DeviceFlag, EvaluationFlags, IgnoreFlag, OfflineFlag, Opened, WindowFlag, with_backend,
};
use super::limits::{MaxIncrease, MaxPerplexity, limits};
use super::report_flag::ReportFlags;
use super::{Output, Ui};
use crate::checkpoint::AtomCheckpoint;
use crate::eval::{self, KernelCheck, Verification, VerifyOutcome};
use crate::hub::Hub;
use crate::network::Model;
use crate::text::Evaluation;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom verify --model tiny-llama-atom-w4a4-g128 --reference tiny-llama
  atom verify --model ./SmolLM2-atom-w4a4-g128 --no-eval
  atom verify --model ./SmolLM2-atom-w4a4-g128 --max-ppl 33 --json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Directory of the Atom checkpoint
    #[arg(long, value_name = "ATOM", help_heading = "Model")]
    model: String,
    /// Source to compare its perplexity with: a directory, a Hub id or an alias, as --model of `quantize`
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    reference: Option<String>,
    #[command(flatten)]
    ignoring: IgnoreFlag,
    #[command(flatten)]
    offline: OfflineFlag,
    #[command(flatten)]
    evaluation: EvaluationFlags,
    #[command(flatten, next_help_heading = "Evaluation")]
    length: WindowFlag,
    #[command(flatten)]
    max_ppl: MaxPerplexity,
    #[command(flatten)]
    max_increase: MaxIncrease,
    /// Tokens of the text on which a GPU's kernels are compared with the CPU, block by block; 0 for none
    #[arg(long, value_name = "N", default_value_t = 160, help_heading = "Kernels")]
    check_tokens: usize,
    #[command(flatten)]
    report: ReportFlags,
    #[command(flatten)]
    device: DeviceFlag,
}

impl Arguments {
    /// What is compared on the device that was opened.
    fn kernels(&self, opened: &Opened, hub: &Hub<'_>) -> Result<KernelCheck> {
        let off = |why: &str| Ok(KernelCheck::Off(why.to_owned()));
        match opened {
            Opened::Cpu(_, Some(why)) => off(&format!("no GPU: {why}")),
            Opened::Cpu(_, None) => off("--device cpu leaves the GPU out"),
            Opened::Cuda(_) if self.check_tokens == 0 => off("--check-tokens 0"),
            Opened::Cuda(_) => {
                let (text, seq_len) = (self.evaluation.text(hub)?, self.check_tokens);
                Ok(KernelCheck::On(Evaluation { text, seq_len, windows: Some(1) }))
            }
        }
    }
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    if arguments.max_increase.max_ppl_increase.is_some() && arguments.reference.is_none() {
        return Err(Error::usage("--max-ppl-increase needs --reference, to which it is relative")
            .hint("add --reference with the source of the checkpoint"));
    }
    if arguments.ignoring.is_given() && arguments.reference.is_none() {
        return Err(Error::usage("--ignore-tensors is for the tensors of --reference")
            .hint("add --reference with the source of the checkpoint"));
    }
    let inputs = arguments.evaluation.inputs().with(Some(Path::new(&arguments.model)));
    let inputs = inputs.with(arguments.reference.as_deref().map(Path::new));
    let report = arguments.report.check(inputs)?;
    let backend = arguments.device.open()?;
    let hub = arguments.offline.hub(ui)?;
    let reference = arguments.reference.as_deref();
    let reference = reference.map(|reference| Model::open(&hub, reference, None)).transpose()?;
    let account = |model| arguments.ignoring.account_model(model, ui);
    let reference = reference.map(account).transpose()?;
    let evaluation = arguments.evaluation.load(arguments.length.seq_len, &hub)?;
    let limits = limits(&arguments.max_ppl, &arguments.max_increase);
    let directory = Path::new(&arguments.model);
    if !directory.exists() {
        return Err(Error::input(format!("directory {} does not exist", arguments.model))
            .hint("give --model a directory that `atom quantize` has written"));
    }
    let checkpoint = AtomCheckpoint::open(directory)?;
    let kernels = arguments.kernels(&backend, &hub)?;
    let verification = Verification {
        checkpoint: &checkpoint,
        kernels: &kernels,
        evaluation: evaluation.as_ref(),
        reference: reference.as_ref(),
        limits,
    };
    let outcome = with_backend!(&backend, ui, backend => eval::verify(backend, &verification, ui))?;
    ui.close();
    output.write(&outcome)?;
    report.write(&outcome, Some(directory))?;
    judge(&outcome)
}

/// A failed verification as an error that names what failed.
fn judge(outcome: &VerifyOutcome) -> Result<()> {
    if outcome.ok {
        return Ok(());
    }
    let failed: Vec<&str> =
        outcome.checks.iter().filter(|check| !check.ok).map(|check| check.name.as_str()).collect();
    Err(Error::check(format!("{} failed verification: {}", outcome.model, failed.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::eval::Check;

    #[test]
    fn a_failed_check_fails_the_command_and_is_named() {
        let check = |name: &str, ok| Check { name: name.into(), ok, detail: String::new() };
        let mut outcome = VerifyOutcome {
            model: "m".into(),
            ok: false,
            checks: vec![check("shapes", true), check("checksums", false), check("range", false)],
            perplexity: None,
            reference_perplexity: None,
            increase: None,
            kernels_unchecked: None,
            device: "cpu".into(),
        };
        let error = judge(&outcome).unwrap_err();
        assert_eq!(error.message(), "m failed verification: checksums, range");
        assert_eq!(error.kind(), Kind::Check);
        outcome.ok = true;
        assert!(judge(&outcome).is_ok());
    }
}
