//! Writes that fail: everything is taken back, reads go on, writes resume.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, Operation};
use shardfs_proto::types::{Error, InodeNo, Reason, Result};

use super::harness::*;
use crate::shard::keys::Cf;
use crate::shard::mem::MemStore;
use crate::shard::store::{Batch, Reader, Store, StoreProperties, Visit};
use crate::shard::{Mutation, Shard, ShardManager, ShardSettings, check, initialize, read};

/// A store whose writes fail while it is told so.
struct Failing {
    store: MemStore,
    fails: AtomicBool,
}

impl Reader for Failing {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        self.store.get(cf, key)
    }
    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.store.multi_get(cf, keys)
    }
    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.store.contains(cf, key)
    }
    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.store.scan(cf, from, to, visit)
    }
    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        let mut keys = |key: &[u8], _: &[u8]| -> Result<ControlFlow<()>> { visit(key, &[]) };
        self.store.scan(cf, from, to, &mut keys)
    }
}

impl Failing {
    fn check(&self) -> Result<()> {
        match self.fails.load(Ordering::Relaxed) {
            true => Err(Error::new(Reason::VolumeFull, "no room")),
            false => Ok(()),
        }
    }
}

impl Store for Failing {
    fn snapshot(&self) -> Result<Arc<dyn Reader>> {
        self.store.snapshot()
    }
    fn write(&self, batch: &Batch, sync: bool) -> Result<()> {
        self.check()?;
        self.store.write(batch, sync)
    }
    fn sync_log(&self) -> Result<()> {
        self.check()
    }
    fn flush(&self) -> Result<()> {
        self.check()
    }
    fn checkpoint(&self, dir: &std::path::Path) -> Result<()> {
        self.store.checkpoint(dir)
    }
    fn resume(&self) -> Result<()> {
        self.check()
    }
    fn reclaim(&self) -> Result<()> {
        self.check()
    }
    fn unflushed_bytes(&self) -> u64 {
        0
    }
    fn properties(&self) -> StoreProperties {
        self.store.properties()
    }
}

fn mutation(session: Option<shardfs_proto::types::SessionId>, n: u64, operation: Operation) -> Mutation {
    let sequence = session.and(shardfs_proto::types::Sequence::new(n));
    Mutation { session, sequence, durability: Durability::Sync, operation }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_write_is_taken_back_as_a_whole() {
    let store = Arc::new(Failing { store: MemStore::default(), fails: AtomicBool::new(false) });
    initialize(&*store, &init(None)).unwrap();
    let room = Arc::new(TestRoom(AtomicU64::new(1 << 40)));
    let handle = tokio::runtime::Handle::current();
    let shard = Shard::open(shard_id(), Arc::clone(&store) as Arc<dyn Store>, room, handle).unwrap();
    let session = shard.open_session("s".into()).await.unwrap();
    let file = shard.mutate(mutation(Some(session), 1, create(InodeNo::ROOT, "f"))).await.unwrap();
    let file = file.attr.unwrap().inode;
    shard.register_open(session, file).await.unwrap();

    store.fails.store(true, Ordering::Relaxed);
    let failed = shard.mutate(mutation(Some(session), 2, unlink(InodeNo::ROOT, "f"))).await.unwrap_err();
    assert_eq!(failed.reason(), Reason::VolumeFull);
    assert_eq!(shard.close_session(session).await.unwrap_err().reason(), Reason::VolumeFull);
    assert!(shard.open_session("t".into()).await.is_err());
    let view = shard.read_view(Some(session)).await.unwrap();
    assert!(read::lookup(&view, InodeNo::ROOT, b"f").is_ok(), "reads go on");

    store.fails.store(false, Ordering::Relaxed);
    // The same mutation is new: it never happened. The session and its open file are there.
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while let Err(error) = shard.mutate(mutation(Some(session), 2, unlink(InodeNo::ROOT, "f"))).await {
        assert_eq!(error.reason(), Reason::VolumeFull, "{error}");
        assert!(std::time::Instant::now() < deadline, "writes never resumed: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let view = shard.read_view(Some(session)).await.unwrap();
    assert_eq!(read::get_attr(&view, file).unwrap().nlink, 0, "held open, as before");
    drop(view);
    shard.close_session(session).await.unwrap();
    assert_eq!(shard.usage().inodes, 1);
    let (findings, _) = check::check_all(&shard.read_view(None).await.unwrap(), true).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
}

/// A small filesystem in memory, gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where one may not mount.
    fn new(at: &Path, mib: u32) -> Option<SmallDisk> {
        let options = std::ffi::CString::new(format!("size={mib}m")).unwrap();
        rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), Some(&*options))
            .ok()?;
        Some(SmallDisk(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_is_survived() {
    let root = tempfile::tempdir().unwrap();
    let Some(_disk) = SmallDisk::new(root.path(), 128) else {
        eprintln!("skipped: mounting is not allowed here");
        return;
    };
    let manager = ShardManager::new(ShardSettings {
        block_cache_bytes: 8 << 20,
        write_buffer_bytes: 16 << 20,
        ..ShardSettings::default()
    });
    let dir = root.path().join("shard-7");
    manager.create(&dir, &init(None)).unwrap();
    // The room says there is plenty: the disk itself must refuse.
    let room = Arc::new(TestRoom(AtomicU64::new(1 << 40)));
    // Space that an operator can give back: writes resume by writing memtables to files, so it must hold
    // those (the write-buffer budget, and what is being flushed already) and not only the deletes.
    let ballast = root.path().join("ballast");
    std::fs::write(&ballast, vec![0u8; 48 << 20]).unwrap();
    let shard = manager.open(shard_id(), &dir, Arc::clone(&room) as _).await.unwrap();
    let mut written = 0u64;
    let error = loop {
        let operation = put(&format!("f{written}"), &vec![written as u8; 1 << 20]);
        match shard.mutate(mutation(None, 0, operation)).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 200, "the disk never filled");
    };
    assert_eq!(error.reason(), Reason::VolumeFull, "{error}");
    let view = shard.read_view(None).await;
    if let Ok(view) = view {
        for i in 0..written {
            let value = read::find_value(&view, &key(&format!("f{i}"))).unwrap();
            let bytes = read::content(&view, &value.record, 0, 1 << 20).unwrap();
            assert!(bytes.len() == 1 << 20 && bytes.iter().all(|b| *b == i as u8), "value {i}");
        }
    }
    std::fs::remove_file(&ballast).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    for i in 0..written {
        loop {
            let operation = Operation::DeleteValue { key: key(&format!("f{i}")), if_version: None };
            match shard.mutate(mutation(None, 0, operation)).await {
                Ok(_) => break,
                Err(e) if e.reason() == Reason::NotFound => break,
                Err(e) => assert!(
                    std::time::Instant::now() < deadline,
                    "writes never resumed: {e}; free pages: {:?}",
                    rustix::fs::statvfs(root.path()).map(|s| s.f_bfree)
                ),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    room.0.store(1 << 20, Ordering::Relaxed);
    assert_eq!(shard.usage().used_bytes, 0);
    let store = Arc::clone(shard.executor().store());
    tokio::task::spawn_blocking(move || store.reclaim()).await.unwrap().unwrap();
    room.0.store(1 << 40, Ordering::Relaxed);
    for i in 0..written / 2 {
        shard.mutate(mutation(None, 0, put(&format!("g{i}"), &vec![3; 1 << 20]))).await.unwrap();
    }
    let (findings, _) = check::check_all(&shard.read_view(None).await.unwrap(), true).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    drop(shard);
    manager.close_all().await.unwrap();
}
