//! Volumes that a cluster on an emulated AWS adds by itself, by its policy.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use serde_json::Value;
use shardfs_tests::Cluster;
use shardfs_tests::aws::Aws;
use shardfs_tests::cluster::{Options, eventually};
use shardfs_tests::ec2::{Fault, Kind};
use shardfs_tests::volumes::{find, is_served};

/// How long a volume may take to be missed, made and served.
const ADDED_MAX: Duration = Duration::from_secs(90);
/// Longer than the cluster takes to look for room, some times over.
const LOOKED_SOME_TIMES: Duration = Duration::from_secs(16);
/// GiB of the volumes, which the emulator makes of 64 MiB each. With 3000 IOPS one costs 195.50.
const VOLUME_GIB: u64 = 4;
const MIB: u64 = 1 << 20;

/// A cluster of three nodes with one small volume, and how many were ever made.
fn small(aws: &Aws) -> (Cluster, u64) {
    let options = Options { volume_bytes: Some(VOLUME_GIB << 30), ..aws.options("aws") };
    let cluster = Cluster::start(&options);
    for volume in ["vol-2", "vol-3"] {
        is_served(&cluster, volume);
        cluster.cli_run(&["volume", "delete", volume]);
    }
    is_served(&cluster, "vol-1");
    (cluster, aws.ec2.volumes_ever())
}

fn free(cluster: &Cluster, volume: &str) -> u64 {
    is_served(cluster, volume)["served"]["free_bytes"].as_u64().unwrap()
}

/// Sets a policy that wants so much room.
fn set(cluster: &Cluster, min_free: u64, max_volumes: &str, max_cost: &str) -> Value {
    let min_free = min_free.to_string();
    let (size, iops) = (format!("{VOLUME_GIB}GiB"), "3000");
    cluster.cli_json(&[
        "volume",
        "policy",
        "set",
        "--min-free",
        &min_free,
        "--size",
        &size,
        "--iops",
        iops,
        "--max-volumes",
        max_volumes,
        "--max-cost",
        max_cost,
    ])
}

fn policy(cluster: &Cluster) -> Value {
    cluster.cli_json(&["volume", "policy"])
}

/// Waits until it is said why nothing is done.
fn says(cluster: &Cluster, word: &str) {
    eventually(ADDED_MAX, || {
        let state = policy(cluster);
        if state["now"].as_str().unwrap().contains(word) { Ok(()) } else { Err(state.to_string()) }
    });
}

/// Writes so much into a shard; a shard of that name is made if there is none.
fn fill(cluster: &Cluster, shard: &str, bytes: u64) {
    let folder = cluster.mount().join(shard);
    if !folder.is_dir() {
        cluster.shard(shard);
    }
    let part = 4 * MIB;
    for n in 0..bytes.div_ceil(part) {
        // What cannot be made smaller.
        let bytes: Vec<u8> = (0..part).map(|_| fastrand::u8(..)).collect();
        fs::write(folder.join(format!("part-{n}")), bytes).unwrap();
    }
    cluster.cli_run(&["ls", shard]);
}

/// Makes shards until one lies on a volume: their nodes are drawn by lot.
fn shard_on(cluster: &Cluster, volume: &str) -> String {
    for n in 0..40 {
        let name = format!("shard-{volume}-{n}");
        cluster.shard(&name);
        if cluster.cli_json(&["shard", "show", &name])["volume"] == volume {
            return name;
        }
    }
    panic!("no shard came to {volume}: {}", cluster.cli_json(&["volume", "list"]));
}

fn volumes(cluster: &Cluster) -> Vec<String> {
    let all = cluster.cli_json(&["volume", "list"]);
    all.as_array().unwrap().iter().map(|volume| volume["id"].as_str().unwrap().to_owned()).collect()
}

fn no_strays(cluster: &Cluster) {
    let strays = cluster.cli_json(&["volume", "strays"]);
    assert_eq!(strays.as_array().unwrap().len(), 0, "{strays}");
}

#[test]
fn a_cluster_that_runs_out_of_room_adds_a_volume_up_to_its_ceilings() {
    let aws = Aws::start(3);
    let (cluster, before) = small(&aws);
    assert!(cluster.cli_run(&["volume", "policy"]).contains("off"));
    let min_free = free(&cluster, "vol-1") - 30 * MIB;

    // There is room.
    let state = set(&cluster, min_free, "2", "1000");
    assert_eq!(state["policy"]["iops"], 3000);
    assert_eq!((state["volumes"].as_u64(), state["monthly_cost"].as_f64()), (Some(1), Some(195.5)));
    assert!(state["now"].as_str().unwrap().contains("vol-1 has"), "{state}");
    std::thread::sleep(LOOKED_SOME_TIMES);
    assert_eq!(aws.ec2.volumes_ever(), before);

    // There is not.
    fill(&cluster, "first", 40 * MIB);
    let added =
        eventually(ADDED_MAX, || find(&cluster, "auto-1").ok_or_else(|| policy(&cluster).to_string()));
    assert_eq!(added["provider"], "aws");
    let added = is_served(&cluster, "auto-1");
    assert_eq!(added["backups"].as_array().unwrap().len(), 2, "{added}");
    let primary = find(&cluster, "vol-1").unwrap()["primary"].clone();
    assert_ne!(added["primary"], primary, "by a node that served less");
    let disk = aws.disk(&cluster, "auto-1");
    assert_eq!((disk.size_gib, disk.iops), (VOLUME_GIB, Some(3000)));
    says(&cluster, "auto-1 has");
    // New shards come to it.
    let second = shard_on(&cluster, "auto-1");

    // The ceiling in number.
    fill(&cluster, &second, 40 * MIB);
    says(&cluster, "2 are the most");
    let said = cluster.cli_run(&["volume", "policy"]);
    assert!(said.contains("2 volumes of kind aws") && said.contains("391.00 a month"), "{said}");
    std::thread::sleep(LOOKED_SOME_TIMES);
    assert_eq!(aws.ec2.volumes_ever(), before + 1);

    // The ceiling in cost: a third would be 586.50.
    set(&cluster, min_free, "9", "586.49");
    says(&cluster, "586.50");
    std::thread::sleep(LOOKED_SOME_TIMES);
    assert_eq!(aws.ec2.volumes_ever(), before + 1);
    // Exactly at it.
    set(&cluster, min_free, "9", "586.50");
    is_added(&cluster, "auto-2");
    assert_eq!(aws.ec2.volumes_ever(), before + 2);

    // Off.
    let third = shard_on(&cluster, "auto-2");
    let state = cluster.cli_json(&["volume", "policy", "off"]);
    assert!(state["policy"].is_null() && state["adds"].is_null(), "{state}");
    fill(&cluster, &third, 40 * MIB);
    std::thread::sleep(LOOKED_SOME_TIMES);
    assert_eq!(volumes(&cluster), ["auto-1", "auto-2", "vol-1"]);
    assert_eq!(aws.ec2.volumes_ever(), before + 2);
    no_strays(&cluster);
    for shard in ["first", &second, &third] {
        cluster.assert_clean(shard);
    }
}

/// Waits until a volume is there and served.
fn is_added(cluster: &Cluster, volume: &str) {
    eventually(ADDED_MAX, || find(cluster, volume).map(drop).ok_or_else(|| policy(cluster).to_string()));
    is_served(cluster, volume);
}

#[test]
fn what_a_node_began_before_it_died_another_one_finishes() {
    let aws = Aws::start(3);
    let (cluster, before) = small(&aws);
    // An empty volume that has not the room would say that a new one has not either.
    cluster.shard("first");
    assert_eq!(policy(&cluster)["acting"], "node-1");
    // EC2 makes what node-1 asks for, and does not say so while it lives.
    let lost = Kind::TimeoutAfterSuccess(Duration::from_secs(8));
    aws.ec2.fault(Fault::of(lost).on("CreateVolume").by(&aws.instances[0].access_key));
    set(&cluster, free(&cluster, "vol-1") + MIB, "2", "1000");
    eventually(ADDED_MAX, || match aws.ec2.volumes_ever() {
        now if now > before => Ok(()),
        _ => Err(policy(&cluster).to_string()),
    });
    cluster.cli_run(&["dev", "kill", "node-1"]);
    is_added(&cluster, "auto-1");
    let added = find(&cluster, "auto-1").unwrap();
    assert!(!added.to_string().contains("node-1"), "what is dead gets none: {added}");
    eventually(ADDED_MAX, || {
        let state = policy(&cluster);
        if state["making"].is_null() && state["acting"] == "node-2" { Ok(()) } else { Err(state.to_string()) }
    });
    // It comes back to find everything done.
    cluster.cli_run(&["dev", "start", "node-1"]);
    eventually(ADDED_MAX, || match policy(&cluster)["acting"].as_str() {
        Some("node-1") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    aws.ec2.clear_faults();
    std::thread::sleep(LOOKED_SOME_TIMES);
    assert_eq!(aws.ec2.volumes_ever(), before + 1);
    assert_eq!(volumes(&cluster), ["auto-1", "vol-1"]);
    no_strays(&cluster);
}

#[test]
fn what_ec2_refuses_is_said_and_off_leaves_nothing_behind() {
    let aws = Aws::start(3);
    let (cluster, before) = small(&aws);
    cluster.shard("first");
    aws.ec2.fault(Fault::of(Kind::Unauthorized).on("CreateVolume"));
    let wanted = free(&cluster, "vol-1") + MIB;
    set(&cluster, wanted, "2", "1000");
    let failed = eventually(ADDED_MAX, || {
        let state = policy(&cluster);
        if state["failures"].as_u64().unwrap() > 0 { Ok(state) } else { Err(state.to_string()) }
    });
    assert!(failed["last_error"].as_str().unwrap().contains("ec2:CreateVolume"), "{failed}");
    assert!(failed["making"].is_null(), "{failed}");
    // Once more by itself, as soon as it may.
    aws.ec2.clear_faults();
    // Numbers of what was refused are not given again.
    let first = eventually(ADDED_MAX, || {
        let volumes = cluster.cli_json(&["volume", "list"]);
        let ids = volumes.as_array().unwrap().iter().map(|volume| volume["id"].as_str().unwrap().to_owned());
        ids.into_iter().find(|id| id.starts_with("auto-")).ok_or_else(|| policy(&cluster).to_string())
    });
    is_served(&cluster, &first);
    assert_eq!(aws.ec2.volumes_ever(), before + 1);

    // One whose disk is made, but which cannot be added, is given up.
    aws.ec2.fault(Fault::of(Kind::TimeoutAfterSuccess(Duration::from_secs(20))).on("CreateVolume"));
    fill(&cluster, &shard_on(&cluster, &first), 12 * MIB);
    set(&cluster, wanted, "3", "1000");
    eventually(ADDED_MAX, || match aws.ec2.volumes_ever() {
        now if now > before + 1 => Ok(()),
        _ => Err(policy(&cluster).to_string()),
    });
    aws.ec2.fault(Fault::of(Kind::Unauthorized).on("DescribeVolumes"));
    eventually(ADDED_MAX, || {
        let state = policy(&cluster);
        let failed = state["making"].is_string() && state["failures"].as_u64().unwrap() > 0;
        if failed { Ok(()) } else { Err(state.to_string()) }
    });
    cluster.cli_run(&["volume", "policy", "off"]);
    aws.ec2.clear_faults();
    eventually(ADDED_MAX, || {
        let there: Vec<String> = aws.ec2.volumes().iter().map(|v| v.tags["shardfs:volume"].clone()).collect();
        if there.len() == 2 && there.contains(&first) { Ok(()) } else { Err(format!("{there:?}")) }
    });
    eventually(ADDED_MAX, || {
        let state = policy(&cluster);
        if state["making"].is_null() { Ok(()) } else { Err(state.to_string()) }
    });
    assert_eq!(volumes(&cluster), [first.as_str(), "vol-1"]);
    no_strays(&cluster);

    // What could never act is refused.
    for (wrong, said) in [
        (["--min-free", "4GiB", "--size", "4GiB", "--max-cost", "1000"], "75 %"),
        (["--min-free", "1GiB", "--size", "4GiB", "--max-cost", "100"], "195.50"),
        (["--min-free", "1GiB", "--size", "3GiB", "--max-cost", "1000"], "4 to 65536 GiB"),
    ] {
        let mut all = vec!["volume", "policy", "set", "--iops", "3000", "--max-volumes", "2"];
        all.extend(wrong);
        let refused = cluster.cli_fails(&all);
        assert!(refused.contains(said), "no {said:?} in: {refused}");
    }
    assert!(policy(&cluster)["policy"].is_null());
}
