//! What the command line asks of Linux: the mount table, unmounting, who holds a mount busy, whether we are root.
//!
//! Nothing here follows a path into a mount that may hang, except where a function says so.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::mount::UnmountFlags;

use crate::failure::{Failure, OrFail, Result};

/// The type under which the daemon mounts.
pub const FUSE_TYPE: &str = "fuse.shardfs";
/// Time that a mount gets to answer statfs before it counts as hanging.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Layers of dead mounts over one another that are taken away.
const STALE_LAYERS_MAX: usize = 64;

/// Whether this process has root's rights.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// One line of the mount table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountEntry {
    /// Where.
    pub mount_point: PathBuf,
    /// Type, such as `ext4`.
    pub fs_type: String,
    /// Device or name.
    pub source: String,
    /// Whose FUSE mount it is; `None` for other types.
    pub owner: Option<u32>,
}

/// The mount table, in the order of mounting.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    Ok(table.split(|b| *b == b'\n').filter_map(parse_mount).collect())
}

fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let separator = fields.iter().position(|f| *f == b"-")?;
    let options = fields.get(separator + 3).copied().unwrap_or_default();
    let owner = options.split(|b| *b == b',').find_map(|o| o.strip_prefix(b"user_id="));
    Some(MountEntry {
        mount_point: PathBuf::from(unescape(fields.get(4)?)),
        fs_type: String::from_utf8_lossy(fields.get(separator + 1)?).into_owned(),
        source: unescape(fields.get(separator + 2)?).to_string_lossy().into_owned(),
        owner: owner.and_then(|o| std::str::from_utf8(o).ok()?.parse().ok()),
    })
}

/// The kernel writes blanks and backslashes of the mount table as `\ooo`.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match octal {
            Some(d) => {
                bytes.push(d.iter().fold(0u8, |n, c| n.wrapping_mul(8).wrapping_add(c - b'0')));
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// What is mounted at a path: the topmost.
pub fn mount_at(mount_point: &Path) -> Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|m| m.mount_point == mount_point))
}

/// The absolute path of a mount point with symlinks resolved, without touching what is mounted there: a dead
/// mount answers nothing.
pub fn mount_point_path(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).with_context(|| path.display().to_string())?;
    let mut normal = PathBuf::new();
    for component in absolute.components() {
        match component {
            std::path::Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    // The last component may be a symlink to a folder; where it is, and not a dead mount, it is followed.
    if mount_at(&normal)?.is_none()
        && let Ok(resolved) = fs::canonicalize(&normal)
    {
        return Ok(resolved);
    }
    let (Some(parent), Some(name)) = (normal.parent(), normal.file_name()) else { return Ok(normal) };
    let parent = fs::canonicalize(parent).with_context(|| parent.display().to_string())?;
    Ok(parent.join(name))
}

/// How a mount is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MountHealth {
    /// It answers.
    Usable,
    /// "Transport endpoint is not connected": its daemon is gone.
    Dead,
    /// No answer in time.
    Hanging,
}

/// Asks a mount for its size, in a thread of its own because it may never answer.
pub async fn probe(mount_point: &Path) -> Result<MountHealth> {
    let path = mount_point.to_owned();
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("probe".to_owned())
        .spawn(move || {
            // The receiver may have given up.
            let _ = send.send(rustix::fs::statvfs(&path).map(|_| ()));
        })
        .context("cannot start a thread")?;
    match tokio::time::timeout(PROBE_TIMEOUT, receive).await {
        Ok(Ok(Ok(()))) => Ok(MountHealth::Usable),
        Ok(Ok(Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED))) => Ok(MountHealth::Dead),
        Ok(Ok(Err(e))) => Err(Failure::new(format!("{}: {e}", mount_point.display()))),
        Ok(Err(_)) | Err(_) => Ok(MountHealth::Hanging),
    }
}

/// Why an unmount did not happen.
#[derive(Debug)]
pub enum UnmountError {
    /// Somebody uses it.
    Busy,
    /// Nothing is mounted there.
    NotMounted,
    /// It belongs to another user.
    Denied(MountEntry),
    /// Something else.
    Other(Failure),
}

impl UnmountError {
    /// As a failure that names who holds the mount.
    pub fn into_failure(self, mount_point: &Path) -> Failure {
        match self {
            UnmountError::Busy => busy(mount_point),
            UnmountError::NotMounted => {
                Failure::new(format!("nothing is mounted on {}", mount_point.display()))
            }
            UnmountError::Denied(entry) => denied(mount_point, &entry),
            UnmountError::Other(failure) => failure,
        }
    }
}

/// Unmounts; `lazy` detaches at once and lets those who use it finish. As root by umount2, else by fusermount3. It is
/// the mount table that says whether it is done: one layer less.
pub fn unmount(mount_point: &Path, lazy: bool) -> std::result::Result<(), UnmountError> {
    let layers = || -> std::result::Result<Vec<MountEntry>, UnmountError> {
        let all = mounts().map_err(UnmountError::Other)?;
        Ok(all.into_iter().filter(|m| m.mount_point == mount_point).collect())
    };
    let before = layers()?.len();
    let result =
        if is_root() { unmount_by_kernel(mount_point, lazy) } else { unmount_by_helper(mount_point, lazy) };
    judge(mount_point, result, rustix::process::geteuid().as_raw(), before, layers()?)
}

/// What an attempt of a user came to, by what was said and what is still mounted (of `before` layers).
fn judge(
    mount_point: &Path,
    result: std::result::Result<(), UnmountError>,
    user: u32,
    before: usize,
    mut after: Vec<MountEntry>,
) -> std::result::Result<(), UnmountError> {
    let gone = after.len() < before;
    match (result, after.pop()) {
        (Ok(()), Some(_)) if !gone => Err(UnmountError::Other(Failure::new(format!(
            "{} is still mounted, though unmounting it reported no error",
            mount_point.display()
        )))),
        // fusermount3 looks for mounts of the calling user only, and says that there is none.
        (Err(UnmountError::NotMounted), Some(entry)) if !gone => Err(UnmountError::Denied(entry)),
        // Whatever it says: it takes away nobody else's.
        (Err(UnmountError::Other(_)), Some(entry))
            if !gone && user != 0 && entry.owner.is_some_and(|owner| owner != user) =>
        {
            Err(UnmountError::Denied(entry))
        }
        (result, _) => result,
    }
}

fn unmount_by_kernel(mount_point: &Path, lazy: bool) -> std::result::Result<(), UnmountError> {
    let flags = if lazy { UnmountFlags::DETACH | UnmountFlags::NOFOLLOW } else { UnmountFlags::NOFOLLOW };
    match rustix::mount::unmount(mount_point, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Err(UnmountError::Busy),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Err(UnmountError::NotMounted),
        Err(e) => {
            Err(UnmountError::Other(Failure::new(format!("cannot unmount {}: {e}", mount_point.display()))))
        }
    }
}

fn unmount_by_helper(mount_point: &Path, lazy: bool) -> std::result::Result<(), UnmountError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(mount_point);
    // What it says is understood in one language only.
    let output = command.env("LC_ALL", "C").output().map_err(|e| {
        let failure = Failure::new(format!("cannot run fusermount3: {e}"));
        UnmountError::Other(failure.hint("install fuse3, or unmount as root"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let denied = words.contains("not permitted") || words.contains("ermission denied");
    if words.contains("busy") {
        Err(UnmountError::Busy)
    } else if denied || words.contains("not found in /etc/mtab") || words.contains("not mounted") {
        Err(UnmountError::NotMounted)
    } else {
        Err(UnmountError::Other(Failure::new(words)))
    }
}

/// "permission denied", and to whom it belongs.
fn denied(mount_point: &Path, entry: &MountEntry) -> Failure {
    let owner = match entry.owner {
        Some(0) => "mounted by root".to_owned(),
        Some(uid) => format!("mounted by the user {uid}"),
        None => format!("a mount of the type {}", entry.fs_type),
    };
    Failure::new(format!("cannot unmount {}: permission denied: {owner}", mount_point.display()))
        .hint("run it as root, or as who mounted it")
}

/// Takes away dead ShardFS mounts at a path; says whether there were any. Others are not touched.
pub async fn mend_stale_mount(mount_point: &Path) -> Result<bool> {
    for layer in 0..STALE_LAYERS_MAX {
        let Some(entry) = mount_at(mount_point)? else { return Ok(layer > 0) };
        if !entry.fs_type.starts_with("fuse.shardfs") || probe(mount_point).await? != MountHealth::Dead {
            return Ok(layer > 0);
        }
        match unmount(mount_point, true) {
            Ok(()) | Err(UnmountError::NotMounted) => {}
            Err(other) => return Err(other.into_failure(mount_point)),
        }
    }
    Err(Failure::new(format!("more than {STALE_LAYERS_MAX} dead mounts lie over {}", mount_point.display()))
        .hint("repeat it until none is left"))
}

/// Makes a folder with those above it. A file in its place, or in theirs, is named.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| {
        match path.ancestors().find(|a| fs::metadata(a).is_ok_and(|m| !m.is_dir())) {
            Some(file) => Failure::usage(format!("{} is a file; a folder is needed", file.display()))
                .hint("choose another path, or move the file away"),
            None => Failure::new(format!("cannot make {}: {e}", path.display())),
        }
    })
}

/// A process that keeps a mount busy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its pid.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
    /// What it has there: "working directory", "root", "program", or an open file's path.
    pub what: String,
}

/// Processes with a working directory, root, program, mapped or open file below a path. Only reads links in
/// /proc, which never touch the mount. Processes of other users are seen by root only.
pub fn holders(mount_point: &Path) -> Vec<Holder> {
    /// More are of no use to a person.
    const HOLDERS_MAX: usize = 20;
    let below = |link: &Path| fs::read_link(link).ok().filter(|target| target.starts_with(mount_point));
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let proc = process.path();
        let named = [("cwd", "working directory"), ("root", "root"), ("exe", "program")]
            .into_iter()
            .find_map(|(link, word)| below(&proc.join(link)).map(|_| word.to_owned()));
        let files = |folder: &str| {
            let entries = fs::read_dir(proc.join(folder)).ok()?;
            entries.flatten().find_map(|e| below(&e.path())).map(|p| p.display().to_string())
        };
        if let Some(what) = named.or_else(|| files("fd")).or_else(|| files("map_files")) {
            let command = fs::read_to_string(proc.join("comm")).unwrap_or_default().trim().to_owned();
            found.push(Holder { pid, command, what });
            if found.len() == HOLDERS_MAX {
                break;
            }
        }
    }
    found.sort_by_key(|h| h.pid);
    found
}

/// "it is busy", and by whom.
fn busy(mount_point: &Path) -> Failure {
    let mut message = format!("{} is in use", mount_point.display());
    let holders = holders(mount_point);
    if holders.is_empty() {
        message.push_str(
            " (by something that is no visible process: a mount below it, a loop device, another user)",
        );
    }
    for holder in holders {
        message.push_str(&format!("\n  pid {} {}: {}", holder.pid, holder.command, holder.what));
    }
    Failure::new(message).hint("end these programs or leave the folder; --force detaches it from under them")
}

/// A program of ours: named by an environment variable, or beside this program, or in PATH.
pub fn find_program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
        let path = PathBuf::from(path);
        return fs::canonicalize(&path).with_context(|| format!("{variable}={}", path.display()));
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|candidate| is_executable(candidate))
        .and_then(|found| fs::canonicalize(found).ok())
        .ok_or_else(|| {
            Failure::new(format!("the program {name} is not there"))
                .hint(format!("build or install it beside `shardfs` or in PATH, or name it in {variable}"))
        })
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Loop devices with their backing files.
pub fn loop_devices() -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir("/sys/block") {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(Failure::new(format!("/sys/block: {e}"))),
    };
    for entry in entries.flatten() {
        if !entry.file_name().as_bytes().starts_with(b"loop") {
            continue;
        }
        // Absent: the device is free.
        if let Ok(backing) = fs::read(entry.path().join("loop/backing_file")) {
            let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
            found
                .push((Path::new("/dev").join(entry.file_name()), PathBuf::from(OsStr::from_bytes(backing))));
        }
    }
    Ok(found)
}

/// Frees a loop device whose file system is unmounted (LOOP_CLR_FD); one that is free already is no error.
pub fn detach_loop(device: &Path) -> Result<()> {
    const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
    const BLKROSET: libc::Ioctl = 0x125D;
    let file = fs::File::open(device).with_context(|| device.display().to_string())?;
    // SAFETY: the ioctl takes no pointer; the descriptor lives through the call.
    let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), LOOP_CLR_FD, 0) };
    if result == 0 {
        // A node's read-only flag would outlive the detaching, which ends with the last descriptor.
        let writable: libc::c_int = 0;
        // SAFETY: the kernel reads one int.
        let result =
            unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), BLKROSET, &raw const writable) };
        if result != 0 {
            let error = io::Error::last_os_error();
            return Err(Failure::new(format!("cannot make {} writable: {error}", device.display())));
        }
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) {
        return Ok(());
    }
    Err(Failure::new(format!("cannot free {}: {error}", device.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines_parse() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402/x\\134y rw,noatime master:1 - fuse.shardfs shardfs\\040one rw,user_id=1000,group_id=0";
        let entry = parse_mount(line).unwrap();
        assert_eq!(entry.mount_point, Path::new("/mnt 2/x\\y"));
        assert_eq!((entry.fs_type.as_str(), entry.source.as_str()), ("fuse.shardfs", "shardfs one"));
        assert_eq!(entry.owner, Some(1000));
        assert_eq!(parse_mount(b""), None);
    }

    fn entry(owner: Option<u32>) -> MountEntry {
        let (mount_point, fs_type) = (PathBuf::from("/mnt"), FUSE_TYPE.to_owned());
        MountEntry { mount_point, fs_type, source: "shardfs".to_owned(), owner }
    }

    #[test]
    fn the_mount_table_decides_whether_it_is_unmounted() {
        let mnt = Path::new("/mnt");
        let judged = |result, before, after| {
            judge(mnt, result, 1000, before, after).map_err(|e| e.into_failure(mnt).message().to_owned())
        };
        assert_eq!(judged(Ok(()), 1, Vec::new()), Ok(()));
        assert_eq!(judged(Ok(()), 2, vec![entry(None)]), Ok(()), "one layer is gone");
        assert!(judged(Ok(()), 1, vec![entry(None)]).unwrap_err().contains("still mounted"));
        let not_mounted = || Err(UnmountError::NotMounted);
        assert_eq!(judged(not_mounted(), 0, Vec::new()).unwrap_err(), "nothing is mounted on /mnt");
        for (owner, words) in [(0, "mounted by root"), (7, "mounted by the user 7")] {
            let said = judged(not_mounted(), 1, vec![entry(Some(owner))]).unwrap_err();
            assert_eq!(said, format!("cannot unmount /mnt: permission denied: {words}"));
            let other = Err(UnmountError::Other(Failure::new("fusermount3: no mtab")));
            assert_eq!(judged(other, 1, vec![entry(Some(owner))]).unwrap_err(), said);
        }
        let own = Err(UnmountError::Other(Failure::new("fusermount3: no mtab")));
        assert_eq!(judged(own, 1, vec![entry(Some(1000))]).unwrap_err(), "fusermount3: no mtab");
    }

    #[test]
    fn files_in_the_place_of_folders_are_named() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        make_folder(&temp.path().join("a/b")).unwrap();
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            let failure = make_folder(&path).unwrap_err();
            assert_eq!(failure.message(), format!("{} is a file; a folder is needed", file.display()));
        }
    }

    #[test]
    fn proc_is_mounted() {
        assert!(mount_at(Path::new("/proc")).unwrap().is_some());
        assert!(mount_at(Path::new("/nonexistent")).unwrap().is_none());
    }

    #[test]
    fn mount_points_are_normalised() {
        let temp = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(temp.path()).unwrap();
        fs::create_dir(base.join("real")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        assert_eq!(mount_point_path(&base.join("link/../link")).unwrap(), base.join("real"));
        assert_eq!(mount_point_path(&base.join("absent")).unwrap(), base.join("absent"));
        assert!(mount_point_path(&base.join("no/such")).is_err());
    }

    #[test]
    fn holders_are_found() {
        let temp = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(temp.path()).unwrap();
        let _file = fs::File::create(path.join("open")).unwrap();
        let me = std::process::id();
        let found = holders(&path);
        assert!(
            found.iter().any(|h| h.pid == me && h.what == path.join("open").display().to_string()),
            "{found:?}"
        );
    }
}
