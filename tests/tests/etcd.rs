//! A cluster whose records are in a real etcd: it works, an etcd that is killed stops nothing, and one etcd holds one
//! cluster.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::etcd::Etcd;
use shardfs_tests::{Cluster, Options, sh};

/// How long the nodes may take to find an etcd that is back.
const BACK_MAX: Duration = Duration::from_secs(120);

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

/// A certificate authority that has signed nothing.
fn certificate_authority(folder: &Path) -> PathBuf {
    sh(
        folder,
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca \
         -keyout ca.key -out ca.pem",
    );
    folder.join("ca.pem")
}

#[test]
fn why_an_etcd_cannot_be_used_is_said_by_nodes_and_by_dev_up() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().unwrap();
    let ca = certificate_authority(folder.path());
    let ca = ca.to_str().unwrap();
    let address = etcd.address().replace("etcd://", "etcds://");
    let log = folder.path().join("log");
    // A node waits for its store, and says what for.
    let status = Command::new("timeout")
        .args(["--kill-after=5", "20"])
        .arg(bin_dir().join("shardfs-node"))
        .args(["--id", "node-1", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(folder.path().join("data"))
        .args(["--meta", &address, "--meta-ca-file", ca])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .status()
        .unwrap();
    let said = fs::read_to_string(&log).unwrap();
    assert_eq!(status.code(), Some(124), "it does not give up: {said}");
    assert!(said.contains("write etcd:// instead"), "{said}");
    assert!(!said.contains("panicked"), "{said}");

    let options = Options { nodes: 1, volumes: "dir", ..Options::default() };
    let (_cluster, output) = Cluster::try_start(&options, &["--meta", &address, "--meta-ca-file", ca]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("write etcd:// instead"), "{said}");
    assert_eq!(etcd.keys(""), [""; 0]);
}

/// What etcd does by itself when its database has reached its quota: it refuses changes from then on.
fn raise_no_space(etcd: &Etcd) {
    let status: serde_json::Value =
        serde_json::from_str(&etcd.ctl(&["endpoint", "status", "--write-out=json"])).unwrap();
    let member = status[0]["Status"]["header"]["member_id"].as_u64().unwrap();
    let body = format!(r#"{{"action":"ACTIVATE","memberID":"{member}","alarm":"NOSPACE"}}"#);
    let address = etcd.address().replace("etcd://", "");
    let mut stream = TcpStream::connect(&address).unwrap();
    let head = format!(
        "POST /v3/maintenance/alarm HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(etcd.ctl(&["alarm", "list"]).contains("NOSPACE"));
}

#[test]
fn an_etcd_whose_quota_is_used_up_is_waited_for() {
    let etcd = Etcd::start();
    // Loop volumes have a fence: they are served without the store.
    let options = Options { nodes: 1, ..Options::default() };
    let (cluster, output) = Cluster::try_start(&options, &["--meta", &etcd.address()]);
    assert!(output.status.success(), "{output:?}");
    let shard = cluster.shard("before");
    in_order(&cluster);
    raise_no_space(&etcd);
    eventually(BACK_MAX, || {
        let log = fs::read_to_string(cluster.dir().join("logs/node-1.log")).map_err(|e| e.to_string())?;
        let said = log.contains("quota is used up") && log.contains("heartbeat failed");
        if said { Ok(()) } else { Err(log) }
    });
    // What needs the store waits for it; the rest goes on.
    let during = cluster.mount().join("during");
    let waiting = std::thread::spawn(move || fs::create_dir(during));
    std::thread::sleep(Duration::from_secs(3));
    assert!(!waiting.is_finished(), "{:?}", waiting.join());
    fs::write(shard.join("f"), "written meanwhile").unwrap();
    etcd.ctl(&["alarm", "disarm"]);
    waiting.join().unwrap().unwrap();
    in_order(&cluster);
    assert_eq!(fs::read(shard.join("f")).unwrap(), b"written meanwhile");
    for shard in ["before", "during"] {
        cluster.assert_clean(shard);
    }
    let status = cluster.cli_json(&["dev", "status"]);
    assert_eq!(status["members"][0]["restarts"], 0, "{status}");
}
