//! Steps that are cut off: a shard is made, written and deleted again as if they had not begun, or had ended.
//!
//! Failpoints are the process's: each test holds a `FailScenario`, which lets one run at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use fail::FailScenario;
use shardfs_proto::types::Reason;
use shardfs_proto::types::op::Durability;

use super::harness::*;
use super::manager::{dir, id, manager, put_one, room};
use crate::shard::{Mutation, ShardInit, check, read};

fn sync_put(k: &str) -> Mutation {
    Mutation { session: None, sequence: None, durability: Durability::Sync, operation: put(k, b"value") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_executor_that_panics_is_replaced_by_a_new_open() {
    let scenario = FailScenario::setup();
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    m.create(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }).unwrap();
    let mut keys = Vec::new();
    for (round, point) in
        ["shard::commit::before_write", "shard::commit::after_write"].into_iter().enumerate()
    {
        let shard = m.open(id(1), &dir(root.path(), 1), room()).await.unwrap();
        let before = format!("before-{round}");
        shard.mutate(sync_put(&before)).await.unwrap();
        keys.push(before);
        fail::cfg(point, "panic").unwrap();
        let error = shard.mutate(sync_put(&format!("lost-{round}"))).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Unavailable, "{point}: {error}");
        fail::remove(point);
        // The broken one takes nothing any more, but is still read.
        assert_eq!(shard.mutate(sync_put("x")).await.unwrap_err().reason(), Reason::Unavailable);
        let view = shard.read_view(None).await.unwrap();
        read::find_value(&view, &key(&keys[0])).unwrap();
        drop((view, shard));

        let shard = m.open(id(1), &dir(root.path(), 1), room()).await.unwrap();
        put_one(&shard, &format!("after-{round}")).await;
        keys.push(format!("after-{round}"));
        let view = shard.read_view(None).await.unwrap();
        for k in &keys {
            read::find_value(&view, &key(k)).unwrap();
        }
        // Its outcome was unknown to its caller: not there if it was not written, there if it was.
        let lost = read::find_value(&view, &key(&format!("lost-{round}"))).is_ok();
        assert_eq!(lost, point.ends_with("after_write"), "{point}");
        let (findings, _) = check::check_all(&view, true).unwrap();
        assert!(findings.is_empty(), "{point}: {findings:?}");
    }
    m.close_all().await.unwrap();
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_finds_no_room_is_taken_back_and_resumes() {
    let scenario = FailScenario::setup();
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    m.create(&dir(root.path(), 1), &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &dir(root.path(), 1), room()).await.unwrap();
    fail::cfg("shard::commit::write_fails", "1*return").unwrap();
    assert_eq!(shard.mutate(sync_put("k")).await.unwrap_err().reason(), Reason::VolumeFull);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while let Err(error) = shard.mutate(sync_put("k")).await {
        assert_eq!(error.reason(), Reason::VolumeFull, "{error}");
        assert!(std::time::Instant::now() < deadline, "writes never resumed: {error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(shard.usage().inodes, 2);
    drop(shard);
    m.close_all().await.unwrap();
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_and_a_deletion_that_were_cut_off_begin_anew() {
    let scenario = FailScenario::setup();
    let root = tempfile::tempdir().unwrap();
    let path = dir(root.path(), 1);
    let made = ["made_dir", "made_db", "initialized", "renamed"];
    for step in made {
        let m = manager(4);
        let point = format!("shard::create::{step}");
        fail::cfg(&point, "panic").unwrap();
        let init = ShardInit { id: id(1), ..init(None) };
        assert!(catch_unwind(AssertUnwindSafe(|| m.create(&path, &init))).is_err());
        fail::remove(&point);
        assert_eq!(path.exists(), step == "renamed", "{step}: a folder of that name is a whole shard");
        m.create(&path, &init).unwrap();
        let shard = m.open(id(1), &path, room()).await.unwrap();
        put_one(&shard, "k").await;
        drop(shard);

        fail::cfg("shard::delete::renamed", "panic").unwrap();
        assert!(m.delete(id(1), &path).await.is_err(), "the deletion was lost");
        fail::remove("shard::delete::renamed");
        assert!(!path.exists());
        m.delete(id(1), &path).await.unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "{step}");
    }
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_that_is_cut_off_leaves_one_content_or_the_other() {
    use shardfs_proto::types::op::ShardState;
    use shardfs_proto::types::{ClientId, Timestamp};
    let scenario = FailScenario::setup();
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    let (one, two) = (dir(root.path(), 1), dir(root.path(), 2));
    m.create(&one, &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &one, room()).await.unwrap();
    put_one(&shard, "then").await;
    let copy = crate::shard::CopyInit {
        id: id(2),
        owner: ClientId::new("tests").unwrap(),
        state: ShardState::ReadOnly,
        limit_bytes: None,
        created: Timestamp::new(1, 0).unwrap(),
    };
    m.copy(&shard, &two, &copy, "").await.unwrap();
    drop(shard);
    for (point, done) in [("shard::replace::built", false), ("shard::replace::exchanged", true)] {
        let shard = m.open(id(1), &one, room()).await.unwrap();
        put_one(&shard, "since").await;
        drop(shard);
        let snapshot = m.open(id(2), &two, room()).await.unwrap();
        fail::cfg(point, "return").unwrap();
        let error = m.replace(id(1), &one, &snapshot, point, room()).await.unwrap_err();
        assert!(error.to_string().contains("failpoint"), "{point}: {error}");
        fail::remove(point);
        drop(snapshot);
        // Whole before anybody has looked what became of it, and after.
        for settled in [false, true] {
            if settled {
                m.close(id(1)).await.unwrap();
                assert_eq!(m.settle_replacement(id(1), &one, point).await.unwrap(), done, "{point}");
                assert!(!root.path().join("shard-1.creating").exists(), "{point}");
            }
            let shard = m.open(id(1), &one, room()).await.unwrap();
            let view = shard.read_view(None).await.unwrap();
            assert!(read::find_value(&view, &key("then")).is_ok(), "{point}");
            assert_eq!(read::find_value(&view, &key("since")).is_ok(), !done, "{point}");
            let (findings, _) = check::check_all(&view, true).unwrap();
            assert!(findings.is_empty(), "{point}: {findings:?}");
        }
    }
    m.close_all().await.unwrap();
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_that_is_cut_off_begins_anew() {
    use shardfs_proto::types::op::ShardState;
    use shardfs_proto::types::{ClientId, Timestamp};
    let scenario = FailScenario::setup();
    let root = tempfile::tempdir().unwrap();
    let m = manager(4);
    let (one, two) = (dir(root.path(), 1), dir(root.path(), 2));
    m.create(&one, &ShardInit { id: id(1), ..init(None) }).unwrap();
    let shard = m.open(id(1), &one, room()).await.unwrap();
    shard.open_session("a mount".into()).await.unwrap();
    put_one(&shard, "then").await;
    let copy = crate::shard::CopyInit {
        id: id(2),
        owner: ClientId::new("others").unwrap(),
        state: ShardState::Active,
        limit_bytes: None,
        created: Timestamp::new(1, 0).unwrap(),
    };
    m.copy(&shard, &two, &copy, "").await.unwrap();
    for _ in 0..2 {
        fail::cfg("shard::copy::adopted", "return").unwrap();
        let error = m.open(id(2), &two, room()).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("failpoint"), "{error}");
        fail::remove("shard::copy::adopted");
        assert!(two.join("adopt").exists());
    }
    let adopted = m.open(id(2), &two, room()).await.unwrap();
    assert!(!two.join("adopt").exists());
    assert_eq!((adopted.header().id, &adopted.header().owner), (id(2), &copy.owner));
    put_one(&adopted, "since").await;
    let view = adopted.read_view(None).await.unwrap();
    assert!(read::find_value(&view, &key("then")).is_ok() && read::find_value(&view, &key("since")).is_ok());
    let (findings, _) = check::check_all(&view, true).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    drop(view);
    // What was done since is not adopted away.
    drop(adopted);
    m.close(id(2)).await.unwrap();
    let again = m.open(id(2), &two, room()).await.unwrap();
    assert!(read::find_value(&again.read_view(None).await.unwrap(), &key("since")).is_ok());
    drop((again, shard));
    m.close_all().await.unwrap();
    scenario.teardown();
}
