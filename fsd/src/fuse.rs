//! The kernel's requests, decoded; each becomes one call of `fs`, whose outcome is the reply.
//!
//! - The threads that read /dev/fuse never wait for a node: what needs one runs on the runtime. What needs
//!   none is answered at once.
//! - Requests in flight are bounded (`in_flight`).
//! - A reply that is dropped is answered with EIO by fuser: a task that panics fails its request only.
//!
//! Facts of fuser 0.18 that are dealt with here: it refuses a whole set of capabilities for one that the
//! kernel lacks, so each is asked for alone; it decodes times before 1970 as if their nanoseconds counted
//! backwards (`convert::timestamp_in`); of the kernel's word that set-id bits must go it passes on that for
//! writes only (`fs::attrs` decides about the rest, and so FUSE_SETXATTR_EXT is not asked for).

mod answer;
mod convert;
mod in_flight;
mod locking;
mod patience;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig,
    LockOwner, Notifier, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use futures::future::{join, join_all};
use shardfs_proto::types::limits::NAME_BYTES_MAX;
use shardfs_proto::types::op::{SeekFor, SetAttr};
use tokio::runtime::Handle as Runtime;
use tokio::sync::Semaphore;

use answer::{GENERATION, asked, reply_bytes, reply_entry};
use convert::{
    attr_of_name, attr_out, bytes_of, kind_in, kind_out, new_mode, open_flags, open_mode, set_time,
};

use crate::failure::{Outcome, Posix};
use crate::fs::Fs;
use crate::fs::attrs::XattrMode;
use crate::fs::locks::LockCall;
use crate::fs::names::NewNode;
use crate::fs::types::{BLOCK_BYTES, Caller, DirItem, Entry, FileStat, Opened, RenameMode, Space, WriteMode};
use crate::metrics::{Metrics, Op};

/// The kernel's own bound of a request's content, without `fs.fuse.max_pages_limit` raised.
const MAX_WRITE_BYTES: u32 = 1 << 20;
/// Requests that the kernel has in flight for read-ahead and the like.
const MAX_BACKGROUND: u16 = 64;

/// What to negotiate with the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiation {
    /// Read directories together with attributes. Worth it only when the kernel may keep them.
    pub readdirplus: bool,
    /// Get POSIX locks, to have them kept by the cluster. Not those of flock(2), which this transport cannot tell from them.
    pub posix_locks: bool,
}

/// The transport's side of a mount.
pub struct Fuse {
    fs: Arc<Fs>,
    runtime: Runtime,
    metrics: Arc<Metrics>,
    in_flight: Arc<Semaphore>,
    lock_places: Arc<Semaphore>,
    negotiation: Negotiation,
}

impl Fuse {
    /// Answers the kernel's requests with `fs` on `runtime`.
    pub fn new(fs: Arc<Fs>, runtime: Runtime, metrics: Arc<Metrics>, negotiation: Negotiation) -> Fuse {
        let in_flight = in_flight::places();
        let lock_places = locking::places();
        Fuse { fs, runtime, metrics, in_flight, lock_places, negotiation }
    }

    /// Takes what the kernel is told by, while that is there. Telling it to drop pages is done in a thread of its own: the kernel
    /// first waits for requests about these pages, which this process has to answer.
    pub fn notifying(&self) -> impl FnOnce(Weak<Notifier>) + use<> {
        let (fs, runtime) = (self.fs.clone(), self.runtime.clone());
        move |notifier| {
            fs.drop_pages_by(Box::new(move |ino| {
                let Some(notifier) = notifier.upgrade() else { return };
                runtime.spawn_blocking(move || {
                    if let Err(error) = notifier.inval_inode(INodeNo(ino.get()), 0, 0) {
                        tracing::warn!(%error, ino = ino.get(), "the kernel does not drop a file's pages");
                    }
                });
            }));
        }
    }

    /// Notes that a thread asks for something other than what it looked up last.
    fn caller(&self, request: &Request) -> Caller {
        let caller = Caller { uid: request.uid(), gid: request.gid(), thread: request.pid() };
        self.fs.asks_anew(caller.thread);
        caller
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_BIG_WRITES,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Without it the kernel asks for `security.capability` before every write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            // The kernel checks access control lists, and keeps them for as long as attributes.
            InitFlags::FUSE_POSIX_ACL,
            // A directory's default list takes the umask's place, which only the shard can tell.
            InitFlags::FUSE_DONT_MASK,
            // Files that are appended to pass the page cache by, and may be mapped nevertheless.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        if self.negotiation.readdirplus {
            wanted.extend([InitFlags::FUSE_DO_READDIRPLUS, InitFlags::FUSE_READDIRPLUS_AUTO]);
        }
        if self.negotiation.posix_locks {
            wanted.push(InitFlags::FUSE_POSIX_LOCKS);
        }
        // Not asked for: FUSE_FLOCK_LOCKS, so that those of flock(2) hold within this mount.
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::info!(?flag, "this kernel lacks a capability");
            }
        }
        if config.set_max_write(MAX_WRITE_BYTES).is_err()
            || config.set_max_background(MAX_BACKGROUND).is_err()
        {
            tracing::info!("this kernel takes smaller requests");
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (caller, name) = (self.caller(request), bytes_of(name));
        let work = |fs: Arc<Fs>| async move { fs.lookup(caller, parent.0, name).await };
        self.run(asked(Op::Lookup, parent, caller), 0, reply, work, reply_entry);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        // Not `self.caller`: this may be the question that the lookup's attributes are kept for.
        let caller = Caller { uid: request.uid(), gid: request.gid(), thread: request.pid() };
        let asked = asked(Op::GetAttr, ino, caller);
        let ok = |reply: ReplyAttr, (stat, ttl): (FileStat, Duration)| reply.attr(&ttl, &attr_out(&stat));
        if fh.is_none()
            && let Some(stat) = self.fs.looked_up(caller, ino.0)
        {
            return self.at_once(asked, reply, Ok((stat, Duration::ZERO)), ok);
        }
        let work = move |fs: Arc<Fs>| async move { fs.get_attr(caller, ino.0).await };
        self.run(asked, 0, reply, work, ok);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let caller = self.caller(request);
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            kill_set_id: false,
        };
        let handle = fh.map(|fh| fh.0);
        let work = move |fs: Arc<Fs>| async move { fs.set_attr(caller, ino.0, handle, set).await };
        self.run(asked(Op::SetAttr, ino, caller), 0, reply, work, |reply, (stat, ttl)| {
            reply.attr(&ttl, &attr_out(&stat));
        });
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let caller = self.caller(request);
        let work = |fs: Arc<Fs>| async move { fs.read_link(ino.0).await };
        self.run(asked(Op::ReadLink, ino, caller), 0, reply, work, |reply, target: Bytes| {
            reply.data(&target)
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (caller, name) = (self.caller(request), bytes_of(name));
        let asked = asked(Op::MakeNode, parent, caller);
        let Some(kind) = kind_in(mode) else {
            return self.at_once(asked, reply, Err(Posix::Invalid.into()), reply_entry);
        };
        let new = NewNode { kind, mode: new_mode(mode, umask), rdev };
        let work = move |fs: Arc<Fs>| async move { fs.make_node(caller, parent.0, name, new).await };
        self.run(asked, 0, reply, work, reply_entry);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (caller, name) = (self.caller(request), bytes_of(name));
        let mode = new_mode(mode, umask);
        let work = move |fs: Arc<Fs>| async move { fs.make_directory(caller, parent.0, name, mode).await };
        self.run(asked(Op::MakeDirectory, parent, caller), 0, reply, work, reply_entry);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request);
        let name = bytes_of(name);
        let work = |fs: Arc<Fs>| async move { fs.unlink(parent.0, name).await };
        self.run(asked(Op::Unlink, parent, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request);
        let name = bytes_of(name);
        let work = |fs: Arc<Fs>| async move { fs.remove_directory(parent.0, name).await };
        self.run(asked(Op::RemoveDirectory, parent, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (caller, name, target) =
            (self.caller(request), bytes_of(link_name), bytes_of(target.as_os_str()));
        let work = move |fs: Arc<Fs>| async move { fs.make_symlink(caller, parent.0, name, target).await };
        self.run(asked(Op::Symlink, parent, caller), 0, reply, work, reply_entry);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        let asked = asked(Op::Rename, parent, caller);
        let known = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
        if !known.contains(flags) {
            return self.at_once(asked, reply, Err(Posix::Invalid.into()), |reply, ()| reply.ok());
        }
        let mode = RenameMode {
            no_replace: flags.contains(RenameFlags::RENAME_NOREPLACE),
            exchange: flags.contains(RenameFlags::RENAME_EXCHANGE),
        };
        let (name, newname) = (bytes_of(name), bytes_of(newname));
        let work =
            move |fs: Arc<Fs>| async move { fs.rename(parent.0, name, newparent.0, newname, mode).await };
        self.run(asked, 0, reply, work, |reply, ()| reply.ok());
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let caller = self.caller(request);
        let newname = bytes_of(newname);
        let work = |fs: Arc<Fs>| async move { fs.link(ino.0, newparent.0, newname).await };
        self.run(asked(Op::Link, ino, caller), 0, reply, work, reply_entry);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = self.caller(request);
        let mode = open_mode(flags.0);
        let work = move |fs: Arc<Fs>| async move { fs.open(caller, ino.0, mode).await };
        let metrics = self.metrics.clone();
        self.run(asked(Op::Open, ino, caller), 0, reply, work, move |reply, opened: Opened| {
            metrics.open_handles.inc();
            reply.opened(FileHandle(opened.handle), open_flags(&opened));
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, name) = (self.caller(request), bytes_of(name));
        let (mode, open) = (new_mode(mode, umask), open_mode(flags));
        let work = move |fs: Arc<Fs>| async move { fs.create(caller, parent.0, name, mode, open).await };
        let metrics = self.metrics.clone();
        self.run(
            asked(Op::Create, parent, caller),
            0,
            reply,
            work,
            move |reply, (entry, opened): (Entry, Opened)| {
                metrics.open_handles.inc();
                // One time to live for both: the shorter is right.
                let ttl = entry.ttl.attr.min(entry.ttl.entry);
                let handle = FileHandle(opened.handle);
                reply.created(&ttl, &attr_out(&entry.stat), GENERATION, handle, open_flags(&opened));
            },
        );
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>| async move { fs.read(ino.0, fh.0, offset, size).await };
        let metrics = self.metrics.clone();
        self.run(asked(Op::Read, ino, caller), size as usize, reply, work, move |reply, data: Bytes| {
            metrics.read_bytes.inc_by(data.len() as u64);
            reply.data(&data);
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let caller = self.caller(request);
        let mode = WriteMode {
            append: flags.0 & libc::O_APPEND != 0,
            // O_SYNC includes the bit of O_DSYNC.
            sync: flags.0 & libc::O_DSYNC != 0,
            kill_set_id: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            from_page_cache: write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
        };
        let length = data.len();
        let data = Bytes::copy_from_slice(data);
        let work = move |fs: Arc<Fs>| async move { fs.write(ino.0, fh.0, offset, data, mode).await };
        let metrics = self.metrics.clone();
        self.run(asked(Op::Write, ino, caller), length, reply, work, move |reply, written: u32| {
            metrics.written_bytes.inc_by(u64::from(written));
            reply.written(written);
        });
    }

    fn flush(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        let asked = asked(Op::Flush, ino, caller);
        let told = self.fs.flush(fh.0);
        match self.fs.closed_by(ino.0, fh.0, lock_owner.0) {
            None => self.at_once(asked, reply, told, |reply, ()| reply.ok()),
            Some(held) => {
                let work = move |fs: Arc<Fs>| async move {
                    let dropped = fs.drop_locks(held).await;
                    told.and(dropped)
                };
                self.run(asked, 0, reply, work, |reply, ()| reply.ok());
            }
        }
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        self.metrics.open_handles.dec();
        let asked = asked(Op::Release, ino, caller);
        let locked = self.fs.locked_through(fh.0);
        match self.fs.release(fh.0) {
            None if locked.is_empty() => self.at_once(asked, reply, Ok(()), |reply, ()| reply.ok()),
            held => {
                let work = move |fs: Arc<Fs>| async move {
                    // The caller has closed it long since: what fails is logged, and tried again.
                    let dropped = join_all(locked.into_iter().map(|locked| fs.drop_locks(locked)));
                    let released = async {
                        if let Some(held) = held {
                            fs.release_waiting(held).await;
                        }
                    };
                    join(dropped, released).await;
                    Ok(())
                };
                self.run(asked, 0, reply, work, |reply, ()| reply.ok());
            }
        }
    }

    fn fsync(&self, request: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>| async move { fs.fsync(ino.0, fh.0).await };
        self.run(asked(Op::Fsync, ino, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let caller = self.caller(request);
        let opened = self.fs.open_directory(ino.0);
        let metrics = &self.metrics;
        self.at_once(asked(Op::OpenDirectory, ino, caller), reply, opened, |reply, handle| {
            metrics.open_handles.inc();
            reply.opened(FileHandle(handle), FopenFlags::empty());
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>, mut reply: ReplyDirectory| async move {
            let mut full = |item: &DirItem| {
                let name = OsStr::from_bytes(&item.name);
                reply.add(INodeNo(item.ino.get()), item.offset, kind_out(item.kind), name)
            };
            let outcome = fs.read_directory(fh.0, offset, false, &mut full).await;
            (reply, outcome)
        };
        self.run_filling(asked(Op::ReadDirectory, ino, caller), reply, work, ReplyDirectory::ok);
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>, mut reply: ReplyDirectoryPlus| async move {
            let mut full = |item: &DirItem| {
                let (attr, ttl) = match &item.entry {
                    // One time to live for both: the shorter is right.
                    Some(entry) => (attr_out(&entry.stat), entry.ttl.attr.min(entry.ttl.entry)),
                    None => (attr_of_name(item), Duration::ZERO),
                };
                let name = OsStr::from_bytes(&item.name);
                reply.add(attr.ino, item.offset, name, &ttl, &attr, GENERATION)
            };
            let outcome = fs.read_directory(fh.0, offset, true, &mut full).await;
            (reply, outcome)
        };
        self.run_filling(asked(Op::ReadDirectoryPlus, ino, caller), reply, work, ReplyDirectoryPlus::ok);
    }

    fn releasedir(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        self.metrics.open_handles.dec();
        self.fs.release_directory(fh.0);
        self.at_once(asked(Op::ReleaseDirectory, ino, caller), reply, Ok(()), |reply, ()| reply.ok());
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>| async move { fs.fsync(ino.0, fh.0).await };
        self.run(asked(Op::FsyncDirectory, ino, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let caller = self.caller(request);
        let work = |fs: Arc<Fs>| async move { fs.space(ino.0).await };
        self.run(asked(Op::StatFs, ino, caller), 0, reply, work, |reply, space: Space| {
            reply.statfs(
                space.blocks,
                space.free_blocks,
                space.available_blocks,
                space.inodes,
                space.free_inodes,
                BLOCK_BYTES,
                NAME_BYTES_MAX as u32,
                BLOCK_BYTES,
            );
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        let mode = XattrMode {
            create_only: flags & libc::XATTR_CREATE != 0,
            replace_only: flags & libc::XATTR_REPLACE != 0,
        };
        let (name, value) = (bytes_of(name), Bytes::copy_from_slice(value));
        let work = move |fs: Arc<Fs>| async move { fs.set_xattr(caller, ino.0, name, value, mode).await };
        self.run(asked(Op::SetXattr, ino, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        // Not `self.caller`, as in getattr.
        let caller = Caller { uid: request.uid(), gid: request.gid(), thread: request.pid() };
        let asked = asked(Op::GetXattr, ino, caller);
        let name = bytes_of(name);
        let ok = move |reply: ReplyXattr, value: Bytes| reply_bytes(reply, size, &value);
        if self.fs.has_no_acl(caller, ino.0, &name) {
            return self.at_once(asked, reply, Err(Posix::NoAttribute.into()), ok);
        }
        self.fs.asks_anew(caller.thread);
        let work = |fs: Arc<Fs>| async move { fs.get_xattr(ino.0, name).await };
        self.run(asked, 0, reply, work, ok);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>| async move { fs.list_xattrs(caller, ino.0).await };
        self.run(asked(Op::ListXattr, ino, caller), 0, reply, work, move |reply, names: Bytes| {
            reply_bytes(reply, size, &names);
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = self.caller(request);
        let name = bytes_of(name);
        let work = |fs: Arc<Fs>| async move { fs.remove_xattr(ino.0, name).await };
        self.run(asked(Op::RemoveXattr, ino, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let caller = self.caller(request);
        let work = move |fs: Arc<Fs>| async move {
            fs.allocate(caller, (ino.0, fh.0), (offset, length), mode).await
        };
        self.run(asked(Op::Allocate, ino, caller), 0, reply, work, |reply, ()| reply.ok());
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let caller = self.caller(request);
        let asked = asked(Op::Seek, ino, caller);
        // Not past what a file can have: 16 TiB.
        let ok = |reply: ReplyLseek, offset: u64| reply.offset(offset.cast_signed());
        let what = match whence {
            libc::SEEK_DATA => SeekFor::Data,
            libc::SEEK_HOLE => SeekFor::Hole,
            _ => return self.at_once(asked, reply, Err(Posix::Invalid.into()), ok),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return self.at_once(asked, reply, Err(Posix::NotInFile.into()), ok);
        };
        let work = move |fs: Arc<Fs>| async move { fs.seek(ino.0, fh.0, offset, what).await };
        self.run(asked, 0, reply, work, ok);
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags, // there are none yet
        reply: ReplyWrite,
    ) {
        let caller = self.caller(request);
        let (from, to) = ((ino_in.0, fh_in.0, offset_in), (ino_out.0, fh_out.0, offset_out));
        let work = move |fs: Arc<Fs>| async move { fs.copy_range(caller, from, to, len).await };
        self.run(asked(Op::CopyRange, ino_out, caller), 0, reply, work, |reply, copied: u32| {
            reply.written(copied);
        });
    }

    fn getlk(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let asked = asked(Op::GetLock, ino, self.caller(request));
        match lock_call((ino, fh, lock_owner), (start, end), typ, pid) {
            Err(failure) => self.at_once(asked, reply, Err(failure), locking::reply_lock),
            Ok(call) => {
                let work = move |fs: Arc<Fs>| async move { fs.get_lock(call).await };
                self.run(asked, 0, reply, work, locking::reply_lock);
            }
        }
    }

    fn setlk(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let asked = asked(Op::SetLock, ino, self.caller(request));
        match lock_call((ino, fh, lock_owner), (start, end), typ, pid) {
            Err(failure) => self.at_once(asked, reply, Err(failure), |reply, ()| reply.ok()),
            Ok(call) => self.run_set_lock(asked, call, sleep, reply),
        }
    }

    // Left as they are in fuser, which answers ENOSYS, whereupon the kernel does without and asks no more:
    // poll, bmap, access (the kernel decides, by default_permissions).
}

fn lock_call(
    (ino, fh, owner): (INodeNo, FileHandle, LockOwner),
    (start, end): (u64, u64),
    typ: i32,
    pid: u32,
) -> Outcome<LockCall> {
    let (range, kind) = (locking::range_in(start, end)?, locking::kind_in(typ)?);
    Ok(LockCall { ino: ino.0, handle: fh.0, owner: owner.0, pid, range, kind })
}
