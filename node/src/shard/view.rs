//! A consistent view of a shard, for everything that reads.
//!
//! Invariants: what a view shows never changes; all of it was durable, or written by the session that
//! asked, when the view was handed out. A view keeps its shard open.
//!
//! Must not: change anything.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use shardfs_proto::types::{InodeNo, Result, ShardId};

use super::keys::{self, Cf};
use super::records::{Dirent, Header, InodeRecord};
use super::store::{Reader, Visit};

/// A consistent view of a shard; cheap to clone.
#[derive(Clone)]
pub struct ReadView {
    snapshot: Arc<dyn Reader>,
    header: Arc<Header>,
    /// What must not be closed while the view lives.
    _keeps: Option<Arc<dyn Any + Send + Sync>>,
    wanted_back: Option<Arc<AtomicBool>>,
}

impl ReadView {
    /// Of a snapshot; `keeps` lives as long as the view.
    pub fn new(
        snapshot: Arc<dyn Reader>,
        header: Arc<Header>,
        keeps: Option<Arc<dyn Any + Send + Sync>>,
    ) -> ReadView {
        ReadView { snapshot, header, _keeps: keeps, wanted_back: None }
    }

    /// With a flag that says that whoever holds it should let go.
    pub fn with_wanted_back(self, flag: Arc<AtomicBool>) -> ReadView {
        ReadView { wanted_back: Some(flag), ..self }
    }

    /// Whether it should be let go: the shard is to be closed.
    pub fn is_wanted_back(&self) -> bool {
        self.wanted_back.as_ref().is_some_and(|flag| flag.load(Ordering::Acquire))
    }

    /// The shard.
    pub fn shard_id(&self) -> ShardId {
        self.header.id
    }

    /// The shard's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of a chunk.
    pub fn chunk_bytes(&self) -> u32 {
        self.header.chunk_bytes
    }

    /// The record of an inode.
    pub fn inode(&self, ino: InodeNo) -> Result<Option<InodeRecord>> {
        let value = self.get(Cf::Inode, &keys::inode(ino))?;
        value
            .map(|value| InodeRecord::decode(ino, &value))
            .transpose()
            .map_err(|e| e.with_shard(self.shard_id()))
    }

    /// The entry of a name.
    pub fn dirent(&self, parent: InodeNo, name: &[u8]) -> Result<Option<Dirent>> {
        let value = self.get(Cf::Dirent, &keys::dirent(parent, name))?;
        value.map(|value| Dirent::decode(&value)).transpose().map_err(|e| e.with_shard(self.shard_id()))
    }
}

impl Reader for ReadView {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        self.snapshot.get(cf, key)
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.snapshot.multi_get(cf, keys)
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.snapshot.contains(cf, key)
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.snapshot.scan(cf, from, to, visit)
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.snapshot.scan_keys(cf, from, to, visit)
    }
}
