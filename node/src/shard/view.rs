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
use shardfs_proto::types::{Error, InodeNo, Result, ShardId};

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
    /// See [`ReadView::leaving`].
    left: Option<Arc<AtomicBool>>,
}

impl ReadView {
    /// Of a snapshot; `keeps` lives as long as the view.
    pub fn new(
        snapshot: Arc<dyn Reader>,
        header: Arc<Header>,
        keeps: Option<Arc<dyn Any + Send + Sync>>,
    ) -> ReadView {
        ReadView { snapshot, header, _keeps: keeps, wanted_back: None, left: None }
    }

    /// With a flag that says that whoever holds it should let go.
    pub fn with_wanted_back(self, flag: Arc<AtomicBool>) -> ReadView {
        ReadView { wanted_back: Some(flag), ..self }
    }

    /// Whether it should be let go: the shard is to be closed.
    pub fn is_wanted_back(&self) -> bool {
        self.wanted_back.as_ref().is_some_and(|flag| flag.load(Ordering::Acquire))
    }

    /// The same view for somebody who reads for long and looks at nothing else: from the first read on that finds the view wanted
    /// back all of them fail with `Unavailable`, also if it is wanted no longer.
    pub fn leaving(self) -> ReadView {
        ReadView { left: Some(Arc::default()), ..self }
    }

    /// Whether a read has failed for that: what came of it tells nothing of the shard.
    pub fn has_left(&self) -> bool {
        self.left.as_ref().is_some_and(|left| left.load(Ordering::Acquire))
    }

    fn stay(&self) -> Result<()> {
        let Some(left) = &self.left else { return Ok(()) };
        if left.load(Ordering::Acquire) || self.is_wanted_back() {
            left.store(true, Ordering::Release);
            return Err(Error::unavailable("the shard is wanted back").with_shard(self.shard_id()));
        }
        Ok(())
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
        self.stay()?;
        self.snapshot.get(cf, key)
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.stay()?;
        self.snapshot.multi_get(cf, keys)
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.stay()?;
        self.snapshot.contains(cf, key)
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.stay()?;
        self.snapshot.scan(cf, from, to, visit)
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.stay()?;
        self.snapshot.scan_keys(cf, from, to, visit)
    }
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::Reason;

    use super::*;
    use crate::shard::check;
    use crate::shard::read::tests::Fixture;

    #[test]
    fn what_has_left_does_not_come_back() {
        let fixture = Fixture::new();
        let flag = Arc::new(AtomicBool::new(true));
        let stays = fixture.view().with_wanted_back(Arc::clone(&flag));
        assert!(stays.is_wanted_back() && stays.inode(InodeNo::ROOT).unwrap().is_some());
        let leaves = stays.leaving();
        assert!(!leaves.has_left(), "it has read nothing yet");
        assert_eq!(leaves.inode(InodeNo::ROOT).unwrap_err().reason(), Reason::Unavailable);
        flag.store(false, Ordering::Release);
        assert!(leaves.has_left());
        assert_eq!(leaves.inode(InodeNo::ROOT).unwrap_err().reason(), Reason::Unavailable);
    }

    #[test]
    fn a_check_that_leaves_has_neither_findings_nor_a_summary() {
        let fixture = Fixture::new();
        let flag = Arc::new(AtomicBool::new(false));
        let view = fixture.view().with_wanted_back(Arc::clone(&flag)).leaving();
        assert_eq!(check::check_all(&view, true).unwrap().0, []);
        flag.store(true, Ordering::Release);
        let mut told = 0;
        let left = check::check(&view, true, &mut |_| {
            told += 1;
            std::ops::ControlFlow::Continue(())
        });
        assert_eq!((left.unwrap_err().reason(), told), (Reason::Unavailable, 0));
    }
}
