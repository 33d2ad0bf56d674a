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

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use shardfs_proto::types::{Error, Reason, Result, VolumeId, clock};

use super::fence::{Fence, Fenced, shutdown};
use super::{
    Attached, Description, Standby, VolumeProvider, VolumeSpec, io_error, lock, make_mount_point, mounts,
    verify_identity, wait_for_lock,
};
use sys::{BLOCK_BYTES, LO_NAME_BYTES, Tag, detach_device, devices_with_tag};

pub(super) mod sys;

/// The provider `loop`.
pub struct LoopProvider;

/// Bytes at the start that must be zero in a file that is to be formatted: every filesystem and partition table has its
/// mark there.
const PROBE_BYTES: usize = 1 << 20;
/// Bytes of an ext4 label.
const LABEL_BYTES_MAX: usize = 16;
/// How long a device may stay claimed after the unmount: other nodes look whether it is, in microseconds.
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(2);
/// Pause between attempts.
const CLAIM_PAUSE: Duration = Duration::from_millis(5);
/// What labels begin with.
const LABEL_PREFIX: &str = "sfs-";
/// Bytes of data for every inode: RocksDB's files are large and few, but small shards are many.
const BYTES_PER_INODE: u32 = 16_384;

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
fn own(spec: &VolumeSpec) -> Result<OwnedFd> {
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

fn set_writable(device: &Path) -> Result<()> {
    sys::set_read_only(device, &open(device)?, false)
}

/// Mounts a device for writing. It fails, and changes nothing, if the device was made read-only since.
fn mount_standby(spec: &VolumeSpec, standby: Standby, lock: Option<OwnedFd>) -> Result<Attached> {
    let Standby { device, owner } = standby;
    // What was read from it before, by us or by whoever looks at new devices, may be older than the fence.
    sys::drop_cache(&device, &open(&device)?)?;
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
fn clean_up(spec: &VolumeSpec, tag: &Tag) -> Result<()> {
    let devices = devices_with_tag(tag)?;
    for mount in mounts::at(&spec.mount_point)? {
        if !devices.contains(&mount.source) && !is_over(&mount.source, &spec.source) {
            return Err(Error::new(
                Reason::AlreadyExists,
                format!(
                    "volume {}: {} is mounted at {}; unmount it first",
                    spec.id,
                    mount.source.display(),
                    spec.mount_point.display()
                ),
            ));
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

/// A mount that another mount namespace has a copy of lives on, with all that is dirty in it, and so does an unmount
/// that is under way there.
fn wait_until_unclaimed(spec: &VolumeSpec, device: &Path) -> Result<()> {
    let begun = clock::monotonic();
    loop {
        match sys::claim_device(device) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy && begun.elapsed() < CLAIM_WAIT_MAX => {
                std::thread::sleep(CLAIM_PAUSE);
            }
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                return Err(Error::unavailable(format!(
                    "volume {}: {} is still mounted in another mount namespace, or another program has it (`grep {} \
                     /proc/*/mountinfo` helps)",
                    spec.id,
                    device.display(),
                    device.display()
                )));
            }
            // Free, or gone.
            _unclaimed => return Ok(()),
        }
    }
}

/// Whether a loop device stands on this file.
fn is_over(device: &Path, source: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let backing = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file"));
    let Ok(source) = fs::canonicalize(source) else { return false };
    backing.is_ok_and(|path| Path::new(path.trim_end_matches('\n')) == source)
}

fn mount(device: &Path, spec: &VolumeSpec) -> Result<()> {
    check_label(device, spec)?;
    let flags = MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID;
    let options = CString::new("errors=remount-ro").expect("no NUL");
    rustix::mount::mount(device, &spec.mount_point, "ext4", flags, options.as_c_str()).map_err(|e| {
        let hint = match e {
            Errno::BUSY => "it is mounted or held by another process",
            Errno::ACCESS | Errno::ROFS => {
                "another node has taken the volume since, or its fence was not acquired"
            }
            Errno::PERM => "mounting needs root",
            Errno::NODEV => "this kernel has no ext4",
            Errno::INVAL | Errno::UCLEAN | Errno::IO | Errno::BADMSG => {
                "the filesystem is damaged: see the kernel's log, and run fsck.ext4 on the backing file"
            }
            _other => "see the kernel's log",
        };
        let reason = match e {
            Errno::BUSY | Errno::ACCESS | Errno::ROFS => Reason::Unavailable,
            _other => Reason::Io,
        };
        Error::new(
            reason,
            format!(
                "volume {}: mounting {} at {}: {e}: {hint}",
                spec.id,
                device.display(),
                spec.mount_point.display()
            ),
        )
    })
}

/// What a file's first bytes say.
#[derive(PartialEq, Eq, Debug)]
enum Content {
    Zeros,
    Ext4 { label: Vec<u8> },
    Unknown,
}

fn probe(path: &Path) -> Result<Content> {
    let mut bytes = Vec::new();
    let doing = || format!("reading {}", path.display());
    File::open(path)
        .and_then(|file| file.take(PROBE_BYTES as u64).read_to_end(&mut bytes))
        .map_err(|e| io_error(&doing(), &e))?;
    Ok(classify(&bytes))
}

fn classify(bytes: &[u8]) -> Content {
    // The superblock lies at 1024: magic at 56, label at 120.
    let Some(superblock) = bytes.get(1024..1024 + 136) else {
        return if bytes.iter().all(|b| *b == 0) { Content::Zeros } else { Content::Unknown };
    };
    if superblock[56..58] == [0x53, 0xEF] {
        let label: Vec<u8> = superblock[120..136].iter().copied().take_while(|b| *b != 0).collect();
        return Content::Ext4 { label };
    }
    if bytes.iter().all(|b| *b == 0) { Content::Zeros } else { Content::Unknown }
}

fn label(id: &VolumeId) -> String {
    let mut label = format!("{LABEL_PREFIX}{id}");
    // Ids are ASCII.
    label.truncate(LABEL_BYTES_MAX);
    label
}

fn check_label(path: &Path, spec: &VolumeSpec) -> Result<()> {
    let refused = |what: &str| {
        Err(Error::invalid(format!(
            "volume {}: {} holds {what}, not the volume's own ext4: it is left alone; if it is of no use, remove it",
            spec.id,
            spec.source.display()
        )))
    };
    match probe(path)? {
        Content::Ext4 { label: found } if found == label(&spec.id).as_bytes() => Ok(()),
        Content::Ext4 { label: found } => {
            refused(&format!("an ext4 labelled {:?}", String::from_utf8_lossy(&found)))
        }
        Content::Unknown => refused("something unknown"),
        Content::Zeros => Err(Error::corrupt(format!(
            "{} is empty, but volume {} has been used before: put its backing file back",
            spec.source.display(),
            spec.id
        ))),
    }
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
            make_filesystem(&spec.source, &spec.id, false)
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
    make_filesystem(&fresh, &spec.id, true)?;
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

/// `sparse`: the file is known to be all zeros, so that the inode tables need not be written.
fn make_filesystem(path: &Path, id: &VolumeId, sparse: bool) -> Result<()> {
    let mut extended = String::from("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0");
    if sparse {
        extended.push_str(",nodiscard,assume_storage_prezeroed=1");
    }
    let search = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("mkfs.ext4")
        .env("PATH", format!("{search}:/usr/sbin:/sbin"))
        .args([
            "-q",
            "-F",
            "-b",
            "4096",
            "-m",
            "0",
            "-i",
            &BYTES_PER_INODE.to_string(),
            "-L",
            &label(id),
            "-E",
            &extended,
        ])
        .arg(path)
        .output()
        .map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(
                Reason::Unsupported,
                "mkfs.ext4 is not installed: install e2fsprogs, or use volumes of kind `dir`",
            ),
            _other => io_error("running mkfs.ext4", &e),
        })?;
    if !output.status.success() {
        return Err(Error::io(format!(
            "mkfs.ext4 on {} failed ({}): {}",
            path.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
