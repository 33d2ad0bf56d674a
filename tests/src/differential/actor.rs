//! Who acts: a thread with credentials, a umask and descriptors of its own, twice: on the mount and on the local filesystem.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::fs::{
    self, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Timespec,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::op::{Op, SLOTS};
use super::view::{Seen, hash};

/// A user with a umask.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    uid: u32,
    umask: u32,
}

/// Two of root, with umasks that differ, and two others.
pub const CAST: [Who; 4] = [
    Who { uid: 0, umask: 0o022 },
    Who { uid: 0, umask: 0o077 },
    Who { uid: 1, umask: 0o002 },
    Who { uid: 65_534, umask: 0o000 },
];

/// What a program sees of an operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// An errno.
    Failed(i32),
    /// Nothing to tell.
    Done,
    /// How much, or where.
    Count(u64),
    /// Bytes: how many, and their hash.
    Bytes(usize, u64),
    /// Attributes.
    Stat(Seen),
    /// Names in order, with what kind of file each is.
    Names(Vec<(Vec<u8>, String)>),
    /// A lock in the way: kind, start, length.
    Lock(i32, i64, i64),
    /// The actor has no such descriptor.
    NoSlot,
}

impl Outcome {
    /// Whether these are attributes of a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self, Outcome::Stat(seen) if seen.mode & libc::S_IFMT == libc::S_IFDIR)
    }

    /// Whether these are attributes of a directory without a name.
    pub fn is_removed_directory(&self) -> bool {
        matches!(self, Outcome::Stat(seen) if seen.mode & libc::S_IFMT == libc::S_IFDIR && seen.links == 0)
    }
}

type Seat = (mpsc::Sender<Op>, mpsc::Receiver<(Outcome, Outcome)>);

/// See the module.
#[derive(Debug)]
pub struct Actor {
    seat: Option<Seat>,
    thread: Option<JoinHandle<()>>,
}

impl Actor {
    /// Starts the thread.
    pub fn start(who: Who, mount: &Path, local: &Path) -> Actor {
        let (to, ops) = mpsc::channel::<Op>();
        let (outcomes, from) = mpsc::channel();
        let roots = [mount.to_owned(), local.to_owned()];
        let thread = std::thread::spawn(move || {
            become_who(who);
            let [mut mount, mut local] = roots.map(Side::new);
            while let Ok(op) = ops.recv() {
                let pair = (mount.act(&op), local.act(&op));
                if outcomes.send(pair).is_err() {
                    break;
                }
            }
        });
        Actor { seat: Some((to, from)), thread: Some(thread) }
    }

    /// What it sees on the mount, and on the local filesystem.
    pub fn act(&self, op: &Op) -> (Outcome, Outcome) {
        let (to, from) = self.seat.as_ref().expect("there until it is dropped");
        to.send(op.clone()).expect("the actor lives");
        from.recv().expect("the actor lives")
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        drop(self.seat.take());
        // A panic of it was told already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// This thread has its own umask, descriptors (so it owns its locks) and credentials from now on.
fn become_who(who: Who) {
    // SAFETY: the thread has just begun and shares no descriptor that somebody counts on being closed elsewhere.
    unsafe {
        rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS | rustix::thread::UnshareFlags::FILES)
    }
    .unwrap();
    rustix::process::umask(Mode::from_bits_truncate(who.umask));
    if who.uid != 0 {
        let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.uid));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    }
}

/// An actor on one of the filesystems.
struct Side {
    root: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

fn fill_of(bytes: usize, fill: u8) -> Vec<u8> {
    (0..bytes).map(|at| fill.wrapping_add((at / 7) as u8)).collect()
}

fn done<T>(result: Result<T, Errno>) -> Outcome {
    said(result, |_| Outcome::Done)
}

fn said<T>(result: Result<T, Errno>, how: impl FnOnce(T) -> Outcome) -> Outcome {
    match result {
        Ok(value) => how(value),
        Err(errno) => Outcome::Failed(errno.raw_os_error()),
    }
}

fn count(result: Result<usize, Errno>) -> Outcome {
    said(result, |n| Outcome::Count(n as u64))
}

fn read(result: Result<usize, Errno>, buffer: &[u8]) -> Outcome {
    said(result, |n| Outcome::Bytes(n, hash(&buffer[..n])))
}

impl Side {
    fn new(root: PathBuf) -> Side {
        Side { root, slots: Default::default() }
    }

    /// Below the root, with the slash at the end if it has one. Nothing leads out of the root.
    fn at(&self, path: &Path) -> PathBuf {
        let mut depth = 0;
        let mut safe = PathBuf::new();
        for part in path.components() {
            match part {
                std::path::Component::ParentDir if depth == 0 => {}
                std::path::Component::ParentDir => {
                    depth -= 1;
                    safe.push("..");
                }
                std::path::Component::CurDir => safe.push("."),
                part => {
                    depth += 1;
                    safe.push(part);
                }
            }
        }
        if path.as_os_str().as_bytes().ends_with(b"/") {
            safe.push("");
        }
        let mut full = self.root.as_os_str().to_owned();
        full.push("/");
        full.push(safe);
        full.into()
    }

    fn act(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Open { path, flags, mode, slot } => {
                self.slots[*slot] = None;
                let flags = OFlags::from_bits_retain(*flags as u32) | OFlags::CLOEXEC;
                let file = fs::open(self.at(path), flags, Mode::from_bits_truncate(mode & 0o7777));
                said(file, |file| {
                    self.slots[*slot] = Some(file);
                    Outcome::Done
                })
            }
            Op::Close { slot } => match self.slots[*slot].take() {
                Some(_) => Outcome::Done,
                None => Outcome::NoSlot,
            },
            Op::CopyRange { from, from_offset, to, to_offset, bytes } => {
                let (Some(source), Some(target)) = (&self.slots[*from], &self.slots[*to]) else {
                    return Outcome::NoSlot;
                };
                let (mut from, mut to) = (*from_offset, *to_offset);
                let mut copied = 0;
                // How much one call copies is the filesystem's choice.
                while copied < *bytes {
                    match fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), bytes - copied)
                    {
                        Ok(0) => break,
                        Ok(n) => copied += n,
                        Err(error) => return Outcome::Failed(error.raw_os_error()),
                    }
                }
                Outcome::Count(copied as u64)
            }
            Op::Read { slot, .. }
            | Op::Write { slot, .. }
            | Op::ReadAt { slot, .. }
            | Op::WriteAt { slot, .. }
            | Op::Seek { slot, .. }
            | Op::SetSize { slot, .. }
            | Op::Allocate { slot, .. }
            | Op::Sync { slot, .. }
            | Op::WriteMapped { slot, .. }
            | Op::Lock { slot, .. }
            | Op::GetLock { slot, .. }
            | Op::StatSlot { slot }
            | Op::SetModeOfSlot { slot, .. } => match &self.slots[*slot] {
                Some(file) => on_file(op, file),
                None => Outcome::NoSlot,
            },
            _ => self.on_path(op),
        }
    }

    fn on_path(&self, op: &Op) -> Outcome {
        match op {
            Op::Truncate { path, bytes } => {
                let path = CString::new(self.at(path).into_os_string().into_encoded_bytes()).unwrap();
                // SAFETY: the path ends with a NUL.
                let result = unsafe { libc::truncate(path.as_ptr(), *bytes as i64) };
                of_libc(i64::from(result), |_| Outcome::Done)
            }
            Op::Stat { path, follow } => {
                let path = self.at(path);
                let stat = if *follow { fs::stat(path) } else { fs::lstat(path) };
                said(stat, |stat| Outcome::Stat(Seen::of(&stat)))
            }
            Op::MakeDir { path, mode } => done(fs::mkdir(self.at(path), Mode::from_bits_truncate(*mode))),
            Op::RemoveDir { path } => done(fs::rmdir(self.at(path))),
            Op::Unlink { path } => done(fs::unlink(self.at(path))),
            Op::Rename { from, to, flags } => {
                let flags = RenameFlags::from_bits_retain(*flags);
                done(fs::renameat_with(CWD, self.at(from), CWD, self.at(to), flags))
            }
            Op::Link { from, to } => done(fs::link(self.at(from), self.at(to))),
            Op::Symlink { target, path } => done(fs::symlink(target, self.at(path))),
            Op::ReadLink { path } => said(fs::readlink(self.at(path), Vec::new()), |target| {
                Outcome::Bytes(target.as_bytes().len(), hash(target.as_bytes()))
            }),
            Op::MakeNode { path, mode } => {
                let device = if mode & libc::S_IFMT == libc::S_IFCHR { fs::makedev(1, 3) } else { 0 };
                let (kind, mode) = (FileType::from_raw_mode(*mode), Mode::from_bits_truncate(mode & 0o7777));
                done(fs::mknodat(CWD, self.at(path), kind, mode, device))
            }
            Op::SetMode { path, mode } => done(fs::chmod(self.at(path), Mode::from_bits_truncate(*mode))),
            Op::SetOwner { path, uid, gid, follow } => {
                let flags = if *follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
                done(fs::chownat(CWD, self.at(path), uid.map(Uid::from_raw), gid.map(Gid::from_raw), flags))
            }
            Op::SetTimes { path, access, modification } => {
                let of = |time: &Option<(i64, i64)>| match *time {
                    None => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
                    Some((tv_sec, tv_nsec)) => Timespec { tv_sec, tv_nsec },
                };
                let times = fs::Timestamps { last_access: of(access), last_modification: of(modification) };
                done(fs::utimensat(CWD, self.at(path), &times, AtFlags::SYMLINK_NOFOLLOW))
            }
            Op::Access { path, mode } => {
                let mode = fs::Access::from_bits_retain(*mode as u32);
                done(fs::accessat(CWD, self.at(path), mode, AtFlags::EACCESS))
            }
            Op::SetXattr { path, name, bytes, fill, flags } => {
                let flags = fs::XattrFlags::from_bits_retain(*flags as u32);
                done(fs::lsetxattr(self.at(path), *name, &fill_of(*bytes, *fill), flags))
            }
            Op::GetXattr { path, name } => {
                let mut buffer = vec![0; 65_536];
                let got = fs::lgetxattr(self.at(path), *name, &mut buffer[..]);
                read(got, &buffer)
            }
            Op::ListXattrs { path } => {
                let mut buffer = vec![0; 65_536];
                said(fs::llistxattr(self.at(path), &mut buffer[..]), |length| {
                    let names = buffer[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
                    let mut names: Vec<_> = names.map(|name| (name.to_vec(), String::new())).collect();
                    names.sort();
                    Outcome::Names(names)
                })
            }
            Op::RemoveXattr { path, name } => done(fs::lremovexattr(self.at(path), *name)),
            Op::List { path } => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let listed =
                    fs::open(self.at(path), flags, Mode::empty()).and_then(fs::Dir::new).and_then(|dir| {
                        let names = dir.map(|entry| {
                            entry.map(|e| (e.file_name().to_bytes().to_vec(), format!("{:?}", e.file_type())))
                        });
                        let mut names = names.collect::<Result<Vec<_>, Errno>>()?;
                        names.sort();
                        Ok(names)
                    });
                said(listed, Outcome::Names)
            }
            _ => unreachable!("{op:?} is of a descriptor"),
        }
    }
}

fn on_file(op: &Op, file: &OwnedFd) -> Outcome {
    match op {
        Op::Read { bytes, .. } => {
            let mut buffer = vec![0; *bytes];
            let got = rustix::io::read(file, &mut buffer[..]);
            read(got, &buffer)
        }
        Op::Write { bytes, fill, .. } => count(rustix::io::write(file, &fill_of(*bytes, *fill))),
        Op::ReadAt { offset, bytes, .. } => {
            let mut buffer = vec![0; *bytes];
            let got = rustix::io::pread(file, &mut buffer[..], *offset);
            read(got, &buffer)
        }
        Op::WriteAt { offset, bytes, fill, .. } => {
            count(rustix::io::pwrite(file, &fill_of(*bytes, *fill), *offset))
        }
        Op::Seek { whence, offset, .. } => {
            let at = match *whence {
                libc::SEEK_CUR => SeekFrom::Current(*offset),
                libc::SEEK_END => SeekFrom::End(*offset),
                _ => match u64::try_from(*offset) {
                    Ok(offset) => SeekFrom::Start(offset),
                    Err(_) => SeekFrom::Current(*offset),
                },
            };
            said(fs::seek(file, at), Outcome::Count)
        }
        Op::SetSize { bytes, .. } => done(fs::ftruncate(file, *bytes)),
        Op::Allocate { mode, offset, bytes, .. } => {
            done(fs::fallocate(file, FallocateFlags::from_bits_retain(*mode as u32), *offset, *bytes))
        }
        Op::Sync { data, .. } => done(if *data { fs::fdatasync(file) } else { fs::fsync(file) }),
        Op::WriteMapped { offset, bytes, fill, .. } => write_mapped(file, *offset, &fill_of(*bytes, *fill)),
        Op::Lock { kind, start, bytes, .. } => {
            let lock = lock_of(*kind, *start, *bytes);
            // SAFETY: the descriptor is open, and the lock is read within the call.
            let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) };
            of_libc(i64::from(result), |_| Outcome::Done)
        }
        Op::GetLock { kind, start, bytes, .. } => {
            let mut lock = lock_of(*kind, *start, *bytes);
            // SAFETY: the descriptor is open, and the lock is written within the call.
            let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
            of_libc(i64::from(result), |_| match i32::from(lock.l_type) {
                libc::F_UNLCK => Outcome::Lock(libc::F_UNLCK, 0, 0),
                kind => Outcome::Lock(kind, lock.l_start, lock.l_len),
            })
        }
        Op::StatSlot { .. } => said(fs::fstat(file), |stat| Outcome::Stat(Seen::of(&stat))),
        Op::SetModeOfSlot { mode, .. } => done(fs::fchmod(file, Mode::from_bits_truncate(*mode))),
        _ => unreachable!("{op:?} is of a path"),
    }
}

fn of_libc(result: i64, how: impl FnOnce(i64) -> Outcome) -> Outcome {
    if result < 0 {
        return Outcome::Failed(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    how(result)
}

fn lock_of(kind: i32, start: u64, bytes: u64) -> libc::flock {
    // SAFETY: all of its fields are numbers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start as i64;
    lock.l_len = bytes as i64;
    lock
}

/// Writes what fits into the file as it is, by a mapping, and syncs it.
fn write_mapped(file: &OwnedFd, offset: u64, bytes: &[u8]) -> Outcome {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
    let stat = match fs::fstat(file) {
        Ok(stat) => stat,
        Err(error) => return Outcome::Failed(error.raw_os_error()),
    };
    let first = offset / 4096 * 4096;
    let end = (stat.st_size as u64).min(offset + bytes.len() as u64);
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG || end <= offset {
        return Outcome::Count(0);
    }
    let length = (end - first) as usize;
    // SAFETY: a new mapping at an address that the kernel chooses; it lies within the file, which nobody else changes meanwhile, since
    // operations run one at a time; the copy stays within it, and it is unmapped once.
    unsafe {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let at =
            match rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, first) {
                Ok(at) => at,
                Err(error) => return Outcome::Failed(error.raw_os_error()),
            };
        let count = (end - offset) as usize;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast::<u8>().add((offset - first) as usize), count);
        let synced = rustix::mm::msync(at, length, MsyncFlags::SYNC);
        rustix::mm::munmap(at, length).unwrap();
        said(synced, |()| Outcome::Count(count as u64))
    }
}
