//! Decoded inode records that the executor used lately.
//!
//! Two generations: what is used moves to the young one; when that is full it becomes the old one and
//! the old one goes. Memory is bounded by [`GENERATION_BYTES`] twice.
//!
//! Invariant: a record here equals the one in the store. The executor is the only writer; it puts in
//! what it wrote after the write succeeded, and clears everything after a write failed.

use std::collections::HashMap;
use std::sync::Arc;

use shardfs_proto::types::InodeNo;

use super::records::InodeRecord;

/// Bytes of a generation: the directories and files that a busy mount touches within seconds.
const GENERATION_BYTES: usize = 4 << 20;

#[derive(Default)]
struct Generation {
    records: HashMap<InodeNo, Arc<InodeRecord>>,
    bytes: usize,
}

/// See the module.
#[derive(Default)]
pub struct InodeCache {
    young: Generation,
    old: Generation,
}

impl InodeCache {
    /// A record, if it is here.
    pub fn get(&mut self, ino: InodeNo) -> Option<Arc<InodeRecord>> {
        if let Some(record) = self.young.records.get(&ino) {
            return Some(Arc::clone(record));
        }
        let record = Arc::clone(self.old.records.get(&ino)?);
        self.put(ino, Arc::clone(&record));
        Some(record)
    }

    /// Remembers a record, in place of what was there.
    pub fn put(&mut self, ino: InodeNo, record: Arc<InodeRecord>) {
        self.remove(ino);
        if self.young.bytes > GENERATION_BYTES {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.bytes += record.weight_bytes();
        self.young.records.insert(ino, record);
    }

    /// Forgets a record.
    pub fn remove(&mut self, ino: InodeNo) {
        for generation in [&mut self.young, &mut self.old] {
            if let Some(record) = generation.records.remove(&ino) {
                generation.bytes -= record.weight_bytes();
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = InodeCache::default();
    }
}
