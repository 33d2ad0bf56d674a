//! Volumes on loop devices: a sparse file, a loop device with direct IO over it, an ext4.
//!
//! Every node that attaches a volume makes a device of its own, with a page cache of its own, as on a real
//! multi-attach volume. A device of ours is known by the file that it is bound to and by its name, which
//! holds the node's id: only such a one is ever unmounted or detached.
//!
//! Invariants: a device is formatted only if its first MiB is zeros; it is detached only after its
//! last unmount.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;
use shardfs_proto::types::{Error, Reason, Result};

use super::{Attachment, Description, Provider, VolumeSpec, identity, io_error, ioctl, mounts};

/// The name in volume records.
pub const NAME: &str = "loop";
/// The least size of a volume: an ext4 with its journal, the reserve, and something to use.
pub const SIZE_BYTES_MIN: u64 = 256 << 20;
/// Sector size of the devices: what ext4 and every SSD work in.
const BLOCK_BYTES: u32 = 4096;
/// How much must be zeros before a device is formatted: every known filesystem, partition table, RAID
/// and LVM has its signature there.
const SIGNATURE_BYTES: usize = 1 << 20;
/// The ext4 label that says "made for ShardFS"; which volume it is stands in its identity file.
const LABEL: &[u8; 16] = b"shardfs\0\0\0\0\0\0\0\0\0";
/// Devices that others take between being found free and being configured.
const CONFIGURE_ATTEMPTS: u32 = 64;
/// How long a detached device may take to let go of its file.
const DETACH_ATTEMPTS: u32 = 100;
/// Between two looks at it.
const DETACH_PAUSE: Duration = Duration::from_millis(20);

/// Loop devices.
pub struct LoopProvider;

struct LoopAttachment {
    spec: VolumeSpec,
    device: PathBuf,
    attached: Mutex<bool>,
}

impl Provider for LoopProvider {
    fn name(&self) -> &'static str {
        NAME
    }

    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        if spec.size_bytes < SIZE_BYTES_MIN {
            return Err(Error::invalid(format!(
                "volume {}: {} bytes are too few, the least is {SIZE_BYTES_MIN}",
                spec.id, spec.size_bytes
            )));
        }
        let make = || -> std::io::Result<()> {
            if let Some(parent) = spec.source.parent() {
                fs::create_dir_all(parent)?;
            }
            let file =
                OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&spec.source)?;
            // A crash between making and sizing leaves an empty file.
            if file.metadata()?.len() == 0 {
                file.set_len(spec.size_bytes)?;
                file.sync_all()?;
            }
            Ok(())
        };
        make().map_err(io_error(format!("making {}", spec.source.display())))
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Box<dyn Attachment>> {
        self.create(spec)?;
        clear_stale(spec)?;
        let device = attach_device(spec)?;
        match mount(spec, &device) {
            Ok(()) => Ok(Box::new(LoopAttachment { spec: spec.clone(), device, attached: Mutex::new(true) })),
            Err(error) => {
                if let Err(also) = detach_device(spec, &device) {
                    tracing::warn!(volume = %spec.id, device = %device.display(), error = %also, "not detached");
                }
                Err(error)
            }
        }
    }

    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        let (exists, size_bytes) = match fs::metadata(&spec.source) {
            Ok(meta) => (true, meta.len()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (false, 0),
            Err(error) => return Err(io_error(format!("looking at {}", spec.source.display()))(error)),
        };
        let device = if exists { own_devices(spec)?.into_iter().next() } else { None };
        let mounted = mounts::at(&spec.mount_point)?.is_some_and(|m| Some(&m.source) == device.as_ref());
        Ok(Description { exists, size_bytes, device, mounted })
    }

    fn delete(&self, spec: &VolumeSpec) -> Result<()> {
        if let Some(device) = own_devices(spec)?.first() {
            return Err(Error::unavailable(format!(
                "volume {} is attached as {}",
                spec.id,
                device.display()
            )));
        }
        match fs::remove_file(&spec.source) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error(format!("removing {}", spec.source.display()))(error)),
        }
    }
}

impl Attachment for LoopAttachment {
    fn root(&self) -> &Path {
        &self.spec.mount_point
    }

    fn source(&self) -> String {
        format!("{} ({})", self.device.display(), self.spec.source.display())
    }

    fn detach(&self) -> Result<()> {
        let mut attached = self.attached.lock();
        if !*attached {
            return Ok(());
        }
        if mounts::at(&self.spec.mount_point)?.is_some_and(|m| m.source == self.device) {
            mounts::unmount(&self.spec.mount_point)?;
        }
        detach_device(&self.spec, &self.device)?;
        *attached = false;
        Ok(())
    }
}

/// The name that our devices bear.
fn device_name(spec: &VolumeSpec) -> Vec<u8> {
    format!("shardfs {} {}", spec.node, spec.id).into_bytes()
}

/// Loop devices of this node over the volume's file.
fn own_devices(spec: &VolumeSpec) -> Result<Vec<PathBuf>> {
    let source = match fs::metadata(&spec.source) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error(format!("looking at {}", spec.source.display()))(error)),
    };
    let mut name = device_name(spec);
    name.truncate(ioctl::LO_NAME_SIZE - 1);
    let mut found = Vec::new();
    let listing = fs::read_dir("/sys/block").map_err(io_error("reading /sys/block"))?;
    for entry in listing.flatten() {
        let block = entry.file_name();
        if !block.to_string_lossy().starts_with("loop") || !entry.path().join("loop/backing_file").exists() {
            continue;
        }
        let device = Path::new("/dev").join(block);
        // One that vanishes meanwhile is none of ours: ours are detached by this process only.
        let Ok(status) = File::open(&device).and_then(|file| ioctl::status(&file)) else { continue };
        if status.lo_inode == source.ino() && status.lo_device == source.dev() && status.name() == name {
            found.push(device);
        }
    }
    Ok(found)
}

/// Unmounts and detaches what a killed process of this node left.
fn clear_stale(spec: &VolumeSpec) -> Result<()> {
    let stale = own_devices(spec)?;
    while let Some(mount) = mounts::at(&spec.mount_point)? {
        if !stale.contains(&mount.source) {
            return Err(Error::unavailable(format!(
                "{} is taken: {} ({}) is mounted there, which is not volume {}",
                spec.mount_point.display(),
                mount.source.display(),
                mount.filesystem,
                spec.id
            )));
        }
        tracing::info!(volume = %spec.id, device = %mount.source.display(), "unmounting what a killed node left");
        mounts::unmount(&spec.mount_point)?;
    }
    for device in stale {
        tracing::info!(volume = %spec.id, device = %device.display(), "detaching what a killed node left");
        detach_device(spec, &device)?;
    }
    Ok(())
}

fn attach_device(spec: &VolumeSpec) -> Result<PathBuf> {
    let backing = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&spec.source)
        .map_err(io_error(format!("opening {}", spec.source.display())))?;
    for _ in 0..CONFIGURE_ATTEMPTS {
        let device = ioctl::free_device().map_err(|error| {
            Error::io(format!("no free loop device: {error} (is /dev/loop-control there, and are you root?)"))
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&device)
            .map_err(io_error(format!("opening {}", device.display())))?;
        match ioctl::configure(&file, &backing, BLOCK_BYTES, &device_name(spec)) {
            Ok(()) => {
                let status =
                    ioctl::status(&file).map_err(io_error(format!("asking {}", device.display())))?;
                if status.lo_flags & ioctl::LO_FLAGS_DIRECT_IO == 0 {
                    tracing::warn!(
                        volume = %spec.id,
                        "the filesystem below does no direct IO: writes pass through its page cache"
                    );
                }
                return Ok(device);
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => {
                return Err(io_error(format!("binding {} to {}", device.display(), spec.source.display()))(
                    error,
                ));
            }
        }
    }
    Err(Error::unavailable("every free loop device was taken by others while trying"))
}

/// Detaches a device and waits until it has let go.
fn detach_device(spec: &VolumeSpec, device: &Path) -> Result<()> {
    if mounts::is_mounted(device)? {
        return Err(Error::unavailable(format!("{} is still mounted elsewhere", device.display())));
    }
    let cleared = File::open(device).and_then(|file| ioctl::clear(&file));
    match cleared {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
        Err(error) => return Err(io_error(format!("detaching {}", device.display()))(error)),
    }
    for _ in 0..DETACH_ATTEMPTS {
        if !own_devices(spec)?.iter().any(|d| d == device) {
            return Ok(());
        }
        std::thread::sleep(DETACH_PAUSE);
    }
    Err(Error::unavailable(format!("{} does not let go of {}", device.display(), spec.source.display())))
}

fn mount(spec: &VolumeSpec, device: &Path) -> Result<()> {
    format_if_new(spec, device)?;
    let at = &spec.mount_point;
    if fs::symlink_metadata(at).is_ok_and(|meta| meta.is_symlink()) {
        // Left by a `dir` volume of the same id.
        fs::remove_file(at).map_err(io_error(format!("removing {}", at.display())))?;
    }
    fs::create_dir_all(at).map_err(io_error(format!("making {}", at.display())))?;
    mounts::mount_ext4(device, at)?;
    identity::check_or_mark(at, &spec.id).inspect_err(|_| {
        if let Err(error) = mounts::unmount(at) {
            tracing::warn!(volume = %spec.id, %error, "not unmounted");
        }
    })
}

enum Content {
    Zeros,
    Ours,
    Foreign(&'static str),
}

fn look(device: &Path) -> std::io::Result<Content> {
    let mut file = File::open(device)?;
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024)?;
    if superblock[0x38..0x3a] == 0xEF53_u16.to_le_bytes() {
        let ours = &superblock[0x78..0x88] == LABEL;
        return Ok(if ours {
            Content::Ours
        } else {
            Content::Foreign("an ext filesystem with another label")
        });
    }
    let mut first = vec![0; SIGNATURE_BYTES];
    file.read_exact(&mut first)?;
    let zeros = first.iter().all(|byte| *byte == 0);
    Ok(if zeros { Content::Zeros } else { Content::Foreign("data of some other kind") })
}

/// Makes the filesystem on a fresh device. A format that was interrupted left no superblock (mkfs writes
/// it last) but may have left other blocks: then the device is refused, and the message says what to do.
fn format_if_new(spec: &VolumeSpec, device: &Path) -> Result<()> {
    match look(device).map_err(io_error(format!("reading {}", device.display())))? {
        Content::Ours => return Ok(()),
        Content::Zeros => {}
        Content::Foreign(what) => {
            return Err(Error::corrupt(format!(
                "{} holds {what}, no ShardFS volume: it is not formatted. If it is to be given up, remove it",
                spec.source.display()
            )));
        }
    }
    tracing::info!(volume = %spec.id, device = %device.display(), "making an ext4");
    let label = std::str::from_utf8(LABEL).expect("the label is ASCII").trim_end_matches('\0');
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-L", label])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(device)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::new(Reason::Io, format!("running mkfs.ext4 (package e2fsprogs): {error}")))?;
    if !output.status.success() {
        return Err(Error::io(format!(
            "mkfs.ext4 {}: {}",
            device.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(())
}
