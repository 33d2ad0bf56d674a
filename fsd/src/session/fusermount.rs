//! fusermount3, the set-user-id program that mounts for those who may not: it opens /dev/fuse, mounts, and
//! passes the descriptor over a socket whose number stands in `_FUSE_COMMFD`.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

const PROGRAM: &str = "fusermount3";

/// Mounts; gives the descriptor to serve.
pub(super) fn mount(path: &Path, options: &str) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().context("making a socket")?;
    let fd = theirs.as_raw_fd();
    let mut command = Command::new(PROGRAM);
    command.args(["-o", options, "--"]).arg(path).env("_FUSE_COMMFD", fd.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only a system call that is safe there.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let child = command.spawn().map_err(missing)?;
    drop(theirs);
    let received = receive_descriptor(&ours);
    // It ends once the descriptor is taken, or with its complaint.
    drop(ours);
    let output = child.wait_with_output().context("waiting for fusermount3")?;
    match received? {
        Some(device) => Ok(device),
        None => Err(complaint(&output.stderr)),
    }
}

/// Unmounts. A busy mount is the same io::Error as from umount(2).
pub(super) fn unmount(path: &Path, lazily: bool) -> Result<()> {
    let mut command = Command::new(PROGRAM);
    command.arg("-u");
    if lazily {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    if String::from_utf8_lossy(&output.stderr).contains("busy") {
        return Err(anyhow!(std::io::Error::from_raw_os_error(libc::EBUSY)));
    }
    Err(complaint(&output.stderr))
}

fn missing(error: std::io::Error) -> anyhow::Error {
    if error.kind() == ErrorKind::NotFound {
        anyhow!("fusermount3 is not installed: install the package fuse3, or mount as root")
    } else {
        anyhow!(error).context("starting fusermount3")
    }
}

fn complaint(stderr: &[u8]) -> anyhow::Error {
    let words = String::from_utf8_lossy(stderr);
    let words = words.trim();
    if words.is_empty() { anyhow!("fusermount3 failed without a word") } else { anyhow!("{words}") }
}

/// The one descriptor that the other end sends; `None` if it closes without.
fn receive_descriptor(from: &UnixStream) -> Result<Option<OwnedFd>> {
    let mut byte = [0u8; 1];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // Aligned for a control message header.
    let mut control = [0u64; 8];
    // SAFETY: a message header of zeros is valid; the pointers set below outlive its use.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let received = loop {
        // SAFETY: the header and what it points to are ours and alive.
        let received = unsafe { libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if received >= 0 {
            break received;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error).context("receiving from fusermount3");
        }
    };
    if received == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has filled in the control data, whose first header this points to, or null.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: not null, and within the control data.
    let carries = !header.is_null()
        && unsafe { (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS };
    if !carries {
        bail!("fusermount3 sent no descriptor");
    }
    // SAFETY: such a message carries at least one descriptor, which is ours from now on.
    let fd = unsafe { std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<RawFd>()) };
    // SAFETY: as above.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}
