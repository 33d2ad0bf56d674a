//! What an earlier process of this node has left attached of volumes, also of such as nothing is known of any more.
//!
//! Invariants: only what this node has made is taken away. A loop device is known by its tag; a mount by such a device below it, or, at
//! the place where this node mounts the volume, by the identity file of this cluster's volume in it. Nothing is deleted.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use shardfs_proto::types::{Result, VolumeId};

use super::loopdev::{self, sys};
use super::{VolumeSpec, ext4, in_the_way, io_error, mounts, verify_identity};

/// The volumes that a folder of places has places for, in use or not.
pub fn places(folder: &Path) -> Result<BTreeSet<VolumeId>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(e) => return Err(io_error(&format!("listing {}", folder.display()), &e)),
    };
    let name = |entry: fs::DirEntry| {
        let is_place = entry.file_type().is_ok_and(|kind| kind.is_dir());
        VolumeId::new(entry.file_name().to_str().filter(|_| is_place)?).ok()
    };
    Ok(entries.flatten().filter_map(name).collect())
}

/// Unmounts and detaches what is left of a volume at its mount point; whether there was anything. No process of this node uses it.
pub fn take_away(cluster_id: &str, id: &VolumeId, mount_point: &Path) -> Result<bool> {
    let spec = spec(cluster_id, id, mount_point);
    let tag = loopdev::tag(mount_point, id)?;
    let (mounted, devices) = (mounts::at(mount_point)?, sys::devices_with_tag(&tag)?);
    match mounted.as_slice() {
        [] if devices.is_empty() => Ok(false),
        [mount] if devices.is_empty() => {
            // A whole device, which stays.
            verify_identity(mount_point, &spec).map_err(|error| {
                error.context(format!("{} is mounted at {}", mount.source.display(), mount_point.display()))
            })?;
            mounts::unmount_all(mount_point)?;
            Ok(true)
        }
        _ => {
            // As long as it is held, no fence takes it away as well.
            let _owner = loopdev::own(&spec)?;
            loopdev::clean_up(&spec, &tag)?;
            Ok(true)
        }
    }
}

/// The same for its views, which were all in places right below `folder`.
pub fn take_away_views(cluster_id: &str, id: &VolumeId, folder: &Path) -> Result<bool> {
    let devices = sys::devices_with_tag(&loopdev::tag(folder, id)?)?;
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let below: Vec<mounts::Mount> =
        mounts::list()?.into_iter().filter(|mount| mount.at.parent() == Some(&folder)).collect();
    if let Some(other) = below.iter().find(|mount| !devices.contains(&mount.source)) {
        return Err(in_the_way(&spec(cluster_id, id, &other.at), &other.source));
    }
    for mount in below.iter().rev() {
        mounts::unmount_all(&mount.at)?;
        // A folder that stays is in nobody's way.
        let _ = fs::remove_dir(&mount.at);
    }
    for device in &devices {
        ext4::wait_until_unclaimed(&spec(cluster_id, id, &folder), device)?;
        sys::detach_device(device)?;
    }
    Ok(!devices.is_empty())
}

/// As far as it is known without a record.
fn spec(cluster_id: &str, id: &VolumeId, mount_point: &Path) -> VolumeSpec {
    VolumeSpec {
        id: id.clone(),
        cluster_id: cluster_id.to_owned(),
        source: PathBuf::new(),
        size_bytes: 0,
        // Nothing is ever made here.
        formatted: true,
        mount_point: mount_point.to_owned(),
        allow_unfenced: false,
    }
}
