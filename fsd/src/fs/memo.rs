//! The attributes that a lookup brought, for the question that follows it in the same system call.
//!
//! `stat(2)` and `open(2)` make the kernel ask twice: LOOKUP of the last component, then GETATTR of what
//! it found. The second question comes from the same thread, at once. Its answer from here is the state
//! at the time of the first, which lies within the same system call, and so is as good an answer as any.
//!
//! Rules that keep it so: one note a thread; any other request of that thread discards it; it is used
//! once; it is used only without a file handle; it is gone after [`AGE_MAX`].

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::{GlobalInode, clock};

use super::types::FileStat;

/// Threads whose notes do not get in each other's way; more than a machine runs at a time.
const SLOTS: usize = 256;
/// A busy machine may let a moment pass between the two questions.
const AGE_MAX: Duration = Duration::from_millis(5);

struct Note {
    thread: u32,
    stat: FileStat,
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
    fn slot(&self, thread: u32) -> &Mutex<Option<Note>> {
        &self.slots[thread as usize % SLOTS]
    }

    /// Leaves a note for the thread's next request.
    pub fn put(&self, thread: u32, stat: FileStat) {
        *self.slot(thread).lock() = Some(Note { thread, stat, at: clock::monotonic() });
    }

    /// The note, if the thread's request before this one was the lookup of this inode.
    pub fn take(&self, thread: u32, ino: GlobalInode) -> Option<FileStat> {
        let note = self.slot(thread).lock().take()?;
        let fits = note.thread == thread
            && note.stat.ino == ino
            && clock::monotonic().duration_since(note.at) <= AGE_MAX;
        fits.then_some(note.stat)
    }

    /// The thread asks something else.
    pub fn discard(&self, thread: u32) {
        self.slot(thread).lock().take();
    }
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
        }
    }

    #[test]
    fn a_note_is_for_one_thread_one_inode_one_use() {
        let memo = Memo::default();
        memo.put(5, stat(10));
        assert_eq!(memo.take(6, GlobalInode::outside(10)), None);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), Some(stat(10)));
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
        memo.put(5, stat(10));
        assert_eq!(memo.take(5, GlobalInode::outside(11)), None);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None, "another question discards the note");
        memo.put(5, stat(10));
        memo.discard(5);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
        memo.put(5, stat(10));
        assert_eq!(memo.take(5 + SLOTS as u32, GlobalInode::outside(10)), None, "a thread of the same slot");
    }

    #[test]
    fn a_note_grows_old() {
        let memo = Memo::default();
        memo.put(5, stat(10));
        std::thread::sleep(AGE_MAX * 2);
        assert_eq!(memo.take(5, GlobalInode::outside(10)), None);
    }
}
