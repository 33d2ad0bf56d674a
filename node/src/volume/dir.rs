//! A volume that is a folder of another filesystem. Needs no root. An flock stands for the write attachment; a
//! symlink stands for the mount.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;

use shardfs_proto::types::{Error, Reason, Result};

use super::fence::lock::LockFence;
use super::fence::{Fence, Fenced};
use super::images::{self, Images};
use super::views::{Retired, ViewMount};
use super::{
    Attached, Description, Place, Standby, VolumeProvider, VolumeSpec, io_error, lock, verify_identity,
};

/// How a folder is backed up.
const INSTEAD_OF_IMAGES: &str = "copy the folder while no node serves it, take a snapshot of the filesystem that it lies on, or use volumes of \
                                 kind `loop` on an XFS or Btrfs";

/// The provider `dir`.
pub struct DirProvider;

impl VolumeProvider for DirProvider {
    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        if spec.formatted && !spec.source.is_dir() {
            return Err(Error::corrupt(format!(
                "{} was volume {} before and is gone: put it back, an empty one is not made in its place",
                spec.source.display(),
                spec.id
            )));
        }
        fs::create_dir_all(&spec.source)
            .map_err(|e| io_error(&format!("making {}", spec.source.display()), &e))
    }

    fn fence(&self) -> &dyn Fence {
        &LockFence
    }

    fn attach_backup(&self, spec: &VolumeSpec) -> Result<Standby> {
        unlink(&spec.mount_point)?;
        Ok(Standby { device: spec.source.clone(), owner: None })
    }

    fn promote(&self, spec: &VolumeSpec, _standby: Standby, fenced: Fenced) -> Result<Attached> {
        let hold = fenced.into_hold().ok_or_else(|| {
            Error::invalid(format!("volume {}: a folder is promoted with its lock only", spec.id))
        })?;
        open_up(spec, hold)
    }

    fn demote(&self, spec: &VolumeSpec, attached: Attached) -> Result<Standby> {
        self.detach(spec, attached)?;
        self.attach_backup(spec)
    }

    fn detach_backup(&self, _spec: &VolumeSpec, standby: Standby) -> Result<()> {
        drop(standby);
        Ok(())
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Attached> {
        open_up(spec, lock(&spec.source, &spec.id)?)
    }

    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()> {
        unlink(&spec.mount_point)?;
        drop(attached.lock);
        Ok(())
    }

    fn settle(&self, root: &Path) -> Result<()> {
        // There is one file system and one cache: what is written is seen. It is to be durable before it is told.
        let sync = || rustix::fs::syncfs(fs::File::open(root)?).map_err(std::io::Error::from);
        sync().map_err(|e| io_error(&format!("syncing {}", root.display()), &e))
    }

    fn open_view(&self, spec: &VolumeSpec, _at: &Path) -> Result<ViewMount> {
        verify_identity(&spec.source, &VolumeSpec { formatted: true, ..spec.clone() })?;
        Ok(ViewMount::new(spec.source.clone(), || Ok(Retired { sectors_written: None })))
    }

    fn clean_views(&self, _spec: &VolumeSpec, _folder: &Path) -> Result<()> {
        Ok(())
    }

    fn grow(&self, spec: &VolumeSpec, _attached: &Place) -> Result<bool> {
        Err(Error::invalid(format!(
            "volume {} is a folder, as large as what it lies on: enlarge that, which needs nothing here",
            spec.id
        )))
    }

    /// What lies in a folder may be more than the volume.
    fn delete(&self, _spec: &VolumeSpec) -> Result<Option<String>> {
        Ok(None)
    }

    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        Ok(Description {
            exists: spec.source.is_dir(),
            size_bytes: 0,
            devices: Vec::new(),
            mounted: fs::read_link(&spec.mount_point).is_ok_and(|target| target == spec.source),
        })
    }

    fn images(&self) -> Result<&dyn Images> {
        images::unsupported("dir", INSTEAD_OF_IMAGES)
    }
}

/// With the lock held, nobody else writes.
fn open_up(spec: &VolumeSpec, lock: OwnedFd) -> Result<Attached> {
    verify_identity(&spec.source, spec)?;
    link(&spec.source, &spec.mount_point)?;
    Ok(Attached {
        root: spec.mount_point.clone(),
        device: spec.source.display().to_string(),
        lock: Some(lock),
        owner: None,
    })
}

fn link(source: &Path, place: &Path) -> Result<()> {
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent).map_err(|e| io_error(&format!("making {}", parent.display()), &e))?;
    }
    unlink(place)?;
    std::os::unix::fs::symlink(source, place)
        .map_err(|e| io_error(&format!("linking {}", place.display()), &e))
}

fn unlink(place: &Path) -> Result<()> {
    let doing = format!("removing {}", place.display());
    match fs::symlink_metadata(place) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_error(&doing, &e)),
        Ok(meta) if meta.is_symlink() => fs::remove_file(place).map_err(|e| io_error(&doing, &e)),
        // An empty mount point of a volume that was a loop volume once; anything in it is not ours to remove.
        Ok(meta) if meta.is_dir() => fs::remove_dir(place).map_err(|e| io_error(&doing, &e)),
        Ok(_) => {
            Err(Error::new(Reason::AlreadyExists, format!("{} is in the way: move it", place.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::VolumeId;

    fn spec(dir: &Path) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new("vol-1").unwrap(),
            cluster_id: "c1".into(),
            source: dir.join("backing"),
            size_bytes: 0,
            formatted: false,
            mount_point: dir.join("node/volumes/vol-1"),
            allow_unfenced: false,
        }
    }

    #[test]
    fn attaches_once_and_again_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path());
        DirProvider.create(&spec).unwrap();
        let attached = DirProvider.attach(&spec).unwrap();
        fs::write(attached.root.join("x"), "y").unwrap();
        assert_eq!(DirProvider.attach(&spec).unwrap_err().reason(), Reason::Unavailable);
        assert!(DirProvider.describe(&spec).unwrap().mounted);
        drop(attached);
        spec.formatted = true;
        let again = DirProvider.attach(&spec).unwrap();
        assert_eq!(fs::read(again.root.join("x")).unwrap(), b"y");
        DirProvider.detach(&spec, again).unwrap();
        assert!(!spec.mount_point.exists());
        assert!(spec.source.join("x").exists());
    }

    #[test]
    fn foreign_and_lost_volumes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path());
        DirProvider.create(&spec).unwrap();
        drop(DirProvider.attach(&spec).unwrap());
        spec.cluster_id = "c2".into();
        assert_eq!(DirProvider.attach(&spec).unwrap_err().reason(), Reason::InvalidArgument);
        spec.cluster_id = "c1".into();
        spec.formatted = true;
        fs::remove_file(spec.source.join(super::super::IDENTITY_FILE)).unwrap();
        assert_eq!(DirProvider.attach(&spec).unwrap_err().reason(), Reason::Corrupt);
        fs::remove_dir_all(&spec.source).unwrap();
        assert_eq!(DirProvider.create(&spec).unwrap_err().reason(), Reason::Corrupt);
    }

    #[test]
    fn a_volume_of_a_newer_format_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path());
        DirProvider.create(&spec).unwrap();
        drop(DirProvider.attach(&spec).unwrap());
        let path = spec.source.join(super::super::IDENTITY_FILE);
        let newer = r#"{"v":2,"cluster_of_later":"c1"}"#;
        fs::write(&path, newer).unwrap();
        let error = DirProvider.attach(&spec).unwrap_err();
        assert_eq!(error.reason(), Reason::Unsupported);
        assert!(error.message().contains("format 2") && error.message().contains("update"), "{error}");
        let error = DirProvider.open_view(&spec, dir.path()).map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), Reason::Unsupported);
        assert_eq!(fs::read_to_string(&path).unwrap(), newer);
        // The same format with more fields is read.
        fs::write(&path, r#"{"v":1,"cluster":"c1","volume":"vol-1","later":true}"#).unwrap();
        DirProvider.attach(&spec).unwrap();
    }
}
