//! Where a file has data, and where holes: by pages, within chunks as well.
//!
//! What is not in a chunk is a hole. Of a file that has [`INODE_FLAG_GAPS`](super::records::INODE_FLAG_GAPS) a page of a chunk
//! that holds nothing but zeros is one too, be it that nobody wrote it, that it was punched, or that zeros were written.

use std::ops::ControlFlow;

use shardfs_proto::types::limits::PAGE_BYTES;
use shardfs_proto::types::op::{SeekFor, Sought};
use shardfs_proto::types::{Error, InodeNo, Result};

use super::keys::{self, Cf};
use super::ops::is_zero;
use super::read;
use super::records::{Content, InodeRecord};
use super::store::Reader;
use super::view::ReadView;

/// Chunks that one call looks at, if their keys tell enough.
const KEYS_MAX: u64 = 1 << 16;
/// Bytes of chunks that one call reads if not.
const BYTES_MAX: u64 = 16 << 20;

/// Finds the first data or hole at or after an offset.
pub fn seek(view: &ReadView, inode: InodeNo, offset: u64, what: SeekFor) -> Result<Sought> {
    let record = read::regular(view, inode)?;
    if offset >= record.size {
        return Ok(Sought::Nothing);
    }
    match &record.content {
        Content::Inline(bytes) => {
            let is_data = !record.has_gaps() || !is_zero(bytes);
            Ok(match (what, is_data) {
                (SeekFor::Data, true) | (SeekFor::Hole, false) => Sought::Found(offset),
                (SeekFor::Data, false) => Sought::Nothing,
                (SeekFor::Hole, true) => Sought::Found(record.size),
            })
        }
        Content::Chunks { .. } if record.is_dense(view.chunk_bytes()) && !record.has_gaps() => {
            Ok(Sought::Found(if what == SeekFor::Data { offset } else { record.size }))
        }
        Content::Chunks { id, .. } => {
            let chunk_bytes = u64::from(view.chunk_bytes());
            let number = |n: u64| {
                u32::try_from(n)
                    .map_err(|_| Error::corrupt(format!("content {}: no chunk has the number {n}", id.get())))
            };
            let first = number(offset / chunk_bytes)?;
            let last = number((record.size - 1) / chunk_bytes)?;
            let budget = if record.has_gaps() { (BYTES_MAX / chunk_bytes).max(1) } else { KEYS_MAX };
            let mut search =
                Search { record: &record, chunk_bytes, offset, what, at: offset, found: None, budget };
            let (from, to) = (keys::chunk(*id, first), keys::prefix_end(&keys::chunk(*id, last)));
            let mut visit = |key: &[u8], bytes: &[u8]| {
                let (_, number) = keys::parse_chunk(key)?;
                Ok(search.chunk(u64::from(number), bytes))
            };
            if record.has_gaps() {
                view.scan(Cf::Chunk, &from, to.as_deref(), &mut visit)?;
            } else {
                view.scan_keys(Cf::Chunk, &from, to.as_deref(), &mut visit)?;
            }
            Ok(search.end())
        }
    }
}

/// A walk over the chunks of a content from the one in which the offset lies.
struct Search<'a> {
    record: &'a InodeRecord,
    chunk_bytes: u64,
    offset: u64,
    what: SeekFor,
    /// What is sought does not begin before here.
    at: u64,
    found: Option<Sought>,
    /// Chunks that may still be looked at.
    budget: u64,
}

impl Search<'_> {
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> ControlFlow<()> {
        let start = number * self.chunk_bytes;
        let found = match self.what {
            // Between the chunks there is a hole.
            SeekFor::Hole if start > self.at => Some(self.at),
            _ if self.budget == 0 => {
                self.found = Some(Sought::Continue(self.at.max(start)));
                return ControlFlow::Break(());
            }
            _ => self.page(start, bytes),
        };
        self.budget -= u64::from(found.is_none());
        if let Some(found) = found {
            self.found = Some(Sought::Found(found));
            return ControlFlow::Break(());
        }
        self.at = start + self.chunk_bytes;
        ControlFlow::Continue(())
    }

    /// The first page of the kind that is sought in a chunk that begins at `start`, from the offset on.
    fn page(&self, start: u64, bytes: &[u8]) -> Option<u64> {
        let end = self.record.size.min(start + self.chunk_bytes);
        let mut at = self.offset.max(start);
        if !self.record.has_gaps() {
            return (self.what == SeekFor::Data).then_some(at);
        }
        while at < end {
            let page = at - at % PAGE_BYTES;
            let from = bytes.len().min((page - start) as usize);
            let to = bytes.len().min((page + PAGE_BYTES - start) as usize);
            let is_data = !is_zero(&bytes[from..to]);
            if is_data == (self.what == SeekFor::Data) {
                return Some(at);
            }
            at = page + PAGE_BYTES;
        }
        None
    }

    fn end(self) -> Sought {
        match (self.found, self.what) {
            (Some(found), _) => found,
            (None, SeekFor::Data) => Sought::Nothing,
            (None, SeekFor::Hole) => Sought::Found(self.at.min(self.record.size)),
        }
    }
}
