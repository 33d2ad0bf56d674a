//! ext4 on a block device: what volumes on loop devices and on whole devices have in common.
//!
//! Invariant: what is mounted carries the volume's label. Whether something may be formatted is decided by the callers,
//! with what [`probe`] tells them.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use shardfs_proto::types::{Error, Reason, Result, VolumeId, clock};

use super::loopdev::sys;
use super::{Place, VolumeSpec, io_error};

/// Bytes at the start that must be zero in what is to be formatted: every filesystem and partition table has its
/// mark there.
pub(super) const PROBE_BYTES: usize = 1 << 20;
/// Where the superblock of an ext4 lies.
const SUPERBLOCK_AT: u64 = 1024;
/// Where in it the UUID lies.
const UUID_AT: usize = 104;
/// Bytes at the start that hold the superblock.
const HEAD_BYTES: usize = 4096;
/// The byte of a UUID whose upper half is its version, and the one whose upper two bits are 10 in all that have one.
const VERSION_AT: usize = 6;
const VARIANT_AT: usize = 8;
/// The version of UUIDs that are made as their maker likes (RFC 9562).
const MADE_VERSION: u8 = 8;
/// Bytes of the UUID in it.
pub(super) const UUID_BYTES: usize = 16;
/// Bytes of an ext4 label.
const LABEL_BYTES_MAX: usize = 16;
/// How long a device may stay claimed after the unmount: other nodes look whether it is, in microseconds.
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(2);
/// Pause between attempts.
const CLAIM_PAUSE: Duration = Duration::from_millis(5);
/// What labels begin with.
const LABEL_PREFIX: &str = "sfs-";
/// What may be done about something that is no volume: of one there may be no other copy.
const IF_OF_NO_USE: &str =
    "if it is of no use, remove it (of a device: `wipefs --all`, and zeros over its first MiB)";
/// Bytes of data for every inode: RocksDB's files are large and few, but small shards are many.
const BYTES_PER_INODE: u32 = 16_384;

/// A mount that another mount namespace has a copy of lives on, with all that is dirty in it, and so does an unmount
/// that is under way there.
pub(super) fn wait_until_unclaimed(spec: &VolumeSpec, device: &Path) -> Result<()> {
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

pub(super) fn mount(device: &Path, spec: &VolumeSpec) -> Result<()> {
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
                "the filesystem is damaged: see the kernel's log, and run fsck.ext4 on the backing file or device while no node has it"
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

/// What the first bytes of a file or device say.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Content {
    Zeros,
    Ext4 { label: Vec<u8> },
    Unknown,
}

pub(super) fn probe(path: &Path) -> Result<Content> {
    Ok(classify(&read_head(path, PROBE_BYTES)?))
}

fn read_head(path: &Path, bytes_max: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(bytes_max as u64).read_to_end(&mut bytes))
        .map_err(|e| io_error(&format!("reading {}", path.display()), &e))?;
    Ok(bytes)
}

pub(super) fn classify(bytes: &[u8]) -> Content {
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

pub(super) fn label(id: &VolumeId) -> String {
    let mut label = format!("{LABEL_PREFIX}{id}");
    // Ids are ASCII.
    label.truncate(LABEL_BYTES_MAX);
    label
}

/// Whether a label is one of a volume.
pub(super) fn is_volume(label: &[u8]) -> bool {
    label.starts_with(LABEL_PREFIX.as_bytes())
}

pub(super) fn check_label(path: &Path, spec: &VolumeSpec) -> Result<()> {
    check_head(&read_head(path, PROBE_BYTES)?, spec)
}

fn check_head(bytes: &[u8], spec: &VolumeSpec) -> Result<()> {
    let refused = |what: &str, hint: &str| {
        Err(Error::invalid(format!(
            "volume {}: {} holds {what}, not the volume's own ext4: it is left alone; {hint}",
            spec.id,
            spec.source.display()
        )))
    };
    match classify(bytes) {
        Content::Ext4 { label: found } if found == label(&spec.id).as_bytes() => Ok(()),
        Content::Ext4 { label: found } if is_volume(&found) => {
            let found = String::from_utf8_lossy(&found).into_owned();
            let id = &found[LABEL_PREFIX.len()..];
            // Longer ids are cut off.
            let whole = if found.len() < LABEL_BYTES_MAX { "" } else { ", or another whose id begins so" };
            refused(
                &format!("volume {id} of ShardFS (its ext4 is labelled {found:?}{whole})"),
                "it may be in use: give this volume another file or device",
            )
        }
        Content::Ext4 { label: found } => {
            refused(&format!("an ext4 labelled {:?}", String::from_utf8_lossy(&found)), IF_OF_NO_USE)
        }
        Content::Unknown => refused("something unknown", IF_OF_NO_USE),
        Content::Zeros => Err(Error::corrupt(format!(
            "{} is empty, but volume {} has been used before: put its backing file or device back",
            spec.source.display(),
            spec.id
        ))),
    }
}

/// The UUID of the ext4 on a device.
pub(super) fn uuid(path: &Path) -> Result<[u8; UUID_BYTES]> {
    let mut uuid = [0; UUID_BYTES];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut uuid, SUPERBLOCK_AT + UUID_AT as u64))
        .map_err(|e| io_error(&format!("reading {}", path.display()), &e))?;
    Ok(uuid)
}

/// A UUID made of cluster and volume, which tells the volume's filesystem from those of other clusters before it is
/// mounted. Four checksums over different bytes: it guards against confusion, not against malice.
pub(super) fn volume_uuid(spec: &VolumeSpec) -> [u8; UUID_BYTES] {
    let part = |n: u8| crc32c::crc32c(format!("{n}/{}/{}", spec.cluster_id, spec.id).as_bytes());
    let mut uuid = [0; UUID_BYTES];
    for (n, bytes) in (0..).zip(uuid.chunks_mut(4)) {
        bytes.copy_from_slice(&part(n).to_be_bytes());
    }
    uuid
}

/// The same, marked as made and not drawn: UUIDs that mkfs draws are of version 4. Loop volumes have these; older ones have
/// drawn ones, which say nothing.
pub(super) fn marked_uuid(spec: &VolumeSpec) -> [u8; UUID_BYTES] {
    let mut uuid = volume_uuid(spec);
    uuid[VERSION_AT] = (MADE_VERSION << 4) | (uuid[VERSION_AT] & 0x0F);
    uuid[VARIANT_AT] = 0x80 | (uuid[VARIANT_AT] & 0x3F);
    uuid
}

/// Whether a UUID is the [marked one](marked_uuid) of another cluster or volume.
pub(super) fn is_anothers(found: [u8; UUID_BYTES], spec: &VolumeSpec) -> bool {
    let marked = found[VERSION_AT] >> 4 == MADE_VERSION && found[VARIANT_AT] >> 6 == 0b10;
    marked && found != marked_uuid(spec)
}

/// Fails unless a loop device, or its file, holds the volume's own filesystem, as far as that can be told before a mount.
pub(super) fn check_loop(path: &Path, spec: &VolumeSpec) -> Result<()> {
    check_head(&read_head(path, HEAD_BYTES)?, spec)?;
    if is_anothers(uuid(path)?, spec) {
        return Err(Error::invalid(format!(
            "volume {}: {} holds a volume of this name of another cluster than {}: it is left alone; give another file",
            spec.id,
            spec.source.display(),
            spec.cluster_id
        )));
    }
    Ok(())
}

/// Why a file is not certainly this volume's alone, to be deleted with it; `None`: it is. Of a volume that was never served, only a
/// filesystem that was made for it and never mounted is: one that was mounted holds what an earlier volume of the name has left.
pub(super) fn why_not_own(path: &Path, spec: &VolumeSpec) -> Result<Option<String>> {
    let head = read_head_past_cache(path)?;
    Ok(match classify(&head) {
        Content::Ext4 { label: found } if found == label(&spec.id).as_bytes() => {
            why_not_own_ext4(&head[SUPERBLOCK_AT as usize..], spec)
        }
        Content::Ext4 { label: found } if is_volume(&found) => {
            let found = String::from_utf8_lossy(&found).into_owned();
            Some(format!("it holds volume {} of ShardFS (labelled {found:?})", &found[LABEL_PREFIX.len()..]))
        }
        Content::Ext4 { label: found } => {
            Some(format!("it holds an ext4 labelled {:?}", String::from_utf8_lossy(&found)))
        }
        Content::Zeros => Some("it holds no filesystem".into()),
        Content::Unknown => Some("it holds something unknown".into()),
    })
}

/// The same of a superblock with the volume's label.
fn why_not_own_ext4(superblock: &[u8], spec: &VolumeSpec) -> Option<String> {
    let mut uuid = [0; UUID_BYTES];
    uuid.copy_from_slice(&superblock[UUID_AT..][..UUID_BYTES]);
    // `s_mtime` and `s_mnt_count`.
    let was_mounted = superblock[0x2C..0x30] != [0; 4] || superblock[0x34..0x36] != [0; 2];
    if is_anothers(uuid, spec) {
        return Some("it holds a volume of another cluster, or another one whose id begins so".into());
    }
    // Of a drawn UUID only that it was served tells whose it is.
    let is_unused_making = uuid == marked_uuid(spec) && !was_mounted;
    (!spec.formatted && !is_unused_making)
        .then(|| "the volume was never served here, and what is there has been in use before".into())
}

/// The first bytes of a file that somebody may be writing directly: pages of it in the cache could make his sync fail.
fn read_head_past_cache(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 2 * HEAD_BYTES];
    let start = bytes.as_ptr().align_offset(HEAD_BYTES);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    match file.and_then(|file| file.read_at(&mut bytes[start..start + HEAD_BYTES], 0)) {
        Ok(length) => Ok(bytes[start..start + length].to_vec()),
        // What it lies on has no direct I/O, and so no loop device that writes directly.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => read_head(path, HEAD_BYTES),
        Err(e) => Err(io_error(&format!("reading {}", path.display()), &e)),
    }
}

/// Bytes of a block: as [`make_filesystem`] asks for.
const BLOCK_BYTES: u64 = 4096;
/// `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// By how much a filesystem grows in one call of the kernel, so that none takes long: nothing else may unmount it meanwhile.
const GROW_STEP_BYTES: u64 = 64 << 30;

/// Makes a filesystem that is mounted for writing larger by one step, while it is used; whether it is then as large as `bytes`, which its
/// device has.
pub(super) fn grow(place: &Place, bytes: u64) -> Result<bool> {
    let doing = || format!("enlarging the filesystem at {}", place.root.display());
    let wanted = bytes / BLOCK_BYTES;
    // Its own count: statfs takes its tables off.
    let before = block_count(&place.device)?;
    if before >= wanted {
        return Ok(true);
    }
    let next = wanted.min(before.saturating_add(GROW_STEP_BYTES / BLOCK_BYTES));
    let folder = File::open(&place.root).map_err(|e| io_error(&doing(), &e))?;
    // SAFETY: the kernel reads one u64; the descriptor is open.
    let done = unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const next) };
    if done != 0 {
        let error = std::io::Error::last_os_error();
        return Err(match error.kind() {
            ErrorKind::PermissionDenied => Error::new(
                Reason::NotPermitted,
                format!("{}: {error}: it needs CAP_SYS_RESOURCE, and a filesystem without errors", doing()),
            ),
            _other => io_error(&doing(), &error),
        });
    }
    let now = block_count(&place.device)?;
    // The rest of a block group that would be too small for its own tables is left.
    Ok(now >= wanted || now == before)
}

/// Blocks of the filesystem that is mounted from a device: its superblock is in the device's cache, and always the present one.
fn block_count(device: &Path) -> Result<u64> {
    let head = read_head(device, HEAD_BYTES)?;
    let number = |at: usize| {
        let bytes = head.get(SUPERBLOCK_AT as usize + at..)?.get(..4)?;
        Some(u64::from(u32::from_le_bytes(bytes.try_into().ok()?)))
    };
    let (low, high) = (number(0x4), number(0x150));
    let count = low.zip(high).map(|(low, high)| low | (high << 32));
    count.ok_or_else(|| Error::io(format!("{} has no superblock", device.display())))
}

/// 32 digits as UUIDs are written.
fn hyphenated(digits: &str) -> String {
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// A UUID as programs write it.
pub(super) fn uuid_text(uuid: [u8; UUID_BYTES]) -> String {
    hyphenated(&format!("{:032x}", u128::from_be_bytes(uuid)))
}

/// What a filesystem is made on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// A file that is known to be all zeros: the inode tables need not be written.
    SparseFile,
    /// A file.
    File,
    /// A device, which may be large: the kernel writes the inode tables once it is mounted. No discard: it would take
    /// away the mark that says who formats it.
    Device,
}

/// Makes the volume's filesystem, whatever is there.
pub(super) fn make_filesystem(
    path: &Path,
    id: &VolumeId,
    target: Target,
    uuid: [u8; UUID_BYTES],
) -> Result<()> {
    let extended = match target {
        Target::SparseFile => {
            "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard,assume_storage_prezeroed=1"
        }
        Target::File => "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
        Target::Device => "lazy_itable_init=1,lazy_journal_init=0,root_owner=0:0,nodiscard",
    };
    let uuid = uuid_text(uuid);
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
            extended,
            "-U",
            &uuid,
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
