//! Byte-range locks, as fcntl(2) has them.

use super::error::{Error, Result};
use super::ids::SessionId;

/// What a lock excludes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum LockKind {
    /// Writers.
    Read,
    /// Everybody else.
    Write,
}

/// Bytes of a file, from the first to the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct LockRange {
    start: u64,
    end: u64,
}

impl LockRange {
    /// All bytes that a file may have.
    pub const ALL: LockRange = LockRange { start: 0, end: LockRange::TO_THE_END };
    /// The last byte of a range that goes to the end of the file, however long it gets.
    pub const TO_THE_END: u64 = u64::MAX;

    /// From the first byte to the last.
    pub fn new(start: u64, end: u64) -> Result<LockRange> {
        if end < start {
            return Err(Error::invalid(format!("a lock's last byte, {end}, lies before its first, {start}")));
        }
        Ok(LockRange { start, end })
    }

    /// The first byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// The last byte.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Whether they have a byte in common.
    pub fn overlaps(self, other: LockRange) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether they have a byte in common, or one begins where the other ends.
    pub fn touches(self, other: LockRange) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }

    /// From the first byte of both to the last.
    pub fn hull(self, other: LockRange) -> LockRange {
        LockRange { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// What of it lies before another, and what behind.
    pub fn without(self, other: LockRange) -> [Option<LockRange>; 2] {
        let before = other.start.checked_sub(1).map(|end| (self.start, end.min(self.end)));
        let behind = other.end.checked_add(1).map(|start| (start.max(self.start), self.end));
        [before, behind].map(|part| part.and_then(|(start, end)| LockRange::new(start, end).ok()))
    }
}

/// Who holds locks or wants them: a session, and a number that it has given.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct LockOwner {
    /// The session.
    pub session: SessionId,
    /// Its number.
    pub number: u64,
}

/// A lock that somebody holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileLock {
    /// Who.
    pub owner: LockOwner,
    /// The process, for people.
    pub pid: u32,
    /// Which bytes.
    pub range: LockRange,
    /// What it excludes.
    pub kind: LockKind,
}

impl FileLock {
    /// Whether it keeps `owner` from having a lock of a range.
    pub fn excludes(&self, owner: LockOwner, range: LockRange, kind: LockKind) -> bool {
        self.owner != owner
            && self.range.overlaps(range)
            && (self.kind == LockKind::Write || kind == LockKind::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> LockRange {
        LockRange::new(start, end).unwrap()
    }

    #[test]
    fn ranges_have_parts() {
        assert_eq!(range(2, 9).without(range(4, 5)), [Some(range(2, 3)), Some(range(6, 9))]);
        assert_eq!(range(2, 9).without(range(0, 5)), [None, Some(range(6, 9))]);
        assert_eq!(range(2, 9).without(range(9, u64::MAX)), [Some(range(2, 8)), None]);
        assert_eq!(range(2, 9).without(LockRange::ALL), [None, None]);
        assert_eq!(range(2, 9).without(range(20, 30)), [Some(range(2, 9)), None]);
        assert_eq!(range(20, 30).without(range(2, 9)), [None, Some(range(20, 30))]);
        assert!(LockRange::new(3, 2).is_err());
    }

    #[test]
    fn neighbours_touch_and_do_not_overlap() {
        assert!(range(0, 4).touches(range(5, 9)) && range(5, 9).touches(range(0, 4)));
        assert!(!range(0, 4).overlaps(range(5, 9)));
        assert!(!range(0, 4).touches(range(6, 9)));
        assert!(range(0, u64::MAX).touches(range(u64::MAX, u64::MAX)));
        assert_eq!(range(0, 4).hull(range(5, 9)), range(0, 9));
    }
}
