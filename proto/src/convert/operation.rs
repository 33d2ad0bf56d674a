//! Operations and what they answer.

use bytes::Bytes;

use super::locks::{lock_change_from_wire, lock_kind_to_wire};
use super::{
    attr_from_wire, attr_to_wire, kind_from_wire, kind_to_wire, meta_from_wire, meta_to_wire, missing, mode,
    put_item_from_wire, put_item_to_wire, put_items_from_wire, time_from_wire, time_to_wire, value_from_wire,
    version_condition,
};
use crate::types::limits::{FILE_BYTES_MAX, SYMLINK_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use crate::types::op::{
    AllocateMode, NewInode, ObjectMeta, OpResult, Operation, SeekFor, SetAttr, SetTime, Sought,
};
use crate::types::{Error, FileKind, FileName, InodeNo, Key, LockRange, Reason, Result, Version};
use crate::{status, wire};

fn new_inode_from_wire(i: Option<wire::NewInode>) -> Result<NewInode> {
    let i = i.ok_or_else(|| missing("the new inode's identity"))?;
    let unmasked_mode = i.unmasked_mode.map(mode).transpose()?;
    Ok(NewInode { mode: mode(i.mode)?, uid: i.uid, gid: i.gid, unmasked_mode })
}

fn new_inode_to_wire(i: &NewInode) -> wire::NewInode {
    wire::NewInode { mode: i.mode, uid: i.uid, gid: i.gid, unmasked_mode: i.unmasked_mode }
}

fn xattr_name(name: Bytes) -> Result<Bytes> {
    if name.is_empty() || name.contains(&0) {
        return Err(Error::invalid("an extended attribute's name is empty or has a NUL"));
    }
    if name.len() > XATTR_NAME_BYTES_MAX {
        return Err(Error::invalid(format!(
            "the extended attribute's name has {} bytes; the limit is {XATTR_NAME_BYTES_MAX}",
            name.len()
        )));
    }
    Ok(name)
}

fn range(offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(()),
        _ => Err(Error::new(
            Reason::FileTooLarge,
            format!("offset {offset} and length {length}: a file has at most {FILE_BYTES_MAX} bytes"),
        )),
    }
}

fn set_time(now: bool, at: Option<wire::Time>) -> Result<Option<SetTime>> {
    if now {
        return Ok(Some(SetTime::Now));
    }
    Ok(at.map(time_from_wire).transpose()?.map(SetTime::At))
}

/// An operation.
pub fn operation_from_wire(operation: Option<wire::Operation>) -> Result<Operation> {
    use wire::operation::Kind as W;
    let ino = InodeNo::new;
    let name = |name: Bytes| FileName::new(name);
    Ok(
        match operation
            .and_then(|o| o.kind)
            .ok_or_else(|| missing("the operation (or it is unknown here)"))?
        {
            W::Create(o) => {
                let kind = kind_from_wire(o.kind)?;
                match kind {
                    FileKind::Directory | FileKind::Symlink => {
                        return Err(Error::invalid("Create makes files, FIFOs, sockets and devices"));
                    }
                    FileKind::Regular
                    | FileKind::Fifo
                    | FileKind::Socket
                    | FileKind::CharDevice
                    | FileKind::BlockDevice => {}
                }
                Operation::Create {
                    parent: ino(o.parent)?,
                    name: name(o.name)?,
                    kind,
                    inode: new_inode_from_wire(o.inode)?,
                    rdev: o.rdev,
                    existing_ok: o.existing_ok,
                    open: o.open,
                }
            }
            W::MakeDirectory(o) => Operation::MakeDirectory {
                parent: ino(o.parent)?,
                name: name(o.name)?,
                inode: new_inode_from_wire(o.inode)?,
            },
            W::MakeSymlink(o) => {
                if o.target.is_empty() || o.target.contains(&0) {
                    return Err(Error::invalid("a symlink's target is empty or has a NUL"));
                }
                if o.target.len() > SYMLINK_BYTES_MAX {
                    return Err(Error::new(
                        Reason::NameTooLong,
                        format!(
                            "the symlink's target has {} bytes; the limit is {SYMLINK_BYTES_MAX}",
                            o.target.len()
                        ),
                    ));
                }
                Operation::MakeSymlink {
                    parent: ino(o.parent)?,
                    name: name(o.name)?,
                    target: o.target,
                    inode: new_inode_from_wire(o.inode)?,
                }
            }
            W::Link(o) => Operation::Link {
                inode: ino(o.inode)?,
                new_parent: ino(o.new_parent)?,
                new_name: name(o.new_name)?,
            },
            W::Unlink(o) => Operation::Unlink { parent: ino(o.parent)?, name: name(o.name)? },
            W::RemoveDirectory(o) => {
                Operation::RemoveDirectory { parent: ino(o.parent)?, name: name(o.name)? }
            }
            W::Rename(o) => {
                if o.no_replace && o.exchange {
                    return Err(Error::invalid("no_replace and exchange exclude each other"));
                }
                Operation::Rename {
                    parent: ino(o.parent)?,
                    name: name(o.name)?,
                    new_parent: ino(o.new_parent)?,
                    new_name: name(o.new_name)?,
                    no_replace: o.no_replace,
                    exchange: o.exchange,
                }
            }
            W::SetAttr(o) => {
                range(o.size.unwrap_or(0), 0)?;
                Operation::SetAttr {
                    inode: ino(o.inode)?,
                    set: SetAttr {
                        mode: o.mode.map(mode).transpose()?,
                        uid: o.uid,
                        gid: o.gid,
                        size: o.size,
                        atime: set_time(o.atime_now, o.atime)?,
                        mtime: set_time(o.mtime_now, o.mtime)?,
                        kill_set_id: o.kill_set_id,
                    },
                }
            }
            W::Write(o) => {
                range(if o.append { 0 } else { o.offset }, o.data.len() as u64)?;
                Operation::Write {
                    inode: ino(o.inode)?,
                    offset: if o.append { 0 } else { o.offset },
                    data: value_from_wire(o.data)?,
                    append: o.append,
                    kill_set_id: o.kill_set_id,
                }
            }
            W::Allocate(o) => {
                use wire::allocate::Mode;
                range(o.offset, o.length)?;
                if o.length == 0 {
                    return Err(Error::invalid("the length to allocate is 0"));
                }
                Operation::Allocate {
                    inode: ino(o.inode)?,
                    offset: o.offset,
                    length: o.length,
                    mode: match o.mode() {
                        Mode::Unspecified => return Err(missing("the allocation's mode")),
                        Mode::Allocate => AllocateMode::Allocate { keep_size: false },
                        Mode::AllocateKeepSize => AllocateMode::Allocate { keep_size: true },
                        Mode::PunchHole => AllocateMode::PunchHole,
                        Mode::ZeroRange => AllocateMode::ZeroRange { keep_size: false },
                        Mode::ZeroRangeKeepSize => AllocateMode::ZeroRange { keep_size: true },
                    },
                    kill_set_id: o.kill_set_id,
                }
            }
            W::SetXattr(o) => {
                if o.value.len() > XATTR_VALUE_BYTES_MAX {
                    return Err(Error::new(
                        Reason::AttributeTooLarge,
                        format!(
                            "the extended attribute has {} bytes; the limit is {XATTR_VALUE_BYTES_MAX}",
                            o.value.len()
                        ),
                    ));
                }
                Operation::SetXattr {
                    inode: ino(o.inode)?,
                    name: xattr_name(o.name)?,
                    value: o.value,
                    create_only: o.create_only,
                    replace_only: o.replace_only,
                    kill_set_group_id: o.kill_set_group_id,
                }
            }
            W::RemoveXattr(o) => Operation::RemoveXattr { inode: ino(o.inode)?, name: xattr_name(o.name)? },
            W::PutValue(o) => Operation::PutValue {
                item: put_item_from_wire(o.item.ok_or_else(|| missing("the value to put"))?)?,
            },
            W::PutValues(o) => {
                Operation::PutValues { items: put_items_from_wire(o.items)?, atomic: o.atomic }
            }
            W::DeleteValue(o) => {
                Operation::DeleteValue { key: Key::new(o.key)?, if_version: version_condition(o.if_version) }
            }
            W::CopyRange(o) => {
                range(o.source_offset, 0)?;
                range(o.destination_offset, 0)?;
                Operation::CopyRange {
                    source: ino(o.source)?,
                    source_offset: o.source_offset,
                    destination: ino(o.destination)?,
                    destination_offset: o.destination_offset,
                    length: o.length,
                    kill_set_id: o.kill_set_id,
                }
            }
            W::SetLock(o) => Operation::SetLock {
                inode: ino(o.inode)?,
                owner: o.owner,
                pid: o.pid,
                range: LockRange::new(o.start, o.end)?,
                kind: lock_change_from_wire(o.kind)?,
            },
        },
    )
}

fn name_bytes(name: &FileName) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

/// An operation.
pub fn operation_to_wire(operation: &Operation) -> wire::Operation {
    use wire::operation::Kind as W;
    let kind = match operation {
        Operation::Create { parent, name, kind, inode, rdev, existing_ok, open } => W::Create(wire::Create {
            parent: parent.get(),
            name: name_bytes(name),
            kind: kind_to_wire(*kind).into(),
            inode: Some(new_inode_to_wire(inode)),
            rdev: *rdev,
            existing_ok: *existing_ok,
            open: *open,
        }),
        Operation::MakeDirectory { parent, name, inode } => W::MakeDirectory(wire::MakeDirectory {
            parent: parent.get(),
            name: name_bytes(name),
            inode: Some(new_inode_to_wire(inode)),
        }),
        Operation::MakeSymlink { parent, name, target, inode } => W::MakeSymlink(wire::MakeSymlink {
            parent: parent.get(),
            name: name_bytes(name),
            target: target.clone(),
            inode: Some(new_inode_to_wire(inode)),
        }),
        Operation::Link { inode, new_parent, new_name } => W::Link(wire::Link {
            inode: inode.get(),
            new_parent: new_parent.get(),
            new_name: name_bytes(new_name),
        }),
        Operation::Unlink { parent, name } => {
            W::Unlink(wire::Unlink { parent: parent.get(), name: name_bytes(name) })
        }
        Operation::RemoveDirectory { parent, name } => {
            W::RemoveDirectory(wire::RemoveDirectory { parent: parent.get(), name: name_bytes(name) })
        }
        Operation::Rename { parent, name, new_parent, new_name, no_replace, exchange } => {
            W::Rename(wire::Rename {
                parent: parent.get(),
                name: name_bytes(name),
                new_parent: new_parent.get(),
                new_name: name_bytes(new_name),
                no_replace: *no_replace,
                exchange: *exchange,
            })
        }
        Operation::SetAttr { inode, set } => {
            let at = |t: Option<SetTime>| match t {
                Some(SetTime::At(t)) => Some(time_to_wire(t)),
                Some(SetTime::Now) | None => None,
            };
            W::SetAttr(wire::SetAttr {
                inode: inode.get(),
                mode: set.mode,
                uid: set.uid,
                gid: set.gid,
                size: set.size,
                atime: at(set.atime),
                mtime: at(set.mtime),
                atime_now: set.atime == Some(SetTime::Now),
                mtime_now: set.mtime == Some(SetTime::Now),
                kill_set_id: set.kill_set_id,
            })
        }
        Operation::Write { inode, offset, data, append, kill_set_id } => W::Write(wire::Write {
            inode: inode.get(),
            offset: *offset,
            data: data.clone(),
            append: *append,
            kill_set_id: *kill_set_id,
        }),
        Operation::Allocate { inode, offset, length, mode, kill_set_id } => {
            use wire::allocate::Mode;
            W::Allocate(wire::Allocate {
                inode: inode.get(),
                offset: *offset,
                length: *length,
                mode: match mode {
                    AllocateMode::Allocate { keep_size: false } => Mode::Allocate,
                    AllocateMode::Allocate { keep_size: true } => Mode::AllocateKeepSize,
                    AllocateMode::PunchHole => Mode::PunchHole,
                    AllocateMode::ZeroRange { keep_size: false } => Mode::ZeroRange,
                    AllocateMode::ZeroRange { keep_size: true } => Mode::ZeroRangeKeepSize,
                }
                .into(),
                kill_set_id: *kill_set_id,
            })
        }
        Operation::SetXattr { inode, name, value, create_only, replace_only, kill_set_group_id } => {
            W::SetXattr(wire::SetXattr {
                inode: inode.get(),
                name: name.clone(),
                value: value.clone(),
                create_only: *create_only,
                replace_only: *replace_only,
                kill_set_group_id: *kill_set_group_id,
            })
        }
        Operation::RemoveXattr { inode, name } => {
            W::RemoveXattr(wire::RemoveXattr { inode: inode.get(), name: name.clone() })
        }
        Operation::PutValue { item } => W::PutValue(wire::PutValue { item: Some(put_item_to_wire(item)) }),
        Operation::PutValues { items, atomic } => W::PutValues(wire::PutValues {
            items: items.iter().map(put_item_to_wire).collect(),
            atomic: *atomic,
        }),
        Operation::DeleteValue { key, if_version } => W::DeleteValue(wire::DeleteValue {
            key: Bytes::copy_from_slice(key.as_bytes()),
            if_version: if_version.map_or(0, Version::get),
        }),
        Operation::CopyRange {
            source,
            source_offset,
            destination,
            destination_offset,
            length,
            kill_set_id,
        } => W::CopyRange(wire::CopyRange {
            source: source.get(),
            source_offset: *source_offset,
            destination: destination.get(),
            destination_offset: *destination_offset,
            length: *length,
            kill_set_id: *kill_set_id,
        }),
        Operation::SetLock { inode, owner, pid, range, kind } => W::SetLock(wire::SetLock {
            inode: inode.get(),
            owner: *owner,
            pid: *pid,
            start: range.start(),
            end: range.end(),
            kind: kind.map_or(wire::LockKind::Unlock, lock_kind_to_wire).into(),
        }),
    };
    wire::Operation { kind: Some(kind) }
}

/// What a seek looks for.
pub fn seek_for_from_wire(what: i32) -> Result<SeekFor> {
    use wire::seek_request::What;
    match What::try_from(what) {
        Ok(What::Data) => Ok(SeekFor::Data),
        Ok(What::Hole) => Ok(SeekFor::Hole),
        Ok(What::Unspecified) | Err(_) => Err(missing("what to seek (or it is unknown here)")),
    }
}

/// What a seek looks for.
pub fn seek_for_to_wire(what: SeekFor) -> i32 {
    use wire::seek_request::What;
    match what {
        SeekFor::Data => What::Data.into(),
        SeekFor::Hole => What::Hole.into(),
    }
}

/// What a seek brought.
pub fn sought_to_wire(sought: Sought, view: Option<wire::ViewLabel>) -> wire::SeekReply {
    use wire::seek_reply::Outcome;
    let (offset, outcome) = match sought {
        Sought::Found(offset) => (offset, Outcome::Found),
        Sought::Continue(offset) => (offset, Outcome::Continue),
        Sought::Nothing => (0, Outcome::None),
    };
    wire::SeekReply { offset, outcome: outcome.into(), view }
}

/// What a seek brought.
pub fn sought_from_wire(reply: &wire::SeekReply) -> Result<Sought> {
    use wire::seek_reply::Outcome;
    match reply.outcome() {
        Outcome::Found => Ok(Sought::Found(reply.offset)),
        Outcome::Continue => Ok(Sought::Continue(reply.offset)),
        Outcome::None => Ok(Sought::Nothing),
        Outcome::Unspecified => Err(missing("what the seek brought")),
    }
}

/// One item's outcome in a batch.
pub fn put_result_to_wire(result: &Result<ObjectMeta>) -> wire::PutResult {
    use wire::put_result::Outcome;
    wire::PutResult {
        outcome: Some(match result {
            Ok(meta) => Outcome::Meta(meta_to_wire(meta)),
            Err(error) => Outcome::Error(status::detail_to_wire(error)),
        }),
    }
}

/// One item's outcome in a batch: the outer error is one of the conversion.
pub fn put_result_from_wire(result: wire::PutResult) -> Result<Result<ObjectMeta>> {
    use wire::put_result::Outcome;
    Ok(match result.outcome.ok_or_else(|| missing("an item's outcome"))? {
        Outcome::Meta(meta) => Ok(meta_from_wire(meta)?),
        Outcome::Error(detail) => Err(status::detail_from_wire(detail)),
    })
}

/// What an operation answered.
pub fn op_result_to_wire(r: &OpResult) -> wire::OperationResult {
    wire::OperationResult {
        attr: r.attr.as_ref().map(attr_to_wire),
        created: r.created,
        offset: r.offset,
        meta: r.meta.as_ref().map(meta_to_wire),
        results: r.results.iter().map(put_result_to_wire).collect(),
        pruned_directories: r.pruned_directories,
        length: r.length,
    }
}

/// What an operation answered.
pub fn op_result_from_wire(r: wire::OperationResult) -> Result<OpResult> {
    Ok(OpResult {
        attr: r.attr.map(attr_from_wire).transpose()?,
        created: r.created,
        offset: r.offset,
        meta: r.meta.map(meta_from_wire).transpose()?,
        results: r.results.into_iter().map(put_result_from_wire).collect::<Result<_>>()?,
        pruned_directories: r.pruned_directories,
        length: r.length,
    })
}
