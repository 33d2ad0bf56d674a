//! Content: opening, reading, writing, syncing.
//!
//! Opening registers the inode with the shard, so that it lives while it is open, whoever unlinks it.
//! A write is one operation of the shard, and has been applied when it is answered: what close(2) could
//! tell is told earlier. Only pages that were written through a mapping have nobody to tell; their
//! failure is kept for the next flush.

use std::sync::Arc;

use bytes::Bytes;
use shardfs_proto::types::limits::VALUE_BYTES_MAX;
use shardfs_proto::types::op::{AllocateMode, Operation, SeekFor, SetAttr};
use shardfs_proto::types::{Attr, GlobalInode, InodeNo, Reason, ShardId};

use super::types::{Caller, Node, OpenMode, Opened, WriteMode};
use super::{Fs, attr_of};
use crate::failure::{Failure, Outcome, Posix};
use crate::handles::{FileHandle, Handle};

impl Fs {
    /// Opens a file.
    pub async fn open(&self, caller: Caller, ino: u64, mode: OpenMode) -> Outcome<Opened> {
        let (shard, inode) = match self.node(ino)? {
            Node::Root | Node::Snapshots(_) => return Err(Posix::IsDirectory.into()),
            Node::Virtual(_) if mode.write || mode.truncate => return Err(Posix::ReadOnly.into()),
            Node::Virtual(node) => {
                let content = self.render(node).await?;
                let handle = self.handles.insert(Handle::Content(content))?;
                return Ok(Opened { handle, direct: true, keep_cache: false });
            }
            Node::InShard(shard, inode) => (shard, inode),
        };
        if (mode.write || mode.truncate) && self.shards.is_closed(shard) {
            return Err(Posix::ReadOnly.into());
        }
        let opened = self.client.open(shard, inode).await;
        let mut attr = opened.map_err(|error| Failure::from(error).stale_if_gone())?;
        if mode.truncate {
            let set = SetAttr { size: Some(0), kill_set_id: caller.uid != 0, ..SetAttr::default() };
            match self.mutate(shard, Operation::SetAttr { inode, set }, false).await.and_then(attr_of) {
                Ok(truncated) => attr = truncated,
                Err(failure) => {
                    self.releaser.release(shard, inode).await;
                    return Err(failure);
                }
            }
        }
        self.opened(shard, &attr, mode).await
    }

    /// A handle for an inode that was registered; gives the registration back if there is no room.
    ///
    /// What is opened for appending passes the page cache by: a write through the cache that begins within a
    /// page comes here in two requests, between which somebody else may append.
    pub(super) async fn opened(&self, shard: ShardId, attr: &Attr, mode: OpenMode) -> Outcome<Opened> {
        let (losses, lock_losses) = (self.client.losses_told(shard), self.client.lock_losses(shard));
        let file = FileHandle::new(shard, attr.inode, losses, lock_losses);
        match self.handles.insert(Handle::File(Arc::new(file))) {
            Ok(handle) => {
                let keep_cache = self.pages.keep(GlobalInode::new(shard, attr.inode), attr);
                Ok(Opened { handle, direct: mode.write && mode.append, keep_cache })
            }
            Err(failure) => {
                self.releaser.release(shard, attr.inode).await;
                Err(failure)
            }
        }
    }

    /// At most `length` bytes; fewer only at the end of the file.
    pub async fn read(&self, ino: u64, handle: u64, offset: u64, length: u32) -> Outcome<Bytes> {
        let (shard, inode) = match self.node(ino)? {
            Node::InShard(shard, inode) => (shard, inode),
            Node::Root | Node::Snapshots(_) => return Err(Posix::IsDirectory.into()),
            Node::Virtual(_) => {
                let Some(Handle::Content(content)) = self.handles.get(handle) else {
                    return Err(Posix::BadHandle.into());
                };
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
                let end = start.saturating_add(length as usize).min(content.len());
                return Ok(content.slice(start..end));
            }
        };
        self.check_locks(handle)?;
        let data = self.client.read(shard, inode, offset, length).await;
        data.map_err(|error| Failure::from(error).stale_if_gone())
    }

    /// Writes; answers how many bytes, which are fewer only if a later piece failed.
    pub async fn write(
        &self,
        ino: u64,
        handle: u64,
        offset: u64,
        data: Bytes,
        mode: WriteMode,
    ) -> Outcome<u32> {
        let (shard, inode) = self.in_shard(ino)?;
        let mut written = 0;
        while written < data.len() {
            let piece = data.slice(written..data.len().min(written + VALUE_BYTES_MAX));
            let length = piece.len();
            match self.write_piece((shard, inode, handle), offset + written as u64, piece, mode).await {
                Ok(()) => written += length,
                Err(failure) => {
                    if mode.from_page_cache
                        && let Some(file) = self.handles.file(handle)
                    {
                        file.keep_failure(&failure);
                    }
                    if written == 0 {
                        return Err(failure.stale_if_gone());
                    }
                    break;
                }
            }
        }
        // The kernel sends at most 1 MiB.
        Ok(written as u32)
    }

    async fn write_piece(
        &self,
        (shard, inode, handle): (ShardId, InodeNo, u64),
        offset: u64,
        data: Bytes,
        mode: WriteMode,
    ) -> Outcome<()> {
        let append = mode.append && !mode.from_page_cache;
        let operation = Operation::Write { inode, offset, data, append, kill_set_id: mode.kill_set_id };
        let done = self.mutate_through(Some(handle), shard, operation, mode.sync).await?;
        if append && done.offset != offset {
            // Somebody else appended: the kernel has put the bytes where they are not.
            self.pages.forget(GlobalInode::new(shard, inode));
        }
        Ok(())
    }

    /// A descriptor is closed: tells what could not be told before.
    pub fn flush(&self, handle: u64) -> Outcome<()> {
        match self.handles.file(handle).and_then(|file| file.take_failure()) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// The last descriptor is closed. What it answers, the caller must give to [`Self::release_waiting`].
    pub fn release(&self, handle: u64) -> Option<(ShardId, InodeNo)> {
        match self.handles.remove(handle) {
            Some(Handle::File(file)) if !self.releaser.try_release(file.shard, file.inode) => {
                Some((file.shard, file.inode))
            }
            _ => None,
        }
    }

    /// Gives back what [`Self::release`] could not.
    pub async fn release_waiting(&self, (shard, inode): (ShardId, InodeNo)) {
        self.releaser.release(shard, inode).await;
    }

    /// fsync, fdatasync and fsync of a directory: everything that this mount did in the shard before is
    /// on the device. What was lost, every file that was open then is told once.
    pub async fn fsync(&self, ino: u64, handle: u64) -> Outcome<()> {
        match self.node(ino)? {
            Node::InShard(shard, _) => {
                self.check_locks(handle)?;
                let file = self.handles.file(handle);
                self.sync(shard, file.as_ref().map(|file| &file.seen_losses)).await
            }
            Node::Root | Node::Virtual(_) | Node::Snapshots(_) => Ok(()),
        }
    }

    /// fallocate(2) with its mode bits.
    pub async fn allocate(
        &self,
        caller: Caller,
        (ino, handle): (u64, u64),
        (offset, length): (u64, u64),
        mode: i32,
    ) -> Outcome<()> {
        let kill_set_id = caller.uid != 0;
        let mut mode = allocate_mode(mode)?;
        let (shard, inode) = self.in_shard(ino)?;
        let (mut offset, mut length) = (offset, length);
        loop {
            let operation = Operation::Allocate { inode, offset, length, mode, kill_set_id };
            let done = self.mutate_through(Some(handle), shard, operation, false).await;
            let done = done.map_err(Failure::stale_if_gone)?;
            // None: it was a punch, or the node sets nothing aside.
            if done.length == 0 || done.length >= length {
                return Ok(());
            }
            (offset, length) = (offset + done.length, length - done.length);
            // What follows is zeros already, if it was to be.
            if let AllocateMode::ZeroRange { keep_size } = mode {
                mode = AllocateMode::Allocate { keep_size };
            }
        }
    }

    /// lseek(2) with SEEK_DATA and SEEK_HOLE.
    pub async fn seek(&self, ino: u64, handle: u64, offset: u64, what: SeekFor) -> Outcome<u64> {
        let size = match self.node(ino)? {
            Node::InShard(shard, inode) => match self.client.seek(shard, inode, offset, what).await {
                Ok(found) => return found.ok_or_else(|| Posix::NotInFile.into()),
                // A node that does not know the call.
                Err(error) if error.reason() == Reason::Unsupported => {
                    let attr = self.client.get_attr(shard, inode).await;
                    attr.map_err(|error| Failure::from(error).stale_if_gone())?.size
                }
                Err(error) => return Err(Failure::from(error).stale_if_gone()),
            },
            Node::Virtual(_) => match self.handles.get(handle) {
                Some(Handle::Content(content)) => content.len() as u64,
                _ => return Err(Posix::BadHandle.into()),
            },
            Node::Root | Node::Snapshots(_) => return Err(Posix::IsDirectory.into()),
        };
        match what {
            _ if offset >= size => Err(Posix::NotInFile.into()),
            SeekFor::Data => Ok(offset),
            SeekFor::Hole => Ok(size),
        }
    }

    /// copy_file_range(2): how many bytes were copied. Fails with what makes the kernel copy by reading and writing where no
    /// node can: between shards, and with a node that does not know the operation.
    pub async fn copy_range(
        &self,
        caller: Caller,
        (from, source_handle, source_offset): (u64, u64, u64),
        (to, handle, destination_offset): (u64, u64, u64),
        length: u64,
    ) -> Outcome<u32> {
        let (Node::InShard(shard, source), Node::InShard(other, destination)) =
            (self.node(from)?, self.node(to)?)
        else {
            return Err(Posix::Unsupported.into());
        };
        if shard != other {
            return Err(Posix::CrossDevice.into());
        }
        // It is read; the other one is looked at as every file that is changed.
        self.check_locks(source_handle)?;
        let operation = Operation::CopyRange {
            source,
            source_offset,
            destination,
            destination_offset,
            length,
            kill_set_id: caller.uid != 0,
        };
        match self.mutate_through(Some(handle), shard, operation, false).await {
            // At most 8 MiB.
            Ok(done) => Ok(done.length as u32),
            // The kernel itself refuses ranges that overlap.
            Err(failure) if failure.reason() == Some(Reason::InvalidArgument) => {
                Err(Posix::Unsupported.into())
            }
            Err(failure) => Err(failure.stale_if_gone()),
        }
    }

    fn in_shard(&self, ino: u64) -> Outcome<(ShardId, InodeNo)> {
        match self.node(ino)? {
            Node::InShard(shard, inode) => Ok((shard, inode)),
            Node::Root | Node::Snapshots(_) => Err(Posix::IsDirectory.into()),
            Node::Virtual(_) => Err(Posix::ReadOnly.into()),
        }
    }
}

fn allocate_mode(mode: i32) -> Outcome<AllocateMode> {
    const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_RANGE_KEEP_SIZE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    match mode {
        0 => Ok(AllocateMode::Allocate { keep_size: false }),
        KEEP_SIZE => Ok(AllocateMode::Allocate { keep_size: true }),
        PUNCH_HOLE => Ok(AllocateMode::PunchHole),
        ZERO_RANGE => Ok(AllocateMode::ZeroRange { keep_size: false }),
        ZERO_RANGE_KEEP_SIZE => Ok(AllocateMode::ZeroRange { keep_size: true }),
        _ => Err(Posix::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocation_modes_are_a_closed_set() {
        assert_eq!(allocate_mode(0).unwrap(), AllocateMode::Allocate { keep_size: false });
        assert_eq!(allocate_mode(1).unwrap(), AllocateMode::Allocate { keep_size: true });
        assert_eq!(allocate_mode(3).unwrap(), AllocateMode::PunchHole);
        assert_eq!(allocate_mode(16).unwrap(), AllocateMode::ZeroRange { keep_size: false });
        assert_eq!(allocate_mode(17).unwrap(), AllocateMode::ZeroRange { keep_size: true });
        for bad in [2, 4, 8, 32, 64, 128, -1] {
            assert!(allocate_mode(bad).is_err(), "{bad}");
        }
    }
}
