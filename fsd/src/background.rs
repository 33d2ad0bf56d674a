//! Going to the background, and telling whoever waits that the mount is usable.
//!
//! The program starts itself again with the same arguments in a session of its own; a pipe, named by an
//! environment variable, carries one message back: [`READY`], or why it failed. A fork would leave a
//! caller's threads behind; this works from wherever [`crate::run`] is called, as long as the same arguments
//! lead there again.

use std::fs::File;
use std::io::{PipeReader, Read, Write, pipe};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

/// Names the descriptor of the pipe to the child.
pub const READY_VARIABLE: &str = "SHARDFSD_READY_FD";
/// What is written when the mount is usable.
const READY: &[u8] = b"ready\n";

/// Whoever waits for the mount.
#[derive(Default)]
pub struct Waiting {
    to: Option<File>,
}

impl Waiting {
    /// Nobody, or the holder of the other end of this descriptor, which the caller gives up.
    pub fn new(fd: Option<RawFd>) -> Result<Waiting> {
        let Some(fd) = fd else { return Ok(Waiting::default()) };
        if fd < 0 {
            bail!("descriptor {fd}: no descriptor has this number");
        }
        // SAFETY: it was handed to this process for this one use; that it is not open is an error of the call.
        let copy = rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3);
        let copy = copy.with_context(|| format!("descriptor {fd}, for telling that the mount is usable"))?;
        // The copy alone shall hold the pipe open; a standard descriptor must lead somewhere, though.
        if fd > 2 {
            // SAFETY: as above; nobody else uses it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        } else {
            let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
            // SAFETY: takes no pointers, and changes a standard descriptor only.
            if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
                return Err(std::io::Error::last_os_error()).context("/dev/null");
            }
        }
        let to = File::from(copy);
        Ok(Waiting { to: Some(to) })
    }

    /// The descriptor, for a child that is to tell it.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.to.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The mount is usable.
    pub fn ready(&mut self) {
        self.tell(READY);
    }

    /// There will be no mount.
    pub fn failed(&mut self, error: &anyhow::Error) {
        self.tell(format!("{error:#}\n").as_bytes());
    }

    fn tell(&mut self, words: &[u8]) {
        if let Some(mut to) = self.to.take() {
            // Nobody may wait any more.
            to.write_all(words).ok();
        }
    }
}

/// The pipe to the parent, if this process was started to go on in the background.
pub fn parent_pipe() -> Option<RawFd> {
    let fd: RawFd = std::env::var(READY_VARIABLE).ok()?.parse().ok()?;
    let is_pipe = |fd: RawFd| {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        link.to_str().map(|target| target.starts_with("pipe:"))
    };
    // An inherited variable without its pipe means nothing.
    (fd > 2 && is_pipe(fd) == Some(true)).then_some(fd)
}

/// Starts this program again in the background; returns when its mount is usable, or has failed.
pub fn start() -> Result<()> {
    let (from_child, to_parent) = pipe().context("making a pipe")?;
    let fd = to_parent.as_raw_fd();
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_else(|| "shardfsd".into());
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(program)
        .args(words)
        .env(READY_VARIABLE, fd.to_string())
        // Whoever mounts may be a service; this process is not that service.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only system calls that are safe there.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 || libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().context("starting the daemon")?;
    drop(to_parent);
    match told(from_child)? {
        None => Ok(()),
        Some(words) if words.is_empty() => {
            let status = child.wait().context("waiting for the daemon")?;
            Err(anyhow!("the daemon ended before the mount was usable: {status}"))
        }
        Some(words) => {
            child.wait().ok();
            Err(anyhow!("{words}"))
        }
    }
}

/// `None`: ready. Else why not; empty if the other end was closed without a word.
fn told(mut from: PipeReader) -> Result<Option<String>> {
    let mut words = Vec::new();
    from.read_to_end(&mut words).context("waiting for the daemon")?;
    Ok((words != READY).then(|| String::from_utf8_lossy(&words).trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    fn waiting() -> (PipeReader, Waiting) {
        let (from, to) = pipe().unwrap();
        (from, Waiting::new(Some(to.into_raw_fd())).unwrap())
    }

    #[test]
    fn one_message_is_told() {
        let (from, mut to) = waiting();
        to.ready();
        to.failed(&anyhow!("too late"));
        assert_eq!(told(from).unwrap(), None);

        let (from, mut to) = waiting();
        to.failed(&anyhow!("inner").context("outer"));
        assert_eq!(told(from).unwrap().as_deref(), Some("outer: inner"));

        let (from, to) = waiting();
        drop(to);
        assert_eq!(told(from).unwrap().as_deref(), Some(""));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        assert!(Waiting::new(Some(1_000_000)).is_err());
        assert!(Waiting::new(Some(-1)).is_err());
    }
}
