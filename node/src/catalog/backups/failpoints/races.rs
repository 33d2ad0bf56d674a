//! Two attempts at one restore: both at once, and an earlier one that was stopped and goes on when a later one has begun, or ended.

use std::sync::mpsc as sync_mpsc;

use shardfs_proto::types::backups::Restored;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

/// A failpoint at which calls wait.
struct Gate {
    point: &'static str,
    waiting: mpsc::UnboundedReceiver<sync_mpsc::Sender<()>>,
}

impl Gate {
    fn new(point: &'static str) -> Gate {
        let (sender, waiting) = mpsc::unbounded_channel();
        fail::cfg_callback(point, move || {
            let (held, freed) = sync_mpsc::channel::<()>();
            // Nobody looks any more: it does not wait.
            if sender.send(held).is_ok() {
                // Other tasks of this thread go on.
                let _ = tokio::task::block_in_place(|| freed.recv());
            }
        })
        .unwrap();
        Gate { point, waiting }
    }

    /// The next call that comes there, which waits until the answer is dropped.
    async fn next(&mut self) -> sync_mpsc::Sender<()> {
        let come = tokio::time::timeout(PATIENCE, self.waiting.recv()).await;
        come.unwrap_or_else(|_| panic!("nobody comes to {}", self.point)).expect("it is armed")
    }

    /// Calls that come later go through.
    fn open(self) {
        fail::remove(self.point);
    }
}

fn begin(node: &TestNode, backup: &str) -> JoinHandle<Result<Restored>> {
    let (catalog, backup) = (node.catalog.clone(), backup.to_owned());
    tokio::spawn(async move { catalog.restore_backup(&backup, in_place()).await })
}

async fn ended<T>(call: JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, call).await.expect("it ends").unwrap()
}

/// A volume whose file is lost, with a backup, and a node beside its own.
struct Lost {
    one: TestNode,
    two: TestNode,
    shard: ShardId,
    backup: String,
    // Its nodes go first.
    bench: Bench,
}

impl Lost {
    async fn new() -> Option<Lost> {
        let bench = Bench::on_disk("node-1", &[]).await?;
        let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
        serves(&one, "vol-1").await;
        let shard = shard(&one, "photos").await;
        let backup = one.catalog.create_backup(&volume("vol-1")).await.unwrap().id;
        write(&one, shard, "since").await;
        let one = lose_the_file(&bench, one).await;
        Some(Lost { one, two, shard, backup, bench })
    }

    /// Fails unless it is served with what the backup had, and `more`, also after its node was started anew.
    async fn check_whole(mut self, more: u64, what: &str) {
        for _ in 0..2 {
            serves(&self.one, "vol-1").await;
            assert_eq!(count(&self.one, self.shard).await, 1 + more, "{what}");
            self.one.end().await;
            self.one = self.bench.node("node-1").await;
        }
        assert_eq!(self.bench.files(), names(&["vol-1.img", &image(&self.backup)]), "{what}");
        assert!(self.bench.private_mounts().is_empty(), "{what}");
        assert_eq!(states(&self.two).await, [BackupState::Done], "{what}");
        serves(&self.one, "vol-1").await;
        assert_eq!(findings(&self.one, &self.backup).await.unwrap(), [""; 0], "{what}");
        self.one.end().await;
        self.two.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn of_two_nodes_that_restore_in_place_at_once_the_later_one_does() {
    let scenario = FailScenario::setup();
    for point in ["restore::taken", "restore::place", "restore::laid", "restore::made"] {
        for earlier_first in [true, false] {
            let what = format!("{point}, the earlier one goes on first: {earlier_first}");
            let Some(lost) = Lost::new().await else { return };
            let mut gate = Gate::new(point);
            let earlier = begin(&lost.one, &lost.backup);
            let earlier_waits = gate.next().await;
            let later = begin(&lost.two, &lost.backup);
            let later_waits = gate.next().await;
            gate.open();
            if earlier_first {
                drop(earlier_waits);
                ended(earlier).await.unwrap_err();
                drop(later_waits);
                ended(later).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            } else {
                drop(later_waits);
                ended(later).await.unwrap_or_else(|e| panic!("{what}: {e}"));
                drop(earlier_waits);
                ended(earlier).await.unwrap_err();
            }
            lost.check_whole(0, &what).await;
        }
    }
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn an_attempt_that_goes_on_late_changes_nothing_of_a_volume_that_is_served_again() {
    let scenario = FailScenario::setup();
    for point in ["restore::taken", "restore::place", "restore::laid", "restore::made"] {
        let Some(lost) = Lost::new().await else { return };
        let mut gate = Gate::new(point);
        let earlier = begin(&lost.one, &lost.backup);
        let earlier_waits = gate.next().await;
        gate.open();
        let restored = ended(begin(&lost.two, &lost.backup)).await;
        restored.unwrap_or_else(|e| panic!("{point}: {e}"));
        serves(&lost.one, "vol-1").await;
        write(&lost.one, lost.shard, "acknowledged").await;
        drop(earlier_waits);
        let error = ended(earlier).await.unwrap_err();
        assert!(
            matches!(error.reason(), Reason::VersionMismatch | Reason::Unavailable | Reason::InvalidArgument),
            "{point}: {error}"
        );
        lost.check_whole(1, point).await;
    }
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn two_calls_on_one_node_restore_in_place_one_after_the_other() {
    let scenario = FailScenario::setup();
    let Some(lost) = Lost::new().await else { return };
    let mut gate = Gate::new("restore::laid");
    let first = begin(&lost.one, &lost.backup);
    let first_waits = gate.next().await;
    let second = begin(&lost.one, &lost.backup);
    // Until it is the second one's turn, it has claimed nothing.
    let claim = lost.one.catalog.restoring(&volume("vol-1")).await.unwrap().unwrap();
    assert!(lost.one.catalog.backups.copying.try_lock().is_err());
    gate.open();
    drop(first_waits);
    let first = ended(first).await.unwrap();
    assert_eq!(first.set_aside, "");
    // The volume is in use by then, or is restored once more.
    match ended(second).await {
        Ok(restored) => assert!(restored.set_aside.ends_with(&format!("replaced-{}", lost.backup))),
        Err(error) => assert!(error.message().contains("is served by"), "{error}"),
    }
    let last = lost.one.catalog.restoring(&volume("vol-1")).await.unwrap().unwrap();
    assert!(last.record.done && last.modified > claim.modified);
    for aside in lost.bench.files().iter().filter(|file| file.contains("replaced")) {
        std::fs::remove_file(lost.bench.volume_file("vol-1").with_file_name(aside)).unwrap();
    }
    lost.check_whole(0, "two calls").await;
    scenario.teardown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn a_new_volume_that_is_given_up_while_it_is_made_leaves_nothing() {
    let scenario = FailScenario::setup();
    for point in ["restore::noted", "restore::place", "restore::laid", "restore::made", "restore::shards"] {
        let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
        let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
        serves(&one, "vol-1").await;
        let shard = shard(&one, "photos").await;
        let backup = one.catalog.create_backup(&volume("vol-1")).await.unwrap().id;
        let mut gate = Gate::new(point);
        let (catalog, id) = (one.catalog.clone(), backup.clone());
        let making =
            tokio::spawn(async move { catalog.restore_backup(&id, anew("vol-9", &["node-1"])).await });
        let it_waits = gate.next().await;
        gate.open();
        two.catalog.remove_volume(&volume("vol-9"), false, PATIENCE).await.unwrap();
        drop(it_waits);
        ended(making).await.unwrap_err();
        assert_eq!(bench.files(), names(&["vol-1.img", &image(&backup)]), "{point}");
        assert!(bench.private_mounts().is_empty(), "{point}");
        assert!(two.catalog.restoring(&volume("vol-9")).await.unwrap().is_none(), "{point}");
        assert_eq!(two.catalog.list_all_shards(true).await.unwrap().len(), 1, "{point}");
        assert_eq!(count(&one, shard).await, 1, "{point}");
        one.end().await;
        two.end().await;
    }
    scenario.teardown();
}
