//! The mount's life: attaching to the kernel, serving, and leaving cleanly.
//!
//! - The daemon mounts and unmounts by itself: fuser, when it drops a session that was unmounted from outside,
//!   unmounts once more and can hit another mount at the same path. Here a mount is taken away only if the
//!   numbers of the mount at the path are those that this session got, and a dead one of an earlier daemon only
//!   if it is dead besides, since numbers are used again.
//! - A connection may end and leave its mount (`umount -f` of a busy one, an abort through fusectl): who did that
//!   wants it gone, and it is detached.
//! - Root calls mount(2); others, and root without the right to, go through fusermount3.
//! - A busy mount is detached lazily after [`BUSY_MAX`]; who still uses it is served for [`LINGER_MAX`].

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use fuser::{Config, Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};
use tokio::sync::oneshot;

use crate::config::Settings;
use crate::fuse::Fuse;
use crate::mounts::{self, FS_TYPE, MountId};
use crate::probe;
use crate::records::{Place, Records};

mod fusermount;

/// How long unmounting is tried while programs use the mount; then it is detached, and ends when they do.
pub const BUSY_MAX: Duration = Duration::from_secs(5);
/// How long programs that still use a detached mount are served; after that they see ENOTCONN.
pub const LINGER_MAX: Duration = Duration::from_secs(30);
/// How long whoever ended the connection may take to unmount as well; then it is detached here.
const ABORTED_MAX: Duration = Duration::from_secs(1);
/// How often a busy mount is tried again.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// A mount that is attached and served.
pub struct Mounted {
    path: PathBuf,
    id: Option<MountId>,
    /// By fusermount3, so that unmounting must go the same way.
    by_helper: bool,
    threads: JoinHandle<()>,
    ended: oneshot::Receiver<std::io::Result<()>>,
}

/// How a mount ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Unmounted.
    Unmounted,
    /// Detached; programs that use it were left.
    Abandoned,
}

/// Changes the flags of what is mounted at `path` (`ro`, `noexec` and the like). Its daemon's settings stay.
pub fn remount(path: &Path, flags: MountFlags) -> Result<()> {
    rustix::mount::mount_remount(path, flags, c"")
        .map_err(std::io::Error::from)
        .with_context(|| format!("remounting {}", path.display()))
}

/// Mounts at a path that `mounts::usable` has checked, and starts to serve. `records`: where it is noted for the parent, and
/// where the mount of the daemon before this one is.
pub fn mount(path: &Path, settings: &Settings, records: Option<&Records>, fuse: Fuse) -> Result<Mounted> {
    let before = records.and_then(|records| records.told().place);
    if let Some(place) = &before
        && place.mount.is_some()
        && !place.is_there()?
    {
        bail!("the mount of the daemon that died was taken away meanwhile: nothing is mounted in its place");
    }
    let note = |id, by_helper| match records {
        Some(records) => records.note_place(Place::new(path, id, by_helper)),
        None => Ok(()),
    };
    // Should this process die from here on, a dead mount at the path is its own, or the one of before; or there is none yet.
    note(None, before.as_ref().map_or(!rustix::process::geteuid().is_root(), |place| place.by_helper))?;
    // As late as can be: meanwhile programs write to the directory below.
    take_dead_away(path, settings.replace_dead, before.as_ref())?;
    if mounts::hides_something(path) {
        tracing::warn!(
            path = %path.display(),
            "the mount point is not empty: what it holds is hidden while ShardFS is mounted"
        );
    }
    let (fd, by_helper) = attach(path, settings)?;
    let id = match mounts::at(path) {
        Ok(Some(mount)) if mount.fs_type == FS_TYPE => Some(mount.id),
        Ok(_) | Err(_) => None,
    };
    match note(id, by_helper).and_then(|()| start(fd, settings, fuse)) {
        Ok((threads, ended)) => {
            if let Some(id) = id.filter(|_| settings.read_ahead_kib != 0) {
                raise_read_ahead(id.device, settings.read_ahead_kib);
            }
            Ok(Mounted { path: path.to_path_buf(), id, by_helper, threads, ended })
        }
        Err(error) => {
            if let Err(left) = detach(path, by_helper, true) {
                tracing::warn!(error = %left, "cannot take the mount away again");
            }
            Err(error)
        }
    }
}

/// Takes dead mounts at the path away: any with `any`, else the one that the daemon before has left.
fn take_dead_away(path: &Path, any: bool, before: Option<&Place>) -> Result<()> {
    loop {
        let ours = before.map_or(Ok(false), Place::is_on_top)?;
        if !(any || ours) || !mounts::dead_at(path)? {
            return Ok(());
        }
        let by_helper = match before {
            Some(place) if ours => place.by_helper,
            Some(_) | None => !rustix::process::geteuid().is_root(),
        };
        detach(path, by_helper, true).context("taking the dead mount away")?;
    }
}

/// Takes away the dead mount that a daemon has left, if it is there still and is dead.
pub fn clear(place: &Place) -> Result<()> {
    if place.is_on_top()? && mounts::dead_at(&place.path())? {
        detach(&place.path(), place.by_helper, true).context("taking the dead mount away")?;
    }
    Ok(())
}

type Serving = (JoinHandle<()>, oneshot::Receiver<std::io::Result<()>>);

fn start(fd: OwnedFd, settings: &Settings, fuse: Fuse) -> Result<Serving> {
    let acl = if settings.allow_other { SessionACL::All } else { SessionACL::Owner };
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(settings.threads);
    config.clone_fd = true;
    let notifying = fuse.notifying();
    let session =
        Session::from_fd(fuse, fd, acl, config).context("the kernel does not agree on a protocol")?;
    // It holds /dev/fuse open, and so must not outlive the session.
    let notifier = Arc::new(session.notifier());
    notifying(Arc::downgrade(&notifier));
    let (tell, ended) = oneshot::channel();
    let threads = std::thread::Builder::new()
        .name("fuse".into())
        .spawn(move || {
            let outcome = session.run();
            drop(notifier);
            tell.send(outcome).ok();
        })
        .context("starting the threads that take requests")?;
    Ok((threads, ended))
}

impl Mounted {
    /// Returns when the mount is gone, whoever unmounted it.
    pub async fn ended(&mut self) -> Result<()> {
        match (&mut self.ended).await {
            Ok(outcome) => ending(outcome),
            Err(_) => bail!("the threads that take requests have ended without a word"),
        }
    }

    /// To be called when the mount has ended: takes it away if who ended the connection has left it.
    pub async fn clear_up(&self) {
        let left = || match (mounts::at(&self.path), self.id) {
            (Ok(Some(mount)), Some(id)) => mount.id == id,
            _ => false,
        };
        let mut waited = Duration::ZERO;
        while left() {
            if waited >= ABORTED_MAX {
                tracing::warn!("the connection to the kernel was ended from outside: taking the mount away");
                if let Err(error) = self.take_away(true) {
                    tracing::error!(error = %format!("{error:#}"), "cannot detach");
                }
                return;
            }
            tokio::time::sleep(BUSY_RETRY).await;
            waited += BUSY_RETRY;
        }
    }

    /// Returns when the root of the mount answers.
    pub async fn answers(&self) -> Result<()> {
        let answer = probe::answer(&self.path).await.context("asking whether the mount answers")?;
        answer.with_context(|| format!("the mount at {} does not answer", self.path.display()))
    }

    /// Unmounts; `now` completes when there is no more time (a second signal).
    pub async fn unmount(mut self, now: impl Future<Output = ()>) -> Ending {
        tokio::pin!(now);
        let mut hurried = false;
        let mut waited = Duration::ZERO;
        loop {
            match self.take_away(false) {
                Ok(()) => break,
                Err(error) if is_busy(&error) && waited < BUSY_MAX && !hurried => {
                    if waited.is_zero() {
                        tracing::info!("the mount is in use; trying for {BUSY_MAX:?}");
                    }
                    tokio::select! {
                        () = tokio::time::sleep(BUSY_RETRY) => waited += BUSY_RETRY,
                        () = &mut now => hurried = true,
                        _ = &mut self.ended => return Ending::Unmounted,
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %format!("{error:#}"), "cannot unmount; detaching");
                    if let Err(error) = self.take_away(true) {
                        tracing::error!(error = %format!("{error:#}"), "cannot detach");
                        return Ending::Abandoned;
                    }
                    break;
                }
            }
        }
        if hurried {
            return Ending::Abandoned;
        }
        tokio::select! {
            _ = &mut self.ended => {
                self.threads.join().ok();
                Ending::Unmounted
            }
            () = tokio::time::sleep(LINGER_MAX) => {
                tracing::warn!("programs still use the detached mount; leaving them");
                Ending::Abandoned
            }
            () = &mut now => Ending::Abandoned,
        }
    }

    /// Takes the mount away if it is still the one at its path.
    fn take_away(&self, lazily: bool) -> Result<()> {
        let there = mounts::at(&self.path)?;
        match (there, self.id) {
            (Some(mount), Some(id)) if mount.id == id => detach(&self.path, self.by_helper, lazily),
            // Gone already, or covered by another mount, which is not ours to take away.
            (Some(_) | None, Some(_)) => Ok(()),
            (_, None) => detach(&self.path, self.by_helper, lazily),
        }
    }
}

/// What the end of the threads that take requests says of the mount.
fn ending(outcome: std::io::Result<()>) -> Result<()> {
    match outcome {
        // What fuser takes for an end is ENODEV. Who reads /dev/fuse when the connection is aborted (fusectl, `umount -f`, the last
        // users of a lazily unmounted mount that leave) may get this one instead: it is gone just the same, and nothing has failed.
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
        outcome => outcome.context("taking requests from the kernel"),
    }
}

fn is_busy(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

/// Opens /dev/fuse and mounts it.
fn attach(path: &Path, settings: &Settings) -> Result<(OwnedFd, bool)> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let device = match device {
        Ok(device) => OwnedFd::from(device),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)) => {
            bail!(
                "/dev/fuse is missing ({error}): load the kernel's FUSE module (`modprobe fuse`); in a container, pass \
                 the device in (--device /dev/fuse)"
            )
        }
        Err(error) if error.raw_os_error() == Some(libc::EACCES) && !rustix::process::geteuid().is_root() => {
            bail!(
                "/dev/fuse cannot be opened ({error}): this user may not mount here. Mount as root, or let root give \
                 /dev/fuse its usual mode (`chmod 666 /dev/fuse`)"
            )
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            bail!(
                "/dev/fuse cannot be opened ({error}): in a container, it must be passed in (--device /dev/fuse) with \
                 the right to mount (--cap-add SYS_ADMIN)"
            )
        }
        Err(error) => return Err(error).context("/dev/fuse"),
    };
    if !rustix::process::geteuid().is_root() {
        return Ok((fusermount::mount(path, &helper_options(settings))?, true));
    }
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        if settings.allow_other { ",allow_other" } else { "" },
    );
    let data = std::ffi::CString::new(data).context("mount options")?;
    match rustix::mount::mount(settings.source.as_str(), path, FS_TYPE, settings.flags, Some(data.as_c_str()))
    {
        Ok(()) => Ok((device, false)),
        Err(rustix::io::Errno::PERM) => {
            let helped = fusermount::mount(path, &helper_options(settings));
            Ok((helped.context("mount(2) is not permitted to this process")?, true))
        }
        Err(rustix::io::Errno::NODEV) => {
            bail!("this kernel has no FUSE filesystem: load its module (`modprobe fuse`)")
        }
        Err(error) => Err(std::io::Error::from(error))
            .with_context(|| format!("mounting at {} with options {data:?}", path.display())),
    }
}

/// What fusermount3 is asked for.
fn helper_options(settings: &Settings) -> String {
    // A list of endpoints has commas, which would end the option.
    let source = settings.source.replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!("subtype=shardfs,default_permissions,fsname={source}");
    let words = [
        (settings.allow_other, "allow_other"),
        (settings.flags.contains(MountFlags::RDONLY), "ro"),
        (settings.flags.contains(MountFlags::NOSUID), "nosuid"),
        (settings.flags.contains(MountFlags::NODEV), "nodev"),
        (settings.flags.contains(MountFlags::NOEXEC), "noexec"),
        (settings.flags.contains(MountFlags::SYNCHRONOUS), "sync"),
        (settings.flags.contains(MountFlags::DIRSYNC), "dirsync"),
        (settings.flags.contains(MountFlags::NOATIME), "noatime"),
    ];
    for (given, word) in words {
        if given {
            options.push(',');
            options.push_str(word);
        }
    }
    options
}

fn detach(path: &Path, by_helper: bool, lazily: bool) -> Result<()> {
    if by_helper {
        return fusermount::unmount(path, lazily);
    }
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazily);
    // The error stays an io::Error, by which a busy mount is told from others.
    rustix::mount::unmount(path, flags).map_err(|error| anyhow!(std::io::Error::from(error)))
}

/// The kernel starts with 128 KiB, whatever was negotiated.
fn raise_read_ahead((major, minor): (u32, u32), kib: u32) {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        tracing::debug!(%error, path, "read-ahead stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_was_aborted_is_a_mount_that_was_taken_away() {
        let ended_by = |number| ending(Err(std::io::Error::from_raw_os_error(number)));
        assert!(ending(Ok(())).is_ok());
        assert!(ended_by(libc::ECONNABORTED).is_ok());
        for number in [libc::EIO, libc::EINVAL, libc::ECONNRESET] {
            let error = ended_by(number).unwrap_err();
            let cause = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
            assert_eq!(cause, Some(number), "{error:#}");
        }
    }
}
