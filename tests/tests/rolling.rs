//! A cluster is upgraded by stopping and starting its nodes one after the other, while programs work: no call fails, and nothing that was
//! answered is lost.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use shardfs_tests::cluster::{Cluster, Options, eventually};
use shardfs_tests::load::{self, ShardLoad};

/// A node is back, and all is in order, within this on a busy machine.
const BACK_MAX: Duration = Duration::from_secs(120);
/// What each lane goes on by in every state of the cluster.
const CHANGES: u64 = 15;
const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];

/// The volumes that a node serves.
fn served_by(cluster: &Cluster, node: &str) -> usize {
    let volumes = cluster.cli_json(&["volume", "list"]);
    volumes.as_array().unwrap().iter().filter(|volume| volume["primary"] == node).count()
}

#[test]
fn nodes_are_restarted_one_after_the_other_under_load_without_an_error() {
    let cluster = Cluster::start(&Options::default());
    // Shards go to the volumes in turn: each node serves one of them.
    let loads: Vec<ShardLoad> =
        ["one", "two", "three"].map(|shard| ShardLoad::new(shard, &[2, 1], 1, true)).into();
    for load in &loads {
        cluster.shard(load.shard());
    }
    cluster.in_order(BACK_MAX);
    let started: Vec<u32> = cluster.nodes().iter().map(|node| node.pid).collect();
    load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(CHANGES, BACK_MAX);
        for node in NODES {
            let old = cluster.node(node);
            // As `systemctl restart` does it.
            cluster.cli_run(&["dev", "kill", node, "--signal", "TERM"]);
            eventually(BACK_MAX, || if old.is_alive() { Err(format!("{node} runs")) } else { Ok(()) });
            progress.wait_for(CHANGES, BACK_MAX);
            assert_eq!(served_by(&cluster, node), 0, "{node} has given its volumes away");
            cluster.cli_run(&["dev", "start", node]);
            cluster.in_order(BACK_MAX);
            progress.wait_for(CHANGES, BACK_MAX);
        }
    });
    let now: Vec<u32> = cluster.nodes().iter().map(|node| node.pid).collect();
    assert!(now.len() == NODES.len() && now.iter().all(|pid| !started.contains(pid)), "{started:?} {now:?}");
    for load in &loads {
        let found = load::contents(&cluster, load.shard());
        load.history().check_all(&found).unwrap_or_else(|e| panic!("shard {}: {e}", load.shard()));
        cluster.assert_clean(load.shard());
    }
}
