//! The ways to mount and unmount: mount(8), fstab, options, signals.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::time::Duration;

use rustix::process::Signal;
use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::mounted::{self, MOUNT_MAX};
use shardfs_tests::{Cluster, Options, Shell};

/// A shell in which mount(8) finds shardfsd as its helper, without a change to the machine: /usr/sbin is
/// overlaid in a mount namespace of the script's own.
fn with_helper(cluster: &Cluster, name: &str) -> Shell {
    let scratch = cluster.scratch(name);
    for folder in ["upper", "work", "point"] {
        fs::create_dir(scratch.join(folder)).unwrap();
    }
    Shell::new(&scratch)
        .with("BIN", bin_dir())
        .with("ENDPOINTS", cluster.tcp_addresses().join(","))
        .with("POINT", scratch.join("point"))
        .with(
            "SETUP",
            r#"mount -t tmpfs tmpfs work
               mkdir work/upper work/work
               mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir=work/upper,workdir=work/work /usr/sbin
               ln -s "$BIN/shardfsd" /usr/sbin/mount.fuse.shardfs"#,
        )
}

#[test]
fn by_mount_8() {
    let cluster = Cluster::shared();
    fs::write(cluster.shard("by-mount").join("k"), "v").unwrap();
    let said = with_helper(cluster, "mount-8").run(
        r#"unshare --mount --propagation private bash -euo pipefail -c '
             eval "$SETUP"
             mount -t fuse.shardfs "$ENDPOINTS" "$POINT" -o client_id=default
             test "$(cat "$POINT/by-mount/k")" = v
             echo w >"$POINT/by-mount/k2"
             grep -q " $POINT fuse.shardfs " /proc/self/mounts
             umount "$POINT"
             if test -e "$POINT/by-mount"; then exit 1; fi
             mount -t fuse.shardfs "$ENDPOINTS" "$POINT" -o ro,client_id=default
             if touch "$POINT/by-mount/x" 2>err; then exit 1; fi
             grep -qi read-only err
             umount "$POINT"
             if mount -t fuse.shardfs "$ENDPOINTS" "$POINT" -o no_such_option=1 2>err; then exit 1; fi
             grep no_such_option err'"#,
    );
    assert!(said.contains("no_such_option"), "{said}");
    assert_eq!(fs::read(cluster.mount().join("by-mount/k2")).unwrap(), b"w\n");
}

#[test]
fn a_mount_is_made_read_only_and_writable_again() {
    let cluster = Cluster::shared();
    cluster.shard("remounted");
    with_helper(cluster, "remount").run(
        r#"unshare --mount --propagation private bash -euo pipefail -c '
             eval "$SETUP"
             mount -t fuse.shardfs "$ENDPOINTS" "$POINT" -o client_id=default
             exec 9>"$POINT/remounted/open"
             # What is open for writing keeps it writable, as on any file system.
             if mount -o remount,ro "$POINT" 2>err; then exit 1; fi
             grep -qi busy err
             exec 9>&-
             mount -o remount,ro "$POINT"
             grep " $POINT fuse.shardfs ro,nosuid,nodev" /proc/self/mounts
             if touch "$POINT/remounted/x" 2>err; then exit 1; fi
             grep -qi read-only err
             mount -o remount,rw,noexec "$POINT"
             grep " $POINT fuse.shardfs rw,nosuid,nodev,noexec" /proc/self/mounts
             touch "$POINT/remounted/x"
             umount "$POINT"'"#,
    );
    assert!(cluster.mount().join("remounted/x").exists());
}

#[test]
fn by_fstab() {
    let cluster = Cluster::shared();
    fs::write(cluster.shard("by-fstab").join("k"), "v").unwrap();
    with_helper(cluster, "fstab").run(
        r#"unshare --mount --propagation private bash -euo pipefail -c '
             eval "$SETUP"
             echo "$ENDPOINTS $POINT fuse.shardfs client_id=default,_netdev,noatime 0 0" >fstab
             mount -T fstab "$POINT"
             test "$(cat "$POINT/by-fstab/k")" = v
             # It is mounted already, which mount sees.
             mount -a -T fstab
             test "$(grep -c " $POINT fuse.shardfs " /proc/self/mounts)" = 1
             umount "$POINT"'"#,
    );
}

#[test]
fn a_signal_unmounts_cleanly() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("by-signal");
    for signal in [Signal::TERM, Signal::INT] {
        let point = cluster.scratch("signal-mount");
        cluster.cli_run(&["mount", point.to_str().unwrap()]);
        // Not synced: a clean end loses nothing.
        fs::write(point.join("by-signal/k"), format!("{signal:?}")).unwrap();
        let parent = mounted::daemon(&point).parent();
        parent.signal(signal);
        eventually(MOUNT_MAX, || if parent.is_alive() { Err("still alive".into()) } else { Ok(()) });
        assert_eq!(fs::read_dir(&point).unwrap().count(), 0, "unmounted");
        assert_eq!(fs::read_to_string(shard.join("k")).unwrap(), format!("{signal:?}"));
    }
}

#[test]
fn a_frozen_node_is_waited_for() {
    // Alone: a backup would take its volumes over while the test looks.
    let cluster = Cluster::start(&Options { nodes: 1, ..Options::default() });
    let shard = cluster.shard("frozen");
    let node = cluster.primary_of("frozen");
    cluster.freeze(&node);
    let writer = std::thread::spawn({
        let path = shard.join("k");
        move || {
            fs::write(&path, "through")?;
            fs::File::open(&path)?.sync_all()
        }
    });
    std::thread::sleep(Duration::from_secs(2));
    assert!(!writer.is_finished(), "a frozen node answers nothing");
    cluster.cli_run(&["dev", "start", &node]);
    writer.join().unwrap().unwrap();
    assert_eq!(fs::read(shard.join("k")).unwrap(), b"through");
}

#[test]
fn the_mount_comes_back_when_its_daemon_dies() {
    let cluster = Cluster::start(&Options { nodes: 1, ..Options::default() });
    let shard = cluster.shard("daemon-dies");
    fs::write(shard.join("k"), "v").unwrap();
    let daemon = cluster.daemon();
    daemon.signal(Signal::KILL);
    eventually(MOUNT_MAX, || if daemon.is_alive() { Err("still alive".into()) } else { Ok(()) });
    eventually(MOUNT_MAX, || fs::read(shard.join("k")).map(drop).map_err(|e| e.to_string()));
    assert_ne!(cluster.daemon().pid, daemon.pid);
    fs::write(shard.join("k"), "w").unwrap();
    cluster.assert_clean("daemon-dies");
}

#[test]
fn records_that_two_mounts_append_are_whole() {
    const RECORDS: usize = 150;
    let cluster = Cluster::shared();
    let here = cluster.shard("appended");
    let point = cluster.scratch("second-mount");
    cluster.cli_run(&["mount", point.to_str().unwrap()]);
    let there = point.join("appended");
    fs::write(here.join("log"), "").unwrap();
    // Lengths that are no divisor of a page: many records cross one.
    std::thread::scope(|scope| {
        for (writer, folder) in [&here, &here, &there, &there].into_iter().enumerate() {
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).open(folder.join("log")).unwrap();
                for number in 0..RECORDS {
                    let mut record = format!("{writer}:{number:05}:").into_bytes();
                    record.resize(99 + 1700 * (number % 3), b'a' + writer as u8);
                    record.push(b'\n');
                    assert_eq!(log.write(&record).unwrap(), record.len());
                }
            });
        }
    });
    for folder in [&here, &there] {
        let text = fs::read_to_string(folder.join("log")).unwrap();
        let mut next = [0; 4];
        for line in text.lines() {
            let (head, fill) = line.split_at(8);
            let (writer, number) = head.trim_end_matches(':').split_once(':').unwrap();
            let (writer, number): (usize, usize) = (writer.parse().unwrap(), number.parse().unwrap());
            assert_eq!(number, next[writer], "records of a writer are in order");
            next[writer] += 1;
            assert_eq!(line.len(), 99 + 1700 * (number % 3));
            assert!(fill.bytes().all(|byte| byte == b'a' + writer as u8), "a torn record: {line:?}");
        }
        assert_eq!(next, [RECORDS; 4]);
    }
    cluster.cli_run(&["umount", point.to_str().unwrap()]);
}

#[test]
fn a_node_that_is_away_does_not_freeze_the_root() {
    let cluster = Cluster::start(&Options { nodes: 2, ..Options::default() });
    let shards: Vec<_> = (0..4).map(|n| cluster.shard(&format!("s{n}"))).collect();
    let node = cluster.primary_of("s0");
    for shard in &shards {
        assert!(fs::metadata(shard).unwrap().is_dir());
    }
    cluster.cli_run(&["dev", "kill", &node]);
    // Long past the patience of requests these still fail, were they asked of the node.
    for shard in &shards {
        assert!(fs::metadata(shard).unwrap().is_dir(), "{}", shard.display());
    }
    fs::create_dir(cluster.mount().join("made-meanwhile")).unwrap();
    assert_eq!(fs::read_dir(cluster.mount()).unwrap().count(), 5);
    cluster.cli_run(&["dev", "start", &node]);
    fs::write(shards[0].join("k"), "v").unwrap();
}

/// With no node left the mount cannot answer. It is unmounted all the same, and nobody waits for what cannot come.
#[test]
fn a_cluster_whose_nodes_are_all_stopped_is_taken_down() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let cluster = Cluster::start(&Options::default());
    fs::write(cluster.shard("s").join("k"), "v").unwrap();
    for node in ["node-1", "node-2", "node-3"] {
        cluster.cli_run(&["dev", "kill", node, "--signal", "TERM"]);
    }
    eventually(PATIENCE, || match cluster.nodes().len() {
        0 => Ok(()),
        left => Err(format!("{left} nodes run")),
    });
    let said = cluster.cli_fails(&["status"]);
    assert!(said.contains("dev start") || said.contains("is down"), "{said}");
    cluster.cli_run(&["dev", "down"]);
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(cluster.mount().to_str().unwrap()));
}
