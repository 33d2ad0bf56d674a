//! How a request of the kernel fails: with a domain error, or with an outcome that only a mount knows.
//!
//! Knows no numbers; `errno` maps both kinds, each in one exhaustive match.

use shardfs_proto::types::{Error, Reason};

/// Result of a request.
pub type Outcome<T> = Result<T, Failure>;

/// Why a request failed.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The cluster says so.
    Domain(Error),
    /// The mount says so.
    Posix(Posix),
}

/// Outcomes that arise in the daemon itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Posix {
    /// Not allowed here, whoever asks.
    NotPermitted,
    /// No such name.
    NoEntry,
    /// The name is there already.
    Exists,
    /// From one shard to another, or into or out of the root.
    CrossDevice,
    /// The virtual directory and closed shards are read-only.
    ReadOnly,
    /// The arguments make no sense.
    Invalid,
    /// What the kernel remembers is gone or was replaced: it walks the path again.
    Stale,
    /// This kind of request is not supported for this object.
    Unsupported,
    /// This kind of request is not implemented at all: the kernel does without, and asks no more.
    NotImplemented,
    /// The caller's buffer is too small.
    BufferTooSmall,
    /// The kernel names a handle that is not open.
    BadHandle,
    /// Too many open files.
    TooManyOpen,
    /// Not a directory.
    NotDirectory,
    /// A directory.
    IsDirectory,
    /// No such extended attribute.
    NoAttribute,
    /// What is sought in a file does not come any more.
    NotInFile,
    /// Locks cannot be had: the node that serves the shard is too old.
    NoLocks,
    /// A signal came while a lock was waited for.
    Interrupted,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Domain(error)
    }
}

impl From<Posix> for Failure {
    fn from(posix: Posix) -> Failure {
        Failure::Posix(posix)
    }
}

impl Failure {
    /// The cluster's reason, if it is the cluster's error.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Failure::Domain(error) => Some(error.reason()),
            Failure::Posix(_) => None,
        }
    }

    /// For requests about an inode as such: one that is gone was replaced or removed after the kernel
    /// looked it up, so that the path has to be walked again.
    pub fn stale_if_gone(self) -> Failure {
        match self.reason() {
            Some(Reason::NotFound) => Posix::Stale.into(),
            _ => self,
        }
    }
}
