//! Byte-range locks.

use shardfs_proto::types::limits::{LOCKS_PER_FILE_MAX, LOCKS_PER_SHARD_MAX};
use shardfs_proto::types::op::OpResult;
use shardfs_proto::types::{
    Error, FileKind, FileLock, InodeNo, LockKind, LockOwner, LockRange, Reason, Result, SessionId,
};

use super::Apply;
use crate::shard::keys::{self, Cf};
use crate::shard::locks;
use crate::shard::records::LocksRecord;
use crate::shard::session::Effect;

impl Apply<'_, '_> {
    /// Locks or (`None`) unlocks a range of a file for an owner of the session.
    pub(super) fn set_lock(
        &mut self,
        ino: InodeNo,
        number: u64,
        pid: u32,
        range: LockRange,
        kind: Option<LockKind>,
    ) -> Result<OpResult> {
        let owner = LockOwner { session: self.asking()?, number };
        if self.inode(ino)?.kind != FileKind::Regular {
            return Err(Error::new(Reason::WrongKind, format!("inode {ino} is no file that can be locked")));
        }
        let before = self.live.locks(ino);
        if let Some(kind) = kind
            && let Some(held) = locks::conflict(before, owner, range, kind)
        {
            return Err(Error::new(
                Reason::LockConflict,
                format!(
                    "inode {ino}: process {} of session {} holds a lock of bytes {} to {}",
                    held.pid,
                    held.owner.session,
                    held.range.start(),
                    held.range.end()
                ),
            ));
        }
        let after = locks::changed(before, owner, pid, range, kind);
        if after.len() > before.len() {
            let all = self.live.lock_count() - before.len() + after.len();
            if after.len() > LOCKS_PER_FILE_MAX || all > LOCKS_PER_SHARD_MAX {
                return Err(Error::new(
                    Reason::LocksExhausted,
                    format!(
                        "a file has at most {LOCKS_PER_FILE_MAX} locks, and those of a shard {LOCKS_PER_SHARD_MAX}"
                    ),
                ));
            }
        }
        if after != before {
            let loosened = locks::loosens(before, owner, range, kind);
            self.put_locks(ino, after, loosened);
        }
        Ok(OpResult::default())
    }

    /// Sets a file's locks.
    pub(in crate::shard) fn put_locks(&mut self, ino: InodeNo, locks: Vec<FileLock>, loosened: bool) {
        if locks.is_empty() {
            self.txn.delete(Cf::Sys, keys::locks(ino));
        } else {
            self.txn.put(Cf::Sys, keys::locks(ino), LocksRecord { locks: locks.clone() }.encode());
        }
        self.effects.push(Effect::Locks { inode: ino, locks, loosened });
    }

    /// Drops what a session has locked.
    pub(super) fn drop_locks_of(&mut self, session: SessionId) {
        for (ino, left) in self.live.locks_without(session) {
            self.put_locks(ino, left, true);
        }
    }
}
