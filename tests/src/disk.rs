//! The disk below a cluster's volumes: copies of a volume as a power cut would leave it, and filesystems that fail.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::run::Shell;

/// An XFS with reflinks on a sparse file. Volumes that lie on it can be copied at one moment while they are written: the
/// loop devices above write past its page cache, and a reflink waits for the writes that are inside and keeps out the others.
/// So a copy is what a disk without a write cache of its own holds when the power goes.
///
/// The guard of the cluster's folder takes it away if the test cannot.
#[derive(Debug)]
pub struct Xfs {
    at: PathBuf,
}

impl Xfs {
    /// Makes one in `image` and mounts it at `at`, which is there.
    pub fn mounted(image: &Path, at: &Path, bytes: u64) -> Xfs {
        Shell::new("/").with("IMAGE", image).with("AT", at).with("BYTES", bytes.to_string()).run(
            "truncate -s $BYTES $IMAGE
             mkfs.xfs -q -m reflink=1 $IMAGE
             mount -o loop,noatime $IMAGE $AT",
        );
        Xfs { at: at.to_owned() }
    }

    /// Where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // What a failed test left open on it is ended by the guard, which then unmounts it.
        let unmounted = Shell::new("/").with("AT", &self.at).output("umount $AT");
        if !unmounted.status.success() {
            eprintln!("{} stays mounted until the guard has ended what uses it", self.at.display());
        }
    }
}

/// Makes `to` a copy of `from` as it is at one moment; both on one [`Xfs`]. The inode of a `to` that is there stays.
pub fn copy_at_once(from: &Path, to: &Path) {
    let source = File::open(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    let copy = OpenOptions::new().write(true).create(true).truncate(false).open(to);
    let copy = copy.unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    rustix::fs::ioctl_ficlone(&copy, &source)
        .unwrap_or_else(|e| panic!("reflink of {} to {}: {e}", from.display(), to.display()));
}

/// How a filesystem is taken from its users while they use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// Shut down; what is not on the disk is lost, the log's last transactions too.
    WithoutLogFlush,
    /// Shut down after the log was written.
    WithLogFlush,
    /// Shut down after everything was written.
    AfterSync,
    /// An error was found: the journal is aborted, nothing can be written any more, reading goes on.
    Aborted,
}

impl Loss {
    /// Does it to the filesystem that is mounted at `at`.
    pub fn strike(self, at: &Path) {
        /// `FS_IOC_SHUTDOWN`: `_IOR('X', 125, __u32)`.
        const SHUTDOWN: libc::c_ulong = 0x8004_587D;
        let mode: u32 = match self {
            Loss::AfterSync => 0,
            Loss::WithLogFlush => 1,
            Loss::WithoutLogFlush => 2,
            Loss::Aborted => {
                Shell::new("/").with("AT", at).run("mount -o remount,abort $AT");
                return;
            }
        };
        let root = File::open(at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        // SAFETY: the kernel reads one u32.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN as _, &raw const mode) };
        assert_eq!(done, 0, "shutting {} down: {}", at.display(), std::io::Error::last_os_error());
    }
}

/// A filesystem on which every write waits, as on a device that hangs, for as long as this lives.
#[derive(Debug)]
pub struct Frozen(File);

/// `FIFREEZE`: `_IOWR('X', 119, int)`.
const FREEZE: libc::c_ulong = 0xC004_5877;
/// `FITHAW`: `_IOWR('X', 120, int)`.
const THAW: libc::c_ulong = 0xC004_5878;

impl Frozen {
    /// Freezes what is mounted at `at`. The open file keeps it mounted.
    pub fn new(at: &Path) -> Frozen {
        let root = File::open(at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        // SAFETY: the kernel takes no argument.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), FREEZE as _, 0) };
        assert_eq!(done, 0, "freezing {}: {}", at.display(), std::io::Error::last_os_error());
        Frozen(root)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: as above. One that was shut down meanwhile is thawed already.
        unsafe { libc::ioctl(self.0.as_raw_fd(), THAW as _, 0) };
    }
}
