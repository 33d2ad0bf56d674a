//! What is seen of files and trees: all that a program may rely on, and nothing that a filesystem may choose.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What stat(2) says. Left out: inode and device numbers; the size of a directory and the blocks of a file, which are the filesystem's
/// own matter; the time of access, which reads move on ext4 alone; the other times, unless they were set (see [`Seen::modified`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// With the kind.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Names of a file; of a directory 2 and its subdirectories.
    pub links: u64,
    /// 0 of a directory.
    pub bytes: u64,
    /// The number of a device.
    pub device: u64,
    /// Set by a program, and not since: times of now differ between the sides.
    pub modified: Option<(i64, i64)>,
}

/// Times that were set are of the past or of the far future; this begins before the tests and ends after them.
const NOW: std::ops::Range<i64> = 1_600_000_000..2_147_483_648;

impl Seen {
    /// From what stat(2) said.
    pub fn of(stat: &rustix::fs::Stat) -> Seen {
        let directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let modified = (stat.st_mtime, stat.st_mtime_nsec as i64);
        Seen {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            links: stat.st_nlink,
            bytes: if directory { 0 } else { stat.st_size as u64 },
            device: stat.st_rdev,
            modified: (!NOW.contains(&modified.0)).then_some(modified),
        }
    }
}

/// A file in a tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    seen: Seen,
    /// Of the content or the link's target.
    hash: u64,
    /// Names and hashes.
    xattrs: BTreeMap<OsString, u64>,
    /// The first path of the same inode.
    same_as: Option<PathBuf>,
}

/// A short stand-in for bytes.
pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Everything below a root, as root sees it. Sparse files are read where they have data.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut entries = BTreeMap::new();
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let relative = path.strip_prefix(root).unwrap().to_owned();
        let metadata = path.symlink_metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            content_hash(&path, metadata.len())
        } else if kind.is_symlink() {
            hash(std::fs::read_link(&path).unwrap().as_os_str().as_bytes())
        } else {
            0
        };
        if kind.is_dir() {
            let mut names: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap()).collect();
            names.sort_by_key(std::fs::DirEntry::file_name);
            let doubled = names.windows(2).find(|pair| pair[0].file_name() == pair[1].file_name());
            assert!(
                doubled.is_none(),
                "{} is listed twice in {}",
                doubled.unwrap()[0].path().display(),
                path.display()
            );
            left.extend(names.iter().rev().map(std::fs::DirEntry::path));
        }
        assert!(
            kind.is_dir()
                || kind.is_file()
                || kind.is_symlink()
                || kind.is_fifo()
                || kind.is_socket()
                || kind.is_char_device()
        );
        let stat = rustix::fs::lstat(&path).unwrap();
        let same_as = (!kind.is_dir() && metadata.nlink() > 1)
            .then(|| first.entry(metadata.ino()).or_insert_with(|| relative.clone()).clone());
        entries
            .insert(relative, Entry { seen: Seen::of(&stat), hash: content, xattrs: xattrs(&path), same_as });
    }
    entries
}

fn content_hash(path: &Path, bytes: u64) -> u64 {
    use rustix::fs::SeekFrom;
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hasher = DefaultHasher::new();
    let mut at = 0;
    // Pages that hold nothing but zeros count as holes: where a hole ends is compared by Seek.
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap();
        let mut page = data / 4096 * 4096;
        let mut buffer = [0; 4096];
        while page < end {
            let got = rustix::io::pread(&file, &mut buffer, page).unwrap();
            if buffer[..got].iter().any(|byte| *byte != 0) {
                let used = buffer[..got].iter().rposition(|byte| *byte != 0).unwrap() + 1;
                (page, &buffer[..used]).hash(&mut hasher);
            }
            page += 4096;
        }
        at = end;
        if at >= bytes {
            break;
        }
    }
    hasher.finish()
}

fn xattrs(path: &Path) -> BTreeMap<OsString, u64> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 65_536];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (std::ffi::OsStr::from_bytes(name).to_owned(), hash(&value[..length]))
        })
        .collect()
}
