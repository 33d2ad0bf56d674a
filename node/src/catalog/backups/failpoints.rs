//! Backups and restores that end between two of their steps, and what is done then: the same once more, or it is given up.
//!
//! An error takes back what can be taken back; a panic leaves what a killed process leaves, mounts too. Failpoints are the process's: each
//! test holds a `FailScenario`, which lets one run at a time.

use fail::FailScenario;

use super::tests::*;
use super::*;
use crate::catalog::tests::{Bench, PATIENCE, TestNode, eventually, reason};

mod races;

const ENDINGS: [&str; 2] = ["return", "panic"];

/// The backups as a node lists them: their states.
async fn states(node: &TestNode) -> Vec<BackupState> {
    node.catalog.list_backups(None).await.unwrap().into_iter().map(|backup| backup.state).collect()
}

/// A call that ends at `point`.
async fn cut_off<T>(point: &str, ending: &str, call: impl Future<Output = Result<T>>) {
    fail::cfg(point, ending).unwrap();
    let outcome = call.await;
    fail::remove(point);
    match outcome {
        Ok(_) => panic!("{point} was not met"),
        Err(error) => assert!(
            error.message().contains("failpoint") || error.message().contains("panic"),
            "{point}: {error}"
        ),
    }
}

fn names(names: &[&str]) -> std::collections::BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The name of a backup's image of `vol-1`.
fn image(id: &str) -> String {
    format!("vol-1.img.backup-{id}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_backup_that_was_cut_off_has_failed_for_everybody_and_goes_without_a_trace() {
    let scenario = FailScenario::setup();
    let Some(bench) = Bench::on_disk("node-1", &["node-2"]).await else { return };
    let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    serves(&one, "vol-1").await;
    let shard = shard(&one, "photos").await;
    for point in ["backup::noted", "backup::taken"] {
        for ending in ENDINGS {
            cut_off(point, ending, one.catalog.create_backup(&volume("vol-1"))).await;
            assert_eq!(states(&one).await, [BackupState::Failed], "{point} {ending}");
            // While the process lives that has stopped to take it.
            eventually("the other node hears of it", async || states(&two).await == [BackupState::Failed])
                .await;
            let id = one.catalog.list_backups(None).await.unwrap()[0].id.clone();
            assert_eq!(reason(restore(&one, &id, anew("vol-9", &["node-1"])).await), Reason::InvalidArgument);
            assert_eq!(bench.files().contains(&image(&id)), point == "backup::taken", "{point} {ending}");
            two.catalog.delete_backup(&id).await.unwrap();
            assert_eq!(bench.files(), names(&["vol-1.img"]), "{point} {ending}");
            assert!(states(&one).await.is_empty(), "{point} {ending}");
        }
    }
    write(&one, shard, "since").await;
    let good = one.catalog.create_backup(&volume("vol-1")).await.unwrap();
    assert_eq!(findings(&one, &good.id).await.unwrap(), [""; 0]);
    assert_eq!((good.shards, count(&one, shard).await), (1, 2));
    assert_eq!(bench.files(), names(&["vol-1.img", &image(&good.id)]));
    two.end().await;
    one.end().await;
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_deletion_that_was_cut_off_is_finished_by_whoever_asks_again() {
    let scenario = FailScenario::setup();
    let Some(bench) = Bench::on_disk("node-1", &["node-2"]).await else { return };
    let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    serves(&one, "vol-1").await;
    let shard = shard(&one, "photos").await;
    for ending in ENDINGS {
        let id = one.catalog.create_backup(&volume("vol-1")).await.unwrap().id;
        cut_off("backup::delete::noted", ending, one.catalog.delete_backup(&id)).await;
        assert_eq!(states(&two).await, [BackupState::Deleting], "{ending}");
        assert_eq!(
            reason(restore(&one, &id, anew("vol-9", &["node-1"])).await),
            Reason::InvalidArgument,
            "its image may be gone"
        );
        two.catalog.delete_backup(&id).await.unwrap();
        assert!(states(&one).await.is_empty());
        assert_eq!(bench.files(), names(&["vol-1.img"]), "{ending}");
        two.catalog.delete_backup(&id).await.unwrap();
    }
    assert_eq!(count(&one, shard).await, 1);
    two.end().await;
    one.end().await;
    scenario.teardown();
}

/// As if no attempt had been made yet.
async fn forget_attempt(node: &TestNode) {
    let key = schedule_key(&volume("vol-1"));
    let kv = get(&*node.catalog.parts.store, key.clone()).await.unwrap().1.unwrap();
    let schedule: ScheduleRecord = records::decode(&kv.key, &kv.value).unwrap();
    let never = records::encode(&ScheduleRecord { last: None, ..schedule });
    node.catalog.parts.store.txn(Txn::new().put(key, never)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_schedule_goes_on_after_what_was_cut_off_and_removes_it() {
    let scenario = FailScenario::setup();
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let node = bench.node("node-1").await;
    serves(&node, "vol-1").await;
    let shard = shard(&node, "photos").await;
    for point in ["backup::noted", "backup::taken"] {
        for ending in ENDINGS {
            fail::cfg(point, &format!("1*{ending}")).unwrap();
            // What was cut off is removed, and that is cut off as well.
            fail::cfg("backup::delete::noted", &format!("1*{ending}")).unwrap();
            // One only: the next is due in an hour.
            node.catalog.set_backup_schedule(&volume("vol-1"), 3600, 1).await.unwrap();
            eventually("one has failed", async || states(&node).await == [BackupState::Failed]).await;
            forget_attempt(&node).await;
            eventually("one is good, and what failed is gone", async || {
                states(&node).await == [BackupState::Done]
            })
            .await;
            let listed = node.catalog.list_backups(None).await.unwrap().remove(0);
            assert!(listed.scheduled);
            assert_eq!(bench.files(), names(&["vol-1.img", &image(&listed.id)]), "{point} {ending}");
            assert_eq!(findings(&node, &listed.id).await.unwrap(), [""; 0], "{point} {ending}");
            node.catalog.set_backup_schedule(&volume("vol-1"), 0, 0).await.unwrap();
            node.catalog.delete_backup(&listed.id).await.unwrap();
            fail::remove(point);
            fail::remove("backup::delete::noted");
        }
    }
    assert_eq!(count(&node, shard).await, 1);
    node.end().await;
    scenario.teardown();
}

const POINTS_ANEW: [&str; 5] =
    ["restore::noted", "restore::place", "restore::laid", "restore::made", "restore::shards"];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_volume_that_was_cut_off_is_made_once_or_goes_as_a_whole() {
    let scenario = FailScenario::setup();
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let mut node = bench.node("node-1").await;
    serves(&node, "vol-1").await;
    let shard = shard(&node, "photos").await;
    let backup = node.catalog.create_backup(&volume("vol-1")).await.unwrap().id;
    write(&node, shard, "since").await;
    let mut expected = names(&["vol-1.img", &image(&backup)]);
    for (number, point) in POINTS_ANEW.into_iter().enumerate() {
        // Given up, by a new process.
        let label = format!("vol-{}", 20 + number);
        let to = || anew(&label, &["node-1"]);
        let before = node.catalog.list_all_shards(true).await.unwrap().len();
        for ending in ENDINGS {
            cut_off(point, ending, restore(&node, &backup, to())).await;
            node.end().await;
            node = bench.node("node-1").await;
            node.catalog.remove_volume(&volume(&label), false, PATIENCE).await.unwrap();
            assert!(node.catalog.restoring(&volume(&label)).await.unwrap().is_none(), "{point} {ending}");
            assert_eq!(bench.files(), expected, "{point} {ending}");
            assert!(bench.private_mounts().is_empty(), "{point} {ending}");
            assert_eq!(node.catalog.list_all_shards(true).await.unwrap().len(), before, "{point} {ending}");
            let volumes = node.catalog.list_volumes().await.unwrap();
            assert!(volumes.iter().all(|info| info.id != volume(&label)), "{point} {ending}");
        }
        // Repeated, by the same process and by a new one.
        cut_off(point, "return", restore(&node, &backup, to())).await;
        cut_off(point, "panic", restore(&node, &backup, to())).await;
        node.end().await;
        node = bench.node("node-1").await;
        let restored = restore(&node, &backup, to()).await.unwrap();
        assert_eq!(restored.shards.iter().map(|shard| shard.old).collect::<Vec<_>>(), [shard], "{point}");
        assert!(restored.missing.is_empty(), "{point}");
        let once_more = restore(&node, &backup, to()).await.unwrap();
        assert_eq!(once_more.shards, restored.shards, "{point}");
        serves(&node, &label).await;
        assert_eq!(count(&node, restored.shards[0].id).await, 1, "{point}");
        assert_eq!(node.catalog.list_all_shards(true).await.unwrap().len(), before + 1, "{point}");
        expected.insert(format!("{label}.img"));
        assert_eq!(bench.files(), expected, "{point}");
        assert!(bench.private_mounts().is_empty(), "{point}");
    }
    serves(&node, "vol-1").await;
    assert_eq!(count(&node, shard).await, 2, "the living one has lost nothing");
    assert_eq!(states(&node).await, [BackupState::Done]);
    assert_eq!(findings(&node, &backup).await.unwrap(), [""; 0]);
    node.end().await;
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_restore_in_place_that_was_cut_off_is_repeated_by_any_node() {
    let scenario = FailScenario::setup();
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let (mut one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    serves(&one, "vol-1").await;
    let shard = shard(&one, "photos").await;
    let backup = one.catalog.create_backup(&volume("vol-1")).await.unwrap().id;
    for point in ["restore::taken", "restore::place", "restore::laid", "restore::made"] {
        for ending in ENDINGS {
            write(&one, shard, "since").await;
            one = lose_the_file(&bench, one).await;
            cut_off(point, ending, restore(&one, &backup, in_place())).await;
            // It is nobody's.
            let taken = one.catalog.parts.view.volume(&volume("vol-1")).unwrap().record;
            assert!(taken.primary.is_none() && taken.backups.is_empty(), "{point} {ending}");
            assert!(one.catalog.is_restored_in_place(&volume("vol-1")).await.unwrap(), "{point} {ending}");
            one.end().await;
            one = bench.node("node-1").await;
            let restored = match ending {
                "return" => restore(&one, &backup, in_place()).await.unwrap(),
                _panic => restore(&two, &backup, in_place()).await.unwrap(),
            };
            assert_eq!(restored.shards.iter().map(|shard| shard.id).collect::<Vec<_>>(), [shard], "{point}");
            assert_eq!(restored.set_aside, "", "{point} {ending}: nothing was there");
            serves(&one, "vol-1").await;
            assert_eq!(count(&one, shard).await, 1, "{point} {ending}");
            assert_eq!(bench.files(), names(&["vol-1.img", &image(&backup)]), "{point} {ending}");
            assert!(!one.catalog.is_restored_in_place(&volume("vol-1")).await.unwrap());
            assert_eq!(states(&two).await, [BackupState::Done], "{point} {ending}");
            assert!(bench.private_mounts().is_empty(), "{point} {ending}");
            assert_eq!(findings(&one, &backup).await.unwrap(), [""; 0], "{point} {ending}");
        }
    }
    one.end().await;
    two.end().await;
    scenario.teardown();
}
