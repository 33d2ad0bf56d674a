//! The room on a volume: what shards may still grow by.
//!
//! Invariants: growth is refused while less than the reserve is free, so that logs, compactions and
//! deletions always find room; the figure is at most [`REFRESH_PERIOD`] old. When even the reserve is used
//! up, the ballast file is given up, once, so that deletions go on; it comes back when there is room.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::{Result, clock};

use super::io_error;

/// How old the figures may be.
const REFRESH_PERIOD: Duration = Duration::from_millis(200);
/// Free bytes below which nothing may grow: at least this, for the logs and compactions of a few shards,
const RESERVE_BYTES_MIN: u64 = 64 << 20;
/// and at least this part of the volume, since larger ones compact larger files,
const RESERVE_PART: u64 = 32;
/// but no more than this.
const RESERVE_BYTES_MAX: u64 = 4 << 30;
/// Bytes of the ballast file.
const BALLAST_BYTES: u64 = 32 << 20;
/// Free bytes below which the ballast is given up.
const BALLAST_RELEASE_BELOW: u64 = 16 << 20;
/// The ballast file at the volume's root.
pub(super) const BALLAST_FILE: &str = ".ballast";

/// The room on one mounted volume.
pub struct VolumeRoom {
    root: PathBuf,
    figures: Mutex<Figures>,
}

#[derive(Clone, Copy)]
struct Figures {
    at: Instant,
    total_bytes: u64,
    free_bytes: u64,
    ballast: bool,
}

impl VolumeRoom {
    /// Of the volume mounted at `root`; makes its ballast file.
    pub fn new(root: &Path) -> Result<VolumeRoom> {
        let root = root.to_owned();
        let (total_bytes, free_bytes) = measure(&root)?;
        let figures = Figures { at: clock::monotonic(), total_bytes, free_bytes, ballast: false };
        let room = VolumeRoom { root, figures: Mutex::new(figures) };
        room.figures.lock().ballast = room.ballast_path().exists();
        room.keep_ballast(&mut room.figures.lock());
        Ok(room)
    }

    /// Bytes of the volume.
    pub fn total_bytes(&self) -> u64 {
        self.refreshed().total_bytes
    }

    /// Bytes free on it.
    pub fn free_bytes(&self) -> u64 {
        self.refreshed().free_bytes
    }

    /// Bytes by which shards may still grow.
    pub fn growth_bytes(&self) -> u64 {
        let figures = self.refreshed();
        figures.free_bytes.saturating_sub(reserve(figures.total_bytes))
    }

    fn refreshed(&self) -> Figures {
        let mut figures = self.figures.lock();
        if clock::monotonic().duration_since(figures.at) >= REFRESH_PERIOD {
            figures.at = clock::monotonic();
            match measure(&self.root) {
                Ok((total_bytes, free_bytes)) => {
                    figures.total_bytes = total_bytes;
                    figures.free_bytes = free_bytes;
                    self.keep_ballast(&mut figures);
                }
                Err(error) => {
                    tracing::warn!(%error, "the volume's room is not known: keeping the last figures")
                }
            }
        }
        *figures
    }

    fn ballast_path(&self) -> PathBuf {
        self.root.join(BALLAST_FILE)
    }

    fn keep_ballast(&self, figures: &mut Figures) {
        let path = self.ballast_path();
        if figures.ballast && figures.free_bytes < BALLAST_RELEASE_BELOW {
            tracing::warn!(root = %self.root.display(), "the volume is full: giving up its ballast");
            match fs::remove_file(&path) {
                Ok(()) => {
                    figures.ballast = false;
                    figures.free_bytes += BALLAST_BYTES;
                }
                Err(error) => tracing::warn!(%error, "ballast not removed"),
            }
        } else if !figures.ballast && figures.free_bytes > reserve(figures.total_bytes) + 2 * BALLAST_BYTES {
            match make_ballast(&path) {
                Ok(()) => {
                    figures.ballast = true;
                    figures.free_bytes -= BALLAST_BYTES;
                }
                Err(error) => {
                    tracing::debug!(%error, "no ballast");
                    let _ = fs::remove_file(&path);
                }
            }
        }
    }
}

/// Free bytes that are not for growth.
fn reserve(total_bytes: u64) -> u64 {
    (total_bytes / RESERVE_PART).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
}

fn make_ballast(path: &Path) -> std::io::Result<()> {
    let file = File::create(path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BALLAST_BYTES)?;
    Ok(())
}

fn measure(root: &Path) -> Result<(u64, u64)> {
    let stat =
        rustix::fs::statvfs(root).map_err(|e| io_error(format!("statfs of {}", root.display()))(e.into()))?;
    Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

impl crate::shard::Room for VolumeRoom {
    fn growth_bytes(&self) -> u64 {
        VolumeRoom::growth_bytes(self)
    }

    fn total_bytes(&self) -> u64 {
        VolumeRoom::total_bytes(self)
    }

    fn free_bytes(&self) -> u64 {
        VolumeRoom::free_bytes(self)
    }
}
