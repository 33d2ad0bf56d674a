//! copy_file_range(2): bytes of one file into another, or elsewhere in the same one.
//!
//! Chunks that are missing in the source, or have no bytes, become holes.

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::limits::COPY_BYTES_MAX;
use shardfs_proto::types::op::OpResult;
use shardfs_proto::types::{Error, InodeNo, Result};

use super::Apply;
use super::attr::drop_capability;
use super::data::check_end;
use crate::shard::chunk::pieces;
use crate::shard::records::{Content, INODE_FLAG_GAPS, INODE_FLAG_SET_ASIDE, InodeRecord};

/// A part of the source, in order; `None`: a hole.
struct Part {
    length: u64,
    bytes: Option<Bytes>,
}

impl Apply<'_, '_> {
    pub(super) fn copy_range(
        &mut self,
        (source, source_offset): (InodeNo, u64),
        (destination, offset): (InodeNo, u64),
        length: u64,
        kill_set_id: bool,
    ) -> Result<OpResult> {
        let from = self.regular(source)?;
        let mut to = self.regular(destination)?;
        let length = length.min(from.size.saturating_sub(source_offset));
        if length == 0 {
            return Ok(self.answer(destination, &to));
        }
        let meets = offset < source_offset + length && source_offset < offset.saturating_add(length);
        if source == destination && meets {
            return Err(Error::invalid(format!(
                "inode {source}: the range overlaps the one that it is copied to"
            )));
        }
        let length = length.min(COPY_BYTES_MAX);
        check_end(offset, length)?;
        // All of it is read before anything is written: both may lie in one chunk.
        let parts = self.parts(&from, source_offset, length)?;
        let mut at = offset;
        for part in parts {
            let end = at + part.length;
            match part.bytes {
                Some(bytes) => self.write_bytes(&mut to, at, &bytes)?,
                // A hole would give back what was set aside.
                None if to.flags & INODE_FLAG_SET_ASIDE != 0 => {
                    self.write_bytes(&mut to, at, &BytesMut::zeroed(part.length as usize).freeze())?;
                }
                None => {
                    self.zero(&mut to, (at, end))?;
                    if end > to.size {
                        self.resize(&mut to, end)?;
                    }
                }
            }
            at = end;
        }
        // Pages that nobody wrote may have come along within chunks.
        to.flags |= from.flags & INODE_FLAG_GAPS;
        if kill_set_id {
            to.mode = Self::kill_set_id(to.mode);
        }
        drop_capability(&mut to);
        to.mtime = self.now;
        to.ctime = self.now;
        let record = self.txn.put_inode(destination, to)?;
        Ok(OpResult { length, ..self.answer(destination, &record) })
    }

    /// What a range of a file that lies below its end consists of.
    fn parts(&self, record: &InodeRecord, offset: u64, length: u64) -> Result<Vec<Part>> {
        let id = match &record.content {
            Content::Inline(bytes) => {
                let start = offset as usize;
                return Ok(vec![Part { length, bytes: Some(bytes.slice(start..start + length as usize)) }]);
            }
            Content::Chunks { id, .. } => *id,
        };
        let mut parts = Vec::new();
        for piece in pieces(offset, length, self.txn.chunk_bytes()) {
            let (start, wanted) = (piece.start as usize, piece.length as usize);
            let chunk = self.txn.chunk(id, piece.number)?.unwrap_or_default();
            let there = chunk.len().min(start + wanted).saturating_sub(start);
            let bytes = match there {
                0 => None,
                there if there == wanted => Some(chunk.slice(start..start + wanted)),
                there => {
                    let mut bytes = BytesMut::with_capacity(wanted);
                    bytes.extend_from_slice(&chunk[start..start + there]);
                    bytes.resize(wanted, 0);
                    Some(bytes.freeze())
                }
            };
            parts.push(Part { length: piece.length.into(), bytes });
        }
        Ok(parts)
    }
}
