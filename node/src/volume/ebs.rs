//! A volume that is a disk of the cloud, which several machines attach at once (EBS io2 with Multi-Attach). Its source is the
//! disk's id.
//!
//! The cloud is asked to attach and detach, to change sizes, and to delete. What is attached is a block device like any
//! other: `device` formats, fences, mounts and views it. So a failover between nodes that stand by never asks the cloud: the device is
//! there.
//!
//! An emulated cloud attaches loop devices. Those have no reservations, so their backing file is used as `loop` does.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shardfs_proto::types::{Error, Reason, Result, VolumeId};

use super::cloud::{BackupTags, Cloud, DiskId, DiskSize, SnapshotId};
use super::device::DeviceProvider;
use super::fence::{Fence, FenceKey, FenceKind, Fenced, Takeover};
use super::images::{Image, Images};
use super::loopdev::{self, LoopProvider};
use super::nvme::Links;
use super::views::ViewMount;
use super::{AWS, Attached, Description, GIB, Place, Standby, VolumeProvider, VolumeSpec, mounts};

/// What the names of disks begin with on which backups are verified.
pub const VERIFY_PREFIX: &str = "verify-";
/// How long the device of a disk that is attached may take to come up.
const DEVICE_WAIT_MAX: Duration = Duration::from_secs(15);

/// The provider `aws`.
pub struct EbsProvider {
    cloud: Arc<dyn Cloud>,
    fence: EbsFence,
}

impl EbsProvider {
    /// Of this cloud, whose disks come up as devices there.
    pub fn new(cloud: Arc<dyn Cloud>, links: Links) -> EbsProvider {
        EbsProvider { cloud, fence: EbsFence { below: Arc::new(Belows { links, known: Mutex::default() }) } }
    }

    /// The cloud.
    pub fn cloud(&self) -> &Arc<dyn Cloud> {
        &self.cloud
    }

    fn belows(&self) -> &Belows {
        &self.fence.below
    }

    /// Has the disk attached to this machine, and its device there.
    fn attach_disk(&self, spec: &VolumeSpec) -> Result<Below> {
        if let Some(below) = self.belows().find(spec)? {
            return Ok(below);
        }
        let id = disk_of(spec)?;
        let disk = self.cloud.disk(&id)?.ok_or_else(|| {
            Error::new(
                if spec.formatted { Reason::Corrupt } else { Reason::NotFound },
                format!(
                    "volume {}: there is no disk {id} (any more): an empty one is not made in its place",
                    spec.id
                ),
            )
        })?;
        let foreign = |what: &str, has: &str| {
            Error::invalid(format!(
                "volume {}: {id} belongs to {what} {has}, by its tags: it is left alone",
                spec.id
            ))
        };
        if !disk.cluster_id.is_empty() && disk.cluster_id != spec.cluster_id {
            return Err(foreign("the cluster", &disk.cluster_id));
        }
        if !disk.volume.is_empty() && disk.volume != spec.id.as_str() {
            return Err(foreign("the volume", &disk.volume));
        }
        tracing::info!(volume = %spec.id, disk = %id, machine = self.cloud.machine().id, "attaching the disk");
        self.cloud.attach(&id)?;
        let device = self.belows().links.wait_for(&id, DEVICE_WAIT_MAX)?;
        self.belows().note(spec, &device)
    }
}

/// The disk that a volume is.
pub fn disk_of(spec: &VolumeSpec) -> Result<DiskId> {
    let source = spec.source.to_str().unwrap_or_default();
    DiskId::new(source).map_err(|e| e.context(format!("volume {}", spec.id)))
}

/// How the device of a disk is used.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Below {
    /// As the whole device that it is.
    Device(PathBuf),
    /// As the file that an emulated cloud has made it of.
    File(PathBuf),
}

impl Below {
    fn of(device: &Path) -> Result<Below> {
        let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with("loop") {
            return Ok(Below::Device(device.to_owned()));
        }
        let path = Path::new("/sys/block").join(&name).join("loop/backing_file");
        let file = fs::read_to_string(&path)
            .map_err(|e| Error::unavailable(format!("{}: {e}: the device is going", path.display())))?;
        Ok(Below::File(PathBuf::from(file.trim_end_matches('\n'))))
    }

    fn provider(&self) -> &'static dyn VolumeProvider {
        match self {
            Below::Device(_) => &DeviceProvider,
            Below::File(_) => &LoopProvider,
        }
    }

    /// The volume as that provider knows it.
    fn spec(&self, spec: &VolumeSpec) -> VolumeSpec {
        let (source, size_bytes) = match self {
            Below::Device(device) => (device.clone(), 0),
            Below::File(file) => (file.clone(), fs::metadata(file).map_or(0, |meta| meta.len())),
        };
        VolumeSpec { source, size_bytes, ..spec.clone() }
    }
}

/// What is known of the devices of disks.
struct Belows {
    links: Links,
    /// What was used last: it can be let go of when the cloud has taken the device away.
    known: Mutex<HashMap<VolumeId, Below>>,
}

impl Belows {
    fn note(&self, spec: &VolumeSpec, device: &Path) -> Result<Below> {
        let below = Below::of(device)?;
        self.known.lock().insert(spec.id.clone(), below.clone());
        Ok(below)
    }

    /// If the device is there.
    fn find(&self, spec: &VolumeSpec) -> Result<Option<Below>> {
        match self.links.find(&disk_of(spec)?)? {
            Some(device) => self.note(spec, &device).map(Some),
            None => Ok(None),
        }
    }

    fn there(&self, spec: &VolumeSpec) -> Result<Below> {
        self.find(spec)?.ok_or_else(|| {
            Error::new(
                Reason::NotFound,
                format!(
                    "volume {}: the disk {} is not attached to this machine",
                    spec.id,
                    spec.source.display()
                ),
            )
        })
    }

    /// Also if the device has gone since.
    fn used(&self, spec: &VolumeSpec) -> Result<Below> {
        let known = self.known.lock().get(&spec.id).cloned();
        known.map_or_else(|| self.there(spec), Ok)
    }
}

struct EbsFence {
    below: Arc<Belows>,
}

impl Fence for EbsFence {
    fn capability(&self, spec: &VolumeSpec) -> Result<FenceKind> {
        let below = self.below.there(spec)?;
        below.provider().fence().capability(&below.spec(spec))
    }

    fn acquire(&self, spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced> {
        let below = self.below.there(spec)?;
        below.provider().fence().acquire(&below.spec(spec), takeover)
    }

    fn still_held(&self, spec: &VolumeSpec, key: FenceKey) -> Result<bool> {
        let below = self.below.used(spec)?;
        below.provider().fence().still_held(&below.spec(spec), key)
    }

    fn release(&self, spec: &VolumeSpec, key: FenceKey) -> Result<()> {
        let below = self.below.used(spec)?;
        below.provider().fence().release(&below.spec(spec), key)
    }
}

impl VolumeProvider for EbsProvider {
    /// The disk was made before the volume's record was; its content is made as that of any device.
    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        let below = self.attach_disk(spec)?;
        below.provider().create(&below.spec(spec))
    }

    fn fence(&self) -> &dyn Fence {
        &self.fence
    }

    fn attach_backup(&self, spec: &VolumeSpec) -> Result<Standby> {
        let below = self.attach_disk(spec)?;
        below.provider().attach_backup(&below.spec(spec))
    }

    fn promote(&self, spec: &VolumeSpec, standby: Standby, fenced: Fenced) -> Result<Attached> {
        let below = self.belows().there(spec)?;
        below.provider().promote(&below.spec(spec), standby, fenced)
    }

    fn demote(&self, spec: &VolumeSpec, attached: Attached) -> Result<Standby> {
        let below = self.belows().used(spec)?;
        below.provider().demote(&below.spec(spec), attached)
    }

    fn detach_backup(&self, spec: &VolumeSpec, standby: Standby) -> Result<()> {
        let below = self.belows().used(spec)?;
        below.provider().detach_backup(&below.spec(spec), standby)
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Attached> {
        let below = self.attach_disk(spec)?;
        below.provider().attach(&below.spec(spec))
    }

    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()> {
        let below = self.belows().used(spec)?;
        below.provider().detach(&below.spec(spec), attached)
    }

    fn settle(&self, root: &Path) -> Result<()> {
        loopdev::views::settle(root)
    }

    fn open_view(&self, spec: &VolumeSpec, at: &Path) -> Result<ViewMount> {
        let below = self.belows().there(spec)?;
        below.provider().open_view(&below.spec(spec), at)
    }

    fn clean_views(&self, spec: &VolumeSpec, folder: &Path) -> Result<()> {
        loopdev::views::clean_up(spec, folder)
    }

    fn enlarge_below(&self, spec: &VolumeSpec) -> Result<()> {
        let gib = u32::try_from(spec.size_bytes / GIB)
            .map_err(|_| Error::invalid(format!("volume {}: {} bytes", spec.id, spec.size_bytes)))?;
        let id = disk_of(spec)?;
        let known = self.cloud.disk(&id)?;
        let now = known
            .ok_or_else(|| Error::corrupt(format!("volume {}: there is no disk {id} any more", spec.id)))?;
        if now.size.gib < gib {
            self.cloud.modify(&id, DiskSize { gib, iops: now.size.iops })?;
        }
        Ok(())
    }

    /// The disk was enlarged before.
    fn grow(&self, spec: &VolumeSpec, attached: &Place) -> Result<bool> {
        let below = self.belows().used(spec)?;
        below.provider().grow(&below.spec(spec), attached)
    }

    fn release(&self, spec: &VolumeSpec) -> Result<()> {
        let id = disk_of(spec)?;
        self.cloud.detach(&id, &self.cloud.machine().id, false)?;
        self.belows().known.lock().remove(&spec.id);
        Ok(())
    }

    /// Other nodes' machines let go of it by themselves, when they see that it leaves; until then it is in use.
    fn delete(&self, spec: &VolumeSpec) -> Result<Option<String>> {
        let id = disk_of(spec)?;
        self.release(spec)?;
        let Some(disk) = self.cloud.disk(&id)? else { return Ok(None) };
        let is_own = disk.cluster_id == spec.cluster_id && disk.volume == spec.id.as_str();
        let is_foreign = !disk.cluster_id.is_empty() || !disk.volume.is_empty();
        // What was in use as this volume is, whoever has made the disk; what bears another's tags never is.
        if !is_own && (is_foreign || !spec.formatted) {
            return Ok(Some("by its tags the disk was not made for the volume".into()));
        }
        self.cloud.delete(&id).map(|()| None)
    }

    /// As far as this machine can tell without asking the cloud.
    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        match self.belows().find(spec)? {
            Some(below) => below.provider().describe(&below.spec(spec)),
            None => Ok(Description {
                exists: false,
                size_bytes: 0,
                devices: Vec::new(),
                mounted: !mounts::at(&spec.mount_point)?.is_empty(),
            }),
        }
    }

    fn images(&self) -> Result<&dyn Images> {
        Ok(self)
    }
}

impl Images for EbsProvider {
    /// The cloud names it when it is there.
    fn image_place(&self, spec: &VolumeSpec, _backup: &str, _folder: Option<&Path>) -> Result<String> {
        disk_of(spec).map(|_| String::new())
    }

    fn back_up(&self, spec: &VolumeSpec, image: &Image) -> Result<String> {
        let tags = BackupTags {
            cluster_id: image.cluster_id.clone(),
            volume: image.volume.clone(),
            backup: image.backup.clone(),
        };
        Ok(self.cloud.snapshot(&disk_of(spec)?, &tags, &image.backup)?.to_string())
    }

    /// Also one that was taken by a process that could not say so any more: it is found by its tags.
    fn drop_image(&self, image: &Image) -> Result<()> {
        if !image.place.is_empty() {
            return self.cloud.delete_snapshot(&SnapshotId::new(image.place.clone())?);
        }
        let mut found = self.cloud.snapshots(&image.cluster_id)?;
        found.retain(|snapshot| snapshot.backup == image.backup && snapshot.volume == image.volume.as_str());
        found.iter().try_for_each(|snapshot| self.cloud.delete_snapshot(&snapshot.id))
    }

    /// The disk is named by the record of the restore, which is on condition of the attempt.
    fn make_place(&self, _spec: &VolumeSpec, _attempt: &str) -> Result<()> {
        Ok(())
    }

    fn drop_place(&self, _spec: &VolumeSpec, _attempt: &str) -> Result<()> {
        Ok(())
    }

    fn drop_places(&self, _spec: &VolumeSpec, _except: Option<&str>) -> Result<()> {
        Ok(())
    }

    fn lay_down(&self, spec: &VolumeSpec, _image: &Image, _attempt: &str) -> Result<PathBuf> {
        Ok(match self.attach_disk(spec)? {
            Below::Device(path) | Below::File(path) => path,
        })
    }

    /// The disk is the volume's from the beginning.
    fn put_in_place(
        &self,
        _spec: &VolumeSpec,
        _attempt: &str,
        _aside: Option<&str>,
    ) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    fn discard(&self, spec: &VolumeSpec) -> Result<()> {
        self.delete(spec).map(drop)
    }
}

/// Whether a volume's record may have this source.
pub fn check_source(id: &VolumeId, source: &str) -> Result<()> {
    DiskId::new(source).map(drop).map_err(|e| e.context(format!("volume {id}, of kind {AWS}")))
}
