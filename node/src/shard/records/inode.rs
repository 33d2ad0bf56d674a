//! The inode record: what a file is, and its content while that is small.

use std::collections::BTreeMap;

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, DEFAULT_ACL};
use shardfs_proto::types::limits::{DEPTH_MAX, MOVED_DEPTH_MAX};
use shardfs_proto::types::op::{IndexValue, Indexes, ObjectMeta};
use shardfs_proto::types::{Attr, Error, FileKind, InodeNo, Result, Timestamp, Version};

use super::codec::{Decoder, Encoder, kind_to_u8};
use super::sys::INODE_COST_BYTES;
use crate::shard::keys::ContentId;

/// Bytes of content that an inode record holds itself: one page. Larger content lies in chunks.
pub const INLINE_BYTES_MAX: usize = 4096;

/// Flag of a directory that a Put made: a Delete that empties it removes it.
pub const INODE_FLAG_AUTO: u16 = 1;

/// Flag of a regular file in whose chunks there may be pages that nobody wrote: only their bytes tell them from data. Without it
/// every page of a chunk counts as data.
pub const INODE_FLAG_GAPS: u16 = 2;

/// Flag of a regular file for which room was set aside: a chunk of it that holds nothing but zeros may be such room.
pub const INODE_FLAG_SET_ASIDE: u16 = 4;

/// Where a directory's flags hold one more than the bound on its height; 0: none is noted.
const HEIGHT_SHIFT: u32 = 2;

/// Bytes that a directory shows as its size: a block, as on other filesystems.
const DIRECTORY_SIZE_BYTES: u64 = 4096;

/// Where a regular file's bytes are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// In the record; as long as the file.
    Inline(Bytes),
    /// In chunks.
    Chunks {
        /// Their content id.
        id: ContentId,
        /// How many there are; those that are not read as zeros.
        count: u64,
    },
}

impl Content {
    /// No bytes.
    pub const EMPTY: Content = Content::Inline(Bytes::new());
}

/// What an inode is (family `inode`).
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 1 | kind: 1 regular, 2 directory, 3 symlink, 4 FIFO, 5 socket, 6 character device, 7 block device |
/// | 2 | flags: 1 made by a Put (directory); 2 gaps, 4 set aside (regular); from 4 on: 1 + bound of height, 0 = none (directory) |
/// | 4 | mode |
/// | 4 | uid |
/// | 4 | gid |
/// | 4 | nlink |
/// | 4 | rdev |
/// | 8 | size (regular), entries (directory), else 0 |
/// | 8 | version |
/// | 4 x 12 | atime, mtime, ctime, btime: seconds i64, nanoseconds u32 |
/// | 8 | content id, 0 = inline (regular); parent inode (directory); else 0 |
/// | 8 | chunk count (regular); else 0 |
/// | 4 + n | inline content (regular) or target (symlink) |
/// | 2 | number of extended attributes, each: 1 + n name, 4 + n value |
/// | 2 | number of indexes, each: 1 + n name, 1 tag, value (1: 4 + n text; 2: i64; 3: i64, u32) |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InodeRecord {
    /// What it is.
    pub kind: FileKind,
    /// Bits: [`INODE_FLAG_AUTO`] (directory), [`INODE_FLAG_GAPS`], [`INODE_FLAG_SET_ASIDE`] (regular); a directory's other bits:
    /// [`InodeRecord::height_bound`].
    pub flags: u16,
    /// 0..=07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names; for a directory 2 and its subdirectories. 0: removed and held open.
    pub nlink: u32,
    /// Device number.
    pub rdev: u32,
    /// Bytes of a regular file; 0 for other kinds.
    pub size: u64,
    /// Entries of a directory; 0 for other kinds.
    pub entries: u64,
    /// The operation that changed it last.
    pub version: Version,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change.
    pub ctime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// A directory's parent (the root's is the root, a removed one's is its last); `None` for other kinds.
    pub parent: Option<InodeNo>,
    /// A regular file's bytes; [`Content::EMPTY`] for other kinds.
    pub content: Content,
    /// A symlink's target; empty for other kinds.
    pub target: Bytes,
    /// Extended attributes.
    pub xattrs: BTreeMap<Bytes, Bytes>,
    /// Secondary indexes.
    pub indexes: Indexes,
}

const INODE_FORMAT: u8 = 1;
/// Bytes of the fixed part and the three lengths after it.
const INODE_BASE_BYTES: usize = 112;

impl InodeRecord {
    /// Whether it is a directory that a Put made.
    pub fn is_auto(&self) -> bool {
        self.flags & INODE_FLAG_AUTO != 0
    }

    /// At most so many directories lie below each other in this one.
    pub fn height_bound(&self) -> usize {
        match usize::from(self.flags >> HEIGHT_SHIFT) {
            // Made before bounds were noted: by what bounds the making of directories.
            0 => DEPTH_MAX,
            noted => noted - 1,
        }
    }

    /// Notes a bound on that, of a directory.
    pub fn set_height_bound(&mut self, height: usize) {
        let noted = u16::try_from(height.min(MOVED_DEPTH_MAX) + 1).expect("depths have 13 bits");
        self.flags = (self.flags & INODE_FLAG_AUTO) | (noted << HEIGHT_SHIFT);
    }

    /// Whether pages of its chunks may be holes.
    pub fn has_gaps(&self) -> bool {
        self.flags & INODE_FLAG_GAPS != 0
    }

    /// Chunks that a file of this size has when it has no holes.
    pub fn dense_chunks(size: u64, chunk_bytes: u32) -> u64 {
        size.div_ceil(u64::from(chunk_bytes))
    }

    /// Whether the content has chunks and none is missing.
    pub fn is_dense(&self, chunk_bytes: u32) -> bool {
        match &self.content {
            Content::Inline(_) => false,
            Content::Chunks { count, .. } => *count == Self::dense_chunks(self.size, chunk_bytes),
        }
    }

    /// Logical bytes of content: what st_blocks shows.
    pub fn content_bytes(&self, chunk_bytes: u32) -> u64 {
        match &self.content {
            Content::Inline(bytes) => bytes.len() as u64,
            Content::Chunks { count, .. } => self.size.min(count.saturating_mul(u64::from(chunk_bytes))),
        }
    }

    /// Logical bytes: content, attributes, symlink target and further names; the inode itself with its first
    /// name is counted by [`super::Counters::charged_bytes`].
    pub fn used_bytes(&self, chunk_bytes: u32) -> u64 {
        let xattrs: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        let indexes: usize = self
            .indexes
            .iter()
            .map(|(name, value)| {
                name.len()
                    + match value {
                        IndexValue::Text(text) => text.len(),
                        IndexValue::Integer(_) | IndexValue::Time(_) => 8,
                    }
            })
            .sum();
        let further_names = match self.kind {
            FileKind::Directory => 0,
            _ => u64::from(self.nlink.saturating_sub(1)) * INODE_COST_BYTES,
        };
        self.content_bytes(chunk_bytes) + (xattrs + indexes + self.target.len()) as u64 + further_names
    }

    /// The attributes that callers see.
    pub fn attr(&self, inode: InodeNo, chunk_bytes: u32) -> Attr {
        let size = match self.kind {
            FileKind::Regular => self.size,
            FileKind::Directory => DIRECTORY_SIZE_BYTES,
            FileKind::Symlink => self.target.len() as u64,
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => 0,
        };
        Attr {
            inode,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size,
            // Whole pages, in units of 512 bytes.
            blocks: self.content_bytes(chunk_bytes).div_ceil(4096) * 8,
            rdev: self.rdev,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            version: self.version,
            has_acl: Some([ACCESS_ACL, DEFAULT_ACL].iter().any(|name| self.xattrs.contains_key(*name))),
        }
    }

    /// What a Get tells of a value.
    pub fn meta(&self, inode: InodeNo, chunk_bytes: u32) -> ObjectMeta {
        ObjectMeta { attr: self.attr(inode, chunk_bytes), indexes: self.indexes.clone() }
    }

    /// Bytes of extended attributes, names included.
    pub fn xattr_bytes(&self) -> usize {
        self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// A bound on the memory that it takes, for caches.
    pub fn weight_bytes(&self) -> usize {
        let inline = match &self.content {
            Content::Inline(bytes) => bytes.len(),
            Content::Chunks { .. } => 0,
        };
        size_of::<InodeRecord>()
            + inline
            + self.target.len()
            + 2 * self.xattr_bytes()
            + 128 * self.indexes.len()
    }

    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let (body, content, count): (&[u8], u64, u64) = match (self.kind, &self.content) {
            (FileKind::Symlink, _) => (&self.target, 0, 0),
            (_, Content::Inline(bytes)) => (bytes, 0, 0),
            (_, Content::Chunks { id, count }) => (&[], id.get(), *count),
        };
        let capacity = INODE_BASE_BYTES + body.len() + self.xattr_bytes() + 8 * self.xattrs.len();
        let mut e = Encoder::new(INODE_FORMAT, capacity + 64 * self.indexes.len());
        e.u8(kind_to_u8(self.kind));
        e.u16(self.flags);
        e.u32(self.mode);
        e.u32(self.uid);
        e.u32(self.gid);
        e.u32(self.nlink);
        e.u32(self.rdev);
        e.u64(if self.kind == FileKind::Directory { self.entries } else { self.size });
        e.u64(self.version.get());
        for time in [self.atime, self.mtime, self.ctime, self.btime] {
            e.time(time);
        }
        e.u64(self.parent.map_or(content, InodeNo::get));
        e.u64(count);
        e.long(body);
        e.u16(u16::try_from(self.xattrs.len()).expect("extended attributes are bounded by their bytes"));
        for (name, value) in &self.xattrs {
            e.short(name);
            e.long(value);
        }
        e.u16(u16::try_from(self.indexes.len()).expect("indexes are bounded in number"));
        for (name, value) in &self.indexes {
            e.short(name.as_bytes());
            match value {
                IndexValue::Text(text) => {
                    e.u8(1);
                    e.long(text.as_bytes());
                }
                IndexValue::Integer(number) => {
                    e.u8(2);
                    e.i64(*number);
                }
                IndexValue::Time(time) => {
                    e.u8(3);
                    e.time(*time);
                }
            }
        }
        e.finish()
    }

    /// From bytes; `inode` is for the error. Content and attributes share the value's memory.
    pub fn decode(inode: InodeNo, value: &Bytes) -> Result<InodeRecord> {
        Self::decode_parts(value).map_err(|e: Error| e.context(format!("inode {inode}")))
    }

    fn decode_parts(value: &Bytes) -> Result<InodeRecord> {
        let mut d = Decoder::new("inode", value, INODE_FORMAT)?;
        let kind = d.kind()?;
        let (flags, mode, uid, gid, nlink, rdev) =
            (d.u16()?, d.u32()?, d.u32()?, d.u32()?, d.u32()?, d.u32()?);
        let (size, version) = (d.u64()?, Version::new(d.u64()?));
        let (atime, mtime, ctime, btime) = (d.time()?, d.time()?, d.time()?, d.time()?);
        let (link, count) = (d.u64()?, d.u64()?);
        let body = value.slice_ref(d.long()?);
        let mut parent = None;
        let mut content = Content::EMPTY;
        let mut target = Bytes::new();
        match kind {
            FileKind::Regular => match ContentId::new(link) {
                Some(id) if body.is_empty() => content = Content::Chunks { id, count },
                None if count == 0 && body.len() as u64 == size => content = Content::Inline(body),
                _ => return Err(d.bad("content and size disagree")),
            },
            FileKind::Directory => {
                parent = Some(InodeNo::new(link).map_err(|_| d.bad("a parent's number"))?);
            }
            FileKind::Symlink => target = body,
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {}
        }
        let mut xattrs = BTreeMap::new();
        for _ in 0..d.u16()? {
            let name = value.slice_ref(d.short()?);
            xattrs.insert(name, value.slice_ref(d.long()?));
        }
        let mut indexes = Indexes::new();
        for _ in 0..d.u16()? {
            let name = d.short()?;
            let name = d.text(name)?.to_owned();
            let value = match d.u8()? {
                1 => {
                    let text = d.long()?;
                    IndexValue::Text(d.text(text)?.to_owned())
                }
                2 => IndexValue::Integer(d.i64()?),
                3 => IndexValue::Time(d.time()?),
                _ => return Err(d.bad("an index's tag")),
            };
            indexes.insert(name, value);
        }
        let directory = kind == FileKind::Directory;
        let record = InodeRecord {
            kind,
            flags,
            mode,
            uid,
            gid,
            nlink,
            rdev,
            size: if directory { 0 } else { size },
            entries: if directory { size } else { 0 },
            version,
            atime,
            mtime,
            ctime,
            btime,
            parent,
            content,
            target,
            xattrs,
            indexes,
        };
        d.finish()?;
        Ok(record)
    }
}
