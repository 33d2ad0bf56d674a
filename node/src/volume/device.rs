//! A volume that is a whole block device which several nodes attach at once: ext4 on all of it, fenced by persistent
//! reservations. Never a partition: those know no reservations.
//!
//! Every node has a path of its own to it, by which the device tells the nodes apart: two nodes of one machine may not
//! share one. A node keeps its path locked (flock) for as long as it stands by or serves; that also keeps udev from
//! looking into the device.
//!
//! Nothing is written before the fence is acquired. So formatting is a part of the promotion: a node that was stopped in
//! the middle of it and is resumed after another has won is refused by the device. A mark before the filesystem says that it
//! is being made, so that a formatting that was cut off is begun again, by whichever node.
//!
//! The reservation is never released while the volume has nodes: as long as somebody holds it, what a dead process's
//! mount on another machine has still to write is refused. The next primary preempts it from the last.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use shardfs_proto::types::{Error, Reason, Result};

use super::ext4::{self, Content, Target, check_label, make_filesystem, wait_until_unclaimed};
use super::fence::reservation::{Bounds, ReservationFence};
use super::fence::{Fence, FenceKind, Fenced};
use super::images::{self, Images};
use super::loopdev::{self, sys};
use super::views::ViewMount;
use super::{
    Attached, DEVICE, Description, LOOP_BYTES_MIN, Place, Standby, VolumeProvider, VolumeSpec, in_the_way,
    io_error, make_mount_point, mounts, verify_identity, wait_for_lock,
};

/// The provider `device`.
pub struct DeviceProvider;

static FENCE: ReservationFence = ReservationFence { bounds: Bounds::DEFAULT };

/// How a device is backed up.
const INSTEAD_OF_IMAGES: &str = "take a snapshot of the device where it is made (the storage array, LVM below it); as after a power cut, it \
                                 can be put back and served. Or use volumes of kind `aws`, or `loop` on an XFS or Btrfs";

/// Bytes of the mark: one sector, before the place where ext4 begins.
const MARK_BYTES: usize = 512;
/// What it begins with.
const MARK: &str = "shardfs: being formatted as ";

impl VolumeProvider for DeviceProvider {
    /// A device is there or it is not; its content is made when it is promoted.
    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        let device = whole_device(spec)?;
        let bytes = size_bytes(&device)?;
        if bytes < LOOP_BYTES_MIN {
            return Err(Error::invalid(format!(
                "volume {}: {} has only {bytes} bytes, the least is {LOOP_BYTES_MIN}: use a larger device",
                spec.id,
                device.display()
            )));
        }
        // Before its reservation is taken from whoever has it.
        look_at(spec, &device).map(drop)
    }

    fn fence(&self) -> &dyn Fence {
        &FENCE
    }

    fn attach_backup(&self, spec: &VolumeSpec) -> Result<Standby> {
        let device = whole_device(spec)?;
        let owner = own(spec, &device)?;
        clean_up(spec, &device)?;
        make_mount_point(&spec.mount_point)?;
        Ok(Standby { device, owner: Some(owner) })
    }

    fn promote(&self, spec: &VolumeSpec, standby: Standby, fenced: Fenced) -> Result<Attached> {
        let held = match fenced.kind() {
            FenceKind::Reservation => Some(fenced.key()),
            FenceKind::None if spec.allow_unfenced => None,
            other => {
                return Err(Error::invalid(format!(
                    "volume {}: a device is promoted with a reservation, not with the fence {:?}",
                    spec.id,
                    other.as_str()
                )));
            }
        };
        // The fence was acquired by the path, which may lead elsewhere by now.
        if whole_device(spec)? != standby.device {
            return Err(Error::unavailable(format!(
                "volume {}: {} is another device than before",
                spec.id,
                spec.source.display()
            )));
        }
        let attached = mount(spec, standby)?;
        // Between the fence and the mount this process may have been stopped for an hour.
        let error = match held.map_or(Ok(true), |key| FENCE.still_held(spec, key)) {
            Ok(true) => return Ok(attached),
            Ok(false) => Error::unavailable(format!(
                "volume {}: another node has taken the reservation meanwhile",
                spec.id
            )),
            Err(error) => error,
        };
        mounts::unmount_all(&spec.mount_point)?;
        Err(error)
    }

    fn demote(&self, spec: &VolumeSpec, attached: Attached) -> Result<Standby> {
        let Attached { device, owner, .. } = attached;
        let device = PathBuf::from(device);
        clean_up(spec, &device)?;
        Ok(Standby { device, owner })
    }

    fn detach_backup(&self, spec: &VolumeSpec, standby: Standby) -> Result<()> {
        clean_up(spec, &standby.device)?;
        drop(standby);
        Ok(())
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Attached> {
        mount(spec, self.attach_backup(spec)?)
    }

    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()> {
        clean_up(spec, Path::new(&attached.device))?;
        drop(attached);
        Ok(())
    }

    fn settle(&self, root: &Path) -> Result<()> {
        loopdev::views::settle(root)
    }

    /// By a loop device over the device: one block device has one superblock.
    fn open_view(&self, spec: &VolumeSpec, at: &Path) -> Result<ViewMount> {
        whole_device(spec)?;
        loopdev::views::open(spec, at, loopdev::views::Below::Device)
    }

    fn clean_views(&self, spec: &VolumeSpec, folder: &Path) -> Result<()> {
        loopdev::views::clean_up(spec, folder)
    }

    /// The device was enlarged before, by whoever made it.
    fn grow(&self, _spec: &VolumeSpec, attached: &Place) -> Result<bool> {
        ext4::grow(attached, size_bytes(&attached.device)?)
    }

    /// A device is left as it is: what is on it may be the only copy.
    fn delete(&self, _spec: &VolumeSpec) -> Result<Option<String>> {
        Ok(None)
    }

    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        let device = whole_device(spec).ok();
        Ok(Description {
            exists: device.is_some(),
            size_bytes: device.as_deref().map_or(Ok(0), size_bytes)?,
            devices: device.iter().map(|d| d.display().to_string()).collect(),
            mounted: !mounts::at(&spec.mount_point)?.is_empty(),
        })
    }

    fn images(&self) -> Result<&dyn Images> {
        images::unsupported(DEVICE, INSTEAD_OF_IMAGES)
    }
}

/// What is to be known of a device before it becomes a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// The device itself, without the links that lead to it.
    pub device: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// What it holds.
    pub holds: Holds,
}

/// What a device holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Holds {
    /// Nothing in its first mebibyte.
    Nothing,
    /// A volume of ShardFS, by its label.
    Volume(String),
    /// The beginnings of one.
    HalfMade,
    /// Another ext4, by its label.
    OtherExt4(String),
    /// Something else.
    Unknown,
}

/// Looks at a device, which may be anybody's. Changes nothing.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let device = resolve(path)?;
    let mut sector = [0; MARK_BYTES];
    open(&device, false)?
        .read_exact_at(&mut sector, 0)
        .map_err(|e| io_error(&format!("reading {}", device.display()), &e))?;
    let holds = match ext4::probe(&device)? {
        _half if sector.starts_with(MARK.as_bytes()) => Holds::HalfMade,
        Content::Zeros => Holds::Nothing,
        Content::Ext4 { label } if ext4::is_volume(&label) => {
            Holds::Volume(String::from_utf8_lossy(&label).into_owned())
        }
        Content::Ext4 { label } => Holds::OtherExt4(String::from_utf8_lossy(&label).into_owned()),
        Content::Unknown => Holds::Unknown,
    };
    Ok(Inspection { size_bytes: size_bytes(&device)?, device, holds })
}

/// The device of a volume.
fn whole_device(spec: &VolumeSpec) -> Result<PathBuf> {
    resolve(&spec.source).map_err(|error| {
        let id = &spec.id;
        let error = error.context(format!("volume {id}"));
        if error.reason() == Reason::NotFound {
            let hint = format!("attach the device, or tell this node its path (`--device {id}=PATH`)");
            return Error::new(Reason::NotFound, format!("{}: {hint}", error.message()));
        }
        error
    })
}

/// A whole block device, without the links that lead to it.
fn resolve(path: &Path) -> Result<PathBuf> {
    let refused = |why: &str| Err(Error::invalid(format!("{} {why}", path.display())));
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(Error::not_found(format!("{} is not there", path.display())));
        }
        Err(e) => return Err(io_error(&format!("looking at {}", path.display()), &e)),
    };
    if !meta.file_type().is_block_device() {
        return refused("is no block device");
    }
    if is_partition(&meta) {
        return refused("is a partition: partitions have no reservations; give the whole device");
    }
    fs::canonicalize(path).map_err(|e| io_error(&format!("resolving {}", path.display()), &e))
}

fn is_partition(meta: &fs::Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    Path::new(&format!("/sys/dev/block/{major}:{minor}/partition")).exists()
}

/// The end of the device, which is its size.
fn size_bytes(device: &Path) -> Result<u64> {
    open(device, false).and_then(|file| {
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|e| io_error(&format!("asking for the size of {}", device.display()), &e.into()))
    })
}

fn open(device: &Path, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(device)
        .map_err(|e| io_error(&format!("opening {}", device.display()), &e))
}

/// Takes the path for this process alone.
fn own(spec: &VolumeSpec, device: &Path) -> Result<OwnedFd> {
    wait_for_lock(open(device, false)?, device, || {
        format!(
            "volume {}: another process of this machine has {}: each node needs a path of its own to the device",
            spec.id,
            device.display()
        )
    })
}

/// Unmounts what a process of this node has left for the volume. What it had still to write reaches the device if this node
/// holds the reservation, and is refused and dropped if another one does.
fn clean_up(spec: &VolumeSpec, device: &Path) -> Result<()> {
    for mount in mounts::at(&spec.mount_point)? {
        if fs::canonicalize(&mount.source).unwrap_or_else(|_| mount.source.clone()) != device {
            return Err(in_the_way(spec, &mount.source));
        }
    }
    mounts::unmount_all(&spec.mount_point)?;
    wait_until_unclaimed(spec, device)
}

/// Mounts for writing; makes the filesystem if the device is certainly empty and never was in use.
fn mount(spec: &VolumeSpec, standby: Standby) -> Result<Attached> {
    let Standby { device, owner } = standby;
    // A device that is mounted already would be mounted once more, as the same filesystem.
    wait_until_unclaimed(spec, &device)?;
    // Once more, and now nobody else can change it.
    match look_at(spec, &device)? {
        Found::Own => {}
        Found::Empty | Found::HalfMade => format(spec, &device)?,
    }
    ext4::mount(&device, spec)?;
    if let Err(error) = verify_identity(&spec.mount_point, spec) {
        mounts::unmount_all(&spec.mount_point)?;
        return Err(error);
    }
    Ok(Attached { root: spec.mount_point.clone(), device: device.display().to_string(), lock: None, owner })
}

/// What a device holds, which may be used for the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    /// The volume's filesystem.
    Own,
    /// A part of it: whoever made it was cut off.
    HalfMade,
    /// Certainly nothing, and the volume was never in use.
    Empty,
}

/// Changes nothing. Everything else that a device may hold is an error.
fn look_at(spec: &VolumeSpec, device: &Path) -> Result<Found> {
    let file = open(device, false)?;
    // Other nodes write to it.
    sys::drop_cache(device, &file)?;
    let mut sector = [0; MARK_BYTES];
    file.read_exact_at(&mut sector, 0).map_err(|e| io_error(&format!("reading {}", device.display()), &e))?;
    if !spec.formatted && sector == mark(spec) {
        return Ok(Found::HalfMade);
    }
    if !spec.formatted && ext4::probe(device)? == Content::Zeros {
        return Ok(Found::Empty);
    }
    check_label(device, spec)?;
    if ext4::uuid(device)? != ext4::volume_uuid(spec) {
        return Err(Error::invalid(format!(
            "volume {}: {} holds a volume of this name of another cluster than {}: it is left alone; give another device",
            spec.id,
            spec.source.display(),
            spec.cluster_id
        )));
    }
    Ok(Found::Own)
}

fn format(spec: &VolumeSpec, device: &Path) -> Result<()> {
    tracing::info!(volume = %spec.id, device = %device.display(), "making the volume's filesystem");
    write_first_sector(device, &mark(spec))?;
    make_filesystem(device, &spec.id, Target::Device, ext4::volume_uuid(spec))?;
    write_first_sector(device, &[0; MARK_BYTES])
}

/// What stands on a device while its filesystem is being made for this volume.
fn mark(spec: &VolumeSpec) -> [u8; MARK_BYTES] {
    let mut sector = [0; MARK_BYTES];
    let text = format!("{MARK}{} of cluster {}", spec.id, spec.cluster_id);
    let length = text.len().min(MARK_BYTES);
    sector[..length].copy_from_slice(&text.as_bytes()[..length]);
    sector
}

fn write_first_sector(device: &Path, sector: &[u8; MARK_BYTES]) -> Result<()> {
    let file = open(device, true)?;
    file.write_all_at(sector, 0)
        .and_then(|()| file.sync_all())
        .map_err(|e| io_error(&format!("writing {}", device.display()), &e))
}

#[cfg(test)]
mod tests;
