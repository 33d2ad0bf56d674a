//! Loop devices as the kernel has them: the ioctls of linux/loop.h and linux/fs.h that volumes need, and which
//! devices there are.
//!
//! Nothing here decides anything. A device of this node is known by its tag (`lo_file_name`), which is set in the
//! same call that makes the device; what it stands on is known by device and inode of the backing file, whatever
//! its path became.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use shardfs_proto::types::{Error, Reason, Result};

use crate::volume::io_error;

/// Logical block size of the devices: that of the filesystem, so that direct I/O is aligned on any backing.
pub(in crate::volume) const BLOCK_BYTES: u32 = 4096;
/// Other processes may take the free device that the kernel named; then it names another.
const FREE_DEVICE_ATTEMPTS_MAX: usize = 32;
/// Bytes of a tag; the kernel keeps a NUL at the end.
pub(in crate::volume) const LO_NAME_BYTES: usize = 64;

/// What a node calls its device.
pub(in crate::volume) type Tag = [u8; LO_NAME_BYTES];

// From linux/loop.h and linux/fs.h.
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const BLKROSET: libc::c_ulong = 0x125D;
const BLKFLSBUF: libc::c_ulong = 0x1261;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;

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
    lo_file_name: Tag,
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

/// The file that a device stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::volume) struct Backing {
    device: (u32, u32),
    inode: u64,
}

impl Backing {
    /// That of a file.
    pub(in crate::volume) fn of(source: &Path) -> Result<Backing> {
        let meta =
            fs::metadata(source).map_err(|e| io_error(&format!("looking at {}", source.display()), &e))?;
        let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
        Ok(Backing { device, inode: meta.ino() })
    }
}

/// A loop device that is in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::volume) struct LoopDevice {
    /// `/dev/loopN`.
    pub(in crate::volume) path: PathBuf,
    /// `loopN`.
    pub(in crate::volume) name: String,
    /// Major and minor number.
    pub(in crate::volume) number: (u32, u32),
    /// What its node calls it.
    pub(in crate::volume) tag: Tag,
    /// What it stands on.
    pub(in crate::volume) backing: Backing,
    /// The driver itself refuses writes: for good, whoever asks.
    pub(in crate::volume) never_writes: bool,
}

/// All loop devices that are in use, of whichever node.
pub(in crate::volume) fn devices() -> Result<Vec<LoopDevice>> {
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
        found.extend(inspect(&path, &file));
    }
    Ok(found)
}

/// The devices with a tag.
pub(in crate::volume) fn devices_with_tag(tag: &Tag) -> Result<Vec<PathBuf>> {
    Ok(devices()?.into_iter().filter(|d| d.tag == *tag).map(|d| d.path).collect())
}

/// What a device is now; `None`: free.
pub(in crate::volume) fn inspect(path: &Path, file: &File) -> Option<LoopDevice> {
    let info = status(file)?;
    // The kernel's encoding of device numbers (`new_encode_dev`).
    let device = info.lo_device as u32;
    let backing = ((device & 0xF_FF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xF_FF00));
    Some(LoopDevice {
        path: path.to_owned(),
        name: path.file_name()?.to_str()?.to_owned(),
        number: (LOOP_MAJOR, info.lo_number),
        tag: info.lo_file_name,
        backing: Backing { device: backing, inode: info.lo_inode },
        never_writes: info.lo_flags & LO_FLAGS_READ_ONLY != 0,
    })
}

fn status(device: &File) -> Option<LoopInfo64> {
    let mut info = LoopInfo64::zeroed();
    // SAFETY: the kernel writes one `loop_info64`, whose layout `LoopInfo64` has.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) };
    (done == 0).then_some(info)
}

/// Opens a device, whose node is made if nobody has.
pub(in crate::volume) fn open_device(path: &Path, write: bool) -> std::io::Result<File> {
    open_with(path, write, libc::O_CLOEXEC)
}

/// Opens a device for nobody else but us: neither mounts nor others that claim it. Fails with EBUSY while it is mounted
/// anywhere, in this mount namespace or another.
pub(in crate::volume) fn claim_device(path: &Path) -> std::io::Result<File> {
    open_with(path, false, libc::O_CLOEXEC | libc::O_EXCL)
}

fn open_with(path: &Path, write: bool, flags: i32) -> std::io::Result<File> {
    let open = || OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    match open() {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            make_node(path)?;
            open()
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

/// Makes a device over a file, and it read-only: whatever flag the number had from its last user.
pub(in crate::volume) fn attach_device(source: &Path, tag: &Tag) -> Result<PathBuf> {
    attach(source, tag, true)
}

/// Makes a device over a file whose driver refuses writes, because the file is open for reading only: no flag makes it
/// writable.
pub(in crate::volume) fn attach_view_device(source: &Path, tag: &Tag) -> Result<PathBuf> {
    attach(source, tag, false)
}

fn attach(source: &Path, tag: &Tag, write: bool) -> Result<PathBuf> {
    let backing = OpenOptions::new()
        .read(true)
        .write(write)
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
                if let Err(error) = set_read_only(&path, &device, true) {
                    detach_device(&path)?;
                    return Err(error);
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

fn configure(device: &File, backing: RawFd, tag: &Tag) -> std::io::Result<()> {
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

/// Whether a device reads and writes what is below it directly, past the page cache.
pub(in crate::volume) fn is_direct(path: &Path) -> Result<bool> {
    let device =
        open_device(path, false).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    Ok(status(&device).is_some_and(|info| info.lo_flags & LO_FLAGS_DIRECT_IO != 0))
}

/// Sectors that were written to a device's number since the machine started.
pub(in crate::volume) fn sectors_written(device: &Path) -> Result<u64> {
    // The seventh field: the kernel's Documentation/block/stat.rst.
    const SECTORS_WRITTEN: usize = 6;
    let name = device.file_name().unwrap_or_default();
    let path = Path::new("/sys/block").join(name).join("stat");
    let text = fs::read_to_string(&path).map_err(|e| io_error(&format!("reading {}", path.display()), &e))?;
    text.split_ascii_whitespace()
        .nth(SECTORS_WRITTEN)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| Error::io(format!("{}: another format than expected", path.display())))
}

/// Frees a device. Only after its last unmount.
pub(in crate::volume) fn detach_device(path: &Path) -> Result<()> {
    let device =
        open_device(path, false).map_err(|e| io_error(&format!("opening {}", path.display()), &e))?;
    // SAFETY: the call takes no argument that is used.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _, 0) };
    let error = std::io::Error::last_os_error();
    if done == 0 {
        // The flag would outlive the detaching, which ends with the last descriptor, and meet whoever uses the
        // number next.
        return set_read_only(path, &device, false);
    }
    // ENXIO: it is free already.
    if error.raw_os_error() == Some(libc::ENXIO) {
        return Ok(());
    }
    Err(io_error(&format!("detaching {}", path.display()), &error))
}

/// Read-only, a device is neither mounted for writing nor written directly. A filesystem that is mounted on it
/// goes on writing.
pub(in crate::volume) fn set_read_only(path: &Path, device: &File, read_only: bool) -> Result<()> {
    let flag = libc::c_int::from(read_only);
    // SAFETY: the kernel reads one int.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKROSET as _, &raw const flag) };
    if done == 0 {
        return Ok(());
    }
    let doing = format!("making {} {}", path.display(), if read_only { "read-only" } else { "writable" });
    Err(io_error(&doing, &std::io::Error::last_os_error()))
}

/// Gives a device the size that its file has by now.
pub(in crate::volume) fn take_capacity(path: &Path, device: &File) -> Result<()> {
    // SAFETY: the call takes no argument that is used.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY as _, 0) };
    if done == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(io_error(&format!("giving {} its file's size", path.display()), &error))
}

/// Forgets what was read from a device: another node has written since. What is dirty is written first.
pub(in crate::volume) fn drop_cache(path: &Path, device: &File) -> Result<()> {
    // SAFETY: the call takes no argument that is used.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF as _, 0) };
    if done == 0 {
        return Ok(());
    }
    Err(io_error(&format!("dropping the cache of {}", path.display()), &std::io::Error::last_os_error()))
}
