/*! The host's memory, as far as this process may use it: the number that every run compares its estimate
with. */

use super::Check;
use crate::machine::{Bound, Memory, available};
use crate::units;

/// Below this even the bundled model may not fit: its quantization takes 1.2 GB.
const LITTLE_BYTES: u64 = 2_000_000_000;

/// What can be had now.
pub(super) fn host() -> Check {
    match available() {
        Some(memory) => judge(memory),
        None => Check::note("memory", "this system does not tell how much there is"),
    }
}

fn judge(Memory { total, available, bound }: Memory) -> Check {
    let mut detail = format!("{} of {} available", units::bytes(available), units::bytes(total));
    if bound != Bound::Machine {
        detail.push_str(&format!(", by {}", bound.words()));
    }
    if available < LITTLE_BYTES {
        return Check::note("memory", detail)
            .hint("`atom quantize --dry-run` says what a run needs; fewer --samples need less");
    }
    Check::ok("memory", detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn little_memory_is_a_note() {
        let memory =
            Memory { total: 16_000_000_000, available: 1_000_000_000, bound: Bound::Machine };
        let check = judge(memory);
        assert_eq!(check.status, Status::Note);
        assert_eq!(check.detail, "1.0 GB of 16.0 GB available");
        assert_eq!(judge(Memory { available: LITTLE_BYTES, ..memory }).status, Status::Ok);
        let check = judge(Memory { bound: Bound::Group, ..memory });
        assert!(check.detail.ends_with("available, by the limit of this process's control group"));
    }
}
