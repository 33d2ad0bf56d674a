//! Wire <-> domain, by hand, in one place: the only place where wire data is validated.
//!
//! `*_from_wire` returns [`Reason::InvalidArgument`](crate::types::Reason) (or a more exact reason) for
//! anything that a well-behaved peer would not send. `*_to_wire` cannot fail.

use bytes::Bytes;

use crate::types::attr::MODE_BITS;
use crate::types::cluster::{
    CheckItem, CheckSummary, NodeInfo, NodeStatus, Selector, ShardInfo, ShardStat, VolumeInfo, VolumeStatus,
};
use crate::types::limits::{
    BATCH_BYTES_MAX, BATCH_ITEMS_MAX, FILE_BYTES_MAX, INDEX_NAME_BYTES_MAX, INDEX_TEXT_BYTES_MAX,
    INDEXES_MAX, SYMLINK_BYTES_MAX, VALUE_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX,
};
use crate::types::op::{
    AllocateMode, Durability, IndexValue, Indexes, NewInode, ObjectMeta, OpResult, Operation, PutItem,
    PutOptions, SetAttr, SetTime, ShardState,
};
use crate::types::{
    Attr, ClientId, Epoch, Error, FileKind, FileName, InodeNo, Key, Location, NodeId, Reason, Result,
    ShardId, ShardName, Timestamp, Version, VolumeId,
};
use crate::{status, wire};

fn missing(what: &str) -> Error {
    Error::invalid(format!("{what} is missing"))
}

/// A time.
pub fn time_to_wire(t: Timestamp) -> wire::Time {
    wire::Time { seconds: t.seconds(), nanos: t.nanos() }
}

/// A time.
pub fn time_from_wire(t: wire::Time) -> Result<Timestamp> {
    Timestamp::new(t.seconds, t.nanos)
}

/// A kind.
pub fn kind_to_wire(kind: FileKind) -> wire::FileKind {
    match kind {
        FileKind::Regular => wire::FileKind::Regular,
        FileKind::Directory => wire::FileKind::Directory,
        FileKind::Symlink => wire::FileKind::Symlink,
        FileKind::Fifo => wire::FileKind::Fifo,
        FileKind::Socket => wire::FileKind::Socket,
        FileKind::CharDevice => wire::FileKind::CharDevice,
        FileKind::BlockDevice => wire::FileKind::BlockDevice,
    }
}

/// A kind.
pub fn kind_from_wire(kind: i32) -> Result<FileKind> {
    match wire::FileKind::try_from(kind) {
        Ok(wire::FileKind::Regular) => Ok(FileKind::Regular),
        Ok(wire::FileKind::Directory) => Ok(FileKind::Directory),
        Ok(wire::FileKind::Symlink) => Ok(FileKind::Symlink),
        Ok(wire::FileKind::Fifo) => Ok(FileKind::Fifo),
        Ok(wire::FileKind::Socket) => Ok(FileKind::Socket),
        Ok(wire::FileKind::CharDevice) => Ok(FileKind::CharDevice),
        Ok(wire::FileKind::BlockDevice) => Ok(FileKind::BlockDevice),
        Ok(wire::FileKind::Unspecified) | Err(_) => {
            Err(Error::invalid(format!("file kind {kind} is unknown")))
        }
    }
}

/// Attributes.
pub fn attr_to_wire(a: &Attr) -> wire::Attr {
    wire::Attr {
        inode: a.inode.get(),
        kind: kind_to_wire(a.kind).into(),
        mode: a.mode,
        uid: a.uid,
        gid: a.gid,
        nlink: a.nlink,
        size: a.size,
        blocks: a.blocks,
        rdev: a.rdev,
        atime: Some(time_to_wire(a.atime)),
        mtime: Some(time_to_wire(a.mtime)),
        ctime: Some(time_to_wire(a.ctime)),
        btime: Some(time_to_wire(a.btime)),
        version: a.version.get(),
    }
}

/// Attributes.
pub fn attr_from_wire(a: wire::Attr) -> Result<Attr> {
    let time = |t: Option<wire::Time>| time_from_wire(t.ok_or_else(|| missing("a time"))?);
    Ok(Attr {
        inode: InodeNo::new(a.inode)?,
        kind: kind_from_wire(a.kind)?,
        mode: mode(a.mode)?,
        uid: a.uid,
        gid: a.gid,
        nlink: a.nlink,
        size: a.size,
        blocks: a.blocks,
        rdev: a.rdev,
        atime: time(a.atime)?,
        mtime: time(a.mtime)?,
        ctime: time(a.ctime)?,
        btime: time(a.btime)?,
        version: Version::new(a.version),
    })
}

fn mode(mode: u32) -> Result<u32> {
    if mode & !MODE_BITS != 0 {
        return Err(Error::invalid(format!("mode {mode:#o} has bits outside 07777")));
    }
    Ok(mode)
}

/// A location.
pub fn location_to_wire(l: &Location) -> wire::Location {
    wire::Location {
        volume_id: l.volume.as_str().to_owned(),
        node_id: l.node.as_ref().map(|n| n.as_str().to_owned()).unwrap_or_default(),
        endpoints: l.endpoints.clone(),
        epoch: l.epoch.get(),
    }
}

/// A location.
pub fn location_from_wire(l: wire::Location) -> Result<Location> {
    Ok(Location {
        volume: VolumeId::new(l.volume_id)?,
        node: if l.node_id.is_empty() { None } else { Some(NodeId::new(l.node_id)?) },
        endpoints: l.endpoints,
        epoch: Epoch::new(l.epoch).ok_or_else(|| missing("the location's epoch"))?,
    })
}

/// A shard's state.
pub fn state_to_wire(state: ShardState) -> wire::ShardState {
    match state {
        ShardState::Creating => wire::ShardState::Creating,
        ShardState::Active => wire::ShardState::Active,
        ShardState::ReadOnly => wire::ShardState::ReadOnly,
        ShardState::Deleted => wire::ShardState::Deleted,
    }
}

/// A shard's state.
pub fn state_from_wire(state: i32) -> Result<ShardState> {
    match wire::ShardState::try_from(state) {
        Ok(wire::ShardState::Creating) => Ok(ShardState::Creating),
        Ok(wire::ShardState::Active) => Ok(ShardState::Active),
        Ok(wire::ShardState::ReadOnly) => Ok(ShardState::ReadOnly),
        Ok(wire::ShardState::Deleted) => Ok(ShardState::Deleted),
        Ok(wire::ShardState::Unspecified) | Err(_) => {
            Err(Error::invalid(format!("shard state {state} is unknown")))
        }
    }
}

/// A shard.
pub fn shard_info_to_wire(s: &ShardInfo) -> wire::Shard {
    wire::Shard {
        id: s.id.get(),
        name: s.name.as_str().to_owned(),
        owner: s.owner.as_str().to_owned(),
        state: state_to_wire(s.state).into(),
        limit_bytes: s.limit_bytes.unwrap_or(0),
        created: Some(time_to_wire(s.created)),
        location: Some(location_to_wire(&s.location)),
        used_bytes: s.used_bytes,
        inodes: s.inodes,
    }
}

/// A shard.
pub fn shard_info_from_wire(s: wire::Shard) -> Result<ShardInfo> {
    Ok(ShardInfo {
        id: ShardId::new(s.id)?,
        name: ShardName::new(s.name)?,
        owner: ClientId::new(s.owner)?,
        state: state_from_wire(s.state)?,
        limit_bytes: (s.limit_bytes != 0).then_some(s.limit_bytes),
        created: time_from_wire(s.created.ok_or_else(|| missing("the shard's creation time"))?)?,
        location: location_from_wire(s.location.ok_or_else(|| missing("the shard's location"))?)?,
        used_bytes: s.used_bytes,
        inodes: s.inodes,
    })
}

/// A shard's selector.
pub fn selector_to_wire(s: &Selector) -> wire::ShardSelector {
    use wire::shard_selector::By;
    wire::ShardSelector {
        by: Some(match s {
            Selector::Id(id) => By::Id(id.get()),
            Selector::Name(name) => By::Name(name.as_str().to_owned()),
        }),
    }
}

/// A shard's selector.
pub fn selector_from_wire(s: Option<wire::ShardSelector>) -> Result<Selector> {
    use wire::shard_selector::By;
    match s.and_then(|s| s.by).ok_or_else(|| missing("the shard (id or name)"))? {
        By::Id(id) => Ok(Selector::Id(ShardId::new(id)?)),
        By::Name(name) => Ok(Selector::Name(ShardName::new(name)?)),
    }
}

/// When to answer; `default` when the caller does not say.
pub fn durability_from_wire(d: i32, default: Durability) -> Result<Durability> {
    match wire::Durability::try_from(d) {
        Ok(wire::Durability::Unspecified) => Ok(default),
        Ok(wire::Durability::Sync) => Ok(Durability::Sync),
        Ok(wire::Durability::Buffered) => Ok(Durability::Buffered),
        Err(_) => Err(Error::invalid(format!("durability {d} is unknown"))),
    }
}

/// When to answer.
pub fn durability_to_wire(d: Durability) -> wire::Durability {
    match d {
        Durability::Sync => wire::Durability::Sync,
        Durability::Buffered => wire::Durability::Buffered,
    }
}

fn index_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > INDEX_NAME_BYTES_MAX || !name.bytes().all(good) {
        return Err(Error::invalid(format!(
            "index name {name:?}: 1..={INDEX_NAME_BYTES_MAX} characters of letters, digits, '.', '_' and '-'"
        )));
    }
    Ok(())
}

/// Secondary indexes.
pub fn indexes_from_wire(list: Vec<wire::Index>) -> Result<Indexes> {
    use wire::index_value::Value;
    if list.len() > INDEXES_MAX {
        return Err(Error::invalid(format!("{} indexes; the limit is {INDEXES_MAX}", list.len())));
    }
    let mut indexes = Indexes::new();
    for index in list {
        index_name(&index.name)?;
        let value = match index.value.and_then(|v| v.value).ok_or_else(|| missing("an index's value"))? {
            Value::Text(text) if text.len() > INDEX_TEXT_BYTES_MAX => {
                return Err(Error::invalid(format!(
                    "index {:?}: the text has {} bytes; the limit is {INDEX_TEXT_BYTES_MAX}",
                    index.name,
                    text.len()
                )));
            }
            Value::Text(text) => IndexValue::Text(text),
            Value::Integer(number) => IndexValue::Integer(number),
            Value::Time(time) => IndexValue::Time(time_from_wire(time)?),
        };
        if indexes.insert(index.name.clone(), value).is_some() {
            return Err(Error::invalid(format!("index {:?} is given twice", index.name)));
        }
    }
    Ok(indexes)
}

/// Secondary indexes.
pub fn indexes_to_wire(indexes: &Indexes) -> Vec<wire::Index> {
    use wire::index_value::Value;
    indexes
        .iter()
        .map(|(name, value)| wire::Index {
            name: name.clone(),
            value: Some(wire::IndexValue {
                value: Some(match value {
                    IndexValue::Text(text) => Value::Text(text.clone()),
                    IndexValue::Integer(number) => Value::Integer(*number),
                    IndexValue::Time(time) => Value::Time(time_to_wire(*time)),
                }),
            }),
        })
        .collect()
}

/// A value's metadata.
pub fn meta_to_wire(m: &ObjectMeta) -> wire::ObjectMeta {
    wire::ObjectMeta { attr: Some(attr_to_wire(&m.attr)), indexes: indexes_to_wire(&m.indexes) }
}

/// A value's metadata.
pub fn meta_from_wire(m: wire::ObjectMeta) -> Result<ObjectMeta> {
    Ok(ObjectMeta {
        attr: attr_from_wire(m.attr.ok_or_else(|| missing("the metadata's attributes"))?)?,
        indexes: indexes_from_wire(m.indexes)?,
    })
}

/// Options of a Put; absent ones are the defaults.
pub fn put_options_from_wire(o: Option<wire::PutOptions>) -> Result<PutOptions> {
    let Some(o) = o else { return Ok(PutOptions::default()) };
    Ok(PutOptions {
        mode: o.mode.map(mode).transpose()?,
        uid: o.uid,
        gid: o.gid,
        mtime: o.mtime.map(time_from_wire).transpose()?,
        indexes: indexes_from_wire(o.indexes)?,
        if_absent: o.if_absent,
        if_version: version_condition(o.if_version),
    })
}

/// Options of a Put.
pub fn put_options_to_wire(o: &PutOptions) -> wire::PutOptions {
    wire::PutOptions {
        mode: o.mode,
        uid: o.uid,
        gid: o.gid,
        mtime: o.mtime.map(time_to_wire),
        indexes: indexes_to_wire(&o.indexes),
        if_absent: o.if_absent,
        if_version: o.if_version.map_or(0, Version::get),
    }
}

/// A version condition; 0 is none.
pub fn version_condition(version: u64) -> Option<Version> {
    (version != 0).then_some(Version::new(version))
}

/// A value to store.
pub fn put_item_from_wire(i: wire::PutItem) -> Result<PutItem> {
    Ok(PutItem {
        key: Key::new(i.key)?,
        value: value_from_wire(i.value)?,
        options: put_options_from_wire(i.options)?,
    })
}

/// A value to store.
pub fn put_item_to_wire(i: &PutItem) -> wire::PutItem {
    wire::PutItem {
        key: Bytes::copy_from_slice(i.key.as_bytes()),
        value: i.value.clone(),
        options: Some(put_options_to_wire(&i.options)),
    }
}

/// Bytes of a value, bounded.
pub fn value_from_wire(value: Bytes) -> Result<Bytes> {
    if value.len() > VALUE_BYTES_MAX {
        return Err(Error::new(
            Reason::TooLarge,
            format!(
                "the value has {} bytes; one message carries {VALUE_BYTES_MAX}: use PutStream for larger ones",
                value.len()
            ),
        ));
    }
    Ok(value)
}

/// A batch of values, bounded in number and bytes.
pub fn put_items_from_wire(items: Vec<wire::PutItem>) -> Result<Vec<PutItem>> {
    if items.len() > BATCH_ITEMS_MAX {
        return Err(Error::new(
            Reason::TooLarge,
            format!("the batch has {} items; the limit is {BATCH_ITEMS_MAX}: split it", items.len()),
        ));
    }
    let bytes: usize = items.iter().map(|i| i.key.len() + i.value.len()).sum();
    if bytes > BATCH_BYTES_MAX {
        return Err(Error::new(
            Reason::TooLarge,
            format!("the batch has {bytes} bytes; the limit is {BATCH_BYTES_MAX}: split it"),
        ));
    }
    items
        .into_iter()
        .enumerate()
        .map(|(n, item)| put_item_from_wire(item).map_err(|e| e.context(format!("item {n}"))))
        .collect()
}

fn new_inode_from_wire(i: Option<wire::NewInode>) -> Result<NewInode> {
    let i = i.ok_or_else(|| missing("the new inode's identity"))?;
    Ok(NewInode { mode: mode(i.mode)?, uid: i.uid, gid: i.gid })
}

fn new_inode_to_wire(i: &NewInode) -> wire::NewInode {
    wire::NewInode { mode: i.mode, uid: i.uid, gid: i.gid }
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
        Operation::Allocate { inode, offset, length, mode } => {
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
            })
        }
        Operation::SetXattr { inode, name, value, create_only, replace_only } => {
            W::SetXattr(wire::SetXattr {
                inode: inode.get(),
                name: name.clone(),
                value: value.clone(),
                create_only: *create_only,
                replace_only: *replace_only,
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
    };
    wire::Operation { kind: Some(kind) }
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
    })
}

/// A shard's space.
pub fn shard_stat_to_wire(s: &ShardStat) -> wire::StatShardReply {
    wire::StatShardReply {
        total_bytes: s.total_bytes,
        free_bytes: s.free_bytes,
        inodes_used: s.inodes_used,
        state: state_to_wire(s.state).into(),
        used_bytes: s.used_bytes,
    }
}

/// A shard's space.
pub fn shard_stat_from_wire(s: wire::StatShardReply) -> Result<ShardStat> {
    Ok(ShardStat {
        total_bytes: s.total_bytes,
        free_bytes: s.free_bytes,
        inodes_used: s.inodes_used,
        used_bytes: s.used_bytes,
        state: state_from_wire(s.state)?,
    })
}

/// A node.
pub fn node_info_to_wire(n: &NodeInfo) -> wire::Node {
    wire::Node {
        id: n.id.as_str().to_owned(),
        endpoints: n.endpoints.clone(),
        http_address: n.http_address.clone(),
        version: n.version.clone(),
        alive: n.alive,
        heartbeat: n.heartbeat,
        started: Some(time_to_wire(n.started)),
    }
}

/// A node.
pub fn node_info_from_wire(n: wire::Node) -> Result<NodeInfo> {
    Ok(NodeInfo {
        id: NodeId::new(n.id)?,
        endpoints: n.endpoints,
        http_address: n.http_address,
        version: n.version,
        alive: n.alive,
        heartbeat: n.heartbeat,
        started: time_from_wire(n.started.unwrap_or_default())?,
    })
}

/// A volume.
pub fn volume_info_to_wire(v: &VolumeInfo) -> wire::Volume {
    wire::Volume {
        id: v.id.as_str().to_owned(),
        provider: v.provider.clone(),
        source: v.source.clone(),
        size_bytes: v.size_bytes,
        primary: v.primary.as_ref().map(|n| n.as_str().to_owned()).unwrap_or_default(),
        backups: v.backups.iter().map(|n| n.as_str().to_owned()).collect(),
        epoch: v.epoch.get(),
        shards: v.shards,
    }
}

/// A volume.
pub fn volume_info_from_wire(v: wire::Volume) -> Result<VolumeInfo> {
    Ok(VolumeInfo {
        id: VolumeId::new(v.id)?,
        provider: v.provider,
        source: v.source,
        size_bytes: v.size_bytes,
        primary: if v.primary.is_empty() { None } else { Some(NodeId::new(v.primary)?) },
        backups: v.backups.into_iter().map(NodeId::new).collect::<Result<_>>()?,
        epoch: Epoch::new(v.epoch).ok_or_else(|| missing("the volume's epoch"))?,
        shards: v.shards,
    })
}

/// A node's own view.
pub fn node_status_to_wire(s: &NodeStatus) -> wire::NodeStatus {
    wire::NodeStatus {
        node_id: s.id.as_str().to_owned(),
        version: s.version.clone(),
        uptime_ms: s.uptime_ms,
        volumes: s
            .volumes
            .iter()
            .map(|v| wire::VolumeStatus {
                volume_id: v.id.as_str().to_owned(),
                provider: v.provider.clone(),
                total_bytes: v.total_bytes,
                free_bytes: v.free_bytes,
                shards: v.shards,
                epoch: v.epoch.get(),
                source: v.source.clone(),
                mount_point: v.mount_point.clone(),
                trouble: v.trouble.clone(),
            })
            .collect(),
        open_shards: s.open_shards,
        open_shards_max: s.open_shards_max,
        block_cache_used_bytes: s.block_cache_used_bytes,
        block_cache_capacity_bytes: s.block_cache_capacity_bytes,
        write_buffer_used_bytes: s.write_buffer_used_bytes,
        store_reachable: s.store_reachable,
        cluster_id: s.cluster_id.clone(),
    }
}

/// A node's own view.
pub fn node_status_from_wire(s: wire::NodeStatus) -> Result<NodeStatus> {
    Ok(NodeStatus {
        id: NodeId::new(s.node_id)?,
        version: s.version,
        uptime_ms: s.uptime_ms,
        volumes: s
            .volumes
            .into_iter()
            .map(|v| {
                Ok(VolumeStatus {
                    id: VolumeId::new(v.volume_id)?,
                    provider: v.provider,
                    total_bytes: v.total_bytes,
                    free_bytes: v.free_bytes,
                    shards: v.shards,
                    epoch: Epoch::new(v.epoch).ok_or_else(|| missing("the volume's epoch"))?,
                    source: v.source,
                    mount_point: v.mount_point,
                    trouble: v.trouble,
                })
            })
            .collect::<Result<_>>()?,
        open_shards: s.open_shards,
        open_shards_max: s.open_shards_max,
        block_cache_used_bytes: s.block_cache_used_bytes,
        block_cache_capacity_bytes: s.block_cache_capacity_bytes,
        write_buffer_used_bytes: s.write_buffer_used_bytes,
        store_reachable: s.store_reachable,
        cluster_id: s.cluster_id,
    })
}

/// An item of an fsck.
pub fn check_item_to_wire(item: &CheckItem) -> wire::CheckReply {
    use wire::check_reply::Part;
    wire::CheckReply {
        part: Some(match item {
            CheckItem::Finding { kind, detail } => {
                Part::Finding(wire::CheckFinding { kind: kind.clone(), detail: detail.clone() })
            }
            CheckItem::Summary(s) => Part::Summary(wire::CheckSummary {
                inodes: s.inodes,
                dirents: s.dirents,
                chunks: s.chunks,
                bytes: s.bytes,
                findings: s.findings,
            }),
        }),
    }
}

/// An item of an fsck.
pub fn check_item_from_wire(reply: wire::CheckReply) -> Result<CheckItem> {
    use wire::check_reply::Part;
    Ok(match reply.part.ok_or_else(|| missing("the check's item"))? {
        Part::Finding(f) => CheckItem::Finding { kind: f.kind, detail: f.detail },
        Part::Summary(s) => CheckItem::Summary(CheckSummary {
            inodes: s.inodes,
            dirents: s.dirents,
            chunks: s.chunks,
            bytes: s.bytes,
            findings: s.findings,
        }),
    })
}

#[cfg(test)]
mod tests;
