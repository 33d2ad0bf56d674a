//! Snapshots over gRPC: made once, read, rolled back to, cloned, deleted.

use futures::StreamExt;
use shardfs_proto::types::Reason;
use shardfs_proto::wire;
use tonic::Code;

use super::support::{Node, reason, selector};
use super::{attr, check, get, put};

#[tokio::test(flavor = "multi_thread")]
async fn shards_are_snapshotted_rolled_back_and_cloned() {
    let node = Node::start().await;
    let shard = node.new_shard("photos").await;
    let mut storage = node.storage();
    storage.put(put(shard, "k", "then")).await.unwrap();
    let request = wire::SnapshotShardRequest {
        shard: selector(shard),
        name: "monday".into(),
        request_id: "once".into(),
    };
    let made = storage.snapshot_shard(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        (made.name.as_str(), made.state(), made.snapshot_of),
        ("monday", wire::ShardState::ReadOnly, shard)
    );
    storage.put(put(shard, "k", "now")).await.unwrap();
    assert_eq!(storage.snapshot_shard(request.clone()).await.unwrap().into_inner().id, made.id);
    let other = wire::SnapshotShardRequest { request_id: "twice".into(), ..request.clone() };
    let exists = storage.snapshot_shard(other).await.unwrap_err();
    assert_eq!((exists.code(), reason(&exists)), (Code::AlreadyExists, Reason::ShardExists));
    for bad in ["", "a/b", ".."] {
        let bad =
            wire::SnapshotShardRequest { name: bad.into(), request_id: String::new(), ..request.clone() };
        assert_eq!(reason(&storage.snapshot_shard(bad).await.unwrap_err()), Reason::InvalidArgument);
    }
    assert_eq!(storage.get(get(made.id, "k")).await.unwrap().into_inner().value, "then");
    let refused = storage.put(put(made.id, "k", "x")).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::ShardReadOnly);
    check(&node, made.id).await;

    let list =
        |shard: u64, name: &str| wire::ListSnapshotsRequest { shard: selector(shard), name: name.into() };
    for (name, count) in [("", 1), ("monday", 1), ("tuesday", 0)] {
        let found = storage.list_snapshots(list(shard, name)).await.unwrap().into_inner();
        assert_eq!(found.count().await, count, "{name:?}");
    }
    let theirs = node.storage_as(Some("somebody-else")).list_snapshots(list(shard, "")).await;
    let theirs = theirs.map(|_| ()).unwrap_err();
    assert_eq!((theirs.code(), reason(&theirs)), (Code::PermissionDenied, Reason::WrongOwner));
    let shards = storage.list_shards(wire::ListShardsRequest::default()).await.unwrap().into_inner();
    assert_eq!(shards.count().await, 1);
    let all = node.admin().list_all_shards(wire::ListAllShardsRequest::default()).await.unwrap().into_inner();
    let of: Vec<u64> = all.map(|shard| shard.unwrap().snapshot_of).collect().await;
    assert_eq!(of, [0, shard]);

    let clone = wire::CloneShardRequest {
        source: selector(made.id),
        name: "old".into(),
        limit_bytes: 1 << 20,
        request_id: "clone".into(),
    };
    let cloned = storage.clone_shard(clone.clone()).await.unwrap().into_inner();
    assert_eq!(
        (cloned.state(), cloned.limit_bytes, cloned.snapshot_of),
        (wire::ShardState::Active, 1 << 20, 0)
    );
    assert_eq!(storage.clone_shard(clone).await.unwrap().into_inner().id, cloned.id);
    storage.put(put(cloned.id, "k2", "mine")).await.unwrap();
    check(&node, cloned.id).await;

    let session = node.open_session(shard).await;
    let back = wire::RollbackShardRequest {
        shard: selector(shard),
        snapshot: "monday".into(),
        request_id: "back".into(),
    };
    let stale = attr(&storage.get(get(shard, "k")).await.unwrap().into_inner().meta).version;
    assert_eq!(storage.rollback_shard(back.clone()).await.unwrap().into_inner().id, shard);
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value, "then");
    let after = attr(&storage.put(put(shard, "k", "after")).await.unwrap().into_inner().meta).version;
    assert!(after > stale, "{after} after {stale}");
    storage.rollback_shard(back.clone()).await.unwrap();
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value, "after");
    // Sessions go on; and a change that was answered before is not made again.
    let write_id = |sequence| Some(wire::WriteId { session_id: session, sequence });
    let before = wire::PutRequest { write_id: write_id(1), ..put(shard, "k", "before the next") };
    storage.put(before.clone()).await.unwrap();
    let next = wire::RollbackShardRequest { request_id: "next".into(), ..back.clone() };
    storage.rollback_shard(next).await.unwrap();
    storage.put(before).await.unwrap();
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value, "then");
    storage.put(wire::PutRequest { write_id: write_id(2), ..put(shard, "k", "x") }).await.unwrap();
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value, "x");
    let none = wire::RollbackShardRequest { snapshot: "tuesday".into(), ..back };
    assert_eq!(reason(&storage.rollback_shard(none).await.unwrap_err()), Reason::ShardNotFound);
    check(&node, shard).await;

    let delete = |id| wire::DeleteShardRequest { shard: selector(id), only_if_empty: false };
    let has = storage.delete_shard(delete(shard)).await.unwrap_err();
    assert_eq!((has.code(), reason(&has)), (Code::FailedPrecondition, Reason::ShardHasSnapshots));
    for id in [made.id, shard] {
        storage.delete_shard(delete(id)).await.unwrap();
    }
    assert_eq!(storage.get(get(cloned.id, "k")).await.unwrap().into_inner().value, "then");
    node.stop().await;
}
