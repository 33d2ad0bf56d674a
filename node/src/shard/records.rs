//! The record formats of a shard, each with a table above its codec.
//!
//! Owns: every byte of every value but chunks. All integers are big-endian; every record begins with its
//! format version. Golden-byte tests pin each format: a change of one is a new version beside the old.
//!
//! Invariants: decoding takes every byte sequence and gives a record or an error of reason `Corrupt`,
//! never a panic; what `encode` made, `decode` gives back equal.
//!
//! Must not: read or write a store, or know keys.

mod codec;
mod inode;
mod sys;

pub use inode::{
    Content, INLINE_BYTES_MAX, INODE_FLAG_AUTO, INODE_FLAG_GAPS, INODE_FLAG_SET_ASIDE, InodeRecord,
};
pub use sys::{
    Counters, HEADER_FORMAT, Header, INODE_COST_BYTES, LocksRecord, Orphan, SessionRecord, Slot, Staged,
};

use bytes::Bytes;
use shardfs_proto::types::{Cookie, FileKind, InodeNo, Result};

pub(in crate::shard) use codec::kind_to_u8;
use codec::{Decoder, Encoder};

/// What a name in a directory stands for (family `dirent`).
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 8 | inode |
/// | 1 | kind |
/// | 8 | cookie |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dirent {
    /// The inode.
    pub inode: InodeNo,
    /// Its kind, the same as in its record.
    pub kind: FileKind,
    /// Its place in the directory's order.
    pub cookie: Cookie,
}

const DIRENT_FORMAT: u8 = 1;

impl Dirent {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(DIRENT_FORMAT, 18);
        e.u64(self.inode.get());
        e.u8(kind_to_u8(self.kind));
        e.u64(self.cookie.get());
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<Dirent> {
        let mut d = Decoder::new("dirent", value, DIRENT_FORMAT)?;
        let entry = Dirent { inode: d.inode()?, kind: d.kind()?, cookie: Cookie::new(d.u64()?) };
        d.finish()?;
        Ok(entry)
    }
}

/// An entry of a directory in cookie order (family `cookie`).
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 8 | inode |
/// | 1 | kind |
/// | rest | name |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CookieEntry {
    /// The inode.
    pub inode: InodeNo,
    /// Its kind.
    pub kind: FileKind,
    /// The name; not empty.
    pub name: Bytes,
}

const COOKIE_FORMAT: u8 = 1;

impl CookieEntry {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(COOKIE_FORMAT, 10 + self.name.len());
        e.u64(self.inode.get());
        e.u8(kind_to_u8(self.kind));
        e.raw(&self.name);
        e.finish()
    }

    /// From bytes; the name is copied.
    pub fn decode(value: &[u8]) -> Result<CookieEntry> {
        let mut d = Decoder::new("cookie", value, COOKIE_FORMAT)?;
        let (inode, kind) = (d.inode()?, d.kind()?);
        let name = Bytes::copy_from_slice(d.rest());
        if name.is_empty() {
            return Err(d.bad("empty name"));
        }
        Ok(CookieEntry { inode, kind, name })
    }
}

#[cfg(test)]
mod tests;
