//! Operations on attributes and extended attributes.

use bytes::Bytes;
use shardfs_proto::types::attr::MODE_BITS;
use shardfs_proto::types::limits::{XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX, XATTRS_BYTES_MAX};
use shardfs_proto::types::name::quoted;
use shardfs_proto::types::op::{OpResult, SetAttr, SetTime};
use shardfs_proto::types::{Error, FileKind, InodeNo, Reason, Result};

use super::{Apply, acl};
use crate::shard::records::{INODE_FLAG_AUTO, InodeRecord};

/// Namespaces of extended attributes; of `system.` there are the access control lists only.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// The privileges of a program.
const CAPABILITY: &[u8] = b"security.capability";
/// What each extended attribute counts besides its bytes: keeps their number below what a record holds.
const XATTR_COST_BYTES: usize = 16;

impl Apply<'_, '_> {
    pub(super) fn set_attr(&mut self, ino: InodeNo, set: &SetAttr) -> Result<OpResult> {
        let before = self.inode(ino)?;
        let mut record = InodeRecord::clone(&before);
        if let Some(mode) = set.mode {
            acl::set_mode(&mut record, mode & MODE_BITS)?;
        }
        // On a directory the set-group-id bit says what new entries inherit, and stays.
        if set.kill_set_id && record.kind != FileKind::Directory {
            record.mode = Self::kill_set_id(record.mode);
        }
        if set.uid.is_some() || set.gid.is_some() || set.size.is_some() || set.kill_set_id {
            drop_capability(&mut record);
        }
        record.uid = set.uid.unwrap_or(record.uid);
        record.gid = set.gid.unwrap_or(record.gid);
        if let Some(size) = set.size {
            match record.kind {
                FileKind::Regular => {}
                FileKind::Directory => {
                    return Err(Error::new(
                        Reason::IsDirectory,
                        format!("inode {ino} is a directory: it has no size"),
                    ));
                }
                FileKind::Symlink
                | FileKind::Fifo
                | FileKind::Socket
                | FileKind::CharDevice
                | FileKind::BlockDevice => {
                    return Err(Error::invalid(format!(
                        "inode {ino} is no regular file: it has no size to set"
                    )));
                }
            }
            self.resize(&mut record, size)?;
            record.mtime = self.now;
        }
        let now = self.now;
        let time = |set: SetTime| match set {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        record.atime = set.atime.map_or(record.atime, time);
        record.mtime = set.mtime.map_or(record.mtime, time);
        record.ctime = self.now;
        // Access times are kept up by the mount itself; anything else is somebody's wish for this directory.
        let explicit = set.mode.is_some() || set.uid.is_some() || set.gid.is_some() || set.mtime.is_some();
        if record.kind == FileKind::Directory && explicit {
            record.flags &= !INODE_FLAG_AUTO;
        }
        let record = self.txn.put_inode(ino, record)?;
        Ok(self.answer(ino, &record))
    }

    pub(super) fn set_xattr(
        &mut self,
        ino: InodeNo,
        name: &Bytes,
        value: &Bytes,
        (create_only, replace_only): (bool, bool),
        kill_set_group_id: bool,
    ) -> Result<OpResult> {
        check_namespace(name)?;
        if name.len() > XATTR_NAME_BYTES_MAX {
            return Err(Error::new(
                Reason::NameTooLong,
                format!(
                    "an extended attribute's name has {} bytes; the limit is {XATTR_NAME_BYTES_MAX}",
                    name.len()
                ),
            ));
        }
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(Error::new(
                Reason::AttributeTooLarge,
                format!(
                    "an extended attribute has {} bytes; the limit is {XATTR_VALUE_BYTES_MAX}",
                    value.len()
                ),
            ));
        }
        let mut record = InodeRecord::clone(&*self.inode(ino)?);
        let there = record.xattrs.contains_key(name);
        if create_only && there {
            return Err(Error::new(Reason::AlreadyExists, format!("attribute {} is there", quoted(name))));
        }
        if replace_only && !there {
            return Err(no_attribute(name));
        }
        if acl::is_acl(name) {
            acl::set_acl(ino, &mut record, name, value, kill_set_group_id)?;
        } else {
            // Copies: the message's memory must not be kept alive by a small attribute.
            record.xattrs.insert(Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
        }
        let all = record.xattr_bytes() + XATTR_COST_BYTES * record.xattrs.len();
        if all > XATTRS_BYTES_MAX {
            return Err(Error::new(
                Reason::AttributeTooLarge,
                format!(
                    "inode {ino}: its extended attributes would take {all} bytes; the limit is {XATTRS_BYTES_MAX}"
                ),
            ));
        }
        record.ctime = self.now;
        self.txn.grow((name.len() + value.len()) as u64);
        let record = self.txn.put_inode(ino, record)?;
        Ok(self.answer(ino, &record))
    }

    pub(super) fn remove_xattr(&mut self, ino: InodeNo, name: &Bytes) -> Result<OpResult> {
        let mut record = InodeRecord::clone(&*self.inode(ino)?);
        if record.xattrs.remove(name).is_none() {
            return Err(no_attribute(name));
        }
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        Ok(self.answer(ino, &record))
    }
}

/// What a change of a file's content or owner takes from it: a program that somebody else wrote has no privileges.
pub(super) fn drop_capability(record: &mut InodeRecord) {
    if record.kind != FileKind::Directory {
        record.xattrs.remove(CAPABILITY);
    }
}

/// Fails unless a name is in a namespace that there is.
fn check_namespace(name: &[u8]) -> Result<()> {
    if name.is_empty() || name.contains(&0) {
        return Err(Error::invalid("an extended attribute's name is empty or contains NUL"));
    }
    let within = NAMESPACES.iter().find_map(|namespace| name.strip_prefix(*namespace));
    match within {
        Some(b"") => Err(Error::invalid(format!("{} names no attribute", quoted(name)))),
        Some(_) => Ok(()),
        None if acl::is_acl(name) => Ok(()),
        None => Err(Error::new(
            Reason::Unsupported,
            format!("attribute {}: there is no such namespace", quoted(name)),
        )),
    }
}

fn no_attribute(name: &[u8]) -> Error {
    Error::new(Reason::NoAttribute, format!("there is no attribute {}", quoted(name)))
}
