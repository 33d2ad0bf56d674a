//! The shard's limit and the volume's room.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use shardfs_proto::types::op::{AllocateMode, Durability, Operation, PutOptions, SetAttr};
use shardfs_proto::types::{InodeNo, Reason};

use super::harness::*;
use crate::shard::PutStreamStart;
use crate::shard::records::INODE_COST_BYTES;

const ROOT: InodeNo = InodeNo::ROOT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_is_exact() {
    for mut world in World::both(Some(100_000 + 2 * INODE_COST_BYTES), 65536) {
        let file = world.create(ROOT, "f").await.inode;
        world.write(file, 0, &[1; 90_000]).await.unwrap();
        let other = world.create(ROOT, "g").await.inode;
        let over = world.write(other, 0, &[2; 10_001]).await.unwrap_err();
        assert_eq!(over.reason(), Reason::ShardFull);
        assert!(over.message().contains("98.7 KiB") && over.message().contains("shard 7"), "{over}");
        assert!(world.read(other).await.is_empty());
        world.write(other, 0, &[2; 10_000]).await.unwrap();
        assert_eq!(world.shard().usage().used_bytes, 100_000 + 2 * INODE_COST_BYTES);
        // What does not grow goes on.
        world.write(file, 80_000, &[3; 10_000]).await.unwrap();
        world.run(rename(ROOT, "g", ROOT, "h")).await.unwrap();
        let second = Operation::Link { inode: file, new_parent: ROOT, new_name: name("second") };
        for growing in [create(ROOT, "empty"), second] {
            assert_eq!(world.run(growing).await.unwrap_err().reason(), Reason::ShardFull);
        }
        assert_eq!(world.run(put("v", b"x")).await.unwrap_err().reason(), Reason::ShardFull);
        let operation = Operation::Allocate {
            inode: file,
            offset: 0,
            length: 100_000,
            mode: AllocateMode::Allocate { keep_size: true },
            kill_set_id: false,
        };
        assert_eq!(world.run(operation).await.unwrap_err().reason(), Reason::ShardFull);
        world.reopen();
        assert_eq!(world.shard().usage().used_bytes, 100_000 + 2 * INODE_COST_BYTES);
        world.run(unlink(ROOT, "h")).await.unwrap();
        world.run(put("v", &[4; 10_000])).await.unwrap();
        let set = SetAttr { size: Some(0), ..SetAttr::default() };
        world.run(Operation::SetAttr { inode: file, set }).await.unwrap();
        assert_eq!(world.shard().usage().used_bytes, 10_000 + 2 * INODE_COST_BYTES);
        world.check("limits").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn staged_bytes_count_against_the_limit() {
    let world = World::mem(Some((4 << 20) + INODE_COST_BYTES), 65536);
    let start = |k: &str| PutStreamStart {
        key: key(k),
        options: PutOptions::default(),
        durability: Durability::Sync,
        session: None,
        sequence: None,
        size: None,
    };
    let mut first = world.shard().put_content(start("a")).await.unwrap();
    first.append(Bytes::from(vec![1; 3 << 20])).await.unwrap();
    let mut second = world.shard().put_content(start("b")).await.unwrap();
    let error = second.append(Bytes::from(vec![1; 2 << 20])).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ShardFull);
    assert_eq!(world.run(put("c", &[0; (1 << 20) + 1])).await.unwrap_err().reason(), Reason::ShardFull);
    drop(second);
    first.append(Bytes::from(vec![1; 1 << 20])).await.unwrap();
    first.commit().await.unwrap();
    assert_eq!(world.shard().usage().used_bytes, (4 << 20) + INODE_COST_BYTES);
    assert_eq!(world.run(put("c", b"1")).await.unwrap_err().reason(), Reason::ShardFull);
    // In the place of itself there is no room for a second copy while it is staged.
    let mut again = world.shard().put_content(start("a")).await.unwrap();
    assert_eq!(again.append(Bytes::from(vec![1; 2 << 20])).await.unwrap_err().reason(), Reason::ShardFull);
    drop(again);
    world.run(put("a", b"small")).await.unwrap();
    assert_eq!(world.shard().usage().used_bytes, 5 + INODE_COST_BYTES);
    world.check("staged").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_volume_refuses_growth_and_lets_deletes_through() {
    for world in World::both(None, 65536) {
        let file = world.create(ROOT, "f").await.inode;
        world.write(file, 0, &[1; 100_000]).await.unwrap();
        world.room.0.store(200_000, Ordering::Relaxed);
        world.write(file, 100_000, &[1; 100_000]).await.unwrap();
        // The figure is old, but what was written since is known.
        let full = world.write(file, 200_000, &[1; 100_000]).await.unwrap_err();
        assert_eq!(full.reason(), Reason::VolumeFull);
        world.room.0.store(0, Ordering::Relaxed);
        assert_eq!(world.run(create(ROOT, "g")).await.unwrap_err().reason(), Reason::VolumeFull);
        world.run(rename(ROOT, "f", ROOT, "h")).await.unwrap();
        world.run(unlink(ROOT, "h")).await.unwrap();
        world.room.0.store(1 << 30, Ordering::Relaxed);
        world.create(ROOT, "g").await;
        world.check("full").await;
    }
}
