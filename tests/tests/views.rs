//! Reads from backups: while the primary writes, after it is closed, while it fails; over gRPC, the command line and a mount.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::NodeStatus;
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{Key, NodeId, ReadFrom, ShardId, ShardName, ViewLabel};
use shardfs_tests::cluster::{Options, bin_dir, eventually};
use shardfs_tests::{Cluster, block_on, ports};

/// Something that needs a view to be published and opened has happened within this, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// What the readers under load take.
const STALENESS: Duration = Duration::from_secs(10);
/// Keys that one round writes, all or none.
const KEYS: usize = 24;

fn backup(max_staleness: Duration) -> ReadFrom {
    ReadFrom::Backup { max_staleness }
}

fn key(name: &str) -> Key {
    Key::new(name.to_owned()).unwrap()
}

fn round_key(at: usize) -> Key {
    key(&format!("d{}/k{at}", at % 3))
}

/// The bytes of a key in a round: from what lies in the inode to what is a blob, and telling of both.
fn content(at: usize, round: u64) -> Bytes {
    let size = [100, 3_000, 20_000, 150_000][at % 4] + (round as usize * 37) % 900;
    let mut bytes = Vec::with_capacity(size + 16);
    bytes.extend_from_slice(&round.to_le_bytes());
    bytes.extend_from_slice(&(at as u64).to_le_bytes());
    let mut random = fastrand::Rng::with_seed(round.wrapping_mul(1_000_003) + at as u64);
    while bytes.len() < size {
        bytes.extend_from_slice(&random.u64(..).to_le_bytes());
    }
    bytes.truncate(size);
    bytes.into()
}

async fn shard_id(client: &Client, name: &str) -> ShardId {
    client.shard_by_name(&ShardName::new(name).unwrap()).await.unwrap().id
}

async fn put(client: &Client, shard: ShardId, name: &str, value: &'static str) {
    let value = Bytes::from_static(value.as_bytes());
    client.put(shard, key(name), value, PutOptions::default(), Durability::Sync).await.unwrap();
}

/// How every node sees itself.
async fn statuses(client: &Client) -> BTreeMap<NodeId, NodeStatus> {
    let mut all = BTreeMap::new();
    for node in client.nodes().await.unwrap().into_iter().filter(|node| !node.dead) {
        let status = client.node_status(&node.endpoints).await.unwrap();
        all.insert(node.id, status);
    }
    all
}

/// What the writer has done.
#[derive(Default)]
struct Written {
    /// Rounds that were acknowledged, and when.
    acknowledged: Mutex<Vec<(Instant, u64)>>,
}

impl Written {
    /// The last round that was acknowledged by then.
    fn by(&self, moment: Instant) -> Option<u64> {
        let all = self.acknowledged.lock().unwrap();
        let count = all.partition_point(|(when, _)| *when <= moment);
        count.checked_sub(1).map(|last| all[last].1)
    }
}

/// Overwrites all keys, round after round, as fast as it goes.
async fn write(client: Client, shard: ShardId, written: &Written, stop: &AtomicBool) {
    let mut round = 0;
    while !stop.load(Ordering::SeqCst) {
        round += 1;
        let items = (0..KEYS)
            .map(|at| PutItem {
                key: round_key(at),
                value: content(at, round),
                options: PutOptions::default(),
            })
            .collect();
        let results = client.batch_put(shard, items, true, Durability::Sync).await.unwrap();
        assert!(results.iter().all(|result| result.is_ok()));
        written.acknowledged.lock().unwrap().push((Instant::now(), round));
    }
}

#[derive(Default)]
struct Seen {
    from_backups: AtomicU64,
    from_primary: AtomicU64,
    views: Mutex<BTreeMap<(NodeId, u64), u64>>,
    oldest_ms: AtomicU64,
}

impl Seen {
    /// How many states of the shard were shown.
    fn sequences(&self) -> usize {
        let views = self.views.lock().unwrap();
        views.keys().map(|(_, sequence)| *sequence).collect::<BTreeSet<u64>>().len()
    }
}

/// Reads all keys again and again, and checks every answer.
async fn read(client: Client, shard: ShardId, written: &Written, stop: &AtomicBool, seen: &Seen) {
    let mut last: BTreeMap<NodeId, u64> = BTreeMap::new();
    while !stop.load(Ordering::SeqCst) {
        let asked = Instant::now();
        let keys = (0..KEYS).map(round_key).collect();
        let mut answers = std::pin::pin!(client.batch_get_labelled(shard, keys));
        let mut rounds: Vec<(u64, Option<ViewLabel>)> = Vec::new();
        while let Some(answer) = answers.next().await {
            let (at, found) = answer.unwrap();
            let (meta, value, label) = found.unwrap_or_else(|e| panic!("key {at}: {e}"));
            let round = u64::from_le_bytes(value[..8].try_into().unwrap());
            assert_eq!(meta.attr.size, value.len() as u64);
            assert!(value == content(at, round), "key {at}: wrong bytes, {label:?}");
            rounds.push((round, label));
        }
        assert_eq!(rounds.len(), KEYS);
        let (round, label) = rounds[0].clone();
        let identity = |label: &Option<ViewLabel>| label.as_ref().map(|l| (l.node.clone(), l.sequence));
        // A stream that went on elsewhere is of two moments, and says so.
        if rounds.iter().any(|(_, other)| identity(other) != identity(&label)) {
            continue;
        }
        assert!(rounds.iter().all(|(other, _)| *other == round), "a torn view: {rounds:?}");
        let Some(label) = label else {
            seen.from_primary.fetch_add(1, Ordering::SeqCst);
            continue;
        };
        assert!(label.age <= STALENESS, "{label:?}");
        // What had been acknowledged before the age began is in it.
        let due = asked.checked_sub(label.age).and_then(|moment| written.by(moment)).unwrap_or(0);
        assert!(round >= due, "round {round} in a view of which {due} should be: {label:?}");
        assert!(round <= written.by(Instant::now()).unwrap_or(0) + 1, "a round that was not written yet");
        // One backup does not go back.
        let before = last.insert(label.node.clone(), label.sequence).unwrap_or(0);
        assert!(label.sequence >= before, "{label:?} after {before}");
        let known = *seen.views.lock().unwrap().entry((label.node.clone(), label.sequence)).or_insert(round);
        assert_eq!(known, round, "one view shows one round: {label:?}");
        seen.oldest_ms.fetch_max(label.age.as_millis() as u64, Ordering::SeqCst);
        seen.from_backups.fetch_add(1, Ordering::SeqCst);
    }
}

fn reads_while_the_primary_writes(duration: Duration) {
    let cluster = Cluster::start(&Options::default());
    cluster.shard("busy");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "busy").await;
        let (written, seen, stop) = (Written::default(), Seen::default(), AtomicBool::new(false));
        // The readers find a first round.
        let one_round = async {
            while written.by(Instant::now()).is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        // Clients of their own, as programs of their own would be.
        let readers: Vec<Client> = (0..3).map(|_| cluster.client().with_reads(backup(STALENESS))).collect();
        let reading = async {
            one_round.await;
            let reads = readers.iter().map(|reader| read(reader.clone(), shard, &written, &stop, &seen));
            futures::future::join_all(reads).await;
        };
        let timer = async {
            tokio::time::sleep(duration).await;
            // On a slow machine, until something was shown.
            let deadline = Instant::now() + PATIENCE;
            while seen.sequences() < 2 && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            stop.store(true, Ordering::SeqCst);
        };
        tokio::join!(write(client.clone(), shard, &written, &stop), reading, timer);
        let rounds = written.acknowledged.lock().unwrap().len();
        let views = seen.sequences();
        let (from_backups, from_primary) =
            (seen.from_backups.load(Ordering::SeqCst), seen.from_primary.load(Ordering::SeqCst));
        let counts = readers.iter().map(Client::read_counts);
        let (by_backup, instead) =
            counts.fold((0, 0), |sum, c| (sum.0 + c.backup, sum.1 + c.primary_instead));
        println!(
            "{rounds} rounds of {KEYS} keys written; {from_backups} answers from {views} views on backups, {from_primary} from the \
             primary; oldest {} ms; counted: {by_backup} from backups, {instead} from the primary instead",
            seen.oldest_ms.load(Ordering::SeqCst)
        );
        assert!(rounds > 2 && views >= 2 && from_backups > 0, "nothing was shown");
        assert!(by_backup >= from_backups && instead >= from_primary, "every answer is counted");

        // Everybody has left: views are retired, and none of their devices was written to.
        for reader in &readers {
            reader.close().await;
        }
        let deadline = Instant::now() + PATIENCE;
        let all = loop {
            let all = statuses(&client).await;
            if all.values().any(|status| status.views.devices_retired > 0) {
                break all;
            }
            assert!(Instant::now() < deadline, "devices of superseded views are retired: {all:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        for (node, status) in &all {
            println!("{node}: {:?}", status.views);
            assert_eq!(status.views.sectors_written, 0, "{node}");
        }
        let sum = |figure: fn(&NodeStatus) -> u64| all.values().map(figure).sum::<u64>();
        assert!(sum(|s| s.views.answers) > 0 && sum(|s| s.views.published) >= views as u64);
    });
    cluster.assert_clean("busy");
}

#[test]
fn a_backup_is_read_while_the_primary_writes() {
    reads_while_the_primary_writes(Duration::from_secs(20));
}

#[test]
#[ignore = "long: run by make test-long"]
fn a_backup_is_read_while_the_primary_writes_for_five_minutes() {
    reads_while_the_primary_writes(Duration::from_secs(300));
}

#[test]
fn the_command_line_reads_from_backups() {
    let cluster = Cluster::shared();
    fs::write(cluster.shard("by-cli").join("k"), "value").unwrap();
    let out = cluster.scratch("by-cli-out");
    let dest = out.join("k");
    let get = |more: &[&str]| {
        let mut arguments = vec!["get", "-v", "by-cli/k", dest.to_str().unwrap()];
        arguments.extend(more);
        let output = cluster.cli_output(&arguments);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read(&dest).unwrap(), b"value");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(get(&[]).contains("from the primary"));
    let said = eventually(PATIENCE, || {
        let said = get(&["--read-from", "backup", "--max-staleness", "1min"]);
        if said.contains("a view at most") { Ok(said) } else { Err(said) }
    });
    let primary = cluster.primary_of("by-cli");
    assert!(said.contains("from node-") && !said.contains(&format!("from {primary}")), "{said}");
    // Nothing is so young: the primary is asked instead.
    assert!(get(&["--read-from", "backup", "--max-staleness", "1ms"]).contains("from the primary"));
    let list = |arguments: &[&str]| {
        let output = cluster.cli_output(&[&["ls", "-v"][..], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (listed, said) = list(&["by-cli"]);
    assert_eq!((listed.as_str(), said.as_str()), ("k\n", "by-cli: 1 listed, from the primary\n"));
    let of_backup = ["--read-from", "backup", "--max-staleness", "1min"];
    // A directory, and a single value.
    for (path, name) in [("by-cli", "k\n"), ("by-cli/k", "k\n")] {
        let said = eventually(PATIENCE, || {
            let (listed, said) = list(&[&[path][..], &of_backup].concat());
            assert_eq!(listed, name);
            if said.contains("a view at most") { Ok(said) } else { Err(said) }
        });
        assert!(said.starts_with(&format!("{path}: 1 listed, from node-")), "{said}");
        assert!(!said.contains(&format!("from {primary}")), "{said}");
    }
    let view = eventually(PATIENCE, || {
        let line = cluster.cli_json(&[&["ls", "by-cli"][..], &of_backup].concat());
        if line["view"].is_object() { Ok(line["view"].clone()) } else { Err(line.to_string()) }
    });
    assert!(view["sequence"].as_u64().unwrap() > 0, "{view}");
    assert!(view["age_ms"].as_u64().unwrap() <= 60_000 && view["node"] != primary.as_str(), "{view}");
    assert!(cluster.cli_json(&["ls", "by-cli"])["view"].is_null(), "the present has no label");
    let said = cluster.cli_fails(&["get", "by-cli/k", "-", "--max-staleness", "1s"]);
    assert!(said.contains("--read-from backup"), "{said}");
}

#[test]
fn a_closed_shard_is_read_from_every_node_while_its_primary_is_away() {
    let cluster = Cluster::start(&Options::default());
    cluster.shard("closed");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "closed").await;
        put(&client, shard, "k", "for good").await;
        let info = client.close_shard(shard).await.unwrap();
        let primary = info.location.node.unwrap();
        // Both backups, whoever asks: programs choose among the nodes at random.
        let mut by: BTreeMap<NodeId, u32> = BTreeMap::new();
        let deadline = Instant::now() + PATIENCE;
        while by.len() < 2 {
            assert!(Instant::now() < deadline, "read from {by:?} only");
            let other = cluster.client();
            // The first read of a node that has not opened the view yet is the primary's to answer.
            for _ in 0..3 {
                let (_, value, label) = other.get_labelled(shard, &key("k")).await.unwrap();
                assert_eq!(value, "for good");
                if let Some(label) = label {
                    assert!(label.last && label.node != primary, "{label:?}");
                    *by.entry(label.node).or_default() += 1;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other.close().await;
        }
        // Its primary hangs, and the backups answer, mostly before one of them has taken its place.
        let reader = client.with_reads(backup(Duration::from_millis(1)));
        // This client has asked no backup yet; the first answer may be the primary's.
        let deadline = Instant::now() + PATIENCE;
        while reader.get_labelled(shard, &key("k")).await.unwrap().2.is_none() {
            assert!(Instant::now() < deadline, "no backup answers");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        cluster.freeze(primary.as_str());
        let (_, value, label) = reader.get_labelled(shard, &key("k")).await.unwrap();
        assert_eq!(value, "for good");
        match label {
            Some(label) => assert!(label.last, "{label:?}"),
            None => assert_ne!(client.shard(shard).await.unwrap().location.node, Some(primary.clone())),
        }
        cluster.cli_run(&["dev", "start", primary.as_str()]);
    });
}

#[test]
fn views_survive_a_failover_and_go_on_after_it() {
    let cluster = Cluster::start(&Options::default());
    cluster.shard("moving");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "moving").await;
        put(&client, shard, "k", "before").await;
        let reader = client.with_reads(backup(Duration::from_secs(3600)));
        let read = async || reader.get_labelled(shard, &key("k")).await.unwrap();
        let until = async |what: &str, value: &str| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let (_, found, label) = read().await;
                match label {
                    Some(label) if found == value => return label,
                    label => assert!(Instant::now() < deadline, "{what}: {found:?} {label:?}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let first = until("a first view", "before").await;
        let old = client.shard(shard).await.unwrap().location.node.unwrap();
        cluster.cli_run(&["dev", "kill", old.as_str()]);
        // Never an error, and never anything that was not there.
        let moved = async {
            loop {
                let (_, found, _) = read().await;
                assert_eq!(found, "before");
                let now = client.shard(shard).await.unwrap().location.node;
                if now.is_some() && now != Some(old.clone()) {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, moved).await.unwrap();
        put(&client, shard, "k", "after").await;
        cluster.cli_run(&["dev", "start", old.as_str()]);
        let second = until("a view of the new primary", "after").await;
        assert!(second.sequence > first.sequence, "{second:?} after {first:?}");
        // A backup that is killed while it is read leaves a mount and a device, which its successor takes away.
        cluster.cli_run(&["dev", "kill", second.node.as_str()]);
        assert_eq!(read().await.1, "after");
        cluster.cli_run(&["dev", "start", second.node.as_str()]);
        until("a view after a backup was killed", "after").await;
        let devices = || {
            let backing = cluster.root().display();
            let script =
                format!("losetup --noheadings --list --output BACK-FILE | grep -c '^{backing}/' || true");
            shardfs_tests::sh(cluster.root(), &script).trim().parse::<usize>().unwrap()
        };
        // Every node has one a volume, and one more for the view that is open.
        eventually(PATIENCE, || match devices() {
            count if count <= 3 * 3 + 2 => Ok(()),
            count => Err(format!("{count} devices")),
        });
        for (node, status) in statuses(&client).await {
            assert_eq!(status.views.sectors_written, 0, "{node}");
        }
    });
    cluster.assert_clean("moving");
}

/// A mount that reads from backups; unmounted with it.
struct Mounted {
    child: Child,
    at: std::path::PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The guard of the cluster sees to what is left.
        let _ = Command::new("umount").arg(&self.at).status();
        let _ = self.child.wait();
    }
}

#[test]
fn a_mount_reads_from_backups_and_writes_nothing() {
    let cluster = Cluster::shared();
    let folder = cluster.shard("by-mount");
    fs::create_dir(folder.join("d")).unwrap();
    fs::write(folder.join("d/f"), vec![7; 300_000]).unwrap();
    fs::File::open(folder.join("d/f")).unwrap().sync_all().unwrap();
    let at = cluster.scratch("backup-mount");
    let http = format!("127.0.0.1:{}", ports::free());
    let child = Command::new(bin_dir().join("shardfsd"))
        .arg(&at)
        .args(["--foreground", "--read-from", "backup", "--max-staleness", "30"])
        .args(["--endpoints", &cluster.endpoints().join(","), "--http", &http])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mount = Mounted { child, at: at.clone() };
    eventually(PATIENCE, || fs::read_dir(at.join("by-mount")).map(drop).map_err(|e| e.to_string()));
    assert_eq!(fs::read(at.join("by-mount/d/f")).unwrap(), vec![7; 300_000]);
    let refused = fs::write(at.join("by-mount/x"), "y").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    // What is written elsewhere shows after a while.
    fs::write(folder.join("later"), "z").unwrap();
    fs::File::open(folder.join("later")).unwrap().sync_all().unwrap();
    eventually(PATIENCE + Duration::from_secs(30), || {
        fs::read(at.join("by-mount/later"))
            .map_err(|e| e.to_string())
            .and_then(|content| if content == b"z" { Ok(()) } else { Err(format!("{content:?}")) })
    });
    let metrics = shardfs_tests::sh(cluster.root(), &format!("curl -sf http://{http}/metrics"));
    let counted = metrics
        .lines()
        .find_map(|line| line.strip_prefix("shardfsd_reads_from_backups_total "))
        .and_then(|count| count.parse::<u64>().ok());
    assert!(counted.unwrap() > 0, "{metrics}");
    drop(mount);
}
