//! What an inode is.

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::ids::{InodeNo, Version};

/// Kind of an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
pub enum FileKind {
    /// A file with content.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

/// A point in time with nanoseconds; may be before 1970.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Default, Serialize, Deserialize)]
pub struct Timestamp {
    seconds: i64,
    nanos: u32,
}

impl Timestamp {
    /// Seconds since 1970-01-01 UTC and nanoseconds (0..=999999999) counted forward from there.
    pub fn new(seconds: i64, nanos: u32) -> Result<Timestamp> {
        if nanos >= 1_000_000_000 {
            return Err(Error::invalid(format!("{nanos} nanoseconds: not in 0..=999999999")));
        }
        Ok(Timestamp { seconds, nanos })
    }

    /// Whole seconds since 1970, rounded down.
    pub fn seconds(self) -> i64 {
        self.seconds
    }

    /// Nanoseconds after [`Self::seconds`].
    pub fn nanos(self) -> u32 {
        self.nanos
    }
}

/// The permission, set-id and sticky bits.
pub const MODE_BITS: u32 = 0o7777;

/// The attributes of one inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attr {
    /// Number within its shard.
    pub inode: InodeNo,
    /// What it is.
    pub kind: FileKind,
    /// 0..=07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names; for a directory 2 and the number of its subdirectories.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Space taken in units of 512 bytes.
    pub blocks: u64,
    /// Device number as Linux encodes it for user space in 32 bits.
    pub rdev: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of content or attributes.
    pub ctime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// Grows with every change.
    pub version: Version,
    /// Whether it has an access control list, for access or by default; `None`: the node does not say.
    pub has_acl: Option<bool>,
}
