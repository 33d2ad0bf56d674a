//! A cluster whose records are in a real etcd: it works, an etcd that is killed stops nothing, and one etcd holds one
//! cluster.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardfs_tests::cluster::eventually;
use shardfs_tests::etcd::Etcd;
use shardfs_tests::{Cluster, Options};

/// How long the nodes may take to find an etcd that is back.
const BACK_MAX: Duration = Duration::from_secs(30);

fn in_order(cluster: &Cluster) {
    eventually(BACK_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
}

#[test]
fn files_are_written_while_etcd_is_killed_and_restarted() {
    let mut etcd = Etcd::start();
    let options = Options::default();
    let (cluster, output) = Cluster::try_start(&options, &["--meta", &etcd.address()]);
    assert!(output.status.success(), "{output:?}");
    let shards: Vec<_> = ["one", "two", "three"].map(|name| cluster.shard(name)).into();
    assert_eq!(cluster.cli_json(&["dev", "status"])["meta"], etcd.address());
    assert!(cluster.cli_run(&["dev", "status"]).contains(&etcd.address()));
    in_order(&cluster);

    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let writers: Vec<_> = shards
            .iter()
            .map(|shard| {
                let (stop, written) = (&stop, &written);
                scope.spawn(move || {
                    let mut count = 0;
                    while !stop.load(Ordering::SeqCst) {
                        let mut file = File::create_new(shard.join(format!("f{count}"))).unwrap();
                        file.write_all(format!("content {count}").as_bytes()).unwrap();
                        file.sync_all().unwrap();
                        count += 1;
                        written.fetch_add(1, Ordering::SeqCst);
                    }
                    count
                })
            })
            .collect();
        let progress = |what: &str| {
            let before = written.load(Ordering::SeqCst);
            eventually(BACK_MAX, || match written.load(Ordering::SeqCst) {
                now if now >= before + 20 => Ok(()),
                now => Err(format!("{what}: {} files written", now - before)),
            });
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            progress("with etcd");
            for round in 0..2 {
                etcd.kill();
                progress("without etcd");
                // Longer than a node may be silent.
                std::thread::sleep(Duration::from_secs(4));
                progress("long without etcd");
                etcd.restart();
                // What needs the store waits for it.
                eventually(BACK_MAX, || {
                    fs::create_dir(cluster.mount().join(format!("new{round}"))).map_err(|e| e.to_string())
                });
                progress("with etcd again");
                in_order(&cluster);
            }
        }));
        stop.store(true, Ordering::SeqCst);
        let counts = writers.into_iter().map(|w| w.join().unwrap()).collect();
        outcome.unwrap_or_else(|reason| std::panic::resume_unwind(reason));
        counts
    });
    for (shard, count) in shards.iter().zip(counts) {
        assert!(count > 0);
        for i in 0..count {
            assert_eq!(fs::read(shard.join(format!("f{i}"))).unwrap(), format!("content {i}").into_bytes());
        }
    }
    in_order(&cluster);
    for shard in ["one", "two", "three", "new0", "new1"] {
        cluster.assert_clean(shard);
    }
    let status = cluster.cli_json(&["dev", "status"]);
    for member in status["members"].as_array().unwrap() {
        assert_eq!((&member["state"], &member["restarts"]), (&"running".into(), &0.into()), "{status}");
    }

    // Down and up again with the same etcd; a node that is killed comes back.
    cluster.cli_run(&["dev", "down"]);
    let output = cluster.up(&options, &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(shards[0].join("f0")).unwrap(), b"content 0");
    cluster.cli_run(&["dev", "kill", "node-2"]);
    cluster.cli_run(&["dev", "start", "node-2"]);
    in_order(&cluster);
}

#[test]
fn one_etcd_holds_one_cluster() {
    let mut etcd = Etcd::start();
    let options = Options { nodes: 1, volumes: "dir", ..Options::default() };
    let address = etcd.address();
    let meta = ["--meta", address.as_str(), "--no-mount"];
    let up = |cluster: &Cluster, arguments: &[&str]| {
        let mut all = vec!["dev", "up", "--nodes", "1", "--volumes", "dir"];
        all.extend(arguments);
        cluster.cli_output(&all)
    };
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();

    // Nobody there: it says so, and nothing is left but logs.
    let (first, output) = Cluster::try_start(&options, &["--meta", "etcd://127.0.0.1:1"]);
    assert!(!output.status.success());
    assert!(
        said(&output).contains("etcd://127.0.0.1:1") && said(&output).contains("hint"),
        "{}",
        said(&output)
    );
    assert!(!first.dir().join("cluster.json").exists());

    etcd.ctl(&["put", "other", "mine"]);
    etcd.ctl(&["put", "shardfs0", "mine"]);
    let output = up(&first, &meta);
    assert!(output.status.success(), "{output:?}");
    first.cli_run(&["shard", "create", "photos"]);
    let ours = etcd.keys("shardfs/");
    assert!(ours.iter().any(|key| key == "shardfs/volumes/vol-1"), "{ours:?}");

    let (second, output) = Cluster::try_start(&options, &["--meta", &address]);
    assert!(!output.status.success());
    assert!(said(&output).contains("holds another cluster"), "{}", said(&output));
    assert!(said(&output).contains("dev down --delete"), "{}", said(&output));
    assert!(!second.dir().join("cluster.json").exists());
    first.cli_run(&["shard", "show", "photos"]);
    let record = etcd.ctl(&["get", "--print-value-only", "shardfs/cluster"]);

    // Its records are looked for where they are.
    first.cli_run(&["dev", "down"]);
    let empty = Etcd::start();
    let output = up(&first, &["--meta", &empty.address()]);
    assert!(!output.status.success());
    assert!(said(&output).contains("holds no records of the cluster"), "{}", said(&output));
    assert_eq!(empty.keys(""), [""; 0]);
    let output = up(&first, &["--meta", "embedded"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let output = up(&first, &["--meta", &address]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(etcd.ctl(&["get", "--print-value-only", "shardfs/cluster"]), record);

    // An etcd that is away keeps nobody from ending a cluster, but its records are not forgotten in silence.
    etcd.kill();
    let refused = first.cli_fails(&["dev", "down", "--delete", "--yes"]);
    assert!(refused.contains("--force"), "{refused}");
    assert!(first.dir().join("cluster.json").exists());
    etcd.restart();
    first.cli_run(&["dev", "down", "--delete", "--yes"]);
    assert_eq!(etcd.keys(""), ["other", "shardfs0"]);
    // Now there is room for the next.
    let output = up(&second, &meta);
    assert!(output.status.success(), "{output:?}");
    second.cli_run(&["dev", "down", "--delete", "--yes"]);
}

#[test]
fn what_is_wrong_with_an_address_is_said() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("c");
    let dir = dir.to_str().unwrap();
    let shardfs = shardfs_tests::cluster::bin_dir().join("shardfs");
    for (arguments, expected) in [
        (&["--meta", "etcd://here"][..], "etcd://HOST:PORT"),
        (&["--meta", "etcd://u:p@127.0.0.1:1"], "--meta-password-file"),
        (&["--meta", "redis://127.0.0.1:1"], "etcd://HOST:PORT"),
        (&["--meta", "etcd://127.0.0.1:1", "--meta-ca-file", "/x"], "etcds://"),
        (&["--meta", "etcds://127.0.0.1:1", "--meta-ca-file", "/nonexistent"], "/nonexistent"),
        (&["--meta", "embedded", "--meta-user", "u"], "for an etcd"),
        (&["--meta-user", "u"], "--meta"),
    ] {
        let output = std::process::Command::new(&shardfs)
            .args(["dev", "up", "--dir", dir, "--nodes", "1", "--volumes", "dir"])
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
        assert!(!root.path().join("c").exists(), "{arguments:?}");
    }
}
