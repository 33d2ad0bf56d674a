//! What a parent and its daemons know of each other, in a file without a name (memfd) that the parent keeps open: what a daemon has
//! written there outlives it, however it ends.
//!
//! One line of JSON ([`Told`]); behind it, from [`SLOTS_AT`], slots of [`SLOT_BYTES`]: a session that the daemon has with a shard (shard
//! and id, little endian), or zeros.
//!
//! Invariants: one daemon writes at a time. A slot lies within a page and is written by one call, so that it is written whole or not at
//! all, whatever kills the writer. A slot is taken before its session is used, and given back when the session has ended: the
//! next daemon finds there what the dead one has left, and takes over the slots as they are.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use shardfs_proto::client::SessionWatcher;
use shardfs_proto::types::{SessionId, ShardId};

use crate::mounts::{self, FS_TYPE, Mount, MountId};

/// Its name, which /proc shows.
pub const NAME: &str = "shardfsd-records";
/// Where the slots begin: more than a line with the longest path needs.
const SLOTS_AT: u64 = 64 << 10;
/// Divides a page.
const SLOT_BYTES: usize = 16;
/// Sessions that are noted; more expire by themselves.
const SLOTS_MAX: u64 = 1 << 20;
/// Bytes of a reason that are kept.
const WORDS_BYTES_MAX: usize = 1024;

/// Where a daemon has mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Place {
    path: Vec<u8>,
    /// Which mount it is; `None` before that is known: then a ShardFS mount there that is dead is it.
    pub mount: Option<MountId>,
    /// By fusermount3, so that unmounting must go the same way.
    pub by_helper: bool,
}

impl Place {
    /// At a canonical path.
    pub fn new(path: &Path, mount: Option<MountId>, by_helper: bool) -> Place {
        Place { path: path.as_os_str().as_bytes().to_vec(), mount, by_helper }
    }

    /// The mount point.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.path.clone()))
    }

    /// Whether the mount is there, maybe below another one.
    pub fn is_there(&self) -> Result<bool> {
        Ok(mounts::all()?.iter().any(|mount| self.is(mount)))
    }

    /// Whether it is the mount that a lookup of its path meets.
    pub fn is_on_top(&self) -> Result<bool> {
        Ok(mounts::at(&self.path())?.is_some_and(|mount| self.is(&mount)))
    }

    /// Whether that mount is it.
    pub fn is(&self, mount: &Mount) -> bool {
        mount.fs_type == FS_TYPE
            && mount.mount_point == self.path()
            && self.mount.is_none_or(|id| id == mount.id)
    }
}

/// Why a daemon gave up by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failed {
    /// In words for people.
    pub words: String,
    /// The settings are wrong, which no restart mends.
    pub refused: bool,
}

/// What the daemon has told.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Where it has mounted, or was about to.
    pub place: Option<Place>,
    /// Why it ends.
    pub failed: Option<Failed>,
}

/// See the module's comment.
pub struct Records {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    taken: HashMap<(ShardId, SessionId), u64>,
    free: Vec<u64>,
    /// Slots that the file has.
    count: u64,
}

impl Records {
    /// Empty ones.
    pub fn create() -> Result<Records> {
        let file = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC).context("making a file in memory")?;
        Ok(Records { file: file.into(), slots: Mutex::default() })
    }

    /// Those that a parent has given to this process.
    pub fn taken_over(file: OwnedFd) -> Result<Records> {
        let file = File::from(file);
        let slots = read_slots(&file).context("reading what the daemon before this one has left")?;
        Ok(Records { file, slots: Mutex::new(slots) })
    }

    /// What was told last. A line that was not written to its end tells nothing.
    pub fn told(&self) -> Told {
        let mut bytes = vec![0; SLOTS_AT as usize];
        let length = read_up_to(&self.file, &mut bytes, 0).unwrap_or(0);
        let line = bytes[..length].split(|byte| *byte == b'\n').next().unwrap_or_default();
        serde_json::from_slice(line).unwrap_or_default()
    }

    /// Tells where the mount is.
    pub fn note_place(&self, place: Place) -> Result<()> {
        self.tell(&Told { place: Some(place), ..self.told() })
    }

    /// Tells why the daemon ends.
    pub fn note_failure(&self, error: &anyhow::Error, refused: bool) -> Result<()> {
        let mut words = format!("{error:#}");
        while words.len() > WORDS_BYTES_MAX {
            words.pop();
        }
        self.tell(&Told { failed: Some(Failed { words, refused }), ..self.told() })
    }

    /// Of the daemon that comes, nothing is known but where the mount is.
    pub fn begin_anew(&self) -> Result<()> {
        self.tell(&Told { failed: None, ..self.told() })
    }

    fn tell(&self, told: &Told) -> Result<()> {
        let mut line = serde_json::to_vec(told).context("what is told to the parent")?;
        line.push(b'\n');
        self.file.write_all_at(&line, 0).context("telling the parent")
    }

    /// The sessions that are noted.
    pub fn sessions(&self) -> Vec<(ShardId, SessionId)> {
        self.slots.lock().taken.keys().copied().collect()
    }

    fn write_slot(&self, slot: u64, shard: u64, session: u64) {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..8].copy_from_slice(&shard.to_le_bytes());
        bytes[8..].copy_from_slice(&session.to_le_bytes());
        if let Err(error) = self.file.write_all_at(&bytes, SLOTS_AT + slot * SLOT_BYTES as u64) {
            tracing::warn!(%error, shard, "a session is not noted: if this daemon dies, the session ends by itself, later");
        }
    }
}

impl AsFd for Records {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl SessionWatcher for Records {
    fn began(&self, shard: ShardId, session: SessionId) {
        let mut slots = self.slots.lock();
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None if slots.count < SLOTS_MAX => {
                slots.count += 1;
                slots.count - 1
            }
            None => return,
        };
        slots.taken.insert((shard, session), slot);
        self.write_slot(slot, shard.get(), session.get());
    }

    fn ended(&self, shard: ShardId, session: SessionId) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.taken.remove(&(shard, session)) {
            self.write_slot(slot, 0, 0);
            slots.free.push(slot);
        }
    }
}

fn read_slots(file: &File) -> std::io::Result<Slots> {
    let length = file.metadata()?.len().saturating_sub(SLOTS_AT);
    let count = (length / SLOT_BYTES as u64).min(SLOTS_MAX);
    let mut bytes = vec![0; count as usize * SLOT_BYTES];
    file.read_exact_at(&mut bytes, SLOTS_AT)?;
    let mut slots = Slots { count, ..Slots::default() };
    for (slot, bytes) in (0..).zip(bytes.chunks_exact(SLOT_BYTES)) {
        let (shard, session) = bytes.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        match (ShardId::new(number(shard)), SessionId::new(number(session))) {
            (Ok(shard), Some(session)) => {
                slots.taken.insert((shard, session), slot);
            }
            _ => slots.free.push(slot),
        }
    }
    Ok(slots)
}

fn read_up_to(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], at + length as u64)? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(shard: u64, id: u64) -> (ShardId, SessionId) {
        (ShardId::new(shard).unwrap(), SessionId::new(id).unwrap())
    }

    /// As the next daemon finds them.
    fn next(records: &Records) -> Records {
        Records::taken_over(records.file.try_clone().unwrap().into()).unwrap()
    }

    #[test]
    fn what_a_daemon_tells_is_found_by_the_next() {
        let records = Records::create().unwrap();
        assert_eq!(records.told(), Told::default());
        let id = MountId { mount: 7, device: (0, 52) };
        let place = Place::new(Path::new("/mnt/a b\n\u{e4}"), Some(id), true);
        records.note_place(place.clone()).unwrap();
        records.note_failure(&anyhow::anyhow!("{}", "\u{e4}".repeat(WORDS_BYTES_MAX)), true).unwrap();
        let told = next(&records).told();
        assert_eq!(told.place.as_ref(), Some(&place));
        assert_eq!(place.path(), Path::new("/mnt/a b\n\u{e4}"));
        assert!(told.failed.is_some_and(|failed| failed.refused && failed.words.len() <= WORDS_BYTES_MAX));
        records.begin_anew().unwrap();
        assert_eq!(records.told(), Told { place: Some(place), failed: None });
    }

    #[test]
    fn the_longest_path_fits_before_the_slots() {
        let records = Records::create().unwrap();
        let path = PathBuf::from(OsString::from_vec(vec![0xff; libc::PATH_MAX as usize]));
        records.note_place(Place::new(&path, None, false)).unwrap();
        records.note_failure(&anyhow::anyhow!("{}", "\u{1}".repeat(WORDS_BYTES_MAX)), false).unwrap();
        assert!(records.file.metadata().unwrap().len() < SLOTS_AT);
        assert_eq!(records.told().place.unwrap().path(), path);
    }

    #[test]
    fn sessions_outlive_their_daemon_until_they_end() {
        let records = Records::create().unwrap();
        for (shard, id) in [session(1, 10), session(2, 20), session(3, 30)] {
            records.began(shard, id);
        }
        let (shard, id) = session(2, 20);
        records.ended(shard, id);
        records.ended(shard, id);
        let second = next(&records);
        let mut left = second.sessions();
        left.sort();
        assert_eq!(left, [session(1, 10), session(3, 30)]);
        // What is free is used again; what was left stays until it has ended, whoever dies meanwhile.
        let (shard, id) = session(4, 40);
        second.began(shard, id);
        let length = records.file.metadata().unwrap().len();
        assert_eq!(length, SLOTS_AT + 3 * SLOT_BYTES as u64);
        let (shard, id) = session(1, 10);
        second.ended(shard, id);
        let mut left = next(&second).sessions();
        left.sort();
        assert_eq!(left, [session(3, 30), session(4, 40)]);
    }

    #[test]
    fn a_mount_is_known_by_its_numbers() {
        let id = MountId { mount: 7, device: (0, 52) };
        let mount = Mount { id, mount_point: "/mnt/x".into(), fs_type: FS_TYPE.to_owned() };
        let place = |id| Place::new(Path::new("/mnt/x"), id, false);
        assert!(place(Some(id)).is(&mount) && place(None).is(&mount));
        assert!(!place(Some(MountId { mount: 8, ..id })).is(&mount));
        assert!(!place(Some(MountId { device: (0, 53), ..id })).is(&mount));
        assert!(!place(Some(id)).is(&Mount { fs_type: "fuse.other".to_owned(), ..mount.clone() }));
        assert!(!place(None).is(&Mount { mount_point: "/mnt/y".into(), ..mount }));
    }
}
