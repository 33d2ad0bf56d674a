//! What this process may use: open files, locked memory, processes, memory.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::size;

/// Files that a node with some hundred open shards has open; it raises its soft limit to the hard one.
const FILES_WANTED: u64 = 65_536;
/// Locked memory: io_uring of older kernels and etcd want some.
const LOCKED_WANTED: u64 = 8 << 20;
/// Threads of a node, a daemon and their libraries, with room.
const TASKS_WANTED: u64 = 4096;
/// A node with its default caches, and what the kernel needs for its pages.
const MEMORY_WANTED: u64 = 2 << 30;

/// Looks.
pub fn checks() -> Vec<Check> {
    vec![
        files(getrlimit(Resource::Nofile).maximum),
        locked(getrlimit(Resource::Memlock).maximum),
        tasks(&task_limits()),
        memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
    ]
}

/// `None`: no limit.
fn files(hard: Option<u64>) -> Check {
    const NAME: &str = "open files";
    match hard {
        Some(limit) if limit < FILES_WANTED => Check::warn(
            NAME,
            format!("{limit} at most: a node with many open shards needs more"),
            format!("LimitNOFILE={FILES_WANTED} in the service, or `ulimit -Hn`"),
        ),
        Some(limit) => Check::ok(NAME, format!("{limit} at most")),
        None => Check::ok(NAME, "no limit"),
    }
}

fn locked(hard: Option<u64>) -> Check {
    const NAME: &str = "locked memory";
    match hard {
        Some(limit) if limit < LOCKED_WANTED => Check::warn(
            NAME,
            format!("{} at most", size::human(limit)),
            "LimitMEMLOCK=64M in the service, or `ulimit -Hl`",
        ),
        Some(limit) => Check::ok(NAME, format!("{} at most", size::human(limit))),
        None => Check::ok(NAME, "no limit"),
    }
}

/// The limits on tasks that hold here, each with where it comes from.
fn task_limits() -> Vec<(String, u64)> {
    let mut limits = Vec::new();
    if let Some(limit) = getrlimit(Resource::Nproc).maximum {
        limits.push(("this user".to_owned(), limit));
    }
    let number = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    for path in ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"] {
        limits.extend(number(Path::new(path)).map(|limit| (path.to_owned(), limit)));
    }
    // `0::/path`, of the unified hierarchy; every group above limits as well.
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) {
        for folder in Path::new("/sys/fs/cgroup").join(group).ancestors() {
            let path = folder.join("pids.max");
            limits.extend(number(&path).map(|limit| (path.display().to_string(), limit)));
        }
    }
    limits
}

fn tasks(limits: &[(String, u64)]) -> Check {
    const NAME: &str = "threads";
    match limits.iter().min_by_key(|(_, limit)| *limit) {
        Some((place, limit)) if *limit < TASKS_WANTED => Check::warn(
            NAME,
            format!("{limit} at most ({place})"),
            format!("raise it to {TASKS_WANTED}: TasksMax= in the service"),
        ),
        Some((place, limit)) => Check::ok(NAME, format!("{limit} at most ({place})")),
        None => Check::ok(NAME, "no limit"),
    }
}

fn memory(meminfo: &str) -> Check {
    const NAME: &str = "memory";
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
        return Check::skipped(NAME, "/proc/meminfo cannot be read");
    };
    let detail = format!("{} of {} available", size::human(available), size::human(total));
    if available < MEMORY_WANTED {
        let advice = "give the machine more, or the node less: --block-cache and --write-buffer";
        return Check::warn(NAME, detail, advice);
    }
    Check::ok(NAME, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn limits_are_judged() {
        assert_eq!(files(Some(1024)).outcome, Outcome::Warn);
        assert_eq!(files(Some(FILES_WANTED)).outcome, Outcome::Ok);
        assert_eq!(files(None).outcome, Outcome::Ok);
        assert_eq!(locked(Some(64 << 10)).outcome, Outcome::Warn);
        assert_eq!(locked(None).outcome, Outcome::Ok);
        let narrow = [("a".to_owned(), 1 << 20), ("b".to_owned(), 100)];
        assert!(tasks(&narrow).detail.contains("100 at most (b)"));
        assert_eq!(tasks(&narrow).outcome, Outcome::Warn);
        assert_eq!(tasks(&narrow[..1]).outcome, Outcome::Ok);
        assert_eq!(tasks(&[]).outcome, Outcome::Ok);
    }

    #[test]
    fn memory_is_read() {
        let text = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   8000000 kB\n";
        assert_eq!(memory(text).outcome, Outcome::Ok);
        assert_eq!(memory("MemTotal: 900000 kB\nMemAvailable: 500000 kB\n").outcome, Outcome::Warn);
        assert_eq!(memory("nonsense").outcome, Outcome::Skipped);
    }
}
