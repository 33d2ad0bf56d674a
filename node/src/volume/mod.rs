//! Volumes on this node: where shards' bytes live.
//!
//! [`VolumeProvider`] is what a kind of volume can do; `loopdev` and `dir` are the kinds there are. A volume
//! that is attached has a root folder for shards, an identity file in it that names cluster and volume, and
//! [`Room`](room::VolumeRoom).
//!
//! Invariants: every step may be repeated and may be cut off anywhere, the next attach cleans up; nothing that
//! is not certainly empty is ever formatted; a volume of another cluster or id is never served; a volume
//! that was attached once is never made anew. Nothing here knows shards or the metadata store.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Error, Reason, Result, VolumeId, clock};

pub mod dir;
pub mod loopdev;
pub mod mounts;
pub mod room;

/// The file at a volume's root that names cluster and volume.
const IDENTITY_FILE: &str = ".shardfs-volume";
/// The smallest backing file: an ext4 with its journal, and the reserve.
pub const LOOP_BYTES_MIN: u64 = 64 << 20;
/// The largest backing file: what ext4 with 4 KiB blocks and 32-bit group counts comfortably holds.
pub const LOOP_BYTES_MAX: u64 = 64 << 40;

/// How long the lock of a volume is waited for.
const LOCK_WAIT_MAX: Duration = Duration::from_millis(500);
/// Pause between attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// What is to be attached, and where.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// The volume.
    pub id: VolumeId,
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// The backing file or folder.
    pub source: PathBuf,
    /// Bytes of a backing file that is to be made.
    pub size_bytes: u64,
    /// It has been attached before: never make or format it.
    pub formatted: bool,
    /// Where shards will find it; this node's alone.
    pub mount_point: PathBuf,
}

/// A volume that is attached read-write.
#[derive(Debug)]
pub struct Attached {
    /// The folder that holds the shards.
    pub root: PathBuf,
    /// The device or folder behind it.
    pub device: String,
    /// While it is open nobody else on this machine attaches the volume for writing.
    lock: Option<OwnedFd>,
}

/// What is known about a volume without attaching it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// The backing file or folder is there.
    pub exists: bool,
    /// Bytes of the backing file; 0 for a folder.
    pub size_bytes: u64,
    /// The devices of this node that stand on it.
    pub devices: Vec<String>,
    /// It is attached at the mount point.
    pub mounted: bool,
}

/// A kind of volume. Blocking; call from a blocking thread.
pub trait VolumeProvider: Send + Sync {
    /// Makes the backing store unless it is there. Idempotent.
    fn create(&self, spec: &VolumeSpec) -> Result<()>;
    /// Makes the volume's content reachable for writing at the mount point, after cleaning up what a killed
    /// process of this node left behind. The volume was created before.
    fn attach(&self, spec: &VolumeSpec) -> Result<Attached>;
    /// The reverse. No file of the volume is open.
    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()>;
    /// What is known.
    fn describe(&self, spec: &VolumeSpec) -> Result<Description>;
}

/// The provider of a name.
pub fn provider(name: &str) -> Result<&'static dyn VolumeProvider> {
    match name {
        "loop" => Ok(&loopdev::LoopProvider),
        "dir" => Ok(&dir::DirProvider),
        other => {
            Err(Error::invalid(format!("volume provider {other:?} is not known: there are `loop` and `dir`")))
        }
    }
}

/// Checks a definition.
pub fn check_spec(id: &VolumeId, name: &str, size_bytes: u64) -> Result<()> {
    provider(name).map_err(|e| e.context(format!("volume {id}")))?;
    match name {
        "loop" if !(LOOP_BYTES_MIN..=LOOP_BYTES_MAX).contains(&size_bytes) => Err(Error::invalid(format!(
            "volume {id}: {size_bytes} bytes; a loop volume has {LOOP_BYTES_MIN} to {LOOP_BYTES_MAX}"
        ))),
        "dir" if size_bytes != 0 => Err(Error::invalid(format!(
            "volume {id}: a dir volume is as large as what it lies on; give size 0"
        ))),
        _ => Ok(()),
    }
}

#[derive(Serialize, Deserialize)]
struct Identity {
    v: u32,
    cluster: String,
    volume: VolumeId,
}

/// Checks that the folder is this volume's, or, if it is new, makes it so.
fn verify_identity(root: &Path, spec: &VolumeSpec) -> Result<()> {
    let path = root.join(IDENTITY_FILE);
    match fs::read(&path) {
        Ok(bytes) => {
            let identity: Identity = serde_json::from_slice(&bytes).map_err(|e| {
                Error::corrupt(format!("{}: {e}: the volume's identity is damaged", path.display()))
            })?;
            if identity.volume != spec.id || identity.cluster != spec.cluster_id {
                return Err(Error::invalid(format!(
                    "{} holds volume {} of cluster {}, not volume {} of cluster {}: it is left alone",
                    spec.source.display(),
                    identity.volume,
                    identity.cluster,
                    spec.id,
                    spec.cluster_id
                )));
            }
            Ok(())
        }
        Err(e) if e.kind() == ErrorKind::NotFound && spec.formatted => Err(Error::corrupt(format!(
            "{} was volume {} before and holds no {IDENTITY_FILE} now: its content was replaced or lost; put it back",
            spec.source.display(),
            spec.id
        ))),
        Err(e) if e.kind() == ErrorKind::NotFound => write_identity(root, spec),
        Err(e) => Err(io_error(&format!("reading {}", path.display()), &e)),
    }
}

fn write_identity(root: &Path, spec: &VolumeSpec) -> Result<()> {
    let identity = Identity { v: 1, cluster: spec.cluster_id.clone(), volume: spec.id.clone() };
    let bytes = serde_json::to_vec(&identity).expect("an identity is plain data");
    let (path, fresh) = (root.join(IDENTITY_FILE), root.join(format!("{IDENTITY_FILE}.new")));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(root)?.sync_all()
    };
    write().map_err(|e| io_error(&format!("writing {}", path.display()), &e))
}

/// Takes the lock of a file or folder that stands for attaching it for writing.
fn lock(path: &Path, what: &VolumeId) -> Result<OwnedFd> {
    let file = File::open(path).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    let begun = clock::monotonic();
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file.into()),
            // A program that was just started holds copies of all locks until it has begun to run.
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_WAIT_MAX => {
                std::thread::sleep(LOCK_PAUSE)
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::unavailable(format!(
                    "volume {what}: another process has {} attached for writing; it is tried again until that ends",
                    path.display()
                )));
            }
            Err(e) => return Err(Error::io(format!("locking {}: {e}", path.display()))),
        }
    }
}

/// An I/O error as a domain error.
fn io_error(doing: &str, error: &std::io::Error) -> Error {
    let reason = match error.kind() {
        ErrorKind::NotFound => Reason::NotFound,
        ErrorKind::PermissionDenied => Reason::NotPermitted,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Reason::VolumeFull,
        ErrorKind::ResourceBusy => Reason::Unavailable,
        _other => Reason::Io,
    };
    Error::new(reason, format!("{doing}: {error}"))
}

/// Makes the folder where volumes are mounted.
fn make_mount_point(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| io_error(&format!("making {}", path.display()), &e))
}
