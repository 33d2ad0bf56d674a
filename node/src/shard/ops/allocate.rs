//! fallocate(2): setting room aside, punching holes, zeroing.
//!
//! Room is set aside by chunks without bytes: they read as zeros, and count as if they had all of theirs.

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::op::{AllocateMode, OpResult};
use shardfs_proto::types::{Error, InodeNo, Reason, Result};

use super::Apply;
use super::attr::drop_capability;
use super::data::check_end;
use crate::shard::chunk;
use crate::shard::keys::ContentId;
use crate::shard::records::{Content, INLINE_BYTES_MAX, INODE_FLAG_GAPS, INODE_FLAG_SET_ASIDE, InodeRecord};

/// Chunks for which one operation sets room aside: 1 GiB of 64 KiB. Each is a key to write, and everybody waits for them.
pub(in crate::shard) const SET_ASIDE_CHUNKS_MAX: u64 = 16_384;

/// Whether there is nothing but zeros.
pub(in crate::shard) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|part| *part == ZEROS[..part.len()])
}

impl Apply<'_, '_> {
    pub(super) fn allocate(
        &mut self,
        ino: InodeNo,
        (offset, length): (u64, u64),
        mode: AllocateMode,
        kill_set_id: bool,
    ) -> Result<OpResult> {
        if length == 0 {
            return Err(Error::invalid("the range to allocate is empty"));
        }
        check_end(offset, length)?;
        let mut record = self.regular(ino)?;
        let charged = record.content_bytes(self.txn.chunk_bytes());
        let range = (offset, offset + length);
        let set_aside = match mode {
            AllocateMode::PunchHole => {
                self.zero(&mut record, range)?;
                0
            }
            AllocateMode::Allocate { keep_size } => self.set_aside(&mut record, charged, range, keep_size)?,
            AllocateMode::ZeroRange { keep_size } => {
                self.zero(&mut record, range)?;
                self.set_aside(&mut record, charged, range, keep_size)?
            }
        };
        if kill_set_id {
            record.mode = Self::kill_set_id(record.mode);
        }
        drop_capability(&mut record);
        record.mtime = self.now;
        record.ctime = self.now;
        let record = self.txn.put_inode(ino, record)?;
        Ok(OpResult { length: set_aside, ..self.answer(ino, &record) })
    }

    /// Sets room aside for a range of a file that is charged so many bytes of content; how many bytes of the range it was done
    /// for. Fails, for the whole range, if a write to it would find no room now.
    fn set_aside(
        &mut self,
        record: &mut InodeRecord,
        charged: u64,
        (offset, end): (u64, u64),
        keep_size: bool,
    ) -> Result<u64> {
        let size = if keep_size { record.size } else { record.size.max(end) };
        // No chunk lies past the end of a file, so nothing can be set aside there.
        let past = end.saturating_sub(size.max(offset));
        if matches!(record.content, Content::Inline(_)) && size <= INLINE_BYTES_MAX as u64 {
            self.check_room_for((size + past).saturating_sub(charged))?;
            if size > record.size {
                self.resize(record, size)?;
            }
            record.flags |= INODE_FLAG_SET_ASIDE;
            return Ok(end - offset);
        }
        let (id, count) = self.spill(record);
        let chunk_bytes = u64::from(self.txn.chunk_bytes());
        let first = offset / chunk_bytes;
        let last = end.min(size).div_ceil(chunk_bytes).max(first);
        let there = if record.is_dense(self.txn.chunk_bytes()) {
            last.min(count).saturating_sub(first)
        } else {
            self.count_chunks(id, count, first as u32, last as u32)?
        };
        let missing = last - first - there;
        let content = size.min((count + missing).saturating_mul(chunk_bytes));
        self.check_room_for((content + past).saturating_sub(charged))?;
        let stop = last.min(first + SET_ASIDE_CHUNKS_MAX);
        let mut made = 0;
        if missing > 0 {
            let have = self.txn.chunks_there(id, first as u32, stop as u32)?;
            for number in (first as u32..stop as u32).filter(|number| !have.contains(number)) {
                self.txn.put_chunk(id, number, Bytes::new());
                made += 1;
            }
        }
        if made > 0 {
            record.flags |= INODE_FLAG_GAPS;
        }
        record.flags |= INODE_FLAG_SET_ASIDE;
        if size > record.size {
            Self::note_growth(record, count, self.txn.chunk_bytes());
        }
        record.content = Content::Chunks { id, count: count + made };
        record.size = size;
        Ok(if stop < last { stop * chunk_bytes - offset } else { end - offset })
    }

    /// Fails unless so many bytes more could be written now.
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

    /// Makes a range read as zeros and frees the chunks that hold nothing else then; the size stays.
    pub(super) fn zero(&mut self, record: &mut InodeRecord, (offset, end): (u64, u64)) -> Result<()> {
        let end = end.min(record.size);
        if offset >= end {
            return Ok(());
        }
        let (id, mut count) = match &record.content {
            Content::Inline(bytes) => {
                let mut content = BytesMut::from(&bytes[..]);
                content[offset as usize..end as usize].fill(0);
                record.content = Content::Inline(content.freeze());
                record.flags |= INODE_FLAG_GAPS;
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
                count -= u64::from(self.drop_if_empty(record, id, number)?);
                record.flags |= INODE_FLAG_GAPS;
            }
        }
        record.content = Content::Chunks { id, count };
        Ok(())
    }

    /// Removes a chunk that is there if it has zeros only, none of which somebody may have written or set aside; whether it did.
    pub(super) fn drop_if_empty(&mut self, record: &InodeRecord, id: ContentId, number: u32) -> Result<bool> {
        if !record.has_gaps() || record.flags & INODE_FLAG_SET_ASIDE != 0 {
            return Ok(false);
        }
        let empty = self.txn.chunk(id, number)?.is_none_or(|bytes| is_zero(&bytes));
        if empty {
            self.txn.delete_chunks(id, number, number + 1);
        }
        Ok(empty)
    }
}
