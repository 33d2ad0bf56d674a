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
use tokio::sync::{Notify, oneshot};

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
            // Before the node is asked: it may give the lock, and its answer be lost.
            if let (Some(_), Some(file)) = (call.kind, &at.file) {
                file.note_locker(call.owner);
            }
            match self.client.set_lock(at.shard, at.request, call.kind, wanted).await {
                Ok(()) => return Ok(()),
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
        let client = self.client.clone();
        let give_back = move || {
            let client = client.clone();
            async move { client.drop_locks(held.shard, held.inode, held.owner).await }
        };
        told_at_close(keep_trying(held, give_back).await)
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

/// Gives locks back in a task of its own until that is done; returns what the first attempt has brought. A request that waits for it is given
/// up some time after its caller was killed (`fuse::patience`): this mount, and with it its session and the lock, lives on.
async fn keep_trying<F>(held: Held, give_back: impl Fn() -> F + Send + 'static) -> Result<(), Error>
where
    F: Future<Output = Result<(), Error>> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let first = give_back().await;
        let mut is_done = first.is_ok();
        if let Err(error) = &first {
            let Held { shard, inode, .. } = held;
            tracing::warn!(%shard, %inode, %error, "locks of a file that was closed cannot be given back yet");
        }
        // Nobody may wait any more.
        tell.send(first).ok();
        for _ in 0..DROP_TRIES {
            if is_done {
                return;
            }
            tokio::time::sleep(DROP_PAUSE).await;
            is_done = give_back().await.is_ok();
        }
    });
    told.await.unwrap_or_else(|_| Err(Error::internal("giving locks back has ended without a word")))
}

/// A node that knows no locks gives none back either. It has none of its own; those that a newer one gave are tried again in the background,
/// and closing the file has not failed.
fn told_at_close(dropped: Result<(), Error>) -> Outcome<()> {
    match dropped {
        Err(error) if error.reason() == Reason::Unsupported => Ok(()),
        dropped => dropped.map_err(refused),
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
    use super::super::tests::cut_off;
    use super::*;
    use crate::handles::Handle;
    use parking_lot::Mutex;
    use shardfs_proto::types::GlobalInode;

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

    fn held() -> Held {
        Held { shard: ShardId::new(1).unwrap(), inode: InodeNo::new(2).unwrap(), owner: 3 }
    }

    #[tokio::test]
    async fn locks_are_given_back_although_the_request_was_given_up() {
        let (node, given_back) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let give_back = {
            let (node, given_back) = (node.clone(), given_back.clone());
            move || {
                let (node, given_back) = (node.clone(), given_back.clone());
                async move {
                    node.notified().await;
                    given_back.notify_one();
                    Ok(())
                }
            }
        };
        let mut request = Box::pin(keep_trying(held(), give_back));
        assert!(futures::poll!(request.as_mut()).is_pending());
        drop(request);
        node.notify_one();
        tokio::time::timeout(SESSION_TTL, given_back.notified()).await.expect("it is not given back");
    }

    #[tokio::test]
    async fn the_first_failure_is_told_and_the_rest_is_done_in_the_background() {
        let attempts = Arc::new(Mutex::new(0));
        let done = Arc::new(Notify::new());
        let give_back = {
            let (attempts, done) = (attempts.clone(), done.clone());
            move || {
                *attempts.lock() += 1;
                if *attempts.lock() < 3 {
                    return std::future::ready(Err(Error::unavailable("away")));
                }
                done.notify_one();
                std::future::ready(Ok(()))
            }
        };
        assert_eq!(keep_trying(held(), give_back).await.unwrap_err().reason(), Reason::Unavailable);
        tokio::time::timeout(SESSION_TTL, done.notified()).await.expect("it is not tried again");
    }

    #[tokio::test]
    async fn who_may_have_locked_something_is_noted_whatever_the_node_answers() {
        let fs = cut_off(Duration::from_millis(50));
        let Held { shard, inode, owner } = held();
        let file = Arc::new(FileHandle::new(shard, inode, 0, 0));
        let handle = fs.handles.insert(Handle::File(file.clone())).unwrap();
        let ino = GlobalInode::new(shard, inode).get();
        let call = LockCall { ino, handle, owner, pid: 1, range: LockRange::ALL, kind: None };
        fs.set_lock(call, false, Arc::default()).await.unwrap_err();
        assert!(file.lockers().is_empty(), "it was unlocking");
        let call = LockCall { kind: Some(LockKind::Write), ..call };
        fs.set_lock(call, false, Arc::default()).await.unwrap_err();
        assert_eq!(file.lockers(), [owner]);
    }

    #[test]
    fn a_file_can_be_closed_at_a_node_that_knows_no_locks() {
        let told = |reason| told_at_close(Err(Error::new(reason, "x")));
        assert!(told(Reason::Unsupported).is_ok() && told_at_close(Ok(())).is_ok());
        assert_eq!(told(Reason::Io).unwrap_err().reason(), Some(Reason::Io));
    }

    #[test]
    fn a_node_that_knows_no_locks_gives_none() {
        let errno = |reason| crate::errno::errno(&refused(Error::new(reason, "x"))).code();
        assert_eq!(errno(Reason::Unsupported), libc::ENOLCK);
        assert_eq!(errno(Reason::LockConflict), libc::EAGAIN);
        assert_eq!(errno(Reason::NotFound), libc::ESTALE);
    }
}
