//! `.snap` at a shard's root: its snapshots, as directories. `mkdir` makes one, `rmdir` removes one with what is in it.
//!
//! The directory is found by name but not listed, as ZFS does with `.zfs`: what copies or removes a shard's content does not go
//! into it. What it lists are the roots of closed shards, whose inodes have numbers of their own. It belongs to whom the shard's root
//! belongs to, with the same permissions: who may make names in the root may make snapshots.

use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::name::SNAPSHOT_DIRECTORY;
use shardfs_proto::types::{FileKind, GlobalInode, InodeNo, ShardId, ShardName};

use super::Fs;
use super::dirs::FIRST_OFFSET;
use super::names::check_length;
use super::root::gone_is_no_entry;
use super::types::{BLOCK_BYTES, DirItem, Entry, FileStat, Ttl};
use crate::failure::{Outcome, Posix};

/// Inode numbers that belong to no shard and are `.snap`: this and the number of the shard.
const FIRST_INO: u64 = 1 << 32;

const _: () = assert!(FIRST_INO > ShardId::MAX.get(), "the virtual directory's numbers are small");

/// The number of a shard's `.snap`.
pub(super) fn directory_ino(shard: ShardId) -> GlobalInode {
    GlobalInode::outside(FIRST_INO + shard.get())
}

/// Whose `.snap` a number is.
pub(super) fn shard_of(ino: GlobalInode) -> Option<ShardId> {
    ShardId::new(ino.get().checked_sub(FIRST_INO)?).ok()
}

impl Fs {
    /// Whether a name at a shard's root is `.snap`. A snapshot has none.
    pub(super) fn is_snapshot_directory(&self, shard: ShardId, name: &[u8]) -> bool {
        name == SNAPSHOT_DIRECTORY.as_bytes() && self.shards.snapshot_of(shard).is_none()
    }

    pub(super) async fn snapshots_entry(&self, shard: ShardId) -> Outcome<Entry> {
        let root = self.client.get_attr(shard, InodeNo::ROOT).await?;
        let stat = FileStat {
            ino: directory_ino(shard),
            nlink: 2,
            size: u64::from(BLOCK_BYTES),
            blocks: 0,
            ..FileStat::of(shard, &root)
        };
        let ttl = self.ttl(false, InodeNo::ROOT, FileKind::Directory);
        Ok(Entry { stat, ttl: Ttl { entry: Duration::ZERO, ..ttl } })
    }

    pub(super) async fn lookup_snapshot(&self, shard: ShardId, name: &[u8]) -> Outcome<Entry> {
        let snapshot = self.snapshot_named(shard, name).await?;
        self.snapshot_entry(snapshot).await
    }

    async fn snapshot_named(&self, shard: ShardId, name: &[u8]) -> Outcome<ShardId> {
        check_length(name)?;
        // What cannot be a snapshot's name is not there.
        let name = ShardName::from_bytes(name).map_err(|_| Posix::NoEntry)?;
        let info = self.client.snapshot_by_name(shard, &name).await.map_err(gone_is_no_entry)?;
        self.shards.learn(&info);
        Ok(info.id)
    }

    async fn snapshot_entry(&self, snapshot: ShardId) -> Outcome<Entry> {
        let attr = self.client.get_attr(snapshot, InodeNo::ROOT).await.map_err(gone_is_no_entry)?;
        Ok(self.root_entry(snapshot, true, &attr))
    }

    pub(super) async fn make_snapshot(&self, shard: ShardId, name: &[u8]) -> Outcome<Entry> {
        check_length(name)?;
        let name = ShardName::from_bytes(name)?;
        let info = self.client.snapshot_shard(shard, &name).await?;
        self.shards.learn(&info);
        self.snapshot_entry(info.id).await
    }

    pub(super) async fn remove_snapshot(&self, shard: ShardId, name: &[u8]) -> Outcome<()> {
        let snapshot = self.snapshot_named(shard, name).await?;
        self.client.delete_shard(snapshot, false).await.map_err(gone_is_no_entry)?;
        Ok(())
    }

    /// `.`, `..` and the snapshots in the order of their ids, which is that in which they were made.
    pub(super) async fn snapshot_items(&self, shard: ShardId) -> Outcome<Vec<DirItem>> {
        let mut snapshots = self.client.snapshots(shard).await?;
        snapshots.sort_by_key(|info| info.id);
        let item = |ino, name, offset| DirItem { ino, kind: FileKind::Directory, name, offset, entry: None };
        let mut items = vec![
            item(directory_ino(shard), Bytes::from_static(b"."), 1),
            item(GlobalInode::new(shard, InodeNo::ROOT), Bytes::from_static(b".."), FIRST_OFFSET),
        ];
        items.extend(snapshots.into_iter().map(|info| {
            self.shards.learn(&info);
            let ino = GlobalInode::new(info.id, InodeNo::ROOT);
            item(ino, Bytes::from(info.name.as_str().to_owned()), FIRST_OFFSET + info.id.get())
        }));
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::super::virtual_dir::VirtualNode;
    use super::*;

    #[test]
    fn every_shard_has_a_number_for_its_snapshots_that_nothing_else_has() {
        for shard in [ShardId::new(1).unwrap(), ShardId::MAX] {
            let ino = directory_ino(shard);
            assert_eq!(shard_of(ino), Some(shard));
            assert_eq!((ino.split(), VirtualNode::of(ino)), (None, None));
        }
        let inside = GlobalInode::new(ShardId::new(1).unwrap(), InodeNo::ROOT);
        for other in [GlobalInode::ROOT, GlobalInode::outside(2), inside] {
            assert_eq!(shard_of(other), None);
        }
    }
}
