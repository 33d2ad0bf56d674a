//! Sessions: exactly once, held open after unlink, visibility, crashes.

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, NewInode, OpResult, Operation, Repetition};
use shardfs_proto::types::{FileKind, InodeNo, Reason, Result, Sequence, SessionId, Version};

use super::harness::*;
use crate::shard::keys::Cf;
use crate::shard::{Mutation, read};

const ROOT: InodeNo = InodeNo::ROOT;

fn create_open(n: &str) -> Operation {
    Operation::Create {
        parent: ROOT,
        name: name(n),
        kind: FileKind::Regular,
        inode: NewInode { mode: 0o600, uid: 1, gid: 2, unmasked_mode: None },
        rdev: 0,
        existing_ok: true,
        open: true,
    }
}

async fn session(world: &World) -> SessionId {
    world.shard().open_session("test".into()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_gets_the_first_answer_also_after_a_restart() {
    for mut world in World::both(None, 4096) {
        let id = session(&world).await;
        let s = Some(id);
        let first = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap();
        let again = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap();
        assert_eq!(format!("{again:?}"), format!("{first:?}"));
        assert_eq!(
            world.run_as(s, Some(2), create(ROOT, "f")).await.unwrap_err().reason(),
            Reason::AlreadyExists
        );
        world.run_as(s, Some(3), unlink(ROOT, "f")).await.unwrap();
        // The failure stays a failure, though the name is free now.
        assert_eq!(
            world.run_as(s, Some(2), create(ROOT, "f")).await.unwrap_err().reason(),
            Reason::AlreadyExists
        );
        world.run_as(s, Some(3), unlink(ROOT, "f")).await.unwrap();
        world.reopen();
        let again = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap();
        assert_eq!(format!("{again:?}"), format!("{first:?}"));
        world.run_as(s, Some(3), unlink(ROOT, "f")).await.unwrap();
        assert_eq!(world.shard().usage().inodes, 1);
        // A later mutation takes the slot.
        world.run_as(s, Some(1 + 1024), create(ROOT, "g")).await.unwrap();
        let stale = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap_err();
        assert_eq!(stale.reason(), Reason::SequenceStale);
        world.reopen();
        let stale = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap_err();
        assert_eq!(stale.reason(), Reason::SequenceStale);
        world.check("retries").await;
        world.shard().close_session(id).await.unwrap();
        let unknown = world.run_as(s, Some(9), create(ROOT, "h")).await.unwrap_err();
        assert_eq!(unknown.reason(), Reason::SessionUnknown);
        assert_eq!(count(&world.view().await, Cf::Sys), 2, "a session leaves nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_given_to_two_mutations_is_refused() {
    for mut world in World::both(None, 4096) {
        let s = Some(session(&world).await);
        let write = |ino, data: &'static [u8]| Operation::Write {
            inode: ino,
            offset: 0,
            data: Bytes::from_static(data),
            append: false,
            kill_set_id: false,
        };
        let file = world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap().attr.unwrap().inode;
        world.run_as(s, Some(2), write(file, b"one")).await.unwrap();
        let error_of = |outcome: Result<OpResult>| outcome.unwrap_err();
        for _ in 0..2 {
            for other in [write(file, b"two"), create(ROOT, "g"), unlink(ROOT, "f")] {
                let error = error_of(world.run_as(s, Some(2), other).await);
                assert_eq!(error.reason(), Reason::InvalidArgument);
                assert!(error.message().contains("another mutation"), "{error}");
            }
            world.run_as(s, Some(2), write(file, b"one")).await.unwrap();
            world.reopen();
        }
        // Neither does a failed one's number serve another.
        assert_eq!(
            error_of(world.run_as(s, Some(3), create(ROOT, "f")).await).reason(),
            Reason::AlreadyExists
        );
        let error = error_of(world.run_as(s, Some(3), create(ROOT, "g")).await);
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert_eq!(world.shard().usage().inodes, 2);
        world.check("numbers").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_retries_join() {
    let world = World::rocks(None, 4096);
    let s = session(&world).await;
    let shard = world.shard();
    let mut tasks = Vec::new();
    for i in 0..200u64 {
        let shard = std::sync::Arc::clone(&shard);
        tasks.push(tokio::spawn(async move {
            let sequence = shardfs_proto::types::Sequence::new(1 + i / 4);
            let operation = create(ROOT, &format!("f{}", i / 4));
            shard
                .mutate(Mutation { session: Some(s), sequence, durability: Durability::Sync, operation })
                .await
        }));
    }
    for task in tasks {
        task.await.unwrap().expect("every caller gets the first one's answer");
    }
    assert_eq!(shard.usage().inodes, 51);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_open_outlives_its_name() {
    for world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let file = world.run_as(Some(a), Some(1), create_open("f")).await.unwrap().attr.unwrap().inode;
        world.shard().register_open(b, file).await.unwrap();
        world.write(file, 0, &[9; 10_000]).await.unwrap();
        world.run(unlink(ROOT, "f")).await.unwrap();
        world.check("held by two").await;
        assert_eq!(world.read(file).await, [9; 10_000]);
        world.write(file, 10_000, b"more").await.unwrap();
        world.shard().release(a, &[file]).await.unwrap();
        assert_eq!(world.read(file).await.len(), 10_004);
        // Opened twice, released once.
        world.shard().register_open(b, file).await.unwrap();
        world.shard().release(b, &[file]).await.unwrap();
        assert_eq!(world.read(file).await.len(), 10_004);
        world.shard().close_session(b).await.unwrap();
        assert!(read::get_attr(&world.view().await, file).is_err());
        assert_eq!(world.shard().usage().used_bytes, 0);
        assert_eq!(count(&world.view().await, Cf::Chunk), 0);
        world.check("let go").await;
        // What nobody holds goes at once; also what a rename replaces.
        for n in ["x", "y"] {
            world.create(ROOT, n).await;
        }
        world.run(rename(ROOT, "x", ROOT, "y")).await.unwrap();
        world.run(unlink(ROOT, "y")).await.unwrap();
        assert_eq!(world.shard().usage().inodes, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_sessions_say_what_they_hold() {
    for mut world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let file = world.run_as(Some(a), Some(1), create_open("f")).await.unwrap().attr.unwrap().inode;
        let other = world.create(ROOT, "g").await.inode;
        world.reopen();
        assert!(world.shard().keep_session(a, None).await.unwrap().resume_wanted);
        // Nobody has spoken yet: both may hold both.
        world.run(unlink(ROOT, "f")).await.unwrap();
        world.run(unlink(ROOT, "g")).await.unwrap();
        assert_eq!(world.shard().usage().inodes, 3);
        world.check("unlinked before the sessions spoke").await;
        assert!(!world.shard().keep_session(a, Some(vec![file])).await.unwrap().resume_wanted);
        assert_eq!(world.shard().usage().inodes, 3);
        world.shard().keep_session(b, Some(vec![])).await.unwrap();
        assert!(read::get_attr(&world.view().await, other).is_err());
        assert!(read::get_attr(&world.view().await, file).is_ok());
        world.reopen();
        world.check("orphan across a restart").await;
        world.shard().keep_session(a, Some(vec![])).await.unwrap();
        assert_eq!(world.shard().usage().inodes, 1);
        world.check("after all spoke").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removed_directories_that_are_held_take_no_entries() {
    let world = World::mem(None, 4096);
    let s = session(&world).await;
    let directory = world.mkdir(ROOT, "d").await.inode;
    world.shard().register_open(s, directory).await.unwrap();
    world.run(Operation::RemoveDirectory { parent: ROOT, name: name("d") }).await.unwrap();
    assert_eq!(world.run(create(directory, "x")).await.unwrap_err().reason(), Reason::NotFound);
    assert_eq!(read::get_attr(&world.view().await, directory).unwrap().nlink, 0);
    world.check("held directory").await;
    world.shard().release(s, &[directory]).await.unwrap();
    assert_eq!(world.shard().usage().inodes, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_sessions_end() {
    let world = World::mem(None, 4096);
    let (a, b) = (session(&world).await, session(&world).await);
    let file = world.run_as(Some(a), Some(1), create_open("f")).await.unwrap().attr.unwrap().inode;
    world.run(unlink(ROOT, "f")).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(2200)).await;
    world.shard().keep_session(b, None).await.unwrap();
    world.shard().expire_sessions(std::time::Duration::from_secs(2)).await.unwrap();
    assert!(world.shard().keep_session(b, None).await.is_ok());
    assert_eq!(world.shard().keep_session(a, None).await.unwrap_err().reason(), Reason::SessionUnknown);
    assert!(read::get_attr(&world.view().await, file).is_err());
    world.check("expired").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_shard_takes_no_mutation_but_repeats_answers() {
    for mut world in World::both(None, 4096) {
        let s = Some(session(&world).await);
        world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap();
        world.shard().set_read_only().await.unwrap();
        world.shard().set_read_only().await.unwrap();
        for _ in 0..2 {
            let refused = world.run_as(s, Some(2), create(ROOT, "g")).await.unwrap_err();
            assert_eq!(refused.reason(), Reason::ShardReadOnly);
            world.run_as(s, Some(1), create(ROOT, "f")).await.unwrap();
            world.reopen();
        }
        world.check("closed").await;
    }
}

/// What the log loses at a crash is a suffix of the operations, never a part of one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_log_leaves_a_prefix() {
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    // 200 files in 7 directories.
    let bytes = 200 * 6000 + 207 * crate::shard::records::INODE_COST_BYTES;
    let world = World::rocks(None, 4096);
    let id = session(&world).await;
    let s = Some(id);
    for i in 0..60u64 {
        world.run_as(s, Some(i + 1), put(&format!("d{}/f{i:03}", i % 7), &[i as u8; 6000])).await.unwrap();
    }
    world.shard().sync().await.unwrap();
    for i in 60..200u64 {
        world.run_as(s, Some(i + 1), put(&format!("d{}/f{i:03}", i % 7), &[i as u8; 6000])).await.unwrap();
    }
    for _ in 0..12 {
        let crashed = world.crash_with_torn_log(|length| rng.u64(..=length));
        crashed.check(&format!("seed {seed}: torn log")).await;
        let view = crashed.view().await;
        let there = |i: u64| read::find_value(&view, &key(&format!("d{}/f{i:03}", i % 7))).is_ok();
        let kept = (0..200).take_while(|i| there(*i)).count() as u64;
        assert!((kept..200).all(|i| !there(i)), "seed {seed}: a prefix of {kept}");
        if kept == 0 && crashed.shard().keep_session(id, None).await.is_err() {
            continue;
        }
        // The session goes on where the log ends.
        for i in kept.saturating_sub(5)..200 {
            crashed
                .run_as(s, Some(i + 1), put(&format!("d{}/f{i:03}", i % 7), &[i as u8; 6000]))
                .await
                .unwrap();
        }
        crashed.check(&format!("seed {seed}: replayed")).await;
        assert_eq!(crashed.shard().usage().used_bytes, bytes);
    }
    let crashed = world.crash();
    assert_eq!(crashed.shard().usage().used_bytes, bytes, "a process's crash loses nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_repeated_overwrites_nothing_of_others() {
    for mut world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
        let kept = world.run_as(Some(a), Some(1), write(f, 0, b"kept")).await.unwrap().attr.unwrap().version;
        // What was answered after it was lost: it had versions that are given again to nobody.
        let lost = |n: u64| Version::new(kept.get() + n);
        world.reopen();
        let shard = world.shard();
        let again = async |n: u64, at: InodeNo, data: &[u8], answered, own| {
            let mutation = Mutation {
                session: Some(a),
                sequence: Some(Sequence::new(n).unwrap()),
                durability: Durability::Buffered,
                operation: write(at, 0, data),
            };
            let result = shard.mutate_again(mutation, Some(Repetition { answered, own })).await;
            result.map(|result| result.attr.unwrap().version).map_err(|error| error.reason())
        };
        assert_eq!(again(1, f, b"kept", kept, None).await, Ok(kept), "it was not lost: the first answer");
        let own = again(2, f, b"made", lost(1), None).await.unwrap();
        assert!(own > lost(1_000_000), "{own} after {kept}");
        assert_eq!(again(3, f, b"once", lost(2), None).await, Err(Reason::VersionMismatch), "whose was it?");
        let own = again(4, f, b"more", lost(3), Some(own)).await.unwrap();
        world.run_as(Some(b), Some(1), write(f, 0, b"theirs")).await.unwrap();
        assert_eq!(again(5, f, b"late", lost(4), Some(own)).await, Err(Reason::VersionMismatch));
        assert_eq!(world.read(f).await, b"theirs");
        world.run_as(Some(b), Some(2), write(g, 0, b"theirs too")).await.unwrap();
        assert_eq!(again(6, g, b"late", lost(1_000_000), None).await, Err(Reason::VersionMismatch));
        assert_eq!(again(7, InodeNo::new(99).unwrap(), b"gone", lost(7), None).await, Err(Reason::NotFound));
        world.check("repetitions").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_that_were_answered_are_never_given_again() {
    for mut world in World::both(None, 4096) {
        let a = session(&world).await;
        let f = world.create(ROOT, "f").await.inode;
        world.shard().sync().await.unwrap();
        world.reopen();
        // An older session writes, and nobody asks for a sync. Were all of it lost, as by a failover, the next opening would count
        // from the same number.
        let shard = world.shard();
        assert!(shard.executor().log().age().is_none());
        world.run_as(Some(a), Some(1), write(f, 0, b"first")).await.unwrap();
        assert!(shard.executor().log().age().is_none(), "the first one after an opening is durable");
        world.run_as(Some(a), Some(2), write(f, 0, b"second")).await.unwrap();
        assert!(shard.executor().log().age().is_some(), "the others are buffered");
        drop(shard);
    }
}
