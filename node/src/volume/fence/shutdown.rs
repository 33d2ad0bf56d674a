//! The fence of loop volumes: the old primary's filesystem is shut down under it, and its device drained.
//!
//! Every node of the machine has a loop device of its own over the backing file. There is nothing on such a device
//! that refuses a write, so the fence stops everything that could make one. In this order, for the winner of epoch e:
//!
//! 0. Its own device is seen to hold the filesystem of this volume and cluster: nobody else's is fenced.
//! 1. Its own device, read-only from birth, is made writable.
//! 2. The epoch is [claimed](claims) at the backing file. A later claim there: the acquisition fails.
//! 3. Every other device over the backing file:
//!    - mounted: its filesystem is shut down without a flush of its log, so that no call changes it any more; what
//!      was inside a call, in writeback or in the journal's thread is [seen to have left](quiet); the device
//!      is synced, which writes what the journal had committed and not yet put in place (left alone, that is
//!      written half a minute later over the next primary's blocks); the device is made read-only; its
//!      counters are seen to stand still with nothing in flight;
//!    - not mounted: it is claimed for a moment, so that no mount of it is under way, synced, and made read-only.
//!
//! A winner of an older epoch that is stopped anywhere in its own acquisition and resumed later: before step 2
//! it finds the later claim; after step 2 its device was writable already when we came, so it was either mounted
//! by then, and is shut down, or made read-only, and cannot be mounted.
//!
//! One block device has one superblock, so shutting it down by any of its mounts stops all of them: bind mounts, other
//! mount namespaces, mounts that were detached lazily and live in open files. It is [reached](reach) by
//! any. A device that is claimed and cannot be reached makes the acquisition fail.
//!
//! An fsync that is inside the old filesystem may come back with success it has not earned: see
//! [`Witness`](crate::volume::Witness), which a primary asks before it acknowledges.
//!
//! A device whose driver refuses writes (made over a read-only descriptor) is left alone: backups read views
//! through such ones.
//!
//! Must not: end processes; unmount under one that lives (its next write would land in the folder below); unmount
//! lazily; detach what is mounted.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_proto::types::{Error, Reason, Result, clock};

use super::bounded::bounded;
use super::{Action, Deadline, Fence, FenceKey, FenceKind, Fenced, Journal, Takeover};
use crate::volume::loopdev::sys::{self, Backing, LoopDevice};
use crate::volume::{VolumeSpec, io_error, loopdev, mounts, try_lock};

mod claims;
mod quiet;
mod reach;

/// `FS_IOC_SHUTDOWN`, which ext4 calls `EXT4_IOC_SHUTDOWN`: `_IOR('X', 125, __u32)`.
const SHUTDOWN: libc::c_ulong = 0x8004_587D;
/// What is in the log stays there; nothing is added.
const WITHOUT_LOG_FLUSH: u32 = 2;
/// A device that is claimed is looked for beyond this process's mounts after so long: a mount or unmount that is
/// under way takes milliseconds.
const SEARCH_AFTER: Duration = Duration::from_millis(30);
/// What a call gets at least, at the end of the attempt's time: shorter ones would fail for no reason.
const CALL_MIN: Duration = Duration::from_millis(200);
/// Pause between looks.
const PAUSE: Duration = Duration::from_millis(2);
/// From this kernel on, unmounting a filesystem that was shut down writes nothing. Before, ext4 writes its
/// superblock as it was, over the next primary's.
const QUIET_UNMOUNT_FROM: (u32, u32) = (6, 15);
/// How long the removal of a dead process's mount is waited for where it may as well end later.
const REMOVAL_WAIT: Duration = Duration::from_millis(50);

/// The fence of the provider `loop`.
pub struct ShutdownFence;

impl Fence for ShutdownFence {
    fn capability(&self, spec: &VolumeSpec) -> Result<FenceKind> {
        let unsupported = |why: String| Err(Error::new(Reason::Unsupported, why));
        if !rustix::process::geteuid().is_root() {
            return unsupported("shutting a filesystem down needs root".into());
        }
        match std::fs::metadata(&spec.source) {
            Ok(meta) if meta.is_file() => {}
            Ok(meta) if meta.file_type().is_block_device() => {
                return unsupported(format!("{} is a device, no file", spec.source.display()));
            }
            Ok(_) => return unsupported(format!("{} is no file", spec.source.display())),
            Err(e) => return Err(io_error(&format!("looking at {}", spec.source.display()), &e)),
        }
        claims::check(&spec.source)?;
        Ok(FenceKind::Shutdown)
    }

    fn acquire(&self, spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced> {
        let deadline = Deadline::after(takeover.bound);
        let mut journal = Journal::new();
        let own = own_device(spec)?;
        // Before anything is taken from anybody.
        loopdev::check_content(spec, &own.path)?;
        make_writable(&own)?;
        let taken = take(spec, takeover.key, &own, deadline, &mut journal);
        if let Err(error) = taken {
            // It is not to be mounted after this.
            if let Err(worse) = make_read_only(&own) {
                tracing::warn!(volume = %spec.id, error = %worse, "after a fence that was not acquired");
            }
            return Err(error);
        }
        let mut fenced = journal.done(FenceKind::Shutdown, takeover.key);
        fenced.device = Some(own.path);
        Ok(fenced)
    }

    fn still_held(&self, spec: &VolumeSpec, key: FenceKey) -> Result<bool> {
        Ok(claims::latest(&spec.source)? == Some(key))
    }

    fn release(&self, _spec: &VolumeSpec, _key: FenceKey) -> Result<()> {
        // The claim stays, so that older winners find it; nothing else is held.
        Ok(())
    }
}

/// This node's device for the volume.
fn own_device(spec: &VolumeSpec) -> Result<LoopDevice> {
    let tag = loopdev::tag(&spec.mount_point, &spec.id)?;
    let mut mine: Vec<LoopDevice> = sys::devices()?.into_iter().filter(|d| d.tag == tag).collect();
    match (mine.pop(), mine.is_empty()) {
        (Some(device), true) if device.backing == Backing::of(&spec.source)? => Ok(device),
        (Some(device), true) => Err(Error::unavailable(format!(
            "volume {}: {} stands on another file than {}: attach it anew",
            spec.id,
            device.path.display(),
            spec.source.display()
        ))),
        _none_or_more => {
            Err(Error::unavailable(format!("volume {}: attach it as a backup before fencing it", spec.id)))
        }
    }
}

fn take(
    spec: &VolumeSpec,
    key: FenceKey,
    own: &LoopDevice,
    deadline: Deadline,
    journal: &mut Journal,
) -> Result<()> {
    claims::take(spec, key)?;
    journal.note(Action::Claimed, key);
    fail::fail_point!("fence::shutdown::claimed", |_| Err(Error::unavailable("failpoint")));
    for device in others(&spec.source, Some(&own.path))? {
        let taken = stop(&device, deadline, journal);
        taken.map_err(|e| e.context(format!("volume {}: fencing {}", spec.id, device.path.display())))?;
    }
    // Whoever claimed a later epoch meanwhile has made our device read-only, or will.
    claims::check_latest(spec, key)
}

/// The devices over a file that could write to it, but this one.
fn others(source: &Path, own: Option<&Path>) -> Result<Vec<LoopDevice>> {
    let backing = Backing::of(source)?;
    let other = |d: &LoopDevice| d.backing == backing && Some(d.path.as_path()) != own && !d.never_writes;
    Ok(sys::devices()?.into_iter().filter(other).collect())
}

/// How a device was found.
enum Found {
    /// Mounted; an open file of the filesystem.
    Mounted(File),
    /// Not mounted, and claimed by us.
    Idle(File),
    /// Free by now.
    Gone,
}

fn stop(device: &LoopDevice, deadline: Deadline, journal: &mut Journal) -> Result<()> {
    let name = &device.name;
    let filesystem = match find(device, deadline)? {
        Found::Gone => return Ok(()),
        Found::Idle(claim) => {
            drain(device, deadline)?;
            sys::set_read_only(&device.path, &claim, true)?;
            journal.note(Action::MadeReadOnly, name);
            return Ok(());
        }
        Found::Mounted(filesystem) => filesystem,
    };
    shut_down(device, &filesystem, deadline)?;
    journal.note(Action::ShutDown, name);
    fail::fail_point!("fence::shutdown::shut_down", |_| Err(Error::unavailable("failpoint")));
    quiet::settle(device, filesystem, deadline)?;
    journal.note(Action::Settled, name);
    fail::fail_point!("fence::shutdown::settled", |_| Err(Error::unavailable("failpoint")));
    drain(device, deadline)?;
    journal.note(Action::Drained, name);
    fail::fail_point!("fence::shutdown::drained", |_| Err(Error::unavailable("failpoint")));
    make_read_only(device)?;
    // What was written to the device directly, past the filesystem, before it was read-only.
    drain(device, deadline)?;
    journal.note(Action::MadeReadOnly, name);
    fail::fail_point!("fence::shutdown::read_only", |_| Err(Error::unavailable("failpoint")));
    quiet::still(device, deadline)?;
    journal.note(Action::Still, name);
    fail::fail_point!("fence::shutdown::still", |_| Err(Error::unavailable("failpoint")));
    let action = if remove(device, deadline)? { Action::Removed } else { Action::LeftBehind };
    journal.note(action, name);
    fail::fail_point!("fence::shutdown::removed", |_| Err(Error::unavailable("failpoint")));
    Ok(())
}

/// Finds out whether a device is mounted, which may be changing.
fn find(device: &LoopDevice, deadline: Deadline) -> Result<Found> {
    let begun = clock::monotonic();
    loop {
        if let Some(filesystem) = within("opening the old mount", deadline, {
            let number = device.number;
            move || reach::by_own_mounts(number)
        })?? {
            return Ok(Found::Mounted(filesystem));
        }
        match sys::claim_device(&device.path) {
            Ok(claim) if sys::inspect(&device.path, &claim).is_some_and(|now| now == *device) => {
                return Ok(Found::Idle(claim));
            }
            Ok(_) => return Ok(Found::Gone),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                return Ok(Found::Gone);
            }
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
            Err(e) => return Err(io_error("claiming the device", &e)),
        }
        // A mount or unmount is under way, or it is mounted where we do not see it.
        if begun.elapsed() >= SEARCH_AFTER {
            let number = device.number;
            let found = within("looking for the old mount", deadline, move || reach::by_processes(number))?;
            if let Some(filesystem) = found {
                return Ok(Found::Mounted(filesystem));
            }
        }
        if deadline.is_over() {
            return Err(Error::unavailable(
                "it is mounted or claimed where this process cannot reach it, by another mount namespace or another \
                 program: the old primary cannot be fenced; unmount it there (`lsblk` and `grep loop /proc/*/mountinfo` \
                 help)",
            ));
        }
        deadline.pause(PAUSE);
    }
}

/// Runs what may hang; late it does no harm, for it only looks, or does what is to be done anyway.
fn within<T: Send + 'static>(
    what: &'static str,
    deadline: Deadline,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let bound = deadline.left().max(CALL_MIN);
    bounded(what, bound, work)?.ok_or_else(|| {
        let ms = bound.as_millis();
        Error::new(Reason::Deadline, format!("{what} has not ended within {ms} ms"))
    })
}

fn shut_down(device: &LoopDevice, filesystem: &File, deadline: Deadline) -> Result<()> {
    let filesystem = filesystem.try_clone().map_err(|e| io_error("duplicating a descriptor", &e))?;
    within("shutting the old filesystem down", deadline, move || {
        let mode = WITHOUT_LOG_FLUSH;
        // SAFETY: the kernel reads one u32.
        let done = unsafe { libc::ioctl(filesystem.as_raw_fd(), SHUTDOWN as _, &raw const mode) };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    })?
    .map_err(|e| {
        let hint = "its filesystem cannot be shut down";
        Error::new(Reason::Unsupported, format!("{}: {hint}: {e}", device.path.display()))
    })
}

/// Writes what is dirty in a device's cache.
fn drain(device: &LoopDevice, deadline: Deadline) -> Result<()> {
    let path = device.path.clone();
    within("draining the old device", deadline, move || {
        sys::open_device(&path, false).and_then(|file| file.sync_all())
    })?
    .map_err(|e| io_error("draining the old device", &e))
}

fn open(device: &LoopDevice) -> Result<File> {
    sys::open_device(&device.path, false)
        .map_err(|e| io_error(&format!("opening {}", device.path.display()), &e))
}

fn make_read_only(device: &LoopDevice) -> Result<()> {
    sys::set_read_only(&device.path, &open(device)?, true)
}

fn make_writable(device: &LoopDevice) -> Result<()> {
    sys::set_read_only(&device.path, &open(device)?, false)
}

/// Takes away the mount of a process that is dead for certain, and its device; nobody can write to either any
/// more, this is tidiness (and on older kernels the last chance: see [`check_unmount`]). Answers whether it did.
fn remove(device: &LoopDevice, deadline: Deadline) -> Result<bool> {
    let at: Vec<PathBuf> =
        mounts::list()?.into_iter().filter(|m| m.device == device.number).map(|m| m.at).collect();
    let [at] = at.as_slice() else { return Ok(false) };
    // Its owner holds this lock from before it attaches until it ends, and a new process of that node takes it first.
    // Without the file it is not known.
    let lock_file = owner_file(at);
    if !lock_file.exists() {
        return Ok(false);
    }
    let Some(lock) = try_lock(&lock_file)? else { return Ok(false) };
    let (at, device) = (at.clone(), device.clone());
    let quiet = unmount_is_quiet();
    let bound = if quiet { REMOVAL_WAIT.min(deadline.left()) } else { deadline.left() };
    let removed = bounded("removing the old mount", bound, move || {
        // Held until it is over, in time or late.
        let _lock = lock;
        if let Err(error) = mounts::unmount_idle(&at) {
            tracing::info!(at = %at.display(), %error, "a fenced mount stays");
            return Ok(false);
        }
        // Still mounted in another namespace: it stays, shut down.
        match sys::claim_device(&device.path) {
            Ok(claim) => drop(claim),
            Err(_) => return Ok(false),
        }
        sys::detach_device(&device.path).map(|()| true)
    })?;
    match removed {
        Some(removed) => removed,
        // It has pages to forget, and goes on.
        None if quiet => Ok(false),
        None => Err(Error::new(Reason::Deadline, "the old mount's unmount has not ended")),
    }
}

/// The file that a node's process keeps locked while it has the volume of this mount point attached.
pub(in crate::volume) fn owner_file(mount_point: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(mount_point.file_name().unwrap_or_default());
    name.push(".owner");
    mount_point.with_file_name(name)
}

/// Fails unless this key is the latest claim.
pub(in crate::volume) fn is_latest(spec: &VolumeSpec, key: FenceKey) -> Result<()> {
    claims::check_latest(spec, key)
}

/// Fails if the volume is mounted on another device of this machine: for an attachment that fences nobody.
pub(in crate::volume) fn refuse_other_mounts(spec: &VolumeSpec) -> Result<()> {
    let tag = loopdev::tag(&spec.mount_point, &spec.id)?;
    for device in others(&spec.source, None)?.into_iter().filter(|d| d.tag != tag) {
        if sys::claim_device(&device.path).is_err_and(|e| e.kind() == ErrorKind::ResourceBusy) {
            return Err(Error::unavailable(format!(
                "volume {}: it is in use on {} of this machine, by another node: two would destroy it",
                spec.id,
                device.path.display()
            )));
        }
    }
    Ok(())
}

/// Fails if unmounting would write to a volume that another node has taken: on kernels before 6.15, if the
/// filesystem there was shut down. It stays mounted, where it harms nobody, until the machine is restarted.
pub(in crate::volume) fn check_unmount(at: &Path) -> Result<()> {
    if unmount_is_quiet() || mounts::at(at)?.is_empty() {
        return Ok(());
    }
    let root = File::open(at).map_err(|e| io_error(&format!("opening {}", at.display()), &e))?;
    match root.sync_all() {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Err(Error::unavailable(format!(
            "{}: another node has fenced this mount, and this kernel would write at its unmount: it stays until the machine is restarted (Linux 6.15 and later need no restart)",
            at.display()
        ))),
        _healthy => Ok(()),
    }
}

/// Whether this kernel writes nothing when a filesystem that was shut down is unmounted.
fn unmount_is_quiet() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    kernel_version(&release).is_some_and(|version| version >= QUIET_UNMOUNT_FROM)
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod old_primary;
#[cfg(test)]
mod tests;
