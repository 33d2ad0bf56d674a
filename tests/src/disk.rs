//! The disk below a cluster's volumes: copies of a volume as a power cut would leave it, and filesystems that fail.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::cluster::{Cluster, Options};
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
        mount_new("mkfs.xfs -q -m reflink=1", image, at, bytes);
        Xfs { at: at.to_owned() }
    }

    /// Moves the loop volumes of a cluster that was just started with these options to one.
    pub fn below_volumes(cluster: &Cluster, options: &Options, bytes: u64) -> Xfs {
        // The cluster is made where its folder is, and its volumes move to the disk before anything is on them.
        cluster.cli_run(&["dev", "down"]);
        let volumes = cluster.dir().join("volumes");
        let aside = cluster.scratch("aside");
        crate::sh(&volumes, &format!("mv *.img {}", aside.display()));
        let disk = Xfs::mounted(&cluster.root().join("disk.img"), &volumes, bytes);
        crate::sh(&aside, &format!("chmod 700 {0}; cp --sparse=always *.img {0}", volumes.display()));
        let output = cluster.up(options, &[]);
        assert!(output.status.success(), "{output:?}");
        disk
    }

    /// Where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        unmount(&self.at);
    }
}

/// An ext4 on a sparse file, to compare with. The guard of the cluster's folder takes it away if the test cannot.
#[derive(Debug)]
pub struct Ext4 {
    at: PathBuf,
}

impl Ext4 {
    /// Makes one in `image` and mounts it at `at`, which is there.
    pub fn mounted(image: &Path, at: &Path, bytes: u64) -> Ext4 {
        mount_new("mkfs.ext4 -q -b 4096", image, at, bytes);
        Ext4 { at: at.to_owned() }
    }

    /// Where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        unmount(&self.at);
    }
}

/// Makes a filesystem in a sparse file by `make`, and mounts it.
fn mount_new(make: &str, image: &Path, at: &Path, bytes: u64) {
    let script = format!(
        "truncate -s $BYTES $IMAGE
         {make} $IMAGE
         device=$(losetup --find --show $IMAGE)
         # The flag outlives whoever used the number before, if that was a node that was killed after a fence.
         blockdev --setrw $device
         mount -o noatime,nodev,nosuid $device $AT || {{ losetup --detach $device; exit 1; }}
         # Once it is unmounted.
         losetup --detach $device"
    );
    Shell::new("/").with("IMAGE", image).with("AT", at).with("BYTES", bytes.to_string()).run(&script);
}

fn unmount(at: &Path) {
    // What a failed test left open on it is ended by the guard, which then unmounts it.
    let unmounted = Shell::new("/").with("AT", at).output("umount $AT");
    if !unmounted.status.success() {
        eprintln!("{} stays mounted until the guard has ended what uses it", at.display());
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
