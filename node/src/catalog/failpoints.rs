//! Changes of shards that end between two of their steps, and a new node that finishes them.
//!
//! Failpoints are the process's: each test holds a `FailScenario`, which lets one run at a time.

use fail::FailScenario;
use shardfs_proto::types::ShardName;
use shardfs_proto::types::op::ShardState;

use super::tests::*;
use super::*;

/// A node that was killed at `point`, and what the store and the volume are afterwards.
async fn at(point: &str, change: impl AsyncFnOnce(&TestNode)) -> Bench {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    fail::cfg(point, "return").unwrap();
    change(&node).await;
    fail::remove(point);
    node.end().await;
    bench
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_was_reserved_or_built_only_can_be_had_again() {
    let scenario = FailScenario::setup();
    for point in ["catalog-new-reserved", "catalog-new-built"] {
        let request = new("photos");
        let bench = at(point, async |node| {
            let error = node.catalog.new_shard(&me(), request.clone()).await.unwrap_err();
            assert!(error.to_string().contains("failpoint"), "{point}: {error}");
        })
        .await;
        let node = bench.node("node-1").await;
        let info = node.catalog.new_shard(&me(), request.clone()).await.unwrap();
        assert_eq!(info.state, ShardState::Active, "{point}");
        let shard = node.catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
        put(&shard, "k").await.unwrap();
        drop(shard);
        assert_eq!(node.catalog.list_shards(&me(), true).await.unwrap().len(), 1, "{point}");
        node.end().await;
    }
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_was_sealed_only_takes_no_write_and_closes() {
    let scenario = FailScenario::setup();
    let mut id = None;
    let bench = at("catalog-close-sealed", async |node| {
        let info = node.catalog.new_shard(&me(), new("photos")).await.unwrap();
        node.catalog.close_shard(&me(), &by_id(info.id)).await.unwrap_err();
        id = Some(info.id);
    })
    .await;
    let id = by_id(id.unwrap());
    let node = bench.node("node-1").await;
    let shard = node.catalog.open_shard(&me(), &id, None).await.unwrap();
    assert_eq!(reason(put(&shard, "k").await), Reason::ShardReadOnly);
    drop(shard);
    assert_eq!(node.catalog.close_shard(&me(), &id).await.unwrap().state, ShardState::ReadOnly);
    node.end().await;
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_recorded_only_is_finished() {
    let scenario = FailScenario::setup();
    let mut id = None;
    let bench = at("catalog-delete-recorded", async |node| {
        let info = node.catalog.new_shard(&me(), new("photos")).await.unwrap();
        node.catalog.delete_shard(&me(), &by_id(info.id), false).await.unwrap_err();
        id = Some(info.id);
    })
    .await;
    let dir = bench.shard_dir("vol-1", id.unwrap());
    assert!(dir.exists());
    let node = bench.node("node-1").await;
    eventually("the bytes go", async || !dir.exists()).await;
    assert!(node.catalog.new_shard(&me(), new("photos")).await.is_ok(), "the name is free");
    node.end().await;
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_a_crash_cut_off_shows_the_moment_that_was_asked_for_or_is_not_there() {
    let scenario = FailScenario::setup();
    for (point, is_made) in [("catalog-new-reserved", false), ("catalog-new-built", true)] {
        let bench = Bench::new(&[("vol-1", "node-1")]).await;
        let node = bench.node("node-1").await;
        let shard = node.catalog.new_shard(&me(), new("photos")).await.unwrap().id;
        let open =
            async |node: &TestNode, id| node.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
        put(&*open(&node, shard).await, "before").await.unwrap();
        fail::cfg(point, "return").unwrap();
        let monday = || ShardName::new("monday").unwrap();
        let cut_off = node.catalog.snapshot_shard(&me(), &by_id(shard), monday(), "once".into()).await;
        assert!(cut_off.unwrap_err().to_string().contains("failpoint"), "{point}");
        fail::remove(point);
        assert!(node.catalog.list_snapshots(&me(), &by_id(shard), None).await.unwrap().is_empty(), "{point}");
        put(&*open(&node, shard).await, "after").await.unwrap();
        node.end().await;
        let node = bench.node("node-1").await;
        eventually("it is made or taken back", async || {
            let half = |record: &ShardRecord| record.state == StateWord::Creating;
            node.catalog.parts.view.shards(half).is_empty()
        })
        .await;
        let found = node.catalog.list_snapshots(&me(), &by_id(shard), None).await.unwrap();
        assert_eq!(found.len(), usize::from(is_made), "{point}");
        for snapshot in found {
            assert_eq!(open(&node, snapshot.id).await.usage().inodes, 2, "{point}: the root and one file");
        }
        // The call, once more.
        let made = node.catalog.snapshot_shard(&me(), &by_id(shard), monday(), "once".into()).await.unwrap();
        let inodes = open(&node, made.id).await.usage().inodes;
        assert_eq!(inodes, if is_made { 2 } else { 3 }, "{point}");
        node.end().await;
    }
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_was_cut_off_before_the_exchange_changed_nothing() {
    let scenario = FailScenario::setup();
    for point in ["catalog-rollback-recorded", "shard::replace::built"] {
        let monday = || ShardName::new("monday").unwrap();
        let mut id = None;
        let bench = at(point, async |node| {
            fail::remove(point);
            let shard = node.catalog.new_shard(&me(), new("photos")).await.unwrap().id;
            node.catalog.snapshot_shard(&me(), &by_id(shard), monday(), String::new()).await.unwrap();
            let open = node.catalog.open_shard(&me(), &by_id(shard), None).await.unwrap();
            put(&open, "since").await.unwrap();
            drop(open);
            fail::cfg(point, "return").unwrap();
            let cut_off = node.catalog.rollback_shard(&me(), &by_id(shard), monday(), "once".into()).await;
            assert!(cut_off.unwrap_err().to_string().contains("failpoint"), "{point}");
            id = Some(shard);
        })
        .await;
        let id = id.unwrap();
        let node = bench.node("node-1").await;
        eventually("it is found out", async || {
            node.catalog.parts.view.shard(id).is_some_and(|kept| kept.record.rollback.is_none())
        })
        .await;
        let inodes = async || {
            let shard = node.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
            shard.usage().inodes
        };
        assert_eq!(inodes().await, 2, "{point}");
        node.catalog.rollback_shard(&me(), &by_id(id), monday(), "once".into()).await.unwrap();
        assert_eq!(inodes().await, 1, "{point}");
        node.end().await;
    }
    scenario.teardown();
}
