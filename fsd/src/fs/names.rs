//! Names: finding, making, removing and moving them, in a shard; the root has rules of its own (`root`).

use bytes::Bytes;
use shardfs_proto::types::limits::NAME_BYTES_MAX;
use shardfs_proto::types::op::{NewInode, Operation};
use shardfs_proto::types::{Error, FileKind, FileName, GlobalInode, InodeNo, Reason, ShardId};

use super::types::{Caller, Entry, NewMode, Node, OpenMode, Opened, RenameMode};
use super::{Fs, attr_of};
use crate::failure::{Failure, Outcome, Posix};

/// A file to be made: what mknod and create share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewNode {
    /// Anything but a directory or a symlink.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: NewMode,
    /// For devices.
    pub rdev: u32,
}

impl Fs {
    /// Finds a name.
    pub async fn lookup(&self, caller: Caller, parent: u64, name: Bytes) -> Outcome<Entry> {
        match self.node(parent)? {
            Node::Root => {
                let entry = self.lookup_in_root(&name).await?;
                self.memo.put(caller.thread, entry.stat, false);
                Ok(entry)
            }
            Node::Virtual(node) => self.lookup_virtual(node, &name).await,
            Node::Snapshots(shard) => self.lookup_snapshot(shard, &name).await,
            Node::InShard(shard, InodeNo::ROOT) if self.is_snapshot_directory(shard, &name) => {
                self.snapshots_entry(shard).await
            }
            Node::InShard(shard, parent) => {
                check_length(&name)?;
                let closed = self.shards.is_closed(shard);
                let attr = self.look_up(caller.thread, shard, parent, &name).await?;
                self.will_show(shard, &attr);
                let entry = self.entry(shard, closed, &attr);
                self.memo.put(caller.thread, entry.stat, entry.ttl.attr.is_zero());
                Ok(entry)
            }
        }
    }

    /// Makes a file that is not opened.
    pub async fn make_node(&self, caller: Caller, parent: u64, name: Bytes, new: NewNode) -> Outcome<Entry> {
        let (shard, parent) = self.writable_parent(parent)?;
        let operation = create(caller, parent, FileName::new(name)?, new, false);
        let made = self.mutate(shard, operation, false).await?;
        self.changed_entry(shard, made)
    }

    /// Makes a regular file and opens it. If somebody else made it first, the kernel is to look again:
    /// only it can say whether the caller may open what is there.
    pub async fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: Bytes,
        mode: NewMode,
        open: OpenMode,
    ) -> Outcome<(Entry, Opened)> {
        let (shard, parent) = self.writable_parent(parent)?;
        let new = NewNode { kind: FileKind::Regular, mode, rdev: 0 };
        let operation = create(caller, parent, FileName::new(name)?, new, true);
        let made = match self.mutate(shard, operation, false).await {
            Err(failure) if failure.reason() == Some(Reason::AlreadyExists) && !open.exclusive => {
                return Err(Posix::Stale.into());
            }
            outcome => attr_of(outcome?)?,
        };
        let opened = self.opened(shard, &made, open).await?;
        self.newborn.made(GlobalInode::new(shard, made.inode));
        Ok((self.entry(shard, false, &made), opened))
    }

    /// Makes a directory; in the root, a shard; in `.snap`, a snapshot.
    pub async fn make_directory(
        &self,
        caller: Caller,
        parent: u64,
        name: Bytes,
        mode: NewMode,
    ) -> Outcome<Entry> {
        let (shard, parent) = match self.node(parent)? {
            Node::Root => return self.make_shard(caller, &name, mode.masked()).await,
            Node::Virtual(_) => return Err(Posix::ReadOnly.into()),
            Node::Snapshots(shard) => return self.make_snapshot(shard, &name).await,
            Node::InShard(shard, InodeNo::ROOT) if self.is_snapshot_directory(shard, &name) => {
                return Err(Posix::Exists.into());
            }
            Node::InShard(shard, parent) => (shard, parent),
        };
        let inode = new_inode(caller, mode);
        let operation = Operation::MakeDirectory { parent, name: FileName::new(name)?, inode };
        let made = self.mutate(shard, operation, false).await?;
        self.changed_entry(shard, made)
    }

    /// Makes a symbolic link.
    pub async fn make_symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: Bytes,
        target: Bytes,
    ) -> Outcome<Entry> {
        let (shard, parent) = self.writable_parent(parent)?;
        let inode = new_inode(caller, NewMode { asked: 0o777, umask: 0 });
        let operation = Operation::MakeSymlink { parent, name: FileName::new(name)?, target, inode };
        let made = self.mutate(shard, operation, false).await?;
        self.changed_entry(shard, made)
    }

    /// Gives an inode another name.
    pub async fn link(&self, ino: u64, new_parent: u64, new_name: Bytes) -> Outcome<Entry> {
        let (shard, new_parent) = self.writable_parent(new_parent)?;
        let inode = match self.node(ino)? {
            Node::InShard(of, inode) if of == shard => inode,
            Node::InShard(..) | Node::Root | Node::Virtual(_) | Node::Snapshots(_) => {
                return Err(Posix::CrossDevice.into());
            }
        };
        let operation = Operation::Link { inode, new_parent, new_name: FileName::new(new_name)? };
        let linked = self.mutate(shard, operation, false).await?;
        self.changed_entry(shard, linked)
    }

    /// Removes a name of something that is no directory.
    pub async fn unlink(&self, parent: u64, name: Bytes) -> Outcome<()> {
        let (shard, parent) = match self.node(parent)? {
            Node::Root => return Err(self.no_file_in_root(&name)),
            Node::Virtual(_) | Node::Snapshots(_) => return Err(Posix::ReadOnly.into()),
            Node::InShard(shard, parent) => (shard, parent),
        };
        let operation = Operation::Unlink { parent, name: FileName::new(name)? };
        self.mutate(shard, operation, false).await.map(drop)
    }

    /// Removes an empty directory; in the root, a shard; in `.snap`, a snapshot with its content.
    pub async fn remove_directory(&self, parent: u64, name: Bytes) -> Outcome<()> {
        let (shard, parent) = match self.node(parent)? {
            Node::Root => return self.remove_shard(&name).await,
            Node::Virtual(_) => return Err(Posix::ReadOnly.into()),
            Node::Snapshots(shard) => return self.remove_snapshot(shard, &name).await,
            Node::InShard(shard, InodeNo::ROOT) if self.is_snapshot_directory(shard, &name) => {
                return Err(Posix::NotPermitted.into());
            }
            Node::InShard(shard, parent) => (shard, parent),
        };
        let operation = Operation::RemoveDirectory { parent, name: FileName::new(name)? };
        self.mutate(shard, operation, false).await.map(drop)
    }

    /// Moves a name within a shard; within the root, renames a shard.
    pub async fn rename(
        &self,
        parent: u64,
        name: Bytes,
        new_parent: u64,
        new_name: Bytes,
        mode: RenameMode,
    ) -> Outcome<()> {
        let (from, to) = (self.node(parent)?, self.node(new_parent)?);
        let (shard, parent, new_parent) = match (from, to) {
            (Node::Virtual(_) | Node::Snapshots(_), _) | (_, Node::Virtual(_) | Node::Snapshots(_)) => {
                return Err(Posix::ReadOnly.into());
            }
            (Node::Root, Node::Root) => return self.rename_shard(&name, &new_name, mode).await,
            (Node::InShard(a, parent), Node::InShard(b, new_parent)) if a == b => (a, parent, new_parent),
            // mv(1) copies then, which into the root makes a shard of a directory and fails for a file.
            (Node::InShard(..) | Node::Root, Node::InShard(..) | Node::Root) => {
                return Err(Posix::CrossDevice.into());
            }
        };
        let operation = Operation::Rename {
            parent,
            name: FileName::new(name)?,
            new_parent,
            new_name: FileName::new(new_name)?,
            no_replace: mode.no_replace,
            exchange: mode.exchange,
        };
        self.mutate(shard, operation, false).await.map(drop)
    }

    /// A directory in which files can be made.
    fn writable_parent(&self, parent: u64) -> Outcome<(ShardId, InodeNo)> {
        match self.node(parent)? {
            // Only shards stand in the root.
            Node::Root => Err(Posix::NotPermitted.into()),
            Node::Virtual(_) | Node::Snapshots(_) => Err(Posix::ReadOnly.into()),
            Node::InShard(shard, parent) => Ok((shard, parent)),
        }
    }
}

/// Names that are too long to be there; other impossible names cannot come from the kernel.
pub(super) fn check_length(name: &[u8]) -> Outcome<()> {
    if name.len() > NAME_BYTES_MAX {
        let words = format!("a name of {} bytes; the limit is {NAME_BYTES_MAX}", name.len());
        return Err(Failure::Domain(Error::new(Reason::NameTooLong, words)));
    }
    Ok(())
}

fn new_inode(caller: Caller, mode: NewMode) -> NewInode {
    let unmasked_mode = (mode.masked() != mode.asked).then_some(mode.asked);
    NewInode { mode: mode.masked(), uid: caller.uid, gid: caller.gid, unmasked_mode }
}

fn create(caller: Caller, parent: InodeNo, name: FileName, new: NewNode, open: bool) -> Operation {
    Operation::Create {
        parent,
        name,
        kind: new.kind,
        inode: new_inode(caller, new.mode),
        rdev: new.rdev,
        existing_ok: false,
        open,
    }
}
