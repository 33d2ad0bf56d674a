//! Names that are replaced all the time, for callers that have lost the race once.
//!
//! The kernel looks a name up, and then asks for what it found. If that was replaced meanwhile the answer is ESTALE,
//! and the kernel walks the path again, once; a program would see ESTALE if that were in vain as well. So the lookups of
//! a thread whose request has just ended with ESTALE register what they find as open: it outlives its name until the
//! request that follows has come.
//!
//! The lookup and the registration are two calls, which are repeated while others replace the name between them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::{Attr, FileKind, InodeNo, Reason, ShardId, clock};
use tokio::sync::oneshot;

use super::Fs;
use crate::failure::Outcome;

/// Within this time after an ESTALE the kernel has walked the path again, failovers included.
const AFTER_MAX: Duration = Duration::from_secs(10);
/// How long what was found outlives its name: the request that follows may have to wait for a failover.
const HOLD: Duration = Duration::from_secs(10);
/// Inodes held for a thread: a symlink is read before its target is looked up, and a link has an old and a new name.
const HELD_MAX: usize = 2;
/// Threads remembered; when there are more, all are forgotten.
const THREADS_MAX: usize = 4096;
/// Pairs of calls that one lookup makes.
const LOOKS_MAX: usize = 64;

/// A thread that walks a path again.
struct Walk {
    since: Instant,
    /// What it found; dropped, it is given back.
    held: VecDeque<oneshot::Sender<()>>,
}

/// See the module's comment.
#[derive(Default)]
pub struct SecondLook {
    walks: Mutex<HashMap<u32, Walk>>,
    /// Whether there may be any: the usual answer costs no lock.
    any: AtomicBool,
}

impl SecondLook {
    /// A request of this thread ends with ESTALE. To be called before it is answered.
    pub fn begin(&self, thread: u32) {
        if thread == 0 {
            // The kernel itself walks no paths.
            return;
        }
        let mut walks = self.walks.lock();
        if walks.len() >= THREADS_MAX {
            walks.clear();
        }
        walks.insert(thread, Walk { since: clock::monotonic(), held: VecDeque::new() });
        self.any.store(true, Ordering::Release);
    }

    /// The thread got what it wanted.
    pub fn end(&self, thread: u32) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut walks = self.walks.lock();
        walks.remove(&thread);
        self.any.store(!walks.is_empty(), Ordering::Release);
    }

    /// Whether the thread walks a path again.
    fn is_under_way(&self, thread: u32) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let walks = self.walks.lock();
        walks.get(&thread).is_some_and(|walk| clock::monotonic().duration_since(walk.since) <= AFTER_MAX)
    }

    /// Keeps what the thread found until it has found [`HELD_MAX`] more.
    fn keep(&self, thread: u32, held: oneshot::Sender<()>) {
        if let Some(walk) = self.walks.lock().get_mut(&thread) {
            if walk.held.len() >= HELD_MAX {
                walk.held.pop_front();
            }
            walk.held.push_back(held);
        }
    }
}

impl Fs {
    /// A request of a thread ends with ESTALE, and is about to be answered.
    pub fn found_stale(&self, thread: u32) {
        self.second_look.begin(thread);
    }

    /// A thread's request about what it looked up ends otherwise.
    pub fn found_well(&self, thread: u32) {
        self.second_look.end(thread);
    }

    /// What a name stands for, in a shard.
    pub(super) async fn look_up(
        &self,
        thread: u32,
        shard: ShardId,
        parent: InodeNo,
        name: &[u8],
    ) -> Outcome<Attr> {
        let again = self.second_look.is_under_way(thread);
        let mut attr = self.client.lookup(shard, parent, name).await?;
        // A directory is replaced only when it is empty, and cannot be held.
        if !again || attr.kind == FileKind::Directory {
            return Ok(attr);
        }
        for _ in 0..LOOKS_MAX {
            match self.client.open(shard, attr.inode).await {
                Ok(held) => {
                    self.hold(thread, shard, held.inode);
                    return Ok(held);
                }
                Err(error) if error.reason() == Reason::NotFound => {
                    attr = self.client.lookup(shard, parent, name).await?;
                }
                // Whatever it is, the request that follows meets it as well.
                Err(_) => break,
            }
        }
        Ok(attr)
    }

    /// Gives a registration back after [`HOLD`], or when the thread needs it no more.
    fn hold(&self, thread: u32, shard: ShardId, inode: InodeNo) {
        let (needed, needed_no_more) = oneshot::channel();
        self.second_look.keep(thread, needed);
        let releaser = self.releaser.clone();
        tokio::spawn(async move {
            tokio::time::timeout(HOLD, needed_no_more).await.ok();
            releaser.release(shard, inode).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_looks_again_from_an_estale_to_a_success() {
        let looks = SecondLook::default();
        assert!(!looks.is_under_way(7));
        looks.begin(7);
        assert!(looks.is_under_way(7));
        assert!(looks.is_under_way(7), "a path has several names");
        assert!(!looks.is_under_way(8));
        looks.end(8);
        assert!(looks.is_under_way(7));
        looks.end(7);
        assert!(!looks.is_under_way(7));
        looks.begin(0);
        assert!(!looks.is_under_way(0), "the kernel itself");
    }

    #[test]
    fn threads_are_forgotten() {
        let looks = SecondLook::default();
        looks.begin(7);
        let long_ago = clock::monotonic().checked_sub(AFTER_MAX * 2).unwrap();
        looks.walks.lock().get_mut(&7).unwrap().since = long_ago;
        assert!(!looks.is_under_way(7));
        for thread in 1..=2 * THREADS_MAX as u32 {
            looks.begin(thread);
        }
        assert!(looks.walks.lock().len() <= THREADS_MAX);
    }

    #[test]
    fn the_last_that_a_thread_found_are_held() {
        let looks = SecondLook::default();
        let mut found: Vec<oneshot::Receiver<()>> = Vec::new();
        let find = || {
            let (needed, needed_no_more) = oneshot::channel();
            looks.keep(7, needed);
            needed_no_more
        };
        let mut unasked = find();
        assert!(unasked.try_recv() == Err(oneshot::error::TryRecvError::Closed), "no walk, nothing held");
        looks.begin(7);
        found.extend((0..HELD_MAX + 1).map(|_| find()));
        let held =
            |found: &mut oneshot::Receiver<()>| found.try_recv() == Err(oneshot::error::TryRecvError::Empty);
        assert!(!held(&mut found[0]));
        assert!(found[1..].iter_mut().all(held));
        looks.end(7);
        assert!(!found.iter_mut().any(held));
    }
}
