//! What the filesystem's operations take and give: plain data, free of fuser.

use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::{Attr, FileKind, GlobalInode, InodeNo, ShardId, Timestamp};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// The thread; 0 when the kernel itself asks.
    pub thread: u32,
}

/// What stat shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileStat {
    /// Number within the mount.
    pub ino: GlobalInode,
    /// What it is.
    pub kind: FileKind,
    /// 0..=07777.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change.
    pub ctime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// Whether it has an access control list, for access or by default; `None`: not known.
    pub has_acl: Option<bool>,
}

impl FileStat {
    /// Of an inode of a shard.
    pub fn of(shard: ShardId, attr: &Attr) -> FileStat {
        FileStat {
            ino: GlobalInode::new(shard, attr.inode),
            kind: attr.kind,
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            size: attr.size,
            blocks: attr.blocks,
            atime: attr.atime,
            mtime: attr.mtime,
            ctime: attr.ctime,
            btime: attr.btime,
            has_acl: attr.has_acl,
        }
    }
}

/// How long the kernel may answer by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ttl {
    /// What stat shows.
    pub attr: Duration,
    /// That the name stands for the inode.
    pub entry: Duration,
}

/// A name that was found or made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it names.
    pub stat: FileStat,
    /// How long that holds.
    pub ttl: Ttl,
}

/// Permission bits that something new is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewMode {
    /// By the program.
    pub asked: u32,
    /// The bits that its umask takes of them, unless the directory has a default access control list.
    pub umask: u32,
}

impl NewMode {
    /// What the umask leaves.
    pub fn masked(self) -> u32 {
        self.asked & !self.umask
    }
}

/// An open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// For later requests.
    pub handle: u64,
    /// Reads go past the page cache, to the end that the daemon tells.
    pub direct: bool,
    /// The pages that the kernel has are still good.
    pub keep_cache: bool,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenMode {
    /// For writing.
    pub write: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// O_EXCL.
    pub exclusive: bool,
    /// O_APPEND.
    pub append: bool,
}

/// How a write is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteMode {
    /// O_APPEND: at the end of the file as the shard knows it.
    pub append: bool,
    /// O_SYNC, O_DSYNC: durable when answered.
    pub sync: bool,
    /// The writer has no right to keep set-id bits.
    pub kill_set_id: bool,
    /// Pages that were written through a mapping, whose writer is long gone.
    pub from_page_cache: bool,
}

/// What a rename may do at its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RenameMode {
    /// RENAME_NOREPLACE.
    pub no_replace: bool,
    /// RENAME_EXCHANGE.
    pub exchange: bool,
}

/// One entry of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirItem {
    /// What it names.
    pub ino: GlobalInode,
    /// Its kind.
    pub kind: FileKind,
    /// Its name.
    pub name: Bytes,
    /// Reading goes on after it from here.
    pub offset: u64,
    /// If attributes were asked for. None for `.` and `..`.
    pub entry: Option<Entry>,
}

/// Space, for statfs, in blocks of [`BLOCK_BYTES`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks free.
    pub free_blocks: u64,
    /// Blocks that may still be written.
    pub available_blocks: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Inodes free.
    pub free_inodes: u64,
}

/// The block that statfs counts in, and what st_blksize advises.
pub const BLOCK_BYTES: u32 = 4096;

/// What an inode number stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Node {
    /// The root of the mount.
    Root,
    /// The virtual directory or a file in it.
    Virtual(super::virtual_dir::VirtualNode),
    /// `.snap` at the root of a shard.
    Snapshots(ShardId),
    /// In a shard.
    InShard(ShardId, InodeNo),
}
