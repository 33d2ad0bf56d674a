//! What tells one mutation from another that came under its number by mistake.
//!
//! A session's numbers are each given to one mutation; a caller that breaks this would get another mutation's
//! answer and take its own for done. The fingerprint lies in the result slot, so its bytes must not change from
//! one version to the next: a retry that spans an upgrade would be refused.

use shardfs_proto::types::op::{AllocateMode, IndexValue, NewInode, Operation, PutItem, PutOptions, SetTime};
use shardfs_proto::types::{InodeNo, LockKind, Timestamp};

use super::executor::Work;
use super::records::kind_to_u8;

/// A CRC-32C over a mutation's kind and all that it carries. Of a streamed Put: its key and options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprint(u32);

impl Fingerprint {
    /// Of a mutation.
    pub fn of(work: &Work) -> Fingerprint {
        let mut d = Digest(0);
        match work {
            Work::Operation(operation) | Work::Repeated(operation, _) => d.operation(operation),
            Work::Staged(put) => {
                d.number(100);
                d.bytes(put.key.as_bytes());
                d.options(&put.options);
            }
        }
        Fingerprint(d.0)
    }

    /// As it is stored.
    pub fn get(self) -> u32 {
        self.0
    }

    /// From the store.
    pub fn from_stored(stored: u32) -> Fingerprint {
        Fingerprint(stored)
    }
}

struct Digest(u32);

impl Digest {
    fn raw(&mut self, bytes: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, bytes);
    }

    fn number(&mut self, n: u64) {
        self.raw(&n.to_be_bytes());
    }

    fn flag(&mut self, flag: bool) {
        self.raw(&[flag.into()]);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.raw(bytes);
    }

    fn maybe<T>(&mut self, value: Option<T>, add: impl FnOnce(&mut Digest, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            add(self, value);
        }
    }

    fn time(&mut self, time: Timestamp) {
        self.number(time.seconds().cast_unsigned());
        self.number(time.nanos().into());
    }

    fn set_time(&mut self, time: SetTime) {
        match time {
            SetTime::Now => self.flag(false),
            SetTime::At(time) => {
                self.flag(true);
                self.time(time);
            }
        }
    }

    fn place(&mut self, parent: InodeNo, name: &[u8]) {
        self.number(parent.get());
        self.bytes(name);
    }

    fn inode(&mut self, inode: &NewInode) {
        let NewInode { mode, uid, gid, unmasked_mode } = *inode;
        // The last came later: without it, the bytes are those of before.
        [mode, uid, gid].into_iter().chain(unmasked_mode).for_each(|n| self.number(n.into()));
    }

    fn options(&mut self, options: &PutOptions) {
        let PutOptions { mode, uid, gid, mtime, indexes, if_absent, if_version } = options;
        for n in [mode, uid, gid] {
            self.maybe(*n, |d, n| d.number(n.into()));
        }
        self.maybe(*mtime, Digest::time);
        self.number(indexes.len() as u64);
        for (name, value) in indexes {
            self.bytes(name.as_bytes());
            match value {
                IndexValue::Text(text) => {
                    self.number(1);
                    self.bytes(text.as_bytes());
                }
                IndexValue::Integer(n) => {
                    self.number(2);
                    self.number(n.cast_unsigned());
                }
                IndexValue::Time(time) => {
                    self.number(3);
                    self.time(*time);
                }
            }
        }
        self.flag(*if_absent);
        self.maybe(*if_version, |d, version| d.number(version.get()));
    }

    fn item(&mut self, item: &PutItem) {
        self.bytes(item.key.as_bytes());
        self.bytes(&item.value);
        self.options(&item.options);
    }

    fn operation(&mut self, operation: &Operation) {
        match operation {
            Operation::Create { parent, name, kind, inode, rdev, existing_ok, open } => {
                self.number(1);
                self.place(*parent, name.as_bytes());
                self.number(kind_to_u8(*kind).into());
                self.inode(inode);
                self.number((*rdev).into());
                self.flag(*existing_ok);
                self.flag(*open);
            }
            Operation::MakeDirectory { parent, name, inode } => {
                self.number(2);
                self.place(*parent, name.as_bytes());
                self.inode(inode);
            }
            Operation::MakeSymlink { parent, name, target, inode } => {
                self.number(3);
                self.place(*parent, name.as_bytes());
                self.bytes(target);
                self.inode(inode);
            }
            Operation::Link { inode, new_parent, new_name } => {
                self.number(4);
                self.number(inode.get());
                self.place(*new_parent, new_name.as_bytes());
            }
            Operation::Unlink { parent, name } => {
                self.number(5);
                self.place(*parent, name.as_bytes());
            }
            Operation::RemoveDirectory { parent, name } => {
                self.number(6);
                self.place(*parent, name.as_bytes());
            }
            Operation::Rename { parent, name, new_parent, new_name, no_replace, exchange } => {
                self.number(7);
                self.place(*parent, name.as_bytes());
                self.place(*new_parent, new_name.as_bytes());
                self.flag(*no_replace);
                self.flag(*exchange);
            }
            Operation::SetAttr { inode, set } => {
                self.number(8);
                self.number(inode.get());
                for n in [set.mode, set.uid, set.gid] {
                    self.maybe(n, |d, n| d.number(n.into()));
                }
                self.maybe(set.size, Digest::number);
                self.maybe(set.atime, Digest::set_time);
                self.maybe(set.mtime, Digest::set_time);
                self.flag(set.kill_set_id);
            }
            Operation::Write { inode, offset, data, append, kill_set_id } => {
                self.number(9);
                self.number(inode.get());
                self.number(*offset);
                self.bytes(data);
                self.flag(*append);
                self.flag(*kill_set_id);
            }
            Operation::Allocate { inode, offset, length, mode, kill_set_id } => {
                self.number(10);
                self.number(inode.get());
                self.number(*offset);
                self.number(*length);
                self.number(match mode {
                    AllocateMode::Allocate { keep_size: false } => 1,
                    AllocateMode::Allocate { keep_size: true } => 2,
                    AllocateMode::PunchHole => 3,
                    AllocateMode::ZeroRange { keep_size: false } => 4,
                    AllocateMode::ZeroRange { keep_size: true } => 5,
                });
                // Versions that did not know it have made fingerprints without it.
                if *kill_set_id {
                    self.flag(true);
                }
            }
            Operation::SetXattr { inode, name, value, create_only, replace_only, kill_set_group_id } => {
                self.number(11);
                self.number(inode.get());
                self.bytes(name);
                self.bytes(value);
                self.flag(*create_only);
                self.flag(*replace_only);
                if *kill_set_group_id {
                    // Came later, as above.
                    self.flag(true);
                }
            }
            Operation::RemoveXattr { inode, name } => {
                self.number(12);
                self.number(inode.get());
                self.bytes(name);
            }
            Operation::PutValue { item } => {
                self.number(13);
                self.item(item);
            }
            Operation::PutValues { items, atomic } => {
                self.number(14);
                self.flag(*atomic);
                items.iter().for_each(|item| self.item(item));
            }
            Operation::DeleteValue { key, if_version } => {
                self.number(15);
                self.bytes(key.as_bytes());
                self.maybe(*if_version, |d, version| d.number(version.get()));
            }
            Operation::CopyRange {
                source,
                source_offset,
                destination,
                destination_offset,
                length,
                kill_set_id,
            } => {
                self.number(19);
                self.number(source.get());
                self.number(*source_offset);
                self.number(destination.get());
                self.number(*destination_offset);
                self.number(*length);
                self.flag(*kill_set_id);
            }
            Operation::SetLock { inode, owner, pid, range, kind } => {
                self.number(16);
                for n in [inode.get(), *owner, (*pid).into(), range.start(), range.end()] {
                    self.number(n);
                }
                self.number(match kind {
                    None => 0,
                    Some(LockKind::Read) => 1,
                    Some(LockKind::Write) => 2,
                });
            }
        }
    }
}
