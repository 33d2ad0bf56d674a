//! Values by key: conditions, indexes, batches, streams.

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, IndexValue, Operation, PutOptions};
use shardfs_proto::types::{InodeNo, Reason, Version};

use super::harness::*;
use crate::shard::keys::{self, Cf};
use crate::shard::store::Reader;
use crate::shard::{PutStreamStart, read};

fn start(k: &str, size: Option<u64>) -> PutStreamStart {
    PutStreamStart {
        key: key(k),
        options: PutOptions::default(),
        durability: Durability::Sync,
        session: None,
        sequence: None,
        size,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_hold_or_nothing_changes() {
    let world = World::mem(None, 4096);
    let put_if = |value: &'static str, if_absent: bool, if_version: Option<Version>| {
        let mut item = item("k/v", value.as_bytes());
        item.options = PutOptions { if_absent, if_version, ..PutOptions::default() };
        Operation::PutValue { item }
    };
    let nothing = world.run(put_if("x", false, Some(Version::new(3)))).await.unwrap_err();
    assert_eq!(nothing.reason(), Reason::VersionMismatch);
    assert_eq!(world.shard().usage().inodes, 1, "the directory was not made");
    let first = world.run(put_if("1", true, None)).await.unwrap().meta.unwrap();
    assert_eq!(world.run(put_if("2", true, None)).await.unwrap_err().reason(), Reason::AlreadyExists);
    let second = world.run(put_if("2", false, Some(first.attr.version))).await.unwrap().meta.unwrap();
    assert_eq!(second.attr.inode, first.attr.inode);
    let stale = world.run(put_if("3", false, Some(first.attr.version))).await.unwrap_err();
    assert_eq!(stale.reason(), Reason::VersionMismatch);
    let delete = |if_version| Operation::DeleteValue { key: key("k/v"), if_version };
    let stale = world.run(delete(Some(first.attr.version))).await.unwrap_err();
    assert_eq!(stale.reason(), Reason::VersionMismatch);
    let gone = world.run(delete(Some(second.attr.version))).await.unwrap();
    assert_eq!(gone.pruned_directories, 1);
    assert_eq!(world.shard().usage().inodes, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_made_by_hand_are_not_pruned() {
    let world = World::mem(None, 4096);
    let made = world.mkdir(InodeNo::ROOT, "made").await.inode;
    world.run(put("made/auto/x", b"1")).await.unwrap();
    let delete = Operation::DeleteValue { key: key("made/auto/x"), if_version: None };
    assert_eq!(world.run(delete.clone()).await.unwrap().pruned_directories, 1);
    assert!(read::get_attr(&world.view().await, made).is_ok());
    // chmod of a directory is a sign that somebody wants it.
    world.run(put("made/auto/x", b"1")).await.unwrap();
    let auto = read::lookup(&world.view().await, made, b"auto").unwrap().inode;
    let set = shardfs_proto::types::op::SetAttr { mode: Some(0o700), ..Default::default() };
    world.run(Operation::SetAttr { inode: auto, set }).await.unwrap();
    assert_eq!(world.run(delete).await.unwrap().pruned_directories, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_entries_follow_the_value() {
    for world in World::both(None, 4096) {
        let entries = async || {
            let mut found = Vec::new();
            let view = world.view().await;
            view.scan_prefix(Cf::Index, b"", &mut |key, _| {
                let (name, value, _) = keys::parse_index(key)?;
                found.push((name.to_owned(), value));
                Ok(std::ops::ControlFlow::Continue(()))
            })
            .unwrap();
            found
        };
        let with = |n: i64| {
            let mut item = item("v", b"x");
            item.options.indexes = [
                ("n".to_owned(), IndexValue::Integer(n)),
                ("t".to_owned(), IndexValue::Text("same".to_owned())),
            ]
            .into();
            Operation::PutValue { item }
        };
        world.run(with(5)).await.unwrap();
        world.run(with(-5)).await.unwrap();
        let text = ("t".to_owned(), IndexValue::Text("same".to_owned()));
        assert_eq!(entries().await, [("n".to_owned(), IndexValue::Integer(-5)), text]);
        world.check("indexes").await;
        world.run(unlink(InodeNo::ROOT, "v")).await.unwrap();
        assert_eq!(entries().await, []);
        let mut bad = item("v", b"x");
        bad.options.indexes = [("a\0b".to_owned(), IndexValue::Integer(1))].into();
        let error = world.run(Operation::PutValue { item: bad }).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_are_atomic_or_by_item() {
    for world in World::both(None, 4096) {
        world.mkdir(InodeNo::ROOT, "dir").await;
        let items = vec![item("a", b"1"), item("dir", b"2"), item("b", &[3; 9000]), item("a", b"4")];
        let atomic = Operation::PutValues { items: items.clone(), atomic: true };
        assert_eq!(world.run(atomic).await.unwrap_err().reason(), Reason::IsDirectory);
        assert_eq!(world.shard().usage().inodes, 2);
        let each = world.run(Operation::PutValues { items, atomic: false }).await.unwrap().results;
        assert_eq!(each[1].as_ref().unwrap_err().reason(), Reason::IsDirectory);
        let (first, last) = (each[0].as_ref().unwrap(), each[3].as_ref().unwrap());
        assert_eq!(first.attr.inode, last.attr.inode);
        assert!(first.attr.version < last.attr.version);
        let b = each[2].as_ref().unwrap().attr.inode;
        assert_eq!(world.read(b).await, [3; 9000]);
        assert_eq!(world.read(first.attr.inode).await, b"4");
        world.check("batches").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_become_visible_as_a_whole() {
    for mut world in World::both(None, 65536) {
        world.run(put("s", b"old")).await.unwrap();
        let mut model = Vec::new();
        let mut writer = world.shard().put_content(start("s", None)).await.unwrap();
        for i in 0..50u32 {
            let piece: Vec<u8> = (0..100_003u32).map(|j| (i * 7 + j) as u8).collect();
            model.extend_from_slice(&piece);
            writer.append(piece.into()).await.unwrap();
        }
        let file = read::lookup(&world.view().await, InodeNo::ROOT, b"s").unwrap().inode;
        assert_eq!(world.read(file).await, b"old");
        let meta = writer.commit().await.unwrap();
        assert_eq!((meta.attr.inode, meta.attr.size), (file, model.len() as u64));
        assert!(read_all(&world, file).await == model);
        world.check("after a stream").await;
        world.reopen();
        assert!(read_all(&world, file).await == model);
        let inode = crate::shard::records::INODE_COST_BYTES;
        assert_eq!(world.shard().usage().used_bytes, model.len() as u64 + inode);
        world.check("after a stream, reopened").await;
    }
}

async fn read_all(world: &World, file: InodeNo) -> Vec<u8> {
    let view = world.view().await;
    let size = read::get_attr(&view, file).unwrap().size;
    let pieces = (0..size).step_by(1 << 20).map(|at| read::read(&view, file, at, 1 << 20).unwrap());
    pieces.collect::<Vec<_>>().concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_streams_leave_nothing() {
    for world in World::both(None, 65536) {
        let big = Bytes::from(vec![1u8; 3 << 20]);
        let mut writer = world.shard().put_content(start("x/y", None)).await.unwrap();
        writer.append(big.clone()).await.unwrap();
        drop(writer);
        let mut writer = world.shard().put_content(start("x/y", Some(10))).await.unwrap();
        assert_eq!(writer.append(big.clone()).await.unwrap_err().reason(), Reason::InvalidArgument);
        drop(writer);
        let mut writer = world.shard().put_content(start("x/y", Some(4 << 20))).await.unwrap();
        writer.append(big.clone()).await.unwrap();
        assert_eq!(writer.commit().await.unwrap_err().reason(), Reason::InvalidArgument);
        // Whoever asks later finds what was dropped gone.
        world.create(InodeNo::ROOT, "f").await;
        world.check("dropped streams").await;
        assert_eq!(count(&world.view().await, Cf::Chunk), 0);
        // A crash in the middle: what was staged goes at the next open.
        let mut writer = world.shard().put_content(start("x/y", None)).await.unwrap();
        writer.append(big).await.unwrap();
        assert!(count(&world.view().await, Cf::Chunk) > 40);
        let crashed = world.crash();
        drop(writer);
        assert_eq!(count(&crashed.view().await, Cf::Chunk), 0);
        assert_eq!(count(&crashed.view().await, Cf::Sys), 2);
        crashed.check("after a crash").await;
        world.create(InodeNo::ROOT, "g").await;
        world.check("after the writer was dropped").await;
    }
}
