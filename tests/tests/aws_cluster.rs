//! Whole clusters on an emulated AWS, through the real SDK: volumes are EBS volumes that the nodes make, attach, enlarge and delete.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use shardfs_tests::Cluster;
use shardfs_tests::aws::{Aws, BYTES_PER_GIB, CLUSTER};
use shardfs_tests::cluster::eventually;
use shardfs_tests::ec2::{Fault, Kind};
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::volumes::{SERVED_MAX, find, is_served, may_enlarge};

fn add(cluster: &Cluster, volume: &str, nodes: &str) {
    cluster.cli_run(&["volume", "add", volume, "--kind", "aws", "--size", "8GiB", "--nodes", nodes]);
    is_served(cluster, volume);
}

#[test]
fn a_cluster_lives_on_ebs_volumes() {
    let mut aws = Aws::start(3);
    let cluster = Cluster::start(&aws.options("aws"));
    for volume in ["vol-1", "vol-2", "vol-3"] {
        is_served(&cluster, volume);
        aws.wait_for_attachments(&cluster, volume, &[1, 2, 3]);
        let disk = aws.disk(&cluster, volume);
        assert_eq!((disk.volume_type.as_str(), disk.multi_attach, disk.size_gib), ("io2", true, 16));
        assert_eq!(disk.tags["shardfs:cluster"], CLUSTER);
        assert_eq!(disk.tags["shardfs:volume"], volume);
    }
    assert_eq!(aws.ec2.volumes_ever(), 3);
    cluster.shard("kept");
    let volume = cluster.cli_json(&["shard", "show", "kept"])["volume"].as_str().unwrap().to_owned();
    let loads = [ShardLoad::new("kept", &[3], 1, false)];
    let seed = load::seed();
    load::run(&cluster, &loads, seed, |progress| {
        progress.wait_for(10, SERVED_MAX);
        // A failover: the device is there, so EC2 is not asked.
        let primary = find(&cluster, &volume).unwrap()["primary"].as_str().unwrap().to_owned();
        aws.ec2.fault(Fault::of(Kind::Unavailable));
        cluster.cli_run(&["dev", "kill", &primary]);
        eventually(SERVED_MAX, || match find(&cluster, &volume).unwrap()["primary"].as_str() {
            Some(now) if now != primary => Ok(()),
            other => Err(format!("{other:?}")),
        });
        progress.wait_for(10, SERVED_MAX);
        aws.ec2.clear_faults();
        cluster.cli_run(&["dev", "start", &primary]);

        // Faster, and larger, while it is used.
        let said = cluster.cli_run(&["volume", "iops", &volume, "9000"]);
        assert!(said.contains("9000 IOPS"), "{said}");
        assert_eq!(aws.disk(&cluster, &volume).iops, Some(9000));
        let refused = cluster.cli_fails(&["volume", "iops", &volume, "90000"]);
        assert!(refused.contains("16 GiB") && refused.contains("16000"), "{refused}");
        let grow = ["volume", "grow", &volume, "--size", "20GiB"];
        let total = || is_served(&cluster, &volume)["served"]["total_bytes"].as_u64().unwrap();
        if may_enlarge() {
            let before = total();
            cluster.cli_run(&grow);
            let after = total();
            assert!(before < 16 * BYTES_PER_GIB && after > 18 * BYTES_PER_GIB, "{before} {after}");
            // tests/vm/guest/growth.sh looks for it.
            println!("{volume} has grown from {before} to {after} bytes while it was written to");
        } else {
            let said = cluster.cli_fails(&grow);
            assert!(said.contains("CAP_SYS_RESOURCE"), "{said}");
        }
        assert_eq!(aws.disk(&cluster, &volume).size_gib, 20);
        progress.wait_for(10, SERVED_MAX);

        // A machine is lost for good, and another one takes its place.
        let lost = find(&cluster, &volume).unwrap()["primary"].as_str().unwrap().to_owned();
        let number: usize = lost.strip_prefix("node-").unwrap().parse().unwrap();
        cluster.cli_run(&["dev", "kill", &lost]);
        let old = aws.replace(number);
        aws.ec2.terminate(&old);
        progress.wait_for(10, SERVED_MAX);
        cluster.cli_run(&["dev", "start", &lost]);
        for volume in ["vol-1", "vol-2", "vol-3"] {
            aws.wait_for_attachments(&cluster, volume, &[1, 2, 3]);
        }
        cluster.cli_run(&["volume", "promote", &volume, &lost]);
        progress.wait_for(10, SERVED_MAX);
    });
    loads[0].history().check_all(&load::contents(&cluster, "kept")).unwrap();
    cluster.assert_clean("kept");
    let strays = cluster.cli_json(&["volume", "strays"]);
    assert_eq!(strays.as_array().unwrap().len(), 0, "{strays}");
    assert_eq!(aws.ec2.volumes_ever(), 3);
}

#[test]
fn volumes_come_and_go_whatever_ec2_does() {
    let aws = Aws::start(2);
    let cluster = Cluster::start(&aws.options("dir"));
    // What EC2 does at any call, one after the other.
    let seed = load::seed();
    fastrand::seed(seed);
    let kinds = [
        Kind::Throttle,
        Kind::ServerError,
        Kind::ServerErrorAfterSuccess,
        Kind::Unavailable,
        Kind::TimeoutBefore(Duration::from_millis(100)),
        Kind::TimeoutAfterSuccess(Duration::from_millis(100)),
    ];
    aws.ec2.fault(Fault::of(Kind::StaleReads(Duration::from_millis(500))));
    for kind in kinds {
        aws.ec2.fault(Fault::of(kind).probability(0.1));
    }
    for round in 0..3 {
        let volume = format!("vol-{}", 10 + round);
        // The command may give up, and goes on when it is repeated.
        let repeat = |arguments: &[&str]| {
            eventually(Duration::from_secs(240), || {
                let output = cluster.cli_output(arguments);
                if output.status.success() {
                    Ok(())
                } else {
                    Err(String::from_utf8_lossy(&output.stderr).into_owned())
                }
            });
        };
        repeat(&["volume", "add", &volume, "--kind", "aws", "--size", "4GiB", "--nodes", "node-1"]);
        is_served(&cluster, &volume);
        repeat(&["volume", "attach", &volume, "node-2"]);
        aws.wait_for_attachments(&cluster, &volume, &[1, 2]);
        repeat(&["volume", "iops", &volume, "2000"]);
        repeat(&["volume", "promote", &volume, "node-2"]);
        is_served(&cluster, &volume);
        repeat(&["volume", "detach", &volume, "node-1"]);
        aws.wait_for_attachments(&cluster, &volume, &[2]);
        if round % 2 == 0 {
            let output = cluster.cli_output(&["volume", "delete", &volume]);
            if !output.status.success() {
                eventually(SERVED_MAX, || match find(&cluster, &volume) {
                    None => Ok(()),
                    Some(volume) => Err(volume.to_string()),
                });
            }
        }
    }
    aws.ec2.clear_faults();
    // No disk was made twice, and none is left of what was deleted.
    eventually(SERVED_MAX, || {
        let there: Vec<String> = aws.ec2.volumes().iter().map(|v| v.tags["shardfs:volume"].clone()).collect();
        if there == ["vol-11"] { Ok(()) } else { Err(format!("{there:?}")) }
    });
    assert_eq!(aws.ec2.volumes_ever(), 3);
    let strays = cluster.cli_json(&["volume", "strays"]);
    assert_eq!(strays.as_array().unwrap().len(), 0, "{strays}");
}

#[test]
fn what_nobody_accounts_for_is_listed_and_removed_on_request_only() {
    let mut aws = Aws::start(3);
    let cluster = Cluster::start(&aws.options("dir"));
    add(&cluster, "vol-9", "node-1,node-2");
    let list = || -> Vec<(String, String)> {
        let strays = cluster.cli_json(&["volume", "strays"]);
        let text = |stray: &serde_json::Value, field: &str| stray[field].as_str().unwrap().to_owned();
        strays.as_array().unwrap().iter().map(|s| (text(s, "stray"), text(s, "why"))).collect()
    };
    assert_eq!(list(), []);
    let said = cluster.cli_run(&["volume", "strays"]);
    assert!(said.contains("none"), "{said}");

    // Kept: a disk of no volume.
    add(&cluster, "vol-8", "node-1");
    let kept = aws.disk(&cluster, "vol-8").id;
    cluster.cli_run(&["volume", "delete", "vol-8", "--keep"]);
    assert_eq!(list(), [(kept.clone(), "it is of no volume of the cluster".to_owned())]);
    // It may be taken again, by its name only.
    let refused = cluster
        .cli_fails(&["volume", "add", "vol-7", "--kind", "aws", "--source", &kept, "--nodes", "node-1"]);
    assert!(refused.contains("vol-8"), "{refused}");
    cluster.cli_run(&["volume", "add", "vol-8", "--kind", "aws", "--source", &kept, "--nodes", "node-3"]);
    is_served(&cluster, "vol-8");
    assert_eq!(list(), []);
    let refused = cluster.cli_fails(&["volume", "strays", "--remove", &kept]);
    assert!(refused.contains("no stray"), "{refused}");
    cluster.cli_run(&["volume", "delete", "vol-8", "--keep"]);
    cluster.cli_run(&["volume", "strays", "--remove", &kept]);
    eventually(SERVED_MAX, || aws.ec2.volume(&kept).map_or(Ok(()), |v| Err(format!("{v:?}"))));

    // Cut off: EC2 takes longer than anybody waits, and nobody repeats it.
    aws.ec2.delays(|delays| delays.create = Duration::from_secs(8));
    let gave_up = cluster.cli_output(&[
        "--deadline",
        "3",
        "volume",
        "add",
        "vol-7",
        "--kind",
        "aws",
        "--size",
        "4GiB",
        "--nodes",
        "node-1",
    ]);
    assert!(!gave_up.status.success(), "{gave_up:?}");
    aws.ec2.delays(|delays| delays.create = Duration::from_millis(30));
    let strays = eventually(SERVED_MAX, || {
        let strays = list();
        if strays.len() == 1 && strays[0].0.starts_with("vol-") {
            Ok(strays)
        } else {
            Err(format!("{strays:?}"))
        }
    });
    assert!(strays[0].1.contains("cut off"), "{strays:?}");
    let other = cluster
        .cli_fails(&["volume", "add", "vol-7", "--kind", "aws", "--size", "5GiB", "--nodes", "node-1"]);
    assert!(other.contains("4 GiB") && other.contains("volume delete vol-7"), "{other}");
    cluster.cli_run(&["volume", "delete", "vol-7"]);
    assert_eq!(list(), []);

    // A machine that is gone, without a detach.
    let old = aws.instances[1].clone();
    cluster.cli_run(&["dev", "kill", "node-2"]);
    aws.ec2.stop(&old);
    let disk = aws.disk(&cluster, "vol-9").id;
    let stray = format!("{disk}={}", old.id);
    let found = list();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0 == stray && found[0].1.contains("does not run"), "{found:?}");
    aws.replace(2);
    cluster.cli_run(&["dev", "start", "node-2"]);
    eventually(SERVED_MAX, || {
        let found = list();
        let told = found.len() == 1 && found[0].0 == stray && found[0].1.contains("no node");
        if told { Ok(()) } else { Err(format!("{found:?}")) }
    });
    cluster.cli_run(&["volume", "strays", "--remove", &stray, "--force"]);
    assert_eq!(list(), []);
    aws.wait_for_attachments(&cluster, "vol-9", &[1, 2]);

    // With what belongs to it.
    cluster.cli_run(&["volume", "delete", "vol-9"]);
    eventually(SERVED_MAX, || {
        let left = aws.ec2.volumes();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    let aws = Aws::start(2);
    let cluster = Cluster::start(&aws.options("dir"));
    let refused = |arguments: &[&str], words: &[&str]| {
        let mut all = vec!["volume", "add", "vol-9", "--kind", "aws"];
        all.extend(arguments);
        let said = cluster.cli_fails(&all);
        for word in words {
            assert!(said.contains(word), "{arguments:?}: no {word:?} in: {said}");
        }
    };
    refused(&["--size", "3GiB", "--nodes", "node-1"], &["4 to 65536 GiB"]);
    refused(&["--size", "4097MiB", "--nodes", "node-1"], &["whole number of GiB"]);
    refused(&["--size", "4GiB", "--iops", "5000", "--nodes", "node-1"], &["4000"]);
    refused(&["--size", "4GiB", "--nodes", "node-7"], &["no node node-7"]);
    refused(&["--source", "vol-0123456789abcdef0", "--nodes", "node-1"], &["no disk"]);
    refused(&["--source", "/dev/sdb", "--nodes", "node-1"], &["vol-0a1b2c3d4e5f60718"]);
    assert_eq!(aws.ec2.volumes_ever(), 0);
    // What the role may not do is named.
    aws.ec2.fault(Fault::of(Kind::Unauthorized).on("CreateVolume"));
    refused(&["--size", "4GiB", "--nodes", "node-1"], &["ec2:CreateVolume"]);
    aws.ec2.clear_faults();
    // Nothing of it is in the way of what is asked for then.
    cluster.cli_run(&["volume", "add", "vol-9", "--kind", "aws", "--size", "5GiB", "--nodes", "node-1"]);
    is_served(&cluster, "vol-9");
    let other = cluster.cli_fails(&["volume", "iops", "vol-1", "3000"]);
    assert!(other.contains("kind `dir`"), "{other}");
}

/// Whatever is given up or taken out: what somebody else has made, or was kept, stays.
#[test]
fn disks_with_content_of_others_are_not_deleted() {
    let aws = Aws::start(2);
    let cluster = Cluster::start(&aws.options("dir"));
    add(&cluster, "vol-8", "node-1");
    let kept = aws.disk(&cluster, "vol-8").id;
    cluster.cli_run(&["volume", "delete", "vol-8", "--keep"]);
    // Another one of the name is begun, and given up.
    aws.ec2.delays(|delays| delays.create = Duration::from_secs(8));
    let larger = ["volume", "add", "vol-8", "--kind", "aws", "--size", "9GiB", "--nodes", "node-1"];
    let gave_up = cluster.cli_output(&[&["--deadline", "3"][..], &larger].concat());
    assert!(!gave_up.status.success(), "{gave_up:?}");
    aws.ec2.delays(|delays| delays.create = Duration::from_millis(30));
    cluster.cli_run(&["volume", "delete", "vol-8"]);
    eventually(SERVED_MAX, || match &aws.ec2.volumes()[..] {
        [only] if only.id == kept => Ok(()),
        other => Err(format!("{other:?}")),
    });

    // By hand, and with something on it that is not this volume's.
    aws.ec2.untag(&kept);
    let other = ["volume", "add", "vol-6", "--kind", "aws", "--source", &kept, "--nodes", "node-1"];
    cluster.cli_run(&other);
    eventually(SERVED_MAX, || {
        let said = find(&cluster, "vol-6").unwrap()["served"]["trouble"].to_string();
        if said.contains("left alone") { Ok(()) } else { Err(said) }
    });
    let same = ["volume", "add", "vol-5", "--kind", "aws", "--source", &kept, "--nodes", "node-2"];
    let refused = cluster.cli_fails(&same);
    assert!(refused.contains("source of volume vol-6"), "{refused}");
    let refused = cluster.cli_fails(&["volume", "delete", "vol-6"]);
    assert!(refused.contains("--keep"), "{refused}");
    cluster.cli_run(&["volume", "delete", "vol-6", "--keep"]);
    assert_eq!(aws.ec2.volume(&kept).unwrap().status(), "available");
    let refused = cluster.cli_fails(&[
        "volume",
        "add",
        "verify-node-1",
        "--kind",
        "aws",
        "--size",
        "4GiB",
        "--nodes",
        "node-1",
    ]);
    assert!(refused.contains("choose another"), "{refused}");
    // As what it is, it is used.
    cluster.cli_run(&["volume", "add", "vol-8", "--kind", "aws", "--source", &kept, "--nodes", "node-1"]);
    is_served(&cluster, "vol-8");
}

/// Backups are EBS snapshots: of one the volume comes back where it was, and another one beside it.
#[test]
fn a_volume_is_backed_up_and_comes_back_after_its_disk_was_lost() {
    let aws = Aws::start(2);
    let cluster = Cluster::start(&aws.options("dir"));
    add(&cluster, "vol-9", "node-1,node-2");
    // New shards go there only.
    for volume in ["vol-1", "vol-2"] {
        cluster.cli_run(&["volume", "delete", volume, "--keep"]);
    }
    let loads = [ShardLoad::new("kept", &[3], 0, false)];
    cluster.shard("kept");
    cluster.cli_run(&["shard", "snapshot", "kept", "empty"]);
    let (id, began, over) = load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(20, SERVED_MAX);
        let began = loads[0].history().now();
        // What EC2 does now and then keeps no backup from being taken, once.
        let silent = Kind::TimeoutAfterSuccess(Duration::from_millis(100));
        aws.ec2.fault(Fault::of(silent).on("CreateSnapshot").times(1));
        let backup = cluster.cli_json(&["backup", "create", "vol-9"]);
        assert_eq!(backup["state"], "done", "{backup}");
        let over = loads[0].history().now();
        progress.wait_for(10, SERVED_MAX);
        (backup["id"].as_str().unwrap().to_owned(), began, over)
    });
    assert_eq!(aws.ec2.snapshots().len(), 1, "{:?}", aws.ec2.snapshots());
    let verified = cluster.cli_run(&["backup", "verify", &id]);
    assert!(verified.contains("clean"), "{verified}");
    eventually(SERVED_MAX, || match aws.ec2.volumes().len() {
        1 => Ok(()),
        other => Err(format!("{other} disks: what was verified has gone")),
    });
    let as_then = |shard: &str| {
        cluster.assert_clean(shard);
        let found = load::contents(&cluster, shard);
        loads[0].history().check(&found, began, over).unwrap_or_else(|e| panic!("{shard}: {e}"));
    };
    let beside = ["backup", "restore", &id, "--volume", "vol-8", "--nodes", "node-2,node-1"];
    let restored = cluster.cli_json(&beside);
    assert_eq!(restored["shards"].as_array().unwrap().len(), 2, "{restored}");
    is_served(&cluster, "vol-8");
    aws.wait_for_attachments(&cluster, "vol-8", &[1, 2]);
    as_then("kept.restored");
    loads[0].history().check_all(&load::contents(&cluster, "kept")).unwrap();

    // The disk is lost, and with it all that was written since.
    let lost = aws.disk(&cluster, "vol-9").id;
    for node in ["node-1", "node-2"] {
        cluster.cli_run(&["dev", "kill", node]);
    }
    aws.ec2.destroy_backing_file(&lost);
    for node in ["node-1", "node-2"] {
        cluster.cli_run(&["dev", "start", node]);
    }
    eventually(SERVED_MAX, || {
        let output = cluster.cli_output(&["backup", "restore", &id, "--in-place", "--drop-missing"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    });
    is_served(&cluster, "vol-9");
    let disk = aws.disk(&cluster, "vol-9");
    assert_ne!(disk.id, lost);
    as_then("kept");
    let strays = cluster.cli_json(&["volume", "strays"]);
    assert!(strays.as_array().unwrap().iter().all(|stray| stray["disk"] == lost.as_str()), "{strays}");
    cluster.cli_run(&["backup", "delete", &id]);
    eventually(SERVED_MAX, || match aws.ec2.snapshots().len() {
        0 => Ok(()),
        other => Err(format!("{other} snapshots")),
    });
}
