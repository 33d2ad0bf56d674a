//! The kernel's numbers as domain values, and back.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{FileAttr, FileType, FopenFlags, INodeNo, OpenAccMode, OpenFlags, TimeOrNow};
use shardfs_proto::types::op::SetTime;
use shardfs_proto::types::{FileKind, Timestamp};

use crate::fs::types::{BLOCK_BYTES, DirItem, FileStat, NewMode, OpenMode, Opened};

pub(super) fn bytes_of(name: &OsStr) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

pub(super) fn kind_out(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// What mknod can make.
pub(super) fn kind_in(mode: u32) -> Option<FileKind> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Some(FileKind::Regular),
        libc::S_IFIFO => Some(FileKind::Fifo),
        libc::S_IFSOCK => Some(FileKind::Socket),
        libc::S_IFCHR => Some(FileKind::CharDevice),
        libc::S_IFBLK => Some(FileKind::BlockDevice),
        _ => None,
    }
}

/// What mknod, mkdir and create ask for.
pub(super) fn new_mode(mode: u32, umask: u32) -> NewMode {
    NewMode { asked: mode & 0o7777, umask }
}

pub(super) fn timestamp_out(at: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(at.nanos()));
    let whole = match u64::try_from(at.seconds()) {
        Ok(seconds) => UNIX_EPOCH.checked_add(Duration::from_secs(seconds)),
        Err(_) => UNIX_EPOCH.checked_sub(Duration::from_secs(at.seconds().unsigned_abs())),
    };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time as the kernel meant it. For one before 1970, fuser 0.18 subtracts the nanoseconds together with
/// the seconds, although they count forward; so both are found in the distance to 1970 as they were sent.
pub(super) fn timestamp_in(at: SystemTime) -> Timestamp {
    let (seconds, nanos) = match at.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            (0i64.saturating_sub_unsigned(before.as_secs()), before.subsec_nanos())
        }
    };
    Timestamp::new(seconds, nanos).unwrap_or_default()
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(timestamp_in(at)),
    }
}

pub(super) fn attr_out(stat: &FileStat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.ino.get()),
        size: stat.size,
        blocks: stat.blocks,
        atime: timestamp_out(stat.atime),
        mtime: timestamp_out(stat.mtime),
        ctime: timestamp_out(stat.ctime),
        crtime: timestamp_out(stat.btime),
        kind: kind_out(stat.kind),
        // 12 bits.
        perm: (stat.mode & 0o7777) as u16,
        nlink: stat.nlink,
        uid: stat.uid,
        gid: stat.gid,
        rdev: stat.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub(super) fn open_mode(flags: i32) -> OpenMode {
    OpenMode {
        write: OpenFlags(flags).acc_mode() != OpenAccMode::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
        append: flags & libc::O_APPEND != 0,
    }
}

pub(super) fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct);
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    flags
}

/// Attributes for an entry without them. They are good for no time, so that only number and kind count.
pub(super) fn attr_of_name(item: &DirItem) -> FileAttr {
    FileAttr {
        ino: INodeNo(item.ino.get()),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: kind_out(item.kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

#[cfg(test)]
mod tests;
