//! Details of POSIX that the model leaves out.

use shardfs_proto::types::op::{NewInode, Operation, SetAttr, SetTime};
use shardfs_proto::types::{FileKind, InodeNo, Reason, Timestamp};

use super::harness::*;
use crate::shard::read;

const ROOT: InodeNo = InodeNo::ROOT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_group_id_is_passed_on() {
    let world = World::mem(None, 65536);
    let inode = NewInode { mode: 0o2775, uid: 1, gid: 55, unmasked_mode: None };
    let top = world.run(Operation::MakeDirectory { parent: ROOT, name: name("top"), inode }).await.unwrap();
    let top = top.attr.unwrap().inode;
    let sub = world.mkdir(top, "sub").await;
    assert_eq!((sub.gid, sub.mode), (55, 0o2755));
    let file = world.create(top, "file").await;
    assert_eq!((file.gid, file.mode), (55, 0o644));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_follow_changes() {
    let world = World::mem(None, 65536);
    let file = world.create(ROOT, "f").await;
    let old = Timestamp::new(-10, 5).unwrap();
    let set = SetAttr { atime: Some(SetTime::At(old)), mtime: Some(SetTime::At(old)), ..SetAttr::default() };
    let attr = world.run(Operation::SetAttr { inode: file.inode, set }).await.unwrap().attr.unwrap();
    assert_eq!((attr.atime, attr.mtime), (old, old));
    assert!(attr.ctime > file.ctime && attr.version > file.version);
    assert_eq!(attr.btime, file.btime);
    let written = world.write(file.inode, 0, b"x").await.unwrap().attr.unwrap();
    assert!(written.mtime > old && written.atime == old && written.ctime > attr.ctime);
    let linked = world
        .run(Operation::Link { inode: file.inode, new_parent: ROOT, new_name: name("g") })
        .await
        .unwrap()
        .attr
        .unwrap();
    assert!(linked.ctime > written.ctime && linked.mtime == written.mtime && linked.nlink == 2);
    let root = read::get_attr(&world.view().await, ROOT).unwrap();
    assert_eq!((root.mtime, root.ctime), (linked.ctime, linked.ctime));
    // Writing nothing changes nothing.
    let same = world.write(file.inode, 100, b"").await.unwrap().attr.unwrap();
    assert_eq!(same, linked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_id_bits_are_killed_on_request() {
    let world = World::mem(None, 65536);
    let file = world.create(ROOT, "f").await.inode;
    for (mode, want) in [(0o6755, 0o755), (0o6745, 0o2745), (0o644, 0o644)] {
        let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
        world.run(Operation::SetAttr { inode: file, set }).await.unwrap();
        let data = bytes::Bytes::from_static(b"x");
        let operation = Operation::Write { inode: file, offset: 0, data, append: false, kill_set_id: true };
        assert_eq!(world.run(operation).await.unwrap().attr.unwrap().mode, want);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_keeps_its_cookie() {
    let world = World::mem(None, 65536);
    for n in ["a", "b", "c"] {
        world.create(ROOT, n).await;
    }
    let cookies = async || {
        let page =
            read::read_directory(&world.view().await, ROOT, shardfs_proto::types::Cookie::new(0), 10, false)
                .unwrap();
        page.entries
            .iter()
            .map(|e| (String::from_utf8(e.name.to_vec()).unwrap(), e.cookie.get()))
            .collect::<Vec<_>>()
    };
    let before = cookies().await;
    world.run(rename(ROOT, "a", ROOT, "z")).await.unwrap();
    let moved = cookies().await;
    assert_eq!(moved[0], ("z".to_owned(), before[0].1));
    // A replaced name stays where it was; the other name is gone.
    world.run(rename(ROOT, "z", ROOT, "b")).await.unwrap();
    assert_eq!(cookies().await, [("b".to_owned(), before[1].1), before[2].clone()]);
    world.check("renames").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn xattrs_have_flags_and_bounds() {
    let world = World::rocks(None, 65536);
    let inode = world.create(ROOT, "f").await.inode;
    let set = |n: &'static str, size: usize, create_only: bool, replace_only: bool| {
        let value = vec![b'v'; size].into();
        Operation::SetXattr {
            inode,
            name: n.into(),
            value,
            create_only,
            replace_only,
            kill_set_group_id: false,
        }
    };
    let reason = async |operation| world.run(operation).await.unwrap_err().reason();
    assert_eq!(reason(set("user.a", 1, false, true)).await, Reason::NoAttribute);
    world.run(set("user.a", 1, true, false)).await.unwrap();
    assert_eq!(reason(set("user.a", 1, true, false)).await, Reason::AlreadyExists);
    world.run(set("user.a", 60_000, false, true)).await.unwrap();
    assert_eq!(reason(set("user.b", 65_537, false, false)).await, Reason::AttributeTooLarge);
    world.run(set("user.b", 65_000, false, false)).await.unwrap();
    assert_eq!(reason(set("user.c", 10_000, false, false)).await, Reason::AttributeTooLarge);
    let view = world.view().await;
    assert_eq!(read::get_xattr(&view, inode, b"user.a").unwrap().len(), 60_000);
    assert_eq!(read::list_xattrs(&view, inode).unwrap(), ["user.a", "user.b"]);
    world.run(Operation::RemoveXattr { inode, name: "user.a".into() }).await.unwrap();
    let gone = Operation::RemoveXattr { inode, name: "user.a".into() };
    assert_eq!(reason(gone).await, Reason::NoAttribute);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn depth_and_size_are_bounded() {
    let world = World::mem(None, 65536);
    let mut at = ROOT;
    let mut depth = 0;
    let error = loop {
        let inode = NewInode { mode: 0o755, uid: 1, gid: 2, unmasked_mode: None };
        match world.run(Operation::MakeDirectory { parent: at, name: name("d"), inode }).await {
            Ok(made) => at = made.attr.unwrap().inode,
            Err(error) => break error,
        }
        depth += 1;
        assert!(depth <= shardfs_proto::types::limits::DEPTH_MAX);
    };
    assert_eq!((error.reason(), depth), (Reason::NameTooLong, shardfs_proto::types::limits::DEPTH_MAX));
    let file = world.create(ROOT, "f").await.inode;
    let far = world.write(file, (16 << 40) - 1, b"xy").await.unwrap_err();
    assert_eq!(far.reason(), Reason::FileTooLarge);
    let end = world.write(file, (16 << 40) - 1, b"x").await.unwrap().attr.unwrap();
    assert_eq!(end.size, 16 << 40);
    assert_eq!(end.blocks, 128, "one chunk of 64 KiB is there");
    world.run(unlink(ROOT, "f")).await.unwrap();
    let directories = shardfs_proto::types::limits::DEPTH_MAX as u64;
    assert_eq!(
        world.shard().usage().used_bytes,
        directories * crate::shard::records::INODE_COST_BYTES,
        "only the directories are left"
    );
    world.check("a sparse file came and went").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_files_with_real_chunks_keep_their_bytes() {
    let world = World::rocks(None, 65536);
    let file = world.create(ROOT, "f").await.inode;
    let mut model = vec![0u8; 3 << 20];
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    world.write(file, 0, &model).await.unwrap();
    for _ in 0..300 {
        let at = rng.usize(..model.len() - 4096) & !511;
        let data: Vec<u8> = (0..4096).map(|_| rng.u8(..)).collect();
        model[at..at + 4096].copy_from_slice(&data);
        world.write(file, at as u64, &data).await.unwrap();
    }
    assert!(world.read(file).await == model, "seed {seed}");
    // More than 256 chunks: deleted as a range.
    world.write(file, 40 << 20, b"end").await.unwrap();
    let set = SetAttr { size: Some(100_000), ..SetAttr::default() };
    world.run(Operation::SetAttr { inode: file, set }).await.unwrap();
    world.write(file, 200_000, b"again").await.unwrap();
    model.truncate(100_000);
    model.resize(200_000, 0);
    model.extend_from_slice(b"again");
    assert!(world.read(file).await == model, "seed {seed}");
    world.check("big file").await;
    assert_eq!(world.create(ROOT, "g").await.kind, FileKind::Regular);
}
