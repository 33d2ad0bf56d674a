//! Work that goes on while the nodes die that it is done on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, block_on, eventually};
use shardfs_proto::types::ShardName;

/// A volume is served elsewhere within this, on a busy machine.
const MOVED_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether the work is done.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs `work`, and kills the primary of a shard whenever `every` has passed, as long as the work runs; a dead node is started again before
/// the next one dies. Panics unless the shard was served elsewhere at least once while the work still ran. All nodes run in the end.
pub fn under<T: Send>(cluster: &Cluster, shard: &str, every: Duration, work: impl FnOnce() -> T + Send) -> T {
    let over = AtomicBool::new(false);
    let (result, moves) = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _over = SetOnDrop(&over);
            work()
        });
        let mut moves = 0;
        let mut dead: Option<String> = None;
        while !wait(&over, every) {
            if let Some(node) = dead.take() {
                cluster.cli_run(&["dev", "start", &node]);
            }
            let old = primary(cluster, shard, |_| true);
            cluster.cli_run(&["dev", "kill", &old]);
            dead = Some(old.clone());
            primary(cluster, shard, |node| node != old);
            moves += usize::from(!over.load(Ordering::SeqCst));
        }
        if let Some(node) = dead {
            cluster.cli_run(&["dev", "start", &node]);
        }
        (worker.join(), moves)
    });
    let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    println!("{shard}: {moves} failovers");
    assert!(moves > 0, "{shard}: the work was over before a failover");
    result
}

/// Work that panics is over too.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits until it is set, or the time has passed; whether it is set.
fn wait(set: &AtomicBool, time: Duration) -> bool {
    let begun = Instant::now();
    while !set.load(Ordering::SeqCst) && begun.elapsed() < time {
        std::thread::sleep(LOOK_EVERY);
    }
    set.load(Ordering::SeqCst)
}

/// The node that serves a shard, once it is one that `fits`.
fn primary(cluster: &Cluster, shard: &str, fits: impl Fn(&str) -> bool) -> String {
    let name = ShardName::new(shard).unwrap();
    eventually(MOVED_MAX, || {
        let found = block_on(async { cluster.client().shard_by_name(&name).await });
        match found.map_err(|e| e.to_string())?.location.node {
            Some(node) if fits(node.as_str()) => Ok(node.as_str().to_owned()),
            node => Err(format!("{shard} is served by {node:?}")),
        }
    })
}
