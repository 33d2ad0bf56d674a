//! What the kernel has open: handles, and the registrations with the nodes that they stand for.
//!
//! - A file's handle stands for one registration of its inode in the shard's session; when it is
//!   released, the registration is given back by a task of its own, in batches, so that close(2) waits
//!   for nobody. What is unlinked and open everywhere lives until that happens.
//! - Handle numbers start at 1 and are never used twice.

use std::collections::{BTreeSet, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use shardfs_proto::client::Client;
use shardfs_proto::types::{InodeNo, ShardId};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::failure::{Failure, Outcome, Posix};
use crate::fs::dirs::DirHandle;

/// Handles at a time: as many open files as a big machine has.
pub const HANDLES_MAX: usize = 1 << 20;
/// Registrations that wait to be given back; when there are more, release waits.
const RELEASES_QUEUED_MAX: usize = 16_384;
/// Registrations that one call gives back.
const RELEASE_BATCH_MAX: usize = 1024;
/// Calls that give back registrations at a time: a shard that does not answer holds up few others.
const RELEASE_CALLS_MAX: usize = 16;
/// A call that takes longer counts no more among them: one may wait for ever.
const RELEASE_CALL_TIME: Duration = Duration::from_secs(60);

/// An open file of a shard.
#[derive(Debug)]
pub struct FileHandle {
    /// Its shard.
    pub shard: ShardId,
    /// Its inode.
    pub inode: InodeNo,
    /// The first failure of a write whose caller could not be told; the next flush tells it.
    untold: Mutex<Option<Failure>>,
    /// Losses of its shard that were told by this handle, or before it was opened.
    pub seen_losses: AtomicU64,
    /// Losses of locks in its shard before it was opened.
    pub seen_lock_losses: u64,
    /// Owners who have locked something through it, and not closed a descriptor of it since.
    lockers: Mutex<BTreeSet<u64>>,
}

impl FileHandle {
    /// For an inode that is registered with its shard.
    pub fn new(shard: ShardId, inode: InodeNo, seen_losses: u64, seen_lock_losses: u64) -> FileHandle {
        FileHandle {
            shard,
            inode,
            untold: Mutex::new(None),
            seen_losses: seen_losses.into(),
            seen_lock_losses,
            lockers: Mutex::default(),
        }
    }

    /// Notes that an owner has locked something through it.
    pub fn note_locker(&self, owner: u64) {
        self.lockers.lock().insert(owner);
    }

    /// An owner has closed a descriptor of it.
    pub fn forget_locker(&self, owner: u64) {
        self.lockers.lock().remove(&owner);
    }

    /// Owners who may have something locked through it.
    pub fn lockers(&self) -> Vec<u64> {
        self.lockers.lock().iter().copied().collect()
    }

    /// Keeps a failure for the next flush.
    pub fn keep_failure(&self, failure: &Failure) {
        self.untold.lock().get_or_insert_with(|| failure.clone());
    }

    /// The failure that was not told yet.
    pub fn take_failure(&self) -> Option<Failure> {
        self.untold.lock().take()
    }
}

/// What a handle stands for.
#[derive(Clone)]
pub enum Handle {
    /// A file of a shard.
    File(Arc<FileHandle>),
    /// A directory.
    Directory(Arc<DirHandle>),
    /// A virtual file's content as it was when it was opened.
    Content(Bytes),
}

/// The table of handles.
#[derive(Default)]
pub struct Handles {
    table: Mutex<HashMap<u64, Handle>>,
    last: AtomicU64,
}

impl Handles {
    /// A number for what was opened.
    pub fn insert(&self, handle: Handle) -> Outcome<u64> {
        let mut table = self.table.lock();
        if table.len() >= HANDLES_MAX {
            return Err(Posix::TooManyOpen.into());
        }
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        table.insert(number, handle);
        Ok(number)
    }

    /// What the number stands for.
    pub fn get(&self, number: u64) -> Option<Handle> {
        self.table.lock().get(&number).cloned()
    }

    /// A file of a shard.
    pub fn file(&self, number: u64) -> Option<Arc<FileHandle>> {
        match self.table.lock().get(&number) {
            Some(Handle::File(file)) => Some(file.clone()),
            _ => None,
        }
    }

    /// A directory.
    pub fn directory(&self, number: u64) -> Option<Arc<DirHandle>> {
        match self.table.lock().get(&number) {
            Some(Handle::Directory(directory)) => Some(directory.clone()),
            _ => None,
        }
    }

    /// Takes it out.
    pub fn remove(&self, number: u64) -> Option<Handle> {
        self.table.lock().remove(&number)
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.table.lock().len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

enum Release {
    One(ShardId, InodeNo),
    /// Answered when everything that was queued before is given back.
    Drained(oneshot::Sender<()>),
}

/// Gives registrations back.
#[derive(Clone)]
pub struct Releaser {
    queue: mpsc::Sender<Release>,
}

impl Releaser {
    /// Starts its task on the current runtime; the task ends with the last `Releaser`.
    pub fn start(client: Client) -> Releaser {
        let (queue, requests) = mpsc::channel(RELEASES_QUEUED_MAX);
        tokio::spawn(give_back(client, requests));
        Releaser { queue }
    }

    /// Queues one; false if the queue is full.
    pub fn try_release(&self, shard: ShardId, inode: InodeNo) -> bool {
        self.queue.try_send(Release::One(shard, inode)).is_ok()
    }

    /// Queues one, waiting for a place.
    pub async fn release(&self, shard: ShardId, inode: InodeNo) {
        // The task ends only with the last sender.
        self.queue.send(Release::One(shard, inode)).await.ok();
    }

    /// Returns when everything queued before is given back.
    pub async fn drained(&self) {
        let (tell, told) = oneshot::channel();
        if self.queue.send(Release::Drained(tell)).await.is_ok() {
            told.await.ok();
        }
    }
}

async fn give_back(client: Client, mut requests: mpsc::Receiver<Release>) {
    let calls = Arc::new(Semaphore::new(RELEASE_CALLS_MAX));
    let mut batch = Vec::with_capacity(RELEASE_BATCH_MAX);
    while requests.recv_many(&mut batch, RELEASE_BATCH_MAX).await > 0 {
        let mut by_shard: HashMap<ShardId, Vec<InodeNo>> = HashMap::new();
        let mut waiting = Vec::new();
        for request in batch.drain(..) {
            match request {
                Release::One(shard, inode) => by_shard.entry(shard).or_default().push(inode),
                Release::Drained(tell) => waiting.push(tell),
            }
        }
        for (shard, inodes) in by_shard {
            let Ok(permit) = calls.clone().acquire_owned().await else { return };
            let client = client.clone();
            tokio::spawn(async move {
                let mut call = pin!(client.release(shard, inodes));
                let in_time = tokio::time::timeout(RELEASE_CALL_TIME, call.as_mut()).await;
                drop(permit);
                let given_back = match in_time {
                    Ok(given_back) => given_back,
                    Err(_) => call.await,
                };
                if let Err(error) = given_back {
                    // The session's end frees what it held, so nothing is lost.
                    tracing::debug!(%shard, %error, "cannot give back open files");
                }
            });
        }
        if !waiting.is_empty() {
            let Ok(all) = calls.acquire_many(RELEASE_CALLS_MAX as u32).await else { return };
            drop(all);
            for tell in waiting {
                tell.send(()).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::Error;

    #[test]
    fn numbers_are_never_used_twice() {
        let handles = Handles::default();
        let a = handles.insert(Handle::Content(Bytes::from_static(b"a"))).unwrap();
        assert!(handles.remove(a).is_some());
        let b = handles.insert(Handle::Content(Bytes::from_static(b"b"))).unwrap();
        assert_ne!(a, b);
        assert!(handles.get(a).is_none());
        assert!(handles.file(b).is_none());
        assert_eq!(handles.len(), 1);
    }

    #[test]
    fn the_first_failure_is_told_once() {
        let file = FileHandle::new(ShardId::new(1).unwrap(), InodeNo::ROOT, 0, 0);
        assert!(file.take_failure().is_none());
        file.keep_failure(&Error::io("first").into());
        file.keep_failure(&Error::not_found("second").into());
        let told = file.take_failure().unwrap();
        assert_eq!(told.reason(), Some(shardfs_proto::types::Reason::Io));
        assert!(file.take_failure().is_none());
    }
}
