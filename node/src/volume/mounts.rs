//! What is mounted where, and mounting and unmounting of volumes' filesystems.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};
use shardfs_proto::types::{Error, Result};

use super::io_error;

/// How long an unmount waits for a filesystem that is busy.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// Between two attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// One line of mountinfo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mount {
    pub(super) mount_point: PathBuf,
    pub(super) filesystem: String,
    /// The device, as mount(8) shows it.
    pub(super) source: PathBuf,
}

/// What is mounted at a folder (the topmost), if anything.
pub(super) fn at(mount_point: &Path) -> Result<Option<Mount>> {
    let text = fs::read("/proc/self/mountinfo").map_err(io_error("reading /proc/self/mountinfo"))?;
    Ok(parse(&text).filter(|m| m.mount_point == mount_point).last())
}

/// Whether a device is mounted anywhere in this mount namespace.
pub(super) fn is_mounted(device: &Path) -> Result<bool> {
    let text = fs::read("/proc/self/mountinfo").map_err(io_error("reading /proc/self/mountinfo"))?;
    Ok(parse(&text).any(|m| m.source == device))
}

fn parse(text: &[u8]) -> impl Iterator<Item = Mount> + '_ {
    text.split(|b| *b == b'\n').filter_map(|line| {
        // 36 35 98:0 /root /mount/point options ... - type source super-options
        let mut fields = line.split(|b| *b == b' ');
        let mount_point = unescape(fields.nth(4)?);
        let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
        let filesystem = String::from_utf8_lossy(rest.next()?).into_owned();
        let source = unescape(rest.next()?);
        Some(Mount { mount_point, filesystem, source })
    })
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = || {
            let digits = after.get(..3)?;
            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
        };
        match (*first, octal()) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &after[3..];
            }
            (byte, _) => {
                out.push(byte);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// Mounts an ext4 for a volume: no devices, programs or set-id bits are ever used from it.
pub(super) fn mount_ext4(device: &Path, mount_point: &Path) -> Result<()> {
    let flags = MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    rustix::mount::mount(device, mount_point, c"ext4", flags, c"errors=remount-ro").map_err(|error| {
        Error::io(format!("mounting {} at {}: {error}", device.display(), mount_point.display()))
    })
}

/// Unmounts; waits for what is still being closed.
pub(super) fn unmount(mount_point: &Path) -> Result<()> {
    let attempts = BUSY_MAX.as_millis() / BUSY_PAUSE.as_millis();
    for _ in 0..attempts {
        match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(BUSY_PAUSE),
            Err(error) => return Err(Error::io(format!("unmounting {}: {error}", mount_point.display()))),
        }
    }
    Err(Error::unavailable(format!(
        "{} stays busy: some process has files open on it (`fuser -vm {}` shows which)",
        mount_point.display(),
        mount_point.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_parsed() {
        let text =
            b"36 35 98:0 / /mnt/with\\040space rw,noatime master:1 - ext4 /dev/loop0 rw,errors=continue\n\
                     37 35 0:5 / /proc rw - proc proc rw\nbroken\n";
        let all: Vec<Mount> = parse(text).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].mount_point, Path::new("/mnt/with space"));
        assert_eq!(all[0].filesystem, "ext4");
        assert_eq!(all[0].source, Path::new("/dev/loop0"));
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert!(at(Path::new("/nowhere/at/all")).unwrap().is_none());
    }
}
