//! Power cuts: copies of a volume's backing file, each taken at one moment while shards on it are written over gRPC and on
//! the mount. From every copy the cluster starts, fsck is clean, and each shard holds a prefix of its operation
//! order no older than its last acknowledged sync.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Duration;

use shardfs_tests::disk::{Xfs, copy_at_once};
use shardfs_tests::history::Moment;
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::{Cluster, Options, sh};

/// Sparse, with room for the volumes and for what the copies do not share.
const DISK_BYTES: u64 = 64 << 30;
const VOLUME_BYTES: u64 = 4 << 30;
/// Small, so that shards are flushed and compacted all the time.
const WRITE_BUFFER: &str = "8MiB";
/// Between two copies.
const PAUSE_MS: std::ops::Range<u64> = 300..2_500;
const WRITING_MAX: Duration = Duration::from_secs(120);

/// A copy, and when it was taken, by the counter of every shard's history.
struct Copy {
    file: PathBuf,
    began: Vec<Moment>,
    over: Vec<Moment>,
}

/// Returns how many changes were answered, not durable, and lost.
fn power_cuts(nodes: u32, copies: usize) -> usize {
    let seed = load::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let options = Options {
        nodes,
        volume_bytes: Some(VOLUME_BYTES),
        environment: vec![("SHARDFS_WRITE_BUFFER", WRITE_BUFFER.to_owned())],
        ..Options::default()
    };
    let cluster = Cluster::start(&options);
    let disk = Xfs::below_volumes(&cluster, &options, DISK_BYTES);
    let volumes = cluster.dir().join("volumes");

    // What one session leaves unsynced, another one's work makes durable: so two shards have one session each.
    let mut loads = vec![
        ShardLoad::new("streams", &[3], 0, true),
        ShardLoad::new("files", &[], 2, true),
        ShardLoad::new("mixed", &[2, 1], 1, true),
    ];
    for load in &loads {
        cluster.shard(load.shard());
    }
    // All of them on one volume.
    let source = cluster.volume_source(loads[0].shard());
    loads.retain(|load| cluster.volume_source(load.shard()) == source);
    let taken: Vec<Copy> = load::run(&cluster, &loads, seed, |progress| {
        progress.wait_for(20, WRITING_MAX);
        (0..copies)
            .map(|number| {
                std::thread::sleep(Duration::from_millis(random.u64(PAUSE_MS)));
                let file = volumes.join(format!("copy-{number}"));
                let moments = || loads.iter().map(|load| load.history().now()).collect();
                let began = moments();
                copy_at_once(&source, &file);
                let copy = Copy { file, began, over: moments() };
                progress.wait_for(2, WRITING_MAX);
                copy
            })
            .collect()
    });
    // Nothing was cut off so far: everything that was answered is there.
    for load in &loads {
        let found = load::contents(&cluster, load.shard());
        load.history()
            .check_all(&found)
            .unwrap_or_else(|e| panic!("{} without a power cut: {e}", load.shard()));
    }
    cluster.cli_run(&["dev", "down"]);

    let mut lost = 0;
    for (number, copy) in taken.iter().enumerate() {
        copy_at_once(&copy.file, &source);
        cluster.cli_run(&["dev", "up", "--no-mount"]);
        for (at, load) in loads.iter().enumerate() {
            cluster.assert_clean(load.shard());
            let found = load::contents(&cluster, load.shard());
            let counts = load.history().check(&found, copy.began[at], copy.over[at]);
            let counts = counts.unwrap_or_else(|e| panic!("copy {number}: shard {}: {e}", load.shard()));
            let answered = load.history().answered_by(copy.began[at]);
            lost += answered.iter().zip(&counts).map(|(a, c)| a.saturating_sub(*c)).sum::<usize>();
            println!("copy {number}: {}: {counts:?} changes; answered were {answered:?}", load.shard());
        }
        cluster.cli_run(&["dev", "down"]);
        // The journal was replayed and the filesystem unmounted: nothing is left to be mended.
        sh(disk.at(), &format!("e2fsck -fn {}", source.display()));
        std::fs::remove_file(&copy.file).unwrap();
    }
    println!("{lost} changes were answered, not durable, and lost");
    lost
}

#[test]
fn a_power_cut_leaves_a_prefix_no_older_than_the_last_sync() {
    let copies = 8;
    // Else it was no power cut: what is answered as buffered is not on the device yet.
    assert_ne!(power_cuts(1, copies), 0, "nothing was lost in {copies} power cuts");
}

#[test]
#[ignore = "long: run by make test-long"]
fn sixty_power_cuts_leave_a_prefix() {
    let copies = 40;
    assert_ne!(power_cuts(1, copies), 0, "nothing was lost in {copies} power cuts");
    // With backups, names are durable when they are made: often all is that was answered.
    power_cuts(3, 20);
}
