/*! The processor: its cores, and the instructions that the kernels use. */

use super::{Check, Status};
use crate::Result;
use crate::backend::cpu::isa::{Isa, VARIABLE};

/// Model and cores.
pub(super) fn cores() -> Check {
    let model = fs_err::read_to_string("/proc/cpuinfo").ok().and_then(|text| model(&text));
    let model = model.map_or_else(String::new, |model| format!("{model}, "));
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    match std::thread::available_parallelism() {
        Ok(cores) => {
            let (cores, threads) = (cores.get(), rayon::current_num_threads());
            // As many as there are cores, unless --threads says otherwise.
            let threads = match threads {
                as_many if as_many == cores => String::new(),
                other => format!(", {other} thread{} in use", plural(other)),
            };
            Check::ok("processor", format!("{model}{cores} core{}{threads}", plural(cores)))
        }
        Err(error) => {
            Check::note("processor", format!("{model}and cores that cannot be counted: {error}"))
                .hint("name the threads to use with --threads N")
        }
    }
}

/// The name that Linux has for the first core.
fn model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    let name = line.split_once(':')?.1.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// The kernels' instruction set, and what `ATOM_ISA` says.
pub(super) fn instruction_set(detected: Result<Isa>) -> Check {
    const NAME: &str = "instruction set";
    let available = Isa::available();
    let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
    let isa = match detected {
        Ok(isa) => isa,
        Err(error) => return Check::of_error(NAME, Status::Fault, &error),
    };
    let chosen = std::env::var_os(VARIABLE).is_some_and(|value| !value.is_empty());
    let by = if chosen { format!(", by {VARIABLE}") } else { String::new() };
    let detail = format!("{}{by}, of {}", isa.name(), names.join(", "));
    let best = available.last().copied().unwrap_or(Isa::Plain);
    if isa != best {
        return Check::note(NAME, detail)
            .hint(format!("unset {VARIABLE}: {} gives the same results, faster", best.name()));
    }
    if best == Isa::Portable {
        return Check::note(NAME, detail).hint(
            "a processor with AVX2 or AVX-512 VNNI does the same work several times as fast",
        );
    }
    Check::ok(NAME, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn the_model_is_what_linux_calls_it() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A Processor 9000\n\nprocessor\t: 1\n";
        assert_eq!(model(cpuinfo).as_deref(), Some("A Processor 9000"));
        assert_eq!(model("processor : 0\n"), None);
    }

    #[test]
    fn less_than_the_best_instructions_is_a_note_and_none_a_fault() {
        let check = instruction_set(Ok(Isa::Plain));
        assert_eq!(check.status, Status::Note);
        assert!(check.hint.is_some_and(|hint| hint.starts_with("unset ATOM_ISA")));
        let check = instruction_set(Err(Error::usage("ATOM_ISA is `x`").hint("unset it")));
        assert_eq!((check.status, check.hint.as_deref()), (Status::Fault, Some("unset it")));
    }
}
