//! What a group of operations has changed so far, in layers over the store.
//!
//! The lowest layer is the group; an operation works in a layer of its own above it, an item of a
//! batch in another. A layer is folded into the one below when its operation succeeds and dropped when
//! it fails: the savepoint. Reads go from the top layer down, then to the store. The executor turns the
//! group's layer into one batch.
//!
//! Invariants: [`Txn::put_inode`] and [`Txn::remove_inode`] are the only ways to change an inode record,
//! so the counters and the index entries agree with the records by construction; within a layer a range
//! deletion comes before every single change of a chunk.
//!
//! Must not: write to the store, or know what an operation means.

mod chunks;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use shardfs_proto::types::op::Indexes;
use shardfs_proto::types::{Cookie, Error, InodeNo, Reason, Result, SessionId, Version};

pub use chunks::POINT_DELETES_MAX;

use super::cache::InodeCache;
use super::keys::{self, Cf, ContentId};
use super::records::{Counters, InodeRecord};
use super::store::{Batch, Change, Store};

struct Layer {
    changes: [BTreeMap<Bytes, Change>; Cf::ALL.len()],
    chunk_ranges: Vec<([u8; 12], [u8; 12])>,
    inodes: HashMap<InodeNo, Option<Arc<InodeRecord>>>,
    counters: Counters,
    /// Bytes that the layer adds to the volume, roughly.
    grown_bytes: u64,
}

impl Layer {
    fn new(counters: Counters) -> Layer {
        Layer {
            changes: Default::default(),
            chunk_ranges: Vec::new(),
            inodes: HashMap::new(),
            counters,
            grown_bytes: 0,
        }
    }

    fn covers(&self, key: &[u8]) -> bool {
        self.chunk_ranges.iter().any(|(from, to)| &from[..] <= key && key < &to[..])
    }

    fn delete_range(&mut self, from: [u8; 12], to: [u8; 12]) {
        let chunks = &mut self.changes[Cf::Chunk.position()];
        let gone: Vec<Bytes> = chunks
            .range::<[u8], _>((std::ops::Bound::Included(&from[..]), std::ops::Bound::Excluded(&to[..])))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            chunks.remove(&key);
        }
        self.chunk_ranges.push((from, to));
    }
}

/// What a group comes to.
pub struct Finished {
    /// What is to be written.
    pub batch: Batch,
    /// The counters after it.
    pub counters: Counters,
    /// The inode records that it changes; `None`: removed.
    pub inodes: HashMap<InodeNo, Option<Arc<InodeRecord>>>,
}

/// The change of a group.
pub struct Txn<'a> {
    store: &'a dyn Store,
    cache: &'a mut InodeCache,
    chunk_bytes: u32,
    /// Never empty.
    layers: Vec<Layer>,
}

impl<'a> Txn<'a> {
    /// Begins a group.
    pub fn new(
        store: &'a dyn Store,
        cache: &'a mut InodeCache,
        chunk_bytes: u32,
        counters: Counters,
    ) -> Txn<'a> {
        Txn { store, cache, chunk_bytes, layers: vec![Layer::new(counters)] }
    }

    /// Bytes of a chunk.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    fn top(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("a transaction has at least one layer")
    }

    /// How many layers there are, for [`Txn::unwind`].
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Sets a savepoint.
    pub fn push(&mut self) {
        let counters = *self.counters();
        self.layers.push(Layer::new(counters));
    }

    /// Keeps what was done since the last savepoint.
    pub fn keep(&mut self) {
        let layer = self.layers.pop().expect("a transaction has at least one layer");
        let below = self.top();
        for (from, to) in layer.chunk_ranges {
            below.delete_range(from, to);
        }
        below.inodes.extend(layer.inodes);
        below.counters = layer.counters;
        below.grown_bytes += layer.grown_bytes;
        for (cf, changes) in Cf::ALL.into_iter().zip(layer.changes) {
            for (key, change) in changes {
                match change {
                    Change::Patch(patches) => self.fold_patches(key, patches),
                    change => {
                        self.top().changes[cf.position()].insert(key, change);
                    }
                }
            }
        }
    }

    /// Drops what was done since the last savepoint.
    pub fn drop_layer(&mut self) {
        assert!(self.layers.len() > 1, "the group's layer is no savepoint");
        self.layers.pop();
    }

    /// Drops layers until `depth` are left.
    pub fn unwind(&mut self, depth: usize) {
        self.layers.truncate(depth.max(1));
    }

    /// The counters as they are now.
    pub fn counters(&self) -> &Counters {
        &self.layers.last().expect("a transaction has at least one layer").counters
    }

    /// The counters as they were at the last savepoint.
    pub fn counters_below(&self) -> &Counters {
        let below = self.layers.len().saturating_sub(2);
        &self.layers[below].counters
    }

    /// Bytes by which the last layer, and all layers together, make the volume fuller.
    pub fn grown_bytes(&self) -> (u64, u64) {
        let last = self.layers.last().map_or(0, |layer| layer.grown_bytes);
        (last, self.layers.iter().map(|layer| layer.grown_bytes).sum())
    }

    /// Notes bytes that are going to be written for good.
    pub fn grow(&mut self, bytes: u64) {
        self.top().grown_bytes += bytes;
    }

    /// The number of the operation that runs: the version of what it changes.
    pub fn version(&self) -> Version {
        Version::new(self.counters().op_seq)
    }

    /// Begins an operation's number.
    pub fn next_version(&mut self) {
        self.top().counters.op_seq += 1;
    }

    /// An inode number that was never used.
    pub fn new_inode_number(&mut self) -> Result<InodeNo> {
        let counters = &mut self.top().counters;
        let ino = InodeNo::new(counters.next_ino).map_err(|_| {
            Error::new(Reason::IdsExhausted, "the shard has used up its inode numbers: make another shard")
        })?;
        counters.next_ino += 1;
        Ok(ino)
    }

    fn new_id(&mut self) -> u64 {
        let counters = &mut self.top().counters;
        let id = counters.next_id;
        // 2^64 ids at a million a second last for half a million years.
        counters.next_id += 1;
        id
    }

    /// A content id that was never used.
    pub fn new_content(&mut self) -> ContentId {
        ContentId::new(self.new_id()).expect("ids begin at 1")
    }

    /// A cookie greater than all before.
    pub fn new_cookie(&mut self) -> Cookie {
        Cookie::new(self.new_id())
    }

    /// A session id that was never used.
    pub fn new_session(&mut self) -> SessionId {
        let counters = &mut self.top().counters;
        let id = SessionId::new(counters.next_session).expect("session ids begin at 1");
        counters.next_session += 1;
        id
    }

    /// A value that is neither an inode record nor a chunk.
    pub fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        debug_assert!(!matches!(cf, Cf::Inode | Cf::Chunk));
        for layer in self.layers.iter().rev() {
            match layer.changes[cf.position()].get(key) {
                Some(Change::Put(value)) => return Ok(Some(value.clone())),
                Some(Change::Delete) => return Ok(None),
                Some(Change::Patch(_)) | None => {}
            }
        }
        self.store.get(cf, key)
    }

    /// Sets a value that is neither an inode record nor a chunk.
    pub fn put(&mut self, cf: Cf, key: impl AsRef<[u8]>, value: Bytes) {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.top().changes[cf.position()].insert(key, Change::Put(value));
    }

    /// Removes a value that is neither an inode record nor a chunk.
    pub fn delete(&mut self, cf: Cf, key: impl AsRef<[u8]>) {
        let key = Bytes::copy_from_slice(key.as_ref());
        self.top().changes[cf.position()].insert(key, Change::Delete);
    }

    /// An inode record.
    pub fn inode(&mut self, ino: InodeNo) -> Result<Option<Arc<InodeRecord>>> {
        for layer in self.layers.iter().rev() {
            if let Some(record) = layer.inodes.get(&ino) {
                return Ok(record.clone());
            }
        }
        if let Some(record) = self.cache.get(ino) {
            return Ok(Some(record));
        }
        let Some(value) = self.store.get(Cf::Inode, &keys::inode(ino))? else { return Ok(None) };
        let record = Arc::new(InodeRecord::decode(ino, &value)?);
        self.cache.put(ino, Arc::clone(&record));
        Ok(Some(record))
    }

    /// Sets an inode record, stamps it with the operation's version, and returns it.
    pub fn put_inode(&mut self, ino: InodeNo, mut record: InodeRecord) -> Result<Arc<InodeRecord>> {
        let before = self.inode(ino)?;
        record.version = self.version();
        let used = record.used_bytes(self.chunk_bytes);
        let mut freed = 0;
        match &before {
            Some(before) => {
                freed = before.used_bytes(self.chunk_bytes);
                if before.indexes != record.indexes {
                    let gone = before.indexes.clone();
                    self.remove_indexes(ino, &gone);
                    self.add_indexes(ino, &record.indexes);
                }
            }
            None => {
                self.add_indexes(ino, &record.indexes);
                self.top().counters.inodes += 1;
            }
        }
        self.count_used(freed, used)?;
        let record = Arc::new(record);
        self.top().inodes.insert(ino, Some(Arc::clone(&record)));
        Ok(record)
    }

    /// Removes an inode record with its index entries; its content is the caller's.
    pub fn remove_inode(&mut self, ino: InodeNo) -> Result<()> {
        let Some(before) = self.inode(ino)? else { return Ok(()) };
        self.remove_indexes(ino, &before.indexes);
        self.count_used(before.used_bytes(self.chunk_bytes), 0)?;
        let counters = &mut self.top().counters;
        counters.inodes = counters.inodes.checked_sub(1).ok_or_else(wrong_counters)?;
        self.top().inodes.insert(ino, None);
        Ok(())
    }

    fn count_used(&mut self, freed: u64, used: u64) -> Result<()> {
        let counters = &mut self.top().counters;
        let sum = counters.used_bytes.checked_add(used).and_then(|sum| sum.checked_sub(freed));
        counters.used_bytes = sum.ok_or_else(wrong_counters)?;
        Ok(())
    }

    fn add_indexes(&mut self, ino: InodeNo, indexes: &Indexes) {
        for (name, value) in indexes {
            self.put(Cf::Index, keys::index(name, value, ino), Bytes::new());
        }
    }

    fn remove_indexes(&mut self, ino: InodeNo, indexes: &Indexes) {
        for (name, value) in indexes {
            self.delete(Cf::Index, keys::index(name, value, ino));
        }
    }

    /// What is to be written; `None`: nothing.
    pub fn finish(mut self) -> Option<Finished> {
        assert_eq!(self.layers.len(), 1, "every savepoint was kept or dropped");
        let layer = self.layers.pop().expect("a transaction has at least one layer");
        let mut batch = Batch { chunk_ranges: layer.chunk_ranges, changes: Vec::new() };
        for (ino, record) in &layer.inodes {
            let key = Bytes::copy_from_slice(&keys::inode(*ino));
            let change = record.as_ref().map_or(Change::Delete, |record| Change::Put(record.encode()));
            batch.changes.push((Cf::Inode, key, change));
        }
        for (cf, changes) in Cf::ALL.into_iter().zip(layer.changes) {
            batch.changes.extend(changes.into_iter().map(|(key, change)| (cf, key, change)));
        }
        if batch.is_empty() {
            return None;
        }
        let counters = layer.counters;
        batch.changes.push((Cf::Sys, Bytes::from_static(keys::COUNTERS), Change::Put(counters.encode())));
        Some(Finished { batch, counters, inodes: layer.inodes })
    }
}

fn wrong_counters() -> Error {
    Error::corrupt("the shard's counters disagree with its records: run `shardfs fsck`")
}
