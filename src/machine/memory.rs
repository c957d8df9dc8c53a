/*! Memory that this process may still take: what the system has, within control groups and limits of the
process. */

use std::path::Path;
use std::sync::OnceLock;

use rustix::process::{Resource, getrlimit};

use super::cgroup::{self, Limit, Read};

/// Bytes that are there, and those that can be had now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The machine's, or the tightest limit's.
    pub total: u64,
    /// What this process can still take of it.
    pub available: u64,
    /// What bounds it.
    pub bound: Bound,
}

/// What bounds the memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The machine's memory.
    Machine,
    /// A control group, as containers and services have one.
    Group,
    /// `ulimit -v`.
    AddressSpace,
    /// `ulimit -d`.
    Data,
}

impl Bound {
    /// Where the number comes from, in a few words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Machine => "free memory of this machine",
            Self::Group => "the limit of this process's control group",
            Self::AddressSpace => "`ulimit -v`",
            Self::Data => "`ulimit -d`",
        }
    }
}

/// What can be had now; none where the system does not report it.
pub fn available() -> Option<Memory> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    within(&read, limit_of(Resource::As), limit_of(Resource::Data))
}

/// Address space that this process can still take under `ulimit -v`; none without such a limit.
pub fn address_space_left() -> Option<u64> {
    let limit = limit_of(Resource::As)?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    Some(limit.saturating_sub(kibibytes(&status, "VmSize").unwrap_or(0)))
}

/// Whether the system backs memory with huge pages unasked, so that all of it counts where a part is used.
pub fn hands_out_huge_pages() -> bool {
    static ALWAYS: OnceLock<bool> = OnceLock::new();
    *ALWAYS.get_or_init(|| {
        let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        enabled.is_ok_and(|enabled| enabled.contains("[always]"))
    })
}

/// As [`available`], of a system read by `read`, with the process's limits in bytes.
fn within(read: Read, address_space: Option<u64>, data: Option<u64>) -> Option<Memory> {
    let mut memory = of_system(&read(Path::new("/proc/meminfo"))?)?;
    let mut bound = |Limit { limit, used }: Limit, bound| {
        memory.total = memory.total.min(limit);
        let left = limit.saturating_sub(used);
        if left < memory.available {
            (memory.available, memory.bound) = (left, bound);
        }
    };
    for limit in cgroup::limits(read) {
        bound(limit, Bound::Group);
    }
    let status = read(Path::new("/proc/self/status")).unwrap_or_default();
    let used = |name: &str| kibibytes(&status, name).unwrap_or(0);
    for (limit, field, what) in
        [(address_space, "VmSize", Bound::AddressSpace), (data, "VmData", Bound::Data)]
    {
        if let Some(limit) = limit {
            bound(Limit { limit, used: used(field) }, what);
        }
    }
    Some(memory)
}

/// From Linux's `/proc/meminfo`.
fn of_system(meminfo: &str) -> Option<Memory> {
    let (total, available) = (kibibytes(meminfo, "MemTotal")?, kibibytes(meminfo, "MemAvailable")?);
    Some(Memory { total, available, bound: Bound::Machine })
}

/// A field `NAME:  N kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes.saturating_mul(1024))
}

/// A limit of this process, in bytes; none if it has none.
fn limit_of(resource: Resource) -> Option<u64> {
    getrlimit(resource).current
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n";
    const STATUS: &str = "VmPeak:\t 900 kB\nVmSize:\t 700 kB\nVmRSS:\t 50 kB\nVmData:\t 300 kB\n";
    const MOUNT: &str = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

    fn found(
        max: &str,
        address_space: Option<u64>,
        data: Option<u64>,
    ) -> Option<(u64, u64, Bound)> {
        let read = |path: &Path| {
            let text = match path.to_str()? {
                "/proc/meminfo" => MEMINFO,
                "/proc/self/status" => STATUS,
                "/proc/self/cgroup" => "0::/\n",
                "/proc/self/mountinfo" => MOUNT,
                "/sys/fs/cgroup/memory.max" => max,
                "/sys/fs/cgroup/memory.current" => "1024000\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        let memory = within(&read, address_space, data)?;
        Some((memory.total / 1024, memory.available / 1024, memory.bound))
    }

    #[test]
    fn the_tightest_of_all_bounds_holds() {
        assert_eq!(found("max\n", None, None), Some((8000, 4000, Bound::Machine)));
        // No limit is written as a number beyond any machine by the first version.
        let beyond = "9223372036854771712\n";
        assert_eq!(found(beyond, None, None), Some((8000, 4000, Bound::Machine)));
        assert_eq!(found("3072000\n", None, None), Some((3000, 2000, Bound::Group)));
        // A limit that leaves more than the machine has.
        assert_eq!(found("7168000\n", None, None), Some((7000, 4000, Bound::Machine)));
        let kib = |kib: u64| Some(kib * 1024);
        assert_eq!(found("max\n", kib(2000), None), Some((2000, 1300, Bound::AddressSpace)));
        assert_eq!(found("max\n", None, kib(900)), Some((900, 600, Bound::Data)));
        assert_eq!(found("1536000\n", kib(2000), kib(900)), Some((900, 500, Bound::Group)));
        assert_eq!(found("max\n", kib(10), None), Some((10, 0, Bound::AddressSpace)));
    }

    #[test]
    fn a_system_that_does_not_tell_gives_none() {
        assert_eq!(of_system("MemTotal: 8000 kB\n"), None);
        assert!(available().is_some_and(|memory| memory.available <= memory.total));
    }
}
