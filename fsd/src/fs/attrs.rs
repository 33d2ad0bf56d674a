//! Attributes, symlink targets and extended attributes.

use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::op::{Operation, SetAttr};
use shardfs_proto::types::{GlobalInode, InodeNo, ShardId};

use super::types::{Caller, FileStat, Node};
use super::{Fs, attr_of};
use crate::failure::{Failure, Outcome, Posix};

/// What the kernel asks for before the first write to a file.
const CAPABILITY: &str = "security.capability";

/// How setxattr treats an attribute that is there, or is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct XattrMode {
    /// XATTR_CREATE.
    pub create_only: bool,
    /// XATTR_REPLACE.
    pub replace_only: bool,
}

impl Fs {
    /// What the thread's lookup just before showed, if this is the question that follows it (`memo`).
    pub fn looked_up(&self, caller: Caller, ino: u64) -> Option<FileStat> {
        self.memo.take(caller.thread, GlobalInode::from_raw(ino))
    }

    /// What stat shows, and how long it holds.
    pub async fn get_attr(&self, ino: u64) -> Outcome<(FileStat, Duration)> {
        match self.node(ino)? {
            Node::Root => Ok(self.root_stat().await),
            Node::Virtual(node) => {
                let entry = self.virtual_entry(node).await?;
                Ok((entry.stat, entry.ttl.attr))
            }
            Node::InShard(shard, inode) => {
                let closed = self.shards.is_closed(shard);
                let attr = self.client.get_attr(shard, inode).await;
                let attr = attr.map_err(|error| Failure::from(error).stale_if_gone())?;
                Ok((self.stat(shard, &attr), self.ttl(closed, inode, attr.kind).attr))
            }
        }
    }

    /// Changes attributes. `set.kill_set_id` is decided here: the kernel's own word on it does not pass
    /// through the transport for truncations, so that whoever is not root loses the bits, as on a local
    /// filesystem for whoever lacks CAP_FSETID; a change of owner always clears them.
    pub async fn set_attr(
        &self,
        caller: Caller,
        ino: u64,
        mut set: SetAttr,
    ) -> Outcome<(FileStat, Duration)> {
        let (shard, inode) = match self.node(ino)? {
            Node::Root => return Err(Posix::NotPermitted.into()),
            Node::Virtual(_) => return Err(Posix::ReadOnly.into()),
            Node::InShard(shard, inode) => (shard, inode),
        };
        set.kill_set_id = kills_set_id(caller, &set);
        let stat = match set.mode {
            Some(mode) if inode == InodeNo::ROOT => self.set_shard_mode(shard, set, mode).await?,
            _ => self.set_attr_in_shard(shard, inode, set).await?,
        };
        Ok((stat, self.ttl(false, inode, stat.kind).attr))
    }

    pub(super) async fn set_attr_in_shard(
        &self,
        shard: ShardId,
        inode: InodeNo,
        set: SetAttr,
    ) -> Outcome<FileStat> {
        let changed = self.mutate(shard, Operation::SetAttr { inode, set }, false).await;
        let attr = attr_of(changed.map_err(Failure::stale_if_gone)?)?;
        Ok(self.stat(shard, &attr))
    }

    /// Where a symlink points.
    pub async fn read_link(&self, ino: u64) -> Outcome<Bytes> {
        let Node::InShard(shard, inode) = self.node(ino)? else { return Err(Posix::Invalid.into()) };
        self.client.read_link(shard, inode).await.map_err(|error| Failure::from(error).stale_if_gone())
    }

    /// An extended attribute's value.
    pub async fn get_xattr(&self, ino: u64, name: Bytes) -> Outcome<Bytes> {
        check_namespace(&name)?;
        let Node::InShard(shard, inode) = self.node(ino)? else { return Err(Posix::NoAttribute.into()) };
        if name == CAPABILITY && self.newborn.is_bare(GlobalInode::from_raw(ino)) {
            return Err(Posix::NoAttribute.into());
        }
        let value = self.client.get_xattr(shard, inode, &name).await;
        value.map_err(|error| Failure::from(error).stale_if_gone())
    }

    /// The names of the extended attributes, each ended by NUL. Those in `trusted.` only for root.
    pub async fn list_xattrs(&self, caller: Caller, ino: u64) -> Outcome<Bytes> {
        let Node::InShard(shard, inode) = self.node(ino)? else { return Ok(Bytes::new()) };
        let names = self.client.list_xattrs(shard, inode).await;
        let names = names.map_err(|error| Failure::from(error).stale_if_gone())?;
        let mut list = Vec::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        for name in names.iter().filter(|name| caller.uid == 0 || !name.starts_with(b"trusted.")) {
            list.extend_from_slice(name);
            list.push(0);
        }
        Ok(list.into())
    }

    /// Sets an extended attribute.
    pub async fn set_xattr(&self, ino: u64, name: Bytes, value: Bytes, mode: XattrMode) -> Outcome<()> {
        check_namespace(&name)?;
        let (shard, inode) = self.with_attributes(ino)?;
        self.newborn.forget(GlobalInode::from_raw(ino));
        let operation = Operation::SetXattr {
            inode,
            name,
            value,
            create_only: mode.create_only,
            replace_only: mode.replace_only,
        };
        self.mutate(shard, operation, false).await.map(drop).map_err(Failure::stale_if_gone)
    }

    /// Removes an extended attribute.
    pub async fn remove_xattr(&self, ino: u64, name: Bytes) -> Outcome<()> {
        check_namespace(&name)?;
        let (shard, inode) = self.with_attributes(ino)?;
        let operation = Operation::RemoveXattr { inode, name };
        self.mutate(shard, operation, false).await.map(drop).map_err(Failure::stale_if_gone)
    }

    fn with_attributes(&self, ino: u64) -> Outcome<(ShardId, InodeNo)> {
        match self.node(ino)? {
            Node::InShard(shard, inode) => Ok((shard, inode)),
            Node::Root => Err(Posix::NotPermitted.into()),
            Node::Virtual(_) => Err(Posix::ReadOnly.into()),
        }
    }
}

fn kills_set_id(caller: Caller, set: &SetAttr) -> bool {
    let changes_owner = set.uid.is_some() || set.gid.is_some();
    // chown(path, -1, -1) comes as a change of nothing.
    let changes_nothing = *set == SetAttr::default();
    changes_owner || changes_nothing || (set.size.is_some() && caller.uid != 0)
}

/// Access control lists are not kept, so they must not seem to be.
fn check_namespace(name: &[u8]) -> Outcome<()> {
    let known: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    if known.iter().any(|prefix| name.starts_with(prefix)) {
        return Ok(());
    }
    Err(Posix::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::errno;

    #[test]
    fn set_id_bits_go_as_on_a_local_filesystem() {
        let root = Caller { uid: 0, gid: 0, thread: 1 };
        let user = Caller { uid: 1000, gid: 1000, thread: 1 };
        let nothing = SetAttr::default();
        assert!(kills_set_id(root, &SetAttr { uid: Some(1), ..nothing }));
        assert!(kills_set_id(user, &SetAttr { gid: Some(1), ..nothing }));
        assert!(kills_set_id(user, &nothing));
        assert!(kills_set_id(user, &SetAttr { size: Some(0), ..nothing }));
        assert!(!kills_set_id(root, &SetAttr { size: Some(0), ..nothing }));
        assert!(!kills_set_id(user, &SetAttr { mode: Some(0o4755), ..nothing }));
    }

    #[test]
    fn acls_are_refused() {
        assert!(check_namespace(b"user.x").is_ok());
        assert!(check_namespace(b"security.capability").is_ok());
        for bad in [&b"system.posix_acl_access"[..], b"system.posix_acl_default", b"user", b"btrfs.x", b""] {
            let failure = check_namespace(bad).unwrap_err();
            assert_eq!(errno(&failure).code(), libc::EOPNOTSUPP);
        }
    }
}
