//! Invariants 3 (its second half), 5, 6 (its first half) and 8: orphans, counters, sessions, indexes, locks.

use std::collections::BTreeSet;

use shardfs_proto::types::limits::SESSION_WINDOW;
use shardfs_proto::types::name::quoted;
use shardfs_proto::types::{InodeNo, SessionId};

use super::cursor::{Cursor, Entry};
use super::{Checker, FindingKind};
use crate::shard::keys::{self, Cf};
use crate::shard::records::{
    Counters, Header, InodeRecord, LocksRecord, Orphan, SessionRecord, Slot, Staged,
};
use crate::shard::store::Reader;

/// Runs the passes over `index` and `sys`. After those over the tree and the contents, whose sums it
/// compares with the counters.
pub(super) fn check(c: &mut Checker<'_>) {
    indexes(c);
    records(c);
    counters(c);
}

fn indexes(c: &mut Checker<'_>) {
    let mut cursor = Cursor::range(c.view, Cf::Index, true, Vec::new(), None);
    while let Some(entry) = cursor.pop() {
        if c.stopped {
            return;
        }
        let Ok((name, value, inode)) = keys::parse_index(&entry.key) else {
            c.finding(FindingKind::BadKey, format!("family index: {}", quoted(&entry.key)));
            continue;
        };
        let Some(record) = inode_record(c, inode) else {
            c.finding(FindingKind::Index, format!("index {name:?} has inode {inode}, which is not there"));
            continue;
        };
        if record.is_some_and(|record| record.indexes.get(name) != Some(&value)) {
            c.finding(
                FindingKind::Index,
                format!("index {name:?} has inode {inode} with a value that it has not"),
            );
        }
    }
    if let Some(failed) = cursor.failed {
        c.finding(FindingKind::Unreadable, failed);
    }
}

/// Outer `None`: there is no such inode. Inner: it cannot be read, which is another pass's finding.
fn inode_record(c: &Checker<'_>, inode: InodeNo) -> Option<Option<InodeRecord>> {
    match c.view.get(Cf::Inode, &keys::inode(inode)) {
        Ok(None) => None,
        Ok(Some(value)) => Some(InodeRecord::decode(inode, &value).ok()),
        Err(_) => Some(None),
    }
}

fn records(c: &mut Checker<'_>) {
    let mut cursor = Cursor::new(c.view, Cf::Sys);
    while let Some(entry) = cursor.pop() {
        if c.stopped {
            return;
        }
        match entry.key.first() {
            Some(b'H') if entry.key == keys::HEADER => {
                if let Some(header) = c.decoded("the shard's header", Header::decode(&entry.value))
                    && header.id != c.view.shard_id()
                {
                    c.finding(FindingKind::Header, format!("the header is that of shard {}", header.id));
                }
            }
            Some(b'C') if entry.key == keys::COUNTERS => {
                // Compared when everything is summed up.
                c.decoded("the counters", Counters::decode(&entry.value));
            }
            Some(b'S') => session(c, &entry),
            Some(b'R') => slot(c, &entry),
            Some(b'O') => orphan(c, &entry),
            Some(b'T') => staged(c, &entry),
            Some(b'L') => locks(c, &entry),
            Some(_) | None => c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key))),
        }
    }
    if let Some(failed) = cursor.failed {
        c.finding(FindingKind::Unreadable, failed);
    }
    for (what, key) in [("header", keys::HEADER), ("counters", keys::COUNTERS)] {
        if c.view.contains(Cf::Sys, key).is_ok_and(|there| !there) {
            c.finding(FindingKind::Header, format!("the shard has no {what}"));
        }
    }
}

fn session(c: &mut Checker<'_>, entry: &Entry) {
    let Ok(session) = keys::parse_session(&entry.key) else {
        c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key)));
        return;
    };
    c.greatest.session = c.greatest.session.max(session.get());
    c.decoded(format!("session {session}"), SessionRecord::decode(&entry.value));
}

fn has_session(c: &mut Checker<'_>, session: SessionId) -> bool {
    let there = c.view.contains(Cf::Sys, &keys::session(session));
    c.readable(format!("session {session}"), there).unwrap_or(true)
}

fn slot(c: &mut Checker<'_>, entry: &Entry) {
    let Ok((session, number)) = keys::parse_result(&entry.key) else {
        c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key)));
        return;
    };
    c.greatest.session = c.greatest.session.max(session.get());
    let what = format!("result slot {number} of session {session}");
    if !has_session(c, session) {
        c.finding(FindingKind::Session, format!("{what}: there is no such session"));
    }
    if let Some(slot) = c.decoded(&what, Slot::decode(&entry.value))
        && slot.sequence.get() % SESSION_WINDOW != u64::from(number)
    {
        c.finding(FindingKind::Session, format!("{what} holds the answer to sequence {}", slot.sequence));
    }
}

fn orphan(c: &mut Checker<'_>, entry: &Entry) {
    let Ok(inode) = keys::parse_orphan(&entry.key) else {
        c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key)));
        return;
    };
    let what = format!("orphan record of inode {inode}");
    match inode_record(c, inode) {
        None => c.finding(FindingKind::Orphan, format!("{what}: there is no such inode")),
        Some(Some(record)) if record.nlink != 0 => {
            c.finding(
                FindingKind::Orphan,
                format!("{what}: the inode says that it has {} names", record.nlink),
            );
        }
        Some(_) => {}
    }
    let Some(orphan) = c.decoded(&what, Orphan::decode(&entry.value)) else { return };
    if orphan.holders.is_empty() {
        c.finding(FindingKind::Orphan, format!("{what}: nobody holds it, it should have been freed"));
    }
    for holder in orphan.holders {
        c.greatest.session = c.greatest.session.max(holder.get());
        if !has_session(c, holder) {
            c.finding(FindingKind::Orphan, format!("{what}: its holder, session {holder}, is not there"));
        }
    }
}

fn staged(c: &mut Checker<'_>, entry: &Entry) {
    let Ok(content) = keys::parse_staged(&entry.key) else {
        c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key)));
        return;
    };
    c.greatest.id = c.greatest.id.max(content.get());
    c.decoded(format!("staged content {}", content.get()), Staged::decode(&entry.value));
}

fn locks(c: &mut Checker<'_>, entry: &Entry) {
    let Ok(inode) = keys::parse_locks(&entry.key) else {
        c.finding(FindingKind::BadKey, format!("family sys: {}", quoted(&entry.key)));
        return;
    };
    let what = format!("locks of inode {inode}");
    if inode_record(c, inode).is_none() {
        c.finding(FindingKind::Locks, format!("{what}: there is no such inode"));
    }
    let Some(LocksRecord { locks }) = c.decoded(&what, LocksRecord::decode(&entry.value)) else { return };
    if locks.is_empty() {
        c.finding(FindingKind::Locks, format!("{what}: there are none"));
    }
    let sessions: BTreeSet<SessionId> = locks.iter().map(|lock| lock.owner.session).collect();
    for session in sessions {
        c.greatest.session = c.greatest.session.max(session.get());
        if !has_session(c, session) {
            c.finding(FindingKind::Locks, format!("{what}: a holder, session {session}, is not there"));
        }
    }
    if !locks.is_sorted_by_key(|lock| lock.range.start()) {
        c.finding(FindingKind::Locks, format!("{what}: they are not in order"));
        return;
    }
    // In order, so that only those that begin before one ends are looked at with it.
    for (at, lock) in locks.iter().enumerate() {
        let near = locks[at + 1..].iter().take_while(|other| other.range.start() <= lock.range.end());
        for other in near {
            let same_owner = other.owner == lock.owner;
            if same_owner || other.excludes(lock.owner, lock.range, lock.kind) {
                let (a, b) = (lock.range, other.range);
                let (a, b) = ((a.start(), a.end()), (b.start(), b.end()));
                c.finding(FindingKind::Locks, format!("{what}: {a:?} and {b:?} exclude each other"));
                return;
            }
        }
    }
}

fn counters(c: &mut Checker<'_>) {
    if c.stopped {
        return;
    }
    let Ok(Some(value)) = c.view.get(Cf::Sys, keys::COUNTERS) else { return };
    let Ok(counters) = Counters::decode(&value) else { return };
    let (bytes, inodes) = (c.summary.bytes, c.summary.inodes);
    if counters.used_bytes != bytes {
        let used = counters.used_bytes;
        c.finding(
            FindingKind::Usage,
            format!("the shard counts {used} bytes in use, its inodes have {bytes}"),
        );
    }
    if counters.inodes != inodes {
        c.finding(
            FindingKind::InodeCount,
            format!("the shard counts {} inodes, there are {inodes}", counters.inodes),
        );
    }
    let above = [
        ("inode", counters.next_ino, c.greatest.inode),
        ("content or cookie", counters.next_id, c.greatest.id),
        ("session", counters.next_session, c.greatest.session),
    ];
    for (what, next, greatest) in above {
        if next <= greatest {
            c.finding(
                FindingKind::Counter,
                format!("the next {what} would be {next}, but {greatest} is in use"),
            );
        }
    }
    if counters.op_seq < c.greatest.version {
        let (last, version) = (counters.op_seq, c.greatest.version);
        c.finding(
            FindingKind::Counter,
            format!("the last operation is {last}, but an inode has version {version}"),
        );
    }
}
