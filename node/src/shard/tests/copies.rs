//! Copies of shards, and shards whose content is replaced.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, OpResult, Operation, ShardState};
use shardfs_proto::types::{
    ClientId, InodeNo, LockKind, LockRange, Reason, Result, Sequence, SessionId, Timestamp,
};

use super::harness::*;
use super::manager::{dir, id, manager, put_one, room};
use crate::shard::keys::Cf;
use crate::shard::{CopyInit, Mutation, PutStreamStart, Shard, ShardInit, ShardManager, check, read};

const ROOT: InodeNo = InodeNo::ROOT;

fn copy_init(n: u64, state: ShardState) -> CopyInit {
    CopyInit {
        id: id(n),
        owner: ClientId::new("others").unwrap(),
        state,
        limit_bytes: Some(1 << 30),
        created: Timestamp::new(77, 0).unwrap(),
    }
}

async fn run(shard: &Shard, session: Option<(SessionId, u64)>, operation: Operation) -> Result<OpResult> {
    let sequence = session.and_then(|(_, number)| Sequence::new(number));
    let session = session.map(|(session, _)| session);
    shard.mutate(Mutation { session, sequence, durability: Durability::Sync, operation }).await
}

fn lock(inode: InodeNo) -> Operation {
    Operation::SetLock { inode, owner: 1, pid: 1, range: LockRange::ALL, kind: Some(LockKind::Write) }
}

async fn value(shard: &Shard, k: &str) -> Option<Vec<u8>> {
    let view = shard.read_view(None).await.unwrap();
    let found = read::find_value(&view, &key(k)).ok()?;
    Some(read::content(&view, &found.record, 0, found.record.size).unwrap().to_vec())
}

/// Every key with its inode and content.
async fn all(shard: &Shard) -> Vec<(Bytes, InodeNo, Bytes)> {
    use crate::shard::list::{ListQuery, Listed, Listing, Step};
    let view = shard.read_view(None).await.unwrap();
    let mut listing = Listing::new(view.clone(), ROOT, &ListQuery::default()).unwrap();
    let mut found = Vec::new();
    loop {
        match listing.step().unwrap() {
            Step::Item(Listed::Key(line)) => {
                let size = read::get_attr(&view, line.inode).unwrap().size as u32;
                let content = read::read(&view, line.inode, 0, size).unwrap();
                found.push((line.key, line.inode, content));
            }
            Step::Item(Listed::CommonPrefix(_)) | Step::Pause => {}
            Step::End => return found,
        }
    }
}

async fn assert_clean(shard: &Shard, what: &str) {
    let (findings, _) = check::check_all(&shard.read_view(None).await.unwrap(), true).unwrap();
    assert!(findings.is_empty(), "{what}: {findings:?}");
}

async fn open(m: &Arc<ShardManager>, root: &Path, n: u64) -> Arc<Shard> {
    m.open(id(n), &dir(root, n), room()).await.unwrap()
}

async fn made(m: &Arc<ShardManager>, root: &Path) -> Arc<Shard> {
    m.create_by(&dir(root, 1), &ShardInit { id: id(1), ..init(None) }, "the first").unwrap();
    open(m, root, 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_a_shard_of_its_own_without_what_sessions_held() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(8);
    let source = made(&m, root.path()).await;
    let session = source.open_session("a mount".into()).await.unwrap();
    run(&source, Some((session, 1)), put("dir/small", b"s")).await.unwrap();
    run(&source, Some((session, 2)), put("dir/large", &[7; 300_000])).await.unwrap();
    let held = run(&source, Some((session, 3)), create(ROOT, "held")).await.unwrap().attr.unwrap().inode;
    source.register_open(session, held).await.unwrap();
    run(&source, Some((session, 4)), write(held, 0, &[9; 200_000])).await.unwrap();
    run(&source, Some((session, 5)), unlink(ROOT, "held")).await.unwrap();
    let locked = run(&source, None, create(ROOT, "locked")).await.unwrap().attr.unwrap().inode;
    run(&source, Some((session, 6)), lock(locked)).await.unwrap();
    run(&source, None, unlink(ROOT, "locked")).await.unwrap();
    run(&source, Some((session, 7)), lock(held)).await.unwrap();
    let start = PutStreamStart {
        key: key("streamed"),
        options: Default::default(),
        durability: Durability::Sync,
        session: None,
        sequence: None,
        size: None,
    };
    let mut streaming = source.put_content(start).await.unwrap();
    streaming.append(vec![5; 3 << 20].into()).await.unwrap();
    assert_clean(&source, "the source").await;

    let (closed, active) = (copy_init(2, ShardState::ReadOnly), copy_init(3, ShardState::Active));
    m.copy(&source, &dir(root.path(), 2), &closed, "two").await.unwrap();
    m.copy(&source, &dir(root.path(), 3), &active, "three").await.unwrap();
    // Once more changes nothing; another creation gets nothing.
    run(&source, None, put("later", b"l")).await.unwrap();
    m.copy(&source, &dir(root.path(), 2), &closed, "two").await.unwrap();
    let other = m.copy(&source, &dir(root.path(), 2), &closed, "not two").await.unwrap_err();
    assert_eq!(other.reason(), Reason::AlreadyExists);

    let (snapshot, clone) = (open(&m, root.path(), 2).await, open(&m, root.path(), 3).await);
    for (copy, init) in [(&snapshot, &closed), (&clone, &active)] {
        let header = copy.header();
        assert_eq!((header.id, &header.owner, header.state), (init.id, &init.owner, init.state));
        assert_eq!((header.limit_bytes, header.created), (init.limit_bytes, init.created));
        assert_clean(copy, "a copy").await;
        // Header and counters: no session, answer, orphan or staged content.
        assert_eq!(count(&copy.read_view(None).await.unwrap(), Cf::Sys), 2);
        assert_eq!(value(copy, "dir/large").await.unwrap(), [7; 300_000]);
        assert_eq!(value(copy, "later").await, None);
        assert_eq!(copy.usage().inodes, 4, "the root, a directory and two files");
        assert_eq!(
            run(copy, Some((session, 6)), put("x", b"")).await.unwrap_err().reason(),
            Reason::SessionUnknown
        );
    }
    assert_eq!(run(&snapshot, None, put("x", b"")).await.unwrap_err().reason(), Reason::ShardReadOnly);
    // Each goes its own way, also when files are rewritten and the others are gone.
    run(&clone, None, put("dir/large", &[8; 100_000])).await.unwrap();
    run(&source, None, Operation::DeleteValue { key: key("dir/small"), if_version: None }).await.unwrap();
    for shard in [&source, &clone] {
        shard.executor().store().reclaim().unwrap();
    }
    assert_eq!(value(&snapshot, "dir/large").await.unwrap(), [7; 300_000]);
    assert_eq!(value(&source, "dir/large").await.unwrap(), [7; 300_000]);
    assert_eq!(value(&clone, "dir/small").await.unwrap(), b"s");
    // What was under way in the source is not disturbed.
    streaming.commit().await.unwrap();
    assert_eq!(value(&source, "streamed").await.unwrap().len(), 3 << 20);
    drop((source, clone));
    for gone in [1, 3] {
        m.delete(id(gone), &dir(root.path(), gone)).await.unwrap();
    }
    assert_eq!(value(&snapshot, "dir/large").await.unwrap(), [7; 300_000]);
    assert_clean(&snapshot, "alone").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_under_load_holds_what_was_answered_and_a_prefix() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(16);
    let source = made(&m, root.path()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let writer = {
        let (source, stop, written) = (source.clone(), stop.clone(), written.clone());
        tokio::spawn(async move {
            let mut n = 0u64;
            while !stop.load(Ordering::SeqCst) {
                n += 1;
                // First the large one, then the one that says that it is there.
                run(&source, None, put(&format!("large-{}", n % 8), &vec![n as u8; 150_000])).await.unwrap();
                run(&source, None, put("n", &n.to_le_bytes())).await.unwrap();
                written.store(n, Ordering::SeqCst);
            }
        })
    };
    for copy in 2..10 {
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        let due = written.load(Ordering::SeqCst);
        let init = copy_init(copy, ShardState::ReadOnly);
        m.copy(&source, &dir(root.path(), copy), &init, "").await.unwrap();
        let at_most = written.load(Ordering::SeqCst) + 1;
        let shard = open(&m, root.path(), copy).await;
        assert_clean(&shard, "under load").await;
        let Some(bytes) = value(&shard, "n").await else {
            assert_eq!(due, 0);
            continue;
        };
        let n = u64::from_le_bytes(bytes.try_into().unwrap());
        assert!(due <= n && n <= at_most, "{n} is not in {due}..={at_most}");
        let large = value(&shard, &format!("large-{}", n % 8)).await.unwrap();
        assert!(large.iter().all(|byte| *byte == n as u8), "copy {copy}");
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    assert!(written.load(Ordering::SeqCst) > 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_brings_the_content_and_gives_no_number_again() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(8);
    let shard = made(&m, root.path()).await;
    run(&shard, None, put("kept", &[1; 100_000])).await.unwrap();
    run(&shard, None, put("changed", b"before")).await.unwrap();
    m.copy(&shard, &dir(root.path(), 2), &copy_init(2, ShardState::ReadOnly), "two").await.unwrap();
    let before = all(&shard).await;
    let session = shard.open_session("a mount".into()).await.unwrap();
    run(&shard, Some((session, 1)), put("changed", &[2; 50_000])).await.unwrap();
    let changed = before.iter().find(|(name, ..)| &name[..] == b"changed").unwrap().1;
    let new = run(&shard, Some((session, 2)), create(ROOT, "new")).await.unwrap().attr.unwrap();
    for (inode, number) in [(changed, 4), (new.inode, 5)] {
        run(&shard, Some((session, number)), lock(inode)).await.unwrap();
    }
    run(&shard, None, Operation::DeleteValue { key: key("kept"), if_version: None }).await.unwrap();
    let (sequence, header) = (shard.sequence(), shard.header());
    drop(shard);

    let snapshot = open(&m, root.path(), 2).await;
    m.replace(id(1), &dir(root.path(), 1), &snapshot, "the first time", room()).await.unwrap();
    let shard = open(&m, root.path(), 1).await;
    assert_eq!(all(&shard).await, before);
    assert_eq!(shard.header(), header, "it is the shard that it was");
    assert_clean(&shard, "replaced").await;
    assert!(shard.sequence() > sequence);
    let made_now = run(&shard, None, create(ROOT, "new")).await.unwrap().attr.unwrap();
    assert!(made_now.version > new.version && made_now.inode > new.inode, "{made_now:?} after {new:?}");
    // Its sessions go on: what was answered is answered again and stays undone.
    let again = run(&shard, Some((session, 2)), create(ROOT, "new")).await.unwrap().attr.unwrap();
    assert_eq!(again, new);
    run(&shard, Some((session, 1)), put("changed", &[2; 50_000])).await.unwrap();
    assert_eq!(value(&shard, "changed").await.unwrap(), b"before");
    run(&shard, Some((session, 3)), put("changed", b"after")).await.unwrap();
    assert_eq!(value(&shard, "changed").await.unwrap(), b"after");
    assert_clean(&shard, "replaced, and written to").await;
    let another = shard.open_session("again".into()).await.unwrap();
    assert!(another > session);
    // On their locks programs rely as before.
    let refused = run(&shard, Some((another, 1)), lock(changed)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::LockConflict);
    drop(shard);
    let settle = async |mark| m.settle_replacement(id(1), &dir(root.path(), 1), mark).await.unwrap();
    assert!(settle("the first time").await);
    assert!(!settle("another time").await);
    // A retry of its creation finds it; nothing lies beside it; the snapshot is as it was.
    m.create_by(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }, "the first").unwrap();
    let mut there: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    there.sort();
    assert_eq!(there, ["shard-1", "shard-2"]);
    assert_eq!(all(&snapshot).await, before);
    assert_clean(&snapshot, "the snapshot").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_left_of_a_copy_is_in_nobodys_way() {
    let root = tempfile::tempdir().unwrap();
    let m = manager(8);
    let source = made(&m, root.path()).await;
    put_one(&source, "k").await;
    for left in ["shard-2.creating", "shard-2.creating.tmp"] {
        std::fs::create_dir(root.path().join(left)).unwrap();
        std::fs::write(root.path().join(left).join("000001.sst"), b"half").unwrap();
    }
    m.copy(&source, &dir(root.path(), 2), &copy_init(2, ShardState::Active), "").await.unwrap();
    assert_eq!(value(&*open(&m, root.path(), 2).await, "k").await.unwrap(), b"value");
    for left in ["shard-3.creating", "shard-3.creating.tmp"] {
        std::fs::create_dir(root.path().join(left)).unwrap();
    }
    m.delete(id(3), &dir(root.path(), 3)).await.unwrap();
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2);
}
