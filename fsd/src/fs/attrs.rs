//! Attributes, symlink targets and extended attributes.

use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, DEFAULT_ACL};
use shardfs_proto::types::op::{Operation, SetAttr};
use shardfs_proto::types::{GlobalInode, InodeNo, Reason, ShardId};

use super::types::{Caller, FileStat, Node};
use super::{Fs, attr_of};
use crate::credentials::{CAP_FSETID, CAP_SYS_ADMIN, Credentials};
use crate::failure::{Failure, Outcome, Posix};

/// The set-group-id bit.
const SET_GID: u32 = 0o2000;
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

    /// Whether the thread's lookup or question for attributes just before showed that there is no such
    /// access control list (`memo`).
    pub fn has_no_acl(&self, caller: Caller, ino: u64, name: &[u8]) -> bool {
        is_acl(name) && self.memo.take_no_acl(caller.thread, GlobalInode::from_raw(ino))
    }

    /// What stat shows, and how long it holds.
    pub async fn get_attr(&self, caller: Caller, ino: u64) -> Outcome<(FileStat, Duration)> {
        match self.node(ino)? {
            Node::Root => Ok(self.root_stat().await),
            Node::Virtual(node) => {
                let entry = self.virtual_entry(node).await?;
                Ok((entry.stat, entry.ttl.attr))
            }
            Node::Snapshots(shard) => {
                let entry = self.snapshots_entry(shard).await?;
                Ok((entry.stat, entry.ttl.attr))
            }
            Node::InShard(shard, inode) => {
                let closed = self.shards.is_closed(shard);
                let attr = self.client.get_attr(shard, inode).await;
                let attr = attr.map_err(|error| Failure::from(error).stale_if_gone())?;
                self.will_show(shard, &attr);
                let stat = self.stat(shard, &attr);
                // The kernel checks permissions next, if that is what it asks for.
                self.memo.put(caller.thread, stat, false);
                Ok((stat, self.ttl(closed, inode, attr.kind).attr))
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
        handle: Option<u64>,
        mut set: SetAttr,
    ) -> Outcome<(FileStat, Duration)> {
        let (shard, inode) = match self.node(ino)? {
            Node::Root => return Err(Posix::NotPermitted.into()),
            Node::Virtual(_) | Node::Snapshots(_) => return Err(Posix::ReadOnly.into()),
            Node::InShard(shard, inode) => (shard, inode),
        };
        set.kill_set_id = kills_set_id(caller, &set);
        let stat = match set.mode {
            Some(mode) if inode == InodeNo::ROOT => self.set_shard_mode(shard, set, mode).await?,
            _ => self.set_attr_in_shard(shard, inode, handle, set).await?,
        };
        Ok((stat, self.ttl(false, inode, stat.kind).attr))
    }

    pub(super) async fn set_attr_in_shard(
        &self,
        shard: ShardId,
        inode: InodeNo,
        handle: Option<u64>,
        set: SetAttr,
    ) -> Outcome<FileStat> {
        let changed = self.mutate_through(handle, shard, Operation::SetAttr { inode, set }, false).await;
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
        let (shard, inode) = match self.node(ino)? {
            Node::InShard(shard, inode) => (shard, inode),
            // Its permission bits are those of the shard's directory, too.
            Node::Snapshots(shard) if name == ACCESS_ACL => (shard, InodeNo::ROOT),
            Node::Root | Node::Virtual(_) | Node::Snapshots(_) => return Err(Posix::NoAttribute.into()),
        };
        if name == CAPABILITY && self.newborn.is_bare(GlobalInode::from_raw(ino)) {
            return Err(Posix::NoAttribute.into());
        }
        let value = self.client.get_xattr(shard, inode, &name).await;
        value.map_err(|error| Failure::from(error).stale_if_gone())
    }

    /// The names of the extended attributes, each ended by NUL. Those in `trusted.` only for whoever may read them.
    pub async fn list_xattrs(&self, caller: Caller, ino: u64) -> Outcome<Bytes> {
        let Node::InShard(shard, inode) = self.node(ino)? else { return Ok(Bytes::new()) };
        let names = self.client.list_xattrs(shard, inode).await;
        let names = names.map_err(|error| Failure::from(error).stale_if_gone())?;
        let mut list = Vec::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        let is_trusted = |name: &Bytes| name.starts_with(b"trusted.");
        let all = !names.iter().any(is_trusted) || is_admin(caller);
        for name in names.iter().filter(|name| all || !is_trusted(name)) {
            list.extend_from_slice(name);
            list.push(0);
        }
        Ok(list.into())
    }

    /// Sets an extended attribute.
    pub async fn set_xattr(
        &self,
        caller: Caller,
        ino: u64,
        name: Bytes,
        value: Bytes,
        mode: XattrMode,
    ) -> Outcome<()> {
        check_namespace(&name)?;
        let (shard, inode) = self.with_attributes(ino)?;
        self.newborn.forget(GlobalInode::from_raw(ino));
        let kill_set_group_id = name == ACCESS_ACL && self.loses_set_group_id(caller, shard, inode).await?;
        let operation = Operation::SetXattr {
            inode,
            name,
            value,
            create_only: mode.create_only,
            replace_only: mode.replace_only,
            kill_set_group_id,
        };
        self.mutate(shard, operation, false).await.map(drop).map_err(Failure::stale_if_gone)
    }

    /// Removes an extended attribute.
    pub async fn remove_xattr(&self, ino: u64, name: Bytes) -> Outcome<()> {
        check_namespace(&name)?;
        let (shard, inode) = self.with_attributes(ino)?;
        let is_list = is_acl(&name);
        let operation = Operation::RemoveXattr { inode, name };
        match self.mutate(shard, operation, false).await {
            // As on a local filesystem: there is no list afterwards either way.
            Err(failure) if is_list && failure.reason() == Some(Reason::NoAttribute) => Ok(()),
            done => done.map(drop).map_err(Failure::stale_if_gone),
        }
    }

    /// Whether the caller sets permission bits of a file whose set-group-id bit it may not keep. For chmod the kernel
    /// decides; for access control lists it would tell in a form of SETXATTR that fuser 0.18 does not know.
    async fn loses_set_group_id(&self, caller: Caller, shard: ShardId, inode: InodeNo) -> Outcome<bool> {
        let attr = self.client.get_attr(shard, inode).await;
        let attr = attr.map_err(|error| Failure::from(error).stale_if_gone())?;
        if attr.mode & SET_GID == 0 || attr.gid == caller.gid {
            return Ok(false);
        }
        Ok(match Credentials::of(caller.thread) {
            Some(credentials) => !credentials.is_in_group(attr.gid) && !credentials.has(CAP_FSETID),
            None => caller.uid != 0,
        })
    }

    fn with_attributes(&self, ino: u64) -> Outcome<(ShardId, InodeNo)> {
        match self.node(ino)? {
            Node::InShard(shard, inode) => Ok((shard, inode)),
            Node::Root => Err(Posix::NotPermitted.into()),
            Node::Virtual(_) | Node::Snapshots(_) => Err(Posix::ReadOnly.into()),
        }
    }
}

fn kills_set_id(caller: Caller, set: &SetAttr) -> bool {
    let changes_owner = set.uid.is_some() || set.gid.is_some();
    // chown(path, -1, -1) comes as a change of nothing.
    let changes_nothing = *set == SetAttr::default();
    changes_owner || changes_nothing || (set.size.is_some() && caller.uid != 0)
}

/// Whether the caller may read attributes in `trusted.`: the kernel decides that, but for their names.
fn is_admin(caller: Caller) -> bool {
    match Credentials::of(caller.thread) {
        Some(credentials) => credentials.has(CAP_SYS_ADMIN),
        None => caller.uid == 0,
    }
}

fn is_acl(name: &[u8]) -> bool {
    name == ACCESS_ACL || name == DEFAULT_ACL
}

/// The namespaces that there are; of `system.` there are the access control lists only.
fn check_namespace(name: &[u8]) -> Outcome<()> {
    let known: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    match known.iter().find_map(|namespace| name.strip_prefix(*namespace)) {
        Some(b"") => Err(Posix::Invalid.into()),
        Some(_) => Ok(()),
        None if is_acl(name) => Ok(()),
        None => Err(Posix::Unsupported.into()),
    }
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
    fn namespaces_are_those_of_a_local_filesystem() {
        for good in [&b"user.x"[..], b"trusted.x", b"security.capability", ACCESS_ACL, DEFAULT_ACL] {
            assert!(check_namespace(good).is_ok());
        }
        let refused = |name: &[u8]| errno(&check_namespace(name).unwrap_err()).code();
        for bad in [&b"system.posix_acl"[..], b"system.x", b"user", b"btrfs.x", b""] {
            assert_eq!(refused(bad), libc::EOPNOTSUPP);
        }
        for bad in [&b"user."[..], b"trusted.", b"security."] {
            assert_eq!(refused(bad), libc::EINVAL);
        }
    }
}
