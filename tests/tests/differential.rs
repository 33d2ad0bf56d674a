//! Random operations on a mount and on ext4, side by side. `SHARDFS_TEST_SEED` and `SHARDFS_TEST_STEPS` replay a run.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use shardfs_tests::differential::Run;
use shardfs_tests::disk::Ext4;
use shardfs_tests::{Cluster, Options};

/// Of the seeds that run always: any will do, as long as they stay.
const SEEDS: std::ops::Range<u64> = 1..5;
const STEPS: usize = 2500;
/// Of the long run.
const LONG_SEEDS: u64 = 60;
const LONG_STEPS: usize = 20_000;
/// Bytes of the disk of the local filesystem.
const LOCAL_BYTES: u64 = 4 << 30;

/// A cluster, an ext4, and a shard on the one.
struct Sides {
    cluster: Cluster,
    shard: PathBuf,
    local: Ext4,
}

impl Sides {
    fn new() -> Sides {
        let cluster = Cluster::start(&Options::default());
        let shard = cluster.shard("differential");
        let local = Ext4::mounted(&cluster.root().join("local.img"), &cluster.scratch("local"), LOCAL_BYTES);
        Sides { cluster, shard, local }
    }

    fn run(&self, seed: u64, steps: usize, event: impl FnMut(usize)) {
        let name = format!("seed-{seed}");
        let run = Run { mount: self.shard.join(&name), local: self.local.at().join(&name), seed, steps };
        println!("seed {seed}, {steps} steps");
        run.run(event);
    }
}

/// What was asked for by the environment, if anything was.
fn asked() -> Option<(u64, usize)> {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<u64>().unwrap());
    let seed = number("SHARDFS_TEST_SEED")?;
    Some((seed, number("SHARDFS_TEST_STEPS").map_or(STEPS, |steps| steps as usize)))
}

#[test]
fn random_operations_do_what_they_do_on_ext4() {
    let sides = Sides::new();
    match asked() {
        Some((seed, steps)) => sides.run(seed, steps, |_| {}),
        None => SEEDS.for_each(|seed| sides.run(seed, STEPS, |_| {})),
    }
    sides.cluster.assert_clean("differential");
}

#[test]
fn random_operations_do_what_they_do_on_ext4_while_primaries_die() {
    let sides = Sides::new();
    let (seed, steps) = asked().unwrap_or((100, STEPS));
    let mut dead: Option<String> = None;
    sides.run(seed, steps, |step| {
        if step % (steps / 5) != steps / 10 {
            return;
        }
        if let Some(node) = dead.take() {
            sides.cluster.cli_run(&["dev", "start", &node]);
        }
        let primary = sides.cluster.primary_of("differential");
        sides.cluster.cli_run(&["dev", "kill", &primary]);
        dead = Some(primary);
    });
    if let Some(node) = dead {
        sides.cluster.cli_run(&["dev", "start", &node]);
    }
    sides.cluster.assert_clean("differential");
}

#[test]
#[ignore = "long: run by make test-long"]
fn random_operations_of_many_seeds_do_what_they_do_on_ext4() {
    let sides = Sides::new();
    // New ones each time; a failure names its own.
    let first = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for seed in first..first + LONG_SEEDS {
        sides.run(seed, LONG_STEPS, |_| {});
    }
    sides.cluster.assert_clean("differential");
}
