//! ext4 on a loop device, as loop volumes have it: made, mounted, asked for what ShardFS needs of it, and taken away again.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;
use shardfs_node::volume::{self, Attached, LOOP_BYTES_MIN, VolumeSpec};
use shardfs_proto::types::{Error, VolumeId};

use super::Check;
use crate::system;

/// `_IOW('f', 43, u32)` of ext4: puts the journal's content in place.
const EXT4_IOC_CHECKPOINT: libc::c_ulong = 0x4004_662B;
/// `_IOR('X', 125, u32)` of ext4: stops the filesystem.
const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587D;
/// The log is not flushed.
const SHUTDOWN_NOLOGFLUSH: u32 = 2;
/// Where a superblock has its features that old kernels may not write (`s_feature_ro_compat`).
const RO_COMPAT_AT: u64 = 1024 + 0x64;
/// Checksums of all metadata, among them.
const METADATA_CSUM: u32 = 0x400;

const NAME: &str = "ext4 on loop";

/// Tries in a folder of its own below `folder`.
pub fn checks(folder: &Path) -> Vec<Check> {
    if !system::is_root() {
        return vec![Check::skipped(NAME, "needs root: loop devices and mounts")];
    }
    match Trial::new(folder) {
        Ok(mut trial) => {
            let checks = trial.run();
            let left = trial.end();
            checks.into_iter().chain(left).collect()
        }
        Err(error) => vec![Check::fail(
            NAME,
            error.to_string(),
            "see the messages on loop devices and mkfs.ext4; or use volumes of kind dir",
        )],
    }
}

struct Trial {
    folder: PathBuf,
    spec: VolumeSpec,
    attached: Option<Attached>,
}

impl Trial {
    fn new(folder: &Path) -> Result<Trial, Error> {
        let folder = folder.join(format!(".shardfs-doctor.{:016x}", fastrand::u64(..)));
        fs::create_dir(&folder).map_err(|e| Error::io(format!("making {}: {e}", folder.display())))?;
        let spec = VolumeSpec {
            id: VolumeId::new("doctor")?,
            cluster_id: "doctor".into(),
            source: folder.join("disk"),
            size_bytes: LOOP_BYTES_MIN,
            formatted: false,
            mount_point: folder.join("volumes/doctor"),
            allow_unfenced: false,
        };
        let mut trial = Trial { folder, spec, attached: None };
        let made = volume::provider("loop").and_then(|provider| {
            provider.create(&trial.spec)?;
            provider.attach(&trial.spec)
        });
        match made {
            Ok(attached) => {
                trial.attached = Some(attached);
                Ok(trial)
            }
            Err(error) => {
                // An attachment that failed has taken itself back.
                trial.remove_files();
                Err(error)
            }
        }
    }

    fn run(&mut self) -> Vec<Check> {
        let Some(attached) = &self.attached else { return Vec::new() };
        let root = attached.root.clone();
        let opened = match File::open(&root) {
            Ok(opened) => opened,
            Err(e) => {
                return vec![Check::fail(NAME, format!("{}: {e}", root.display()), "see the kernel's log")];
            }
        };
        vec![
            Check::ok(
                NAME,
                format!("made and mounted in {}", self.folder.parent().unwrap_or(&self.folder).display()),
            ),
            direct_io(&attached.device),
            checksums(&self.spec.source),
            checkpoint(&opened),
            shutdown(&opened, &root),
        ]
    }

    /// Takes everything away; answers what could not be.
    fn end(mut self) -> Option<Check> {
        let attached = self.attached.take()?;
        // By ourselves: a fenced mount is left alone by others on kernels that write at its unmount. This one may write:
        // it is nobody's.
        let unmounted = rustix::mount::unmount(&self.spec.mount_point, UnmountFlags::NOFOLLOW);
        let ended = match unmounted {
            Ok(()) => volume::provider("loop").and_then(|provider| provider.detach(&self.spec, attached)),
            Err(e) => Err(Error::io(format!("unmounting {}: {e}", self.spec.mount_point.display()))),
        };
        match ended {
            Ok(()) => {
                self.remove_files();
                None
            }
            Err(error) => Some(Check::warn(
                NAME,
                format!("the trial is left in {}: {error}", self.folder.display()),
                "unmount what is mounted there, `losetup -d` its device, and remove the folder",
            )),
        }
    }

    fn remove_files(&self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "a folder of the doctor's stays");
        }
    }
}

fn direct_io(device: &str) -> Check {
    const NAME: &str = "direct I/O on loop";
    let name = Path::new(device).file_name().unwrap_or_default();
    match fs::read_to_string(Path::new("/sys/block").join(name).join("loop/dio")).as_deref().map(str::trim) {
        Ok("1") => Check::ok(NAME, "is on"),
        Ok(_) => Check::warn(
            NAME,
            "is not possible on this folder's file system: pages are cached twice",
            "keep backing files on ext4 or XFS with 4 KiB blocks, not on tmpfs or overlayfs",
        ),
        Err(e) => Check::skipped(NAME, format!("{device}: {e}")),
    }
}

fn checksums(disk: &Path) -> Check {
    const NAME: &str = "ext4 checksums";
    let mut features = [0; 4];
    match File::open(disk).and_then(|file| file.read_exact_at(&mut features, RO_COMPAT_AT)) {
        Ok(()) if u32::from_le_bytes(features) & METADATA_CSUM != 0 => Check::ok(NAME, "metadata_csum is on"),
        Ok(()) => Check::warn(
            NAME,
            "metadata_csum is off: damage of metadata is noticed late",
            "use e2fsprogs 1.43 or later, and leave metadata_csum in /etc/mke2fs.conf",
        ),
        Err(e) => Check::skipped(NAME, e.to_string()),
    }
}

/// Calls ext4 with one number.
fn call(file: &File, code: libc::c_ulong, mut argument: u32) -> std::io::Result<()> {
    // SAFETY: both codes take a pointer to one u32, which the kernel reads.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), code as _, &raw mut argument) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn checkpoint(root: &File) -> Check {
    const NAME: &str = "ext4 checkpoint";
    match call(root, EXT4_IOC_CHECKPOINT, 0) {
        Ok(()) => Check::ok(NAME, "EXT4_IOC_CHECKPOINT works"),
        Err(e) => Check::fail(
            NAME,
            format!("EXT4_IOC_CHECKPOINT: {e}: backups cannot show what a primary has published"),
            "use Linux 5.15 or later",
        ),
    }
}

/// The fence of loop volumes: after it nothing can be written.
fn shutdown(root: &File, mounted: &Path) -> Check {
    const NAME: &str = "ext4 shutdown";
    if let Err(e) = call(root, EXT4_IOC_SHUTDOWN, SHUTDOWN_NOLOGFLUSH) {
        return Check::fail(
            NAME,
            format!("EXT4_IOC_SHUTDOWN: {e}: loop volumes cannot be fenced"),
            "run as root, on a kernel with ext4 of its own",
        );
    }
    match File::create(mounted.join("late")) {
        Ok(_) => Check::fail(
            NAME,
            "a write after it succeeded",
            "use another kernel: loop volumes cannot be fenced",
        ),
        Err(e) => Check::ok(NAME, format!("EXT4_IOC_SHUTDOWN works: a late write fails ({e})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn it_tries_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let checks = checks(dir.path());
        if !system::is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return;
        }
        assert_eq!(checks.len(), 5, "{checks:#?}");
        assert!(checks.iter().all(|c| c.outcome != Outcome::Fail), "{checks:#?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let used = system::loop_devices().unwrap();
        assert!(!used.iter().any(|(_, file)| file.starts_with(dir.path())), "{used:?}");
    }
}
