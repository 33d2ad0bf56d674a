//! fsck: every invariant of a shard's records (ARCHITECTURE.md, "Inside a shard"), from a snapshot.
//!
//! Memory is bounded whatever the shard: the families that are keyed by inode (`inode`, `parent`,
//! `dirent`, `cookie`) are merged in one pass (`tree.rs`); contents and chunks are matched in windows of
//! [`content::CONTENTS_TOGETHER`] contents (`content.rs`), one more pass over the inodes for each
//! further window; point lookups go in batches. The one cache, of directories known to be reachable, is
//! emptied when it is full.
//!
//! Invariants: a check changes nothing; whatever the bytes, it ends, with findings and not with a panic;
//! a record that does not decode is a finding, and the check goes on. Only a family whose files cannot
//! be read at all cuts its pass short, which is a finding too.

mod content;
mod cursor;
mod sys;
mod tree;

use std::fmt;
use std::ops::ControlFlow;

use shardfs_proto::types::cluster::{CheckItem, CheckSummary};
use shardfs_proto::types::{Error, Result};

use super::view::ReadView;

/// What may be wrong: the closed set of `CheckFinding.kind`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum FindingKind {
    /// A record does not decode, or says what cannot be.
    BadRecord,
    /// A key does not parse.
    BadKey,
    /// Bytes cannot be read from the disk, or fail their checksum.
    Unreadable,
    /// A directory entry names an inode that is not there.
    DanglingDirent,
    /// A directory entry and its inode have different kinds.
    WrongKind,
    /// A directory entry and its entry in cookie order disagree, or one is missing.
    DirentCookie,
    /// A directory entry and its entry by inode disagree, or one is missing.
    DirentParent,
    /// Entries of something that is no directory.
    LostEntry,
    /// The number of links is not the number of names.
    LinkCount,
    /// A directory's number of entries is wrong.
    EntryCount,
    /// A directory's parent is not the directory that has its name, or it has several names.
    DirectoryParent,
    /// A directory is not below the root.
    Unreachable,
    /// An inode has neither a name nor a holder.
    LostInode,
    /// An orphan record is wrong.
    Orphan,
    /// Chunks whose content nobody names.
    LostChunk,
    /// A content that several name.
    SharedContent,
    /// An inode's number of chunks is wrong.
    ChunkCount,
    /// A chunk lies past its file's size, or has bytes there.
    ChunkPastSize,
    /// The used bytes are not the sum over the inodes.
    Usage,
    /// The number of inodes is wrong.
    InodeCount,
    /// A counter would give out again what is in use.
    Counter,
    /// An index entry without its inode's value, or the other way round.
    Index,
    /// An access control list is none, is where none can be, or disagrees with the permission bits.
    Acl,
    /// A session's records are wrong.
    Session,
    /// An inode's locks are wrong.
    Locks,
    /// The shard's header is wrong.
    Header,
}

impl FindingKind {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            FindingKind::BadRecord => "bad-record",
            FindingKind::BadKey => "bad-key",
            FindingKind::Unreadable => "unreadable",
            FindingKind::DanglingDirent => "dangling-dirent",
            FindingKind::WrongKind => "wrong-kind",
            FindingKind::DirentCookie => "dirent-cookie",
            FindingKind::DirentParent => "dirent-parent",
            FindingKind::LostEntry => "lost-entry",
            FindingKind::LinkCount => "link-count",
            FindingKind::EntryCount => "entry-count",
            FindingKind::DirectoryParent => "directory-parent",
            FindingKind::Unreachable => "unreachable",
            FindingKind::LostInode => "lost-inode",
            FindingKind::Orphan => "orphan",
            FindingKind::LostChunk => "lost-chunk",
            FindingKind::SharedContent => "shared-content",
            FindingKind::ChunkCount => "chunk-count",
            FindingKind::ChunkPastSize => "chunk-past-size",
            FindingKind::Usage => "usage",
            FindingKind::InodeCount => "inode-count",
            FindingKind::Counter => "counter",
            FindingKind::Index => "index",
            FindingKind::Acl => "acl",
            FindingKind::Session => "session",
            FindingKind::Locks => "locks",
            FindingKind::Header => "header",
        }
    }
}

/// Takes each finding as it is found, and the summary last; `Break` ends the check.
pub type Report<'a> = dyn FnMut(CheckItem) -> ControlFlow<()> + 'a;

/// Checks everything that a view shows. With `read_data` every chunk is read as well. Findings are not
/// errors; an error is one of the check itself: `Unavailable`, and no summary, if the view has left (see [`ReadView::leaving`]).
pub fn check(view: &ReadView, read_data: bool, report: &mut Report<'_>) -> Result<()> {
    let mut checker = Checker {
        view,
        read_data,
        report,
        summary: CheckSummary::default(),
        greatest: Greatest::default(),
        stopped: false,
    };
    let mut window = content::Window::first();
    tree::check(&mut checker, &mut window);
    content::check(&mut checker, window);
    sys::check(&mut checker);
    if view.has_left() {
        let why = "the shard is being handed over or opened anew, which broke the check off: run it again";
        return Err(Error::unavailable(why).with_shard(view.shard_id()));
    }
    if !checker.stopped {
        let summary = checker.summary;
        let _ = (checker.report)(CheckItem::Summary(summary));
    }
    Ok(())
}

/// All findings at once, as (kind, detail), and the summary: for tests and small shards.
pub fn check_all(view: &ReadView, read_data: bool) -> Result<(Vec<(String, String)>, CheckSummary)> {
    let mut findings = Vec::new();
    let mut summary = CheckSummary::default();
    check(view, read_data, &mut |item| {
        match item {
            CheckItem::Finding { kind, detail } => findings.push((kind, detail)),
            CheckItem::Summary(last) => summary = last,
        }
        ControlFlow::Continue(())
    })?;
    Ok((findings, summary))
}

/// The greatest numbers that were seen: counters must be above them.
#[derive(Default)]
struct Greatest {
    inode: u64,
    /// Content ids and cookies come from one counter.
    id: u64,
    version: u64,
    session: u64,
}

/// A check under way.
struct Checker<'a> {
    view: &'a ReadView,
    read_data: bool,
    report: &'a mut Report<'a>,
    summary: CheckSummary,
    greatest: Greatest,
    /// Nobody listens any more.
    stopped: bool,
}

impl Checker<'_> {
    fn finding(&mut self, kind: FindingKind, detail: impl fmt::Display) {
        // What was not read for that is not wrong.
        self.stopped |= self.view.has_left();
        if self.stopped {
            return;
        }
        self.summary.findings += 1;
        let item = CheckItem::Finding { kind: kind.as_str().to_owned(), detail: detail.to_string() };
        self.stopped = (self.report)(item).is_break();
    }

    /// The value, or a finding that it cannot be read.
    fn readable<T>(&mut self, what: impl fmt::Display, value: Result<T>) -> Option<T> {
        value.map_err(|error: Error| self.finding(FindingKind::Unreadable, format!("{what}: {error}"))).ok()
    }

    /// The record, or a finding that it is bad.
    fn decoded<T>(&mut self, what: impl fmt::Display, record: Result<T>) -> Option<T> {
        record.map_err(|error| self.finding(FindingKind::BadRecord, format!("{what}: {error}"))).ok()
    }
}

#[cfg(test)]
mod tests;
