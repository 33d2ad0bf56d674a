//! Operations on a file's bytes: write, truncate.
//!
//! Content up to [`INLINE_BYTES_MAX`] bytes lives in the record; what grows beyond goes to chunks and
//! stays there until the file is emptied or put anew. A chunk is made by the first write into it;
//! the record counts them. In a file without holes all chunks below its end exist, so nothing is looked
//! up; in others existence is asked of the transaction.
//!
//! Invariants: no chunk at or past the end of the file; within the last chunk no bytes past the end; a file
//! whose chunks may have pages that nobody wrote has [`INODE_FLAG_GAPS`].

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::limits::{FILE_BYTES_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::op::OpResult;
use shardfs_proto::types::{Error, FileKind, InodeNo, Reason, Result};

use super::attr::drop_capability;
use super::{Apply, is_zero};
use crate::shard::chunk::{self, Piece, pieces};
use crate::shard::keys::ContentId;
use crate::shard::records::{Content, INLINE_BYTES_MAX, INODE_FLAG_GAPS, INODE_FLAG_SET_ASIDE, InodeRecord};

impl Apply<'_, '_> {
    pub(super) fn regular(&mut self, ino: InodeNo) -> Result<InodeRecord> {
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
        drop_capability(&mut record);
        if kill_set_id {
            record.mode = Self::kill_set_id(record.mode);
        }
        record.mtime = self.now;
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        Ok(OpResult { offset, ..self.answer(ino, &record) })
    }

    /// Writes some bytes; the record's size, content and chunk count follow.
    pub(super) fn write_bytes(&mut self, record: &mut InodeRecord, offset: u64, data: &Bytes) -> Result<()> {
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
        if offset > record.size {
            Self::note_growth(record, count, chunk_bytes);
        }
        for piece in pieces(offset, data.len() as u64, chunk_bytes) {
            let bytes = data.slice(piece.at as usize..piece.at as usize + piece.length as usize);
            let there = self.chunk_is_there(id, &piece, before, dense)?;
            count += u64::from(!there);
            let chunk_start = u64::from(piece.number) * u64::from(chunk_bytes);
            let covers = piece.start == 0
                && (piece.length == chunk_bytes || chunk_start + u64::from(piece.length) >= record.size);
            if !there && !covers {
                record.flags |= INODE_FLAG_GAPS;
            }
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

    /// Notes that a file becomes longer than it is without what lies between being written.
    pub(super) fn note_growth(record: &mut InodeRecord, count: u64, chunk_bytes: u32) {
        if count > 0 && !record.size.is_multiple_of(u64::from(chunk_bytes)) {
            record.flags |= INODE_FLAG_GAPS;
        }
    }

    /// Whether a chunk exists, in a file that had `before` chunks' length.
    fn chunk_is_there(&self, id: ContentId, piece: &Piece, before: u64, dense: bool) -> Result<bool> {
        if u64::from(piece.number) >= before {
            return Ok(false);
        }
        if dense { Ok(true) } else { self.txn.chunk_exists(id, piece.number) }
    }

    /// Moves inline content to chunks; the content's id and chunk count.
    pub(super) fn spill(&mut self, record: &mut InodeRecord) -> (ContentId, u64) {
        match &record.content {
            Content::Chunks { id, count } => (*id, *count),
            Content::Inline(bytes) => {
                let bytes = bytes.clone();
                let id = self.txn.new_content();
                // Zeros that nobody wrote, nor set room aside for, need no chunk.
                let bare = record.has_gaps() && record.flags & INODE_FLAG_SET_ASIDE == 0 && is_zero(&bytes);
                let count = u64::from(!bytes.is_empty() && !bare);
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
            record.flags &= !(INODE_FLAG_GAPS | INODE_FLAG_SET_ASIDE);
            return Ok(());
        }
        if let Content::Inline(bytes) = &record.content
            && size <= INLINE_BYTES_MAX as u64
        {
            let mut content = BytesMut::from(&bytes[..bytes.len().min(size as usize)]);
            content.resize(size as usize, 0);
            record.content = Content::Inline(content.freeze());
            if size > record.size {
                record.flags |= INODE_FLAG_GAPS;
            }
            record.size = size;
            return Ok(());
        }
        let (id, mut count) = self.spill(record);
        if size > record.size {
            Self::note_growth(record, count, self.txn.chunk_bytes());
        }
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
                count -= u64::from(self.drop_if_empty(record, id, last)?);
            }
        }
        record.content = Content::Chunks { id, count };
        record.size = size;
        Ok(())
    }

    /// Chunks in a range, of a content that has `count` in all.
    pub(super) fn count_chunks(&self, id: ContentId, count: u64, from: u32, to: u32) -> Result<u64> {
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
pub(super) fn check_end(offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(()),
        Some(_) | None => Err(Error::new(
            Reason::FileTooLarge,
            format!("a file has at most {FILE_BYTES_MAX} bytes (16 TiB)"),
        )),
    }
}
