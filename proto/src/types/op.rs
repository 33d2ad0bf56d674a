//! Operations: what changes a shard, in one type, and what they answer.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::attr::{Attr, FileKind, Timestamp};
use super::error::Error;
use super::ids::{InodeNo, Version};
use super::locks::{LockKind, LockRange};
use super::name::{FileName, Key};

/// When a mutation is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// After its log record is on the device.
    Sync,
    /// After it was applied; synced within 5 s.
    Buffered,
}

/// The identity that a new inode gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewInode {
    /// 0..=07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group, unless the parent has its set-group-id bit.
    pub gid: u32,
    /// What counts instead of `mode` if the parent has a default access control list.
    pub unmasked_mode: Option<u32>,
}

/// A change to make to a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    /// The time at which the operation is applied.
    Now,
    /// This one.
    At(Timestamp),
}

/// Changes of attributes; `None` leaves one as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncates or extends.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Clear set-user-id, and set-group-id if the group may execute.
    pub kill_set_id: bool,
}

/// What fallocate does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocateMode {
    /// Makes room; extends the file unless `keep_size`.
    Allocate {
        /// Leave the size.
        keep_size: bool,
    },
    /// Frees; the size stays.
    PunchHole,
    /// Zeroes; extends the file unless `keep_size`.
    ZeroRange {
        /// Leave the size.
        keep_size: bool,
    },
}

/// A value of a secondary index.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum IndexValue {
    /// Ordered by bytes.
    Text(String),
    /// Ordered as a number.
    Integer(i64),
    /// Ordered in time.
    Time(Timestamp),
}

/// A value's secondary indexes by name.
pub type Indexes = BTreeMap<String, IndexValue>;

/// How a Put makes or changes a file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PutOptions {
    /// Permission bits; default for a new file: 0644.
    pub mode: Option<u32>,
    /// Owner of what is made; default: the shard root's.
    pub uid: Option<u32>,
    /// Group of what is made; default: the shard root's.
    pub gid: Option<u32>,
    /// Default: now.
    pub mtime: Option<Timestamp>,
    /// Replaces those that are there.
    pub indexes: Indexes,
    /// Fail with AlreadyExists if the key is there.
    pub if_absent: bool,
    /// Fail with VersionMismatch unless the value has this version.
    pub if_version: Option<Version>,
}

/// One value to store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PutItem {
    /// Where.
    pub key: Key,
    /// At most 4 MiB.
    pub value: Bytes,
    /// How.
    pub options: PutOptions,
}

/// One change of a shard; takes effect as a whole or not at all. Field comments: files.proto.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Operation {
    Create {
        parent: InodeNo,
        name: FileName,
        kind: FileKind,
        inode: NewInode,
        rdev: u32,
        existing_ok: bool,
        open: bool,
    },
    MakeDirectory {
        parent: InodeNo,
        name: FileName,
        inode: NewInode,
    },
    MakeSymlink {
        parent: InodeNo,
        name: FileName,
        target: Bytes,
        inode: NewInode,
    },
    Link {
        inode: InodeNo,
        new_parent: InodeNo,
        new_name: FileName,
    },
    Unlink {
        parent: InodeNo,
        name: FileName,
    },
    RemoveDirectory {
        parent: InodeNo,
        name: FileName,
    },
    Rename {
        parent: InodeNo,
        name: FileName,
        new_parent: InodeNo,
        new_name: FileName,
        no_replace: bool,
        exchange: bool,
    },
    SetAttr {
        inode: InodeNo,
        set: SetAttr,
    },
    Write {
        inode: InodeNo,
        offset: u64,
        data: Bytes,
        append: bool,
        kill_set_id: bool,
    },
    Allocate {
        inode: InodeNo,
        offset: u64,
        length: u64,
        mode: AllocateMode,
        kill_set_id: bool,
    },
    SetXattr {
        inode: InodeNo,
        name: Bytes,
        value: Bytes,
        create_only: bool,
        replace_only: bool,
        kill_set_group_id: bool,
    },
    RemoveXattr {
        inode: InodeNo,
        name: Bytes,
    },
    PutValue {
        item: PutItem,
    },
    PutValues {
        items: Vec<PutItem>,
        atomic: bool,
    },
    DeleteValue {
        key: Key,
        if_version: Option<Version>,
    },
    CopyRange {
        source: InodeNo,
        source_offset: u64,
        destination: InodeNo,
        destination_offset: u64,
        length: u64,
        kill_set_id: bool,
    },
    /// See SetLock.
    SetLock {
        inode: InodeNo,
        owner: u64,
        pid: u32,
        range: LockRange,
        /// `None` unlocks.
        kind: Option<LockKind>,
    },
}

impl Operation {
    /// Whether it may be answered before it is durable although its shard may move to another node at any time: if
    /// it is lost then, its session makes it again. So it must mean the same after what others did in between, and its
    /// answer must not have given anything away (an inode number, a place in a file) that another may get then.
    pub fn is_replayable(&self) -> bool {
        match self {
            Operation::Write { append, .. } => !append,
            Operation::SetAttr { .. } | Operation::Allocate { .. } => true,
            Operation::SetXattr { create_only, replace_only, .. } => !create_only && !replace_only,
            Operation::Create { .. }
            | Operation::MakeDirectory { .. }
            | Operation::MakeSymlink { .. }
            | Operation::Link { .. }
            | Operation::Unlink { .. }
            | Operation::RemoveDirectory { .. }
            | Operation::Rename { .. }
            | Operation::RemoveXattr { .. }
            | Operation::PutValue { .. }
            | Operation::PutValues { .. }
            | Operation::DeleteValue { .. }
            | Operation::SetLock { .. }
            // What its source holds may be another's by then.
            | Operation::CopyRange { .. } => false,
        }
    }
}

/// An operation is made again under its number, because it may have been lost when its shard moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Repetition {
    /// The version that the inode had after it.
    pub answered: Version,
    /// The last version that the session itself gave the inode since the shard moved.
    pub own: Option<Version>,
}

impl Operation {
    /// The inode that an operation changes which names it by its number and nothing else; of every replayable one.
    pub fn changed_inode(&self) -> Option<InodeNo> {
        match self {
            Operation::Write { inode, .. }
            | Operation::SetAttr { inode, .. }
            | Operation::Allocate { inode, .. }
            | Operation::SetXattr { inode, .. }
            | Operation::RemoveXattr { inode, .. }
            | Operation::CopyRange { destination: inode, .. } => Some(*inode),
            Operation::Create { .. }
            | Operation::MakeDirectory { .. }
            | Operation::MakeSymlink { .. }
            | Operation::Link { .. }
            | Operation::Unlink { .. }
            | Operation::RemoveDirectory { .. }
            | Operation::Rename { .. }
            | Operation::PutValue { .. }
            | Operation::PutValues { .. }
            | Operation::DeleteValue { .. }
            // Not the inode, but who may use it.
            | Operation::SetLock { .. } => None,
        }
    }
}

/// Metadata of a value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObjectMeta {
    /// The file's attributes.
    pub attr: Attr,
    /// Its secondary indexes.
    pub indexes: Indexes,
}

/// What an operation answers; which fields are set depends on the operation (files.proto).
#[derive(Clone, Debug, Default)]
pub struct OpResult {
    /// The inode made, found or changed, as it is afterwards.
    pub attr: Option<Attr>,
    /// Whether Create made the file.
    pub created: bool,
    /// Where Write put the data.
    pub offset: u64,
    /// PutValue, DeleteValue.
    pub meta: Option<ObjectMeta>,
    /// PutValues: one an item.
    pub results: Vec<Result<ObjectMeta, Error>>,
    /// DeleteValue.
    pub pruned_directories: u32,
    /// CopyRange: bytes copied. Allocate: bytes for which room is set aside.
    pub length: u64,
}

/// What a seek looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeekFor {
    /// Data.
    Data,
    /// A hole, or the file's end.
    Hole,
}

/// What a seek brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sought {
    /// It begins here.
    Found(u64),
    /// It does not begin before here: to be gone on with.
    Continue(u64),
    /// The offset is at or past the file's end, or no data follows.
    Nothing,
}

/// State of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShardState {
    /// Name reserved, not usable yet.
    Creating,
    /// In use.
    Active,
    /// Closed for good.
    ReadOnly,
    /// Gone or going.
    Deleted,
}

impl ShardState {
    /// The word that people and the metadata store see.
    pub fn as_str(self) -> &'static str {
        match self {
            ShardState::Creating => "creating",
            ShardState::Active => "active",
            ShardState::ReadOnly => "read-only",
            ShardState::Deleted => "deleted",
        }
    }
}
