//! Programs that load file systems and check what comes of it: stress-ng, dbench, fio.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use shardfs_tests::{Cluster, Shell};

/// Stressors of stress-ng, and their options where the defaults are too large for a minute on a mount.
const STRESSORS: &[(&str, &str)] = &[
    ("dir", "--dir-dirs 512"),
    ("dirdeep", "--dirdeep-inodes 2000"),
    ("dentry", "--dentries 512"),
    ("filename", "--filename-opts posix"),
    ("link", ""),
    ("symlink", ""),
    ("rename", ""),
    ("xattr", ""),
    ("flock", ""),
    ("lockf", ""),
    ("lockofd", ""),
    ("fallocate", "--fallocate-bytes 16M"),
    ("fpunch", ""),
    ("seek", "--seek-size 16M --seek-punch"),
    ("sync-file", "--sync-file-bytes 16M"),
    ("utime", ""),
    ("mmap", "--mmap-file --mmap-bytes 8M"),
    ("copy-file", "--copy-file-bytes 128M"),
    ("hdd", "--hdd-bytes 64M --hdd-opts rd-rnd,wr-rnd,fsync"),
    ("iomix", "--iomix-bytes 64M"),
];
/// Of each stressor by itself, and of all at once.
const LONG_SECONDS: u32 = 60;
const ALL_SECONDS: u32 = 8;
const LONG_WORKERS: u32 = 2;

fn places(name: &str) -> (PathBuf, Shell) {
    let cluster = Cluster::shared();
    let (mount, local) = (cluster.shard(name), cluster.scratch(&format!("local-{name}")));
    let shell = Shell::new(local).with("M", &mount).deadline_seconds(600);
    (mount, shell)
}

/// Runs stressors at once; answers what each of them has done, in its own unit. None may fail, be skipped, or leave anything.
fn stress(shell: &Shell, stressors: &[(&str, &str)], workers: u32, seconds: u32) -> BTreeMap<String, u64> {
    let options: String =
        stressors.iter().map(|(name, options)| format!(" --{name} {workers} {options}")).collect();
    let said = shell.run(&format!(
        "stress-ng --temp-path $M --verify --timeout {seconds} --metrics-brief {options} 2>&1 | tee stress.log
         # It says `skipped` of what this machine cannot do, and ends well.
         if grep -E 'fail:|skipp' stress.log; then exit 1; fi
         test -z \"$(ls -A $M)\""
    ));
    let mut done = BTreeMap::new();
    for line in said.lines().filter(|line| line.contains(" metrc: ")) {
        let words: Vec<&str> =
            line.split_whitespace().skip_while(|word| !word.ends_with(']')).skip(1).collect();
        if let [name, count, ..] = words[..]
            && let Ok(count) = count.parse()
        {
            done.entry(name.to_owned()).or_insert(count);
        }
    }
    for (name, _) in stressors {
        assert!(done.contains_key(*name), "stress-ng says nothing of {name}: {said}");
    }
    done
}

#[test]
#[ignore = "long: run by make test-long"]
fn all_stressors_at_once() {
    let (_, shell) = places("stress");
    let done = stress(&shell, STRESSORS, 1, ALL_SECONDS);
    println!("{done:?}");
    Cluster::shared().assert_clean("stress");
}

#[test]
#[ignore = "long: run by make test-long"]
fn each_stressor_for_a_minute() {
    let (_, shell) = places("stress-long");
    for stressor in STRESSORS {
        let done = stress(&shell, std::slice::from_ref(stressor), LONG_WORKERS, LONG_SECONDS);
        println!("{done:?}");
        assert!(done[stressor.0] > 0, "{} did nothing", stressor.0);
    }
    Cluster::shared().assert_clean("stress-long");
}

/// dbench of Debian with its own load of a file server's clients.
fn dbench(name: &str, seconds: u32) {
    let (_, shell) = places(name);
    let said = shell.with("T", seconds.to_string()).run(
        "dbench -c /usr/share/dbench/client.txt -D $M -t $T 8 2>&1 | tee dbench.log
         if grep -v 'create barrier semaphore' dbench.log | grep -iE 'error|no such file|unable|expected|failed'; then exit 1; fi
         test -z \"$(find $M -type f)\"",
    );
    let result =
        said.lines().find(|line| line.starts_with("Throughput ")).unwrap_or_else(|| panic!("{said}"));
    println!("{result}");
    Cluster::shared().assert_clean(name);
}

#[test]
#[ignore = "long: run by make test-long"]
fn dbench_with_eight_clients() {
    dbench("dbench", 5);
}

#[test]
#[ignore = "long: run by make test-long"]
fn dbench_with_eight_clients_for_long() {
    dbench("dbench-long", 120);
}

/// Four jobs of fio, each with a file of its own, by the page cache and past it.
fn fio(name: &str, bytes_each: &str) {
    let (_, shell) = places(name);
    for way in ["--ioengine=psync --fsync=64", "--ioengine=libaio --iodepth=16 --direct=1"] {
        shell.clone().with("WAY", way).with("SIZE", bytes_each).run(
            "fio --name=job --directory=$M $WAY --numjobs=4 --rw=randwrite --bsrange=4k-64k --size=$SIZE --verify=crc32c --verify_fatal=1 \
             --do_verify=1 --verify_backlog=1024 --end_fsync=1 --group_reporting --output=fio.out && rm $M/job*",
        );
    }
    Cluster::shared().assert_clean(name);
}

#[test]
#[ignore = "long: run by make test-long"]
fn fio_verifies_what_four_jobs_wrote() {
    fio("fio", "16m");
}

#[test]
#[ignore = "long: run by make test-long"]
fn fio_verifies_what_four_jobs_wrote_in_large_files() {
    fio("fio-long", "256m");
}
