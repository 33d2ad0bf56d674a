//! Byte-range locks: what a change makes of a file's locks, and who waits for whom.
//!
//! The locks themselves are records, with a copy in [`Live`](super::session::Live); who waits is known in memory alone, for as
//! long as a call waits.
//!
//! Invariants: an owner's locks of a file have no byte in common, and those of one kind do not touch; no two owners have locks that
//! exclude each other. A waiter is told once nobody keeps the lock from its owner any more, whatever change that comes of, if
//! the change was made after the waiter had been registered. Others sleep on: what still keeps them waiting is the next
//! change's to free.
//!
//! Must not: read or write a store.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use shardfs_proto::types::limits::LOCK_WAITERS_MAX;
use shardfs_proto::types::{Error, FileLock, InodeNo, LockKind, LockOwner, LockRange, Reason, Result};
use tokio::sync::Notify;

/// The first lock that keeps an owner from locking a range.
pub fn conflict(locks: &[FileLock], owner: LockOwner, range: LockRange, kind: LockKind) -> Option<&FileLock> {
    locks.iter().find(|lock| lock.excludes(owner, range, kind))
}

/// A file's locks after an owner has locked or (`None`) unlocked a range, by first bytes.
pub fn changed(
    locks: &[FileLock],
    owner: LockOwner,
    pid: u32,
    range: LockRange,
    kind: Option<LockKind>,
) -> Vec<FileLock> {
    let mut after = Vec::with_capacity(locks.len() + 2);
    let mut whole = range;
    for lock in locks {
        if lock.owner != owner {
            after.push(*lock);
        } else if Some(lock.kind) == kind && lock.range.touches(range) {
            whole = whole.hull(lock.range);
        } else if lock.range.overlaps(range) {
            let left = lock.range.without(range).into_iter().flatten();
            after.extend(left.map(|range| FileLock { range, ..*lock }));
        } else {
            after.push(*lock);
        }
    }
    if let Some(kind) = kind {
        after.push(FileLock { owner, pid, range: whole, kind });
    }
    after.sort_by_key(|lock| (lock.range.start(), lock.owner));
    after
}

/// Whether somebody may have a lock after that change who could not before.
pub fn loosens(locks: &[FileLock], owner: LockOwner, range: LockRange, kind: Option<LockKind>) -> bool {
    locks.iter().any(|lock| {
        lock.owner == owner
            && lock.range.overlaps(range)
            && match kind {
                None => true,
                Some(LockKind::Read) => lock.kind == LockKind::Write,
                Some(LockKind::Write) => false,
            }
    })
}

/// A lock that is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Who wants it.
    pub owner: LockOwner,
    /// In which file.
    pub inode: InodeNo,
    /// Which bytes.
    pub range: LockRange,
    /// What it is to exclude.
    pub kind: LockKind,
}

impl Wanted {
    /// Whether somebody keeps it from its owner.
    pub fn is_blocked(&self, locks: &[FileLock]) -> bool {
        conflict(locks, self.owner, self.range, self.kind).is_some()
    }
}

/// Who waits for a lock of a shard.
#[derive(Default)]
pub struct Waits {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Threads of one owner may wait for several.
    waiting: HashMap<LockOwner, Vec<Waiter>>,
    count: usize,
    last_id: u64,
}

struct Waiter {
    id: u64,
    wanted: Wanted,
    changed: Arc<Notify>,
}

/// Somebody waits, for as long as this lives.
pub struct Waiting<'a> {
    waits: &'a Waits,
    owner: LockOwner,
    id: u64,
    changed: Arc<Notify>,
}

impl Waits {
    /// How many wait.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.table.lock().count
    }

    /// Registers a waiter.
    pub fn begin(&self, wanted: Wanted) -> Result<Waiting<'_>> {
        let mut table = self.table.lock();
        if table.count >= LOCK_WAITERS_MAX {
            let message = format!("{LOCK_WAITERS_MAX} calls wait for locks of the shard, the limit");
            return Err(Error::new(Reason::Busy, message).with_retry_after_ms(200));
        }
        table.count += 1;
        table.last_id += 1;
        let (id, changed) = (table.last_id, Arc::new(Notify::new()));
        let waiter = Waiter { id, wanted, changed: Arc::clone(&changed) };
        table.waiting.entry(wanted.owner).or_default().push(waiter);
        Ok(Waiting { waits: self, owner: wanted.owner, id, changed })
    }

    /// Whether the owner of a wanted lock would wait for somebody who waits, maybe by others, for it.
    pub fn closes_a_circle<'l>(&self, wanted: &Wanted, locks: impl Fn(InodeNo) -> &'l [FileLock]) -> bool {
        let table = self.table.lock();
        let blockers = |wanted: &Wanted| {
            let (owner, range, kind) = (wanted.owner, wanted.range, wanted.kind);
            let excluding = locks(wanted.inode).iter().filter(move |lock| lock.excludes(owner, range, kind));
            excluding.map(|lock| lock.owner)
        };
        // Whoever wants the same as another one is kept from it by the same owners, but for that one, who is seen already: one look at
        // their locks is enough for all.
        let (mut seen, mut wishes) = (HashSet::new(), HashSet::new());
        let mut left: Vec<LockOwner> = blockers(wanted).collect();
        while let Some(owner) = left.pop() {
            if owner == wanted.owner {
                return true;
            }
            if seen.insert(owner) {
                for Waiter { wanted, .. } in table.waiting.get(&owner).into_iter().flatten() {
                    if wishes.insert((wanted.inode, wanted.range, wanted.kind)) {
                        left.extend(blockers(wanted));
                    }
                }
            }
        }
        false
    }

    /// Tells those who wait for locks of these files, and may have them as the files' locks are now.
    pub fn tell<'l>(&self, files: &HashSet<InodeNo>, locks: impl Fn(InodeNo) -> &'l [FileLock]) {
        if files.is_empty() {
            return;
        }
        let table = self.table.lock();
        for Waiter { wanted, changed, .. } in table.waiting.values().flatten() {
            if files.contains(&wanted.inode) && !wanted.is_blocked(locks(wanted.inode)) {
                changed.notify_one();
            }
        }
    }
}

impl Waiting<'_> {
    /// Ends once nobody may keep the lock from its owner any more. May be dropped at any time.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut table = self.waits.table.lock();
        table.count -= 1;
        if let Some(waiters) = table.waiting.get_mut(&self.owner) {
            waiters.retain(|waiter| waiter.id != self.id);
            if waiters.is_empty() {
                table.waiting.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use shardfs_proto::types::SessionId;

    use super::*;

    const FILE: InodeNo = InodeNo::ROOT;

    /// Four of each session.
    fn owner(number: u64) -> LockOwner {
        LockOwner { session: SessionId::new(1 + number / 4).unwrap(), number }
    }

    /// Whether a waiter was told since this was asked last.
    fn is_told(waiting: &Waiting<'_>) -> bool {
        waiting.changed().now_or_never().is_some()
    }

    #[test]
    fn those_are_told_whom_nobody_blocks_any_more() {
        const BYTES: u64 = 16;
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let waits = Waits::default();
        let mut locks: Vec<FileLock> = Vec::new();
        let mut waiting: Vec<(Wanted, Waiting<'_>)> = Vec::new();
        let (mut told, mut left) = (0, 0);
        for step in 0..20_000 {
            let start = rng.u64(..BYTES);
            let end = rng.u64(start..BYTES);
            let end = if end == BYTES - 1 { LockRange::TO_THE_END } else { end };
            let range = LockRange::new(start, end).unwrap();
            let owner = owner(rng.u64(..8));
            let kind = *rng.choice(&[None, Some(LockKind::Read), Some(LockKind::Write)]).unwrap();
            let wanted = kind.map(|kind| Wanted { owner, inode: FILE, range, kind });
            if let Some(wanted) = wanted.filter(|wanted| wanted.is_blocked(&locks)) {
                if waiting.len() < 20 {
                    waiting.push((wanted, waits.begin(wanted).unwrap()));
                }
                continue;
            }
            let loosened = if step % 50 == 0 {
                locks.retain(|lock| lock.owner.session != owner.session);
                true
            } else {
                let loosened = loosens(&locks, owner, range, kind);
                locks = changed(&locks, owner, 1, range, kind);
                loosened
            };
            if loosened {
                waits.tell(&HashSet::from([FILE]), |_| &locks);
            }
            waiting.retain(|(wanted, waiting)| {
                let is_blocked = wanted.is_blocked(&locks);
                assert_eq!(
                    is_told(waiting),
                    !is_blocked,
                    "seed {seed}, step {step}: {wanted:?} of {locks:?}"
                );
                told += usize::from(!is_blocked);
                left += usize::from(is_blocked && loosened);
                is_blocked
            });
        }
        assert!(told > 100 && left > 100, "seed {seed}: {told} told, {left} left");
    }

    #[test]
    fn ranges_reach_to_the_last_byte_that_there_is() {
        const LAST: u64 = LockRange::TO_THE_END;
        let (write, read) = (Some(LockKind::Write), Some(LockKind::Read));
        let after = |steps: &[(u64, u64, Option<LockKind>)]| {
            let mut locks = Vec::new();
            for (start, end, kind) in steps {
                locks = changed(&locks, owner(0), 1, LockRange::new(*start, *end).unwrap(), *kind);
            }
            locks.iter().map(|lock| (lock.range.start(), lock.range.end(), lock.kind)).collect::<Vec<_>>()
        };
        let (w, r) = (LockKind::Write, LockKind::Read);
        assert_eq!(after(&[(LAST, LAST, write), (LAST - 1, LAST - 1, write)]), [(LAST - 1, LAST, w)]);
        assert_eq!(after(&[(0, LAST, write), (LAST, LAST, None)]), [(0, LAST - 1, w)]);
        assert_eq!(after(&[(0, LAST, write), (0, 0, None)]), [(1, LAST, w)]);
        assert_eq!(after(&[(0, LAST, write), (LAST, LAST, read)]), [(0, LAST - 1, w), (LAST, LAST, r)]);
        assert_eq!(after(&[(5, LAST, write), (0, LAST, None)]), []);
        assert_eq!(after(&[(0, 0, write), (LAST, LAST, write)]), [(0, 0, w), (LAST, LAST, w)]);
    }

    #[test]
    fn only_waiters_of_the_files_in_question_are_told() {
        let waits = Waits::default();
        let wanted = Wanted { owner: owner(1), inode: FILE, range: LockRange::ALL, kind: LockKind::Write };
        let waiting = waits.begin(wanted).unwrap();
        waits.tell(&HashSet::from([InodeNo::new(FILE.get() + 1).unwrap()]), |_| &[]);
        assert!(!is_told(&waiting));
        waits.tell(&HashSet::from([FILE]), |_| &[]);
        assert!(is_told(&waiting) && !is_told(&waiting));
    }

    #[test]
    fn a_search_for_a_circle_looks_once_at_each_wish() {
        // So many owners have each file locked, and all of them wait for the next file: a search has as many ways as owners to
        // the power of files.
        const FILES: u64 = 20;
        const OWNERS: u64 = 50;
        let files: Vec<InodeNo> = (0..FILES).map(|n| InodeNo::new(1 + n).unwrap()).collect();
        let holders = |n: usize| (0..OWNERS).map(move |i| owner(n as u64 * OWNERS + i));
        let (range, pid) = (LockRange::ALL, 1);
        let mut locks: Vec<Vec<FileLock>> = (0..files.len())
            .map(|n| holders(n).map(|owner| FileLock { owner, pid, range, kind: LockKind::Read }).collect())
            .collect();
        let wanted = |owner, n: usize| Wanted { owner, inode: files[n], range, kind: LockKind::Write };
        let waits = Waits::default();
        let waiting: Vec<_> = (1..files.len())
            .flat_map(|n| holders(n - 1).map(move |owner| (owner, n)))
            .map(|(owner, n)| waits.begin(wanted(owner, n)).unwrap())
            .collect();
        let newcomer = owner(FILES * OWNERS);
        let search = |locks: &[Vec<FileLock>]| {
            let looks = std::cell::Cell::new(0);
            let look = |ino: InodeNo| {
                looks.set(looks.get() + 1);
                &locks[ino.get() as usize - 1][..]
            };
            let closes = waits.closes_a_circle(&wanted(newcomer, 0), look);
            assert!(looks.get() <= FILES, "{} looks", looks.get());
            closes
        };
        assert!(!search(&locks));
        // It closes one that leads through all of them.
        locks[files.len() - 1].push(FileLock { owner: newcomer, pid, range, kind: LockKind::Read });
        assert!(search(&locks));
        drop(waiting);
        assert!(!search(&locks));
    }

    #[test]
    fn a_circle_is_found_where_its_last_wish_is_another_owners_as_well() {
        let (a, b, c) = (owner(0), owner(1), owner(2));
        let file = |n| InodeNo::new(n).unwrap();
        let (range, pid) = (LockRange::ALL, 1);
        let held = |owner, kind| FileLock { owner, pid, range, kind };
        let wanted = |owner, n, kind| Wanted { owner, inode: file(n), range, kind };
        let first = [held(a, LockKind::Read), held(b, LockKind::Read)];
        let locks = |ino: InodeNo| if ino == file(1) { &first[..] } else { &[] };
        let waits = Waits::default();
        // Both have it locked for reading, and both want it for writing.
        let _waiting = waits.begin(wanted(a, 1, LockKind::Write)).unwrap();
        assert!(waits.closes_a_circle(&wanted(b, 1, LockKind::Write), locks));
        assert!(!waits.closes_a_circle(&wanted(c, 1, LockKind::Write), locks), "it is none of theirs");
        assert!(!waits.closes_a_circle(&wanted(b, 2, LockKind::Write), locks));
    }
}
