//! Identifiers: newtypes with private fields, so that none can stand where another is meant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::limits::{ID_CHARS_MAX, INODE_BITS, SHARD_ID_BITS};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The number itself.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number! {
    /// A shard's number: unique in the cluster, never used twice. 1..2^22.
    ShardId
}
number! {
    /// An inode's number within its shard: never used twice. 1 is the root directory. 1..2^41.
    InodeNo
}
number! {
    /// An inode's number within the whole mount (`st_ino`): the shard id above the inode number.
    /// Shard 0 stands for what belongs to no shard: the root of the mount is `GlobalInode::ROOT`.
    GlobalInode
}
number! {
    /// Grows by one at every promotion of a volume. From 1.
    Epoch
}
number! {
    /// A client's session with a shard. From 1.
    SessionId
}
number! {
    /// The number of a mutation within its session. From 1.
    Sequence
}
number! {
    /// Version of an inode: the number of the shard's operation that changed it last.
    Version
}
number! {
    /// Position of an entry in its directory's order; keeps its value for the entry's life. From 1.
    Cookie
}

impl ShardId {
    /// The greatest shard id.
    pub const MAX: ShardId = ShardId((1 << SHARD_ID_BITS) - 1);

    /// Checks the range.
    pub fn new(id: u64) -> Result<ShardId> {
        if id == 0 || id > Self::MAX.0 {
            return Err(Error::invalid(format!("shard id {id} is not in 1..={}", Self::MAX)));
        }
        Ok(ShardId(id))
    }
}

impl InodeNo {
    /// A shard's root directory.
    pub const ROOT: InodeNo = InodeNo(1);
    /// The greatest inode number.
    pub const MAX: InodeNo = InodeNo((1 << INODE_BITS) - 1);

    /// Checks the range.
    pub fn new(ino: u64) -> Result<InodeNo> {
        if ino == 0 || ino > Self::MAX.0 {
            return Err(Error::invalid(format!("inode number {ino} is not in 1..={}", Self::MAX)));
        }
        Ok(InodeNo(ino))
    }
}

impl GlobalInode {
    /// The root of the mount.
    pub const ROOT: GlobalInode = GlobalInode(1);

    /// Packs.
    pub const fn new(shard: ShardId, inode: InodeNo) -> GlobalInode {
        GlobalInode(shard.0 << INODE_BITS | inode.0)
    }

    /// An inode that belongs to no shard (the root, `.shardfs`).
    pub const fn outside(number: u64) -> GlobalInode {
        assert!(number != 0 && number < 1 << INODE_BITS);
        GlobalInode(number)
    }

    /// Any number that the kernel hands back.
    pub const fn from_raw(raw: u64) -> GlobalInode {
        GlobalInode(raw)
    }

    /// Shard and inode, or `None` for what belongs to no shard or is out of range.
    pub fn split(self) -> Option<(ShardId, InodeNo)> {
        let shard = ShardId::new(self.0 >> INODE_BITS).ok()?;
        let inode = InodeNo::new(self.0 & InodeNo::MAX.0).ok()?;
        Some((shard, inode))
    }
}

impl Epoch {
    /// The first epoch of a volume.
    pub const FIRST: Epoch = Epoch(1);

    /// Any number but 0, which on the wire means "not compared".
    pub fn new(epoch: u64) -> Option<Epoch> {
        (epoch != 0).then_some(Epoch(epoch))
    }

    /// The epoch after a promotion.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl SessionId {
    /// Any number but 0, which on the wire means "none".
    pub fn new(id: u64) -> Option<SessionId> {
        (id != 0).then_some(SessionId(id))
    }
}

impl Sequence {
    /// Any number but 0, which on the wire means "not exactly-once".
    pub fn new(sequence: u64) -> Option<Sequence> {
        (sequence != 0).then_some(Sequence(sequence))
    }
}

impl Version {
    /// Any number.
    pub const fn new(version: u64) -> Version {
        Version(version)
    }
}

impl Cookie {
    /// Any number; 0 stands before the first entry.
    pub const fn new(cookie: u64) -> Cookie {
        Cookie(cookie)
    }
}

macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks: 1..=64 characters of `[A-Za-z0-9._-]`, the first a letter or digit.
            pub fn new(id: impl Into<String>) -> Result<$name> {
                let id = id.into();
                check_id($what, &id)?;
                Ok($name(id))
            }

            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(id: &str) -> Result<$name> {
                $name::new(id)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(id: String) -> Result<$name> {
                $name::new(id)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

text! {
    /// The tenant that owns shards and for whom a mount or program acts.
    ClientId, "client id"
}
text! {
    /// A storage node.
    NodeId, "node id"
}
text! {
    /// A volume.
    VolumeId, "volume id"
}

fn check_id(what: &str, id: &str) -> Result<()> {
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if id.is_empty() || id.len() > ID_CHARS_MAX {
        return Err(Error::invalid(format!(
            "a {what} has 1..={ID_CHARS_MAX} characters, this one has {}",
            id.len()
        )));
    }
    if !id.bytes().all(good) || !id.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(Error::invalid(format!(
            "{what} {id:?}: only letters, digits, '.', '_' and '-' are allowed, beginning with a letter or digit"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn global_inodes_pack_and_split() {
        let (shard, inode) = (ShardId::MAX, InodeNo::MAX);
        let packed = GlobalInode::new(shard, inode);
        assert_eq!(packed.split(), Some((shard, inode)));
        assert!(packed.get() <= i64::MAX as u64);
        assert_eq!(GlobalInode::ROOT.split(), None);
        assert_eq!(GlobalInode::from_raw(u64::MAX).split(), None);
        assert_eq!(GlobalInode::new(ShardId::new(1).unwrap(), InodeNo::ROOT).get(), (1 << 41) + 1);
    }

    #[test]
    fn ids_are_checked() {
        assert!(ShardId::new(0).is_err());
        assert!(ShardId::new(1 << 22).is_err());
        assert!(ClientId::new("a").is_ok());
        for bad in ["", "-a", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert!(ClientId::new(bad).is_err(), "{bad:?}");
        }
    }
}
