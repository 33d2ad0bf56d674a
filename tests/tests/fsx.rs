//! fsx (crates.io): random operations on one file, each read compared with what the file must hold.
//!
//! `make test` installs the program and names it in `FSX`. It does everything that it has on Linux; a zero range is not among that, and is
//! covered by `differential`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use shardfs_tests::{Cluster, Options, Shell, failovers};

const OPERATIONS: u64 = 4_000;
const SEEDS: [u64; 2] = [1, 2];
/// Of the long run.
const LONG_OPERATIONS: u64 = 1_000_000;
const LONG_SEEDS: [u64; 8] = [11, 12, 13, 14, 15, 16, 17, 18];
const LONG_DEADLINE_SECONDS: u32 = 7200;
/// Files that are written at once.
const AT_ONCE: usize = 2;

/// Weights of all operations.
const WEIGHTS: &str = "\
[weights]
close_open = 5
invalidate = 5
mapread = 10
mapwrite = 10
read = 15
write = 20
truncate = 5
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 4
punch_hole = 5
sendfile = 5
posix_fadvise = 4
copy_file_range = 10
";
/// Sizes of the file and of one operation: beyond a page and a chunk, and in the long runs beyond a message of the kernel too.
const SIZES: &str = "flen = 400000\nopsize.max = 40000\n";
const LONG_SIZES: &str = "flen = 2000000\nopsize.max = 200000\n";

struct Fsx {
    folder: PathBuf,
    shell: Shell,
}

impl Fsx {
    fn new(cluster: &Cluster, shard: &str, sizes: &str) -> Fsx {
        let program = std::env::var("FSX").expect("FSX names the program: run make test, which installs it");
        let local = cluster.scratch(&format!("local-{shard}"));
        fs::write(local.join("fsx.toml"), format!("{sizes}{WEIGHTS}")).unwrap();
        let folder = cluster.shard(shard);
        let shell = Shell::new(local).with("FSX", program).with("RUST_BACKTRACE", "0");
        Fsx { folder, shell }
    }

    /// One seed; a failure shows the last operations, and which seed it was.
    fn run(&self, seed: u64, operations: u64) {
        let file = self.folder.join(format!("seed-{seed}"));
        self.shell
            .clone()
            .with("FILE", &file)
            .with("SEED", seed.to_string())
            .with("N", operations.to_string())
            .run("echo seed $SEED; $FSX -S $SEED -N $N -f fsx.toml -P . $FILE 2>&1");
        fs::remove_file(&file).unwrap();
    }

    fn run_all(&self, seeds: &[u64], operations: u64) {
        for some in seeds.chunks(AT_ONCE) {
            std::thread::scope(|scope| {
                for seed in some {
                    scope.spawn(|| self.run(*seed, operations));
                }
            });
        }
    }
}

#[test]
fn fsx_reads_what_it_wrote() {
    let cluster = Cluster::shared();
    Fsx::new(cluster, "fsx", SIZES).run_all(&SEEDS, OPERATIONS);
    cluster.assert_clean("fsx");
}

#[test]
fn fsx_reads_what_it_wrote_while_primaries_die() {
    let cluster = Cluster::start(&Options::default());
    let fsx = Fsx::new(&cluster, "fsx", SIZES);
    failovers::under(&cluster, "fsx", Duration::from_secs(2), || fsx.run_all(&[3], OPERATIONS));
    cluster.assert_clean("fsx");
}

#[test]
#[ignore = "long: run by make test-long"]
fn fsx_reads_what_it_wrote_in_a_million_operations_of_each_seed() {
    let cluster = Cluster::shared();
    let mut fsx = Fsx::new(cluster, "fsx-long", LONG_SIZES);
    fsx.shell = fsx.shell.deadline_seconds(LONG_DEADLINE_SECONDS);
    fsx.run_all(&LONG_SEEDS, LONG_OPERATIONS);
    cluster.assert_clean("fsx-long");
}

#[test]
#[ignore = "long: run by make test-long"]
fn fsx_reads_what_it_wrote_in_a_million_operations_while_primaries_die() {
    let cluster = Cluster::start(&Options::default());
    let mut fsx = Fsx::new(&cluster, "fsx", LONG_SIZES);
    fsx.shell = fsx.shell.deadline_seconds(LONG_DEADLINE_SECONDS);
    failovers::under(&cluster, "fsx", Duration::from_secs(20), || fsx.run_all(&[21, 22], LONG_OPERATIONS));
    cluster.assert_clean("fsx");
}
