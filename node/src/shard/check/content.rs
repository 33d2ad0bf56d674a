//! Invariant 4: contents and chunks.
//!
//! Which inode names a content is written nowhere but in the inode, so the contents that inodes name are
//! gathered, sorted, and merged with the chunks. A window holds the [`CONTENTS_TOGETHER`] least contents
//! from a number on; what is above comes in the next window, after another pass over the inodes.

use shardfs_proto::types::InodeNo;

use super::cursor::Cursor;
use super::{Checker, FindingKind};
use crate::shard::keys::{self, Cf, ContentId};
use crate::shard::records::{Content, InodeRecord};
use crate::shard::store::Reader;

/// Contents of a window. Twice as many are held for a moment, at 32 bytes each: 64 MiB.
pub(super) const CONTENTS_TOGETHER: usize = 1 << 20;
/// Chunks that are read together when data is read: 1 MiB with the usual chunk size.
const CHUNKS_TOGETHER: usize = 16;

/// A content and who names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    content: u64,
    inode: u64,
    count: u64,
    size: u64,
}

/// The contents from `from` on, as many as fit.
pub(super) struct Window {
    from: u64,
    named: Vec<Named>,
    /// Contents above this one did not fit.
    last: Option<u64>,
    capacity: usize,
}

impl Window {
    pub(super) fn first() -> Window {
        Window::starting(0, CONTENTS_TOGETHER)
    }

    pub(super) fn starting(from: u64, capacity: usize) -> Window {
        Window { from, named: Vec::new(), last: None, capacity }
    }

    /// Notes the content of an inode, if it has chunks.
    pub(super) fn note(&mut self, inode: InodeNo, record: &InodeRecord) {
        let Content::Chunks { id, count } = record.content else { return };
        let content = id.get();
        if content < self.from || self.last.is_some_and(|last| content > last) {
            return;
        }
        self.named.push(Named { content, inode: inode.get(), count, size: record.size });
        if self.named.len() >= 2 * self.capacity {
            self.named.sort_unstable();
            let last = self.named[self.capacity - 1].content;
            // All that name the last content stay together.
            let keep = self.named.partition_point(|named| named.content <= last);
            if keep < self.named.len() {
                self.named.truncate(keep);
                self.last = Some(last);
            }
        }
    }
}

/// Runs the pass, for the window that the tree's pass has filled and for those after it.
pub(super) fn check(c: &mut Checker<'_>, mut window: Window) {
    loop {
        merge(c, &mut window);
        let Some(last) = window.last else { return };
        if c.stopped {
            return;
        }
        window = Window::starting(last + 1, window.capacity);
        let mut inodes = Cursor::new(c.view, Cf::Inode);
        while let Some(entry) = inodes.pop() {
            let record =
                keys::parse_inode(&entry.key).map(|inode| (inode, InodeRecord::decode(inode, &entry.value)));
            if let Ok((inode, Ok(record))) = record {
                window.note(inode, &record);
            }
        }
    }
}

/// What the chunks of one content amount to.
#[derive(Default, Clone, Copy)]
struct Chunks {
    count: u64,
    greatest: Option<u32>,
}

fn merge(c: &mut Checker<'_>, window: &mut Window) {
    let view = c.view;
    window.named.sort_unstable();
    let from = if window.from == 0 { Vec::new() } else { window.from.to_be_bytes().to_vec() };
    let to = window.last.map(|last| (last + 1).to_be_bytes().to_vec());
    let mut cursor = Cursor::range(view, Cf::Chunk, true, from, to);
    let mut named = window.named.iter().copied().peekable();
    while let Some(entry) = cursor.peek() {
        if c.stopped {
            return;
        }
        let Ok((content, _)) = keys::parse_chunk(&entry.key) else {
            c.finding(
                FindingKind::BadKey,
                format!("family chunk: {}", shardfs_proto::types::name::quoted(&entry.key)),
            );
            cursor.pop();
            continue;
        };
        while let Some(earlier) = named.next_if(|named| named.content < content.get()) {
            judge(c, earlier, Chunks::default());
        }
        let size = named.peek().filter(|named| named.content == content.get()).map(|named| named.size);
        let chunks = take_chunks(c, &mut cursor, content, size);
        c.greatest.id = c.greatest.id.max(content.get());
        let staged = view.contains(Cf::Sys, &keys::staged(content));
        let staged =
            c.readable(format!("staged record of content {}", content.get()), staged).unwrap_or(true);
        let mut namers: u64 = staged.into();
        while let Some(here) = named.next_if(|named| named.content == content.get()) {
            namers += 1;
            judge(c, here, chunks);
            if namers > 1 {
                c.finding(
                    FindingKind::SharedContent,
                    format!("content {} of inode {} is somebody else's as well", content.get(), here.inode),
                );
            }
        }
        if namers == 0 {
            c.finding(
                FindingKind::LostChunk,
                format!("{} chunks of content {}, which nobody names", chunks.count, content.get()),
            );
        }
    }
    if let Some(failed) = cursor.failed.take() {
        c.finding(FindingKind::Unreadable, failed);
        return;
    }
    let mut before = None;
    for rest in named {
        judge(c, rest, Chunks::default());
        if before == Some(rest.content) {
            c.finding(
                FindingKind::SharedContent,
                format!("content {} of inode {} is somebody else's as well", rest.content, rest.inode),
            );
        }
        before = Some(rest.content);
    }
}

/// Counts the chunks of a content, and reads them if data is to be read.
fn take_chunks(
    c: &mut Checker<'_>,
    cursor: &mut Cursor<'_>,
    content: ContentId,
    size: Option<u64>,
) -> Chunks {
    let mut chunks = Chunks::default();
    let mut unread: Vec<[u8; 12]> = Vec::new();
    while let Some(entry) = cursor.peek() {
        let Ok((id, number)) = keys::parse_chunk(&entry.key) else { break };
        if id != content || c.stopped {
            break;
        }
        cursor.pop();
        chunks.count += 1;
        chunks.greatest = Some(number);
        c.summary.chunks += 1;
        if c.read_data {
            unread.push(keys::chunk(id, number));
            if unread.len() >= CHUNKS_TOGETHER {
                read_chunks(c, &std::mem::take(&mut unread), size);
            }
        }
    }
    read_chunks(c, &unread, size);
    chunks
}

fn read_chunks(c: &mut Checker<'_>, chunks: &[[u8; 12]], size: Option<u64>) {
    if chunks.is_empty() {
        return;
    }
    let slices: Vec<&[u8]> = chunks.iter().map(|key| &key[..]).collect();
    let values = match c.view.multi_get(Cf::Chunk, &slices) {
        Ok(values) => values.into_iter().map(Ok).collect(),
        // One of them is bad: find out which.
        Err(_) => slices.iter().map(|key| c.view.get(Cf::Chunk, key)).collect::<Vec<_>>(),
    };
    let chunk_bytes = u64::from(c.view.chunk_bytes());
    for (key, value) in chunks.iter().zip(values) {
        let Ok((content, number)) = keys::parse_chunk(key) else { continue };
        let what = format!("chunk {number} of content {}", content.get());
        let Some(value) = c.readable(&what, value) else { continue };
        let Some(value) = value else {
            c.finding(FindingKind::Unreadable, format!("{what} is listed but cannot be read"));
            continue;
        };
        let length = value.len() as u64;
        let start = u64::from(number) * chunk_bytes;
        if length > chunk_bytes {
            c.finding(
                FindingKind::BadRecord,
                format!("{what} has {length} bytes, more than a chunk's {chunk_bytes}"),
            );
        } else if size.is_some_and(|size| start < size && start + length > size) {
            c.finding(
                FindingKind::ChunkPastSize,
                format!("{what} has bytes up to {}, past the file's size", start + length),
            );
        }
    }
}

/// Compares what an inode says of its content with the chunks there are.
fn judge(c: &mut Checker<'_>, named: Named, chunks: Chunks) {
    let Named { content, inode, count, size } = named;
    if chunks.count != count {
        c.finding(
            FindingKind::ChunkCount,
            format!(
                "inode {inode} says that its content {content} has {count} chunks, there are {}",
                chunks.count
            ),
        );
    }
    let start = chunks.greatest.map(|number| u64::from(number) * u64::from(c.view.chunk_bytes()));
    if start.is_some_and(|start| start >= size) {
        c.finding(
            FindingKind::ChunkPastSize,
            format!(
                "inode {inode} has {size} bytes, but its content {content} has chunk {}",
                chunks.greatest.unwrap_or_default()
            ),
        );
    }
}
