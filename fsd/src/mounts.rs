//! What is mounted where, from /proc/self/mountinfo; and whether a mount point can be used.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The filesystem type of our mounts.
pub const FS_TYPE: &str = "fuse.shardfs";
/// How long a look at a mount point may take before it counts as hung.
const LOOK_MAX: Duration = Duration::from_secs(3);

/// Which mount it is. The kernel uses the numbers again once a mount is gone: what has the same ones later need not be the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountId {
    /// Its number in the table.
    pub mount: u64,
    /// Major and minor number of its st_dev.
    pub device: (u32, u32),
}

/// A line of mountinfo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// Which it is.
    pub id: MountId,
    /// Where.
    pub mount_point: PathBuf,
    /// What.
    pub fs_type: String,
}

/// The mount that a lookup of this path meets: of several at one path, the last. The path must be canonical.
pub fn at(path: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.mount_point == path))
}

/// The whole table.
pub fn all() -> Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mount/point options [optional fields] - type source options`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let mount = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = std::str::from_utf8(fields.nth(1)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mount_point = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|field| *field != b"-");
    let fs_type = String::from_utf8_lossy(rest.nth(1)?).into_owned();
    Some(Mount {
        id: MountId { mount, device: (major.parse().ok()?, minor.parse().ok()?) },
        mount_point: PathBuf::from(OsString::from_vec(mount_point)),
        fs_type,
    })
}

/// Spaces and the like stand as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let code = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let code = code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(field[at]);
                at += 1;
            }
        }
    }
    plain
}

/// The canonical form of a mount point, if one can mount there; else words that say what to do. With
/// `replace_dead` one can where a dead ShardFS mount is.
pub fn usable(path: &Path, replace_dead: bool) -> Result<PathBuf> {
    let shown = path.display();
    // The last component may be a dead mount, which cannot be looked at.
    let canonical = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = parent
                .canonicalize()
                .with_context(|| format!("mount point {shown}: {}", parent.display()))?;
            parent.join(name)
        }
        _ => path.to_path_buf(),
    };
    // A hung daemon must not hang the next.
    let looked = look(&canonical);
    let mounted = at(&canonical)?.is_some_and(|mount| mount.fs_type == FS_TYPE);
    match looked {
        Some(Err(error)) if is_dead(&error) && mounted && replace_dead => Ok(canonical),
        Some(Err(error)) if is_dead(&error) => bail!(
            "mount point {shown} is a stale mount (\"Transport endpoint is not connected\"): its daemon is gone. Mend it \
             with `shardfs umount {shown}` (or, as root, `umount {shown}`), then mount again"
        ),
        Some(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("mount point {shown} does not exist: make the directory first")
        }
        Some(Err(error)) => Err(error).with_context(|| format!("mount point {shown}")),
        None => bail!(
            "mount point {shown} does not answer: a daemon that hangs has it mounted. End that daemon, then \
             `shardfs umount {shown}`"
        ),
        Some(Ok(_)) if mounted => {
            bail!("ShardFS is mounted at {shown} already: unmount it first (`umount {shown}`)")
        }
        Some(Ok(metadata)) if metadata.is_symlink() => usable(&canonical.canonicalize()?, replace_dead),
        Some(Ok(metadata)) if !metadata.is_dir() => bail!("mount point {shown} is not a directory"),
        Some(Ok(_)) => Ok(canonical),
    }
}

fn is_dead(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTCONN)
}

/// Whether a ShardFS mount without a daemon is at the path.
pub fn dead_at(path: &Path) -> Result<bool> {
    Ok(matches!(look(path), Some(Err(error)) if is_dead(&error))
        && at(path)?.is_some_and(|mount| mount.fs_type == FS_TYPE))
}

/// Whether the directory holds anything, which a mount there would hide.
pub fn hides_something(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

/// Looks in a thread of its own; `None`: no answer.
fn look(path: &Path) -> Option<std::io::Result<std::fs::Metadata>> {
    let (tell, told) = std::sync::mpsc::channel();
    let path = path.to_path_buf();
    let thread = std::thread::Builder::new().name("look".into());
    let spawned = thread.spawn(move || tell.send(look_closely(&path)).ok());
    match spawned {
        Ok(_) => told.recv_timeout(LOOK_MAX).ok(),
        Err(error) => Some(Err(error)),
    }
}

/// The kernel may still know the attributes of a dead mount's root; opening it finds out.
fn look_closely(path: &Path) -> std::io::Result<std::fs::Metadata> {
    let metadata = std::fs::symlink_metadata(path)?;
    if metadata.is_dir()
        && let Err(error) = std::fs::File::open(path)
        && error.raw_os_error() == Some(libc::ENOTCONN)
    {
        return Err(error);
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read() {
        let text = b"22 28 0:21 / /proc rw,nosuid shared:12 - proc proc rw\n\
            40 28 0:52 / /mnt/a\\040b rw,nosuid,nodev shared:5 master:3 - fuse.shardfs shardfs rw,user_id=0\n\
            41 28 0:53 / /mnt/a\\040b rw - fuse.shardfs shardfs rw\nbroken line\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[1].id, MountId { mount: 40, device: (0, 52) });
        assert_eq!(mounts[1].mount_point, PathBuf::from("/mnt/a b"));
        assert_eq!(mounts[1].fs_type, FS_TYPE);
        let last = mounts.iter().rfind(|m| m.mount_point == Path::new("/mnt/a b")).unwrap();
        assert_eq!(last.id, MountId { mount: 41, device: (0, 53) });
    }

    #[test]
    fn escapes_are_undone_and_the_rest_stays() {
        assert_eq!(unescape(br"a\040b\134c\011"), b"a b\\c\t");
        assert_eq!(unescape(br"\9\04"), br"\9\04");
    }

    #[test]
    fn mount_points_are_checked() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(temp.path(), temp.path().join("link")).unwrap();
        let said = |path: &Path| format!("{:#}", usable(path, false).unwrap_err());
        assert!(said(&file).contains("not a directory"));
        assert!(said(&temp.path().join("absent")).contains("does not exist"));
        assert!(usable(&temp.path().join("no/such"), false).is_err());
        let real = temp.path().canonicalize().unwrap();
        assert_eq!(usable(&temp.path().join("link"), false).unwrap(), real);
        assert_eq!(usable(temp.path(), false).unwrap(), real);
    }
}
