//! Faults, one after the other, under load from every side, on three nodes in network namespaces and an etcd of three
//! members: nobody sees an error, nothing that was acknowledged is lost, nothing is applied twice, every key's history is
//! linearisable, fsck is clean.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use shardfs_proto::client::Client;
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, Reason, ShardId, ShardName};
use shardfs_tests::cluster::eventually;
use shardfs_tests::etcd::Etcd;
use shardfs_tests::linear::{self, Call, Operation};
use shardfs_tests::network::Link;
use shardfs_tests::{Cluster, Options, block_on};

/// One for each volume at least, by chance.
const SHARDS: usize = 6;
/// Keys that everybody reads and writes, in every other shard.
const SHARED_KEYS: usize = 9;
/// Clients of the shared keys over gRPC.
const GRPC_CLIENTS: u32 = 5;
/// Clients of the shared keys on the mount.
const MOUNT_CLIENTS: u32 = 2;
/// Everything is in order again within this.
const RECOVERY_MAX: Duration = Duration::from_secs(120);
/// A fault lasts longer than a lease.
const FAULT_LASTS: Duration = Duration::from_millis(2500);

/// What everybody who makes load shares.
struct Load<'a> {
    cluster: &'a Cluster,
    shards: Vec<(PathBuf, ShardId)>,
    begun: Instant,
    stop: AtomicBool,
    /// Gives every value and name a number of its own.
    numbers: AtomicU64,
    history: Mutex<BTreeMap<usize, Vec<Operation>>>,
    /// Acknowledged operations; to see that the load goes on.
    done: AtomicU64,
    /// The longest that one operation took since it was asked last, and which it was.
    longest: Mutex<(Duration, String)>,
}

impl Load<'_> {
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).unwrap()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn fresh(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::SeqCst)
    }

    fn count(&self, called: u64, what: impl FnOnce() -> String) {
        self.done.fetch_add(1, Ordering::SeqCst);
        let took = Duration::from_nanos(self.now() - called);
        let mut longest = self.longest.lock().unwrap();
        if took > longest.0 {
            *longest = (took, what());
        }
    }

    fn record(&self, key: usize, client: u32, called: u64, call: Call) {
        let operation = Operation { client, called, returned: Some(self.now()), call };
        self.history.lock().unwrap().entry(key).or_default().push(operation);
        self.count(called, || {
            let by = if client < GRPC_CLIENTS { "over gRPC" } else { "on the mount" };
            format!("{call:?} of shared-{key} {by}")
        });
    }

    /// Where a shared key is.
    fn shared(&self, key: usize) -> (&(PathBuf, ShardId), String) {
        (&self.shards[key % self.shards.len()], format!("shared-{key}"))
    }
}

/// Of a fixed length, so that a read gets a value whole.
fn text(value: u64) -> String {
    format!("{value:020}")
}

fn value(text: &[u8]) -> u64 {
    assert_eq!(text.len(), 20, "a value that nobody wrote: {:?}", String::from_utf8_lossy(text));
    std::str::from_utf8(text).unwrap().parse().unwrap()
}

async fn grpc_client(load: &Load<'_>, number: u32) {
    let client = load.cluster.client();
    let mut random = fastrand::Rng::with_seed(number.into());
    while !load.stopped() {
        let at = random.usize(..SHARED_KEYS);
        let ((_, shard), name) = load.shared(at);
        let key = Key::new(name.clone()).unwrap();
        let called = load.now();
        let call = match random.u8(..10) {
            0..4 => {
                let fresh = load.fresh();
                put(&client, *shard, key, fresh, false).await.unwrap();
                Call::Put(fresh)
            }
            4 => {
                let fresh = load.fresh();
                Call::Create(fresh, put(&client, *shard, key, fresh, true).await.unwrap())
            }
            5 => match client.delete(*shard, &key, Durability::Sync).await {
                Ok(_) => Call::Delete(true),
                Err(error) if error.reason() == Reason::NotFound => Call::Delete(false),
                Err(error) => panic!("Delete {name}: {error}"),
            },
            _ => match client.get(*shard, &key).await {
                Ok((_, data)) => Call::Get(Some(value(&data))),
                Err(error) if error.reason() == Reason::NotFound => Call::Get(None),
                Err(error) => panic!("Get {name}: {error}"),
            },
        };
        load.record(at, number, called, call);
        tokio::time::sleep(Duration::from_millis(random.u64(..15))).await;
    }
}

/// Whether it was stored, which is only in question with `if_absent`.
async fn put(
    client: &Client,
    shard: ShardId,
    key: Key,
    value: u64,
    if_absent: bool,
) -> Result<bool, shardfs_proto::types::Error> {
    let options = PutOptions { if_absent, ..PutOptions::default() };
    match client.put(shard, key, Bytes::from(text(value)), options, Durability::Sync).await {
        Ok(_) => Ok(true),
        Err(error) if if_absent && error.reason() == Reason::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// The same keys as files. A value is put by a rename over them, and durable with the fsync of the directory.
fn mount_client(load: &Load<'_>, number: u32) {
    let mut random = fastrand::Rng::with_seed(number.into());
    while !load.stopped() {
        let at = random.usize(..SHARED_KEYS);
        let ((folder, _), name) = load.shared(at);
        let path = folder.join(&name);
        let called = load.now();
        let call = match random.u8(..10) {
            0..3 => {
                let fresh = load.fresh();
                let new = folder.join(format!("new-{number}"));
                write_synced(&new, text(fresh).as_bytes());
                fs::rename(&new, &path).unwrap_or_else(|e| panic!("rename to {name}: {e}"));
                sync_folder(folder);
                Call::Put(fresh)
            }
            3 => {
                let found = match fs::remove_file(&path) {
                    Ok(()) => true,
                    Err(e) if e.kind() == ErrorKind::NotFound => false,
                    Err(e) => panic!("unlink {name}: {e}"),
                };
                sync_folder(folder);
                Call::Delete(found)
            }
            _ => match fs::read(&path) {
                Ok(data) => Call::Get(Some(value(&data))),
                Err(e) if e.kind() == ErrorKind::NotFound => Call::Get(None),
                Err(e) => panic!("read {name}: {e}"),
            },
        };
        load.record(at, number, called, call);
        std::thread::sleep(Duration::from_millis(random.u64(..15)));
    }
}

fn write_synced(path: &Path, content: &[u8]) {
    let mut file = File::create(path).unwrap_or_else(|e| panic!("create {}: {e}", path.display()));
    file.write_all(content).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    file.sync_all().unwrap_or_else(|e| panic!("fsync {}: {e}", path.display()));
}

fn sync_folder(folder: &Path) {
    let folder_file = File::open(folder).unwrap_or_else(|e| panic!("open {}: {e}", folder.display()));
    folder_file.sync_all().unwrap_or_else(|e| panic!("fsync {}: {e}", folder.display()));
}

/// Names of its own, made exclusively over gRPC: one that is there already was made twice. Answers what was acknowledged.
async fn creator(load: &Load<'_>, number: usize) -> Vec<(ShardId, String, u64)> {
    let client = load.cluster.client();
    let mut made = Vec::new();
    while !load.stopped() {
        let (_, shard) = load.shards[made.len() % load.shards.len()];
        let name = format!("created-{number}/{}", made.len());
        let fresh = load.fresh();
        let called = load.now();
        let key = Key::new(name.clone()).unwrap();
        assert!(put(&client, shard, key, fresh, true).await.unwrap(), "{name}: applied twice");
        load.count(called, || format!("Put of {name}"));
        made.push((shard, name, fresh));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    made
}

/// Records at the end of one file: each must be there once, in order. Answers how many were synced.
fn appender(load: &Load<'_>, path: &Path) -> u64 {
    let mut file = OpenOptions::new().append(true).create_new(true).open(path).unwrap();
    let mut count = 0;
    while !load.stopped() {
        let called = load.now();
        file.write_all(text(count).as_bytes()).unwrap_or_else(|e| panic!("append: {e}"));
        if count % 3 == 0 {
            file.sync_data().unwrap_or_else(|e| panic!("fdatasync: {e}"));
        }
        count += 1;
        load.count(called, || "append".to_owned());
        std::thread::sleep(Duration::from_millis(3));
    }
    file.sync_all().unwrap();
    count
}

/// What programs do with trees: directories, files, renames, removals; each name is its own. Answers what must be there.
fn worker(load: &Load<'_>, folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(9);
    let mut there: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    let fail = |what: &str, path: &Path, e: std::io::Error| -> ! { panic!("{what} {}: {e}", path.display()) };
    for round in 0.. {
        if load.stopped() {
            break;
        }
        let called = load.now();
        let directory = folder.join(format!("d{round}"));
        fs::create_dir(&directory).unwrap_or_else(|e| fail("mkdir", &directory, e));
        for number in 0..4 {
            let path = directory.join(format!("f{number}"));
            let content: Vec<u8> = (0..random.usize(..9000)).map(|i| (i * 7 + round) as u8).collect();
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&path)
                .unwrap_or_else(|e| fail("create", &path, e));
            for piece in content.chunks(3000) {
                file.write_all(piece).unwrap_or_else(|e| fail("write", &path, e));
            }
            there.insert(path, content);
        }
        let moved = folder.join(format!("moved{round}"));
        fs::rename(&directory, &moved).unwrap_or_else(|e| fail("rename", &directory, e));
        for number in 0..4 {
            let content = there.remove(&directory.join(format!("f{number}"))).unwrap();
            let path = moved.join(format!("f{number}"));
            if number == 0 {
                fs::remove_file(&path).unwrap_or_else(|e| fail("unlink", &path, e));
            } else {
                there.insert(path, content);
            }
        }
        // Not synced but now and then: what is lost by a failover comes again from the mount.
        if round % 5 == 0 {
            sync_folder(&moved);
        }
        load.count(called, || "a small tree".to_owned());
        std::thread::sleep(Duration::from_millis(10));
    }
    sync_folder(folder);
    there
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// The node's process; its parent records the death.
    Kill,
    /// The process and its parent: nobody records anything.
    KillBoth,
    /// Stopped for longer than a lease, its parent too.
    Freeze,
    CutFromStore,
    CutFromClients,
    CutFromBoth,
    KillStoreLeader,
    /// All of etcd, for so long.
    KillStore(Duration),
    /// An operator moves the volume.
    Promote,
    /// The node is told to end.
    Terminate,
}

fn in_order(cluster: &Cluster) -> Result<(), String> {
    let status = cluster.cli_json(&["status"]);
    if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
}

/// Does it, and undoes it.
fn inflict(cluster: &Cluster, etcd: &mut Etcd, fault: Fault, shard: &str) {
    let victim = cluster.primary_of(shard);
    let network = cluster.network();
    let lasts = || std::thread::sleep(FAULT_LASTS);
    let start = |node: &str| drop(cluster.cli_run(&["dev", "start", node]));
    let cut = |links: &[Link]| {
        links.iter().for_each(|link| network.cut(&victim, *link));
        lasts();
        links.iter().for_each(|link| network.heal(&victim, *link));
    };
    match fault {
        Fault::Kill => {
            cluster.cli_run(&["dev", "kill", &victim]);
            lasts();
            start(&victim);
        }
        Fault::KillBoth => {
            // The supervisor starts it again. A parent that stands still records nothing.
            let child = cluster.node(&victim);
            let parent = child.parent();
            parent.stop();
            child.kill();
            parent.kill();
        }
        Fault::Freeze => {
            cluster.freeze(&victim);
            lasts();
            start(&victim);
        }
        Fault::CutFromStore => cut(&[Link::Store]),
        Fault::CutFromClients => cut(&[Link::Clients]),
        Fault::CutFromBoth => cut(&[Link::Store, Link::Clients]),
        Fault::KillStoreLeader => {
            let leader = etcd.leader();
            etcd.kill_member(leader);
            lasts();
            etcd.restart_member(leader);
        }
        Fault::KillStore(lasts) => {
            etcd.kill();
            std::thread::sleep(lasts);
            etcd.restart();
        }
        Fault::Promote => {
            let shown = cluster.cli_json(&["shard", "show", shard]);
            let volume =
                shown["volume"].as_str().or(shown["location"]["volume"].as_str()).unwrap().to_owned();
            let to = if victim == "node-1" { "node-2" } else { "node-1" };
            cluster.cli_run(&["volume", "promote", &volume, to]);
        }
        Fault::Terminate => {
            cluster.cli_run(&["dev", "kill", &victim, "--signal", "TERM"]);
            lasts();
            start(&victim);
        }
    }
}

fn chaos(faults: usize, store_outage: Duration, seed: u64) {
    let (cluster, mut etcd) = Cluster::start_in_namespaces(&Options::default());
    let names: Vec<String> = (0..SHARDS).map(|n| format!("chaos-{n}")).collect();
    let shards: Vec<(PathBuf, ShardId)> = names
        .iter()
        .map(|name| {
            let folder = cluster.shard(name);
            let info = block_on(async {
                cluster.client().shard_by_name(&ShardName::new(name.as_str()).unwrap()).await.unwrap()
            });
            (folder, info.id)
        })
        .collect();
    let load = Load {
        cluster: &cluster,
        shards: shards.clone(),
        begun: Instant::now(),
        stop: AtomicBool::new(false),
        numbers: AtomicU64::new(1),
        history: Mutex::default(),
        done: AtomicU64::new(0),
        longest: Mutex::default(),
    };
    let kinds = [
        Fault::Kill,
        Fault::Freeze,
        Fault::CutFromStore,
        Fault::Promote,
        Fault::KillBoth,
        Fault::CutFromBoth,
        Fault::KillStoreLeader,
        Fault::CutFromClients,
        Fault::Terminate,
        Fault::KillStore(store_outage),
    ];
    // To look at some kinds more closely: SHARDFS_TEST_FAULTS=Kill,Freeze
    let kinds = match std::env::var("SHARDFS_TEST_FAULTS") {
        Ok(wanted) => {
            kinds.into_iter().filter(|kind| wanted.split(',').any(|w| format!("{kind:?}") == w)).collect()
        }
        Err(_) => kinds.to_vec(),
    };
    let (append, work) = (shards[0].0.join("appended"), shards[1].0.clone());

    let (created, appended, worked) = std::thread::scope(|scope| {
        let load = &load;
        let over_grpc = scope.spawn(move || {
            block_on(async {
                let clients = (0..GRPC_CLIENTS).map(|number| grpc_client(load, number));
                let creators = (0..2).map(|number| creator(load, number));
                futures::join!(futures::future::join_all(clients), futures::future::join_all(creators)).1
            })
        });
        let on_mount: Vec<_> = (0..MOUNT_CLIENTS)
            .map(|number| scope.spawn(move || mount_client(load, GRPC_CLIENTS + number)))
            .collect();
        let appender = scope.spawn(|| appender(load, &append));
        let worker = scope.spawn(|| worker(load, &work));

        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut random = fastrand::Rng::with_seed(seed);
            let goes_on = |what: &str| {
                let before = load.done.load(Ordering::SeqCst);
                eventually(RECOVERY_MAX, || match load.done.load(Ordering::SeqCst) {
                    now if now >= before + 50 => Ok(()),
                    now => Err(format!("{what}: {} operations since", now - before)),
                });
            };
            eventually(RECOVERY_MAX, || in_order(&cluster));
            goes_on("at first");
            for number in 0..faults {
                let fault = kinds[number % kinds.len()];
                let shard = &names[random.usize(..names.len())];
                *load.longest.lock().unwrap() = Default::default();
                let begun = Instant::now();
                inflict(&cluster, &mut etcd, fault, shard);
                goes_on(&format!("after {fault:?}"));
                eventually(RECOVERY_MAX, || in_order(&cluster).map_err(|e| format!("after {fault:?}: {e}")));
                let (longest, what) = load.longest.lock().unwrap().clone();
                println!(
                    "{number:3} {fault:?} of {shard}'s primary: in order after {:.1} s, longest operation {:.2} s ({what}), {} done",
                    begun.elapsed().as_secs_f64(),
                    longest.as_secs_f64(),
                    load.done.load(Ordering::SeqCst)
                );
                std::thread::sleep(Duration::from_millis(random.u64(200..1000)));
            }
        }));
        load.stop.store(true, Ordering::SeqCst);
        let created = over_grpc.join().unwrap();
        for client in on_mount {
            client.join().unwrap();
        }
        let done = (created, appender.join().unwrap(), worker.join().unwrap());
        outcome.unwrap_or_else(|reason| std::panic::resume_unwind(reason));
        done
    });

    // What was acknowledged is there, once.
    block_on(async {
        let client = cluster.client();
        for (shard, name, value) in created.iter().flatten() {
            let (_, data) = client.get(*shard, &Key::new(name.clone()).unwrap()).await.unwrap();
            assert_eq!(data, text(*value), "{name}");
        }
    });
    let expected: String = (0..appended).map(text).collect();
    assert!(
        fs::read_to_string(&append).unwrap() == expected,
        "records appended: lost, doubled or out of order"
    );
    for (path, content) in &worked {
        let got = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(got == *content, "{}: other bytes", path.display());
    }
    let history = load.history.into_inner().unwrap();
    let mut operations = 0;
    for (key, history) in &history {
        operations += history.len();
        linear::check(history).unwrap_or_else(|why| panic!("shared-{key}: {why}"));
    }
    assert_eq!(history.len(), SHARED_KEYS);
    for name in &names {
        cluster.assert_clean(name);
    }
    println!(
        "{faults} faults; {operations} operations on shared keys, {} names created, {appended} records appended, {} files",
        created.iter().flatten().count(),
        worked.len()
    );
}

#[test]
fn ten_faults_under_load() {
    chaos(10, Duration::from_secs(6), 1);
}

#[test]
#[ignore = "ten to fifteen minutes: make test-long"]
fn a_hundred_faults_under_load() {
    chaos(110, Duration::from_secs(30), fastrand::u64(..));
}
