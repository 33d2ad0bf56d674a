//! Reading directories.
//!
//! Offsets: 1 stands after `.`, 2 after `..`, and an entry's is its cookie (in the root and in `.snap` its shard's id)
//! and 2 more. Cookies stay with their entries, so that reading can go on from any offset at any time.
//!
//! The kernel asks for a page at a time; a handle reads ahead from the node and serves from that, as a
//! local directory is served from the C library's buffer. Rewinding reads anew.

use bytes::Bytes;
use shardfs_proto::client::DirectoryPage;
use shardfs_proto::types::{Cookie, FileKind, GlobalInode, InodeNo, ShardId};
use std::sync::Arc;
use tokio::sync::Mutex;

use super::Fs;
use super::types::{DirItem, Node};
use super::{snapshots, virtual_dir};
use crate::failure::{Outcome, Posix};
use crate::handles::Handle;

/// The offset from which cookies count.
pub(super) const FIRST_OFFSET: u64 = 2;
/// Entries of the first call for a directory: most have fewer.
const FIRST_ENTRIES: u32 = 256;
/// Entries of each call after it: what costs the node about as much as the call itself.
const NEXT_ENTRIES: u32 = 2048;

/// An open directory.
pub struct DirHandle {
    node: Node,
    reading: Mutex<Reading>,
}

/// What was read ahead.
#[derive(Default)]
struct Reading {
    /// The whole directory, for the root, `.snap` and the virtual directory.
    items: Option<Vec<DirItem>>,
    window: Option<Window>,
}

/// Entries of a shard's directory after a cookie, without a gap.
struct Window {
    after: u64,
    attributes: bool,
    closed: bool,
    page: DirectoryPage,
}

impl Window {
    /// The entries after `after`, if the window reaches there.
    fn position(&self, after: u64, attributes: bool) -> Option<usize> {
        if after < self.after || (attributes && !self.attributes) {
            return None;
        }
        let at = self.page.entries.partition_point(|entry| entry.cookie.get() <= after);
        (at < self.page.entries.len() || self.page.end).then_some(at)
    }
}

impl Fs {
    /// Opens a directory; needs no node.
    pub fn open_directory(&self, ino: u64) -> Outcome<u64> {
        let node = self.node(ino)?;
        let handle = DirHandle { node, reading: Mutex::default() };
        self.handles.insert(Handle::Directory(Arc::new(handle)))
    }

    /// Closes a directory.
    pub fn release_directory(&self, handle: u64) {
        self.handles.remove(handle);
    }

    /// Gives entries after an offset, one by one, until `full` answers that it has no room for another (which
    /// it then has not taken) or there are enough. None given: the end.
    pub async fn read_directory(
        &self,
        handle: u64,
        offset: u64,
        attributes: bool,
        full: &mut (dyn FnMut(&DirItem) -> bool + Send),
    ) -> Outcome<()> {
        let handle = self.handles.directory(handle).ok_or(Posix::BadHandle)?;
        let mut reading = handle.reading.lock().await;
        if offset == 0 {
            *reading = Reading::default();
        }
        let (shard, inode) = match handle.node {
            Node::InShard(shard, inode) => (shard, inode),
            Node::Root => return give(&mut reading, self.root_items(), offset, full).await,
            Node::Snapshots(shard) => {
                return give(&mut reading, self.snapshot_items(shard), offset, full).await;
            }
            Node::Virtual(_) => {
                return give(&mut reading, async { Ok(virtual_dir::items()) }, offset, full).await;
            }
        };
        let after = offset.saturating_sub(FIRST_OFFSET);
        let at = match reading.window.as_ref().and_then(|w| w.position(after, attributes)) {
            Some(at) => at,
            None => {
                let first = reading.window.is_none();
                reading.window = Some(self.fetch(shard, inode, after, first, attributes).await?);
                0
            }
        };
        let Some(window) = &reading.window else { return Ok(()) };
        if offset < 1 && full(&dot(GlobalInode::new(shard, inode), b".", 1)) {
            return Ok(());
        }
        if offset < FIRST_OFFSET
            && full(&dot(self.above(shard, inode, window.page.parent), b"..", FIRST_OFFSET))
        {
            return Ok(());
        }
        for entry in &window.page.entries[at..] {
            let item = DirItem {
                ino: GlobalInode::new(shard, entry.inode),
                kind: entry.kind,
                name: entry.name.clone(),
                offset: FIRST_OFFSET + entry.cookie.get(),
                entry: entry.attr.as_ref().map(|attr| self.entry(shard, window.closed, attr)),
            };
            if full(&item) {
                break;
            }
        }
        Ok(())
    }

    async fn fetch(
        &self,
        shard: ShardId,
        inode: InodeNo,
        after: u64,
        first: bool,
        attributes: bool,
    ) -> Outcome<Window> {
        let closed = self.shards.is_closed(shard);
        let limit = if first { FIRST_ENTRIES } else { NEXT_ENTRIES };
        let page = self.client.read_directory(shard, inode, Cookie::new(after), limit, attributes).await?;
        Ok(Window { after, attributes, closed, page })
    }

    fn above(&self, shard: ShardId, inode: InodeNo, parent: InodeNo) -> GlobalInode {
        above(self.shards.snapshot_of(shard), shard, inode, parent)
    }
}

/// The parent of a shard's root is the root of the mount; of a snapshot's, `.snap` of the shard that it is of.
fn above(snapshot_of: Option<ShardId>, shard: ShardId, inode: InodeNo, parent: InodeNo) -> GlobalInode {
    match snapshot_of {
        _ if inode != InodeNo::ROOT => GlobalInode::new(shard, parent),
        Some(of) => snapshots::directory_ino(of),
        None => GlobalInode::ROOT,
    }
}

fn dot(ino: GlobalInode, name: &'static [u8], offset: u64) -> DirItem {
    DirItem { ino, kind: FileKind::Directory, name: Bytes::from_static(name), offset, entry: None }
}

async fn give(
    reading: &mut Reading,
    all: impl Future<Output = Outcome<Vec<DirItem>>>,
    offset: u64,
    full: &mut (dyn FnMut(&DirItem) -> bool + Send),
) -> Outcome<()> {
    let items = match &reading.items {
        Some(items) => items,
        None => reading.items.insert(all.await?),
    };
    let start = items.partition_point(|item| item.offset <= offset);
    for item in &items[start..] {
        if full(item) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::client::DirectoryEntry;

    fn window(after: u64, cookies: &[u64], end: bool) -> Window {
        let entry = |cookie: &u64| DirectoryEntry {
            name: Bytes::from(format!("f{cookie}")),
            inode: InodeNo::new(*cookie + 10).unwrap(),
            kind: FileKind::Regular,
            cookie: Cookie::new(*cookie),
            attr: None,
        };
        let entries = cookies.iter().map(entry).collect();
        let page = DirectoryPage { entries, end, parent: InodeNo::ROOT };
        Window { after, attributes: false, closed: false, page }
    }

    #[test]
    fn a_window_serves_what_it_covers() {
        let w = window(5, &[7, 9, 20], false);
        assert_eq!(w.position(5, false), Some(0));
        assert_eq!(w.position(6, false), Some(0));
        assert_eq!(w.position(7, false), Some(1));
        assert_eq!(w.position(19, false), Some(2));
        assert_eq!(w.position(20, false), None, "what comes after it was not read");
        assert_eq!(w.position(4, false), None, "what comes before it was not read");
        assert_eq!(w.position(7, true), None, "attributes were not read");
        assert_eq!(window(5, &[7], true).position(7, false), Some(1), "the end is known");
        assert_eq!(window(0, &[], true).position(0, false), Some(0));
    }

    #[test]
    fn above_a_shard_is_the_mount_and_above_a_snapshot_its_directory() {
        let shard = ShardId::new(3).unwrap();
        let dir = InodeNo::new(9).unwrap();
        assert_eq!(above(None, shard, InodeNo::ROOT, InodeNo::ROOT), GlobalInode::ROOT);
        assert_eq!(above(None, shard, dir, InodeNo::ROOT), GlobalInode::new(shard, InodeNo::ROOT));
        let of = ShardId::new(2).ok();
        assert_eq!(above(of, shard, dir, InodeNo::ROOT), GlobalInode::new(shard, InodeNo::ROOT));
        let above_snapshot = above(of, shard, InodeNo::ROOT, InodeNo::ROOT);
        assert_eq!(snapshots::shard_of(above_snapshot), of);
    }

    #[tokio::test]
    async fn a_fixed_listing_goes_on_from_any_offset() {
        let mut reading = Reading::default();
        let all = || async { Ok(virtual_dir::items()) };
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let mut page = Vec::new();
            let mut full = |item: &DirItem| {
                if page.len() == 3 {
                    return true;
                }
                page.push(item.clone());
                false
            };
            give(&mut reading, all(), offset, &mut full).await.unwrap();
            let Some(last) = page.last() else { break };
            offset = last.offset;
            names.extend(page.into_iter().map(|item| item.name));
        }
        let expected: Vec<Bytes> = virtual_dir::items().into_iter().map(|item| item.name).collect();
        assert_eq!(names, expected);
    }
}
