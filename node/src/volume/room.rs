//! How much shards may still grow on a volume, and what keeps a full volume workable.
//!
//! Shards are refused growth while a reserve is still free, so that deletes, flushes and compactions have
//! room. Should that be used up all the same, the ballast file is given back and made again when there is room.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::clock;

/// Age that a reading of the filesystem may have.
const READING_AGE_MAX: Duration = Duration::from_millis(200);
/// The least reserve: a RocksDB write buffer or two, written out.
const RESERVE_BYTES_MIN: u64 = 64 << 20;
/// The most: more than the compactions that run at a time need.
const RESERVE_BYTES_MAX: u64 = 4 << 30;
/// Part of the volume that is reserved between those, in percent.
const RESERVE_PERCENT: u64 = 3;
/// A small volume reserves no more than this part of it.
const RESERVE_SHARE_MAX: u64 = 4;
/// The ballast's part of the reserve.
const BALLAST_SHARE: u64 = 4;
/// The largest ballast.
const BALLAST_BYTES_MAX: u64 = 64 << 20;
/// Its name at the volume's root.
const BALLAST_FILE: &str = ".shardfs-ballast";

/// A volume's room. Cheap to ask.
#[derive(Debug)]
pub struct VolumeRoom {
    root: PathBuf,
    reading: Mutex<Option<(Instant, Reading)>>,
    /// Bytes written since the reading.
    written: AtomicU64,
    /// Bytes that flushes will write.
    unflushed: AtomicU64,
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Reading {
    total_bytes: u64,
    free_bytes: u64,
}

impl VolumeRoom {
    /// Of the volume with this root.
    pub fn new(root: PathBuf) -> VolumeRoom {
        VolumeRoom { root, reading: Mutex::new(None), written: 0.into(), unflushed: 0.into() }
    }

    /// Bytes by which shards may still grow. 0 if the volume cannot be asked.
    pub fn growth_bytes(&self) -> u64 {
        let reading = self.read();
        reading
            .free_bytes
            .saturating_sub(reserve_bytes(reading.total_bytes))
            .saturating_sub(self.written.load(Ordering::Relaxed))
            .saturating_sub(self.unflushed.load(Ordering::Relaxed))
    }

    /// Notes bytes added to a log.
    pub fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes that a shard's bytes which flushes will write were `before` and are `now`.
    pub fn unflushed(&self, before: u64, now: u64) {
        if now >= before {
            self.unflushed.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.unflushed.fetch_sub(before - now, Ordering::Relaxed);
        }
    }

    /// Forgets the last reading.
    pub fn look_again(&self) {
        *self.reading.lock() = None;
    }

    /// Bytes in all.
    pub fn total_bytes(&self) -> u64 {
        self.read().total_bytes
    }

    /// Bytes free, the reserve included.
    pub fn free_bytes(&self) -> u64 {
        self.read().free_bytes
    }

    fn read(&self) -> Reading {
        let now = clock::monotonic();
        let mut kept = self.reading.lock();
        if let Some((when, reading)) = *kept
            && now.saturating_duration_since(when) < READING_AGE_MAX
        {
            return reading;
        }
        let reading = match rustix::fs::statvfs(&self.root) {
            Ok(stat) => Reading {
                total_bytes: stat.f_blocks * stat.f_frsize,
                free_bytes: stat.f_bavail * stat.f_frsize,
            },
            Err(error) => {
                tracing::error!(root = %self.root.display(), %error, "a volume's room cannot be read");
                Reading::default()
            }
        };
        self.written.store(0, Ordering::Relaxed);
        *kept = Some((now, reading));
        reading
    }

    /// Keeps the ballast: gives it back when the volume is nearly full, makes it again when there is room.
    /// Blocking; called about once a second.
    pub fn tend(&self) {
        self.look_again();
        let reading = self.read();
        let path = self.root.join(BALLAST_FILE);
        let bytes = ballast_bytes(reading.total_bytes);
        match (path.exists(), decide(reading, bytes)) {
            (true, Ballast::Release) => match fs::remove_file(&path) {
                Ok(()) => {
                    tracing::warn!(root = %self.root.display(), "the volume is full: gave back its ballast")
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "the ballast cannot be given back")
                }
            },
            (false, Ballast::Make) => {
                if let Err(error) = make_ballast(&path, bytes) {
                    tracing::warn!(path = %path.display(), %error, "the ballast cannot be made");
                    // What was written of it is of no use.
                    let _ = fs::remove_file(&path);
                }
            }
            (true, Ballast::Make | Ballast::Leave) | (false, Ballast::Release | Ballast::Leave) => {}
        }
    }
}

enum Ballast {
    Release,
    Make,
    Leave,
}

fn decide(reading: Reading, bytes: u64) -> Ballast {
    if reading.total_bytes == 0 {
        Ballast::Leave
    } else if reading.free_bytes < bytes / 2 {
        Ballast::Release
    } else if reading.free_bytes > reserve_bytes(reading.total_bytes) + 2 * bytes {
        Ballast::Make
    } else {
        Ballast::Leave
    }
}

fn make_ballast(path: &Path, bytes: u64) -> std::io::Result<()> {
    let file = File::create(path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    file.sync_all()
}

fn reserve_bytes(total: u64) -> u64 {
    (total / 100 * RESERVE_PERCENT).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX).min(total / RESERVE_SHARE_MAX)
}

fn ballast_bytes(total: u64) -> u64 {
    (reserve_bytes(total) / BALLAST_SHARE).min(BALLAST_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_fits_the_volume() {
        assert_eq!(reserve_bytes(100 << 20), 25 << 20);
        assert_eq!(reserve_bytes(1 << 30), 64 << 20);
        assert_eq!(reserve_bytes(100 << 30), (100 << 30) / 100 * 3);
        assert_eq!(reserve_bytes(100 << 40), 4 << 30);
    }

    #[test]
    fn the_ballast_goes_last_and_comes_back_late() {
        let total = 1 << 30;
        let bytes = ballast_bytes(total);
        let at = |free_bytes| decide(Reading { total_bytes: total, free_bytes }, bytes);
        assert!(matches!(at(0), Ballast::Release));
        assert!(matches!(at(bytes), Ballast::Leave));
        assert!(matches!(at(reserve_bytes(total)), Ballast::Leave));
        assert!(matches!(at(total), Ballast::Make));
    }

    #[test]
    fn what_is_not_flushed_is_spoken_for() {
        let dir = tempfile::tempdir().unwrap();
        let room = VolumeRoom::new(dir.path().to_owned());
        let all = 1 << 60;
        room.unflushed(0, all);
        assert_eq!(room.growth_bytes(), 0);
        room.unflushed(all, 0);
        // A reading that does not age.
        let reading = Reading { total_bytes: 1 << 30, free_bytes: 1 << 30 };
        *room.reading.lock() = Some((clock::monotonic() + Duration::from_secs(3600), reading));
        let before = room.growth_bytes();
        room.wrote(1 << 20);
        assert_eq!(room.growth_bytes(), before - (1 << 20));
        room.look_again();
        room.read();
        assert_eq!(room.written.load(Ordering::Relaxed), 0, "a new reading shows what was written");
        assert_eq!(room.unflushed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn reads_a_real_filesystem() {
        let dir = tempfile::tempdir().unwrap();
        let room = VolumeRoom::new(dir.path().to_owned());
        assert!(room.total_bytes() > 0);
        assert!(room.growth_bytes() <= room.free_bytes());
        assert_eq!(VolumeRoom::new(dir.path().join("gone")).growth_bytes(), 0);
    }
}
