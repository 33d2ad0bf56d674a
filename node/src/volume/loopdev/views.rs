//! Views of a loop volume: another loop device over the backing file, which refuses writes in its driver, mounted without its
//! journal.
//!
//! One block device has one superblock and one cache, so every view has a device of its own. The primary has put all that its
//! journal held in place before it announced the view (`settle`); what it changes while the view is read are
//! blocks that belong to no view, or to directories and tables, whose older or newer state serves the view as well: a checksum guards
//! each of them. A mount that finds one half-written fails, and is tried again.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::MountFlags;
use shardfs_proto::types::{Error, Reason, Result};

use super::sys::{self, Tag};
use super::{detach_device, devices_with_tag, tag, wait_until_unclaimed};
use crate::volume::views::{Retired, ViewMount};
use crate::volume::{VolumeSpec, io_error, make_mount_point, mounts, verify_identity};

/// `EXT4_IOC_CHECKPOINT`: `_IOW('f', 43, __u32)`.
const CHECKPOINT: libc::c_ulong = 0x4004_662B;

/// Writes everything, and puts what the journal holds in its place.
pub(in crate::volume) fn settle(root: &Path) -> Result<()> {
    let failed = |e: std::io::Error| io_error(&format!("putting {} in place", root.display()), &e);
    let folder = File::open(root).map_err(failed)?;
    rustix::fs::syncfs(&folder).map_err(|e| failed(e.into()))?;
    let flags: u32 = 0;
    // SAFETY: the kernel reads one u32.
    let done = unsafe { libc::ioctl(folder.as_raw_fd(), CHECKPOINT as _, &raw const flags) };
    if done == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) {
        return Err(Error::new(
            Reason::Unsupported,
            "this kernel cannot checkpoint a journal: views of loop volumes need Linux 5.14 or later",
        ));
    }
    Err(failed(e))
}

/// What the loop device of a view lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::volume) enum Below {
    /// A file, whose page cache shows what every node of this machine has written.
    File,
    /// A device, whose cache holds what was read by this path earlier, whatever was written by others.
    Device,
}

/// Mounts the volume as it is now.
pub(in crate::volume) fn open(spec: &VolumeSpec, at: &Path, below: Below) -> Result<ViewMount> {
    let tag = views_tag(spec, at)?;
    make_mount_point(at)?;
    let device = sys::attach_view_device(&spec.source, &tag)?;
    let written_before = sys::sectors_written(&device)?;
    let mounted = check_cache(spec, &device, below).and_then(|()| mount(&device, spec, at)).and_then(|()| {
        // It is never made here.
        let verified = verify_identity(at, &VolumeSpec { formatted: true, ..spec.clone() });
        if verified.is_err() {
            mounts::unmount_all(at)?;
        }
        verified
    });
    if let Err(error) = mounted {
        if let Err(worse) = take_away(spec, at, &device, written_before) {
            tracing::warn!(volume = %spec.id, error = %worse, "after a view that could not be mounted");
        }
        return Err(error);
    }
    let (spec, place) = (spec.clone(), at.to_owned());
    Ok(ViewMount::new(at.to_owned(), move || take_away(&spec, &place, &device, written_before)))
}

/// A device that others write to is read past this node's own cache of it.
fn check_cache(spec: &VolumeSpec, device: &Path, below: Below) -> Result<()> {
    if below == Below::File || sys::is_direct(device)? {
        return Ok(());
    }
    Err(Error::new(
        Reason::Unsupported,
        format!(
            "volume {}: {} allows no direct I/O by a loop device: its views would be read from this node's own cache",
            spec.id,
            spec.source.display()
        ),
    ))
}

fn take_away(spec: &VolumeSpec, at: &Path, device: &Path, written_before: u64) -> Result<Retired> {
    mounts::unmount_all(at)?;
    wait_until_unclaimed(spec, device)?;
    // A number has its counters for as long as the machine runs, whoever uses it.
    let written = sys::sectors_written(device)?.saturating_sub(written_before);
    detach_device(device)?;
    // A folder that stays is in nobody's way.
    let _ = fs::remove_dir(at);
    Ok(Retired { sectors_written: Some(written) })
}

/// Takes away what a killed process of this node has left below `folder`.
pub(in crate::volume) fn clean_up(spec: &VolumeSpec, folder: &Path) -> Result<()> {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let below: Vec<PathBuf> =
        mounts::list()?.into_iter().map(|mount| mount.at).filter(|at| at.parent() == Some(&folder)).collect();
    for at in below.iter().rev() {
        mounts::unmount_all(at)?;
        let _ = fs::remove_dir(at);
    }
    for device in devices_with_tag(&views_tag(spec, &folder.join("x"))?)? {
        wait_until_unclaimed(spec, &device)?;
        detach_device(&device)?;
    }
    Ok(())
}

/// What this node calls its devices for views of a volume: like its other one, by a folder that is this node's alone.
fn views_tag(spec: &VolumeSpec, at: &Path) -> Result<Tag> {
    tag(at.parent().unwrap_or(at), &spec.id)
}

fn mount(device: &Path, spec: &VolumeSpec, at: &Path) -> Result<()> {
    let flags = MountFlags::RDONLY
        | MountFlags::NOATIME
        | MountFlags::NODEV
        | MountFlags::NOSUID
        | MountFlags::NOEXEC;
    // Replaying the journal would write; what it holds is not needed.
    let options = CString::new("noload").expect("no NUL");
    rustix::mount::mount(device, at, "ext4", flags, options.as_c_str()).map_err(|e| {
        // A block that the primary was writing does not pass its checksum.
        let hint = match e {
            Errno::PERM => "mounting needs root",
            Errno::NODEV => "this kernel has no ext4",
            _other => "it is tried again",
        };
        let message = format!(
            "volume {}: mounting a view, {} at {}: {e}: {hint}",
            spec.id,
            device.display(),
            at.display()
        );
        Error::unavailable(message)
    })
}

#[cfg(test)]
mod tests;
