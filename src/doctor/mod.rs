/*! What this machine can do, and what each thing that it lacks means.

Every check is one line: `ok`; a `note` where the program does without, more slowly or not at all for
what that thing is for; a `fault` where something that should work does not. Nothing here opens a
connection, and nothing is left behind but kernels in their cache. */

mod arithmetic;
mod gpu;
mod memory;
mod processor;
mod settings;
mod storage;

use serde::Serialize;

use crate::Error;
use crate::backend::cpu::isa::Isa;
use crate::checkpoint::FORMAT_VERSION;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Worth knowing; the program does without.
    Note,
    /// Something that should work does not.
    Fault,
}

/// One line of `atom doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Check {
    fn new(name: &str, status: Status, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), status, detail: detail.into(), hint: None }
    }

    fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, detail)
    }

    fn note(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Note, detail)
    }

    fn fault(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Fault, detail)
    }

    /// What an error says, and its hint.
    fn of_error(name: &str, status: Status, error: &Error) -> Self {
        let hint = error.hint_text().map(str::to_owned);
        Self { hint, ..Self::new(name, status, error.to_string()) }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The result of `atom doctor`.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorOutcome {
    /// Whether there is no fault.
    pub ok: bool,
    /// Every check.
    pub checks: Vec<Check>,
}

/// Which GPUs are looked at, and whether they must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// All there are; none is a note, since the CPU does the same work.
    Any,
    /// None.
    Without,
    /// The one of this number, without which something is at fault.
    One(usize),
}

/// Looks at everything. `gpu_memory` bounds what is used of a GPU's memory, in bytes.
pub fn examine(gpus: Gpus, gpu_memory: Option<u64>) -> DoctorOutcome {
    let mut checks = vec![program()];
    checks.push(processor::cores());
    checks.push(processor::instruction_set(Isa::detect()));
    checks.push(memory::host());
    checks.push(storage::here());
    checks.push(storage::hub_cache());
    checks.extend(gpu::all(gpus, gpu_memory));
    checks.push(settings::hub());
    checks.extend(settings::variables());
    checks.push(arithmetic::on_cpu());
    DoctorOutcome { ok: checks.iter().all(|check| check.status != Status::Fault), checks }
}

/// What this program is.
fn program() -> Check {
    let (version, os, architecture) =
        (env!("ATOM_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    let detail = format!("atom {version}, checkpoint format {FORMAT_VERSION}, {os} {architecture}");
    if cfg!(debug_assertions) {
        return Check::note("version", format!("{detail}, built without optimization"))
            .hint("build with `cargo build --release`: it is many times as fast");
    }
    Check::ok("version", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_gpus_is_examined_without_faults_of_theirs() {
        let outcome = examine(Gpus::Without, None);
        let names: Vec<&str> = outcome.checks.iter().map(|check| check.name.as_str()).collect();
        for name in ["version", "processor", "instruction set", "memory", "disk", "cpu arithmetic"]
        {
            assert_eq!(
                names.iter().filter(|known| **known == name).count(),
                1,
                "{name}: {names:?}"
            );
        }
        let gpu = outcome.checks.iter().find(|check| check.name == "gpu").unwrap();
        assert_eq!((gpu.status, gpu.detail.as_str()), (Status::Note, "left out by --device cpu"));
        let faults = outcome.checks.iter().filter(|check| check.status == Status::Fault).count();
        assert_eq!(outcome.ok, faults == 0);
    }

    #[test]
    fn a_gpu_that_must_be_there_and_is_not_is_a_fault() {
        // No machine has so many.
        let outcome = examine(Gpus::One(999), None);
        let faults = outcome.checks.iter().filter(|check| check.status == Status::Fault);
        assert!(!outcome.ok && faults.clone().count() > 0);
        assert!(faults.clone().all(|check| check.hint.is_some()), "{faults:?}");
    }
}
