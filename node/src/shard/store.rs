//! What a shard wants of its storage: point reads, ordered scans, snapshots, atomic batches.
//!
//! Two implementations: `rocks.rs` (what shards run on) and `mem.rs` (for tests). Both fold chunk
//! patches with `chunk::apply`.
//!
//! Invariants: a batch is applied as a whole or not at all; its range deletions come before its other
//! changes; what a snapshot shows never changes; after `write(.., sync = true)` or `sync_log` returned,
//! every batch written before survives any crash.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use shardfs_proto::types::Result;

use super::keys::{self, Cf};

/// Called by a scan with each key and value; `Break` ends it.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>> + 'a;

/// Reads a consistent state: a snapshot, or (for the one writer) the latest.
pub trait Reader: Send + Sync {
    /// The value of a key. A chunk comes with its patches applied.
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>>;

    /// The values of many keys, in their order. Cheaper than as many `get`s.
    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>>;

    /// Whether a key is there, without reading a large value.
    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool>;

    /// Visits keys in ascending order from `from` (inclusive) to `to` (exclusive; `None`: to the end).
    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()>;

    /// Like [`Reader::scan`] with keys only: the values handed to `visit` are empty, large ones are not read.
    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()>;

    /// Visits all keys with a prefix in ascending order.
    fn scan_prefix(&self, cf: Cf, prefix: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        self.scan(cf, prefix, keys::prefix_end(prefix).as_deref(), visit)
    }
}

/// One change of one key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The key gets this value.
    Put(Bytes),
    /// The key goes.
    Delete,
    /// Patches on top of the value there is (chunks only), first to last.
    Patch(Vec<Bytes>),
}

/// Changes that are applied together. Range deletions first, then the rest in any order: no key is
/// changed twice.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    /// Chunk keys to delete: from (inclusive), to (exclusive).
    pub chunk_ranges: Vec<([u8; 12], [u8; 12])>,
    /// Changes of single keys.
    pub changes: Vec<(Cf, Bytes, Change)>,
}

impl Batch {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.chunk_ranges.is_empty() && self.changes.is_empty()
    }

    /// Bytes of keys and values.
    pub fn size_bytes(&self) -> u64 {
        let changes: usize = self
            .changes
            .iter()
            .map(|(_, key, change)| {
                key.len()
                    + match change {
                        Change::Put(value) => value.len(),
                        Change::Delete => 0,
                        Change::Patch(patches) => patches.iter().map(Bytes::len).sum(),
                    }
            })
            .sum();
        changes as u64 + 24 * self.chunk_ranges.len() as u64
    }
}

/// Figures of a store for metrics.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct StoreProperties {
    /// Bytes of SST files.
    pub sst_bytes: u64,
    /// Bytes of blob files.
    pub blob_bytes: u64,
    /// Bytes of memtables.
    pub memtable_bytes: u64,
    /// Bytes that compactions have yet to rewrite.
    pub pending_compaction_bytes: u64,
    /// Whether writes are stopped or slowed.
    pub write_stalled: bool,
}

/// Storage of one shard. Writes come from one thread at a time; reads from any.
pub trait Store: Reader {
    /// A state that never changes.
    fn snapshot(&self) -> Result<Arc<dyn Reader>>;

    /// Applies a batch. With `sync` it and everything before it is durable on return. After an error the
    /// batch has not been applied as far as reads tell; whether a crash brings it back is unknown.
    fn write(&self, batch: &Batch, sync: bool) -> Result<()>;

    /// Makes every batch written before durable.
    fn sync_log(&self) -> Result<()>;

    /// Writes memory tables to files, so that a later open has nothing to replay.
    fn flush(&self) -> Result<()>;

    /// Makes a folder, which is not there yet, with the state of some moment during the call, in files that never change.
    fn checkpoint(&self, dir: &Path) -> Result<()>;

    /// Tries to make writes possible again after one failed.
    fn resume(&self) -> Result<()>;

    /// Gives space of deleted content back to the volume: rewrites what is needed, may take long. Fails with `Unavailable` if it
    /// was stopped.
    fn reclaim(&self) -> Result<()>;

    /// Lets no reclaim begin, and has one that is under way end at its next step; `false`: they may run again. Does not block.
    /// Whether [`Store::settle_reclaims`] must follow for that to come about soon.
    fn stop_reclaims(&self, _stopped: bool) -> bool {
        false
    }

    /// Brings about what [`Store::stop_reclaims`] was told last. Blocks until a step that is under way has ended, cut short.
    fn settle_reclaims(&self) {}

    /// Bytes that a flush would write, roughly.
    fn unflushed_bytes(&self) -> u64;

    /// Figures for metrics.
    fn properties(&self) -> StoreProperties;
}
