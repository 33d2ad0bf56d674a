//! Wire <-> domain, by hand, in one place: the only place where wire data is validated.
//!
//! `*_from_wire` returns [`Reason::InvalidArgument`](crate::types::Reason) (or a more exact reason) for
//! anything that a well-behaved peer would not send. `*_to_wire` cannot fail.

mod backups;
mod cluster;
mod locks;
mod operation;
mod provisioning;
mod reads;

use bytes::Bytes;

pub use backups::{
    restore_from_wire, restore_to_wire, restored_from_wire, restored_to_wire, schedule_from_wire,
    schedule_to_wire, verify_item_from_wire, verify_item_to_wire, volume_backup_from_wire,
    volume_backup_to_wire,
};
pub use cluster::{
    check_item_from_wire, check_item_to_wire, new_volume_from_wire, new_volume_to_wire, node_info_from_wire,
    node_info_to_wire, node_status_from_wire, node_status_to_wire, shard_stat_from_wire, shard_stat_to_wire,
    stray_from_wire, stray_to_wire, volume_info_from_wire, volume_info_to_wire,
};
pub use locks::{file_lock_from_wire, file_lock_to_wire, lock_kind_from_wire, lock_kind_to_wire};
pub use operation::{
    op_result_from_wire, op_result_to_wire, operation_from_wire, operation_to_wire, put_result_from_wire,
    put_result_to_wire, seek_for_from_wire, seek_for_to_wire, sought_from_wire, sought_to_wire,
};

pub use provisioning::{policy_from_wire, policy_to_wire, provisioning_from_wire, provisioning_to_wire};
pub use reads::{
    read_from_from_wire, read_from_to_wire, view_figures_from_wire, view_figures_to_wire,
    view_label_from_wire, view_label_to_wire,
};

use crate::types::attr::MODE_BITS;
use crate::types::cluster::{Selector, ShardInfo};
use crate::types::limits::{
    BATCH_BYTES_MAX, BATCH_ITEMS_MAX, INDEX_NAME_BYTES_MAX, INDEX_TEXT_BYTES_MAX, INDEXES_MAX,
    VALUE_BYTES_MAX,
};
use crate::types::op::{
    Durability, IndexValue, Indexes, ObjectMeta, PutItem, PutOptions, Repetition, ShardState,
};
use crate::types::{
    Attr, Backup, ClientId, Epoch, Error, FileKind, InodeNo, Key, Location, NodeId, Reason, Result, ShardId,
    ShardName, Timestamp, Version, VolumeId,
};
use crate::wire;

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
        has_acl: a.has_acl,
    }
}

/// To the wire.
pub fn repetition_to_wire(r: Repetition) -> wire::Repetition {
    wire::Repetition { answered_version: r.answered.get(), own_version: r.own.map_or(0, Version::get) }
}

/// From the wire.
pub fn repetition_from_wire(r: wire::Repetition) -> Repetition {
    let own = (r.own_version != 0).then(|| Version::new(r.own_version));
    Repetition { answered: Version::new(r.answered_version), own }
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
        has_acl: a.has_acl,
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
        backups: l.backups.iter().map(backup_to_wire).collect(),
    }
}

fn backup_to_wire(b: &Backup) -> wire::Backup {
    wire::Backup { node_id: b.node.as_str().to_owned(), endpoints: b.endpoints.clone() }
}

/// A location.
pub fn location_from_wire(l: wire::Location) -> Result<Location> {
    Ok(Location {
        volume: VolumeId::new(l.volume_id)?,
        node: if l.node_id.is_empty() { None } else { Some(NodeId::new(l.node_id)?) },
        endpoints: l.endpoints,
        epoch: Epoch::new(l.epoch).ok_or_else(|| missing("the location's epoch"))?,
        backups: l
            .backups
            .into_iter()
            .map(|b| Ok(Backup { node: NodeId::new(b.node_id)?, endpoints: b.endpoints }))
            .collect::<Result<_>>()?,
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
        snapshot_of: s.snapshot_of.map_or(0, ShardId::get),
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
        snapshot_of: if s.snapshot_of == 0 { None } else { Some(ShardId::new(s.snapshot_of)?) },
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

#[cfg(test)]
mod tests;
