//! Byte-range locks.

use super::missing;
use crate::types::{FileLock, LockKind, LockOwner, LockRange, Result, SessionId};
use crate::wire;

/// A kind.
pub fn lock_kind_to_wire(kind: LockKind) -> wire::LockKind {
    match kind {
        LockKind::Read => wire::LockKind::Read,
        LockKind::Write => wire::LockKind::Write,
    }
}

/// A kind of lock.
pub fn lock_kind_from_wire(kind: i32) -> Result<LockKind> {
    lock_change_from_wire(kind)?.ok_or_else(|| missing("the kind of lock, which is no unlocking,"))
}

/// A kind of lock; `None`: to unlock.
pub(super) fn lock_change_from_wire(kind: i32) -> Result<Option<LockKind>> {
    match wire::LockKind::try_from(kind) {
        Ok(wire::LockKind::Read) => Ok(Some(LockKind::Read)),
        Ok(wire::LockKind::Write) => Ok(Some(LockKind::Write)),
        Ok(wire::LockKind::Unlock) => Ok(None),
        Ok(wire::LockKind::Unspecified) | Err(_) => Err(missing("the kind of lock")),
    }
}

/// A lock that is held.
pub fn file_lock_to_wire(lock: &FileLock) -> wire::FileLock {
    wire::FileLock {
        session_id: lock.owner.session.get(),
        owner: lock.owner.number,
        pid: lock.pid,
        start: lock.range.start(),
        end: lock.range.end(),
        kind: lock_kind_to_wire(lock.kind).into(),
    }
}

/// A lock that is held.
pub fn file_lock_from_wire(lock: wire::FileLock) -> Result<FileLock> {
    let session = SessionId::new(lock.session_id).ok_or_else(|| missing("the lock's session"))?;
    Ok(FileLock {
        owner: LockOwner { session, number: lock.owner },
        pid: lock.pid,
        range: LockRange::new(lock.start, lock.end)?,
        kind: lock_kind_from_wire(lock.kind)?,
    })
}
