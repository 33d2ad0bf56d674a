//! Operations on values by key: put, batches of puts, delete.
//!
//! A put makes the directories that are missing and marks them; a delete that leaves a marked directory
//! empty removes it, and so on upward. A put over a file gives it a new content: readers see the old
//! bytes or the new ones, whole.

use bytes::Bytes;
use shardfs_proto::types::limits::{
    DEPTH_MAX, INDEX_NAME_BYTES_MAX, INDEX_TEXT_BYTES_MAX, INDEXES_MAX, VALUE_BYTES_MAX,
};
use shardfs_proto::types::op::{IndexValue, Indexes, ObjectMeta, OpResult, PutItem, PutOptions};
use shardfs_proto::types::{Error, FileKind, FileName, InodeNo, Key, Reason, Result, Version};

use super::attr::drop_capability;
use super::{Apply, Identity, acl};
use crate::shard::keys::{self, Cf, ContentId};
use crate::shard::records::{Content, INODE_FLAG_AUTO, INODE_FLAG_GAPS, INODE_FLAG_SET_ASIDE, InodeRecord};
use crate::shard::session::Effect;

/// Permission bits of files and directories that a put makes.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// A streamed Put whose content is in chunks already.
#[derive(Clone, Debug)]
pub struct StagedPut {
    /// Where.
    pub key: Key,
    /// How.
    pub options: PutOptions,
    /// What.
    pub content: ContentId,
}

/// The bytes of a put.
enum Value<'a> {
    Whole(&'a Bytes),
    Staged { id: ContentId, size: u64, count: u64 },
}

impl Apply<'_, '_> {
    pub(super) fn put_value(&mut self, item: &PutItem) -> Result<OpResult> {
        let meta = self.put_item(item)?;
        Ok(OpResult { meta: Some(meta), created: true, ..OpResult::default() })
    }

    fn put_item(&mut self, item: &PutItem) -> Result<ObjectMeta> {
        if item.value.len() > VALUE_BYTES_MAX {
            return Err(Error::new(
                Reason::TooLarge,
                format!(
                    "key {}: the value has {} bytes; one message carries {VALUE_BYTES_MAX}: stream it",
                    item.key,
                    item.value.len()
                ),
            ));
        }
        self.put(&item.key, &item.options, Value::Whole(&item.value))
    }

    pub(super) fn put_values(&mut self, items: &[PutItem], atomic: bool) -> Result<OpResult> {
        let mut results = Vec::with_capacity(items.len());
        for item in items {
            if atomic {
                results.push(Ok(self.put_item(item)?));
                continue;
            }
            self.txn.push();
            self.txn.next_version();
            let result = self.put_item(item).and_then(|meta| self.check_growth().map(|()| meta));
            match &result {
                Ok(_) => self.txn.keep(),
                Err(_) => self.txn.drop_layer(),
            }
            results.push(result);
        }
        Ok(OpResult { results, created: true, ..OpResult::default() })
    }

    /// Gives a staged content its name.
    pub fn put_staged(&mut self, put: &StagedPut) -> Result<OpResult> {
        self.txn.next_version();
        let staged = self
            .live
            .staged(put.content)
            .ok_or_else(|| Error::internal(format!("content {} is not staged", put.content.get())))?;
        let value = Value::Staged { id: put.content, size: staged.bytes, count: staged.chunks };
        let before = self.txn.counters().charged_bytes();
        let meta = self.put(&put.key, &put.options, value)?;
        self.txn.delete(Cf::Sys, keys::staged(put.content));
        self.effects.push(Effect::Staged(put.content, None));
        let others = self.live.staged_bytes().saturating_sub(staged.bytes);
        self.check_limit(self.txn.counters().charged_bytes(), before, others)?;
        Ok(OpResult { meta: Some(meta), created: true, ..OpResult::default() })
    }

    fn put(&mut self, key: &Key, options: &PutOptions, value: Value<'_>) -> Result<ObjectMeta> {
        check_indexes(&options.indexes).map_err(|e| e.context(format!("key {key}")))?;
        let root = self.directory(InodeNo::ROOT)?;
        let identity = Identity {
            mode: FILE_MODE,
            uid: options.uid.unwrap_or(root.uid),
            gid: options.gid.unwrap_or(root.gid),
            unmasked_mode: None,
        };
        let (directories, name) = key.split_last();
        let parent = self.make_path(key, &directories, identity)?;
        self.check_name(parent, &name)?;
        let entry = self.lookup(parent, &name)?;
        let (ino, mut record) = match &entry {
            Some(entry) => {
                check_is_value(key, entry.kind)?;
                let mut record = InodeRecord::clone(&*self.entry_inode(&name, entry)?);
                if options.if_absent {
                    return Err(Error::new(Reason::AlreadyExists, format!("key {key} is there already")));
                }
                check_version(key, options.if_version, Some(record.version))?;
                self.txn.delete_content(&record.content, record.size);
                drop_capability(&mut record);
                (Some(entry.inode), record)
            }
            None => {
                check_version(key, options.if_version, None)?;
                let directory = self.directory(parent)?;
                (None, self.new_record(&directory, FileKind::Regular, identity)?)
            }
        };
        match value {
            Value::Whole(bytes) => {
                record.size = bytes.len() as u64;
                record.content = self.new_content(bytes);
            }
            Value::Staged { id, size, count } => {
                record.size = size;
                record.content = Content::Chunks { id, count };
            }
        }
        record.flags &= !(INODE_FLAG_GAPS | INODE_FLAG_SET_ASIDE);
        if let Some(mode) = options.mode {
            acl::set_mode(&mut record, mode & shardfs_proto::types::attr::MODE_BITS)?;
        }
        record.uid = options.uid.unwrap_or(record.uid);
        // A new file's group may come from its directory.
        if ino.is_some() {
            record.gid = options.gid.unwrap_or(record.gid);
        }
        record.mtime = options.mtime.unwrap_or(self.now);
        record.ctime = self.now;
        record.indexes = options.indexes.clone();
        let chunk_bytes = self.txn.chunk_bytes();
        match ino {
            Some(ino) => Ok(self.txn.put_inode(ino, record)?.meta(ino, chunk_bytes)),
            None => {
                let (ino, _) = self.enter(parent, &name, record)?;
                let record = self.inode(ino)?;
                Ok(record.meta(ino, chunk_bytes))
            }
        }
    }

    /// The directory that a path of names leads to from the root, made where it is missing.
    fn make_path(&mut self, key: &Key, names: &[FileName], identity: Identity) -> Result<InodeNo> {
        let mut parent = InodeNo::ROOT;
        let mut made = false;
        for (above, name) in names.iter().enumerate() {
            if let Some(entry) = self.lookup(parent, name)? {
                check_is_directory(key, name, entry.kind)?;
                parent = entry.inode;
                continue;
            }
            self.check_name(parent, name)?;
            let directory = self.directory(parent)?;
            let identity = Identity { mode: DIRECTORY_MODE, ..identity };
            let mut record = self.new_record(&directory, FileKind::Directory, identity)?;
            record.parent = Some(parent);
            record.flags |= INODE_FLAG_AUTO;
            // A key has fewer names.
            record.set_height_bound(DEPTH_MAX.saturating_sub(above + 1));
            parent = self.enter(parent, name, record)?.0;
            made = true;
        }
        if made {
            let path = self.ancestors(parent)?;
            self.raise_heights(&path[1..], 0)?;
        }
        Ok(parent)
    }

    pub(super) fn delete_value(&mut self, key: &Key, if_version: Option<Version>) -> Result<OpResult> {
        let (directories, name) = key.split_last();
        let mut path: Vec<(InodeNo, FileName)> = Vec::with_capacity(directories.len());
        let mut parent = InodeNo::ROOT;
        for directory in directories {
            let entry = self.lookup(parent, &directory)?.ok_or_else(|| not_there(key))?;
            check_is_directory(key, &directory, entry.kind)?;
            path.push((parent, directory));
            parent = entry.inode;
        }
        let entry = self.lookup(parent, &name)?.ok_or_else(|| not_there(key))?;
        check_is_value(key, entry.kind)?;
        let record = self.entry_inode(&name, &entry)?;
        check_version(key, if_version, Some(record.version))?;
        let meta = record.meta(entry.inode, self.txn.chunk_bytes());
        self.remove_name(parent, &name, &entry);
        self.touch_directory(parent, -1, 0)?;
        self.drop_link(entry.inode, &record)?;
        let pruned_directories = self.prune(parent, path)?;
        Ok(OpResult { meta: Some(meta), pruned_directories, created: true, ..OpResult::default() })
    }

    /// Removes directories that a put made and that are empty, from the innermost up.
    fn prune(&mut self, innermost: InodeNo, mut path: Vec<(InodeNo, FileName)>) -> Result<u32> {
        let mut pruned = 0;
        let mut at = innermost;
        while let Some((parent, name)) = path.pop() {
            let record = self.inode(at)?;
            if record.entries != 0 || !record.is_auto() {
                break;
            }
            let entry = self.lookup_there(parent, &name)?;
            self.remove_name(parent, &name, &entry);
            self.touch_directory(parent, -1, -1)?;
            self.drop_directory(at, &record)?;
            pruned += 1;
            at = parent;
        }
        Ok(pruned)
    }
}

fn not_there(key: &Key) -> Error {
    Error::not_found(format!("there is no key {key}"))
}

fn check_is_directory(key: &Key, name: &FileName, kind: FileKind) -> Result<()> {
    if kind == FileKind::Directory {
        return Ok(());
    }
    Err(Error::new(Reason::NotDirectory, format!("key {key}: {name} is there and no directory")))
}

fn check_is_value(key: &Key, kind: FileKind) -> Result<()> {
    match kind {
        FileKind::Regular => Ok(()),
        FileKind::Directory => Err(Error::new(Reason::IsDirectory, format!("key {key} names a directory"))),
        FileKind::Symlink
        | FileKind::Fifo
        | FileKind::Socket
        | FileKind::CharDevice
        | FileKind::BlockDevice => {
            Err(Error::new(Reason::WrongKind, format!("key {key} names no regular file")))
        }
    }
}

fn check_version(key: &Key, wanted: Option<Version>, found: Option<Version>) -> Result<()> {
    match (wanted, found) {
        (None, _) => Ok(()),
        (Some(wanted), Some(found)) if wanted == found => Ok(()),
        (Some(wanted), Some(found)) => Err(Error::new(
            Reason::VersionMismatch,
            format!("key {key} has version {found}, not {wanted}: somebody changed it; read it again"),
        )),
        (Some(wanted), None) => Err(Error::new(
            Reason::VersionMismatch,
            format!("key {key} is not there, so it has no version {wanted}"),
        )),
    }
}

fn check_indexes(indexes: &Indexes) -> Result<()> {
    if indexes.len() > INDEXES_MAX {
        return Err(Error::invalid(format!("{} indexes; the limit is {INDEXES_MAX}", indexes.len())));
    }
    for (name, value) in indexes {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > INDEX_NAME_BYTES_MAX || !name.bytes().all(good) {
            return Err(Error::invalid(format!(
                "index name {name:?}: 1..={INDEX_NAME_BYTES_MAX} bytes of letters, digits, '.', '_' and '-' are allowed"
            )));
        }
        if let IndexValue::Text(text) = value
            && text.len() > INDEX_TEXT_BYTES_MAX
        {
            return Err(Error::invalid(format!(
                "index {name}: its text has {} bytes; the limit is {INDEX_TEXT_BYTES_MAX}",
                text.len()
            )));
        }
    }
    Ok(())
}
