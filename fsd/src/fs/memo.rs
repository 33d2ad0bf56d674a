//! What a lookup brought, for the questions that follow it in the same system call.
//!
//! `stat(2)` and `open(2)` make the kernel ask twice: LOOKUP of the last component, then GETATTR of what
//! it found; and of every directory on the way and of the file, unless the caller owns it, for the access control
//! list. These questions come from the same thread, at once. The answer from here is the state
//! at the time of the first, which lies within the same system call, and so is as good an answer as any.
//!
//! Rules that keep it so: one note a thread; any other request of that thread discards it; each of its answers is
//! used once; it is used only without a file handle; it is gone after [`AGE_MAX`]. Of lists it tells only that there is
//! none.

use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use shardfs_proto::types::{GlobalInode, clock};

use super::types::FileStat;

/// Threads whose notes do not get in each other's way; more than a machine runs at a time.
const SLOTS: usize = 256;
/// A busy machine may let a moment pass between the two questions.
const AGE_MAX: Duration = Duration::from_millis(5);

struct Note {
    thread: u32,
    ino: GlobalInode,
    stat: Option<FileStat>,
    no_acl: bool,
    at: Instant,
}

/// See the module's comment.
pub struct Memo {
    slots: [Mutex<Option<Note>>; SLOTS],
}

impl Default for Memo {
    fn default() -> Memo {
        Memo { slots: [const { Mutex::new(None) }; SLOTS] }
    }
}

impl Memo {
    fn slot(&self, thread: u32) -> MutexGuard<'_, Option<Note>> {
        self.slots[thread as usize % SLOTS].lock()
    }

    /// Leaves a note for the thread's next requests: `stat` itself only if the kernel will ask for it again.
    pub fn put(&self, thread: u32, stat: FileStat, will_ask: bool) {
        *self.slot(thread) = Some(Note {
            thread,
            ino: stat.ino,
            stat: will_ask.then_some(stat),
            no_acl: stat.has_acl == Some(false),
            at: clock::monotonic(),
        });
    }

    /// The attributes, if the thread's request before this one was the lookup of this inode. What else is noted
    /// stays.
    pub fn take(&self, thread: u32, ino: GlobalInode) -> Option<FileStat> {
        let mut slot = self.slot(thread);
        fitting(&mut slot, thread, ino)?.stat.take()
    }

    /// Whether the thread's last requests have shown that this inode has no access control list.
    pub fn take_no_acl(&self, thread: u32, ino: GlobalInode) -> bool {
        let mut slot = self.slot(thread);
        fitting(&mut slot, thread, ino).is_some_and(|note| std::mem::take(&mut note.no_acl))
    }

    /// The thread asks something else.
    pub fn discard(&self, thread: u32) {
        self.slot(thread).take();
    }
}

/// The note, if it is about this; else it is discarded.
fn fitting(slot: &mut Option<Note>, thread: u32, ino: GlobalInode) -> Option<&mut Note> {
    let fits = |note: &Note| {
        note.thread == thread && note.ino == ino && clock::monotonic().duration_since(note.at) <= AGE_MAX
    };
    if !slot.as_ref().is_some_and(fits) {
        *slot = None;
    }
    slot.as_mut()
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::{FileKind, Timestamp};

    fn stat(ino: u64) -> FileStat {
        let t = Timestamp::default();
        FileStat {
            ino: GlobalInode::outside(ino),
            kind: FileKind::Regular,
            mode: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: t,
            mtime: t,
            ctime: t,
            btime: t,
            has_acl: Some(false),
        }
    }

    /// A note is soon too old: what has to find one is repeated until the machine did not stand still meanwhile.
    fn while_it_is_new(finds: impl Fn() -> bool) {
        assert!((0..1000).any(|_| finds()), "it is never found");
    }

    #[test]
    fn a_note_is_for_one_thread_one_inode_one_use() {
        let memo = Memo::default();
        while_it_is_new(|| {
            memo.put(5, stat(10), true);
            assert_eq!(memo.take(6, GlobalInode::outside(10)), None);
            memo.take(5, GlobalInode::outside(10)) == Some(stat(10))
        });
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
        memo.put(5, stat(10), true);
        assert_eq!(memo.take(5, GlobalInode::outside(11)), None);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None, "another question discards the note");
        memo.put(5, stat(10), true);
        memo.discard(5);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
        memo.put(5, stat(10), true);
        assert_eq!(memo.take(5 + SLOTS as u32, GlobalInode::outside(10)), None, "a thread of the same slot");
    }

    #[test]
    fn that_there_is_no_list_is_told_once_and_beside_the_attributes() {
        let memo = Memo::default();
        let ino = GlobalInode::outside(10);
        while_it_is_new(|| {
            memo.put(5, stat(10), true);
            memo.take(5, ino) == Some(stat(10)) && memo.take_no_acl(5, ino)
        });
        assert!(!memo.take_no_acl(5, ino));
        while_it_is_new(|| {
            memo.put(5, stat(10), false);
            assert_eq!(memo.take(5, ino), None);
            memo.take_no_acl(5, ino)
        });
        memo.put(5, stat(10), true);
        assert!(!memo.take_no_acl(5, GlobalInode::outside(11)));
        assert!(!memo.take_no_acl(5, ino), "another question discards the note");
        for has_acl in [None, Some(true)] {
            memo.put(5, FileStat { has_acl, ..stat(10) }, true);
            assert!(!memo.take_no_acl(5, ino), "{has_acl:?}");
        }
    }

    #[test]
    fn a_note_grows_old() {
        let memo = Memo::default();
        memo.put(5, stat(10), true);
        std::thread::sleep(AGE_MAX * 2);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
        memo.put(5, stat(10), false);
        std::thread::sleep(AGE_MAX * 2);
        assert!(!memo.take_no_acl(5, GlobalInode::outside(10)));
    }
}
