//! A shard under test, on memory or on RocksDB, that can be closed and opened again.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::op::{
    Durability, NewInode, OpResult, Operation, PutItem, PutOptions, SeekFor, Sought,
};
use shardfs_proto::types::{
    Attr, ClientId, FileKind, FileName, InodeNo, Key, Result, Sequence, SessionId, ShardId,
};

use crate::shard::cache::InodeCache;
use crate::shard::executor::{Answer, Command};
use crate::shard::group::Group;
use crate::shard::handle::read_head;
use crate::shard::keys::{self, Cf};
use crate::shard::locks::Waits;
use crate::shard::mem::MemStore;
use crate::shard::records::Header;
use crate::shard::rocks::{RocksShared, RocksStore};
use crate::shard::session::{Live, Undo};
use crate::shard::store::{Batch, Change, Reader, Store};
use crate::shard::txn::Txn;
use crate::shard::{Mutation, ReadView, Room, Shard, ShardInit, check, initialize, read, seek};

/// A volume with as much room as a test says.
pub struct TestRoom(pub AtomicU64);

impl Room for TestRoom {
    fn growth_bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn wrote(&self, bytes: u64) {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(bytes)))
            .unwrap();
    }
    fn unflushed(&self, _: u64, _: u64) {}
    fn look_again(&self) {}
    fn total_bytes(&self) -> u64 {
        1 << 40
    }
    fn free_bytes(&self) -> u64 {
        self.growth_bytes()
    }
}

/// Where a shard's records are.
pub enum Place {
    /// In memory.
    Mem(Arc<MemStore>),
    /// On disk.
    Rocks(tempfile::TempDir, RocksShared),
}

/// See the module.
pub struct World {
    pub place: Place,
    pub room: Arc<TestRoom>,
    shard: Option<Arc<Shard>>,
}

pub fn shard_id() -> ShardId {
    ShardId::new(7).unwrap()
}

pub fn init(limit: Option<u64>) -> ShardInit {
    ShardInit {
        chunk_bytes: crate::shard::chunk::CHUNK_BYTES,
        id: shard_id(),
        owner: ClientId::new("tests").unwrap(),
        limit_bytes: limit,
        mode: 0o755,
        uid: 1000,
        gid: 1000,
    }
}

impl World {
    pub fn mem(limit: Option<u64>, chunk_bytes: u32) -> World {
        let store = Arc::new(MemStore::default());
        prepare(&*store, limit, chunk_bytes);
        World::with(Place::Mem(store))
    }

    pub fn rocks(limit: Option<u64>, chunk_bytes: u32) -> World {
        let dir = tempfile::tempdir().unwrap();
        let shared = RocksShared::new(8 << 20, 64 << 20);
        prepare(
            &RocksStore::create(&shared, shard_id(), &dir.path().join("db")).unwrap(),
            limit,
            chunk_bytes,
        );
        World::with(Place::Rocks(dir, shared))
    }

    /// One of each.
    pub fn both(limit: Option<u64>, chunk_bytes: u32) -> [World; 2] {
        [World::mem(limit, chunk_bytes), World::rocks(limit, chunk_bytes)]
    }

    fn with(place: Place) -> World {
        let mut world = World { place, room: Arc::new(TestRoom(AtomicU64::new(1 << 40))), shard: None };
        world.reopen();
        world
    }

    pub fn store(&self) -> Arc<dyn Store> {
        match &self.place {
            Place::Mem(store) => Arc::clone(store) as Arc<dyn Store>,
            Place::Rocks(dir, shared) => {
                Arc::new(RocksStore::open(shared, shard_id(), &dir.path().join("db")).unwrap())
            }
        }
    }

    /// What the next open finds if the process dies now.
    pub fn crash(&self) -> World {
        match &self.place {
            Place::Mem(store) => World::with(Place::Mem(Arc::new(store.copy()))),
            Place::Rocks(dir, shared) => {
                World::with(Place::Rocks(copy_of(&dir.path().join("db")), shared.clone()))
            }
        }
    }

    /// The same, with all but `keep` bytes of the newest log lost.
    pub fn crash_with_torn_log(&self, keep: impl FnOnce(u64) -> u64) -> World {
        let Place::Rocks(dir, shared) = &self.place else { panic!("only a disk has a log") };
        let copy = copy_of(&dir.path().join("db"));
        let is_log = |path: &PathBuf| path.extension().is_some_and(|e| e == "log");
        let files = std::fs::read_dir(copy.path().join("db")).unwrap().map(|e| e.unwrap().path());
        let newest = files.filter(is_log).max().unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(newest).unwrap();
        file.set_len(keep(file.metadata().unwrap().len())).unwrap();
        World::with(Place::Rocks(copy, shared.clone()))
    }

    pub fn close(&mut self) {
        if let Some(shard) = self.shard.take() {
            // A drain may hold it for a moment longer; the last to let go closes the database.
            for _ in 0..5000 {
                if Arc::strong_count(&shard) == 1 {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            panic!("somebody still holds the shard");
        }
    }

    pub fn reopen(&mut self) {
        self.close();
        let room = Arc::clone(&self.room) as Arc<dyn Room>;
        let handle = tokio::runtime::Handle::current();
        self.shard = Some(Shard::open(shard_id(), self.store(), room, handle).unwrap());
    }

    pub fn shard(&self) -> Arc<Shard> {
        Arc::clone(self.shard.as_ref().unwrap())
    }

    pub async fn run(&self, operation: Operation) -> Result<OpResult> {
        self.run_as(None, None, operation).await
    }

    pub async fn run_as(
        &self,
        session: Option<SessionId>,
        sequence: Option<u64>,
        operation: Operation,
    ) -> Result<OpResult> {
        let sequence = sequence.map(|n| Sequence::new(n).unwrap());
        let durability = Durability::Buffered;
        self.shard.as_ref().unwrap().mutate(Mutation { session, sequence, durability, operation }).await
    }

    pub async fn view(&self) -> ReadView {
        self.shard.as_ref().unwrap().read_view(None).await.unwrap()
    }

    pub async fn read(&self, ino: InodeNo) -> Vec<u8> {
        let view = self.view().await;
        let size = read::get_attr(&view, ino).unwrap().size;
        read::read(&view, ino, 0, size as u32).unwrap().to_vec()
    }

    /// fsck finds nothing.
    pub async fn check(&self, when: &str) {
        let (findings, _) = check::check_all(&self.view().await, true).unwrap();
        assert!(findings.is_empty(), "{when}: {findings:?}");
    }

    pub async fn create(&self, parent: InodeNo, n: &str) -> Attr {
        self.run(create(parent, n)).await.unwrap().attr.unwrap()
    }

    pub async fn mkdir(&self, parent: InodeNo, n: &str) -> Attr {
        let inode = NewInode { mode: 0o755, uid: 1, gid: 2, unmasked_mode: None };
        let operation = Operation::MakeDirectory { parent, name: name(n), inode };
        self.run(operation).await.unwrap().attr.unwrap()
    }

    pub async fn write(&self, inode: InodeNo, offset: u64, data: &[u8]) -> Result<OpResult> {
        self.run(write(inode, offset, data)).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shard.take();
    }
}

/// A copy of a database as it is at one moment: made again if files came or went meanwhile.
fn copy_of(db: &std::path::Path) -> tempfile::TempDir {
    let list = || -> std::collections::BTreeMap<PathBuf, Option<u64>> {
        let entries = std::fs::read_dir(db).unwrap().map(|e| e.unwrap());
        entries.map(|e| (e.path(), e.metadata().ok().map(|m| m.len()))).collect()
    };
    for _ in 0..100 {
        let before = list();
        let copy = tempfile::tempdir().unwrap();
        let to = copy.path().join("db");
        std::fs::create_dir(&to).unwrap();
        let whole = before.keys().all(|from| std::fs::copy(from, to.join(from.file_name().unwrap())).is_ok());
        if whole && list() == before {
            return copy;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("the database never stood still");
}

/// Runs commands as one group over a store that nobody else uses: their answers, what would be written, and how `live` is taken
/// back.
pub fn run_group(
    store: &dyn Store,
    live: &mut Live,
    commands: &[Command],
) -> (Vec<Result<Answer>>, Batch, Vec<Undo>) {
    let (header, counters) = read_head(store, shard_id()).unwrap();
    let (mut cache, waits) = (InodeCache::default(), Waits::default());
    let txn = Txn::new(store, &mut cache, header.chunk_bytes, counters);
    let mut group = Group::new(txn, live, store, &header, u64::MAX, (&waits, Duration::MAX));
    let answers = commands.iter().map(|command| group.apply(command)).collect();
    let (txn, undo, _) = group.finish();
    (answers, txn.finish().map(|done| done.batch).unwrap_or_default(), undo)
}

/// Where a file has data: from, to.
pub fn extents(view: &ReadView, inode: InodeNo) -> Vec<(u64, u64)> {
    let find = |mut at: u64, what: SeekFor| loop {
        match seek::seek(view, inode, at, what).unwrap() {
            Sought::Found(found) => break Some(found),
            Sought::Nothing => break None,
            Sought::Continue(next) => {
                assert!(next > at);
                at = next;
            }
        }
    };
    let mut extents = Vec::new();
    let mut at = 0;
    while let Some(from) = find(at, SeekFor::Data) {
        at = find(from, SeekFor::Hole).unwrap();
        assert!(at > from);
        extents.push((from, at));
    }
    extents
}

/// Keys of a family.
pub fn count(view: &ReadView, cf: Cf) -> usize {
    let mut count = 0;
    view.scan_keys(cf, b"", None, &mut |_, _| {
        count += 1;
        Ok(std::ops::ControlFlow::Continue(()))
    })
    .unwrap();
    count
}

fn prepare(store: &dyn Store, limit: Option<u64>, chunk_bytes: u32) {
    initialize(store, &init(limit)).unwrap();
    let header = Header::decode(&store.get(Cf::Sys, keys::HEADER).unwrap().unwrap()).unwrap();
    let header = Header { chunk_bytes, ..header };
    let change = (Cf::Sys, Bytes::from_static(keys::HEADER), Change::Put(header.encode()));
    store.write(&Batch { chunk_ranges: Vec::new(), changes: vec![change] }, true).unwrap();
}

pub fn name(n: &str) -> FileName {
    FileName::new(n.to_owned()).unwrap()
}

pub fn key(k: &str) -> Key {
    Key::new(k.to_owned()).unwrap()
}

pub fn create(parent: InodeNo, n: &str) -> Operation {
    Operation::Create {
        parent,
        name: name(n),
        kind: FileKind::Regular,
        inode: NewInode { mode: 0o644, uid: 1, gid: 2, unmasked_mode: None },
        rdev: 0,
        existing_ok: false,
        open: false,
    }
}

pub fn write(inode: InodeNo, offset: u64, data: &[u8]) -> Operation {
    Operation::Write { inode, offset, data: Bytes::copy_from_slice(data), append: false, kill_set_id: false }
}

pub fn unlink(parent: InodeNo, n: &str) -> Operation {
    Operation::Unlink { parent, name: name(n) }
}

pub fn rename(parent: InodeNo, from: &str, new_parent: InodeNo, to: &str) -> Operation {
    Operation::Rename {
        parent,
        name: name(from),
        new_parent,
        new_name: name(to),
        no_replace: false,
        exchange: false,
    }
}

pub fn item(k: &str, value: &[u8]) -> PutItem {
    PutItem { key: key(k), value: Bytes::copy_from_slice(value), options: PutOptions::default() }
}

pub fn put(k: &str, value: &[u8]) -> Operation {
    Operation::PutValue { item: item(k, value) }
}
