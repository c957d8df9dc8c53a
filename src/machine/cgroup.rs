/*! What control groups of either version leave of the memory, at every level from the process's own group
to the root of the mount. */

use std::path::{Component, Path, PathBuf};

/// A limit on memory and what is used of it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) limit: u64,
    pub(super) used: u64,
}

/// Reads a file of the system; none if it is not there.
pub(super) type Read<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// The names of one version's files.
struct Version {
    /// Limits, the hard one and the one from which on the system slows a group down.
    limits: &'static [&'static str],
    used: &'static str,
    /// Fields of `memory.stat` that count file pages, which the system takes back first.
    reclaimable: [&'static str; 2],
}

const FIRST: Version = Version {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};
const SECOND: Version = Version {
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
};

/// Every limit on this process's memory, of all its groups and their ancestors.
pub(super) fn limits(read: Read) -> Vec<Limit> {
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let mounts = read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let first = controllers.split(',').any(|controller| controller == "memory");
        if !first && !controllers.is_empty() {
            continue;
        }
        let version = if first { FIRST } else { SECOND };
        for (root, mount) in mounts_of(&mounts, first) {
            for directory in levels(&root, &mount, Path::new(group)) {
                limits.extend(limits_at(read, &directory, &version));
            }
        }
    }
    limits
}

/// `(root, mount point)` of the memory controller of the first version, or of the second version.
fn mounts_of(mounts: &str, first: bool) -> Vec<(PathBuf, PathBuf)> {
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, mount) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1).unwrap_or(""));
        let wanted = match first {
            true => name == "cgroup" && options.split(',').any(|option| option == "memory"),
            false => name == "cgroup2",
        };
        wanted.then(|| (unescaped(root), unescaped(mount)))
    };
    mounts.lines().filter_map(mount).collect()
}

/// A path as mountinfo writes it: space, tab, newline and backslash are three octal digits.
fn unescaped(path: &str) -> PathBuf {
    let codes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    codes.iter().fold(path.to_owned(), |path, (code, char)| path.replace(code, char)).into()
}

/// The directories of a group and its ancestors. A container may see its group by the host's path while
/// its mount shows that group as the root: then the mount point is all there is to see.
fn levels(root: &Path, mount: &Path, group: &Path) -> Vec<PathBuf> {
    let inside = group.strip_prefix(root).or_else(|_| group.strip_prefix("/"));
    let inside = inside.unwrap_or(Path::new(""));
    let climbs = inside.components().any(|part| part == Component::ParentDir);
    let inside = if climbs { Path::new("") } else { inside };
    inside.ancestors().map(|part| mount.join(part)).collect()
}

/// The limits of one group. Pages of files that are only cached do not count as used.
fn limits_at(read: Read, directory: &Path, version: &Version) -> Vec<Limit> {
    let number = |name: &str| read(&directory.join(name))?.trim().parse::<u64>().ok();
    let Some(used) = number(version.used) else { return Vec::new() };
    let statistics = read(&directory.join("memory.stat")).unwrap_or_default();
    let field = |name: &str| {
        let mut lines = statistics.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(field, _)| *field == name)?.1.trim().parse::<u64>().ok()
    };
    let cached: u64 = version.reclaimable.iter().filter_map(|name| field(name)).sum();
    let used = used.saturating_sub(cached);
    version
        .limits
        .iter()
        .filter_map(|name| number(name))
        .map(|limit| Limit { limit, used })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<(u64, u64)> {
        let files: BTreeMap<&Path, &str> =
            files.iter().map(|(path, text)| (Path::new(*path), *text)).collect();
        let read = |path: &Path| files.get(path).map(|text| (*text).to_owned());
        limits(&read).into_iter().map(|limit| (limit.limit, limit.used)).collect()
    }

    #[test]
    fn every_level_of_the_second_version_counts_and_its_high_mark_too() {
        let files = [
            ("/proc/self/cgroup", "0::/user.slice/job.scope\n"),
            (
                "/proc/self/mountinfo",
                "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
            ),
            ("/sys/fs/cgroup/user.slice/job.scope/memory.max", "max\n"),
            ("/sys/fs/cgroup/user.slice/job.scope/memory.high", "7000\n"),
            ("/sys/fs/cgroup/user.slice/job.scope/memory.current", "500\n"),
            ("/sys/fs/cgroup/user.slice/memory.max", "5000\n"),
            ("/sys/fs/cgroup/user.slice/memory.high", "max\n"),
            ("/sys/fs/cgroup/user.slice/memory.current", "3000\n"),
            (
                "/sys/fs/cgroup/user.slice/memory.stat",
                "anon 9\ninactive_file 600\nactive_file 400\n",
            ),
        ];
        assert_eq!(found(&files), [(7000, 500), (5000, 2000)]);
    }

    #[test]
    fn the_memory_controller_of_the_first_version_is_found_where_it_is_mounted() {
        let files = [
            ("/proc/self/cgroup", "9:name=systemd:/x\n5:cpu,memory:/a/b\n3:cpuset:/other\n0::/\n"),
            (
                "/proc/self/mountinfo",
                "35 31 0:32 / /mnt/my\\040groups rw,relatime - cgroup cgroup rw,cpu,memory\n\
                 36 31 0:33 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n",
            ),
            ("/mnt/my groups/a/b/memory.limit_in_bytes", "900\n"),
            ("/mnt/my groups/a/b/memory.usage_in_bytes", "30\n"),
            ("/mnt/my groups/a/memory.limit_in_bytes", "800\n"),
            ("/mnt/my groups/a/memory.usage_in_bytes", "40\n"),
        ];
        assert_eq!(found(&files), [(900, 30), (800, 40)]);
    }

    #[test]
    fn a_container_that_sees_only_its_own_group_is_bounded_by_it() {
        let limits = [
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "600\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "10\n"),
        ];
        // The mount shows the group itself, by the path that the host knows it under.
        let inside = [
            ("/proc/self/cgroup", "4:memory:/docker/abc\n"),
            (
                "/proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
        ];
        assert_eq!(found(&[&inside[..], &limits].concat()), [(600, 10)]);
        // A process that was moved to another branch sees a path that climbs.
        let climbing = [("/proc/self/cgroup", "4:memory:/../other\n"), inside[1]];
        assert_eq!(found(&[&climbing[..], &limits].concat()), [(600, 10)]);
        assert_eq!(found(&[]), []);
    }
}
