//! What is mounted where, from /proc/self/mountinfo, and unmounting with patience.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use shardfs_proto::types::{Error, Result, clock};

/// How long an unmount is repeated while something still holds the filesystem.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Pause between attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Mounts on top of each other at one place.
const STACKED_MAX: usize = 16;

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// Where.
    pub at: PathBuf,
    /// What: a device.
    pub source: PathBuf,
    /// The filesystem's kind.
    pub kind: String,
    /// Major and minor number of its device.
    pub device: (u32, u32),
}

/// All mounts that this process sees, in order of mounting.
pub fn list() -> Result<Vec<Mount>> {
    list_in(Path::new("/proc/self/mountinfo")).map_err(|e| Error::io(format!("reading the mount table: {e}")))
}

/// All mounts of a mount table, in order of mounting.
pub fn list_in(table: &Path) -> std::io::Result<Vec<Mount>> {
    let text = std::fs::read(table)?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// `id parent major:minor root at options [optional...] - kind source superoptions`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let at = fields.nth(1)?;
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = rest.next()?;
    let source = rest.next()?;
    Some(Mount {
        at: unescape(at),
        source: unescape(source),
        kind: String::from_utf8_lossy(kind).into_owned(),
        device: (major.parse().ok()?, minor.parse().ok()?),
    })
}

/// Blanks and the like stand as `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// What is mounted at this very place, topmost last.
pub fn at(place: &Path) -> Result<Vec<Mount>> {
    let place = std::fs::canonicalize(place).unwrap_or_else(|_| place.to_owned());
    Ok(list()?.into_iter().filter(|mount| mount.at == place).collect())
}

/// Unmounts everything at this place. Waits a little for what is busy.
pub fn unmount_all(place: &Path) -> Result<()> {
    for _ in 0..STACKED_MAX {
        if at(place)?.is_empty() {
            return Ok(());
        }
        unmount(place)?;
    }
    Err(Error::unavailable(format!("{}: something keeps being mounted there", place.display())))
}

/// Unmounts what is topmost at this place, if nothing uses it. Does not wait.
pub fn unmount_idle(place: &Path) -> Result<()> {
    match rustix::mount::unmount(place, UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::io(format!("unmounting {}: {e}", place.display()))),
    }
}

fn unmount(place: &Path) -> Result<()> {
    let begun = clock::monotonic();
    loop {
        match rustix::mount::unmount(place, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            // Not mounted (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) if begun.elapsed() < BUSY_WAIT_MAX => std::thread::sleep(BUSY_PAUSE),
            Err(Errno::BUSY) => {
                return Err(Error::unavailable(format!(
                    "{} cannot be unmounted: some process uses it (`fuser -vm {}` says which)",
                    place.display(),
                    place.display()
                )));
            }
            Err(e) => return Err(Error::io(format!("unmounting {}: {e}", place.display()))),
        }
    }
}

/// Held by tests that mount: those that make a mount namespace, which copies every mount and so keeps it alive,
/// run alone.
#[cfg(test)]
#[derive(Debug)]
pub(crate) enum MountsGuard {
    Shared { _guard: parking_lot::RwLockReadGuard<'static, ()> },
    Alone { _guard: parking_lot::RwLockWriteGuard<'static, ()> },
}

#[cfg(test)]
impl MountsGuard {
    pub(crate) fn shared() -> MountsGuard {
        MountsGuard::Shared { _guard: TESTS.read() }
    }

    pub(crate) fn alone() -> MountsGuard {
        MountsGuard::Alone { _guard: TESTS.write() }
    }
}

#[cfg(test)]
static TESTS: parking_lot::RwLock<()> = parking_lot::RwLock::new(());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_understood() {
        let line =
            br"36 35 98:0 /mnt1 /mnt\0402/a\134b rw,noatime master:1 - ext4 /dev/loop7 rw,errors=remount-ro";
        let mount = parse(line).unwrap();
        assert_eq!(mount.at, Path::new(r"/mnt 2/a\b"));
        assert_eq!((mount.source.to_str().unwrap(), mount.kind.as_str()), ("/dev/loop7", "ext4"));
        assert_eq!(mount.device, (98, 0));
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(br"\4x"), Path::new(r"\4x"));
    }

    #[test]
    fn proc_is_mounted() {
        assert!(!at(Path::new("/proc")).unwrap().is_empty());
    }
}
