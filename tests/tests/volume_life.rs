//! A volume's life while it is used: given to another node, made larger, taken out of the cluster.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use shardfs_tests::cluster::eventually;
use shardfs_tests::etcd::Etcd;
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::volumes::{SERVED_MAX, find, is_served, may_enlarge};
use shardfs_tests::{Cluster, Options, sh};

const MIB: u64 = 1 << 20;

fn add(cluster: &Cluster, id: &str, image: &Path, size: &str, nodes: &str) {
    let image = image.to_str().unwrap();
    cluster.cli_run(&[
        "volume", "add", id, "--kind", "loop", "--source", image, "--size", size, "--nodes", nodes,
    ]);
    is_served(cluster, id);
}

fn loops_over(image: &Path) -> usize {
    sh("/", &format!("losetup --associated {} | wc -l", image.display())).trim().parse().unwrap()
}

#[test]
fn a_volume_grows_under_load_and_its_backup_serves_all_of_it() {
    let options = Options { nodes: 3, ..Options::default() };
    let cluster = Cluster::start(&options);
    let seed = load::seed();
    let may = may_enlarge();
    let loads = [ShardLoad::new("grown", &[4], 1, false)];
    cluster.shard("grown");
    let id = cluster.cli_json(&["shard", "show", "grown"])["volume"].as_str().unwrap().to_owned();
    let size = |volume: &Value| volume["served"]["total_bytes"].as_u64().unwrap();
    let before = is_served(&cluster, &id);
    let asked = before["size_bytes"].as_u64().unwrap() + 512 * MIB;
    // The node is killed while there is load: what a mount was answered and is not synced yet is made again by the mount.
    load::run(&cluster, &loads, seed, |progress| {
        progress.wait_for(10, SERVED_MAX);
        let grow = ["volume", "grow", &id, "--size", &asked.to_string()];
        if may {
            let said = cluster.cli_run(&grow);
            assert!(said.contains("has grown"), "{said}");
        } else {
            let said = cluster.cli_fails(&grow);
            assert!(said.contains("CAP_SYS_RESOURCE"), "{said}");
        }
        progress.wait_for(10, SERVED_MAX);
        let grown = is_served(&cluster, &id);
        assert_eq!(grown["size_bytes"].as_u64(), Some(asked));
        if may {
            assert!(size(&grown) > size(&before) + 400 * MIB, "{before} {grown}");
            // Once more is harmless.
            cluster.cli_run(&grow);
        } else {
            assert_eq!(size(&grown), size(&before), "it goes on as it was");
        }
        let primary = grown["primary"].as_str().unwrap().to_owned();
        cluster.cli_run(&["dev", "kill", &primary]);
        let taken = eventually(SERVED_MAX, || {
            let volume = is_served(&cluster, &id);
            if volume["primary"] == *primary { Err("the killed node has it".to_owned()) } else { Ok(volume) }
        });
        assert_eq!(size(&taken), size(&grown));
        progress.wait_for(10, SERVED_MAX);
    });
    let refused = cluster.cli_fails(&["volume", "grow", &id, "--size", "64MiB"]);
    assert!(refused.contains("only grow"), "{refused}");
    let refused = cluster.cli_fails(&["volume", "grow", &id]);
    assert!(refused.contains("--size"), "{refused}");
    let found = load::contents(&cluster, "grown");
    loads[0].history().check_all(&found).unwrap();
    cluster.assert_clean("grown");
}

/// `dev up` of a cluster whose volumes were changed takes them as they are.
fn changed_volumes_stay(arguments: &[&str]) {
    let options = Options { nodes: 2, volume_bytes: Some(256 * MIB), ..Options::default() };
    let (cluster, output) = Cluster::try_start(&options, arguments);
    assert!(output.status.success(), "{output:?}");
    std::fs::write(cluster.shard("kept").join("k"), "v").unwrap();
    let kept = cluster.cli_json(&["shard", "show", "kept"])["volume"].as_str().unwrap().to_owned();
    let gone = if kept == "vol-1" { "vol-2" } else { "vol-1" };
    let primary = is_served(&cluster, &kept)["primary"].as_str().unwrap().to_owned();
    let other = if primary == "node-1" { "node-2" } else { "node-1" };
    cluster.cli_run(&["volume", "detach", &kept, other]);
    is_served(&cluster, gone);
    cluster.cli_run(&["volume", "delete", gone]);
    let larger = 320 * MIB;
    let grown = may_enlarge();
    if grown {
        cluster.cli_run(&["volume", "grow", &kept, "--size", &larger.to_string()]);
    }
    // What is said of a volume that is there names what changes it.
    let image = cluster.dir().join(format!("volumes/{kept}.img"));
    let refused = cluster.cli_fails(&[
        "volume",
        "add",
        &kept,
        "--kind",
        "loop",
        "--source",
        image.to_str().unwrap(),
        "--size",
        "256MiB",
        "--nodes",
        "node-1,node-2",
    ]);
    assert!(refused.contains("differs in its nodes") && refused.contains("volume attach"), "{refused}");
    for round in ["first", "second"] {
        cluster.cli_run(&["dev", "down"]);
        let output = cluster.up(&options, &[]);
        assert!(output.status.success(), "{round}: {output:?}");
        let volume = is_served(&cluster, &kept);
        assert_eq!(volume["primary"], primary.as_str(), "{round}");
        assert_eq!(volume["backups"], serde_json::json!([]), "{round}");
        if grown {
            assert_eq!(volume["size_bytes"].as_u64(), Some(larger), "{round}");
        }
        assert_eq!(std::fs::read_to_string(cluster.mount().join("kept/k")).unwrap(), "v", "{round}");
        assert!(find(&cluster, gone).is_none(), "{round}: {gone} is there again");
        assert!(!cluster.dir().join(format!("volumes/{gone}.img")).exists(), "{round}");
    }
    cluster.cli_run(&["volume", "attach", &kept, other]);
    cluster.assert_clean("kept");
}

#[test]
fn a_cluster_whose_volumes_were_changed_starts_again() {
    changed_volumes_stay(&[]);
}

#[test]
fn a_cluster_whose_volumes_were_changed_starts_again_with_its_etcd() {
    let etcd = Etcd::start();
    changed_volumes_stay(&["--meta", &etcd.address()]);
}

#[test]
fn nodes_come_to_a_volume_and_leave_it_and_it_leaves_the_cluster_when_it_is_empty() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = folder.path().join("vol-9.img");
    let cluster = Cluster::start(&Options { nodes: 3, volume_bytes: Some(256 * MIB), ..Options::default() });
    add(&cluster, "vol-9", &image, "1GiB", "node-1");
    // Nobody stands by, so nobody can take it.
    let refused = cluster.cli_fails(&["volume", "promote", "vol-9", "node-2"]);
    assert!(refused.contains("does not stand by"), "{refused}");
    let refused = cluster.cli_fails(&["volume", "attach", "vol-9", "node-7"]);
    assert!(refused.contains("no node node-7"), "{refused}");
    let refused = cluster.cli_fails(&["volume", "detach", "vol-9", "node-7"]);
    assert!(refused.contains("no node node-7"), "{refused}");
    for _ in 0..2 {
        cluster.cli_run(&["volume", "attach", "vol-9", "node-2"]);
    }
    eventually(SERVED_MAX, || match loops_over(&image) {
        2 => Ok(()),
        other => Err(format!("{other} devices")),
    });
    cluster.cli_run(&["volume", "promote", "vol-9", "node-2"]);
    assert_eq!(is_served(&cluster, "vol-9")["primary"], "node-2");
    let refused = cluster.cli_fails(&["volume", "detach", "vol-9", "node-2"]);
    assert!(refused.contains("volume promote vol-9 node-1"), "{refused}");
    for _ in 0..2 {
        cluster.cli_run(&["volume", "detach", "vol-9", "node-1"]);
    }
    eventually(SERVED_MAX, || match loops_over(&image) {
        1 => Ok(()),
        other => Err(format!("{other} devices")),
    });
    let shown = cluster.cli_run(&["volume", "show", "vol-9"]);
    assert!(shown.contains("primary    node-2") && shown.contains("backups    none"), "{shown}");

    // With a shard on it it stays, and takes others as before. It has the most room, so it gets one when its node is asked.
    let shard = eventually(SERVED_MAX, || {
        let name = format!("s-{}", fastrand::u32(..));
        cluster.cli_run(&["shard", "create", &name]);
        let volume = cluster.cli_json(&["shard", "show", &name])["volume"].clone();
        if volume == "vol-9" { Ok(name) } else { Err(format!("{name} is on {volume}")) }
    });
    std::fs::write(folder.path().join("v"), "v").unwrap();
    cluster.cli_run(&["put", folder.path().join("v").to_str().unwrap(), &format!("{shard}/k")]);
    let refused = cluster.cli_fails(&["volume", "delete", "vol-9"]);
    assert!(refused.contains("holds shard") && refused.contains(&shard), "{refused}");
    assert!(!refused.contains("--force"), "there is none: {refused}");
    assert_eq!(is_served(&cluster, "vol-9")["leaving"], false);
    // Its nodes have had time to do what they were not to do.
    std::thread::sleep(Duration::from_secs(1));
    assert!(image.exists() && is_served(&cluster, "vol-9")["primary"] == "node-2");
    assert_eq!(cluster.cli_run(&["get", &format!("{shard}/k"), "-"]), "v");
    cluster.cli_run(&["shard", "delete", "--force", &shard]);

    cluster.cli_run(&["volume", "delete", "vol-9", "--keep"]);
    assert!(find(&cluster, "vol-9").is_none());
    assert_eq!(loops_over(&image), 0);
    assert!(image.exists());
    let gone = cluster.cli_fails(&["volume", "delete", "vol-9"]);
    assert!(gone.contains("no volume vol-9"), "{gone}");
    // What was kept is found again, by its own name only.
    add(&cluster, "vol-9", &image, "1GiB", "node-3,node-1");
    let said = cluster.cli_run(&["volume", "delete", "vol-9"]);
    assert!(said.contains("is deleted"), "{said}");
    assert!(find(&cluster, "vol-9").is_none() && !image.exists());
    eventually(SERVED_MAX, || match loops_over(&image) {
        0 => Ok(()),
        other => Err(format!("{other} devices")),
    });
    let status = cluster.cli_json(&["status"]);
    assert_eq!(status["healthy"], true, "{status}");
}

#[test]
fn the_file_of_another_volume_is_not_deleted_with_one_that_was_given_it_by_mistake() {
    let cluster = Cluster::start(&Options { nodes: 2, volume_bytes: Some(256 * MIB), ..Options::default() });
    let folder = cluster.scratch("volume");
    let image = folder.join("shared.img");
    add(&cluster, "va", &image, "1GiB", "node-1");
    // It has the most room.
    let shard = eventually(SERVED_MAX, || {
        let name = format!("s-{}", fastrand::u32(..));
        cluster.cli_run(&["shard", "create", &name]);
        let volume = cluster.cli_json(&["shard", "show", &name])["volume"].clone();
        if volume == "va" { Ok(name) } else { Err(format!("{name} is on {volume}")) }
    });
    std::fs::write(folder.join("v"), "living").unwrap();
    let key = format!("{shard}/k");
    cluster.cli_run(&["put", folder.join("v").to_str().unwrap(), &key]);

    let name = folder.file_name().unwrap().to_str().unwrap();
    let otherwise = format!("{}/./x/../../{name}//shared.img", folder.display());
    let add_mistaken = |source: &str, node: &str| {
        ["volume", "add", "vb", "--kind", "loop", "--source", source, "--size", "1GiB", "--nodes", node]
            .map(str::to_owned)
    };
    let refused = add_mistaken(&otherwise, "node-1");
    let refused = cluster.cli_fails(&refused.each_ref().map(String::as_str));
    assert!(refused.contains("is the source of volume va already"), "{refused}");

    // Machines may have different files of one name; these have one.
    let mistaken = add_mistaken(image.to_str().unwrap(), "node-2");
    cluster.cli_run(&mistaken.each_ref().map(String::as_str));
    eventually(SERVED_MAX, || {
        let trouble = find(&cluster, "vb").ok_or("not there")?["served"]["trouble"].clone();
        let is_told = trouble.as_str().is_some_and(|trouble| trouble.contains("volume va of ShardFS"));
        if is_told { Ok(()) } else { Err(format!("{trouble}")) }
    });
    let said = cluster.cli_run(&["volume", "delete", "vb"]);
    assert!(said.contains("left as it is: it holds volume va of ShardFS"), "{said}");
    assert!(find(&cluster, "vb").is_none() && image.exists());
    let log = std::fs::read_to_string(cluster.dir().join("logs/node-2.log")).unwrap();
    assert!(log.contains("is left as it is") && log.contains("it holds volume va"), "{log}");
    assert_eq!(cluster.cli_run(&["get", &key, "-"]), "living");

    cluster.cli_run(&["dev", "kill", "node-1"]);
    cluster.cli_run(&["dev", "start", "node-1"]);
    is_served(&cluster, "va");
    assert_eq!(cluster.cli_run(&["get", &key, "-"]), "living");
    // Its own it is deleted with.
    cluster.cli_run(&["shard", "delete", "--force", &shard]);
    let said = cluster.cli_run(&["volume", "delete", "va"]);
    assert!(said.contains("is deleted") && !image.exists(), "{said}");
}

#[test]
fn a_volume_that_cannot_be_used_or_whose_node_is_gone_leaves_as_well() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let cluster = Cluster::start(&Options { nodes: 2, ..Options::default() });
    // Where the cluster's guard takes away what this test fails to see taken away.
    let (image, other_image) =
        (cluster.scratch("volume").join("vol-9.img"), cluster.scratch("volume").join("vol-7.img"));
    // Something else is there.
    std::fs::write(folder.path().join("other"), vec![1; 1 << 20]).unwrap();
    let other = folder.path().join("other");
    cluster.cli_run(&[
        "volume",
        "add",
        "vol-8",
        "--kind",
        "loop",
        "--source",
        other.to_str().unwrap(),
        "--size",
        "96MiB",
        "--nodes",
        "node-1",
    ]);
    eventually(SERVED_MAX, || {
        let trouble = find(&cluster, "vol-8").ok_or("not there")?["served"]["trouble"].clone();
        if trouble.is_string() { Ok(()) } else { Err("no trouble yet".to_owned()) }
    });
    let said = cluster.cli_run(&["volume", "delete", "vol-8", "--keep"]);
    assert!(said.contains("left as it is"), "{said}");
    assert!(find(&cluster, "vol-8").is_none() && other.exists());

    add(&cluster, "vol-9", &image, "96MiB", "node-2");
    add(&cluster, "vol-7", &other_image, "96MiB", "node-1,node-2");
    eventually(SERVED_MAX, || match loops_over(&other_image) {
        2 => Ok(()),
        other => Err(format!("{other} devices")),
    });
    let place = cluster.dir().join("nodes/node-2/volumes/vol-9");
    let mounts = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(&format!(" {} ", place.display()))).count()
    };
    cluster.cli_run(&["dev", "kill", "node-2"]);
    let said = cluster.cli_run(&["volume", "delete", "vol-9"]);
    assert!(said.contains("left as it is: its node is away"), "{said}");
    cluster.cli_run(&["volume", "detach", "vol-7", "node-2"]);
    assert!(find(&cluster, "vol-9").is_none());
    assert!(image.exists(), "only its node would have deleted it");
    assert_eq!(
        (mounts(), loops_over(&image), loops_over(&other_image)),
        (1, 1, 2),
        "what a killed node leaves"
    );
    cluster.cli_run(&["dev", "start", "node-2"]);
    // What it finds of volumes that are its own no more it takes away, and nothing else.
    eventually(SERVED_MAX, || match (mounts(), loops_over(&image), loops_over(&other_image)) {
        (0, 0, 1) => Ok(()),
        other => Err(format!("mounts and devices: {other:?}")),
    });
    assert!(image.exists() && is_served(&cluster, "vol-7")["primary"] == "node-1");
    let log = std::fs::read_to_string(cluster.dir().join("logs/node-2.log")).unwrap();
    for volume in ["vol-7", "vol-9"] {
        let told = |line: &&str| line.contains("is no volume of this node any more") && line.contains(volume);
        assert_eq!(log.lines().filter(told).count(), 1, "{volume}: {log}");
    }
    eventually(SERVED_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
    // The file is what it was: it is a volume again, by its own name.
    add(&cluster, "vol-9", &image, "96MiB", "node-2");
    assert_eq!((mounts(), loops_over(&image)), (1, 1));
}
