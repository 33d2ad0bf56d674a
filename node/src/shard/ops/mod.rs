//! What each operation means, one file a family; and what they share.
//!
//! Owns: POSIX meaning (errors as Linux gives them, times, link counts, set-group-id) and the meaning of
//! keys. Every operation runs on a [`Txn`] layer that is dropped if it fails, so it may change first and
//! check later.
//!
//! Invariants: a name has one `dirent`, one `cookie` and one `parent` entry, made and removed together
//! ([`Apply::add_name`], [`Apply::remove_name`]); an inode without a name has an orphan record or is gone
//! ([`Apply::drop_unlinked`]).
//!
//! Must not: touch the store but through the transaction, or change [`Live`] but through effects.

mod acl;
mod allocate;
mod attr;
mod copy;
mod data;
mod depth;
mod locks;
mod names;
mod rename;
mod sessions;
mod values;

use std::sync::Arc;

use bytes::Bytes;
use shardfs_proto::types::op::{OpResult, Operation, Repetition};
use shardfs_proto::types::{
    Attr, Cookie, Error, FileKind, FileName, InodeNo, Reason, Result, SessionId, Timestamp,
};

use super::keys::{self, Cf};
use super::records::{Content, CookieEntry, Dirent, Header, INODE_COST_BYTES, InodeRecord, Orphan};
use super::session::{Effect, Live};
use super::txn::Txn;

pub(in crate::shard) use allocate::{SET_ASIDE_CHUNKS_MAX, is_zero};
pub use values::StagedPut;

/// Set-user-id, set-group-id, execution by the group.
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXEC: u32 = 0o010;

/// Names at a shard's root that later features take.
const RESERVED_AT_ROOT: [&[u8]; 2] = [b".snap", b".index"];

/// One operation at work.
pub struct Apply<'a, 's> {
    /// The group's changes; the top layer is the operation's.
    pub txn: &'a mut Txn<'s>,
    /// Sessions and what they hold.
    pub live: &'a Live,
    /// What changes in `live` when the operation succeeds.
    pub effects: &'a mut Vec<Effect>,
    /// Who asks.
    pub session: Option<SessionId>,
    /// When it happens.
    pub now: Timestamp,
    /// The shard.
    pub header: &'a Header,
    /// Bytes by which the group may make the volume fuller.
    pub room_bytes: u64,
}

/// Who a new inode belongs to.
#[derive(Clone, Copy)]
pub(super) struct Identity {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// See [`shardfs_proto::types::op::NewInode`].
    pub(super) unmasked_mode: Option<u32>,
}

impl Apply<'_, '_> {
    /// Runs an operation.
    pub fn run(&mut self, operation: &Operation) -> Result<OpResult> {
        self.txn.next_version();
        let result = match operation {
            Operation::Create { parent, name, kind, inode, rdev, existing_ok, open } => {
                self.create(*parent, name, *kind, *inode, *rdev, *existing_ok, *open)
            }
            Operation::MakeDirectory { parent, name, inode } => self.make_directory(*parent, name, *inode),
            Operation::MakeSymlink { parent, name, target, inode } => {
                self.make_symlink(*parent, name, target, *inode)
            }
            Operation::Link { inode, new_parent, new_name } => self.link(*inode, *new_parent, new_name),
            Operation::Unlink { parent, name } => self.unlink(*parent, name),
            Operation::RemoveDirectory { parent, name } => self.remove_directory(*parent, name),
            Operation::Rename { parent, name, new_parent, new_name, no_replace, exchange } => {
                self.rename((*parent, name), (*new_parent, new_name), *no_replace, *exchange)
            }
            Operation::SetAttr { inode, set } => self.set_attr(*inode, set),
            Operation::Write { inode, offset, data, append, kill_set_id } => {
                self.write(*inode, *offset, data, *append, *kill_set_id)
            }
            Operation::Allocate { inode, offset, length, mode, kill_set_id } => {
                self.allocate(*inode, (*offset, *length), *mode, *kill_set_id)
            }
            Operation::SetXattr { inode, name, value, create_only, replace_only, kill_set_group_id } => {
                self.set_xattr(*inode, name, value, (*create_only, *replace_only), *kill_set_group_id)
            }
            Operation::RemoveXattr { inode, name } => self.remove_xattr(*inode, name),
            Operation::PutValue { item } => self.put_value(item),
            Operation::PutValues { items, atomic } => self.put_values(items, *atomic),
            Operation::DeleteValue { key, if_version } => self.delete_value(key, *if_version),
            Operation::CopyRange {
                source,
                source_offset,
                destination,
                destination_offset,
                length,
                kill_set_id,
            } => self.copy_range(
                (*source, *source_offset),
                (*destination, *destination_offset),
                *length,
                *kill_set_id,
            ),
            Operation::SetLock { inode, owner, pid, range, kind } => {
                self.set_lock(*inode, *owner, *pid, *range, *kind)
            }
        }?;
        self.check_growth()?;
        Ok(result)
    }

    /// Fails if the last layer makes the shard larger than its limit or the volume fuller than it may be.
    pub(super) fn check_growth(&self) -> Result<()> {
        let (after, before) =
            (self.txn.counters().charged_bytes(), self.txn.counters_below().charged_bytes());
        self.check_limit(after, before, self.live.staged_bytes())?;
        let (grown, all) = self.txn.grown_bytes();
        if grown > 0 && all > self.room_bytes {
            return Err(Error::new(
                Reason::VolumeFull,
                format!(
                    "shard {}: the volume has no room for {grown} bytes more: delete something or grow the volume",
                    self.header.id
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn check_limit(&self, after: u64, before: u64, staged: u64) -> Result<()> {
        let Some(limit) = self.header.limit_bytes else { return Ok(()) };
        if after > before && after.saturating_add(staged) > limit {
            return Err(Error::new(
                Reason::ShardFull,
                format!(
                    "shard {}: its limit is {}, {} are used, {} more are needed: delete something",
                    self.header.id,
                    human_bytes(limit),
                    human_bytes(before + staged),
                    human_bytes(after - before)
                ),
            ));
        }
        Ok(())
    }

    /// The record of an inode.
    pub(super) fn inode(&mut self, ino: InodeNo) -> Result<Arc<InodeRecord>> {
        self.txn.inode(ino)?.ok_or_else(|| Error::not_found(format!("there is no inode {ino}")))
    }

    /// The record of a directory that has not been removed.
    pub(super) fn directory(&mut self, ino: InodeNo) -> Result<Arc<InodeRecord>> {
        let record = self.inode(ino)?;
        if record.kind != FileKind::Directory {
            return Err(Error::new(Reason::NotDirectory, format!("inode {ino} is no directory")));
        }
        if record.nlink == 0 {
            return Err(Error::not_found(format!("directory {ino} was removed")));
        }
        Ok(record)
    }

    /// What a name stands for.
    pub(super) fn lookup(&self, parent: InodeNo, name: &FileName) -> Result<Option<Dirent>> {
        let value = self.txn.get(Cf::Dirent, &keys::dirent(parent, name.as_bytes()))?;
        let entry = value.map(|value| Dirent::decode(&value)).transpose();
        entry.map_err(|e| e.context(format!("directory {parent}, name {name}")))
    }

    /// What a name stands for, which must be there.
    pub(super) fn lookup_there(&self, parent: InodeNo, name: &FileName) -> Result<Dirent> {
        self.lookup(parent, name)?
            .ok_or_else(|| Error::not_found(format!("there is no {name} in directory {parent}")))
    }

    /// The record that an entry names.
    pub(super) fn entry_inode(&mut self, name: &FileName, entry: &Dirent) -> Result<Arc<InodeRecord>> {
        self.txn.inode(entry.inode)?.ok_or_else(|| {
            Error::corrupt(format!("name {name} stands for inode {}, which has no record", entry.inode))
        })
    }

    /// The attributes of a record.
    pub(super) fn attr(&self, ino: InodeNo, record: &InodeRecord) -> Attr {
        record.attr(ino, self.txn.chunk_bytes())
    }

    /// An answer of attributes.
    pub(super) fn answer(&self, ino: InodeNo, record: &InodeRecord) -> OpResult {
        OpResult { attr: Some(self.attr(ino, record)), created: true, ..OpResult::default() }
    }

    /// Fails if a name at the root is kept for the system.
    pub(super) fn check_name(&self, parent: InodeNo, name: &FileName) -> Result<()> {
        if parent == InodeNo::ROOT && RESERVED_AT_ROOT.contains(&name.as_bytes()) {
            return Err(Error::new(
                Reason::NotPermitted,
                format!("{name} at a shard's root is reserved: choose another name"),
            ));
        }
        Ok(())
    }

    /// Fails if somebody else has changed the inode of an operation that was lost: versions that were given since
    /// the shard was opened are greater than any that it had before.
    pub(super) fn check_repetition(&mut self, operation: &Operation, repetition: Repetition) -> Result<()> {
        let Some(ino) = operation.changed_inode() else {
            return Err(Error::internal("an operation that cannot be repeated was"));
        };
        // The operation says what a missing inode means.
        let Some(record) = self.txn.inode(ino)? else { return Ok(()) };
        if record.version < repetition.answered || Some(record.version) == repetition.own {
            return Ok(());
        }
        Err(Error::new(
            Reason::VersionMismatch,
            format!(
                "inode {ino} was changed by others after the shard had moved: what was not synced before that is lost"
            ),
        ))
    }

    /// A record of a new inode in a directory, with set-group-id and the default access control list passed on.
    pub(super) fn new_record(
        &mut self,
        parent: &InodeRecord,
        kind: FileKind,
        identity: Identity,
    ) -> Result<InodeRecord> {
        let acl::Inherited { mode, xattrs } =
            acl::inherit(parent, kind, identity.mode, identity.unmasked_mode)?;
        let mut mode = mode & shardfs_proto::types::attr::MODE_BITS;
        let mut gid = identity.gid;
        if parent.mode & SET_GID != 0 {
            gid = parent.gid;
            if kind == FileKind::Directory {
                mode |= SET_GID;
            }
        }
        let record = InodeRecord {
            kind,
            flags: 0,
            mode,
            uid: identity.uid,
            gid,
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            rdev: 0,
            size: 0,
            entries: 0,
            version: self.txn.version(),
            atime: self.now,
            mtime: self.now,
            ctime: self.now,
            btime: self.now,
            parent: None,
            content: Content::EMPTY,
            target: Bytes::new(),
            xattrs,
            indexes: Default::default(),
        };
        self.txn.grow(INODE_COST_BYTES + record.xattr_bytes() as u64);
        Ok(record)
    }

    /// Enters a name, as a new one (`cookie` = `None`) or in the place of one that was there.
    pub(super) fn add_name(
        &mut self,
        parent: InodeNo,
        name: &FileName,
        (inode, kind): (InodeNo, FileKind),
        cookie: Option<Cookie>,
    ) {
        let cookie = match cookie {
            Some(cookie) => cookie,
            None => self.txn.new_cookie(),
        };
        let bytes = name.as_bytes();
        let entry = CookieEntry { inode, kind, name: Bytes::copy_from_slice(bytes) };
        self.txn.put(Cf::Dirent, keys::dirent(parent, bytes), Dirent { inode, kind, cookie }.encode());
        self.txn.put(Cf::Cookie, keys::cookie(parent, cookie), entry.encode());
        self.txn.put(Cf::Parent, keys::parent(inode, parent, bytes), Bytes::new());
    }

    /// Removes a name's entries.
    pub(super) fn remove_name(&mut self, parent: InodeNo, name: &FileName, entry: &Dirent) {
        self.txn.delete(Cf::Dirent, keys::dirent(parent, name.as_bytes()));
        self.txn.delete(Cf::Cookie, keys::cookie(parent, entry.cookie));
        self.txn.delete(Cf::Parent, keys::parent(entry.inode, parent, name.as_bytes()));
    }

    /// Changes a directory whose entries changed: by so many entries and subdirectories.
    pub(super) fn touch_directory(&mut self, ino: InodeNo, entries: i64, subdirectories: i32) -> Result<()> {
        let mut record = InodeRecord::clone(&*self.inode(ino)?);
        let wrong = || Error::corrupt(format!("directory {ino}: its counts disagree with its entries"));
        record.entries = record.entries.checked_add_signed(entries).ok_or_else(wrong)?;
        record.nlink = record.nlink.checked_add_signed(subdirectories).ok_or_else(wrong)?;
        record.mtime = self.now;
        record.ctime = self.now;
        self.txn.put_inode(ino, record)?;
        Ok(())
    }

    /// Takes one name off an inode that is no directory; frees it, or makes it an orphan, with the last.
    pub(super) fn drop_link(&mut self, ino: InodeNo, record: &InodeRecord) -> Result<Arc<InodeRecord>> {
        let mut record = record.clone();
        record.nlink = record
            .nlink
            .checked_sub(1)
            .ok_or_else(|| Error::corrupt(format!("inode {ino} has a name and a link count of 0")))?;
        record.ctime = self.now;
        let left = record.nlink;
        let record = self.txn.put_inode(ino, record)?;
        if left == 0 {
            self.drop_unlinked(ino, &record)?;
        }
        Ok(record)
    }

    /// What becomes of an inode without a name: an orphan if it is held open, else nothing.
    pub(super) fn drop_unlinked(&mut self, ino: InodeNo, record: &InodeRecord) -> Result<()> {
        let holders = self.live.holders(ino);
        if holders.is_empty() {
            return self.free(ino, record);
        }
        self.set_orphan(ino, holders);
        Ok(())
    }

    /// Writes an orphan's holders, of which there are some.
    pub(super) fn set_orphan(&mut self, ino: InodeNo, holders: Vec<SessionId>) {
        self.txn.put(Cf::Sys, keys::orphan(ino), Orphan { holders: holders.clone() }.encode());
        self.effects.push(Effect::Orphan(ino, holders));
    }

    /// Removes an inode with its content and its locks.
    pub(super) fn free(&mut self, ino: InodeNo, record: &InodeRecord) -> Result<()> {
        if !self.live.locks(ino).is_empty() {
            self.put_locks(ino, Vec::new(), true);
        }
        self.txn.delete_content(&record.content, record.size);
        self.txn.remove_inode(ino)
    }

    /// Clears the set-id bits as a change of the content by an ordinary caller does.
    pub(super) fn kill_set_id(mode: u32) -> u32 {
        let mode = mode & !SET_UID;
        if mode & GROUP_EXEC != 0 { mode & !SET_GID } else { mode }
    }
}

/// Bytes for people.
pub(super) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = "bytes";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}
