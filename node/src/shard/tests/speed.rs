//! Figures for people: `cargo test --release -p shardfs-node speed -- --ignored --nocapture`.

use std::sync::Arc;
use std::time::Instant;

use shardfs_proto::types::op::{Durability, Operation};
use shardfs_proto::types::{InodeNo, Sequence};

use super::harness::*;
use crate::shard::Mutation;

async fn measure(
    what: &str,
    workers: u64,
    each: u64,
    durability: Durability,
    make: fn(u64, u64) -> Operation,
) {
    let world = World::rocks(None, 65536);
    let begun = Instant::now();
    let tasks: Vec<_> = (0..workers)
        .map(|w| {
            let shard = world.shard();
            tokio::spawn(async move {
                let session = Some(shard.open_session("speed".into()).await.unwrap());
                for i in 0..each {
                    let sequence = Sequence::new(i + 1);
                    let operation = make(w, i);
                    Arc::clone(&shard)
                        .mutate(Mutation { session, sequence, durability, operation })
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let took = begun.elapsed();
    let count = workers * each;
    println!(
        "{what}, {workers} workers: {:.0} a second, {:?} each",
        count as f64 / took.as_secs_f64(),
        took / count as u32
    );
    world.check(what).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn speed_of_small_operations() {
    let create = |w: u64, i: u64| create(InodeNo::ROOT, &format!("{w}-{i}"));
    measure("create, buffered", 1, 20_000, Durability::Buffered, create).await;
    measure("create, sync", 1, 1000, Durability::Sync, create).await;
    measure("create, sync", 8, 1000, Durability::Sync, create).await;
    measure("create, sync", 64, 500, Durability::Sync, create).await;
    let put = |w: u64, i: u64| put(&format!("d{w}/{i}"), &[7; 1000]);
    measure("put 1000 bytes, buffered", 1, 20_000, Durability::Buffered, put).await;
    measure("put 1000 bytes, sync", 64, 500, Durability::Sync, put).await;
    let big = |w: u64, i: u64| super::harness::put(&format!("d{w}/{}", i % 50), &[7; 1 << 20]);
    measure("put 1 MiB, buffered", 4, 200, Durability::Buffered, big).await;
}
