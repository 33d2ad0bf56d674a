//! The manager: creation, opening, places, deletion, damage.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use shardfs_proto::types::{Reason, ShardId};

use super::harness::*;
use crate::shard::keys::{self, Cf};
use crate::shard::records::HEADER_FORMAT;
use crate::shard::rocks::{RocksShared, RocksStore};
use crate::shard::store::{Batch, Change, Reader, Store};
use crate::shard::{Room, Shard, ShardInit, ShardManager, ShardSettings};

pub(super) fn manager(open_shards_max: usize) -> Arc<ShardManager> {
    ShardManager::new(ShardSettings {
        block_cache_bytes: 8 << 20,
        write_buffer_bytes: 32 << 20,
        open_shards_max,
        ..ShardSettings::default()
    })
}

pub(super) fn room() -> Arc<dyn Room> {
    Arc::new(TestRoom(AtomicU64::new(1 << 40)))
}

pub(super) fn id(n: u64) -> ShardId {
    ShardId::new(n).unwrap()
}

pub(super) fn dir(root: &Path, n: u64) -> std::path::PathBuf {
    root.join(format!("shard-{n}"))
}

pub(super) async fn put_one(shard: &Shard, k: &str) {
    let mutation = crate::shard::Mutation {
        session: None,
        sequence: None,
        durability: shardfs_proto::types::op::Durability::Buffered,
        operation: put(k, b"value"),
    };
    shard.mutate(mutation).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_open_lazily_and_give_up_their_places() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(2);
    for n in 1..=5 {
        m.create(&dir(root.path(), n), &ShardInit { id: id(n), ..init(None) }).unwrap();
        m.create(&dir(root.path(), n), &ShardInit { id: id(n), ..init(None) }).unwrap();
    }
    assert_eq!(m.status().open_shards, 0);
    for round in 0..2 {
        for n in 1..=5 {
            let shard = m.open(id(n), &dir(root.path(), n), room()).await.unwrap();
            assert_eq!(shard.usage().inodes, 1 + round);
            put_one(&shard, &format!("k{round}")).await;
            assert!(m.status().open_shards <= 2);
        }
    }
    let (one, two) = (
        m.open(id(1), &dir(root.path(), 1), room()).await.unwrap(),
        m.open(id(2), &dir(root.path(), 2), room()).await.unwrap(),
    );
    let again = m.open(id(1), &dir(root.path(), 1), room()).await.unwrap();
    assert!(Arc::ptr_eq(&one, &again));
    let busy = m.open(id(3), &dir(root.path(), 3), room()).await.err().expect("both places are held");
    assert_eq!(busy.reason(), Reason::Busy);
    drop((one, two, again));
    m.open(id(3), &dir(root.path(), 3), room()).await.unwrap();
    m.close_all().await.unwrap();
    assert_eq!(m.status().open_shards, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_of_a_newer_format_is_refused_and_keeps_its_format() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    m.create(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shared = RocksShared::new(8 << 20, 8 << 20);
    let header = |change: Option<Bytes>| {
        let store = RocksStore::open(&shared, id(1), &dir(root.path(), 1)).unwrap();
        if let Some(value) = change {
            let change = (Cf::Sys, Bytes::from_static(keys::HEADER), Change::Put(value));
            store.write(&Batch { chunk_ranges: Vec::new(), changes: vec![change] }, true).unwrap();
        }
        store.get(Cf::Sys, keys::HEADER).unwrap().unwrap()
    };
    let mut newer = header(None).to_vec();
    newer[0] = HEADER_FORMAT + 1;
    header(Some(Bytes::from(newer.clone())));
    for _ in 0..2 {
        let error = m.open(id(1), &dir(root.path(), 1), room()).await.err().expect("it is newer");
        assert_eq!(error.reason(), Reason::Unsupported, "it is not damaged");
        assert!(error.message().contains("format 2") && error.message().contains("newer"), "{error}");
        assert_eq!(error.shard(), Some(id(1)));
    }
    assert_eq!(m.status().open_shards, 0);
    assert_eq!(header(None), newer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_opens_share_one() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    m.create(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }).unwrap();
    let path = dir(root.path(), 1);
    let opens = (0..16).map(|_| m.open(id(1), &path, room()));
    let shards: Vec<_> = futures::future::join_all(opens).await.into_iter().map(Result::unwrap).collect();
    assert!(shards.iter().all(|shard| Arc::ptr_eq(shard, &shards[0])));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_is_resumed() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    let path = dir(root.path(), 1);
    m.create(&path, &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &path, room()).await.unwrap();
    put_one(&shard, "k").await;
    drop(shard);
    // A deletion was cut off after the rename; a creation was cut off before.
    std::fs::rename(&path, root.path().join("shard-1.deleted")).unwrap();
    std::fs::create_dir(root.path().join("shard-1.creating")).unwrap();
    m.delete(id(1), &path).await.unwrap();
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    m.delete(id(1), &path).await.unwrap();
    // A creation that was cut off is done again.
    std::fs::create_dir(root.path().join("shard-2.creating")).unwrap();
    std::fs::write(root.path().join("shard-2.creating/CURRENT"), b"junk").unwrap();
    m.create(&dir(root.path(), 2), &ShardInit { id: id(2), ..init(None) }).unwrap();
    let shard = m.open(id(2), &dir(root.path(), 2), room()).await.unwrap();
    put_one(&shard, "k").await;
    drop(shard);
    m.delete(id(2), &dir(root.path(), 2)).await.unwrap();
    let gone = m.open(id(2), &dir(root.path(), 2), room()).await.err().unwrap();
    assert_eq!(gone.reason(), Reason::Corrupt);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_named_and_stays_with_its_shard() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    for n in 1..=2 {
        m.create(&dir(root.path(), n), &ShardInit { id: id(n), ..init(None) }).unwrap();
    }
    let sst = std::fs::read_dir(dir(root.path(), 1))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "sst"))
        .unwrap();
    let mut bytes = std::fs::read(&sst).unwrap();
    let length = bytes.len();
    bytes[length - 40..].fill(0x5a);
    std::fs::write(&sst, bytes).unwrap();
    let bad = m.open(id(1), &dir(root.path(), 1), room()).await.err().expect("a damaged file is no shard");
    assert_eq!(bad.reason(), Reason::Corrupt);
    assert_eq!(bad.shard(), Some(id(1)));
    let file = sst.file_name().unwrap().to_str().unwrap();
    assert!(bad.message().contains("shard 1") && bad.message().contains(file), "{bad}");
    let good = m.open(id(2), &dir(root.path(), 2), room()).await.unwrap();
    put_one(&good, "k").await;
    // A folder that is another shard's is refused.
    let wrong = m.open(id(3), &dir(root.path(), 2), room()).await.err().unwrap();
    assert!(matches!(wrong.reason(), Reason::Unavailable | Reason::Corrupt), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_damaged_within_is_no_torn_end() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    let path = dir(root.path(), 1);
    m.create(&path, &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &path, room()).await.unwrap();
    for n in 0..200 {
        put_one(&shard, &format!("k{n}")).await;
    }
    drop(shard);
    m.close_all().await.unwrap();
    let logs = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path());
    let log = logs
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .max_by_key(|p| p.metadata().unwrap().len())
        .unwrap();
    let whole = std::fs::read(&log).unwrap();
    assert!(whole.len() > 10_000, "the puts are in the log: {} bytes", whole.len());
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(&log, &damaged).unwrap();
    let bad = m.open(id(1), &path, room()).await.err().expect("synced records would be lost");
    assert_eq!((bad.reason(), bad.shard()), (Reason::Corrupt, Some(id(1))));
    let file = log.file_name().unwrap().to_str().unwrap();
    assert!(bad.message().contains("shard 1") && bad.message().contains(file), "{bad}");
    // Nothing was changed by the attempt, so that a copy of the file mends it; a torn end is no damage.
    assert!(std::fs::read(&log).unwrap() == damaged);
    std::fs::write(&log, &whole[..whole.len() - 5]).unwrap();
    let shard = m.open(id(1), &path, room()).await.unwrap();
    assert_eq!(shard.usage().inodes, 200, "all but the last put, and the root");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buffered_operations_are_synced_in_time() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    m.create(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &dir(root.path(), 1), room()).await.unwrap();
    // The first one after an opening is synced at once.
    put_one(&shard, "first").await;
    put_one(&shard, "k").await;
    assert!(shard.executor().log().age().is_some());
    let begun = shardfs_proto::types::clock::monotonic();
    while shard.executor().log().age().is_some() {
        // Five times what is promised, on a machine that is slow.
        assert!(begun.elapsed() < 5 * shardfs_proto::types::limits::UNSYNCED_AGE_MAX);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_of_another_creation_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    let (path, init) = (dir(root.path(), 1), ShardInit { id: id(1), ..init(None) });
    m.create_by(&path, &init, "one").unwrap();
    let shard = m.open(id(1), &path, room()).await.unwrap();
    put_one(&shard, "k").await;
    drop(shard);
    m.create_by(&path, &init, "one").unwrap();
    // One that an earlier version made says nothing.
    for origin in [Some("one"), None] {
        if origin.is_none() {
            std::fs::remove_file(path.join("origin")).unwrap();
        }
        let error = m.create_by(&path, &init, "two").unwrap_err();
        assert_eq!(error.reason(), Reason::AlreadyExists, "{error}");
        assert!(error.message().contains("another creation"), "{error}");
    }
    let shard = m.open(id(1), &path, room()).await.unwrap();
    assert_eq!(shard.usage().inodes, 2, "its content is there");
    drop(shard);
    // What is not whole is nobody's.
    m.delete(id(1), &path).await.unwrap();
    m.create_by(&path, &init, "two").unwrap();
}

/// What idle shards took of the budget would be flushed from those that are written, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_shards_that_hold_little_take_little_memory() {
    const SHARDS: u64 = 48;
    let root = tempfile::tempdir().unwrap();
    let m = manager(SHARDS as usize);
    let mut held = Vec::new();
    for n in 1..=SHARDS {
        m.create(&dir(root.path(), n), &ShardInit { id: id(n), ..init(None) }).unwrap();
        held.push(m.open(id(n), &dir(root.path(), n), room()).await.unwrap());
    }
    let idle = m.status().write_buffer_used_bytes / SHARDS;
    assert!(idle <= 64 << 10, "{idle} bytes each");
    for shard in &held {
        put_one(shard, "k").await;
    }
    let written = m.status().write_buffer_used_bytes / SHARDS;
    assert!((1..=1 << 20).contains(&written), "{written} bytes each");
}
