//! Changes of shards that end between two of their steps, and a new node that finishes them.
//!
//! Failpoints are the process's: each test holds a `FailScenario`, which lets one run at a time.

use fail::FailScenario;
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
