//! A volume that is a sparse file: a loop device of this node's own over it, direct I/O on, ext4 on that.
//!
//! Every node that attaches a volume has its own loop device and so its own page cache, as on real
//! multi-attach storage. A device of this node is known by its tag (`lo_file_name`), which is set in the same call that
//! makes the device: so what a killed process left behind is found for certain and nobody else's is touched.
//!
//! A new volume is formatted under another name and then renamed: a backing file that is there under its own
//! name is complete. Detaching a device happens only after its last unmount.
//!
//! A device is read-only from its birth and is made writable by an acquisition of the fence, before it looks
//! for later epochs; only such a device is mounted. See `fence/shutdown.rs` for why.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use shardfs_proto::types::{Error, Reason, Result, VolumeId};

use super::ext4::{
    self, Content, Target, check_label, check_loop, make_filesystem, marked_uuid, mount, probe,
    wait_until_unclaimed,
};
use super::fence::{Fence, Fenced, shutdown};
use super::images::{self, Image, Images};
use super::views::ViewMount;
use super::{
    Attached, Description, Place, Standby, VolumeProvider, VolumeSpec, in_the_way, io_error, lock,
    make_mount_point, mounts, verify_identity, wait_for_lock,
};
use sys::{BLOCK_BYTES, LO_NAME_BYTES, Tag, detach_device, devices_with_tag};

pub(super) mod sys;
pub(in crate::volume) mod views;

/// The provider `loop`.
pub struct LoopProvider;

impl VolumeProvider for LoopProvider {
    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        let source = &spec.source;
        match fs::metadata(source) {
            Ok(meta) if !meta.is_file() => {
                Err(Error::invalid(format!("volume {}: {} is no file", spec.id, source.display())))
            }
            Ok(_) => format_if_empty(spec),
            Err(e) if e.kind() == ErrorKind::NotFound && spec.formatted => Err(Error::corrupt(format!(
                "{} was volume {} before and is gone: put it back, an empty one is not made in its place",
                source.display(),
                spec.id
            ))),
            Err(e) if e.kind() == ErrorKind::NotFound => make_backing(spec),
            Err(e) => Err(io_error(&format!("looking at {}", source.display()), &e)),
        }
    }

    fn fence(&self) -> &dyn Fence {
        &shutdown::ShutdownFence
    }

    fn attach_backup(&self, spec: &VolumeSpec) -> Result<Standby> {
        let tag = tag(&spec.mount_point, &spec.id)?;
        let owner = own(spec)?;
        make_standby(spec, &tag, owner)
    }

    fn promote(&self, spec: &VolumeSpec, standby: Standby, fenced: Fenced) -> Result<Attached> {
        if fenced.device() != Some(standby.device.as_path()) {
            return Err(Error::invalid(format!(
                "volume {}: the fence was acquired for another device than {}",
                spec.id,
                standby.device.display()
            )));
        }
        let device = standby.device.clone();
        let attached = mount_standby(spec, standby, None)?;
        // Between the fence and the mount this process may have been stopped for an hour.
        let verified = verify_device(spec, &device).and_then(|()| shutdown::is_latest(spec, fenced.key()));
        if let Err(error) = verified {
            mounts::unmount_all(&spec.mount_point)?;
            return Err(error);
        }
        Ok(attached)
    }

    fn demote(&self, spec: &VolumeSpec, attached: Attached) -> Result<Standby> {
        let tag = tag(&spec.mount_point, &spec.id)?;
        let Attached { lock, owner, .. } = attached;
        let owner = owner.map_or_else(|| own(spec), Ok)?;
        let standby = make_standby(spec, &tag, owner)?;
        drop(lock);
        Ok(standby)
    }

    fn detach_backup(&self, spec: &VolumeSpec, standby: Standby) -> Result<()> {
        clean_up(spec, &tag(&spec.mount_point, &spec.id)?)?;
        drop(standby);
        Ok(())
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Attached> {
        let tag = tag(&spec.mount_point, &spec.id)?;
        let lock = lock(&spec.source, &spec.id)?;
        let standby = make_standby(spec, &tag, own(spec)?)?;
        let mounted = shutdown::refuse_other_mounts(spec)
            .and_then(|()| set_writable(&standby.device))
            .and_then(|()| mount_standby(spec, standby, Some(lock)));
        if mounted.is_err()
            && let Err(worse) = clean_up(spec, &tag)
        {
            tracing::error!(volume = %spec.id, error = %worse, "cleaning up after a failed attach");
        }
        mounted
    }

    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()> {
        clean_up(spec, &tag(&spec.mount_point, &spec.id)?)?;
        drop(attached);
        Ok(())
    }

    fn settle(&self, root: &Path) -> Result<()> {
        views::settle(root)
    }

    fn open_view(&self, spec: &VolumeSpec, at: &Path) -> Result<ViewMount> {
        views::open(spec, at, views::Below::File)
    }

    fn clean_views(&self, spec: &VolumeSpec, folder: &Path) -> Result<()> {
        views::clean_up(spec, folder)
    }

    fn grow(&self, spec: &VolumeSpec, attached: &Place) -> Result<bool> {
        let doing = || format!("enlarging {}", spec.source.display());
        let file = OpenOptions::new().write(true).open(&spec.source).map_err(|e| io_error(&doing(), &e))?;
        let length = file.metadata().map_err(|e| io_error(&doing(), &e))?.len();
        let wanted = spec.size_bytes / u64::from(BLOCK_BYTES) * u64::from(BLOCK_BYTES);
        if length < wanted {
            file.set_len(wanted).and_then(|()| file.sync_all()).map_err(|e| io_error(&doing(), &e))?;
        }
        fail::fail_point!("loop::grow::lengthened", |_| Err(Error::unavailable("failpoint")));
        sys::take_capacity(&attached.device, &open(&attached.device)?)?;
        ext4::grow(attached, length.max(wanted))
    }

    /// What lies at its place may be another volume's, or a backup: only what bears this volume's own identity goes.
    fn delete(&self, spec: &VolumeSpec) -> Result<Option<String>> {
        let source = &spec.source;
        match fs::metadata(source) {
            Ok(meta) if !meta.is_file() => return Ok(Some("it is no file".into())),
            Ok(_) => {
                if let Some(why) = ext4::why_not_own(source, spec)? {
                    return Ok(Some(why));
                }
                images::remove_file(source)?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(io_error(&format!("looking at {}", source.display()), &e)),
        }
        let parent = source.parent().unwrap_or(Path::new("/"));
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(|e| io_error(&format!("syncing {}", parent.display()), &e))?;
        Ok(None)
    }

    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        let meta = fs::metadata(&spec.source).ok();
        let devices = devices_with_tag(&tag(&spec.mount_point, &spec.id)?)?;
        Ok(Description {
            exists: meta.is_some(),
            size_bytes: meta.map_or(0, |m| m.len()),
            devices: devices.iter().map(|d| d.display().to_string()).collect(),
            mounted: !mounts::at(&spec.mount_point)?.is_empty(),
        })
    }

    fn images(&self) -> Result<&dyn Images> {
        Ok(self)
    }
}

impl Images for LoopProvider {
    fn image_place(&self, spec: &VolumeSpec, backup: &str, folder: Option<&Path>) -> Result<String> {
        let place = match folder {
            Some(folder) => folder.join(format!("{}{}", spec.id, image_ending(backup))),
            None => with_ending(&spec.source, &image_ending(backup)),
        };
        place
            .into_os_string()
            .into_string()
            .map_err(|place| Error::invalid(format!("volume {}: {} is not UTF-8", spec.id, place.display())))
    }

    fn back_up(&self, spec: &VolumeSpec, image: &Image) -> Result<String> {
        images::clone_at_once(&spec.source, image_file(image)?)?;
        Ok(image.place.clone())
    }

    fn drop_image(&self, image: &Image) -> Result<()> {
        let file = image_file(image)?;
        match file.parent() {
            Some(folder) if !folder.exists() => Err(Error::not_found(format!(
                "the image {} is not deleted: its folder is not there on this node",
                file.display()
            ))),
            _ => images::remove_file(file),
        }
    }

    /// Under another name, and always a new file: whoever had an older one open, however long ago, has nothing of this one.
    fn make_place(&self, spec: &VolumeSpec, attempt: &str) -> Result<()> {
        images::make_empty(&laid_file(spec, attempt))
    }

    fn drop_place(&self, spec: &VolumeSpec, attempt: &str) -> Result<()> {
        images::remove_file(&laid_file(spec, attempt))
    }

    fn drop_places(&self, spec: &VolumeSpec, except: Option<&str>) -> Result<()> {
        let kept = except.map(|attempt| laid_file(spec, attempt));
        let folder = spec.source.parent().unwrap_or(Path::new("/"));
        let failed = |e: std::io::Error| io_error(&format!("listing {}", folder.display()), &e);
        let stem = with_ending(&spec.source, LAID_ENDING);
        let stem = stem.file_name().unwrap_or_default();
        let entries = match fs::read_dir(folder) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let rest = name.as_encoded_bytes().strip_prefix(stem.as_encoded_bytes());
            // An older version has named it so, without an attempt.
            let is_place = rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'-');
            if is_place && kept.as_ref() != Some(&entry.path()) {
                images::remove_file(&entry.path())?;
            }
        }
        Ok(())
    }

    fn lay_down(&self, spec: &VolumeSpec, image: &Image, attempt: &str) -> Result<PathBuf> {
        let laid = laid_file(spec, attempt);
        images::copy_into(image_file(image)?, &laid)?;
        Ok(laid)
    }

    fn put_in_place(&self, spec: &VolumeSpec, attempt: &str, aside: Option<&str>) -> Result<Option<PathBuf>> {
        let (laid, source) = (laid_file(spec, attempt), &spec.source);
        if let Some(aside) = aside {
            return images::put_in_place(&laid, source, aside);
        }
        if source.exists() {
            if !images::is_of(source, spec) {
                return Err(Error::new(
                    Reason::AlreadyExists,
                    format!(
                        "{} is there already, and is not volume {}: give another --source",
                        source.display(),
                        spec.id
                    ),
                ));
            }
            return images::replace(&laid, source).map(|()| None);
        }
        images::put_in_place(&laid, source, "unused")
    }

    fn discard(&self, spec: &VolumeSpec) -> Result<()> {
        if images::is_of(&spec.source, spec) {
            images::remove_file(&spec.source)?;
        }
        self.drop_places(spec, None)
    }
}

/// How the names of a backup's images end.
fn image_ending(backup: &str) -> String {
    format!(".backup-{backup}")
}

/// The file of an image. Its name says of which backup it is: nothing else is ever taken for one.
fn image_file(image: &Image) -> Result<&Path> {
    if image.place.ends_with(&image_ending(&image.backup)) {
        return Ok(Path::new(&image.place));
    }
    Err(Error::corrupt(format!("{:?} is no image of the backup {}", image.place, image.backup)))
}

/// How the names begin to end under which images are laid down.
const LAID_ENDING: &str = ".restoring";

/// Where an attempt lays an image down.
fn laid_file(spec: &VolumeSpec, attempt: &str) -> PathBuf {
    with_ending(&spec.source, &format!("{LAID_ENDING}-{attempt}"))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// What this node calls its device for a volume: the mount point is this node's alone.
pub(super) fn tag(mount_point: &Path, id: &VolumeId) -> Result<Tag> {
    // The folder above exists before and after the mount; the mount point itself may not.
    let parent = mount_point.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(|e| io_error(&format!("making {}", parent.display()), &e))?;
    let parent =
        fs::canonicalize(parent).map_err(|e| io_error(&format!("resolving {}", parent.display()), &e))?;
    let place = parent.join(id.as_str());
    // Two checksums over different bytes: 64 bits, enough to tell some dozens of devices apart.
    let bytes = place.as_os_str().as_encoded_bytes();
    let turned: Vec<u8> = bytes.iter().rev().copied().collect();
    let text = format!("shardfs-{:08x}{:08x}-{id}", crc32c::crc32c(bytes), crc32c::crc32c(&turned));
    let mut tag = [0; LO_NAME_BYTES];
    // The kernel keeps a NUL at the end.
    let length = text.len().min(LO_NAME_BYTES - 1);
    tag[..length].copy_from_slice(&text.as_bytes()[..length]);
    Ok(tag)
}

/// Takes the lock that shows that a process of this node lives: while it is held nobody else removes the
/// node's mount and device.
pub(super) fn own(spec: &VolumeSpec) -> Result<OwnedFd> {
    let path = shutdown::owner_file(&spec.mount_point);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    wait_for_lock(file, &path, || {
        format!("volume {}: another process of this node has it ({} is locked)", spec.id, path.display())
    })
}

/// A new device, and nothing else of this node's for the volume.
fn make_standby(spec: &VolumeSpec, tag: &Tag, owner: OwnedFd) -> Result<Standby> {
    clean_up(spec, tag)?;
    make_mount_point(&spec.mount_point)?;
    let device = sys::attach_device(&spec.source, tag)?;
    Ok(Standby { device, owner: Some(owner) })
}

fn open(device: &Path) -> Result<File> {
    sys::open_device(device, false).map_err(|e| io_error(&format!("opening {}", device.display()), &e))
}

/// Fails unless a device of this node holds the volume's own filesystem: the file may be one that another cluster uses, which is
/// not to be fenced from it, nor mounted. Read through the device, never through the file: pages of a file that somebody
/// writes directly can make his sync fail.
pub(super) fn check_content(spec: &VolumeSpec, device: &Path) -> Result<()> {
    sys::drop_cache(device, &open(device)?)?;
    check_loop(device, spec)
}

fn set_writable(device: &Path) -> Result<()> {
    sys::set_read_only(device, &open(device)?, false)
}

/// Mounts a device for writing. It fails, and changes nothing, if the device was made read-only since.
fn mount_standby(spec: &VolumeSpec, standby: Standby, lock: Option<OwnedFd>) -> Result<Attached> {
    let Standby { device, owner } = standby;
    // The file may have grown since the device was made.
    sys::take_capacity(&device, &open(&device)?)?;
    // What was read from it before, by us or by whoever looks at new devices, may be older than the fence.
    check_content(spec, &device)?;
    mount(&device, spec)?;
    if let Err(error) = verify_identity(&spec.mount_point, spec) {
        mounts::unmount_all(&spec.mount_point)?;
        return Err(error);
    }
    Ok(Attached { root: spec.mount_point.clone(), device: device.display().to_string(), lock, owner })
}

/// Whether what is mounted is this node's device still: its number may have been given away in between.
fn verify_device(spec: &VolumeSpec, device: &Path) -> Result<()> {
    let found = sys::inspect(device, &open(device)?);
    if found.is_some_and(|found| Ok(found.tag) == tag(&spec.mount_point, &spec.id).map_err(drop)) {
        return Ok(());
    }
    Err(Error::unavailable(format!(
        "volume {}: {} is no device of this node any more",
        spec.id,
        device.display()
    )))
}

/// Unmounts and detaches whatever a process of this node has left for the volume.
pub(super) fn clean_up(spec: &VolumeSpec, tag: &Tag) -> Result<()> {
    let devices = devices_with_tag(tag)?;
    for mount in mounts::at(&spec.mount_point)? {
        if !devices.contains(&mount.source) && !is_over(&mount.source, &spec.source) {
            return Err(in_the_way(spec, &mount.source));
        }
    }
    shutdown::check_unmount(&spec.mount_point)?;
    mounts::unmount_all(&spec.mount_point)?;
    // Somebody may have mounted our device elsewhere, to look: it must not be taken away under them.
    if let Some(mount) = mounts::list()?.into_iter().find(|m| devices.contains(&m.source)) {
        return Err(Error::unavailable(format!(
            "volume {}: {} is also mounted at {}: unmount it there",
            spec.id,
            mount.source.display(),
            mount.at.display()
        )));
    }
    devices.iter().try_for_each(|device| {
        wait_until_unclaimed(spec, device)?;
        detach_device(device)
    })
}

/// Whether a loop device stands on this file.
fn is_over(device: &Path, source: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let backing = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file"));
    let Ok(source) = fs::canonicalize(source) else { return false };
    backing.is_ok_and(|path| Path::new(path.trim_end_matches('\n')) == source)
}

/// A file that an operator made: formatted if it is certainly empty and never was in use.
fn format_if_empty(spec: &VolumeSpec) -> Result<()> {
    if spec.formatted {
        return Ok(());
    }
    match probe(&spec.source)? {
        Content::Zeros => {
            let length = fs::metadata(&spec.source).map_or(0, |m| m.len());
            if length < super::LOOP_BYTES_MIN {
                return Err(Error::invalid(format!(
                    "volume {}: {} has only {length} bytes; remove it, or give it {} at least",
                    spec.id,
                    spec.source.display(),
                    super::LOOP_BYTES_MIN
                )));
            }
            let _lock = lock(&spec.source, &spec.id)?;
            make_filesystem(&spec.source, &spec.id, Target::File, marked_uuid(spec))
        }
        Content::Ext4 { .. } | Content::Unknown => check_label(&spec.source, spec),
    }
}

fn make_backing(spec: &VolumeSpec) -> Result<()> {
    let source = &spec.source;
    let mut name = source.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = source.with_file_name(name);
    let doing = format!("making {}", fresh.display());
    let parent = source.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(|e| io_error(&doing, &e))?;
    // What a killed process left is made again from the start.
    if let Err(e) = fs::remove_file(&fresh)
        && e.kind() != ErrorKind::NotFound
    {
        return Err(io_error(&format!("removing {}", fresh.display()), &e));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(|e| io_error(&doing, &e))?;
    file.set_len(spec.size_bytes / u64::from(BLOCK_BYTES) * u64::from(BLOCK_BYTES))
        .map_err(|e| io_error(&doing, &e))?;
    make_filesystem(&fresh, &spec.id, Target::SparseFile, marked_uuid(spec))?;
    let publish = || -> std::io::Result<()> {
        file.sync_all()?;
        // No one else makes this name: the volume has one primary. Still, never over anything.
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            &fresh,
            rustix::fs::CWD,
            source,
            rustix::fs::RenameFlags::NOREPLACE,
        )?;
        File::open(parent)?.sync_all()
    };
    publish().map_err(|e| io_error(&format!("naming {}", source.display()), &e))
}

#[cfg(test)]
mod tests;
