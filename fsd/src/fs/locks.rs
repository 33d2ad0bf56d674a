//! Byte-range locks: kept by the shard, for all mounts.
//!
//! - An owner is what the kernel says it is: a process for POSIX locks, an open file for those of F_OFD_SETLK. What a process has locked goes
//!   when it closes any descriptor of the file (`flush`); what was locked through an open file goes with it at the latest
//!   (`release`).
//! - A closed shard never changes: whoever may read it may lock it for reading, and nobody is asked.
//! - What is locked for a caller that has died meanwhile is unlocked again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shardfs_proto::client::LockRequest;
use shardfs_proto::types::limits::SESSION_TTL;
use shardfs_proto::types::{Error, FileLock, InodeNo, LockKind, LockRange, Reason, ShardId};
use tokio::sync::Notify;

use super::Fs;
use super::types::Node;
use crate::failure::{Failure, Outcome, Posix};
use crate::handles::FileHandle;

/// How often giving locks back is tried again.
const DROP_PAUSE: Duration = Duration::from_secs(1);
/// Then their session is over, and they with it.
const DROP_TRIES: u64 = SESSION_TTL.as_secs();

/// A request for a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockCall {
    /// The file.
    pub ino: u64,
    /// Through which open file.
    pub handle: u64,
    /// For whom.
    pub owner: u64,
    /// For which process; 0 to unlock.
    pub pid: u32,
    /// Which bytes.
    pub range: LockRange,
    /// `None` unlocks.
    pub kind: Option<LockKind>,
}

/// What an owner may have locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    shard: ShardId,
    inode: InodeNo,
    owner: u64,
}

/// Whether the caller of a request still waits for its answer.
#[derive(Default)]
pub struct Caring {
    interrupted: AtomicBool,
    gone: AtomicBool,
    changed: Notify,
}

impl Caring {
    /// The caller has a signal to handle: it waits no longer than it must.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// The caller has got its answer, and dies: it wants no lock.
    pub fn leave(&self) {
        self.gone.store(true, Ordering::Release);
        self.interrupt();
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Ends when the caller is interrupted or gone.
    async fn over(&self) {
        while !self.interrupted.load(Ordering::Acquire) {
            // One that came before is remembered.
            self.changed.notified().await;
        }
    }
}

/// A file of a shard that can have locks.
struct Lockable {
    shard: ShardId,
    request: LockRequest,
    file: Option<Arc<FileHandle>>,
}

impl Fs {
    /// What keeps an owner from a lock.
    pub async fn get_lock(&self, call: LockCall) -> Outcome<Option<FileLock>> {
        let (Some(at), Some(kind)) = (self.lockable(&call)?, call.kind) else { return Ok(None) };
        match self.client.get_lock(at.shard, at.request, kind).await {
            Err(error) if error.reason() == Reason::ShardReadOnly => Ok(None),
            outcome => outcome.map_err(refused),
        }
    }

    /// Locks or unlocks; `wait`: until that can be done, or the caller does not care any more.
    pub async fn set_lock(&self, call: LockCall, wait: bool, caring: Arc<Caring>) -> Outcome<()> {
        let Some(at) = self.lockable(&call)? else { return self.lock_closed(&call) };
        loop {
            let wanted = || !caring.is_gone();
            match self.client.set_lock(at.shard, at.request, call.kind, wanted).await {
                Ok(()) => {
                    if let (Some(_), Some(file)) = (call.kind, &at.file) {
                        file.note_locker(call.owner);
                    }
                    return Ok(());
                }
                Err(error) if error.reason() == Reason::ShardReadOnly => return self.lock_closed(&call),
                Err(error) if error.reason() == Reason::LockConflict && wait => {}
                Err(error) => return Err(refused(error)),
            }
            let Some(kind) = call.kind else { return Ok(()) };
            tokio::select! {
                biased;
                () = caring.over() => return Err(Posix::Interrupted.into()),
                waited = self.client.wait_lock(at.shard, at.request, kind) => waited.map_err(refused)?,
            }
        }
    }

    /// `None`: in what never changes, nothing needs to be kept.
    fn lockable(&self, call: &LockCall) -> Outcome<Option<Lockable>> {
        let (shard, inode) = match self.node(call.ino)? {
            Node::InShard(shard, _) if self.shards.is_closed(shard) => return Ok(None),
            Node::InShard(shard, inode) => (shard, inode),
            Node::Root | Node::Virtual(_) | Node::Snapshots(_) => return Ok(None),
        };
        let file = self.handles.file(call.handle);
        let seen_losses = file.as_ref().map_or(0, |file| file.seen_lock_losses);
        let (owner, pid, range) = (call.owner, call.pid, call.range);
        Ok(Some(Lockable { shard, request: LockRequest { inode, owner, pid, range, seen_losses }, file }))
    }

    fn lock_closed(&self, call: &LockCall) -> Outcome<()> {
        match call.kind {
            Some(LockKind::Write) => Err(Posix::ReadOnly.into()),
            Some(LockKind::Read) | None => Ok(()),
        }
    }

    /// A descriptor of an open file is closed by an owner: what it may have locked in the file.
    pub fn closed_by(&self, ino: u64, handle: u64, owner: u64) -> Option<Held> {
        let Ok(Node::InShard(shard, inode)) = self.node(ino) else { return None };
        if let Some(file) = self.handles.file(handle) {
            file.forget_locker(owner);
        }
        self.client.may_hold_locks(shard, inode, owner).then_some(Held { shard, inode, owner })
    }

    /// What may have been locked through an open file and not been given back.
    pub fn locked_through(&self, handle: u64) -> Vec<Held> {
        let Some(file) = self.handles.file(handle) else { return Vec::new() };
        let (shard, inode) = (file.shard, file.inode);
        let lockers = file.lockers().into_iter();
        let lockers = lockers.filter(|owner| self.client.may_hold_locks(shard, inode, *owner));
        lockers.map(|owner| Held { shard, inode, owner }).collect()
    }

    /// Gives back all that an owner has locked in a file. What cannot be given back now is tried again in the background.
    pub async fn drop_locks(&self, held: Held) -> Outcome<()> {
        let Held { shard, inode, owner } = held;
        let dropped = self.client.drop_locks(shard, inode, owner).await;
        if let Err(error) = &dropped {
            tracing::warn!(%shard, %inode, %error, "locks of a file that was closed cannot be given back yet");
            let client = self.client.clone();
            tokio::spawn(async move {
                for _ in 0..DROP_TRIES {
                    tokio::time::sleep(DROP_PAUSE).await;
                    if client.drop_locks(shard, inode, owner).await.is_ok() {
                        return;
                    }
                }
            });
        }
        dropped.map_err(refused)
    }

    /// Fails if locks were lost on which the users of an open file may rely.
    pub(super) fn check_locks(&self, handle: u64) -> Outcome<()> {
        match self.handles.file(handle) {
            Some(file) => Ok(self.client.check_locks(file.shard, file.inode, file.seen_lock_losses)?),
            None => Ok(()),
        }
    }

    /// Losses of locks that the users of an open file know of.
    pub(super) fn seen_lock_losses(&self, handle: u64) -> Option<u64> {
        self.handles.file(handle).map(|file| file.seen_lock_losses)
    }
}

/// A node that knows no locks is no reason to lock within this mount only: others would not know.
fn refused(error: Error) -> Failure {
    if error.reason() == Reason::Unsupported {
        tracing::warn!(
            %error,
            "locks over the cluster need newer nodes: programs get ENOLCK; the mount option locks=local makes them hold within \
             this mount only"
        );
        return Posix::NoLocks.into();
    }
    Failure::from(error).stale_if_gone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_interruption_that_came_first_is_not_missed() {
        let caring = Caring::default();
        caring.interrupt();
        caring.over().await;
        caring.over().await;
        assert!(!caring.is_gone());
        caring.leave();
        assert!(caring.is_gone());
    }

    #[test]
    fn a_node_that_knows_no_locks_gives_none() {
        let errno = |reason| crate::errno::errno(&refused(Error::new(reason, "x"))).code();
        assert_eq!(errno(Reason::Unsupported), libc::ENOLCK);
        assert_eq!(errno(Reason::LockConflict), libc::EAGAIN);
        assert_eq!(errno(Reason::NotFound), libc::ESTALE);
    }
}
