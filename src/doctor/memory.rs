/*! The host's memory, as far as this process may use it. */

use std::path::Path;

use super::Check;
use crate::report::units;

/// Below this even the bundled model may not fit: its quantization takes 1.2 GB.
const LITTLE_BYTES: u64 = 2_000_000_000;

/// Bytes that are there, and those that can be had now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    total: u64,
    available: u64,
}

/// What can be had now.
pub(super) fn host() -> Check {
    let read = |path: &str| fs_err::read_to_string(Path::new(path)).ok();
    match read("/proc/meminfo").and_then(|text| of_system(&text)) {
        Some(system) => judge(within(system, limit(&read))),
        None => Check::note("memory", "this system does not tell how much there is"),
    }
}

fn judge(Memory { total, available }: Memory) -> Check {
    let detail = format!("{} of {} available", units::bytes(available), units::bytes(total));
    if available < LITTLE_BYTES {
        return Check::note("memory", detail)
            .hint("`atom quantize --dry-run` says what a run needs; fewer --samples need less");
    }
    Check::ok("memory", detail)
}

/// From Linux's `/proc/meminfo`.
fn of_system(meminfo: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kibibytes * 1024)
    };
    Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// What a container's limit leaves.
fn within(system: Memory, limit: Option<(u64, u64)>) -> Memory {
    match limit {
        Some((limit, used)) if limit < system.total => {
            Memory { total: limit, available: system.available.min(limit.saturating_sub(used)) }
        }
        _ => system,
    }
}

/// The container's limit and what is used of it, in bytes, of either version of control groups.
fn limit(read: &dyn Fn(&str) -> Option<String>) -> Option<(u64, u64)> {
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ]
    .into_iter()
    .find_map(|(limit, used)| Some((number(limit)?, number(used)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn memory_is_the_systems_within_the_containers_limit() {
        let system = of_system("MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n");
        let system = system.unwrap();
        assert_eq!(system, Memory { total: 8_192_000, available: 4_096_000 });
        assert_eq!(of_system("MemTotal: 8000 kB\n"), None);
        assert_eq!(within(system, None), system);
        // No limit is written as a number beyond any machine.
        assert_eq!(within(system, Some((u64::MAX, 5))), system);
        let tight = within(system, Some((1_000_000, 400_000)));
        assert_eq!(tight, Memory { total: 1_000_000, available: 600_000 });
    }

    #[test]
    fn limits_of_both_kinds_are_read() {
        let second = |path: &str| match path {
            "/sys/fs/cgroup/memory.max" => Some("5000\n".to_owned()),
            "/sys/fs/cgroup/memory.current" => Some("70\n".to_owned()),
            _ => None,
        };
        assert_eq!(limit(&second), Some((5000, 70)));
        let first = |path: &str| match path {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes" => Some("900".to_owned()),
            "/sys/fs/cgroup/memory/memory.usage_in_bytes" => Some("30".to_owned()),
            _ => None,
        };
        assert_eq!(limit(&first), Some((900, 30)));
        assert_eq!(limit(&|_| Some("max\n".to_owned())), None);
    }

    #[test]
    fn little_memory_is_a_note() {
        let check = judge(Memory { total: 16_000_000_000, available: 1_000_000_000 });
        assert_eq!(check.status, Status::Note);
        assert_eq!(check.detail, "1.0 GB of 16.0 GB available");
        assert_eq!(judge(Memory { total: 9, available: LITTLE_BYTES }).status, Status::Ok);
    }
}
