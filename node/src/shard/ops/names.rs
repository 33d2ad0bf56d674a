//! Operations that make and remove names.

use bytes::Bytes;
use shardfs_proto::types::limits::{LINKS_MAX, SYMLINK_BYTES_MAX};
use shardfs_proto::types::op::{NewInode, OpResult};
use shardfs_proto::types::{Error, FileKind, FileName, InodeNo, Reason, Result};

use super::{Apply, Identity};
use crate::shard::records::{INODE_COST_BYTES, InodeRecord};
use crate::shard::session::{Effect, unknown};

impl From<NewInode> for Identity {
    fn from(new: NewInode) -> Identity {
        Identity { mode: new.mode, uid: new.uid, gid: new.gid, unmasked_mode: new.unmasked_mode }
    }
}

impl Apply<'_, '_> {
    #[allow(clippy::too_many_arguments)] // The fields of Operation::Create.
    pub(super) fn create(
        &mut self,
        parent: InodeNo,
        name: &FileName,
        kind: FileKind,
        new: NewInode,
        rdev: u32,
        existing_ok: bool,
        open: bool,
    ) -> Result<OpResult> {
        let rdev = match kind {
            FileKind::CharDevice | FileKind::BlockDevice => rdev,
            FileKind::Regular | FileKind::Fifo | FileKind::Socket => 0,
            FileKind::Directory | FileKind::Symlink => {
                return Err(Error::invalid("Create makes no directories and no symlinks"));
            }
        };
        let directory = self.directory(parent)?;
        self.check_name(parent, name)?;
        if let Some(entry) = self.lookup(parent, name)? {
            if !(existing_ok && entry.kind == FileKind::Regular) {
                return Err(exists(parent, name));
            }
            let record = self.entry_inode(name, &entry)?;
            if open {
                self.note_open(entry.inode)?;
            }
            return Ok(OpResult { created: false, ..self.answer(entry.inode, &record) });
        }
        let mut record = self.new_record(&directory, kind, new.into())?;
        record.rdev = rdev;
        let (ino, result) = self.enter(parent, name, record)?;
        if open {
            self.note_open(ino)?;
        }
        Ok(result)
    }

    /// Registers an open with the asking session.
    fn note_open(&mut self, ino: InodeNo) -> Result<()> {
        let session = self.session.ok_or_else(|| Error::invalid("opening a file needs a session"))?;
        self.live.check_open(session)?;
        self.effects.push(Effect::Opens(session, ino, 1));
        Ok(())
    }

    /// Gives a new inode its number and its name.
    pub(super) fn enter(
        &mut self,
        parent: InodeNo,
        name: &FileName,
        record: InodeRecord,
    ) -> Result<(InodeNo, OpResult)> {
        let ino = self.txn.new_inode_number()?;
        let kind = record.kind;
        let record = self.txn.put_inode(ino, record)?;
        self.add_name(parent, name, (ino, kind), None);
        self.touch_directory(parent, 1, i32::from(kind == FileKind::Directory))?;
        Ok((ino, self.answer(ino, &record)))
    }

    pub(super) fn make_directory(
        &mut self,
        parent: InodeNo,
        name: &FileName,
        new: NewInode,
    ) -> Result<OpResult> {
        let directory = self.directory(parent)?;
        self.check_name(parent, name)?;
        if self.lookup(parent, name)?.is_some() {
            return Err(exists(parent, name));
        }
        let height = self.check_depth(parent)?;
        let mut record = self.new_record(&directory, FileKind::Directory, new.into())?;
        record.parent = Some(parent);
        record.set_height_bound(height);
        Ok(self.enter(parent, name, record)?.1)
    }

    pub(super) fn make_symlink(
        &mut self,
        parent: InodeNo,
        name: &FileName,
        target: &Bytes,
        new: NewInode,
    ) -> Result<OpResult> {
        if target.is_empty() {
            return Err(Error::not_found("a symlink's target is empty"));
        }
        if target.len() > SYMLINK_BYTES_MAX {
            return Err(Error::new(
                Reason::NameTooLong,
                format!("a symlink's target has {} bytes; the limit is {SYMLINK_BYTES_MAX}", target.len()),
            ));
        }
        let directory = self.directory(parent)?;
        self.check_name(parent, name)?;
        if self.lookup(parent, name)?.is_some() {
            return Err(exists(parent, name));
        }
        let mut record =
            self.new_record(&directory, FileKind::Symlink, Identity { mode: 0o777, ..new.into() })?;
        record.target = target.clone();
        Ok(self.enter(parent, name, record)?.1)
    }

    pub(super) fn link(&mut self, ino: InodeNo, parent: InodeNo, name: &FileName) -> Result<OpResult> {
        let record = self.inode(ino)?;
        if record.kind == FileKind::Directory {
            return Err(Error::new(
                Reason::NotPermitted,
                format!("inode {ino}: directories have one name only"),
            ));
        }
        if record.nlink == 0 {
            return Err(Error::not_found(format!("inode {ino} was removed")));
        }
        self.directory(parent)?;
        self.check_name(parent, name)?;
        if self.lookup(parent, name)?.is_some() {
            return Err(exists(parent, name));
        }
        if record.nlink >= LINKS_MAX {
            return Err(Error::new(
                Reason::TooManyLinks,
                format!("inode {ino} has {LINKS_MAX} names, the limit"),
            ));
        }
        let mut record = InodeRecord::clone(&record);
        record.nlink += 1;
        record.ctime = self.now;
        let kind = record.kind;
        let record = self.txn.put_inode(ino, record)?;
        self.txn.grow(INODE_COST_BYTES);
        self.add_name(parent, name, (ino, kind), None);
        self.touch_directory(parent, 1, 0)?;
        Ok(self.answer(ino, &record))
    }

    pub(super) fn unlink(&mut self, parent: InodeNo, name: &FileName) -> Result<OpResult> {
        self.directory(parent)?;
        let entry = self.lookup_there(parent, name)?;
        if entry.kind == FileKind::Directory {
            return Err(Error::new(
                Reason::IsDirectory,
                format!("{name} in directory {parent} is a directory"),
            ));
        }
        let record = self.entry_inode(name, &entry)?;
        self.remove_name(parent, name, &entry);
        self.touch_directory(parent, -1, 0)?;
        let record = self.drop_link(entry.inode, &record)?;
        Ok(self.answer(entry.inode, &record))
    }

    pub(super) fn remove_directory(&mut self, parent: InodeNo, name: &FileName) -> Result<OpResult> {
        self.directory(parent)?;
        let entry = self.lookup_there(parent, name)?;
        if entry.kind != FileKind::Directory {
            return Err(Error::new(
                Reason::NotDirectory,
                format!("{name} in directory {parent} is no directory"),
            ));
        }
        let record = self.entry_inode(name, &entry)?;
        if record.entries != 0 {
            return Err(Error::new(Reason::NotEmpty, format!("directory {name} is not empty")));
        }
        self.remove_name(parent, name, &entry);
        self.touch_directory(parent, -1, -1)?;
        let record = self.drop_directory(entry.inode, &record)?;
        Ok(self.answer(entry.inode, &record))
    }

    /// Takes the name off an empty directory.
    pub(super) fn drop_directory(
        &mut self,
        ino: InodeNo,
        record: &InodeRecord,
    ) -> Result<std::sync::Arc<InodeRecord>> {
        let mut record = record.clone();
        record.nlink = 0;
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        self.drop_unlinked(ino, &record)?;
        Ok(record)
    }

    /// The asking session, which the operation needs.
    pub(super) fn asking(&self) -> Result<shardfs_proto::types::SessionId> {
        let session = self.session.ok_or_else(|| Error::invalid("the call needs a session"))?;
        if self.live.is_known(session) { Ok(session) } else { Err(unknown(session)) }
    }
}

pub(super) fn exists(parent: InodeNo, name: &FileName) -> Error {
    Error::new(Reason::AlreadyExists, format!("{name} is in directory {parent} already"))
}
