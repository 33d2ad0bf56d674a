//! A volume moves from one node to another: its node dies, hangs, is drained, or an operator says so. Programs on the
//! mount see a pause and never an error; what was acknowledged is there.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::Signal;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{ClientId, Key, ShardId, ShardName};
use shardfs_tests::Cluster;
use shardfs_tests::cluster::{Options, block_on, eventually};

/// A volume is served elsewhere within this, on a busy machine.
const MOVED_MAX: Duration = Duration::from_secs(30);
/// A node that is back has its share of the volumes again within this.
const SHARED_MAX: Duration = Duration::from_secs(120);

/// Writes and fsyncs files of its own until it is told to stop; answers what was fsynced, and the longest pause.
fn write_files(folder: &Path, stop: &AtomicBool) -> (Vec<(PathBuf, Vec<u8>)>, Duration) {
    let mut written = Vec::new();
    let mut longest = Duration::ZERO;
    let mut random = fastrand::Rng::with_seed(7);
    while !stop.load(Ordering::SeqCst) {
        let begun = Instant::now();
        let path = folder.join(format!("f{}", written.len()));
        let content: Vec<u8> = (0..random.usize(..20_000)).map(|_| random.u8(..)).collect();
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("create {}: {e}", path.display()));
        for piece in content.chunks(5_000) {
            file.write_all(piece).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        }
        file.sync_all().unwrap_or_else(|e| panic!("fsync {}: {e}", path.display()));
        written.push((path, content));
        longest = longest.max(begun.elapsed());
    }
    (written, longest)
}

/// Runs `fault` under load on a shard; checks what was written, and that the shard is served elsewhere then. Answers
/// where it was.
fn under_load(cluster: &Cluster, shard: &str, fault: impl FnOnce(&str)) -> String {
    let folder = cluster.shard(shard);
    let before = cluster.primary_of(shard);
    let kept = folder.join("kept");
    let mut open = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&kept).unwrap();
    open.write_all(b"held open over everything").unwrap();
    open.sync_all().unwrap();
    let gone = folder.join("gone");
    let mut unlinked =
        File::options().create(true).truncate(true).read(true).write(true).open(&gone).unwrap();
    unlinked.write_all(b"without a name").unwrap();
    unlinked.sync_all().unwrap();
    fs::remove_file(&gone).unwrap();
    let directory = fs::read_dir(&folder).unwrap();

    let stop = AtomicBool::new(false);
    let (written, longest) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&folder, &stop));
        std::thread::sleep(Duration::from_millis(500));
        fault(&before);
        eventually(MOVED_MAX, || match cluster.primary_of(shard) {
            now if now != before => Ok(()),
            now => Err(format!("still served by {now}")),
        });
        std::thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap()
    });
    println!("{shard}: {} files, longest pause {longest:?}", written.len());

    for (path, content) in &written {
        let got = fs::read(path).unwrap_or_else(|e| panic!("{} was fsynced: {e}", path.display()));
        assert!(got == *content, "{}: other bytes than were fsynced", path.display());
    }
    assert!(!written.is_empty());
    let mut text = String::new();
    open.seek(SeekFrom::Start(0)).unwrap();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "held open over everything");
    open.write_all(b", and written again").unwrap();
    open.sync_all().unwrap();
    assert!(fs::read_to_string(&kept).unwrap().ends_with("again"));
    text.clear();
    unlinked.seek(SeekFrom::Start(0)).unwrap();
    unlinked.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), unlinked.metadata().unwrap().nlink()), ("without a name", 0));
    // A directory that was opened before goes on.
    assert!(directory.count() >= 1);
    cluster.assert_clean(shard);
    before
}

#[test]
fn a_killed_primary_is_replaced_and_comes_back_as_a_backup() {
    let cluster = Cluster::start(&Options::default());
    let old = under_load(&cluster, "killed", |primary| {
        cluster.cli_run(&["dev", "kill", primary]);
    });
    let status = cluster.cli_run(&["status"]);
    assert!(status.contains("IN TROUBLE") && status.contains("down"), "{status}");
    assert!(cluster.cli_run(&["node", "list"]).contains("dead"));
    cluster.cli_run(&["dev", "start", &old]);
    // It stands by, and gets its share back.
    eventually(SHARED_MAX, || {
        let volumes = cluster.cli_json(&["volume", "list"]);
        let primaries: Vec<&str> =
            volumes.as_array().unwrap().iter().filter_map(|v| v["primary"].as_str()).collect();
        if primaries.contains(&old.as_str()) { Ok(()) } else { Err(format!("{primaries:?}")) }
    });
    cluster.assert_clean("killed");
}

#[test]
fn a_frozen_primary_is_fenced_and_changes_nothing_when_it_goes_on() {
    let cluster = Cluster::start(&Options::default());
    let old = under_load(&cluster, "frozen", |primary| {
        cluster.freeze(primary);
    });
    cluster.cli_run(&["dev", "start", &old]);
    let folder = cluster.mount().join("frozen");
    fs::write(folder.join("after"), "written under the new primary").unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(fs::read_to_string(folder.join("after")).unwrap(), "written under the new primary");
    assert_ne!(cluster.primary_of("frozen"), "");
    cluster.assert_clean("frozen");
}

#[test]
fn an_operator_moves_volumes_and_drains_nodes() {
    let cluster = Cluster::start(&Options::default());
    let volume_of = |shard: &str| {
        let shown = cluster.cli_json(&["shard", "show", shard]);
        shown["volume"].as_str().or(shown["location"]["volume"].as_str()).unwrap().to_owned()
    };
    let old = under_load(&cluster, "moved", |primary| {
        let to = if primary == "node-1" { "node-2" } else { "node-1" };
        let said = cluster.cli_run(&["volume", "promote", &volume_of("moved"), to]);
        assert!(said.contains(to), "{said}");
    });
    let now = cluster.primary_of("moved");
    let said = cluster.cli_fails(&["volume", "promote", &volume_of("moved"), "node-9"]);
    assert!(said.contains("does not stand by"), "{said}");
    let said = cluster.cli_fails(&["volume", "promote", "vol-99", &old]);
    assert!(said.contains("no volume"), "{said}");

    let said = cluster.cli_run(&["node", "drain", &now]);
    assert!(said.contains("serves nothing"), "{said}");
    assert_ne!(cluster.primary_of("moved"), now);
    let nodes = cluster.cli_run(&["node", "list"]);
    assert!(nodes.contains("draining"), "{nodes}");
    fs::write(cluster.mount().join("moved/x"), "y").unwrap();
    cluster.cli_run(&["node", "drain", &now, "--undo"]);

    // What it costs is measured by the phases that every takeover reports.
    let arguments =
        ["bench", "failover", "--runs", "1", "--fault", "promote,kill", "--shards", "3", "--json", "-"];
    let measured: serde_json::Value = serde_json::from_str(&cluster.cli_run(&arguments)).unwrap();
    for series in measured["series"].as_array().unwrap() {
        let run = &series["runs_ms"][0];
        let figure = |name: &str| run[name].as_f64().unwrap();
        let phases = ["detection", "election", "fence", "mount", "open", "first_write"];
        let sum: f64 = phases.map(figure).iter().sum();
        // What has begun before the last answer of the old primary is counted from its beginning.
        let beyond = sum - figure("total");
        assert!((-50.0..1000.0).contains(&beyond), "the phases make up the whole: {series}");
    }
    let left = cluster.cli_run(&["shard", "list"]);
    assert!(!left.contains("bench"), "{left}");
    cluster.assert_clean("moved");
}

#[test]
fn a_stop_in_order_hands_over_first() {
    let cluster = Cluster::start(&Options::default());
    let old = under_load(&cluster, "stopped", |primary| {
        cluster.cli_run(&["dev", "kill", primary, "--signal", "TERM"]);
    });
    let status = cluster.cli_json(&["status"]);
    assert_eq!(status["healthy"], false, "a node is away: {status}");
    // A cluster that is stopped as a whole moves nothing.
    cluster.cli_run(&["dev", "start", &old]);
    let primaries = || {
        let volumes = cluster.cli_json(&["volume", "list"]);
        let mut all: Vec<String> =
            volumes.as_array().unwrap().iter().map(|v| format!("{} {}", v["id"], v["primary"])).collect();
        all.sort();
        all
    };
    let before = primaries();
    cluster.cli_run(&["dev", "down"]);
    let output = cluster.up(&Options::default(), &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(primaries(), before);
    cluster.assert_clean("stopped");
}

/// It cannot be fenced, so the volume would not move.
#[test]
fn a_holder_of_a_folder_is_not_frozen_to_be_measured() {
    let cluster = Cluster::start(&Options { nodes: 1, volumes: "dir", ..Options::default() });
    for arguments in [&["--runs", "1"][..], &["--runs", "1", "--fault", "freeze"]] {
        let said = cluster.cli_fails(&[&["bench", "failover"][..], arguments].concat());
        assert!(said.contains("cannot be fenced") && said.contains("--fault kill,promote"), "{said}");
    }
    assert_eq!(cluster.cli_run(&["ls"]), "", "nothing was made");
}

/// What is put, replaced or deleted as `buffered` is not made again by its session: on a volume that may move, it is durable
/// when it is answered. Each kill takes what the primary's kernel has not written.
#[test]
fn buffered_values_are_there_after_a_failover() {
    const KILLS: u32 = 3;
    let cluster = Cluster::start(&Options::default());
    cluster.shard("buffered");
    let key = |name: String| Key::new(name).unwrap();
    for kill in 0..KILLS {
        let primary = cluster.primary_of("buffered");
        block_on(async {
            let client = cluster.client();
            let shard = client.shard_by_name(&ShardName::new("buffered").unwrap()).await.unwrap().id;
            let put = async |name: String, value: &'static str, durability| {
                let options = PutOptions::default();
                client.put(shard, key(name), Bytes::from_static(value.as_bytes()), options, durability).await
            };
            for name in ["replaced", "deleted"] {
                put(format!("{kill}/{name}"), "old", Durability::Sync).await.unwrap();
            }
            put(format!("{kill}/replaced"), "new", Durability::Buffered).await.unwrap();
            client.delete(shard, &key(format!("{kill}/deleted")), Durability::Buffered).await.unwrap();
            let item = |n: u32| PutItem {
                key: key(format!("{kill}/batch-{n}")),
                value: Bytes::from_static(b"of a batch"),
                options: PutOptions::default(),
            };
            client.batch_put(shard, (0..3).map(item).collect(), true, Durability::Buffered).await.unwrap();
            let pieces =
                futures::stream::iter([Ok(Bytes::from_static(b"a")), Ok(Bytes::from_static(b" stream"))]);
            let name = key(format!("{kill}/stream"));
            let options = PutOptions::default();
            client.put_stream(shard, name, options, Durability::Buffered, None, pieces).await.unwrap();
            put(format!("{kill}/made"), "made", Durability::Buffered).await.unwrap();
        });
        cluster.cli_run(&["dev", "kill", &primary]);
        let folder = cluster.mount().join("buffered").join(kill.to_string());
        let read = |name: &str| fs::read_to_string(folder.join(name)).map_err(|e| e.kind());
        assert_eq!(read("made").as_deref(), Ok("made"));
        assert_eq!(read("replaced").as_deref(), Ok("new"));
        assert_eq!(read("deleted"), Err(ErrorKind::NotFound));
        assert_eq!(read("batch-2").as_deref(), Ok("of a batch"));
        assert_eq!(read("stream").as_deref(), Ok("a stream"));
        cluster.cli_run(&["dev", "start", &primary]);
    }
    cluster.assert_clean("buffered");
}

/// A mount whose daemon sleeps through a failover has something to make again: it must not overwrite what others have done since, and
/// its programs must be told.
#[test]
fn what_is_made_again_overwrites_nothing_that_others_did_since() {
    const ROUNDS: u32 = 12;
    let cluster = Cluster::start(&Options::default());
    // No program is started meanwhile: its exec would close inherited files of the mount, and wait for the daemon.
    let asleep = |shard: &str, lost: &dyn Fn(), during: &dyn Fn(&Client, ShardId)| {
        let (daemon, primary) = (cluster.daemon(), cluster.primary_of(shard));
        let node = cluster.node(&primary);
        block_on(async {
            let client = cluster.client();
            let shard = client.shard_by_name(&ShardName::new(shard).unwrap()).await.unwrap().id;
            // The daemon syncs what it keeps every second: mostly not now.
            lost();
            daemon.signal(Signal::STOP);
            node.kill();
            // For some moments they might go on still, and make durable what is to be lost.
            eventually(MOVED_MAX, || match (daemon.is_stopped(), node.is_alive()) {
                (true, false) => Ok(()),
                state => Err(format!("stopped, alive: {state:?}")),
            });
            during(&client, shard);
        });
        daemon.signal(Signal::CONT);
    };
    // A sync covers the whole shard, so all of it comes before what is to be lost.
    let made = |folder: &Path, name: &str| {
        let path = folder.join(name);
        fs::write(&path, "base").unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        file
    };
    let write = |file: &File, text: &str| file.write_all_at(text.as_bytes(), 0).unwrap();
    let errno = |result: std::io::Result<()>| result.map_err(|e| e.raw_os_error().unwrap());

    // Nobody has changed it since: it is made again.
    let folder = cluster.shard("again");
    let alone = made(&folder, "alone");
    asleep("again", &|| write(&alone, "lost"), &|_, _| {});
    alone.sync_all().unwrap();
    assert_eq!(fs::read(folder.join("alone")).unwrap(), b"lost");

    // What the kernel wrote by itself before the kill was not lost: mostly that is not so.
    let told = (0..ROUNDS).any(|round| {
        let (name, neighbour) = (format!("changed-{round}"), format!("other-{round}"));
        let (changed, other) = (made(&folder, &name), made(&folder, &neighbour));
        let both = || {
            write(&changed, "OLD!");
            write(&other, "ours");
        };
        asleep("again", &both, &|client, shard| {
            let (key, value) = (Key::new(name.clone()).unwrap(), Bytes::from_static(b"NEW! and longer"));
            let put = client.put(shard, key, value, PutOptions::default(), Durability::Sync);
            now(put).unwrap();
        });
        let synced = errno(changed.sync_all());
        assert_eq!(fs::read(folder.join(&name)).unwrap(), b"NEW! and longer");
        assert_eq!(fs::read(folder.join(&neighbour)).unwrap(), b"ours");
        if synced == Ok(()) {
            return false;
        }
        assert_eq!(synced, Err(libc::EIO), "the loss is told");
        assert_eq!(errno(changed.sync_all()), Ok(()), "once");
        assert_eq!(errno(other.sync_all()), Err(libc::EIO), "and to everybody who had the shard open");
        true
    });
    assert!(told, "nothing was lost in {ROUNDS} rounds");
    made(&folder, "later").sync_all().unwrap();

    let told = (0..ROUNDS).any(|round| {
        let name = format!("closed-{round}");
        let folder = cluster.shard(&name);
        let file = made(&folder, "f");
        asleep(&name, &|| write(&file, "OLD!"), &|client, shard| {
            now(client.close_shard(shard)).unwrap();
        });
        // The daemon's own upkeep meets the closed shard first, and must not keep it to itself.
        std::thread::sleep(Duration::from_secs(2));
        let synced = errno(file.sync_all());
        let content = fs::read_to_string(folder.join("f")).unwrap();
        cluster.assert_clean(&name);
        assert!((synced == Ok(()) && content == "OLD!") || (synced == Err(libc::EIO) && content == "base"));
        synced.is_err()
    });
    assert!(told, "nothing was lost in {ROUNDS} rounds");
    cluster.assert_clean("again");
}

/// Within a runtime, from code that is not async.
fn now<F: Future>(future: F) -> F::Output {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(future))
}

/// It has the others' addresses by then: from where the shard is, or from the list of nodes.
#[test]
fn a_client_that_was_given_one_nodes_address_goes_on_without_that_node() {
    let cluster = Cluster::start(&Options::default());
    cluster.shard("partial");
    let primary = cluster.primary_of("partial");
    let socket = format!("/{primary}.sock");
    let given: Vec<String> =
        cluster.endpoints().into_iter().filter(|endpoint| endpoint.ends_with(&socket)).collect();
    assert_eq!(given.len(), 1, "{given:?}");
    block_on(async {
        let client = || {
            let mut config = ClientConfig::new(given.clone(), ClientId::new("default").unwrap());
            config.deadline = MOVED_MAX;
            Client::new(config).unwrap()
        };
        let put = async |client: &Client, shard: ShardId, name: &'static str| {
            let (key, value) = (Key::new(name).unwrap(), Bytes::from_static(b"value"));
            client.put(shard, key, value, PutOptions::default(), Durability::Sync).await
        };
        let (writer, finder, lister) = (client(), client(), client());
        let name = ShardName::new("partial").unwrap();
        let shard = writer.shard_by_name(&name).await.unwrap().id;
        put(&writer, shard, "before").await.unwrap();
        // Without a session it does not look for nodes by itself: it knows the shard's backups, and the lister no shard. Nodes that
        // have just started are not known to live yet.
        let started = Instant::now();
        loop {
            let backups = finder.shard_by_name(&name).await.unwrap().location.backups;
            writer.shard_by_name(&name).await.unwrap();
            if backups.len() == 2 && lister.nodes().await.unwrap().iter().all(|node| node.alive) {
                break;
            }
            assert!(started.elapsed() < MOVED_MAX, "not all nodes live: {backups:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }

        cluster.cli_run(&["dev", "kill", &primary]);
        let killed = Instant::now();
        put(&writer, shard, "after").await.unwrap_or_else(|e| panic!("the writer: {e}"));
        println!("written after {:?}", killed.elapsed());
        let (_, value) = finder.get(shard, &Key::new("before").unwrap()).await.unwrap();
        assert_eq!(&value[..], b"value");
        let found = lister.shard_by_name(&name).await.unwrap();
        assert_eq!(found.id, shard);
        assert_ne!(found.location.node.unwrap().as_str(), primary);
        for client in [writer, finder, lister] {
            assert!(client.reachable(MOVED_MAX).await, "no node that was given is there, but others are");
            client.close().await;
        }
    });
    assert_ne!(cluster.primary_of("partial"), primary);
    cluster.assert_clean("partial");
}
