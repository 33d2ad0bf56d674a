//! Backups: taken under load, restored where the volume was after its file was destroyed, and beside it under other ids; verified, also when
//! they are damaged; taken by a schedule; and cut off by killed nodes.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use shardfs_tests::cluster::eventually;
use shardfs_tests::disk::Xfs;
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::{Cluster, Options, sh};

/// Sparse, with room for the volumes and for what their copies do not share.
const DISK_BYTES: u64 = 32 << 30;
const VOLUME_BYTES: u64 = 1 << 30;
/// How long a volume may take to be served, and a load to go on.
const PATIENCE: Duration = Duration::from_secs(90);
/// A command that is cut off has done something by then, or not.
const CUT_AFTER_MS: std::ops::Range<u64> = 0..500;

struct Bed {
    // Dropped in this order.
    disk: Xfs,
    cluster: Cluster,
}

impl Bed {
    fn new(nodes: u32) -> Bed {
        let options = Options {
            nodes,
            volume_bytes: Some(VOLUME_BYTES),
            environment: vec![("SHARDFS_WRITE_BUFFER", "8MiB".to_owned())],
            ..Options::default()
        };
        let cluster = Cluster::start(&options);
        let disk = Xfs::below_volumes(&cluster, &options, DISK_BYTES);
        Bed { disk, cluster }
    }

    /// Loads over gRPC, of which those are kept whose shards lie on the first one's volume. That volume.
    fn loads(&self) -> (Vec<ShardLoad>, String) {
        let mut loads =
            vec![ShardLoad::new("streams", &[3], 0, true), ShardLoad::new("mixed", &[2, 1], 0, true)];
        for load in &loads {
            self.cluster.shard(load.shard());
        }
        let source = self.cluster.volume_source("streams");
        loads.retain(|load| self.cluster.volume_source(load.shard()) == source);
        (loads, self.volume_of("streams"))
    }

    fn volume_of(&self, shard: &str) -> String {
        self.cluster.cli_json(&["shard", "show", shard])["volume"].as_str().unwrap().to_owned()
    }

    fn volume(&self, id: &str) -> Option<Value> {
        let volumes = self.cluster.cli_json(&["volume", "list"]);
        volumes.as_array().unwrap().iter().find(|volume| volume["id"] == id).cloned()
    }

    fn wait_served(&self, id: &str) -> Value {
        eventually(PATIENCE, || {
            let volume = self.volume(id).ok_or("not there")?;
            let well = volume["served"].is_object() && volume["served"]["trouble"].is_null();
            if well { Ok(volume) } else { Err(format!("{volume}")) }
        })
    }

    fn create(&self, volume: &str) -> String {
        let backup = self.cluster.cli_json(&["backup", "create", volume]);
        assert_eq!(backup["state"], "done", "{backup}");
        assert!(Path::new(backup["image"].as_str().unwrap()).exists(), "{backup}");
        backup["id"].as_str().unwrap().to_owned()
    }

    fn list(&self) -> Vec<Value> {
        self.cluster.cli_json(&["backup", "list"]).as_array().unwrap().clone()
    }

    fn node_ids(&self) -> Vec<String> {
        let nodes = self.cluster.settings()["nodes"].as_u64().unwrap();
        (1..=nodes).map(|n| format!("node-{n}")).collect()
    }

    /// Files of images, and what restores and checks make.
    fn files(&self) -> BTreeSet<String> {
        let found = sh(self.disk.at(), "ls -1 | grep -e '[.]backup-' -e '[.]restoring' || true");
        found.lines().map(str::to_owned).collect()
    }

    fn write(&self, shard: &str, key: &str, bytes: &[u8]) {
        let file = self.cluster.scratch("values").join(key);
        std::fs::write(&file, bytes).unwrap();
        self.cluster.cli_run(&["put", file.to_str().unwrap(), &format!("{shard}/{key}")]);
    }

    fn end(self) {
        self.cluster.cli_run(&["dev", "down"]);
        assert_eq!(
            sh(
                "/",
                &format!(
                    "losetup --list --noheadings --output BACK-FILE | grep -c {}/ || true",
                    self.disk.at().display()
                )
            )
            .trim(),
            "0"
        );
    }
}

/// Takes a backup while there is load, with the moments before and after, by each load's history.
macro_rules! backup_under_load {
    ($bed:expr, $loads:expr, $volume:expr, $seed:expr) => {
        load::run(&$bed.cluster, &$loads, $seed, |progress| {
            progress.wait_for(20, PATIENCE);
            let moments = || $loads.iter().map(|load| load.history().now()).collect::<Vec<_>>();
            let began = moments();
            let id = $bed.create(&$volume);
            let over = moments();
            progress.wait_for(10, PATIENCE);
            (id, began, over)
        })
    };
}

#[test]
fn a_volume_whose_file_was_destroyed_is_restored_in_place() {
    let bed = Bed::new(3);
    let seed = load::seed();
    let (loads, volume) = bed.loads();
    bed.write("streams", "kept", b"as it was");
    bed.cluster.cli_run(&["shard", "snapshot", "streams", "before"]);
    let (id, began, over) = backup_under_load!(bed, loads, volume, seed);
    bed.write("streams", "kept", b"as it became");
    bed.cluster.cli_run(&["shard", "snapshot", "streams", "later"]);
    // What a closed shard had was read-only for good; the backup is older.
    bed.cluster.cli_run(&["shard", "close", "streams"]);
    let refused = bed.cluster.cli_fails(&["backup", "restore", &id, "--in-place"]);
    assert!(refused.contains("is served by"), "{refused}");
    bed.cluster.cli_run(&["backup", "verify", &id]);

    let source = bed.cluster.volume_source("streams");
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "kill", &node]);
    }
    // All zeros.
    let length = std::fs::metadata(&source).unwrap().len();
    File::options().write(true).open(&source).unwrap().set_len(0).unwrap();
    File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "start", &node]);
    }
    eventually(PATIENCE, || {
        let trouble = bed.volume(&volume).ok_or("not there")?["served"]["trouble"].clone();
        if trouble.is_string() { Ok(()) } else { Err("no trouble yet".to_owned()) }
    });
    let restored = bed.cluster.cli_json(&["backup", "restore", &id, "--in-place", "--drop-missing"]);
    let missing: Vec<&str> =
        restored["missing"].as_array().unwrap().iter().map(|shard| shard["name"].as_str().unwrap()).collect();
    assert_eq!(missing, ["later"], "{restored}");
    let aside = PathBuf::from(restored["set_aside"].as_str().unwrap());
    assert!(aside.exists() && aside != source);
    let served = bed.wait_served(&volume);
    assert_eq!(served["backups"].as_array().unwrap().len(), 2, "{served}");

    for (at, load) in loads.iter().enumerate() {
        bed.cluster.assert_clean(load.shard());
        let mut found = load::contents(&bed.cluster, load.shard());
        if load.shard() == "streams" {
            assert_eq!(found.remove("kept").unwrap(), b"as it was");
        }
        let counts = load.history().check(&found, began[at], over[at]);
        counts.unwrap_or_else(|e| panic!("{}: {e}", load.shard()));
    }
    let snapshots = bed.cluster.cli_json(&["shard", "snapshots", "streams"]);
    assert_eq!(snapshots.as_array().unwrap().len(), 1, "{snapshots}");
    assert_eq!(bed.cluster.cli_run(&["get", "streams/.snap/before/kept", "-"]), "as it was");
    // It can be written, as then, and moves as before.
    bed.write("streams", "kept", b"since");
    let other = served["backups"][0].as_str().unwrap();
    bed.cluster.cli_run(&["volume", "promote", &volume, other]);
    assert_eq!(bed.cluster.cli_run(&["get", "streams/kept", "-"]), "since");
    bed.cluster.assert_clean("streams");
    // Gone as a whole, it comes back as well.
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "kill", &node]);
    }
    std::fs::remove_file(&source).unwrap();
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "start", &node]);
    }
    let restored = bed.cluster.cli_json(&["backup", "restore", &id, "--in-place"]);
    assert!(restored["set_aside"].is_null(), "{restored}");
    bed.wait_served(&volume);
    assert_eq!(bed.cluster.cli_run(&["get", "streams/kept", "-"]), "as it was");
    bed.end();
}

#[test]
fn a_backup_becomes_a_new_volume_beside_the_living_one() {
    let bed = Bed::new(3);
    let seed = load::seed();
    let (loads, volume) = bed.loads();
    bed.write("streams", "kept", b"as it was");
    bed.cluster.cli_run(&["shard", "snapshot", "streams", "before"]);
    let (id, began, over) = backup_under_load!(bed, loads, volume, seed);
    bed.write("streams", "kept", b"as it became");
    // A name that is taken.
    bed.cluster.cli_run(&["shard", "create", "streams.restored"]);

    let command = ["backup", "restore", &id, "--volume", "vol-9", "--nodes", "node-2,node-3"];
    let restored = bed.cluster.cli_json(&command);
    assert_eq!(bed.cluster.cli_json(&command)["shards"], restored["shards"], "once more");
    let refused =
        bed.cluster.cli_fails(&["backup", "restore", &id, "--volume", "vol-9", "--nodes", "node-2"]);
    assert!(refused.contains("already"), "{refused}");
    bed.wait_served("vol-9");
    let shards = restored["shards"].as_array().unwrap();
    let new_name = |old: &str| {
        let old_id = bed.cluster.cli_json(&["shard", "show", old])["id"].clone();
        let shard = shards.iter().find(|shard| shard["old_id"] == old_id).unwrap();
        assert_ne!(shard["id"], old_id);
        shard["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(new_name("streams"), "streams.restored-2");
    for (at, load) in loads.iter().enumerate() {
        let name = new_name(load.shard());
        bed.cluster.assert_clean(&name);
        let mut found = load::contents(&bed.cluster, &name);
        if load.shard() == "streams" {
            assert_eq!(found.remove("kept").unwrap(), b"as it was");
        }
        let counts = load.history().check(&found, began[at], over[at]);
        counts.unwrap_or_else(|e| panic!("{name}: {e}"));
        // The living one has lost nothing.
        let mut living = load::contents(&bed.cluster, load.shard());
        living.remove("kept");
        load.history().check_all(&living).unwrap();
    }
    assert_eq!(bed.cluster.cli_run(&["get", "streams.restored-2/.snap/before/kept", "-"]), "as it was");
    bed.write("streams.restored-2", "kept", b"one");
    bed.write("streams", "kept", b"other");
    assert_eq!(bed.cluster.cli_run(&["get", "streams.restored-2/kept", "-"]), "one");
    // It is a volume like others.
    bed.cluster.cli_run(&["volume", "promote", "vol-9", "node-3"]);
    assert_eq!(bed.cluster.cli_run(&["get", "streams.restored-2/kept", "-"]), "one");
    bed.cluster.assert_clean("streams.restored-2");
    let again = bed.create("vol-9");
    bed.cluster.cli_run(&["backup", "verify", &again]);
    bed.end();
}

#[test]
fn verify_finds_nothing_in_a_good_backup_and_what_is_wrong_in_a_damaged_one() {
    let bed = Bed::new(1);
    bed.cluster.shard("s");
    let mut value = vec![0; 200_000];
    fastrand::Rng::with_seed(7).fill(&mut value);
    bed.write("s", "value", &value);
    bed.cluster.cli_run(&["shard", "snapshot", "s", "then"]);
    let volume = bed.volume_of("s");
    let id = bed.create(&volume);
    let said = bed.cluster.cli_run(&["backup", "verify", &id]);
    assert!(said.contains("s (id ") && said.contains("/.snap/then") && said.ends_with(": clean\n"), "{said}");
    let image = PathBuf::from(bed.list()[0]["image"].as_str().unwrap());
    assert_eq!(bed.files().len(), 1, "{:?}", bed.files());

    // One bit of a value, wherever it lies.
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let places = find(&file, &value[1000..1064]);
    assert!(!places.is_empty());
    for place in &places {
        file.write_all_at(&[value[1010] ^ 1], place + 10).unwrap();
    }
    let output = bed.cluster.cli_output(&["backup", "verify", &id]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("unreadable") && said.contains("FINDINGS"), "{said}");
    for place in &places {
        file.write_all_at(&[value[1010]], place + 10).unwrap();
    }
    bed.cluster.cli_run(&["backup", "verify", &id]);
    // No filesystem at all.
    file.write_all_at(&[0; 4096], 0).unwrap();
    let output = bed.cluster.cli_output(&["backup", "verify", &id, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains(r#""finding":"image""#), "{output:?}");
    let refused =
        bed.cluster.cli_fails(&["backup", "restore", &id, "--volume", "vol-9", "--nodes", "node-1"]);
    assert!(refused.contains("damaged") && refused.contains("nothing was changed"), "{refused}");
    assert!(bed.cluster.cli_fails(&["volume", "delete", "vol-9"]).contains("vol-9"), "nothing was begun");
    bed.cluster.cli_run(&["backup", "delete", &id]);
    assert!(bed.files().is_empty() && bed.list().is_empty(), "{:?}", bed.files());
    bed.cluster.assert_clean("s");
    bed.end();
}

/// Where bytes lie in a file.
fn find(file: &File, needle: &[u8]) -> Vec<u64> {
    const PIECE: usize = 16 << 20;
    let length = file.metadata().unwrap().len();
    let mut places = Vec::new();
    let mut piece = vec![0; PIECE + needle.len() - 1];
    let mut at = 0;
    while at < length {
        let read = file.read_at(&mut piece, at).unwrap();
        let here = &piece[..read];
        let first = here.iter().enumerate().filter(|(_, byte)| **byte == needle[0]).map(|(place, _)| place);
        places
            .extend(first.filter(|place| here[*place..].starts_with(needle)).map(|place| at + place as u64));
        at += PIECE as u64;
    }
    places
}

#[test]
fn a_schedule_takes_and_keeps_as_many_as_it_says_also_after_a_failover() {
    let bed = Bed::new(2);
    bed.cluster.shard("s");
    let volume = bed.volume_of("s");
    let by_hand = bed.create(&volume);
    let refused = bed.cluster.cli_fails(&["backup", "schedule", &volume, "--every", "9s", "--keep", "2"]);
    assert!(refused.contains("10 s"), "{refused}");
    bed.cluster.cli_run(&["backup", "schedule", &volume, "--every", "10s", "--keep", "2"]);
    let seen = |seen: &mut BTreeSet<String>, count: usize| {
        eventually(PATIENCE, || {
            let listed = bed.list();
            let done: Vec<&Value> =
                listed.iter().filter(|b| b["scheduled"] == true && b["state"] == "done").collect();
            seen.extend(done.iter().map(|b| b["id"].as_str().unwrap().to_owned()));
            assert!(done.len() <= 3, "{listed:?}");
            if seen.len() >= count && done.len() == 2 { Ok(()) } else { Err(format!("{listed:?}")) }
        });
    };
    let mut ids = BTreeSet::new();
    seen(&mut ids, 3);
    let primary = bed.cluster.primary_of("s");
    bed.cluster.cli_run(&["dev", "kill", &primary]);
    let before = ids.len();
    seen(&mut ids, before + 2);
    bed.cluster.cli_run(&["dev", "start", &primary]);
    bed.cluster.cli_run(&["backup", "schedule", &volume, "--off"]);
    assert_eq!(bed.cluster.cli_json(&["backup", "schedules"]).as_array().unwrap().len(), 0);
    // The newest of those that are left can be restored, and the one by hand was not touched.
    assert!(bed.list().iter().any(|backup| backup["id"] == by_hand.as_str()));
    bed.end();
}

#[test]
fn killed_nodes_leave_nothing_that_is_not_listed_and_repetitions_work() {
    let bed = Bed::new(2);
    let seed = load::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    bed.cluster.shard("s");
    bed.write("s", "k", b"v");
    let volume = bed.volume_of("s");
    let cut_off = |arguments: &[&str], node: &str, random: &mut fastrand::Rng| {
        let mut command = bed.cluster.cli();
        let deadline = ["--deadline", "5"];
        let mut child = command
            .args(arguments)
            .args(deadline)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(random.u64(CUT_AFTER_MS)));
        bed.cluster.cli_run(&["dev", "kill", node]);
        child.wait().unwrap();
        bed.cluster.cli_run(&["dev", "start", node]);
    };
    for _ in 0..4 {
        let primary = bed.wait_served(&volume)["primary"].as_str().unwrap().to_owned();
        cut_off(&["backup", "create", &volume], &primary, &mut random);
        bed.wait_served(&volume);
        // Whatever is there is listed, as done or as failed.
        let listed: BTreeSet<String> = bed
            .list()
            .iter()
            .map(|backup| {
                assert!(backup["state"] == "done" || backup["state"] == "failed", "{backup}");
                Path::new(backup["image"].as_str().unwrap()).file_name().unwrap().to_str().unwrap().to_owned()
            })
            .collect();
        assert!(bed.files().is_subset(&listed), "{:?} {listed:?}", bed.files());
    }
    for backup in bed.list() {
        let id = backup["id"].as_str().unwrap();
        if backup["state"] == "done" {
            bed.cluster.cli_run(&["backup", "verify", id]);
        }
        bed.cluster.cli_run(&["backup", "delete", id]);
    }
    assert!(bed.files().is_empty() && bed.list().is_empty(), "{:?}", bed.files());

    let id = bed.create(&volume);
    for number in 0..4 {
        let new = format!("vol-{}", 20 + number);
        let command = ["backup", "restore", &id, "--volume", &new, "--nodes", "node-1"];
        cut_off(&command, "node-1", &mut random);
        let restored = eventually(PATIENCE, || {
            let output = bed.cluster.cli_output(&[&command[..], &["--json"]].concat());
            match output.status.success() {
                true => Ok(serde_json::from_slice::<Value>(&output.stdout).unwrap()),
                false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            }
        });
        bed.wait_served(&new);
        let name = restored["shards"][0]["name"].as_str().unwrap().to_owned();
        assert_eq!(bed.cluster.cli_run(&["get", &format!("{name}/k"), "-"]), "v");
        bed.cluster.assert_clean(&name);
    }
    // Given up in the middle, nothing stays.
    cut_off(&["backup", "restore", &id, "--volume", "vol-30", "--nodes", "node-1"], "node-1", &mut random);
    eventually(PATIENCE, || {
        if bed.volume("vol-30").is_some() {
            return Ok(());
        }
        let output = bed.cluster.cli_output(&["volume", "delete", "vol-30"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() || said.contains("no volume vol-30") { Ok(()) } else { Err(said) }
    });
    assert_eq!(bed.files().len(), 1, "{:?}", bed.files());

    // The volume's own file.
    let source = bed.cluster.volume_source("s");
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "kill", &node]);
    }
    std::fs::remove_file(&source).unwrap();
    for node in bed.node_ids() {
        bed.cluster.cli_run(&["dev", "start", &node]);
    }
    cut_off(&["backup", "restore", &id, "--in-place"], "node-1", &mut random);
    eventually(PATIENCE, || {
        let output = bed.cluster.cli_output(&["backup", "restore", &id, "--in-place"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // The first one may have come to its end.
        if output.status.success() || said.contains("is served by") { Ok(()) } else { Err(said) }
    });
    bed.wait_served(&volume);
    assert_eq!(bed.cluster.cli_run(&["get", "s/k", "-"]), "v");
    bed.cluster.assert_clean("s");
    bed.end();
}
