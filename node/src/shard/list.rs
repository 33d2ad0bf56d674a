//! Keys of a shard in byte order of the whole key, where a directory sorts as `name/`.
//!
//! Owns [`KeyWalker`], which yields every key of a tree in that order from any point, and [`Listing`],
//! which adds prefix, delimiter, start-after and limit. Both read through [`Dirents`], of which only
//! pages of one directory in plain name order are asked; neither knows the wire.
//!
//! The order. A directory's entries are stored by plain name, but `a` as a directory stands for the
//! keys `a/...`, which come after `a-b` and before `a0`. While a directory is scanned, a subdirectory
//! is therefore held back ("pending") until the scan has passed everything below `name/`. Invariant:
//! each pending name is a proper prefix of the next one, so at most 255 are pending in a directory and
//! the last one always comes first.
//!
//! Memory is bounded whatever the tree: pages of at most [`PAGE_ENTRIES_MAX`] entries are kept for the
//! [`FRAMES_WITH_PAGES`] topmost directories of the path only; deeper ones keep one page in all and
//! read again on the way back. Must not hold anything that grows with the size of a directory.

use std::collections::VecDeque;

use bytes::Bytes;
use shardfs_proto::types::limits::{DEPTH_MAX, NAME_BYTES_MAX};
use shardfs_proto::types::{Error, FileKind, InodeNo, Result};

/// Entries of the first page of a directory: what most directories have.
const PAGE_ENTRIES_MIN: usize = 64;
/// Entries of a page when a directory turns out to be large: amortises the seek before it.
const PAGE_ENTRIES_MAX: usize = 1024;
/// Directories of a path whose page survives a descent. 16 pages of 1024 names are below 5 MiB.
const FRAMES_WITH_PAGES: usize = 16;
/// Directories within each other above which a walk takes the tree for a loop: more than renames can nest, also
/// those of before that had a bound.
pub const NESTING_MAX: usize = 16 * DEPTH_MAX;
/// Steps without a key after which a walk pauses, so that its caller can see whether anyone still
/// listens (a tree of empty directories has no key at all).
const STEPS_MAX: usize = 4096;
/// The byte after `/`.
const AFTER_SLASH: u8 = b'/' + 1;

/// One directory entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NameEntry {
    /// Its name.
    pub name: Bytes,
    /// What it names.
    pub inode: InodeNo,
    /// The kind of that.
    pub kind: FileKind,
}

/// Where a walk reads directories from: one consistent state for the life of the walk.
pub trait Dirents {
    /// Up to `limit` entries of a directory with names at or above `from`, in byte order. Fewer than
    /// `limit`: there are no more.
    fn page(&self, parent: InodeNo, from: &[u8], limit: usize) -> Result<Vec<NameEntry>>;
    /// The entry of that name.
    fn find(&self, parent: InodeNo, name: &[u8]) -> Result<Option<NameEntry>>;
}

/// One key of a walk; that of a directory ends with `/`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalkKey {
    /// The whole key.
    pub key: Bytes,
    /// What it names.
    pub inode: InodeNo,
    /// The kind of that.
    pub kind: FileKind,
}

/// What a step of a walk or listing brought.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step<T> {
    /// The next one.
    Item(T),
    /// Nothing yet after much work: ask again, unless nobody listens any more.
    Pause,
    /// There are no more.
    End,
}

/// One directory on the path of the walk.
struct Frame {
    inode: InodeNo,
    /// Length of the path up to and with this directory's `/`; 0 for the root.
    prefix_len: usize,
    /// The longest pending name; the others are prefixes of it.
    pending_name: Vec<u8>,
    /// Length and inode of the pending directories, shortest first.
    pending: Vec<(usize, InodeNo)>,
    page: VecDeque<NameEntry>,
    /// `page` has every entry from here (or, if there is one, from after `consumed`) to its last.
    page_from: Vec<u8>,
    /// The entry of `page` that was taken last.
    consumed: Option<Bytes>,
    /// Where the scan goes on after `page`; `None`: there is no more.
    next_from: Option<Vec<u8>>,
    page_entries: usize,
}

impl Frame {
    fn new(inode: InodeNo, prefix_len: usize) -> Frame {
        Frame {
            inode,
            prefix_len,
            pending_name: Vec::new(),
            pending: Vec::new(),
            page: VecDeque::new(),
            page_from: Vec::new(),
            consumed: None,
            next_from: Some(Vec::new()),
            page_entries: PAGE_ENTRIES_MIN,
        }
    }

    fn push_pending(&mut self, name: &[u8], inode: InodeNo) {
        debug_assert!(name.starts_with(&self.pending_name) && name.len() > self.pending_name.len());
        self.pending_name.clear();
        self.pending_name.extend_from_slice(name);
        self.pending.push((name.len(), inode));
    }

    fn pop_pending(&mut self) -> Option<(Vec<u8>, InodeNo)> {
        let (len, inode) = self.pending.pop()?;
        let shorter = self.pending.last().map_or(0, |(len, _)| *len);
        let name = self.pending_name[..len].to_vec();
        self.pending_name.truncate(shorter);
        Some((name, inode))
    }

    fn clear_pending(&mut self) {
        self.pending.clear();
        self.pending_name.clear();
    }

    /// Whether the last pending directory's keys come before the entry `name`, which is above its name.
    fn pending_comes_before(&self, name: &[u8]) -> bool {
        let Some((len, _)) = self.pending.last() else { return false };
        let pending = &self.pending_name[..*len];
        // The other kind of entry is `pending` and at least one byte more, never `/`.
        !(name.starts_with(pending) && name.get(*len).is_some_and(|next| *next < b'/'))
    }

    /// The next entry in plain name order, reading a page if there is none.
    fn fill(&mut self, source: &impl Dirents) -> Result<()> {
        if !self.page.is_empty() {
            return Ok(());
        }
        let Some(from) = self.next_from.take() else { return Ok(()) };
        let entries = source.page(self.inode, &from, self.page_entries)?;
        if entries.len() >= self.page_entries {
            // A full page has a last entry; the scan goes on at the next possible name.
            let mut after = entries.last().map_or_else(Vec::new, |last| last.name.to_vec());
            after.push(0);
            self.next_from = Some(after);
            self.page_entries = (self.page_entries * 4).min(PAGE_ENTRIES_MAX);
        }
        self.page = entries.into();
        self.page_from = from;
        self.consumed = None;
        Ok(())
    }

    /// Takes the next entry of the page.
    fn take(&mut self) -> Option<NameEntry> {
        let entry = self.page.pop_front()?;
        self.consumed = Some(entry.name.clone());
        Some(entry)
    }

    /// Goes on with the scan at `from`, keeping what of the page is still ahead.
    fn scan_from(&mut self, from: Vec<u8>) {
        let ahead = match &self.consumed {
            Some(consumed) => *consumed < from[..],
            None => self.page_from <= from,
        };
        if ahead && self.page.back().is_some_and(|last| last.name >= from[..]) {
            while self.page.front().is_some_and(|first| first.name < from[..]) {
                self.take();
            }
        } else {
            self.page.clear();
            self.next_from = Some(from);
        }
    }

    /// Gives the page back; it will be read again.
    fn drop_page(&mut self) {
        if let Some(first) = self.page.pop_front() {
            self.next_from = Some(first.name.to_vec());
            self.page = VecDeque::new();
            self.page_entries = PAGE_ENTRIES_MIN;
        }
    }
}

/// Walks the keys of a tree in byte order. See the module's text.
pub struct KeyWalker<D> {
    source: D,
    root: InodeNo,
    include_directories: bool,
    frames: Vec<Frame>,
    /// The path of the last frame, ending with `/` unless it is the root's.
    path: Vec<u8>,
    /// The last frame's own key is due.
    emit_directory: bool,
    ended: bool,
}

impl<D: Dirents> KeyWalker<D> {
    /// A walk over everything below `root`, from its first key. With `include_directories` every
    /// directory is a key too, which ends with `/` and comes before what it contains.
    pub fn new(source: D, root: InodeNo, include_directories: bool) -> KeyWalker<D> {
        KeyWalker {
            source,
            root,
            include_directories,
            frames: vec![Frame::new(root, 0)],
            path: Vec::new(),
            emit_directory: false,
            ended: false,
        }
    }

    /// What the walk reads from.
    pub fn source(&self) -> &D {
        &self.source
    }

    /// Goes to the first key that is not less than `target` (any bytes), forwards or backwards.
    pub fn seek(&mut self, target: &[u8]) -> Result<()> {
        self.ended = false;
        self.emit_directory = false;
        // What is above a directory that the target lies in stays as it is. A target that is the
        // directory itself is found from the one above, which emits it.
        while let Some(frame) = self.frames.last() {
            let len = frame.prefix_len;
            if len == 0 || (target.len() > len && target.starts_with(&self.path[..len])) {
                break;
            }
            self.pop_frame();
        }
        if self.frames.is_empty() {
            self.path.clear();
            self.frames.push(Frame::new(self.root, 0));
        }
        loop {
            let frame = self.frames.last_mut().expect("the root's frame is there");
            let rest = &target[frame.prefix_len..];
            frame.clear_pending();
            let slash = rest.iter().position(|b| *b == b'/');
            let component = &rest[..slash.unwrap_or(rest.len())];
            // Directories whose names the scan will not meet any more, but whose keys lie ahead: the
            // proper prefixes of the component that the component follows with a byte below `/`.
            for len in 1..component.len().min(NAME_BYTES_MAX + 1) {
                if component[len] < b'/'
                    && let Some(entry) = self.source.find(frame.inode, &component[..len])?
                    && entry.kind == FileKind::Directory
                {
                    frame.push_pending(&component[..len], entry.inode);
                }
            }
            let Some(slash) = slash else {
                frame.scan_from(component.to_vec());
                return Ok(());
            };
            // Names that begin with the component and a byte below `/` lie behind the target.
            let mut from = component.to_vec();
            from.push(AFTER_SLASH);
            frame.scan_from(from);
            let inside = match component.len() {
                1..=NAME_BYTES_MAX => self.source.find(frame.inode, component)?,
                _ => None,
            };
            match inside {
                Some(entry) if entry.kind == FileKind::Directory => {
                    self.descend(component.to_vec(), entry.inode)?;
                    self.emit_directory = self.include_directories && slash + 1 == rest.len();
                }
                Some(_) | None => return Ok(()),
            }
        }
    }

    /// The next key.
    pub fn step(&mut self) -> Result<Step<WalkKey>> {
        if self.ended {
            return Ok(Step::End);
        }
        for _ in 0..STEPS_MAX {
            let Some(frame) = self.frames.last_mut() else {
                self.ended = true;
                return Ok(Step::End);
            };
            if self.emit_directory {
                self.emit_directory = false;
                let key = Bytes::copy_from_slice(&self.path);
                return Ok(Step::Item(WalkKey { key, inode: frame.inode, kind: FileKind::Directory }));
            }
            frame.fill(&self.source)?;
            let pending_first = match frame.page.front() {
                Some(entry) => frame.pending_comes_before(&entry.name),
                None => !frame.pending.is_empty(),
            };
            if pending_first {
                let (name, inode) = frame.pop_pending().expect("a pending directory was seen");
                self.descend(name, inode)?;
                self.emit_directory = self.include_directories;
                continue;
            }
            let Some(entry) = frame.take() else {
                self.pop_frame();
                continue;
            };
            match entry.kind {
                FileKind::Directory => frame.push_pending(&entry.name, entry.inode),
                FileKind::Regular
                | FileKind::Symlink
                | FileKind::Fifo
                | FileKind::Socket
                | FileKind::CharDevice
                | FileKind::BlockDevice => {
                    let mut key = Vec::with_capacity(self.path.len() + entry.name.len());
                    key.extend_from_slice(&self.path);
                    key.extend_from_slice(&entry.name);
                    return Ok(Step::Item(WalkKey { key: key.into(), inode: entry.inode, kind: entry.kind }));
                }
            }
        }
        Ok(Step::Pause)
    }

    fn descend(&mut self, name: Vec<u8>, inode: InodeNo) -> Result<()> {
        if self.frames.len() > NESTING_MAX {
            return Err(Error::corrupt(format!(
                "directories are nested more than {NESTING_MAX} deep at inode {inode}: run `shardfs fsck` on the shard"
            )));
        }
        if self.frames.len() > FRAMES_WITH_PAGES
            && let Some(frame) = self.frames.last_mut()
        {
            frame.drop_page();
        }
        self.path.extend_from_slice(&name);
        self.path.push(b'/');
        self.frames.push(Frame::new(inode, self.path.len()));
        Ok(())
    }

    fn pop_frame(&mut self) {
        self.frames.pop();
        self.path.truncate(self.frames.last().map_or(0, |frame| frame.prefix_len));
    }
}

/// What to list. Empty fields ask for nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ListQuery {
    /// Only keys that begin with these bytes.
    pub prefix: Bytes,
    /// Keys that contain it after the prefix are rolled up into one common prefix each.
    pub delimiter: Bytes,
    /// Only keys and common prefixes after this one.
    pub start_after: Bytes,
    /// At most this many.
    pub limit: Option<u64>,
    /// Also directories, as keys that end with `/`.
    pub include_directories: bool,
}

/// One line of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listed {
    /// A key.
    Key(WalkKey),
    /// What several keys begin with, up to and with the delimiter.
    CommonPrefix(Bytes),
}

/// A listing under way.
pub struct Listing<D> {
    walker: KeyWalker<D>,
    prefix: Bytes,
    delimiter: Bytes,
    left: u64,
    ended: bool,
}

impl<D: Dirents> Listing<D> {
    /// Begins a listing of everything below `root`.
    pub fn new(source: D, root: InodeNo, query: &ListQuery) -> Result<Listing<D>> {
        let mut listing = Listing {
            walker: KeyWalker::new(source, root, query.include_directories),
            prefix: query.prefix.clone(),
            delimiter: query.delimiter.clone(),
            left: query.limit.unwrap_or(u64::MAX),
            ended: false,
        };
        let after = &query.start_after;
        let start = if after.is_empty() || after < &query.prefix {
            Some(query.prefix.to_vec())
        } else if let Some(len) = listing.common_prefix_len(after) {
            // Everything that rolls up into the same common prefix is not after `start_after`.
            successor(&after[..len])
        } else {
            let mut start = after.to_vec();
            start.push(0);
            Some(start)
        };
        listing.go_to(start)?;
        Ok(listing)
    }

    /// What the listing reads from.
    pub fn source(&self) -> &D {
        self.walker.source()
    }

    /// The next line.
    pub fn step(&mut self) -> Result<Step<Listed>> {
        if self.ended || self.left == 0 {
            return Ok(Step::End);
        }
        let found = match self.walker.step()? {
            Step::Item(found) => found,
            Step::Pause => return Ok(Step::Pause),
            Step::End => {
                self.ended = true;
                return Ok(Step::End);
            }
        };
        if !found.key.starts_with(&self.prefix) {
            self.ended = true;
            return Ok(Step::End);
        }
        self.left -= 1;
        let Some(len) = self.common_prefix_len(&found.key) else { return Ok(Step::Item(Listed::Key(found))) };
        let common = found.key.slice(..len);
        self.go_to(successor(&common))?;
        Ok(Step::Item(Listed::CommonPrefix(common)))
    }

    /// Length of the common prefix that a key rolls up into.
    fn common_prefix_len(&self, key: &[u8]) -> Option<usize> {
        let rest = key.strip_prefix(&self.prefix[..])?;
        if self.delimiter.is_empty() {
            return None;
        }
        let at = rest.windows(self.delimiter.len()).position(|window| window == self.delimiter)?;
        Some(self.prefix.len() + at + self.delimiter.len())
    }

    fn go_to(&mut self, target: Option<Vec<u8>>) -> Result<()> {
        match target {
            Some(target) => self.walker.seek(&target),
            None => {
                self.ended = true;
                Ok(())
            }
        }
    }
}

/// The least byte string above everything that begins with `prefix`; `None`: there is none.
fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != 0xff)?;
    let mut next = prefix[..=last].to_vec();
    next[last] += 1;
    Some(next)
}

#[cfg(test)]
mod tests;
