//! Access control lists: extended attributes that are kept in step with permission bits.
//!
//! Invariants: an access list is valid, says more than permission bits do, and those of its inode are the list's
//! ([`Acl::mode`]); only directories have a default list; symlinks have neither.

use std::collections::BTreeMap;

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, DEFAULT_ACL, PERMISSION_BITS};
use shardfs_proto::types::{Acl, Error, FileKind, InodeNo, Reason, Result};

use super::SET_GID;
use crate::shard::records::{INODE_FLAG_AUTO, InodeRecord};

/// Whether an extended attribute is a list.
pub(super) fn is_acl(name: &[u8]) -> bool {
    name == ACCESS_ACL || name == DEFAULT_ACL
}

/// The list that an inode has under a name.
fn acl_of(record: &InodeRecord, name: &[u8]) -> Result<Option<Acl>> {
    let Some(value) = record.xattrs.get(name) else { return Ok(None) };
    Acl::decode(value).map_err(|e| Error::corrupt(format!("a stored access control list: {e}")))
}

/// Gives an inode a list, or takes it away if `value` is one without entries.
pub(super) fn set_acl(
    ino: InodeNo,
    record: &mut InodeRecord,
    name: &Bytes,
    value: &[u8],
    kill_set_group_id: bool,
) -> Result<()> {
    if record.kind == FileKind::Symlink {
        return Err(Error::new(
            Reason::Unsupported,
            format!("inode {ino} is a symlink: it has no access control list"),
        ));
    }
    let acl = Acl::decode(value)?;
    let Some(acl) = acl else {
        record.xattrs.remove(name);
        return Ok(());
    };
    if *name == *DEFAULT_ACL {
        if record.kind != FileKind::Directory {
            return Err(Error::new(
                Reason::WrongKind,
                format!("inode {ino} is no directory: nothing is made in it that a default list is for"),
            ));
        }
        keep(&mut record.xattrs, DEFAULT_ACL, &acl);
    } else {
        record.mode = (record.mode & !PERMISSION_BITS) | acl.mode();
        if kill_set_group_id {
            record.mode &= !SET_GID;
        }
        if acl.is_mode() {
            record.xattrs.remove(ACCESS_ACL);
        } else {
            keep(&mut record.xattrs, ACCESS_ACL, &acl);
        }
    }
    // Somebody's wish for this directory.
    record.flags &= !INODE_FLAG_AUTO;
    Ok(())
}

/// Gives an inode permission bits, which its access list follows.
pub(super) fn set_mode(record: &mut InodeRecord, mode: u32) -> Result<()> {
    record.mode = mode;
    if let Some(mut acl) = acl_of(record, ACCESS_ACL)? {
        acl.set_mode(mode);
        keep(&mut record.xattrs, ACCESS_ACL, &acl);
    }
    Ok(())
}

/// What a new inode gets from its directory.
pub(super) struct Inherited {
    pub(super) mode: u32,
    pub(super) xattrs: BTreeMap<Bytes, Bytes>,
}

/// The mode and lists of a new inode. `unmasked`: the mode that counts if its directory has a default list.
pub(super) fn inherit(
    parent: &InodeRecord,
    kind: FileKind,
    mode: u32,
    unmasked: Option<u32>,
) -> Result<Inherited> {
    let mut xattrs = BTreeMap::new();
    if kind == FileKind::Symlink {
        return Ok(Inherited { mode, xattrs });
    }
    let Some(default) = acl_of(parent, DEFAULT_ACL)? else { return Ok(Inherited { mode, xattrs }) };
    let mut access = default.clone();
    let mode = access.restrict(unmasked.unwrap_or(mode));
    if !access.is_mode() {
        keep(&mut xattrs, ACCESS_ACL, &access);
    }
    if kind == FileKind::Directory {
        keep(&mut xattrs, DEFAULT_ACL, &default);
    }
    Ok(Inherited { mode, xattrs })
}

fn keep(xattrs: &mut BTreeMap<Bytes, Bytes>, name: &'static [u8], acl: &Acl) {
    xattrs.insert(Bytes::from_static(name), acl.encode());
}
