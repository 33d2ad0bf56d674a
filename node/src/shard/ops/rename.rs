//! Rename: moves a name, replaces one, or exchanges two.
//!
//! A name keeps its cookie while it stays: the replaced name keeps its own, and a name that changes
//! within its directory keeps its place. So a program that renames what it reads does not meet it again.

use std::sync::Arc;

use shardfs_proto::types::op::OpResult;
use shardfs_proto::types::{Cookie, Error, FileKind, FileName, InodeNo, Reason, Result};

use super::Apply;
use super::names::exists;
use crate::shard::records::{Dirent, InodeRecord};

/// A name in a directory.
type Place<'a> = (InodeNo, &'a FileName);

impl Apply<'_, '_> {
    pub(super) fn rename(
        &mut self,
        from: Place<'_>,
        to: Place<'_>,
        no_replace: bool,
        exchange: bool,
    ) -> Result<OpResult> {
        if no_replace && exchange {
            return Err(Error::invalid("a rename cannot both refuse to replace and exchange"));
        }
        self.directory(from.0)?;
        self.directory(to.0)?;
        let source = self.lookup_there(from.0, from.1)?;
        let target = self.lookup(to.0, to.1)?;
        self.check_name(to.0, to.1)?;
        if no_replace && target.is_some() {
            return Err(exists(to.0, to.1));
        }
        let record = self.entry_inode(from.1, &source)?;
        let mut record = InodeRecord::clone(&record);
        if source.kind == FileKind::Directory && from.0 != to.0 {
            let height = self.check_move((source.inode, &record), from.0, to.0)?;
            record.set_height_bound(height);
        }
        match target {
            None if exchange => Err(Error::not_found(format!("there is no {} in directory {}", to.1, to.0))),
            Some(target) if target.inode == source.inode => Ok(self.answer(source.inode, &record)),
            Some(target) if exchange => self.exchange(from, to, &source, &target, &record),
            target => self.move_name(from, to, &source, target.as_ref(), &record),
        }
    }

    fn move_name(
        &mut self,
        from: Place<'_>,
        to: Place<'_>,
        source: &Dirent,
        target: Option<&Dirent>,
        record: &InodeRecord,
    ) -> Result<OpResult> {
        let directory = source.kind == FileKind::Directory;
        let mut cookie: Option<Cookie> = (from.0 == to.0).then_some(source.cookie);
        let mut replaced_directory = false;
        if let Some(target) = target {
            let replaced = self.entry_inode(to.1, target)?;
            replaced_directory = target.kind == FileKind::Directory;
            match (directory, replaced_directory) {
                (true, false) => {
                    return Err(Error::new(
                        Reason::NotDirectory,
                        format!("{} is there and no directory", to.1),
                    ));
                }
                (false, true) => {
                    return Err(Error::new(
                        Reason::IsDirectory,
                        format!("{} is there and a directory", to.1),
                    ));
                }
                (true, true) if replaced.entries != 0 => {
                    return Err(Error::new(Reason::NotEmpty, format!("directory {} is not empty", to.1)));
                }
                (true, true) | (false, false) => {}
            }
            self.remove_name(to.0, to.1, target);
            cookie = Some(target.cookie);
            if replaced_directory {
                self.drop_directory(target.inode, &replaced)?;
            } else {
                self.drop_link(target.inode, &replaced)?;
            }
        }
        self.remove_name(from.0, from.1, source);
        self.add_name(to.0, to.1, (source.inode, source.kind), cookie);
        let gone = i64::from(target.is_some());
        let gone_directories = i32::from(replaced_directory);
        if from.0 == to.0 {
            self.touch_directory(from.0, -gone, -gone_directories)?;
        } else {
            self.touch_directory(from.0, -1, -i32::from(directory))?;
            self.touch_directory(to.0, 1 - gone, i32::from(directory) - gone_directories)?;
        }
        let record = self.moved(source.inode, record, to.0)?;
        Ok(self.answer(source.inode, &record))
    }

    fn exchange(
        &mut self,
        from: Place<'_>,
        to: Place<'_>,
        source: &Dirent,
        target: &Dirent,
        record: &InodeRecord,
    ) -> Result<OpResult> {
        let mut other = InodeRecord::clone(&*self.entry_inode(to.1, target)?);
        if target.kind == FileKind::Directory && from.0 != to.0 {
            let height = self.check_move((target.inode, &other), to.0, from.0)?;
            other.set_height_bound(height);
        }
        self.check_name(from.0, from.1)?;
        self.remove_name(from.0, from.1, source);
        self.remove_name(to.0, to.1, target);
        self.add_name(to.0, to.1, (source.inode, source.kind), Some(target.cookie));
        self.add_name(from.0, from.1, (target.inode, target.kind), Some(source.cookie));
        let (a, b) = (source.kind == FileKind::Directory, target.kind == FileKind::Directory);
        if from.0 == to.0 {
            self.touch_directory(from.0, 0, 0)?;
        } else {
            self.touch_directory(from.0, 0, i32::from(b) - i32::from(a))?;
            self.touch_directory(to.0, 0, i32::from(a) - i32::from(b))?;
        }
        self.moved(target.inode, &other, from.0)?;
        let record = self.moved(source.inode, record, to.0)?;
        Ok(self.answer(source.inode, &record))
    }

    /// Notes a move in what was moved.
    fn moved(&mut self, ino: InodeNo, record: &InodeRecord, parent: InodeNo) -> Result<Arc<InodeRecord>> {
        let mut record = record.clone();
        record.ctime = self.now;
        if record.kind == FileKind::Directory {
            record.parent = Some(parent);
        }
        self.txn.put_inode(ino, record)
    }
}
