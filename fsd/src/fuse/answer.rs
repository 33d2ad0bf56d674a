//! From outcomes to replies: which reply a request gets, what is told about its failure, and what becomes of
//! an outcome that nobody waits for any more.

use std::time::Duration;

use bytes::Bytes;
use fuser::{
    Errno, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};
use shardfs_proto::types::{FileLock, GlobalInode};

use super::convert::attr_out;
use crate::errno::{errno, is_trouble};
use crate::failure::{Failure, Outcome, Posix};
use crate::fs::Fs;
use crate::fs::types::{Caller, Entry, FileStat, Opened, Space};
use crate::metrics::Op;

/// Numbers of inodes are never used twice.
pub(super) const GENERATION: Generation = Generation(0);

/// A request, for logs and metrics.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) op: Op,
    ino: u64,
    /// 0: the kernel itself.
    pub(super) thread: u32,
}

pub(super) fn asked(op: Op, ino: INodeNo, caller: Caller) -> Asked {
    Asked { op, ino: ino.0, thread: caller.thread }
}

/// What came of a request whose caller is no more: what it would have held is given back.
pub(super) trait Unwanted: Send + 'static {
    fn give_back(self, _fs: &Fs)
    where
        Self: Sized,
    {
    }
}

impl Unwanted for () {}
impl Unwanted for u32 {}
impl Unwanted for u64 {}
impl Unwanted for Bytes {}
impl Unwanted for Entry {}
impl Unwanted for Space {}
impl Unwanted for (FileStat, Duration) {}
impl Unwanted for Option<FileLock> {}

impl Unwanted for Opened {
    fn give_back(self, fs: &Fs) {
        // If the queue is full, the session's end gives it back.
        fs.release(self.handle);
    }
}

impl Unwanted for (Entry, Opened) {
    fn give_back(self, fs: &Fs) {
        self.1.give_back(fs);
    }
}

/// Whether the kernel will walk the path again, or has come to its end (`fs::second_look`).
pub(super) fn note_walk<T>(fs: &Fs, asked: Asked, outcome: &Outcome<T>) {
    match outcome {
        Err(failure) if errno(failure) == Errno::ESTALE => fs.found_stale(asked.thread),
        _ if matches!(asked.op, Op::Lookup | Op::GetAttr | Op::ReadLink) => {}
        _ => fs.found_well(asked.thread),
    }
}

/// Replies; gives the number of a failure.
pub(super) fn conclude<R: Refuse, T>(
    asked: Asked,
    reply: R,
    outcome: Outcome<T>,
    ok: impl FnOnce(R, T),
) -> Option<i32> {
    match outcome {
        Ok(value) => {
            ok(reply, value);
            None
        }
        Err(failure) => {
            let number = errno(&failure);
            tell(asked, &failure);
            reply.refuse(number);
            Some(number.code())
        }
    }
}

/// Trouble of the cluster is worth a line; what programs ask in vain is not.
fn tell(Asked { op, ino, .. }: Asked, failure: &Failure) {
    let at = GlobalInode::from_raw(ino).split();
    let (shard, inode) = at.map_or((0, ino), |(shard, inode)| (shard.get(), inode.get()));
    match failure {
        Failure::Domain(error) if is_trouble(failure) => {
            tracing::warn!(op = op.label(), shard, inode, reason = ?error.reason(), %error, "failed");
        }
        Failure::Domain(error) => {
            tracing::debug!(op = op.label(), shard, inode, reason = ?error.reason(), %error, "refused");
        }
        Failure::Posix(posix) => tracing::debug!(op = op.label(), shard, inode, ?posix, "refused"),
    }
}

/// A reply that can be an error.
pub(super) trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry);
refuse!(ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr);

pub(super) fn reply_entry(reply: ReplyEntry, entry: Entry) {
    reply.entry_with_ttls(&entry.ttl.attr, &entry.ttl.entry, &attr_out(&entry.stat), GENERATION);
}

pub(super) fn reply_bytes(reply: ReplyXattr, size: u32, value: &[u8]) {
    match (size, value.len()) {
        // At most 128 KiB.
        (0, length) => reply.size(length as u32),
        (size, length) if length <= size as usize => reply.data(value),
        _ => reply.error(errno(&Posix::BufferTooSmall.into())),
    }
}
