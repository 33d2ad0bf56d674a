//! Locks: requests that may wait for as long as somebody else pleases.
//!
//! The kernel lets its caller go only when the request is answered, so the daemon looks for its signals (`patience`): one that
//! is about to be handled ends the waiting with EINTR, which the kernel turns into a restart where the program asked for that.

use std::sync::Arc;

use fuser::{Errno, ReplyEmpty, ReplyLock};
use shardfs_proto::types::{FileLock, LockKind, LockRange, clock};
use tokio::sync::Semaphore;

use super::Fuse;
use super::answer::{Asked, Refuse, conclude};
use super::patience::{self, Pending};
use crate::failure::{Failure, Outcome, Posix};
use crate::fs::locks::{Caring, LockCall};

/// Requests that wait for locks: other requests need places as well.
const WAITING_MAX: usize = 4096;

pub(super) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(WAITING_MAX))
}

/// The kernel's last byte of a file of any length.
const KERNEL_END: u64 = i64::MAX as u64;

/// A range as the kernel has it.
pub(super) fn range_in(start: u64, end: u64) -> Outcome<LockRange> {
    let end = if end >= KERNEL_END { LockRange::TO_THE_END } else { end };
    LockRange::new(start, end).map_err(Failure::from)
}

/// A kind as the kernel has it.
pub(super) fn kind_in(number: i32) -> Outcome<Option<LockKind>> {
    match number {
        libc::F_RDLCK => Ok(Some(LockKind::Read)),
        libc::F_WRLCK => Ok(Some(LockKind::Write)),
        libc::F_UNLCK => Ok(None),
        _ => Err(Posix::Invalid.into()),
    }
}

/// Tells what keeps the caller from a lock.
pub(super) fn reply_lock(reply: ReplyLock, held: Option<FileLock>) {
    let Some(held) = held else { return reply.locked(0, 0, libc::F_UNLCK, 0) };
    let number = match held.kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    };
    // Beyond it the kernel takes the answer for broken.
    reply.locked(held.range.start().min(KERNEL_END), held.range.end().min(KERNEL_END), number, held.pid);
}

impl Fuse {
    /// Locks or unlocks, and replies.
    pub(super) fn run_set_lock(&self, asked: Asked, call: LockCall, wait: bool, reply: ReplyEmpty) {
        // A request that waits keeps its place for long: not one that others need.
        let place = match wait {
            true => self.lock_places.clone().try_acquire_owned().ok(),
            false => self.place(0),
        };
        let Some(place) = place else {
            return self.at_once(asked, reply, Err(Posix::NoLocks.into()), |reply, ()| reply.ok());
        };
        let (fs, metrics) = (self.fs.clone(), self.metrics.clone());
        metrics.in_flight.inc();
        self.runtime.spawn(async move {
            let started = clock::monotonic();
            let caring = Arc::new(Caring::default());
            let mut work = std::pin::pin!(fs.set_lock(call, wait, caring.clone()));
            let failed = loop {
                let looked = tokio::time::timeout(patience::LOCK_LOOK, work.as_mut()).await;
                match looked.map_err(|_| patience::pending(asked.thread)) {
                    Ok(outcome) => break conclude(asked, reply, outcome, |reply, ()| reply.ok()),
                    Err(Pending::Kill) => {
                        caring.leave();
                        reply.refuse(Errno::EINTR);
                        // What is locked all the same is unlocked then.
                        drop(work.await);
                        break Some(libc::EINTR);
                    }
                    Err(Pending::Signal) => caring.interrupt(),
                    Err(Pending::Nothing) => {}
                }
            };
            metrics.in_flight.dec();
            metrics.answered(asked.op, started.elapsed(), failed);
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_file_is_the_end_whatever_its_length() {
        assert_eq!(range_in(0, KERNEL_END).unwrap(), LockRange::ALL);
        assert_eq!(range_in(5, 9).unwrap(), LockRange::new(5, 9).unwrap());
        assert!(range_in(5, 4).is_err());
    }

    #[test]
    fn kinds_are_a_closed_set() {
        assert_eq!(kind_in(libc::F_WRLCK).unwrap(), Some(LockKind::Write));
        assert_eq!(kind_in(libc::F_UNLCK).unwrap(), None);
        assert!(kind_in(77).is_err());
    }
}
