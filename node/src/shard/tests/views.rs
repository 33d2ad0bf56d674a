//! Checkpoints that are opened as views, while the shard goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use shardfs_proto::types::Key;
use shardfs_proto::types::op::{Durability, Operation, PutItem, PutOptions};

use super::harness::{init, shard_id};
use super::manager::{manager, room};
use crate::shard::{Mutation, read};

fn put(key: &str, value: Bytes) -> Mutation {
    let item = PutItem { key: Key::new(key.to_owned()).unwrap(), value, options: PutOptions::default() };
    Mutation {
        session: None,
        sequence: None,
        durability: Durability::Sync,
        operation: Operation::PutValue { item },
    }
}

/// The log of a checkpoint is not empty then, and ends anywhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_made_under_load_is_a_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(4);
    let path = dir.path().join("shard");
    manager.create(&path, &init(None)).unwrap();
    let shard = manager.open(shard_id(), &path, room()).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (shard, stop) = (shard.clone(), stop.clone());
        tokio::spawn(async move {
            let mut n = 0u64;
            while !stop.load(Ordering::SeqCst) {
                n += 1;
                // First the large one, then the one that says that it is there.
                let content = Bytes::from(vec![n as u8; 200_000]);
                shard.mutate(put(&format!("large-{}", n % 8), content)).await.unwrap();
                shard.mutate(put("n", Bytes::copy_from_slice(&n.to_le_bytes()))).await.unwrap();
            }
        })
    };
    let mut before = 0;
    for number in 0..8 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let due = shard.sequence();
        let view = dir.path().join(format!("view-{number}"));
        shard.checkpoint(view.clone()).await.unwrap();
        let files = || -> Vec<_> {
            let entries = std::fs::read_dir(&view).unwrap();
            let mut files: Vec<_> =
                entries.map(|e| e.unwrap()).map(|e| (e.file_name(), e.metadata().unwrap().len())).collect();
            files.sort();
            files
        };
        let made = files();
        let opened = manager.open_published(shard_id(), view.clone(), Box::new(())).await.unwrap();
        let opened = Arc::new(opened);
        assert!(opened.sequence() >= due && opened.sequence() > before, "what was answered is in it");
        before = opened.sequence();
        let reader = opened.read_view();
        if let Ok(value) = read::find_value(&reader, &Key::new("n").unwrap()) {
            let n = read::content(&reader, &value.record, 0, 8).unwrap();
            let n = u64::from_le_bytes(n[..].try_into().unwrap());
            let key = Key::new(format!("large-{}", n % 8)).unwrap();
            let large = read::find_value(&reader, &key).unwrap();
            let content = read::content(&reader, &large.record, 0, 200_000).unwrap();
            assert!(content.iter().all(|byte| *byte == n as u8), "view {number}");
        }
        drop((reader, opened));
        assert_eq!(files(), made, "reading a view writes nothing");
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    assert!(before > 0);
}
