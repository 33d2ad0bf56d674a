//! Volumes on this node: where shards' bytes live.
//!
//! [`VolumeProvider`] is what a kind of volume can do; `loopdev`, `device` and `dir` are the kinds there are. A volume
//! that is attached has a root folder for shards, an identity file in it that names cluster and volume, and
//! [`Room`](room::VolumeRoom).
//!
//! A backup has a [`Standby`]: the device, not mounted. The winner of an election acquires the volume's
//! [fence](fence::Fence) with it and promotes it; an [`Attached`] is demoted to one again.
//!
//! Invariants: every step may be repeated and may be cut off anywhere, the next attach cleans up; nothing that
//! is not certainly empty is ever formatted; a volume of another cluster or id is never served; a volume
//! that was attached once is never made anew. Nothing here knows shards or the metadata store.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use images::Images;
use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Error, Reason, Result, VolumeId, clock};
use views::ViewMount;

#[cfg(feature = "aws")]
pub mod aws;
pub mod cloud;
pub mod device;
pub mod dir;
pub mod ebs;
mod ext4;
pub mod fence;
pub mod images;
pub mod leftovers;
pub mod loopdev;
pub mod mounts;
pub mod nvme;
pub mod room;
pub mod views;

/// The file at a volume's root that names cluster and volume.
const IDENTITY_FILE: &str = ".shardfs-volume";
/// The format of that file, and with it of what lies beside it: the folders of shards. A later one is refused.
const IDENTITY_FORMAT: u32 = 1;
/// The provider of whole block devices.
pub const DEVICE: &str = "device";
/// The provider of EBS volumes.
pub const AWS: &str = "aws";
/// What EBS counts in.
pub const GIB: u64 = 1 << 30;
/// The smallest backing file or device: an ext4 with its journal, and the reserve.
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
    /// The backing file, device or folder; a device as this node calls it.
    pub source: PathBuf,
    /// Bytes of a backing file that is to be made.
    pub size_bytes: u64,
    /// It has been attached before: never make or format it.
    pub formatted: bool,
    /// Where shards will find it; this node's alone.
    pub mount_point: PathBuf,
    /// It is served even if it has no working fence; see [`fence::required`].
    pub allow_unfenced: bool,
}

/// A volume that this node stands by for: attached, not mounted. Of no use to anybody once it is dropped
/// without [`VolumeProvider::detach_backup`]; the next attachment cleans up.
#[derive(Debug)]
pub struct Standby {
    /// The device or folder.
    device: PathBuf,
    /// While it is open, this node's process lives.
    owner: Option<OwnedFd>,
}

impl Standby {
    /// The device or folder.
    pub fn device(&self) -> &Path {
        &self.device
    }
}

/// A volume that is attached read-write.
#[derive(Debug)]
pub struct Attached {
    /// The folder that holds the shards.
    pub root: PathBuf,
    /// The device or folder behind it.
    pub device: String,
    /// Of a folder: the lock that stands for having it for writing. Of a device that was attached without an
    /// election: keeps others from doing the same. Never what a fence waits for on a device: a stopped process
    /// holds it for ever.
    lock: Option<OwnedFd>,
    /// While it is open, this node's process lives.
    owner: Option<OwnedFd>,
}

impl Attached {
    /// What has to be asked before a sync is acknowledged.
    pub fn witness(&self) -> Result<Witness> {
        Witness::of(&self.root.join(IDENTITY_FILE))
    }
}

/// Tells whether the volume's filesystem was shut down by a fence, or has failed by itself.
///
/// An fsync that is under way when ext4 is shut down can return success although the journal dropped its
/// transaction: it looks at the shutdown when it begins, and finds nothing left to wait for when it ends (seen).
/// So a sync counts only if [`Witness::check`] succeeds after it: the shutdown is marked before the journal
/// is aborted, and a read fails from then on.
///
/// The same holds for a journal that was aborted after an error, where reads go on: there
/// [`Witness::check_journal`] tells.
///
/// Keeps a file of the volume open: dropped before the volume is demoted or detached.
#[derive(Debug)]
pub struct Witness {
    file: File,
}

/// An extended attribute of the file, and what it holds, always.
const JOURNAL_ATTRIBUTE: (&str, &[u8]) = ("trusted.shardfs.journal", b"lives");

impl Witness {
    pub(crate) fn of(path: &Path) -> Result<Witness> {
        let file = File::open(path).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
        Ok(Witness { file })
    }

    /// Fails if the journal was aborted, so that the syncs before it may not count. Some microseconds.
    ///
    /// Sets an attribute to what it is: ext4 begins a transaction for that, which fails if the journal was aborted, and
    /// then finds nothing to change.
    pub fn check_journal(&self) -> Result<()> {
        let (name, value) = JOURNAL_ATTRIBUTE;
        match rustix::fs::fsetxattr(&self.file, name, value, rustix::fs::XattrFlags::empty()) {
            Ok(()) => Ok(()),
            // No room for the attribute, the first time: that was for certain not the journal.
            Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => Ok(()),
            Err(e) => Err(taken(&e.into())),
        }
    }

    /// Fails unless a write that begins now reaches the device. It is the time of a file that is there: a full
    /// volume has room for that. Blocks.
    pub fn prove(&self) -> Result<()> {
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        let lost = |e: std::io::Error| io_error("the volume can no longer be written", &e);
        rustix::fs::futimens(&self.file, &times).map_err(|e| lost(e.into()))?;
        self.file.sync_all().map_err(lost)?;
        self.check()
    }

    /// Writes and discards that the device below has completed; `None`: the kernel does not tell. Asks the kernel, not the device.
    /// Flushes do not count: every sync(2) of the machine has one done, also on a device whose filesystem is stuck.
    pub fn completed(&self) -> Option<u64> {
        let device = rustix::fs::fstat(&self.file).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
        let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
        // The kernel's Documentation/block/stat.rst; discards came with Linux 4.18.
        let [writes, discards] = [4, 11].map(|at| fields.get(at).copied());
        Some(writes?.wrapping_add(discards.unwrap_or(0)))
    }

    /// The same as [`Witness::check`], unless it had to wait for the device: then it cannot be told.
    pub fn glance(&self) -> Option<Result<()>> {
        let (mut byte, now) = ([0u8; 1], rustix::io::ReadWriteFlags::NOWAIT);
        match rustix::io::preadv2(&self.file, &mut [std::io::IoSliceMut::new(&mut byte)], 0, now) {
            Ok(_) => Some(Ok(())),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::OPNOTSUPP) => None,
            Err(e) => Some(Err(taken(&e.into()))),
        }
    }

    /// Fails if the syncs before it may not count. A read of one cached byte: less than a microsecond.
    pub fn check(&self) -> Result<()> {
        match self.file.read_at(&mut [0u8; 1], 0) {
            Ok(_) => Ok(()),
            Err(e) => Err(taken(&e)),
        }
    }
}

/// Something else is mounted where the volume belongs.
fn in_the_way(spec: &VolumeSpec, source: &Path) -> Error {
    let (source, at) = (source.display(), spec.mount_point.display());
    Error::new(
        Reason::AlreadyExists,
        format!("volume {}: {source} is mounted at {at}; unmount it first", spec.id),
    )
}

fn taken(error: &std::io::Error) -> Error {
    io_error("the volume was taken away: what was synced last may be lost", error)
}

/// Where a volume is attached for writing.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder that holds the shards.
    pub root: PathBuf,
    /// The device or folder behind it.
    pub device: PathBuf,
}

/// What is known about a volume without attaching it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// The backing file, device or folder is there.
    pub exists: bool,
    /// Bytes of the backing file or device; 0 for a folder.
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
    /// How its volumes are fenced.
    fn fence(&self) -> &dyn fence::Fence;
    /// Attaches it without mounting it, after cleaning up what a killed process of this node left behind. The
    /// volume was created before. Repeated, it begins anew.
    fn attach_backup(&self, spec: &VolumeSpec) -> Result<Standby>;
    /// Mounts for writing what the fence was acquired for since. Fails, and has changed nothing on the volume, if
    /// somebody else has acquired it meanwhile, however long this process was stopped in between. After an
    /// error the device is attached anew before the next attempt.
    fn promote(&self, spec: &VolumeSpec, standby: Standby, fenced: fence::Fenced) -> Result<Attached>;
    /// The reverse; no file of the volume is open. Of a volume that another node has fenced, what was not
    /// written is dropped.
    fn demote(&self, spec: &VolumeSpec, attached: Attached) -> Result<Standby>;
    /// Lets go of a volume that was stood by for.
    fn detach_backup(&self, spec: &VolumeSpec, standby: Standby) -> Result<()>;
    /// Makes the volume's content reachable for writing at the mount point, after cleaning up what a killed
    /// process of this node left behind. The volume was created before. For a volume that no other node
    /// attaches: it acquires no fence, and fails if the volume is mounted elsewhere on this machine.
    fn attach(&self, spec: &VolumeSpec) -> Result<Attached>;
    /// The reverse. No file of the volume is open.
    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()>;
    /// Makes what was written below the root before readable for views that are opened from now on. Durable when it returns; but
    /// see [`Witness`].
    fn settle(&self, root: &Path) -> Result<()>;
    /// Makes the volume, which another node has for writing, readable at a place: as it is now. Writes nothing to it.
    fn open_view(&self, spec: &VolumeSpec, at: &Path) -> Result<ViewMount>;
    /// Takes away what a killed process of this node has left of views, which were all in places right below `folder`.
    fn clean_views(&self, spec: &VolumeSpec, folder: &Path) -> Result<()>;
    /// Makes what a volume lies on as large as the specification says, as far as that is not a part of [`VolumeProvider::grow`]; it may take
    /// minutes, and the volume may move meanwhile. Done already: no error.
    fn enlarge_below(&self, _spec: &VolumeSpec) -> Result<()> {
        Ok(())
    }
    /// Makes a volume that is attached for writing larger by one step, which takes a moment; whether it is then as large as its device is by
    /// now; of a backing file, as the specification says. It is used meanwhile. Never makes anything smaller.
    fn grow(&self, spec: &VolumeSpec, attached: &Place) -> Result<bool>;
    /// Takes from this machine what attaching gave it: it is no node of the volume any more, and has let go of it. Done already: no
    /// error.
    fn release(&self, _spec: &VolumeSpec) -> Result<()> {
        Ok(())
    }
    /// Deletes what the volume is made of, which nobody uses any more, if that is certainly its own. Answers why it was left if it
    /// was not, of kinds that are ever deleted. Done already: no error.
    fn delete(&self, spec: &VolumeSpec) -> Result<Option<String>>;
    /// What is known.
    fn describe(&self, spec: &VolumeSpec) -> Result<Description>;
    /// How its volumes are backed up; an error that says what to do instead if they cannot be.
    fn images(&self) -> Result<&dyn Images>;
}

/// The kinds of volumes that a node can use.
#[derive(Clone, Default)]
pub struct Providers {
    cloud: Option<Arc<ebs::EbsProvider>>,
}

impl Providers {
    /// With the disks of a cloud.
    pub fn with_cloud(cloud: ebs::EbsProvider) -> Providers {
        Providers { cloud: Some(Arc::new(cloud)) }
    }

    /// The provider of a name.
    pub fn get(&self, name: &str) -> Result<&dyn VolumeProvider> {
        if name == AWS { self.ebs().map(|ebs| ebs as _) } else { provider(name) }
    }

    /// The disks of the cloud that this node is told of.
    pub fn ebs(&self) -> Result<&ebs::EbsProvider> {
        self.cloud.as_deref().ok_or_else(|| {
            let how = if cfg!(feature = "aws") {
                "start it with --aws-cluster NAME, on EC2"
            } else {
                "it was built without the feature `aws`"
            };
            Error::new(Reason::Unsupported, format!("this node uses no volumes of kind `aws`: {how}"))
        })
    }
}

/// The provider of a name, of those that need nothing but this machine.
pub fn provider(name: &str) -> Result<&'static dyn VolumeProvider> {
    match name {
        "loop" => Ok(&loopdev::LoopProvider),
        DEVICE => Ok(&device::DeviceProvider),
        "dir" => Ok(&dir::DirProvider),
        other => Err(Error::invalid(format!(
            "volume provider {other:?} is not known: there are `loop`, `device`, `dir` and `aws`"
        ))),
    }
}

/// Checks a definition.
pub fn check_spec(id: &VolumeId, name: &str, size_bytes: u64) -> Result<()> {
    if name != AWS {
        provider(name).map_err(|e| e.context(format!("volume {id}")))?;
    }
    match name {
        AWS if id.as_str().starts_with(ebs::VERIFY_PREFIX) => Err(Error::invalid(format!(
            "volume {id}: names that begin with {:?} are those of disks that backups are verified on: choose another one",
            ebs::VERIFY_PREFIX
        ))),
        AWS if size_bytes == 0 || !size_bytes.is_multiple_of(GIB) => Err(Error::invalid(format!(
            "volume {id}: an aws volume has a whole number of GiB, not {size_bytes} bytes: give --size, such as 100GiB"
        ))),
        "loop" if !(LOOP_BYTES_MIN..=LOOP_BYTES_MAX).contains(&size_bytes) => {
            let wrong = if size_bytes == 0 { String::new() } else { format!(", not {size_bytes} bytes") };
            Err(Error::invalid(format!(
                "volume {id}: a loop volume has {} MiB to {} TiB{wrong}: give --size, such as 100GiB",
                LOOP_BYTES_MIN >> 20,
                LOOP_BYTES_MAX >> 40
            )))
        }
        DEVICE if size_bytes != 0 => Err(Error::invalid(format!(
            "volume {id}: a device volume is as large as its device; give size 0"
        ))),
        "dir" if size_bytes != 0 => Err(Error::invalid(format!(
            "volume {id}: a dir volume is as large as what it lies on; give size 0"
        ))),
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
struct Format {
    v: u32,
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
            let damaged = |e: serde_json::Error| {
                Error::corrupt(format!("{}: {e}: the volume's identity is damaged", path.display()))
            };
            // First: a newer one may have other fields, and say with its format that nothing here is to be touched.
            let Format { v } = serde_json::from_slice(&bytes).map_err(damaged)?;
            if v > IDENTITY_FORMAT {
                return Err(Error::new(
                    Reason::Unsupported,
                    format!(
                        "volume {} has format {v}, this version of ShardFS knows up to {IDENTITY_FORMAT}: update this \
                         node; the volume is left alone",
                        spec.id
                    ),
                ));
            }
            let identity: Identity = serde_json::from_slice(&bytes).map_err(damaged)?;
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
    let identity = Identity { v: IDENTITY_FORMAT, cluster: spec.cluster_id.clone(), volume: spec.id.clone() };
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

/// Takes the lock of a file or folder that stands for attaching or making it without an election.
fn lock(path: &Path, what: &VolumeId) -> Result<OwnedFd> {
    let file = File::open(path).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    wait_for_lock(file, path, || {
        format!(
            "volume {what}: another process has {} attached for writing; it is tried again until that ends",
            path.display()
        )
    })
}

/// Locks an open file; waits a little.
fn wait_for_lock(file: File, path: &Path, held: impl Fn() -> String) -> Result<OwnedFd> {
    let begun = clock::monotonic();
    loop {
        if lock_now(&file, path)? {
            return Ok(file.into());
        }
        // A program that was just started holds copies of all locks until it has begun to run.
        if begun.elapsed() >= LOCK_WAIT_MAX {
            return Err(Error::unavailable(held()));
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// Takes the lock of what is there, if nobody has it.
fn try_lock(path: &Path) -> Result<Option<OwnedFd>> {
    let file = File::open(path).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    Ok(lock_now(&file, path)?.then(|| file.into()))
}

fn lock_now(file: &File, path: &Path) -> Result<bool> {
    match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(Error::io(format!("locking {}: {e}", path.display()))),
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
