//! Directories too big to hold: listed over gRPC, by the command line and by `ls -f` in bounded memory of
//! node, daemon and command line.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::{ListItem, ListOptions};
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{Key, ShardName};
use shardfs_tests::process::{Process, mib};
use shardfs_tests::run::described;
use shardfs_tests::{Cluster, block_on};

const BATCH: u64 = 10_000;
/// What a listing may add to the daemon: pages of entries, and what the kernel keeps asking about.
const DAEMON_GROWTH_MAX: u64 = 64 << 20;
/// What listings may add to the node, which also fills its block cache meanwhile.
const NODE_GROWTH_MAX: u64 = 256 << 20;
/// Files that are looked at one by one.
const STATS: u64 = 10_000;
/// All of the command line.
const CLI_MAX: u64 = 64 << 20;

fn name(number: u64) -> String {
    format!("key-{number:07}")
}

/// Growth of a process's peak over `work`.
fn growth<T>(process: &Process, work: impl FnOnce() -> T) -> (T, u64) {
    process.reset_peak();
    let before = process.resident_bytes();
    let result = work();
    (result, process.peak_resident_bytes().saturating_sub(before))
}

/// Runs a program and counts its lines; its peak memory in bytes.
fn lines_and_peak(command: &[&str]) -> (u64, u64) {
    // A small parent, since a child's peak counts from the fork.
    let script = r#"
import resource, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
lines = 0
while block := child.stdout.read(1 << 16):
    lines += block.count(b"\n")
assert child.wait() == 0, child.returncode
print(lines, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"#;
    let output = Command::new("timeout")
        .args(["--kill-after=5", "600", "python3", "-c", script])
        .args(command)
        .env("NO_COLOR", "1")
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", described(&command.join(" "), &output));
    let text = String::from_utf8(output.stdout).unwrap();
    let (lines, kib) = text.trim().split_once(' ').unwrap();
    (lines.parse().unwrap(), kib.parse::<u64>().unwrap() << 10)
}

fn list_big_directory(keys: u64) {
    let cluster = Cluster::shared();
    let shard = format!("big-{keys}");
    let folder = cluster.shard(&shard).join("dir");
    let start = Instant::now();
    block_on(async {
        let client = cluster.client();
        let id = client.shard_by_name(&ShardName::new(shard.clone()).unwrap()).await.unwrap().id;
        let mut from = 0;
        while from < keys {
            let items = (from..keys.min(from + BATCH)).map(|n| PutItem {
                key: Key::new(format!("dir/{}", name(n))).unwrap(),
                value: Bytes::from(n.to_string()),
                options: PutOptions::default(),
            });
            let results = client.batch_put(id, items.collect(), false, Durability::Sync).await.unwrap();
            assert!(results.iter().all(Result::is_ok));
            from += BATCH;
        }
    });
    println!("{keys} keys put in {:.1?}", start.elapsed());
    let node = cluster.node(&cluster.primary_of(&shard));
    let daemon = cluster.daemon();
    println!("before: node {}, daemon {}", mib(node.resident_bytes()), mib(daemon.resident_bytes()));

    let start = Instant::now();
    let (count, node_growth) = growth(&node, || {
        block_on(async {
            let client = cluster.client();
            let id = client.shard_by_name(&ShardName::new(shard.clone()).unwrap()).await.unwrap().id;
            let mut items =
                std::pin::pin!(client.list(id, ListOptions { prefix: "dir/".into(), ..Default::default() }));
            let mut count = 0;
            while let Some(item) = items.next().await {
                match item.unwrap() {
                    ListItem::Key { key, meta, .. } => {
                        assert_eq!(key, format!("dir/{}", name(count)), "in order, none left out");
                        assert_eq!(meta.unwrap().attr.size, count.to_string().len() as u64);
                    }
                    ListItem::CommonPrefix(prefix) => panic!("{prefix:?}"),
                }
                count += 1;
            }
            count
        })
    });
    assert_eq!(count, keys);
    println!("gRPC List: {:.1?}; node grew by {}", start.elapsed(), mib(node_growth));
    assert!(node_growth < NODE_GROWTH_MAX);

    let start = Instant::now();
    let program = cluster.cli();
    let program = program.get_program().to_str().unwrap().to_owned();
    let directory = cluster.dir();
    let target = format!("{shard}/dir/");
    let (lines, peak) = lines_and_peak(&[&program, "--dir", directory.to_str().unwrap(), "ls", &target]);
    println!("shardfs ls: {:.1?}; {} at most", start.elapsed(), mib(peak));
    assert_eq!(lines, keys);
    assert!(peak < CLI_MAX, "the command line held {}", mib(peak));

    let start = Instant::now();
    let ((lines, daemon_growth), node_growth) =
        growth(&node, || growth(&daemon, || lines_and_peak(&["ls", "-f", folder.to_str().unwrap()]).0));
    println!(
        "ls -f: {:.1?}; daemon grew by {}, node by {}",
        start.elapsed(),
        mib(daemon_growth),
        mib(node_growth)
    );
    assert_eq!(lines, keys + 2, "with . and ..");
    assert!(daemon_growth < DAEMON_GROWTH_MAX && node_growth < NODE_GROWTH_MAX);

    // With a stat of some: what the kernel then knows, the daemon may be asked to remember.
    let start = Instant::now();
    let script = format!(
        "ls -f '{}' | head -n {STATS} | (cd '{}' && xargs stat -c %s)",
        folder.display(),
        folder.display()
    );
    let (lines, daemon_growth) = growth(&daemon, || lines_and_peak(&["bash", "-c", &script]).0);
    println!("stat of {STATS}: {:.1?}; daemon grew by {}", start.elapsed(), mib(daemon_growth));
    assert_eq!(lines, STATS);
    assert!(daemon_growth < DAEMON_GROWTH_MAX);
    println!("after: node {}, daemon {}", mib(node.resident_bytes()), mib(daemon.resident_bytes()));
}

#[test]
fn a_directory_of_100_000_keys() {
    list_big_directory(100_000);
}

#[test]
#[ignore = "long: run by make test-long"]
fn a_directory_of_1_000_000_keys() {
    list_big_directory(1_000_000);
}
