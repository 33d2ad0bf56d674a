//! A volume that is a sparse file: a loop device of this node's own over it, direct I/O on, ext4 on that.
//!
//! Every node that attaches a volume has its own loop device and so its own page cache, as on real
//! multi-attach storage. A device of this node is known by its tag (`lo_file_name`), which is set in the same call that
//! makes the device: so what a killed process left behind is found for certain and nobody else's is touched.
//!
//! A new volume is formatted under another name and then renamed: a backing file that is there under its own
//! name is complete. Detaching a device happens only after its last unmount.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use shardfs_proto::types::{Error, Reason, Result, VolumeId};

use super::{
    Attached, Description, VolumeProvider, VolumeSpec, io_error, lock, make_mount_point, mounts,
    verify_identity,
};

/// The provider `loop`.
pub struct LoopProvider;

/// Logical block size of the devices: that of the filesystem, so that direct I/O is aligned on any backing.
const BLOCK_BYTES: u32 = 4096;
/// Other processes may take the free device that the kernel named; then it names another.
const FREE_DEVICE_ATTEMPTS_MAX: usize = 32;
/// Bytes at the start that must be zero in a file that is to be formatted: every filesystem and partition table has its
/// mark there.
const PROBE_BYTES: usize = 1 << 20;
/// Bytes of an ext4 label.
const LABEL_BYTES_MAX: usize = 16;
/// What labels begin with.
const LABEL_PREFIX: &str = "sfs-";
/// Bytes of data for every inode: RocksDB's files are large and few, but small shards are many.
const BYTES_PER_INODE: u32 = 16_384;

// From linux/fs.h and linux/loop.h.
const BLKROSET: libc::c_ulong = 0x125D;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;
const LO_NAME_BYTES: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; LO_NAME_BYTES],
    lo_crypt_name: [u8; LO_NAME_BYTES],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

impl LoopInfo64 {
    fn zeroed() -> LoopInfo64 {
        LoopInfo64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: 0,
            lo_file_name: [0; LO_NAME_BYTES],
            lo_crypt_name: [0; LO_NAME_BYTES],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        }
    }
}

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

    fn attach(&self, spec: &VolumeSpec) -> Result<Attached> {
        let tag = tag(&spec.mount_point, &spec.id)?;
        let lock = lock(&spec.source, &spec.id)?;
        clean_up(spec, &tag)?;
        make_mount_point(&spec.mount_point)?;
        let device = attach_device(&spec.source, &tag)?;
        let mounted = mount(&device, spec).and_then(|()| verify_identity(&spec.mount_point, spec));
        if let Err(error) = mounted {
            if let Err(worse) = clean_up(spec, &tag) {
                tracing::error!(volume = %spec.id, error = %worse, "cleaning up after a failed attach");
            }
            return Err(error);
        }
        Ok(Attached {
            root: spec.mount_point.clone(),
            device: device.display().to_string(),
            lock: Some(lock),
        })
    }

    fn detach(&self, spec: &VolumeSpec, attached: Attached) -> Result<()> {
        clean_up(spec, &tag(&spec.mount_point, &spec.id)?)?;
        drop(attached.lock);
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
fn tag(mount_point: &Path, id: &VolumeId) -> Result<[u8; LO_NAME_BYTES]> {
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

/// Unmounts and detaches whatever a process of this node has left for the volume.
fn clean_up(spec: &VolumeSpec, tag: &[u8; LO_NAME_BYTES]) -> Result<()> {
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
    devices.iter().try_for_each(|device| detach_device(device))
}

/// Whether a loop device stands on this file.
fn is_over(device: &Path, source: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let backing = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file"));
    let Ok(source) = fs::canonicalize(source) else { return false };
    backing.is_ok_and(|path| Path::new(path.trim_end_matches('\n')) == source)
}

fn devices_with_tag(tag: &[u8; LO_NAME_BYTES]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir("/sys/block").map_err(|e| io_error("listing /sys/block", &e))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        // Only devices that are in use have this folder.
        if !name.as_encoded_bytes().starts_with(b"loop") || !entry.path().join("loop").exists() {
            continue;
        }
        let path = Path::new("/dev").join(&name);
        let Ok(file) = open_device(&path, false) else { continue };
        if status(&file).is_some_and(|info| info.lo_file_name == *tag) {
            found.push(path);
        }
    }
    Ok(found)
}

fn status(device: &File) -> Option<LoopInfo64> {
    let mut info = LoopInfo64::zeroed();
    // SAFETY: the kernel writes one `loop_info64`, whose layout `LoopInfo64` has.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) };
    (done == 0).then_some(info)
}

fn open_device(path: &Path, write: bool) -> std::io::Result<File> {
    let opened = OpenOptions::new().read(true).write(write).custom_flags(libc::O_CLOEXEC).open(path);
    match opened {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            make_node(path)?;
            OpenOptions::new().read(true).write(write).custom_flags(libc::O_CLOEXEC).open(path)
        }
        opened => opened,
    }
}

/// Without devtmpfs (some containers) nobody makes the device's node.
fn make_node(path: &Path) -> std::io::Result<()> {
    let number = path.to_str().and_then(|p| p.strip_prefix("/dev/loop")).and_then(|n| n.parse::<u32>().ok());
    let Some(number) = number else { return Err(ErrorKind::NotFound.into()) };
    let device = rustix::fs::makedev(LOOP_MAJOR, number);
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    match rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::BlockDevice, mode, device) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn attach_device(source: &Path, tag: &[u8; LO_NAME_BYTES]) -> Result<PathBuf> {
    let backing = OpenOptions::new()
        .read(true)
        .write(true)
        .open(source)
        .map_err(|e| io_error(&format!("opening {}", source.display()), &e))?;
    let control =
        OpenOptions::new().read(true).write(true).open("/dev/loop-control").map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(
                Reason::Unsupported,
                "/dev/loop-control is missing: load the module `loop`, or use volumes of kind `dir`",
            ),
            ErrorKind::PermissionDenied => Error::new(
                Reason::NotPermitted,
                "loop devices need root: run the node as root, or use volumes of kind `dir`",
            ),
            _other => io_error("opening /dev/loop-control", &e),
        })?;
    for _ in 0..FREE_DEVICE_ATTEMPTS_MAX {
        // SAFETY: the call takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
        if number < 0 {
            return Err(io_error("asking for a free loop device", &std::io::Error::last_os_error()));
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device =
            open_device(&path, true).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
        match configure(&device, backing.as_raw_fd(), tag) {
            Ok(()) => {
                if let Err(e) = make_writable(&device) {
                    detach_device(&path)?;
                    return Err(io_error(&format!("making {} writable", path.display()), &e));
                }
                if status(&device).is_some_and(|info| info.lo_flags & LO_FLAGS_DIRECT_IO == 0) {
                    tracing::warn!(device = %path.display(), backing = %source.display(),
                        "the backing file's filesystem allows no direct I/O: its pages are cached twice");
                }
                return Ok(path);
            }
            // Somebody else was faster.
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
            Err(e) => {
                return Err(io_error(&format!("attaching {} to {}", source.display(), path.display()), &e));
            }
        }
    }
    Err(Error::unavailable("no loop device stays free long enough to be used"))
}

fn configure(device: &File, backing: RawFd, tag: &[u8; LO_NAME_BYTES]) -> std::io::Result<()> {
    let mut config = LoopConfig {
        fd: backing as u32,
        block_size: BLOCK_BYTES,
        info: LoopInfo64::zeroed(),
        reserved: [0; 8],
    };
    config.info.lo_flags = LO_FLAGS_DIRECT_IO;
    config.info.lo_file_name = *tag;
    // SAFETY: the kernel reads one `loop_config`, whose layout `LoopConfig` has; the descriptors are open.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// A device keeps the read-only flag (`blockdev --setro`) that somebody gave it, over every detach.
fn make_writable(device: &File) -> std::io::Result<()> {
    let read_only: libc::c_int = 0;
    // SAFETY: the kernel reads one int.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKROSET as _, &raw const read_only) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn detach_device(path: &Path) -> Result<()> {
    let device =
        open_device(path, false).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    // SAFETY: the call takes no argument that is used.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _, 0) };
    let error = std::io::Error::last_os_error();
    // ENXIO: it is free already.
    if done == 0 || error.raw_os_error() == Some(libc::ENXIO) {
        return Ok(());
    }
    Err(io_error(&format!("detaching {}", path.display()), &error))
}

fn mount(device: &Path, spec: &VolumeSpec) -> Result<()> {
    check_label(device, spec)?;
    let flags = MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID;
    let options = CString::new("errors=remount-ro").expect("no NUL");
    rustix::mount::mount(device, &spec.mount_point, "ext4", flags, options.as_c_str()).map_err(|e| {
        let hint = match e {
            Errno::BUSY => "it is mounted or held by another process",
            Errno::PERM => "mounting needs root",
            Errno::NODEV => "this kernel has no ext4",
            Errno::INVAL | Errno::UCLEAN | Errno::IO | Errno::BADMSG => {
                "the filesystem is damaged: see the kernel's log, and run fsck.ext4 on the backing file"
            }
            _other => "see the kernel's log",
        };
        let reason = if e == Errno::BUSY { Reason::Unavailable } else { Reason::Io };
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
