//! Lookups and reads of one shard, from a consistent view.
//!
//! Invariants: every function reads one [`ReadView`], so what it answers is one state of the shard; nothing
//! here changes anything. A record that does not decode or is missing where another names it is an
//! error of reason `Corrupt`, never a panic.
//!
//! Must not: know sessions, the wire, or who calls.

use std::collections::HashMap;
use std::ops::ControlFlow;

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::limits::{READDIR_ENTRIES_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::op::ObjectMeta;
use shardfs_proto::types::{Attr, Cookie, Error, FileKind, FileName, InodeNo, Key, Reason, Result, Version};

use super::keys::{self, Cf};
use super::list::{Dirents, NameEntry};
use super::records::{Content, CookieEntry, Dirent, InodeRecord};
use super::store::Reader;
use super::view::ReadView;

/// Inode records that are fetched together: each may have 200 KiB in the worst case.
const RECORDS_TOGETHER: usize = 128;

/// A page of a directory.
#[derive(Clone, Debug)]
pub struct DirectoryPage {
    /// In cookie order, without `.` and `..`.
    pub entries: Vec<DirectoryEntry>,
    /// There are no more.
    pub end: bool,
    /// The directory that holds this one; the root's is the root.
    pub parent: InodeNo,
}

/// One entry of a page.
#[derive(Clone, Debug)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: Bytes,
    /// What it names.
    pub inode: InodeNo,
    /// The kind of that.
    pub kind: FileKind,
    /// Its place; keeps it for life.
    pub cookie: Cookie,
    /// Its attributes, if they were asked for and can be read.
    pub attr: Option<Attr>,
}

/// A value that was found by its key.
#[derive(Clone, Debug)]
pub struct Value {
    /// The file.
    pub inode: InodeNo,
    /// Its record.
    pub record: InodeRecord,
}

/// The record of an inode; NotFound if there is none.
pub fn record(view: &ReadView, inode: InodeNo) -> Result<InodeRecord> {
    match view.get(Cf::Inode, &keys::inode(inode))? {
        Some(value) => InodeRecord::decode(inode, &value),
        None => Err(Error::not_found(format!("inode {inode} is not there (any more)"))),
    }
}

fn directory(view: &ReadView, inode: InodeNo) -> Result<InodeRecord> {
    let record = record(view, inode)?;
    match record.kind {
        FileKind::Directory => Ok(record),
        FileKind::Regular
        | FileKind::Symlink
        | FileKind::Fifo
        | FileKind::Socket
        | FileKind::CharDevice
        | FileKind::BlockDevice => {
            Err(Error::new(Reason::NotDirectory, format!("inode {inode} is not a directory")))
        }
    }
}

/// The parent of a directory; the root's is the root.
fn parent_of(inode: InodeNo, record: &InodeRecord) -> Result<InodeNo> {
    record.parent.ok_or_else(|| Error::corrupt(format!("directory {inode} has no parent in its record")))
}

/// Finds a name in a directory, `.` and `..` included.
pub fn lookup(view: &ReadView, parent: InodeNo, name: &[u8]) -> Result<Attr> {
    match name {
        b"." => Ok(directory(view, parent)?.attr(parent, view.chunk_bytes())),
        b".." => {
            let above = parent_of(parent, &directory(view, parent)?)?;
            get_attr(view, above)
        }
        _ => {
            let name = FileName::new(Bytes::copy_from_slice(name))?;
            let Some(entry) = dirent(view, parent, name.as_bytes())? else {
                directory(view, parent)?;
                return Err(Error::not_found(format!("{name} is not there")));
            };
            match record(view, entry.inode) {
                Ok(record) => Ok(record.attr(entry.inode, view.chunk_bytes())),
                Err(error) => Err(dangling(error, parent, &name)),
            }
        }
    }
}

fn dangling(error: Error, parent: InodeNo, name: &FileName) -> Error {
    if error.reason() == Reason::NotFound {
        return Error::corrupt(format!("{name} in directory {parent} names an inode that is not there"));
    }
    error
}

/// The attributes of an inode.
pub fn get_attr(view: &ReadView, inode: InodeNo) -> Result<Attr> {
    Ok(record(view, inode)?.attr(inode, view.chunk_bytes()))
}

/// The target of a symlink.
pub fn read_link(view: &ReadView, inode: InodeNo) -> Result<Bytes> {
    let record = record(view, inode)?;
    if record.kind != FileKind::Symlink {
        return Err(Error::new(Reason::WrongKind, format!("inode {inode} is not a symlink")));
    }
    Ok(record.target)
}

/// The record of a regular file; another kind is an error.
pub fn regular(view: &ReadView, inode: InodeNo) -> Result<InodeRecord> {
    let record = record(view, inode)?;
    check_regular(record.kind, || format!("inode {inode}"))?;
    Ok(record)
}

fn check_regular(kind: FileKind, what: impl Fn() -> String) -> Result<()> {
    match kind {
        FileKind::Regular => Ok(()),
        FileKind::Directory => Err(Error::new(Reason::IsDirectory, format!("{} is a directory", what()))),
        FileKind::Symlink
        | FileKind::Fifo
        | FileKind::Socket
        | FileKind::CharDevice
        | FileKind::BlockDevice => {
            Err(Error::new(Reason::WrongKind, format!("{} is not a regular file and has no content", what())))
        }
    }
}

/// Reads a file: at most [`VALUE_BYTES_MAX`] bytes, fewer only at its end.
pub fn read(view: &ReadView, inode: InodeNo, offset: u64, length: u32) -> Result<Bytes> {
    content(view, &regular(view, inode)?, offset, u64::from(length))
}

/// Bytes of a file whose record is known. Holes are zeros. At most [`VALUE_BYTES_MAX`] bytes.
pub fn content(view: &ReadView, record: &InodeRecord, offset: u64, length: u64) -> Result<Bytes> {
    if length > VALUE_BYTES_MAX as u64 {
        return Err(Error::new(
            Reason::TooLarge,
            format!(
                "{length} bytes were asked for; one answer carries at most {VALUE_BYTES_MAX}: read by ranges"
            ),
        ));
    }
    if offset >= record.size || length == 0 {
        return Ok(Bytes::new());
    }
    let end = record.size.min(offset.saturating_add(length));
    let id = match &record.content {
        Content::Inline(bytes) => {
            // The codec has seen that the bytes are as many as the size says.
            let (from, to) = (offset as usize, (end as usize).min(bytes.len()));
            return Ok(bytes.slice(from.min(to)..to));
        }
        Content::Chunks { id, .. } => *id,
    };
    let chunk_bytes = u64::from(view.chunk_bytes());
    let first = offset / chunk_bytes;
    let last = (end - 1) / chunk_bytes;
    let number = |n: u64| {
        u32::try_from(n)
            .map_err(|_| Error::corrupt(format!("content {}: no chunk has the number {n}", id.get())))
    };
    if first == last {
        let chunk = view.get(Cf::Chunk, &keys::chunk(id, number(first)?))?.unwrap_or_default();
        let (from, to) = ((offset - first * chunk_bytes) as usize, (end - first * chunk_bytes) as usize);
        if chunk.len() >= to {
            return Ok(chunk.slice(from..to));
        }
        let mut out = BytesMut::with_capacity(to - from);
        out.extend_from_slice(chunk.get(from..).unwrap_or_default());
        out.resize(to - from, 0);
        return Ok(out.freeze());
    }
    let keys = (first..=last).map(|n| Ok(keys::chunk(id, number(n)?))).collect::<Result<Vec<_>>>()?;
    let slices: Vec<&[u8]> = keys.iter().map(|key| &key[..]).collect();
    let chunks = view.multi_get(Cf::Chunk, &slices)?;
    let mut out = BytesMut::with_capacity((end - offset) as usize);
    for (n, chunk) in (first..=last).zip(chunks) {
        let start = n * chunk_bytes;
        let from = (offset.max(start) - start) as usize;
        let to = (end.min(start + chunk_bytes) - start) as usize;
        let chunk = chunk.unwrap_or_default();
        let there = chunk.get(from..to.min(chunk.len())).unwrap_or_default();
        out.extend_from_slice(there);
        out.resize(out.len() + (to - from - there.len()), 0);
    }
    Ok(out.freeze())
}

/// Entries of a directory with cookies above `after`, at most `limit`
/// (1..=[`READDIR_ENTRIES_MAX`]). A removed directory that is still open has none.
pub fn read_directory(
    view: &ReadView,
    inode: InodeNo,
    after: Cookie,
    limit: u32,
    attributes: bool,
) -> Result<DirectoryPage> {
    if limit == 0 || limit > READDIR_ENTRIES_MAX {
        return Err(Error::invalid(format!(
            "a limit of {limit} entries is not in 1..={READDIR_ENTRIES_MAX}"
        )));
    }
    let parent = parent_of(inode, &directory(view, inode)?)?;
    let mut page = DirectoryPage { entries: Vec::new(), end: true, parent };
    let Some(from) = after.get().checked_add(1) else { return Ok(page) };
    let from = keys::cookie(inode, Cookie::new(from));
    let to = keys::prefix_end(&keys::inode(inode));
    view.scan(Cf::Cookie, &from, to.as_deref(), &mut |key, value| {
        if page.entries.len() >= limit as usize {
            page.end = false;
            return Ok(ControlFlow::Break(()));
        }
        let (_, cookie) = keys::parse_cookie(key)?;
        let entry = CookieEntry::decode(value)?;
        page.entries.push(DirectoryEntry {
            name: entry.name,
            inode: entry.inode,
            kind: entry.kind,
            cookie,
            attr: None,
        });
        Ok(ControlFlow::Continue(()))
    })?;
    if attributes {
        for group in page.entries.chunks_mut(RECORDS_TOGETHER) {
            let inodes: Vec<InodeNo> = group.iter().map(|entry| entry.inode).collect();
            for (entry, record) in group.iter_mut().zip(records(view, &inodes)?) {
                // One bad record must not hide its neighbours: a lookup of this name tells what is wrong.
                entry.attr = record.ok().map(|record| record.attr(entry.inode, view.chunk_bytes()));
            }
        }
    }
    Ok(page)
}

/// The records of inodes that are named somewhere: a missing one is `Corrupt`.
pub fn records(view: &ReadView, inodes: &[InodeNo]) -> Result<Vec<Result<InodeRecord>>> {
    let keys: Vec<[u8; 8]> = inodes.iter().map(|inode| keys::inode(*inode)).collect();
    let slices: Vec<&[u8]> = keys.iter().map(|key| &key[..]).collect();
    let values = view.multi_get(Cf::Inode, &slices)?;
    Ok(inodes
        .iter()
        .zip(values)
        .map(|(inode, value)| match value {
            Some(value) => InodeRecord::decode(*inode, &value),
            None => Err(Error::corrupt(format!("a name stands for inode {inode}, which is not there"))),
        })
        .collect())
}

/// Metadata of inodes that are named somewhere.
pub fn metas(view: &ReadView, inodes: &[InodeNo]) -> Result<Vec<Result<ObjectMeta>>> {
    let mut metas = Vec::with_capacity(inodes.len());
    for group in inodes.chunks(RECORDS_TOGETHER) {
        let found = records(view, group)?;
        metas.extend(
            group.iter().zip(found).map(|(inode, record)| record.map(|r| r.meta(*inode, view.chunk_bytes()))),
        );
    }
    Ok(metas)
}

/// An extended attribute's value.
pub fn get_xattr(view: &ReadView, inode: InodeNo, name: &[u8]) -> Result<Bytes> {
    record(view, inode)?.xattrs.remove(name).ok_or_else(|| {
        Error::new(Reason::NoAttribute, format!("inode {inode} has no attribute {}", name.escape_ascii()))
    })
}

/// The names of all extended attributes.
pub fn list_xattrs(view: &ReadView, inode: InodeNo) -> Result<Vec<Bytes>> {
    Ok(record(view, inode)?.xattrs.into_keys().collect())
}

fn dirent(view: &ReadView, parent: InodeNo, name: &[u8]) -> Result<Option<Dirent>> {
    let value = view.get(Cf::Dirent, &keys::dirent(parent, name))?;
    value.map(|value| Dirent::decode(&value)).transpose()
}

fn not_there(key: &Key) -> Error {
    Error::not_found(format!("key {key} is not there"))
}

/// What a key names. NotFound, or NotDirectory if something above it is none.
pub fn resolve_key(view: &ReadView, key: &Key) -> Result<Dirent> {
    let (directories, last) = key.split_last();
    let parent = walk(view, &directories, key)?;
    dirent(view, parent, last.as_bytes())?.ok_or_else(|| not_there(key))
}

fn walk(view: &ReadView, directories: &[FileName], key: &Key) -> Result<InodeNo> {
    let mut at = InodeNo::ROOT;
    for name in directories {
        let entry = dirent(view, at, name.as_bytes())?.ok_or_else(|| not_there(key))?;
        if entry.kind != FileKind::Directory {
            return Err(Error::new(Reason::NotDirectory, format!("key {key}: {name} is not a directory")));
        }
        at = entry.inode;
    }
    Ok(at)
}

/// Finds a value by its key. IsDirectory or WrongKind if the key names no regular file.
pub fn find_value(view: &ReadView, key: &Key) -> Result<Value> {
    let entry = resolve_key(view, key)?;
    check_regular(entry.kind, || format!("key {key}"))?;
    let record = record(view, entry.inode).map_err(|error| match error.reason() {
        Reason::NotFound => {
            Error::corrupt(format!("key {key} names inode {}, which is not there", entry.inode))
        }
        _ => error,
    })?;
    Ok(Value { inode: entry.inode, record })
}

/// Finds many values: like [`find_value`] for each, with shared directories walked once.
pub fn find_values(view: &ReadView, keys: &[Key]) -> Result<Vec<Result<Value>>> {
    let mut parents: HashMap<Vec<FileName>, Result<InodeNo>> = HashMap::new();
    let places: Vec<Result<Vec<u8>>> = keys
        .iter()
        .map(|key| {
            let (directories, last) = key.split_last();
            let parent = match parents.get(&directories) {
                // Another key's message would name that key.
                Some(Err(_)) => walk(view, &directories, key),
                Some(Ok(parent)) => Ok(*parent),
                None => {
                    let parent = walk(view, &directories, key);
                    parents.insert(directories, parent.clone());
                    parent
                }
            };
            Ok(keys::dirent(parent?, last.as_bytes()))
        })
        .collect();
    let wanted: Vec<&[u8]> = places.iter().flatten().map(|key| &key[..]).collect();
    let mut dirents = view.multi_get(Cf::Dirent, &wanted)?.into_iter();
    let entries: Vec<Result<Dirent>> = keys
        .iter()
        .zip(places)
        .map(|(key, place)| {
            place?;
            let value = dirents.next().flatten().ok_or_else(|| not_there(key))?;
            let entry = Dirent::decode(&value)?;
            check_regular(entry.kind, || format!("key {key}"))?;
            Ok(entry)
        })
        .collect();
    let inodes: Vec<InodeNo> = entries.iter().flatten().map(|entry| entry.inode).collect();
    let mut found = records(view, &inodes)?.into_iter();
    Ok(entries
        .into_iter()
        .map(|entry| {
            let inode = entry?.inode;
            let record = found.next().unwrap_or_else(|| Err(Error::internal("fewer records than inodes")))?;
            Ok(Value { inode, record })
        })
        .collect())
}

impl Value {
    /// Fails with VersionMismatch unless the value has this version.
    pub fn check_version(&self, key: &Key, wanted: Option<Version>) -> Result<()> {
        match wanted {
            Some(wanted) if wanted != self.record.version => Err(Error::new(
                Reason::VersionMismatch,
                format!("key {key} has version {}, not {wanted}: it was changed", self.record.version),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// How many bytes an answer to (`offset`, `length`) has. TooLarge if they are more than one answer
    /// carries; `None` asks for everything from `offset` on.
    pub fn answer_bytes(&self, key: &Key, offset: u64, length: Option<u64>) -> Result<u64> {
        let limit = VALUE_BYTES_MAX as u64;
        let there = self.record.size.saturating_sub(offset);
        let wanted = length.unwrap_or(there);
        if wanted > limit {
            return Err(Error::new(
                Reason::TooLarge,
                format!(
                    "key {key}: {wanted} bytes of a value of {} were asked for; one answer carries at most {limit}: \
                     read it by ranges (offset and length), pinned with if_version {}",
                    self.record.size, self.record.version
                ),
            ));
        }
        Ok(wanted.min(there))
    }
}

/// Metadata of a value.
pub fn object_meta(view: &ReadView, key: &Key) -> Result<ObjectMeta> {
    let value = find_value(view, key)?;
    Ok(value.record.meta(value.inode, view.chunk_bytes()))
}

/// A value, or a range of it, with its metadata.
pub fn get_value(
    view: &ReadView,
    key: &Key,
    offset: u64,
    length: Option<u64>,
    if_version: Option<Version>,
) -> Result<(ObjectMeta, Bytes)> {
    let value = find_value(view, key)?;
    value.check_version(key, if_version)?;
    let length = value.answer_bytes(key, offset, length)?;
    let bytes = content(view, &value.record, offset, length)?;
    Ok((value.record.meta(value.inode, view.chunk_bytes()), bytes))
}

impl Dirents for ReadView {
    fn page(&self, parent: InodeNo, from: &[u8], limit: usize) -> Result<Vec<NameEntry>> {
        let mut page = Vec::new();
        let to = keys::prefix_end(&keys::inode(parent));
        self.scan(Cf::Dirent, &keys::dirent(parent, from), to.as_deref(), &mut |key, value| {
            if page.len() >= limit {
                return Ok(ControlFlow::Break(()));
            }
            let (_, name) = keys::parse_dirent(key)?;
            let entry = Dirent::decode(value)?;
            page.push(NameEntry { name: Bytes::copy_from_slice(name), inode: entry.inode, kind: entry.kind });
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(page)
    }

    fn find(&self, parent: InodeNo, name: &[u8]) -> Result<Option<NameEntry>> {
        Ok(dirent(self, parent, name)?.map(|entry| NameEntry {
            name: Bytes::copy_from_slice(name),
            inode: entry.inode,
            kind: entry.kind,
        }))
    }
}

#[cfg(test)]
pub(crate) mod tests;
