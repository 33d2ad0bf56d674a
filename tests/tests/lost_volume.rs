//! The filesystem of a volume fails under its primary, while shards on it are written: it is shut down, or its journal is
//! aborted. The volume is served again, without an operator; what was acknowledged is there, programs see a pause and no error.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use shardfs_tests::cluster::eventually;
use shardfs_tests::disk::{Frozen, Loss};
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::{Cluster, Options};

/// A volume is served again, and every writer goes on, within this.
const SERVED_MAX: Duration = Duration::from_secs(120);
/// Writers work so long, at random, before it happens.
const BEFORE_MS: std::ops::Range<u64> = 200..1_500;
const PAGE: usize = 4096;

fn loses(nodes: u32, loads: &[ShardLoad], losses: &[Loss]) {
    let seed = load::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let options = Options {
        nodes,
        environment: vec![("SHARDFS_WRITE_BUFFER", "8MiB".to_owned())],
        ..Options::default()
    };
    let cluster = Cluster::start(&options);
    for load in loads {
        cluster.shard(load.shard());
    }
    load::run(&cluster, loads, seed, |progress| {
        progress.wait_for(10, SERVED_MAX);
        for loss in losses {
            for load in loads {
                std::thread::sleep(Duration::from_millis(random.u64(BEFORE_MS)));
                let (before, at) = (cluster.primary_of(load.shard()), cluster.volume_mount(load.shard()));
                loss.strike(&at);
                progress.wait_for(10, SERVED_MAX);
                println!(
                    "{loss:?}: {} was served by {before}, then by {}",
                    load.shard(),
                    cluster.primary_of(load.shard())
                );
            }
        }
    });
    for load in loads {
        let found = load::contents(&cluster, load.shard());
        load.history().check_all(&found).unwrap_or_else(|e| panic!("{}: {e}", load.shard()));
        cluster.assert_clean(load.shard());
    }
    eventually(SERVED_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
    // And from the disk alone.
    cluster.cli_run(&["dev", "down"]);
    let output = cluster.up(&options, &[]);
    assert!(output.status.success(), "{output:?}");
    for load in loads {
        let found = load::contents(&cluster, load.shard());
        load.history().check_all(&found).unwrap_or_else(|e| panic!("{} after a restart: {e}", load.shard()));
    }
}

const ALL: [Loss; 4] = [Loss::WithoutLogFlush, Loss::Aborted, Loss::WithLogFlush, Loss::AfterSync];

#[test]
fn users_of_a_cluster_see_a_pause() {
    let loads = [ShardLoad::new("both", &[2], 1, true), ShardLoad::new("files", &[], 2, true)];
    loses(3, &loads, &ALL);
}

/// What programs have written and not synced is kept by the mount, and made again: a later fsync is true.
#[test]
fn an_fsync_after_the_loss_covers_what_was_written_before_it() {
    const ROUNDS: usize = 4;
    let cluster = Cluster::start(&Options::default());
    let path = cluster.shard("kept").join("f");
    let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    file.set_len((ROUNDS * PAGE) as u64).unwrap();
    file.sync_all().unwrap();
    for round in 0..ROUNDS {
        let bytes = [b'a' + round as u8; PAGE];
        file.write_all_at(&bytes, (round * PAGE) as u64).unwrap();
        Loss::WithoutLogFlush.strike(&cluster.volume_mount("kept"));
        file.sync_all().unwrap();
        // As others see it.
        let found = load::contents(&cluster, "kept").remove("f").unwrap();
        assert!(found[round * PAGE..][..PAGE] == bytes, "round {round}: what was synced is not there");
    }
    cluster.assert_clean("kept");
}

#[test]
fn a_node_without_backups_takes_its_volume_again() {
    // What is not synced may be lost there: so nothing is left unsynced.
    loses(1, &[ShardLoad::new("alone", &[3], 0, false)], &ALL);
}

/// A device that hangs gives no error, so nobody would hear of it. Its node gives the volume up all the same.
#[test]
fn a_device_that_hangs_is_given_up() {
    let cluster = Cluster::start(&Options::default());
    let loads = [ShardLoad::new("hangs", &[2], 1, true)];
    cluster.shard("hangs");
    load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(10, SERVED_MAX);
        let (before, at) = (cluster.primary_of("hangs"), cluster.volume_mount("hangs"));
        let log = cluster.dir().join(format!("logs/{before}.log"));
        let frozen = Frozen::new(&at);
        eventually(SERVED_MAX, || {
            let said = std::fs::read_to_string(&log).map_err(|e| e.to_string())?;
            let given_up = said
                .lines()
                .any(|line| line.contains("stepping down") && line.contains("a write has not ended"));
            if given_up { Ok(()) } else { Err(format!("{before} has not given the volume up")) }
        });
        drop(frozen);
        progress.wait_for(10, SERVED_MAX);
        println!("served by {before}, then by {}", cluster.primary_of("hangs"));
    });
    let found = load::contents(&cluster, "hangs");
    loads[0].history().check_all(&found).unwrap_or_else(|e| panic!("{e}"));
    cluster.assert_clean("hangs");
    eventually(SERVED_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
}

/// The same while it is given away: what is waited for then cannot end.
#[test]
fn a_device_that_hangs_while_its_volume_is_given_away_is_given_up() {
    let cluster = Cluster::start(&Options::default());
    let loads = [ShardLoad::new("given", &[2], 1, true)];
    cluster.shard("given");
    load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(10, SERVED_MAX);
        let (before, at) = (cluster.primary_of("given"), cluster.volume_mount("given"));
        let to = ["node-1", "node-2"].into_iter().find(|node| **node != *before).unwrap();
        let volume = cluster.cli_json(&["shard", "show", "given"])["volume"].as_str().unwrap().to_owned();
        let frozen = Frozen::new(&at);
        std::thread::scope(|scope| {
            // It succeeds when the volume is served there, or says that it is not yet.
            scope.spawn(|| cluster.cli_output(&["volume", "promote", &volume, to]));
            progress.wait_for(10, SERVED_MAX);
            assert_ne!(cluster.primary_of("given"), before);
        });
        drop(frozen);
        progress.wait_for(10, SERVED_MAX);
    });
    let found = load::contents(&cluster, "given");
    loads[0].history().check_all(&found).unwrap_or_else(|e| panic!("{e}"));
    cluster.assert_clean("given");
}

#[test]
#[ignore = "long: run by make test-long"]
fn again_and_again() {
    let losses: Vec<Loss> = ALL.iter().copied().cycle().take(24).collect();
    let loads = [ShardLoad::new("both", &[2, 1], 1, true), ShardLoad::new("files", &[], 2, true)];
    loses(3, &loads, &losses);
    loses(1, &[ShardLoad::new("alone", &[3], 0, false)], &losses);
}
