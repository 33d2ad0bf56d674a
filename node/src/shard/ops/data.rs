//! Operations on a file's bytes: write, truncate, allocate, punch, zero.
//!
//! Content up to [`INLINE_BYTES_MAX`] bytes lives in the record; what grows beyond goes to chunks and
//! stays there until the file is emptied or put anew. A chunk is made by the first write into it;
//! the record counts them. In a file without holes all chunks below its end exist, so nothing is looked
//! up; in others existence is asked of the transaction.
//!
//! Invariants: no chunk at or past the end of the file; within the last chunk no bytes past the end.

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::limits::{FILE_BYTES_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::op::{AllocateMode, OpResult};
use shardfs_proto::types::{Error, FileKind, InodeNo, Reason, Result};

use super::Apply;
use crate::shard::chunk::{self, Piece, pieces};
use crate::shard::keys::ContentId;
use crate::shard::records::{Content, INLINE_BYTES_MAX, InodeRecord};

impl Apply<'_, '_> {
    fn regular(&mut self, ino: InodeNo) -> Result<InodeRecord> {
        let record = self.inode(ino)?;
        match record.kind {
            FileKind::Regular => Ok(InodeRecord::clone(&record)),
            FileKind::Directory => {
                Err(Error::new(Reason::IsDirectory, format!("inode {ino} is a directory")))
            }
            FileKind::Symlink
            | FileKind::Fifo
            | FileKind::Socket
            | FileKind::CharDevice
            | FileKind::BlockDevice => {
                Err(Error::new(Reason::WrongKind, format!("inode {ino} is no regular file")))
            }
        }
    }

    pub(super) fn write(
        &mut self,
        ino: InodeNo,
        offset: u64,
        data: &Bytes,
        append: bool,
        kill_set_id: bool,
    ) -> Result<OpResult> {
        if data.len() > VALUE_BYTES_MAX {
            return Err(Error::new(
                Reason::TooLarge,
                format!("a write has {} bytes; the limit is {VALUE_BYTES_MAX}", data.len()),
            ));
        }
        let mut record = self.regular(ino)?;
        let offset = if append { record.size } else { offset };
        if data.is_empty() {
            return Ok(OpResult { offset, ..self.answer(ino, &record) });
        }
        check_end(offset, data.len() as u64)?;
        self.write_bytes(&mut record, offset, data)?;
        if kill_set_id {
            record.mode = Self::kill_set_id(record.mode);
        }
        record.mtime = self.now;
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        Ok(OpResult { offset, ..self.answer(ino, &record) })
    }

    /// Writes some bytes; the record's size, content and chunk count follow.
    fn write_bytes(&mut self, record: &mut InodeRecord, offset: u64, data: &Bytes) -> Result<()> {
        self.txn.grow(data.len() as u64);
        let end = offset + data.len() as u64;
        if let Content::Inline(bytes) = &record.content
            && end <= INLINE_BYTES_MAX as u64
        {
            let mut content = BytesMut::with_capacity(bytes.len().max(end as usize));
            content.extend_from_slice(bytes);
            if content.len() < end as usize {
                content.resize(end as usize, 0);
            }
            content[offset as usize..end as usize].copy_from_slice(data);
            record.size = content.len() as u64;
            record.content = Content::Inline(content.freeze());
            return Ok(());
        }
        let (id, mut count) = self.spill(record);
        let dense = record.is_dense(self.txn.chunk_bytes());
        let chunk_bytes = self.txn.chunk_bytes();
        let before = InodeRecord::dense_chunks(record.size, chunk_bytes);
        for piece in pieces(offset, data.len() as u64, chunk_bytes) {
            let bytes = data.slice(piece.at as usize..piece.at as usize + piece.length as usize);
            let there = self.chunk_is_there(id, &piece, before, dense)?;
            count += u64::from(!there);
            let chunk_start = u64::from(piece.number) * u64::from(chunk_bytes);
            let covers = piece.start == 0
                && (piece.length == chunk_bytes || chunk_start + u64::from(piece.length) >= record.size);
            if covers || (piece.start == 0 && !there) {
                self.txn.put_chunk(id, piece.number, bytes);
            } else {
                self.txn.patch_chunk(id, piece.number, chunk::write_patch(piece.start, &bytes));
            }
        }
        record.content = Content::Chunks { id, count };
        record.size = record.size.max(end);
        Ok(())
    }

    /// Whether a chunk exists, in a file that had `before` chunks' length.
    fn chunk_is_there(&self, id: ContentId, piece: &Piece, before: u64, dense: bool) -> Result<bool> {
        if u64::from(piece.number) >= before {
            return Ok(false);
        }
        if dense { Ok(true) } else { self.txn.chunk_exists(id, piece.number) }
    }

    /// Moves inline content to chunks; the content's id and chunk count.
    fn spill(&mut self, record: &mut InodeRecord) -> (ContentId, u64) {
        match &record.content {
            Content::Chunks { id, count } => (*id, *count),
            Content::Inline(bytes) => {
                let bytes = bytes.clone();
                let id = self.txn.new_content();
                let count = u64::from(!bytes.is_empty());
                if count == 1 {
                    self.txn.put_chunk(id, 0, bytes);
                }
                record.content = Content::Chunks { id, count };
                (id, count)
            }
        }
    }

    /// Cuts or extends a file.
    pub(super) fn resize(&mut self, record: &mut InodeRecord, size: u64) -> Result<()> {
        check_end(size, 0)?;
        if size == 0 {
            self.txn.delete_content(&record.content, record.size);
            record.content = Content::EMPTY;
            record.size = 0;
            return Ok(());
        }
        if let Content::Inline(bytes) = &record.content
            && size <= INLINE_BYTES_MAX as u64
        {
            let mut content = BytesMut::from(&bytes[..bytes.len().min(size as usize)]);
            content.resize(size as usize, 0);
            record.content = Content::Inline(content.freeze());
            record.size = size;
            return Ok(());
        }
        let (id, mut count) = self.spill(record);
        if size < record.size {
            let chunk_bytes = u64::from(self.txn.chunk_bytes());
            let dense = record.is_dense(self.txn.chunk_bytes());
            let (keep, all) = (size.div_ceil(chunk_bytes) as u32, record.size.div_ceil(chunk_bytes) as u32);
            count = if dense { u64::from(keep) } else { count - self.count_chunks(id, count, keep, all)? };
            self.txn.delete_chunks(id, keep, all);
            let cut = (size % chunk_bytes) as u32;
            let last = keep - 1;
            if cut != 0 && (dense || self.txn.chunk_exists(id, last)?) {
                self.txn.patch_chunk(id, last, chunk::cut_patch(cut));
            }
        }
        record.content = Content::Chunks { id, count };
        record.size = size;
        Ok(())
    }

    /// Chunks in a range, of a content that has `count` in all.
    fn count_chunks(&self, id: ContentId, count: u64, from: u32, to: u32) -> Result<u64> {
        if count == 0 || from >= to {
            return Ok(0);
        }
        let there = self.txn.count_chunks(id, from, to)?;
        if there > count {
            return Err(Error::corrupt(format!(
                "content {}: its inode counts {count} chunks, there are {there}: run `shardfs fsck`",
                id.get()
            )));
        }
        Ok(there)
    }

    pub(super) fn allocate(
        &mut self,
        ino: InodeNo,
        offset: u64,
        length: u64,
        mode: AllocateMode,
    ) -> Result<OpResult> {
        if length == 0 {
            return Err(Error::invalid("the range to allocate is empty"));
        }
        check_end(offset, length)?;
        let mut record = self.regular(ino)?;
        let end = offset + length;
        let grown = record.size.max(end);
        match mode {
            AllocateMode::Allocate { keep_size } => {
                let missing = end.saturating_sub(record.size.max(offset));
                self.check_room_for(missing)?;
                if !keep_size && grown > record.size {
                    self.resize(&mut record, grown)?;
                }
            }
            AllocateMode::PunchHole => self.zero(&mut record, offset, end)?,
            AllocateMode::ZeroRange { keep_size } => {
                self.zero(&mut record, offset, end)?;
                if !keep_size && grown > record.size {
                    self.resize(&mut record, grown)?;
                }
            }
        }
        record.mtime = self.now;
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        Ok(self.answer(ino, &record))
    }

    /// Fails unless so many bytes more could be written now. Nothing is set aside for them.
    fn check_room_for(&self, bytes: u64) -> Result<()> {
        let used = self.txn.counters().charged_bytes();
        self.check_limit(used.saturating_add(bytes), used, self.live.staged_bytes())?;
        if bytes > self.room_bytes {
            return Err(Error::new(
                Reason::VolumeFull,
                format!("shard {}: the volume has no room for {bytes} bytes more", self.header.id),
            ));
        }
        Ok(())
    }

    /// Makes a range read as zeros and frees its whole chunks; the size stays.
    fn zero(&mut self, record: &mut InodeRecord, offset: u64, end: u64) -> Result<()> {
        let end = end.min(record.size);
        if offset >= end {
            return Ok(());
        }
        let (id, mut count) = match &record.content {
            Content::Inline(bytes) => {
                let mut content = BytesMut::from(&bytes[..]);
                content[offset as usize..end as usize].fill(0);
                record.content = Content::Inline(content.freeze());
                return Ok(());
            }
            Content::Chunks { id, count } => (*id, *count),
        };
        let chunk_bytes = u64::from(self.txn.chunk_bytes());
        let dense = record.is_dense(self.txn.chunk_bytes());
        // Chunks that lie in the range as far as they hold bytes of the file.
        let first_whole = offset.div_ceil(chunk_bytes) as u32;
        let end_whole = if end == record.size { end.div_ceil(chunk_bytes) } else { end / chunk_bytes } as u32;
        if first_whole < end_whole {
            let gone = if dense {
                u64::from(end_whole - first_whole)
            } else {
                self.count_chunks(id, count, first_whole, end_whole)?
            };
            count -= gone;
            self.txn.delete_chunks(id, first_whole, end_whole);
        }
        let edges = [offset / chunk_bytes, (end - 1) / chunk_bytes];
        for (position, number) in edges.into_iter().enumerate() {
            let number = number as u32;
            let whole = (first_whole..end_whole).contains(&number);
            if whole || (position == 1 && edges[0] == edges[1]) {
                continue;
            }
            if dense || self.txn.chunk_exists(id, number)? {
                let start = u64::from(number) * chunk_bytes;
                let from = offset.max(start) - start;
                let to = end.min(start + chunk_bytes) - start;
                self.txn.patch_chunk(id, number, chunk::zero_patch(from as u32, (to - from) as u32));
            }
        }
        record.content = Content::Chunks { id, count };
        Ok(())
    }

    /// The content of a value that is put as a whole.
    pub(super) fn new_content(&mut self, value: &Bytes) -> Content {
        self.txn.grow(value.len() as u64);
        if value.len() <= INLINE_BYTES_MAX {
            // A copy: the message's memory must not be kept alive by a cached record.
            return Content::Inline(Bytes::copy_from_slice(value));
        }
        let id = self.txn.new_content();
        let mut count = 0;
        for piece in pieces(0, value.len() as u64, self.txn.chunk_bytes()) {
            let at = piece.at as usize;
            self.txn.put_chunk(id, piece.number, value.slice(at..at + piece.length as usize));
            count += 1;
        }
        Content::Chunks { id, count }
    }
}

/// Fails if a file would grow past what a file may have.
fn check_end(offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(()),
        Some(_) | None => Err(Error::new(
            Reason::FileTooLarge,
            format!("a file has at most {FILE_BYTES_MAX} bytes (16 TiB)"),
        )),
    }
}
