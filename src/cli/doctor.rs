/*! `atom doctor`: what this machine can do, and what each thing that it lacks means. */

use clap::Args;

use super::args::DeviceFlag;
use super::values::Device;
use super::{Output, Ui};
use crate::doctor::{self, DoctorOutcome, Gpus, Status};
use crate::progress::Progress;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  atom doctor
  atom doctor --device cuda
  atom doctor --json

A note is something that the program does without: without a GPU, it runs on the CPU. A fault is \
something that should work and does not, and ends in exit code 4; with --device cuda that includes a \
GPU that cannot be used. Nothing is sent or fetched, and no token is shown.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    device: DeviceFlag,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let gpus = match arguments.device.device {
        Device::Auto => Gpus::Any,
        Device::Cpu => Gpus::Without,
        Device::Cuda(ordinal) => Gpus::One(ordinal),
    };
    if gpus != Gpus::Without {
        ui.info("looking for GPUs, and trying what is there");
    }
    let outcome = doctor::examine(gpus, arguments.device.gpu_memory);
    output.write(&outcome)?;
    judge(&outcome)
}

/// Faults as an error that names what does not work.
fn judge(outcome: &DoctorOutcome) -> Result<()> {
    let faults = outcome.checks.iter().filter(|check| check.status == Status::Fault);
    let names: Vec<&str> = faults.map(|check| check.name.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::machine(format!("this should work and does not: {}", names.join(", ")))
        .hint("the lines marked FAULT say why, and what to do"))
}
