//! A store in memory, for tests: the same answers as `rocks.rs`, nothing survives.
//!
//! Invariant: a snapshot shares the map until the next write, which then copies it.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use shardfs_proto::types::{Error, Reason, Result};

use super::chunk;
use super::keys::Cf;
use super::store::{Batch, Change, Reader, Store, StoreProperties, Visit};

type Maps = [BTreeMap<Bytes, Bytes>; Cf::ALL.len()];

/// A store in memory.
#[derive(Default)]
pub struct MemStore {
    maps: RwLock<Arc<Maps>>,
}

struct MemSnapshot(Arc<Maps>);

impl MemSnapshot {
    fn map(&self, cf: Cf) -> &BTreeMap<Bytes, Bytes> {
        &self.0[cf.position()]
    }
}

impl Reader for MemSnapshot {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        Ok(self.map(cf).get(key).cloned())
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        Ok(keys.iter().map(|key| self.map(cf).get(*key).cloned()).collect())
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        Ok(self.map(cf).contains_key(key))
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        if to.is_some_and(|to| to <= from) {
            return Ok(());
        }
        let to = to.map_or(Bound::Unbounded, Bound::Excluded);
        for (key, value) in self.map(cf).range::<[u8], _>((Bound::Included(from), to)) {
            if let ControlFlow::Break(()) = visit(key, value)? {
                break;
            }
        }
        Ok(())
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.scan(cf, from, to, &mut |key, _| visit(key, &[]))
    }
}

impl MemStore {
    /// Another store with the same records.
    pub fn copy(&self) -> MemStore {
        MemStore { maps: RwLock::new(Arc::clone(&self.maps.read())) }
    }

    fn now(&self) -> MemSnapshot {
        MemSnapshot(Arc::clone(&self.maps.read()))
    }
}

impl Reader for MemStore {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        self.now().get(cf, key)
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.now().multi_get(cf, keys)
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.now().contains(cf, key)
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.now().scan(cf, from, to, visit)
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.now().scan_keys(cf, from, to, visit)
    }
}

impl Store for MemStore {
    fn snapshot(&self) -> Result<Arc<dyn Reader>> {
        Ok(Arc::new(self.now()))
    }

    fn write(&self, batch: &Batch, _sync: bool) -> Result<()> {
        let mut guard = self.maps.write();
        let maps = Arc::make_mut(&mut guard);
        let chunks = &mut maps[Cf::Chunk.position()];
        for (from, to) in &batch.chunk_ranges {
            let range = (Bound::Included(&from[..]), Bound::Excluded(&to[..]));
            let gone: Vec<Bytes> = chunks.range::<[u8], _>(range).map(|(key, _)| key.clone()).collect();
            for key in gone {
                chunks.remove(&key);
            }
        }
        for (cf, key, change) in &batch.changes {
            let map = &mut maps[cf.position()];
            match change {
                Change::Put(value) => {
                    map.insert(key.clone(), value.clone());
                }
                Change::Delete => {
                    map.remove(key);
                }
                Change::Patch(patches) => {
                    let base = map.get(key).map(|value| &value[..]);
                    let value = chunk::apply_patches(base, patches.iter().map(|p| &p[..]))
                        .ok_or_else(|| Error::internal("a malformed patch was written"))?;
                    map.insert(key.clone(), value.into());
                }
            }
        }
        Ok(())
    }

    fn sync_log(&self) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn checkpoint(&self, dir: &Path) -> Result<()> {
        Err(Error::new(Reason::Unsupported, format!("{}: a store in memory has no files", dir.display())))
    }

    fn resume(&self) -> Result<()> {
        Ok(())
    }

    fn reclaim(&self) -> Result<()> {
        Ok(())
    }

    fn unflushed_bytes(&self) -> u64 {
        0
    }

    fn properties(&self) -> StoreProperties {
        StoreProperties::default()
    }
}
