//! What the daemon counts: requests of the kernel by kind and outcome, how long they take, bytes, and what
//! is open. Everything that a request touches is reached by index, without a lookup.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use shardfs_proto::client::ReadCounts;

macro_rules! requests {
    ($($name:ident $label:literal,)*) => {
        /// A kind of request.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[allow(missing_docs)]
        pub enum Op { $($name,)* }

        impl Op {
            /// All of them, in the order of their discriminants.
            pub const ALL: &[Op] = &[$(Op::$name,)*];

            /// Its name in metrics and logs.
            pub fn label(self) -> &'static str {
                match self { $(Op::$name => $label,)* }
            }
        }
    };
}

requests! {
    Lookup "lookup",
    GetAttr "getattr",
    SetAttr "setattr",
    ReadLink "readlink",
    MakeNode "mknod",
    MakeDirectory "mkdir",
    Unlink "unlink",
    RemoveDirectory "rmdir",
    Symlink "symlink",
    Rename "rename",
    Link "link",
    Open "open",
    Create "create",
    Read "read",
    Write "write",
    Flush "flush",
    Release "release",
    Fsync "fsync",
    OpenDirectory "opendir",
    ReadDirectory "readdir",
    ReadDirectoryPlus "readdirplus",
    ReleaseDirectory "releasedir",
    FsyncDirectory "fsyncdir",
    StatFs "statfs",
    SetXattr "setxattr",
    GetXattr "getxattr",
    ListXattr "listxattr",
    RemoveXattr "removexattr",
    Allocate "fallocate",
    Seek "lseek",
    CopyRange "copy_file_range",
    GetLock "getlk",
    SetLock "setlk",
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OpLabel {
    op: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OutcomeLabels {
    op: &'static str,
    outcome: String,
}

/// The daemon's metrics.
pub struct Metrics {
    registry: Mutex<Registry>,
    succeeded: Vec<Counter>,
    failed: Family<OutcomeLabels, Counter>,
    seconds: Vec<Histogram>,
    /// Requests that were taken and not answered yet.
    pub in_flight: Gauge,
    /// Bytes of file content given to the kernel.
    pub read_bytes: Counter<u64, AtomicU64>,
    /// Bytes of file content taken from the kernel.
    pub written_bytes: Counter<u64, AtomicU64>,
    /// Files and directories that are open.
    pub open_handles: Gauge,
    backup_reads: Counter<u64, AtomicU64>,
    primary_instead: Counter<u64, AtomicU64>,
    restarts: Counter<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("shardfsd");
        let by_outcome = Family::<OutcomeLabels, Counter>::default();
        let succeeded = Op::ALL
            .iter()
            .map(|op| {
                by_outcome.get_or_create(&OutcomeLabels { op: op.label(), outcome: "ok".into() }).clone()
            })
            .collect();
        // 20 us to 80 s, by factors of 2: from an answer out of memory to the client's deadline.
        let by_op = Family::<OpLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(20e-6, 2.0, 23))
        });
        let seconds =
            Op::ALL.iter().map(|op| by_op.get_or_create(&OpLabel { op: op.label() }).clone()).collect();
        let metrics = Metrics {
            registry: Mutex::default(),
            succeeded,
            failed: by_outcome.clone(),
            seconds,
            in_flight: Gauge::default(),
            read_bytes: Counter::default(),
            written_bytes: Counter::default(),
            open_handles: Gauge::default(),
            backup_reads: Counter::default(),
            primary_instead: Counter::default(),
            restarts: Counter::default(),
        };
        registry.register(
            "restarts",
            "How often this mount's daemon died and was started again by its parent",
            metrics.restarts.clone(),
        );
        registry.register(
            "reads_from_backups",
            "Reads that a backup answered (--read-from backup, and closed shards)",
            metrics.backup_reads.clone(),
        );
        registry.register(
            "reads_from_primary_instead",
            "Reads that the primary answered because no backup could (--read-from backup)",
            metrics.primary_instead.clone(),
        );
        registry.register("requests", "Requests of the kernel by kind and outcome", by_outcome);
        registry.register_with_unit("request_duration", "Time until the answer", Unit::Seconds, by_op);
        registry.register("requests_in_flight", "Requests not answered yet", metrics.in_flight.clone());
        registry.register_with_unit(
            "read",
            "File content given to the kernel",
            Unit::Bytes,
            metrics.read_bytes.clone(),
        );
        registry.register_with_unit(
            "written",
            "File content taken from the kernel",
            Unit::Bytes,
            metrics.written_bytes.clone(),
        );
        registry.register("open_handles", "Open files and directories", metrics.open_handles.clone());
        *metrics.registry.lock() = registry;
        metrics
    }
}

impl Metrics {
    /// Takes over what the client has counted.
    pub fn set_reads(&self, counts: ReadCounts) {
        self.backup_reads.inner().store(counts.backup, Ordering::Relaxed);
        self.primary_instead.inner().store(counts.primary_instead, Ordering::Relaxed);
    }

    /// Notes how often the daemon was started again.
    pub fn set_restarts(&self, restarts: u32) {
        self.restarts.inner().store(restarts.into(), Ordering::Relaxed);
    }

    /// Counts an answered request. `errno`: the number it failed with.
    pub fn answered(&self, op: Op, took: Duration, errno: Option<i32>) {
        self.seconds[op as usize].observe(took.as_secs_f64());
        match errno {
            None => {
                self.succeeded[op as usize].inc();
            }
            Some(errno) => {
                let outcome = errno_name(errno);
                self.failed.get_or_create(&OutcomeLabels { op: op.label(), outcome }).inc();
            }
        }
    }

    /// All of them in the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        encode(&mut text, &self.registry.lock()).ok();
        text
    }
}

/// The names of the numbers that `errno` can answer; a bounded set, as labels must be.
fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EACCES => "EACCES",
        libc::EEXIST => "EEXIST",
        libc::EXDEV => "EXDEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::ENFILE => "ENFILE",
        libc::EFBIG => "EFBIG",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::EMLINK => "EMLINK",
        libc::ERANGE => "ERANGE",
        libc::ENAMETOOLONG => "ENAMETOOLONG",
        libc::ENOSYS => "ENOSYS",
        libc::ENOTEMPTY => "ENOTEMPTY",
        libc::ENODATA => "ENODATA",
        libc::EMSGSIZE => "EMSGSIZE",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ESTALE => "ESTALE",
        other => return other.to_string(),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind_and_outcome() {
        let metrics = Metrics::default();
        metrics.answered(Op::Lookup, Duration::from_micros(50), None);
        metrics.answered(Op::Lookup, Duration::from_micros(50), Some(libc::ENOENT));
        metrics.answered(Op::Allocate, Duration::from_micros(50), Some(libc::EOPNOTSUPP));
        metrics.written_bytes.inc_by(5);
        metrics.set_restarts(3);
        let text = metrics.text();
        for line in [
            "shardfsd_requests_total{op=\"lookup\",outcome=\"ok\"} 1",
            "shardfsd_requests_total{op=\"lookup\",outcome=\"ENOENT\"} 1",
            "shardfsd_requests_total{op=\"fallocate\",outcome=\"EOPNOTSUPP\"} 1",
            "shardfsd_request_duration_seconds_count{op=\"lookup\"} 2",
            "shardfsd_written_bytes_total 5",
            "shardfsd_restarts_total 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn kinds_are_in_order() {
        assert!(Op::ALL.iter().enumerate().all(|(at, op)| *op as usize == at));
    }
}
