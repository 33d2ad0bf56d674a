//! `kill -9` of nodes under load: nothing that was acknowledged is lost, nobody sees an error, fsck is
//! clean, the mount recovers by itself.
//!
//! Writers keep to names of their own, so each knows what must be there: over gRPC with sync Puts, batches
//! and Deletes, on the mount with files that are fsynced. Fresh names are made exclusively (`if_absent`,
//! O_EXCL): a retry that is applied twice shows as a false "exists".

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::Client;
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{Key, Reason, ShardId, ShardName};
use shardfs_tests::cluster::eventually;
use shardfs_tests::process::{Process, naming};
use shardfs_tests::{Cluster, block_on};

const GRPC_WRITERS: u64 = 3;
const MOUNT_WRITERS: u64 = 2;
/// A killed node is back, and its mount answers, within this.
const RECOVERY_MAX: Duration = Duration::from_secs(60);

/// What a writer knows of its names: content, or gone.
type Expected = BTreeMap<String, Option<Vec<u8>>>;

struct Load {
    stop: AtomicBool,
    /// Acknowledged operations, by writer.
    done: Vec<AtomicU64>,
}

impl Load {
    fn count(&self, writer: u64) {
        self.done[writer as usize].fetch_add(1, Ordering::SeqCst);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

fn content(random: &mut fastrand::Rng) -> Vec<u8> {
    let size = match random.u8(..10) {
        0 => random.usize(60_000..200_000),
        1..4 => random.usize(4_000..10_000),
        _ => random.usize(..1000),
    };
    let byte = random.u8(..);
    (0..size).map(|i| byte.wrapping_add((i / 7) as u8)).collect()
}

async fn grpc_writer(client: Client, shard: ShardId, writer: u64, seed: u64, load: &Load) -> Expected {
    let mut random = fastrand::Rng::with_seed(seed + writer);
    let mut expected = Expected::new();
    let key = |name: &str| Key::new(name.to_owned()).unwrap();
    let mut number = 0;
    while !load.stopped() {
        let names: Vec<String> = expected.keys().cloned().collect();
        match random.u8(..10) {
            0 if !names.is_empty() => {
                let name = &names[random.usize(..names.len())];
                let outcome = client.delete(shard, &key(name), Durability::Sync).await;
                match &expected[name] {
                    Some(_) => drop(outcome.unwrap_or_else(|e| panic!("delete {name}: {e}"))),
                    None => assert_eq!(outcome.unwrap_err().reason(), Reason::NotFound, "{name}"),
                }
                expected.insert(name.clone(), None);
            }
            1 if !names.is_empty() => {
                let (name, value) = (names[random.usize(..names.len())].clone(), content(&mut random));
                let put = client.put(
                    shard,
                    key(&name),
                    value.clone().into(),
                    PutOptions::default(),
                    Durability::Sync,
                );
                put.await.unwrap_or_else(|e| panic!("put over {name}: {e}"));
                expected.insert(name, Some(value));
            }
            2 => {
                let items: Vec<(String, Vec<u8>)> =
                    (0..20).map(|i| (format!("w{writer}/b{number}/{i}"), content(&mut random))).collect();
                let batch = items.iter().map(|(name, value)| PutItem {
                    key: key(name),
                    value: Bytes::from(value.clone()),
                    options: PutOptions { if_absent: true, ..PutOptions::default() },
                });
                let results = client.batch_put(shard, batch.collect(), true, Durability::Sync).await;
                let results = results.unwrap_or_else(|e| panic!("batch {number} of {writer}: {e}"));
                assert!(results.iter().all(Result::is_ok));
                expected.extend(items.into_iter().map(|(name, value)| (name, Some(value))));
            }
            _ => {
                let (name, value) = (format!("w{writer}/{}/{number}", number % 10), content(&mut random));
                let options = PutOptions { if_absent: true, ..PutOptions::default() };
                let put = client.put(shard, key(&name), value.clone().into(), options, Durability::Sync);
                put.await.unwrap_or_else(|e| panic!("put {name}: {e}"));
                expected.insert(name, Some(value));
            }
        }
        number += 1;
        load.count(writer);
    }
    expected
}

fn mount_writer(folder: &Path, writer: u64, seed: u64, load: &Load) -> Expected {
    let mut random = fastrand::Rng::with_seed(seed + writer);
    let mut expected = Expected::new();
    let base = folder.join(format!("w{writer}"));
    fs::create_dir(&base).unwrap();
    let directory = File::open(&base).unwrap();
    let mut number = 0;
    let mut last: Option<String> = None;
    while !load.stopped() {
        let name = format!("f{number}");
        let value = content(&mut random);
        let path = base.join(&name);
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("create {}: {e}", path.display()));
        for piece in value.chunks(7_001) {
            file.write_all(piece).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        }
        file.sync_all().unwrap_or_else(|e| panic!("fsync {}: {e}", path.display()));
        expected.insert(name.clone(), Some(value));
        match (random.u8(..6), &last) {
            (0, Some(old)) => {
                fs::remove_file(base.join(old)).unwrap_or_else(|e| panic!("unlink {old}: {e}"));
                directory.sync_all().unwrap();
                expected.insert(old.clone(), None);
                last = Some(name);
            }
            (1, Some(old)) => {
                let new = format!("r{number}");
                fs::rename(base.join(old), base.join(&new)).unwrap_or_else(|e| panic!("rename {old}: {e}"));
                directory.sync_all().unwrap();
                let value = expected.insert(old.clone(), None).unwrap();
                expected.insert(new, value);
                last = Some(name);
            }
            (2, _) => {
                let sub = base.join(format!("d{number}"));
                fs::create_dir(&sub).unwrap_or_else(|e| panic!("mkdir {}: {e}", sub.display()));
                fs::remove_dir(&sub).unwrap_or_else(|e| panic!("rmdir {}: {e}", sub.display()));
            }
            _ => last = Some(name),
        }
        number += 1;
        load.count(writer);
    }
    expected
}

async fn verify_grpc(client: &Client, shard: ShardId, expected: &Expected) {
    let names: Vec<&String> = expected.keys().collect();
    for names in names.chunks(1000) {
        let keys = names.iter().map(|name| Key::new((*name).clone()).unwrap()).collect();
        let mut answers = std::pin::pin!(client.batch_get(shard, keys));
        while let Some(answer) = answers.next().await {
            let (index, outcome) = answer.unwrap();
            let name = names[index];
            match (&expected[name], outcome) {
                (Some(value), Ok((_, got))) => {
                    assert!(value[..] == got[..], "{name}: other bytes than acknowledged")
                }
                (Some(_), Err(error)) => panic!("{name} was acknowledged and is lost: {error}"),
                (None, Ok(_)) => panic!("{name} was deleted and is back"),
                (None, Err(error)) => assert_eq!(error.reason(), Reason::NotFound, "{name}"),
            }
        }
    }
}

fn verify_mount(base: &Path, expected: &Expected) {
    for (name, value) in expected {
        match (value, fs::read(base.join(name))) {
            (Some(value), Ok(got)) => assert!(*value == got, "{name}: other bytes than were fsynced"),
            (Some(_), Err(error)) => panic!("{name} was fsynced and is lost: {error}"),
            (None, Ok(_)) => panic!("{name} was removed and is back"),
            (None, Err(error)) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{name}"),
        }
    }
}

fn kill_under_load(kills: u32) {
    let seed = match std::env::var("SHARDFS_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    println!("SHARDFS_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let cluster = Cluster::start(&Default::default());
    // Enough shards that every node serves some; the load goes to two of one node.
    let mut by_node: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for number in 0..6 {
        let name = format!("s{number}");
        cluster.shard(&name);
        by_node.entry(cluster.primary_of(&name)).or_default().push(name);
    }
    let (node, shards) = by_node.into_iter().max_by_key(|(_, shards)| shards.len()).unwrap();
    let (grpc_shard, mount_shard) = (shards[0].clone(), shards.last().unwrap().clone());
    println!("killing {node}; gRPC writes to {grpc_shard}, the mount to {mount_shard}");
    let folder: PathBuf = cluster.mount().join(&mount_shard);
    let writers = GRPC_WRITERS + MOUNT_WRITERS;
    let load = Load { stop: AtomicBool::new(false), done: (0..writers).map(|_| AtomicU64::new(0)).collect() };

    let (grpc, mount) = std::thread::scope(|scope| {
        let grpc: Vec<_> = (0..GRPC_WRITERS)
            .map(|writer| {
                let (cluster, load, shard) = (&cluster, &load, &grpc_shard);
                scope.spawn(move || {
                    block_on(async {
                        let client = cluster.client();
                        let id =
                            client.shard_by_name(&ShardName::new(shard.clone()).unwrap()).await.unwrap().id;
                        grpc_writer(client, id, writer, seed, load).await
                    })
                })
            })
            .collect();
        let mount: Vec<_> = (GRPC_WRITERS..writers)
            .map(|writer| {
                let (folder, load) = (&folder, &load);
                scope.spawn(move || mount_writer(folder, writer, seed, load))
            })
            .collect();
        let dead = || grpc.iter().chain(&mount).any(std::thread::ScopedJoinHandle::is_finished);
        // Whatever happens here, the writers must end, or the scope would wait for ever.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for kill in 1..=kills {
                std::thread::sleep(Duration::from_millis(random.u64(300..2_000)));
                let process = cluster.node(&node);
                cluster.cli_run(&["dev", "kill", &node]);
                eventually(
                    RECOVERY_MAX,
                    || {
                        if process.is_alive() { Err("still alive".into()) } else { Ok(()) }
                    },
                );
                std::thread::sleep(Duration::from_millis(random.u64(..500)));
                let before: Vec<u64> = load.done.iter().map(|d| d.load(Ordering::SeqCst)).collect();
                let down = Instant::now();
                cluster.cli_run(&["dev", "start", &node]);
                eventually(RECOVERY_MAX, || {
                    assert!(!dead(), "a writer saw an error");
                    let waiting: Vec<usize> = (0..writers as usize)
                        .filter(|w| load.done[*w].load(Ordering::SeqCst) < before[*w] + 2)
                        .collect();
                    if waiting.is_empty() { Ok(()) } else { Err(format!("writers {waiting:?} do not go on")) }
                });
                let counts: Vec<u64> = load.done.iter().map(|d| d.load(Ordering::SeqCst)).collect();
                println!(
                    "kill {kill}: everybody writes again after {:?}; {counts:?} operations",
                    down.elapsed()
                );
                for shard in [&grpc_shard, &mount_shard] {
                    let output = cluster.cli_output(&["fsck", shard]);
                    assert!(output.status.success(), "fsck {shard} after kill {kill}: {output:?}");
                }
            }
        }));
        load.stop.store(true, Ordering::SeqCst);
        let grpc: Vec<_> = grpc.into_iter().map(|w| w.join()).collect();
        let mount: Vec<_> = mount.into_iter().map(|w| w.join()).collect();
        if let Err(reason) = outcome {
            std::panic::resume_unwind(reason);
        }
        let all = |results: Vec<std::thread::Result<Expected>>| -> Vec<Expected> {
            results.into_iter().map(|r| r.unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
        };
        (all(grpc), all(mount))
    });

    // Once more without anything in flight, so that all of it comes from the device.
    cluster.cli_run(&["dev", "kill", &node]);
    cluster.cli_run(&["dev", "start", &node]);
    block_on(async {
        let client = cluster.client();
        let id = client.shard_by_name(&ShardName::new(grpc_shard.clone()).unwrap()).await.unwrap().id;
        for expected in &grpc {
            verify_grpc(&client, id, expected).await;
        }
    });
    for (expected, writer) in mount.iter().zip(GRPC_WRITERS..) {
        verify_mount(&folder.join(format!("w{writer}")), expected);
    }
    let names: usize = grpc.iter().chain(&mount).map(BTreeMap::len).sum();
    println!("{names} names as acknowledged after {} kills", kills + 1);
    cluster.assert_clean(&grpc_shard);
    cluster.assert_clean(&mount_shard);
}

#[test]
fn five_kills_lose_nothing() {
    kill_under_load(5);
}

#[test]
#[ignore = "long: run by make test-long"]
fn twenty_kills_lose_nothing() {
    kill_under_load(20);
}

#[test]
fn a_file_held_open_and_unlinked_survives_a_kill() {
    use std::os::unix::fs::FileExt;
    let cluster = Cluster::shared();
    let folder = cluster.shard("held");
    let node = cluster.primary_of("held");
    let path = folder.join("f");
    fs::write(&path, vec![9u8; 200_000]).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file.sync_all().unwrap();
    cluster.cli_run(&["dev", "kill", &node]);
    cluster.cli_run(&["dev", "start", &node]);
    let mut back = vec![0; 200_000];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back.iter().all(|b| *b == 9));
    file.write_all_at(b"more", 200_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cluster.assert_clean("held");
}

#[test]
fn down_and_up_again_keeps_everything() {
    let cluster = Cluster::start(&Default::default());
    let folder = cluster.shard("kept");
    fs::write(folder.join("synced"), "1").unwrap();
    cluster.cli_run(&["put", "-", "kept/empty"]);
    cluster.cli_run(&["dev", "down"]);
    assert!(!folder.exists(), "unmounted");
    eventually(RECOVERY_MAX, || match naming(&cluster.dir()) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("left: {left:?}")),
    });
    let output = cluster.up(&Default::default(), &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(folder.join("synced")).unwrap(), b"1", "a clean stop loses nothing");
    assert_eq!(fs::read(folder.join("empty")).unwrap(), b"");
    // Every process killed at once, the supervisor too: `dev up` finds its way.
    eventually(RECOVERY_MAX, || {
        let left = naming(cluster.root());
        // Again: one may have started another meanwhile.
        left.iter().for_each(Process::kill);
        if left.is_empty() { Ok(()) } else { Err(format!("left: {left:?}")) }
    });
    let output = cluster.up(&Default::default(), &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(folder.join("synced")).unwrap(), b"1");
    cluster.assert_clean("kept");
}
