//! Snapshots, clones and rollbacks, as records and as bytes.

use shardfs_proto::types::cluster::CloneShard;
use shardfs_proto::types::limits::SNAPSHOTS_PER_SHARD_MAX;

use super::*;
use crate::cluster::records::{Rollback, snapshot_key};
use crate::shard::{check, read};

fn clone_of(source: ShardId, label: &str) -> CloneShard {
    CloneShard { source: by_id(source), name: name(label), limit_bytes: None, request_id: String::new() }
}

/// The keys among these that a shard has; and that nothing is wrong with it.
async fn keys_in(node: &TestNode, id: ShardId, keys: &[&str]) -> Vec<String> {
    let shard = node.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
    let view = shard.read_view(None).await.unwrap();
    let (findings, _) = check::check_all(&view, true).unwrap();
    assert!(findings.is_empty(), "shard {id}: {findings:?}");
    let there = |key: &&&str| read::find_value(&view, &Key::new((**key).to_owned()).unwrap()).is_ok();
    keys.iter().filter(there).map(|key| (*key).to_owned()).collect()
}

async fn write(node: &TestNode, id: ShardId, key: &str) -> Result<()> {
    let shard = node.catalog.open_shard(&me(), &by_id(id), None).await?;
    put(&shard, key).await
}

async fn snapshot(node: &TestNode, id: ShardId, label: &str) -> Result<ShardInfo> {
    node.catalog.snapshot_shard(&me(), &by_id(id), name(label), String::new()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshots_whole_life() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let catalog = &node.catalog;
    let shard = catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    write(&node, shard, "a").await.unwrap();
    let request = async |id: &str| {
        catalog.snapshot_shard(&me(), &Selector::Name(name("photos")), name("photos"), id.into()).await
    };
    let made = request("once").await.unwrap();
    assert_eq!(
        (made.state, made.snapshot_of, made.limit_bytes),
        (ShardState::ReadOnly, Some(shard), Some(1 << 30))
    );
    write(&node, shard, "b").await.unwrap();
    assert_eq!(request("once").await.unwrap().id, made.id, "a retry");
    assert_eq!(reason(request("again").await), Reason::ShardExists);
    assert_eq!(keys_in(&node, made.id, &["a", "b"]).await, ["a"]);
    assert_eq!(keys_in(&node, shard, &["a", "b"]).await, ["a", "b"]);
    // It is none of the owner's shards, by name or in a listing; operators see it.
    let listed = catalog.list_shards(&me(), true).await.unwrap();
    assert_eq!(listed.iter().map(|info| info.id).collect::<Vec<_>>(), [shard]);
    assert_eq!(catalog.get_shard(&me(), &Selector::Name(name("photos"))).await.unwrap().id, shard);
    assert_eq!(catalog.list_all_shards(false).await.unwrap().len(), 2);
    let later = snapshot(&node, shard, "later").await.unwrap();
    let found = catalog.list_snapshots(&me(), &by_id(shard), None).await.unwrap();
    assert_eq!(found.iter().map(|info| info.name.to_string()).collect::<Vec<_>>(), ["later", "photos"]);
    let one = catalog.list_snapshots(&me(), &by_id(shard), Some(&name("later"))).await.unwrap();
    assert_eq!(one.iter().map(|info| info.id).collect::<Vec<_>>(), [later.id]);
    assert!(catalog.list_snapshots(&me(), &by_id(shard), Some(&name("none"))).await.unwrap().is_empty());
    // Whose it is, and what it refuses.
    let other = ClientId::new("other").unwrap();
    assert_eq!(reason(catalog.list_snapshots(&other, &by_id(shard), None).await), Reason::WrongOwner);
    assert_eq!(reason(catalog.open_shard(&other, &by_id(made.id), None).await), Reason::WrongOwner);
    let theirs = catalog.snapshot_shard(&other, &by_id(shard), name("theirs"), String::new()).await;
    assert_eq!(reason(theirs), Reason::WrongOwner);
    assert_eq!(reason(catalog.clone_shard(&other, clone_of(made.id, "theirs")).await), Reason::WrongOwner);
    let theirs = catalog.rollback_shard(&other, &by_id(shard), name("later"), String::new()).await;
    assert_eq!(reason(theirs), Reason::WrongOwner);
    assert_eq!(reason(write(&node, made.id, "c").await), Reason::ShardReadOnly);
    assert_eq!(reason(snapshot(&node, made.id, "of-a-snapshot").await), Reason::NotPermitted);
    assert_eq!(reason(catalog.rename_shard(&me(), &by_id(made.id), name("x")).await), Reason::NotPermitted);
    // Neither is deleted under the other.
    for only_if_empty in [true, false] {
        let refused = catalog.delete_shard(&me(), &by_id(shard), only_if_empty).await;
        assert_eq!(reason(refused), Reason::ShardHasSnapshots);
    }
    write(&node, shard, "c").await.unwrap();
    catalog.delete_shard(&me(), &by_id(made.id), false).await.unwrap();
    let dir = bench.shard_dir("vol-1", made.id);
    eventually("its bytes go", async || !dir.exists()).await;
    assert_eq!(keys_in(&node, later.id, &["a", "b", "c"]).await, ["a", "b"]);
    // The name is free again.
    let again = snapshot(&node, shard, "photos").await.unwrap();
    assert!(again.id > later.id);
    for id in [again.id, later.id, shard] {
        catalog.delete_shard(&me(), &by_id(id), false).await.unwrap();
    }
    assert!(catalog.list_all_shards(false).await.unwrap().is_empty());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_a_shard_like_others() {
    let bench = Bench::new(&[("vol-1", "node-1"), ("vol-2", "node-1")]).await;
    let node = bench.node("node-1").await;
    let catalog = &node.catalog;
    let mut request = new("photos");
    request.limit_bytes = Some(1 << 20);
    let shard = catalog.new_shard(&me(), request).await.unwrap();
    write(&node, shard.id, "a").await.unwrap();
    let snap = snapshot(&node, shard.id, "monday").await.unwrap();
    write(&node, shard.id, "b").await.unwrap();
    let old = catalog.clone_shard(&me(), clone_of(snap.id, "old")).await.unwrap();
    let now = catalog
        .clone_shard(&me(), CloneShard { limit_bytes: Some(2 << 20), ..clone_of(shard.id, "now") })
        .await
        .unwrap();
    for info in [&old, &now] {
        assert_eq!((info.state, info.snapshot_of), (ShardState::Active, None));
        assert_eq!(info.location.volume, shard.location.volume);
    }
    assert_eq!((old.limit_bytes, now.limit_bytes), (Some(1 << 20), Some(2 << 20)));
    assert_eq!(reason(catalog.clone_shard(&me(), clone_of(snap.id, "now")).await), Reason::ShardExists);
    write(&node, old.id, "c").await.unwrap();
    assert_eq!(keys_in(&node, old.id, &["a", "b", "c"]).await, ["a", "c"]);
    assert_eq!(keys_in(&node, now.id, &["a", "b", "c"]).await, ["a", "b"]);
    assert_eq!(keys_in(&node, snap.id, &["a", "b", "c"]).await, ["a"]);
    let names = catalog.list_shards(&me(), false).await.unwrap();
    assert_eq!(names.iter().map(|i| i.name.to_string()).collect::<Vec<_>>(), ["now", "old", "photos"]);
    // What they were made of may go; a closed one can be cloned as well.
    catalog.delete_shard(&me(), &by_id(snap.id), false).await.unwrap();
    catalog.delete_shard(&me(), &by_id(shard.id), false).await.unwrap();
    catalog.close_shard(&me(), &by_id(now.id)).await.unwrap();
    let open_again = catalog.clone_shard(&me(), clone_of(now.id, "open-again")).await.unwrap();
    write(&node, open_again.id, "d").await.unwrap();
    assert_eq!(keys_in(&node, open_again.id, &["a", "b", "c", "d"]).await, ["a", "b", "d"]);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_happens_once() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let catalog = &node.catalog;
    let shard = catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    write(&node, shard, "a").await.unwrap();
    let snap = snapshot(&node, shard, "monday").await.unwrap();
    write(&node, shard, "b").await.unwrap();
    let back = async |request: &str| {
        catalog.rollback_shard(&me(), &by_id(shard), name("monday"), request.into()).await
    };
    let none = catalog.rollback_shard(&me(), &by_id(shard), name("none"), String::new()).await;
    assert_eq!(reason(none), Reason::ShardNotFound);
    let info = back("first").await.unwrap();
    assert_eq!((info.id, info.name.as_str(), info.state), (shard, "photos", ShardState::Active));
    assert_eq!(keys_in(&node, shard, &["a", "b", "c"]).await, ["a"]);
    write(&node, shard, "c").await.unwrap();
    // The retry of a call whose answer was lost takes nothing back.
    back("first").await.unwrap();
    assert_eq!(keys_in(&node, shard, &["a", "b", "c"]).await, ["a", "c"]);
    back("second").await.unwrap();
    assert_eq!(keys_in(&node, shard, &["a", "b", "c"]).await, ["a"]);
    assert_eq!(keys_in(&node, snap.id, &["a", "b", "c"]).await, ["a"]);
    node.end().await;
    // Another process finds the same.
    let node = bench.node("node-1").await;
    assert_eq!(keys_in(&node, shard, &["a", "b", "c"]).await, ["a"]);
    node.catalog.close_shard(&me(), &by_id(shard)).await.unwrap();
    let closed = node.catalog.rollback_shard(&me(), &by_id(shard), name("monday"), String::new()).await;
    assert_eq!(reason(closed), Reason::ShardReadOnly);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_wait_for_a_rollback_and_lose_nothing_that_comes_after_it() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let shard = node.catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    snapshot(&node, shard, "empty").await.unwrap();
    let stop = CancellationToken::new();
    let count = Arc::new(AtomicU64::new(0));
    let writer = {
        let (catalog, stop, count) = (node.catalog.clone(), stop.clone(), count.clone());
        tokio::spawn(async move {
            let mut written = Vec::new();
            for n in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                let key = format!("k{n}");
                let put = async {
                    let shard = catalog.open_shard(&me(), &by_id(shard), None).await?;
                    put(&shard, &key).await
                };
                match put.await {
                    Ok(()) => {
                        written.push((clock::monotonic(), key));
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(error) => {
                        assert!(error.is_retryable(), "{error}");
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                }
            }
            written
        })
    };
    // The one that is under way may be on either side.
    let goes_on = async || {
        let before = count.load(Ordering::SeqCst);
        eventually("it is written", async || count.load(Ordering::SeqCst) > before + 10).await;
    };
    goes_on().await;
    let begun = clock::monotonic();
    node.catalog.rollback_shard(&me(), &by_id(shard), name("empty"), String::new()).await.unwrap();
    let ended = clock::monotonic();
    goes_on().await;
    stop.cancel();
    let written = writer.await.unwrap();
    let all: Vec<&str> = written.iter().map(|(_, key)| key.as_str()).collect();
    let there = keys_in(&node, shard, &all).await;
    for (at, key) in &written {
        let is_there = there.contains(key);
        assert!(!is_there || *at >= begun, "{key} was written before");
        assert!(is_there || *at <= ended, "{key} was written afterwards");
    }
    assert!(!there.is_empty() && there.len() < written.len(), "{} of {}", there.len(), written.len());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_shard_are_limited() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let shard = node.catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    let store = bench.store();
    for n in 0..SNAPSHOTS_PER_SHARD_MAX as u64 - 1 {
        let record = leave(&store, 100 + n, &format!("s{n}"), StateWord::Deleted).await;
        let record = ShardRecord { state: StateWord::ReadOnly, snapshot_of: Some(shard), ..record };
        let txn = Txn::new()
            .put(shard_key(record.id), records::encode(&record))
            .put(snapshot_key(shard, &record.name), record.id.to_string());
        store.txn(txn).await.unwrap();
    }
    eventually("all are seen", async || {
        node.catalog.parts.view.snapshots_of(shard).len() == SNAPSHOTS_PER_SHARD_MAX - 1
    })
    .await;
    snapshot(&node, shard, "the-last").await.unwrap();
    let error = snapshot(&node, shard, "one-more").await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotPermitted);
    assert!(error.message().contains("delete one first"), "{error}");
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_of_a_rollback_is_found_out() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let shard = node.catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    write(&node, shard, "a").await.unwrap();
    let snap = snapshot(&node, shard, "monday").await.unwrap().id;
    write(&node, shard, "b").await.unwrap();
    node.catalog.rollback_shard(&me(), &by_id(shard), name("monday"), "done".into()).await.unwrap();
    node.end().await;
    let store = bench.store();
    let beside = bench.shard_dir("vol-1", shard).with_file_name(format!("shard-{shard}.creating"));
    // Killed after the exchange; and, by another request, before it.
    for (request_id, done) in [("done", true), ("not-done", false)] {
        let (_, kv) = get(&store, shard_key(shard)).await.unwrap();
        let mut record: ShardRecord = records::decode(b"", &kv.unwrap().value).unwrap();
        record.rollback = Some(Rollback { snapshot: snap, request_id: request_id.into(), done: false });
        store.txn(Txn::new().put(shard_key(shard), records::encode(&record))).await.unwrap();
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(beside.join("CURRENT"), "left over").unwrap();
        let node = bench.node("node-1").await;
        eventually("it is noted", async || {
            let record = node.catalog.parts.view.shard(shard).unwrap().record;
            !record.is_rolling_back() && record.rollback.is_some() == done
        })
        .await;
        assert!(!beside.exists(), "{request_id}");
        assert_eq!(keys_in(&node, shard, &["a", "b"]).await, ["a"], "{request_id}");
        node.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_copied_while_a_node_of_the_version_before_may_serve_the_volume() {
    let bench = Bench::with_backups("vol-1", "node-1", &["old"]).await;
    let node = bench.node("node-1").await;
    let (catalog, store) = (&node.catalog, bench.store());
    let shard = catalog.new_shard(&me(), new("photos")).await.unwrap().id;
    let register = async |version: &str| {
        let id = NodeId::new("old").unwrap();
        let record = NodeRecord { id, version: version.into(), ..catalog.parts.record.clone() };
        let txn = Txn::new().put(records::node_key(&record.id), records::encode(&record));
        let revision = store.txn(txn).await.unwrap().revision;
        catalog.parts.view.wait_for(revision, PATIENCE).await.unwrap();
    };
    // It was not there yet.
    let monday = snapshot(&node, shard, "monday").await.unwrap();
    let (_, kv) = get(&store, shard_key(monday.id)).await.unwrap();
    let record: ShardRecord = records::decode(b"", &kv.unwrap().value).unwrap();
    assert_eq!(record.v, records::FORMAT_MAX, "its record is none that an earlier version reads");

    register("0.1.7").await;
    let back = async || catalog.rollback_shard(&me(), &by_id(shard), name("monday"), String::new()).await;
    let taken_out = async || {
        catalog
            .remove_volume(&VolumeId::new("vol-1").unwrap(), false, PATIENCE)
            .await
            .map_err(|e| (e.reason(), e))
    };
    for refused in [
        snapshot(&node, shard, "tuesday").await.unwrap_err(),
        catalog.clone_shard(&me(), clone_of(monday.id, "clone")).await.unwrap_err(),
        back().await.unwrap_err(),
        taken_out().await.unwrap_err().1,
    ] {
        assert_eq!(refused.reason(), Reason::Unsupported);
        assert!(refused.message().contains("node old has version 0.1.7"), "{refused}");
    }
    let found = catalog.list_snapshots(&me(), &by_id(shard), None).await.unwrap();
    assert_eq!(found.iter().map(|info| info.id).collect::<Vec<_>>(), [monday.id], "nothing was made");
    let volume = catalog.parts.view.volume(&VolumeId::new("vol-1").unwrap()).unwrap().record;
    assert!(!volume.leaving && volume.backups.len() == 1);

    register("0.2.0").await;
    snapshot(&node, shard, "tuesday").await.unwrap();
    catalog.clone_shard(&me(), clone_of(monday.id, "clone")).await.unwrap();
    back().await.unwrap();
    assert_eq!(taken_out().await.unwrap_err().0, Reason::ShardNotEmpty);
    node.end().await;
}
