//! Load on shards, over gRPC and on the mount, that a [`History`] records: what was asked for, answered, and durable.
//!
//! Every shard has a history and lanes of its own. Lanes of one client share its session, so what they do as `buffered` stays
//! unsynced for a while; where several sessions work on a shard, each makes the others' work durable.
//! Any error that a lane sees is a failure of the test.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::op::{Durability, Operation, PutItem, PutOptions};
use shardfs_proto::types::{FileName, InodeNo, Key, ShardId, ShardName};

use crate::cluster::{Cluster, block_on};
use crate::history::{Change, History, State};

/// Names that a lane keeps at most: enough that every kind of change finds some, few enough that most are changed often.
const NAMES_MAX: usize = 40;
/// Where writes on the mount begin: each is one operation then.
const PAGE: usize = 4096;
/// The longest write on the mount.
const WRITE_MAX: usize = 64 << 10;
/// Values that are fetched at once.
const FETCHED: usize = 128;

/// What is done to one shard.
#[derive(Debug)]
pub struct ShardLoad {
    shard: String,
    /// Lanes of each gRPC client.
    clients: Vec<Vec<usize>>,
    /// Lanes on the mount.
    mounted: Vec<usize>,
    /// Which mount; `None`: the cluster's.
    mount: Option<PathBuf>,
    /// Whether clients put and remove without waiting for the device, now and then.
    buffered: bool,
    history: History,
}

impl ShardLoad {
    /// `clients`: how many lanes each gRPC client has; `mounted`: how many there are on the mount.
    pub fn new(shard: &str, clients: &[usize], mounted: usize, buffered: bool) -> ShardLoad {
        let mut names = Vec::new();
        let mut lanes = |prefix: String, count: usize| -> Vec<usize> {
            (0..count)
                .map(|lane| {
                    names.push(format!("{prefix}{lane}"));
                    names.len() - 1
                })
                .collect()
        };
        let clients = clients.iter().enumerate().map(|(c, count)| lanes(format!("c{c}-"), *count)).collect();
        let mounted = lanes("m".to_owned(), mounted);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        ShardLoad {
            shard: shard.to_owned(),
            clients,
            mounted,
            mount: None,
            buffered,
            history: History::new(&names),
        }
    }

    /// Its lanes on the mount work on another mount.
    pub fn on_mount(self, mount: &Path) -> ShardLoad {
        ShardLoad { mount: Some(mount.to_owned()), ..self }
    }

    /// The shard.
    pub fn shard(&self) -> &str {
        &self.shard
    }

    /// What was done.
    pub fn history(&self) -> &History {
        &self.history
    }

    fn lanes(&self) -> impl Iterator<Item = usize> + '_ {
        self.clients.iter().flatten().chain(&self.mounted).copied()
    }
}

/// How far a load is.
#[derive(Debug)]
pub struct Progress {
    stop: AtomicBool,
    failed: AtomicBool,
    /// Changes that were answered, by load and lane.
    done: Vec<Vec<AtomicU64>>,
}

impl Progress {
    /// Changes that were answered, by load and lane.
    pub fn counts(&self) -> Vec<Vec<u64>> {
        let of = |lanes: &Vec<AtomicU64>| lanes.iter().map(|n| n.load(Ordering::SeqCst)).collect();
        self.done.iter().map(of).collect()
    }

    /// Waits until every lane has done `more` changes; panics if one saw an error, or after `within`.
    pub fn wait_for(&self, more: u64, within: Duration) {
        let before = self.counts();
        crate::cluster::eventually(within, || {
            assert!(!self.failed.load(Ordering::SeqCst), "the load saw an error, see above");
            let now = self.counts();
            let late = |(now, before): &(&u64, &u64)| **now < **before + more;
            let waiting = now.iter().flatten().zip(before.iter().flatten()).filter(late).count();
            if waiting == 0 {
                Ok(())
            } else {
                Err(format!("{waiting} lanes do not go on: {before:?}, {now:?}"))
            }
        });
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.failed.load(Ordering::SeqCst)
    }
}

/// A seed that a failing run prints; `SHARDFS_TEST_SEED` repeats it.
pub fn seed() -> u64 {
    let seed = match std::env::var("SHARDFS_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    println!("SHARDFS_TEST_SEED={seed}");
    seed
}

/// Runs loads on shards that are there until `during` returns; answers what it did.
pub fn run<T>(cluster: &Cluster, loads: &[ShardLoad], seed: u64, during: impl FnOnce(&Progress) -> T) -> T {
    let progress = &Progress {
        stop: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        done: loads.iter().map(|load| load.lanes().map(|_| AtomicU64::new(0)).collect()).collect(),
    };
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (at, load) in loads.iter().enumerate() {
            for lanes in &load.clients {
                workers.push(scope.spawn(move || {
                    let _told = Told(progress);
                    grpc_client(cluster, load, lanes, seed, progress, at);
                }));
            }
            for lane in &load.mounted {
                let folder = load.mount.clone().unwrap_or_else(|| cluster.mount()).join(&load.shard);
                workers.push(scope.spawn(move || {
                    let _told = Told(progress);
                    mounted_lane(
                        &folder,
                        load,
                        *lane,
                        seed,
                        &|| progress.done[at][*lane].fetch_add(1, Ordering::SeqCst),
                        progress,
                    );
                }));
            }
        }
        // Whatever happens here, the lanes must end, or the scope would wait for ever.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| during(progress)));
        progress.stop.store(true, Ordering::SeqCst);
        let ends: Vec<_> = workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ends.into_iter().for_each(|end| end.unwrap_or_else(|reason| std::panic::resume_unwind(reason)));
        outcome.unwrap_or_else(|reason| std::panic::resume_unwind(reason))
    })
}

/// Tells the others when a lane panics.
struct Told<'a>(&'a Progress);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
        }
    }
}

/// Everything that a shard holds.
pub fn contents(cluster: &Cluster, shard: &str) -> State {
    block_on(async {
        let client = cluster.client();
        let id = id_of(&client, shard).await;
        let mut keys = Vec::new();
        let mut listing =
            std::pin::pin!(client.list(id, ListOptions { keys_only: true, ..ListOptions::default() }));
        while let Some(item) = listing.next().await {
            match item.unwrap_or_else(|e| panic!("listing {shard}: {e}")) {
                ListItem::Key { key, .. } => keys.push(Key::new(key).unwrap()),
                ListItem::CommonPrefix(prefix) => panic!("{prefix:?} without a delimiter"),
            }
        }
        let mut state = State::new();
        for keys in keys.chunks(FETCHED) {
            let mut answers = std::pin::pin!(client.batch_get(id, keys.to_vec()));
            while let Some(answer) = answers.next().await {
                let (at, value) = answer.unwrap_or_else(|e| panic!("reading {shard}: {e}"));
                let name = String::from_utf8(keys[at].as_bytes().to_vec()).unwrap();
                let (_, value) = value.unwrap_or_else(|e| panic!("reading {name} of {shard}: {e}"));
                state.insert(name, value.to_vec());
            }
        }
        client.close().await;
        state
    })
}

/// Everything that a folder of a mount holds, as [`contents`] has it of a shard.
pub fn contents_on(folder: &Path) -> State {
    let mut state = State::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(here) = folders.pop() {
        for entry in fs::read_dir(&here).unwrap_or_else(|e| panic!("{}: {e}", here.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).expect("it lies there").to_str().expect("names are UTF-8");
            let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            state.insert(name.to_owned(), bytes);
        }
    }
    state
}

async fn id_of(client: &Client, shard: &str) -> ShardId {
    let found = client.shard_by_name(&ShardName::new(shard).unwrap()).await;
    found.unwrap_or_else(|e| panic!("shard {shard}: {e}")).id
}

fn key(name: &str) -> Key {
    Key::new(name.to_owned()).unwrap()
}

/// Bytes that do not compress and tell what they were meant for.
fn content(random: &mut fastrand::Rng, most: usize) -> Vec<u8> {
    let size = match random.u8(..20) {
        0..8 => random.usize(1..1000),
        8..14 => random.usize(4_000..10_000),
        14..18 => random.usize(20_000..70_000),
        _ => random.usize(100_000..300_000),
    };
    let mut bytes = vec![0; size.min(most)];
    random.fill(&mut bytes);
    bytes
}

/// The lanes of one client, which share its session.
fn grpc_client(
    cluster: &Cluster,
    load: &ShardLoad,
    lanes: &[usize],
    seed: u64,
    progress: &Progress,
    at: usize,
) {
    block_on(async {
        let client = cluster.client();
        let id = id_of(&client, &load.shard).await;
        let lanes = lanes.iter().map(|lane| {
            let lane = GrpcLane { client: &client, id, load, lane: *lane };
            lane.run(seed, move || progress.done[at][lane.lane].fetch_add(1, Ordering::SeqCst), progress)
        });
        futures::future::join_all(lanes).await;
        client.close().await;
    });
}

#[derive(Clone, Copy)]
struct GrpcLane<'a> {
    client: &'a Client,
    id: ShardId,
    load: &'a ShardLoad,
    lane: usize,
}

impl GrpcLane<'_> {
    async fn run(self, seed: u64, count: impl Fn() -> u64, progress: &Progress) {
        let name = self.load.history.lane_name(self.lane).to_owned();
        let mut random = fastrand::Rng::with_seed(seed ^ (self.lane as u64 + 1) << 8 ^ self.id.get() << 32);
        // Stays, so that the folder stays.
        self.put(vec![(format!("{name}/stays"), b"as long as the lane".to_vec())], Durability::Sync).await;
        let folder = self.client.lookup(self.id, InodeNo::ROOT, name.as_bytes()).await.unwrap().inode;
        while !progress.stopped() {
            let durability = match self.load.buffered && random.u8(..5) > 0 {
                true => Durability::Buffered,
                false => Durability::Sync,
            };
            let mut names = self.load.history.names(self.lane);
            names.retain(|other| !other.ends_with("/stays"));
            let fresh = format!("{name}/f{}", random.usize(..NAMES_MAX));
            let some = (!names.is_empty()).then(|| names[random.usize(..names.len().max(1))].clone());
            match (random.u8(..12), some) {
                (0, Some(gone)) => self.remove(gone, durability).await,
                (1, Some(from)) if from != fresh => self.rename(folder, from, fresh, durability).await,
                (2, _) => {
                    let items =
                        (0..5).map(|i| (format!("{name}/b{i}"), content(&mut random, 30_000))).collect();
                    self.put(items, durability).await;
                }
                (3, _) => self.sync().await,
                _ => self.put(vec![(fresh, content(&mut random, usize::MAX))], durability).await,
            }
            count();
            if random.u8(..4) == 0 {
                tokio::time::sleep(Duration::from_micros(random.u64(..4_000))).await;
            }
        }
    }

    async fn put(self, items: Vec<(String, Vec<u8>)>, durability: Durability) {
        let Some(issued) = self.load.history.issue(self.lane, Change::Put(items.clone())) else { return };
        let told = format!("putting {} of {}", items[0].0, self.load.shard);
        let mut items = items.into_iter();
        if items.len() == 1 {
            let (name, value) = items.next().expect("one");
            let put =
                self.client.put(self.id, key(&name), value.into(), PutOptions::default(), durability).await;
            put.unwrap_or_else(|e| panic!("{told}: {e}"));
        } else {
            let items = items.map(|(name, value)| PutItem {
                key: key(&name),
                value: Bytes::from(value),
                options: PutOptions::default(),
            });
            let results = self.client.batch_put(self.id, items.collect(), true, durability).await;
            let results = results.unwrap_or_else(|e| panic!("{told}: {e}"));
            assert!(results.iter().all(Result::is_ok), "{told}");
        }
        self.load.history.answered(self.lane, issued, durability == Durability::Sync);
    }

    async fn remove(self, name: String, durability: Durability) {
        let Some(issued) = self.load.history.issue(self.lane, Change::Remove(name.clone())) else { return };
        let removed = self.client.delete(self.id, &key(&name), durability).await;
        removed.unwrap_or_else(|e| panic!("removing {name} of {}: {e}", self.load.shard));
        self.load.history.answered(self.lane, issued, durability == Durability::Sync);
    }

    async fn rename(self, folder: InodeNo, from: String, to: String, durability: Durability) {
        let Some(issued) = self.load.history.issue(self.lane, Change::Rename(from.clone(), to.clone()))
        else {
            return;
        };
        let file_name =
            |name: &str| FileName::new(name.rsplit('/').next().unwrap_or(name).to_owned()).unwrap();
        let operation = Operation::Rename {
            parent: folder,
            name: file_name(&from),
            new_parent: folder,
            new_name: file_name(&to),
            no_replace: false,
            exchange: false,
        };
        let renamed = self.client.mutate(self.id, operation, durability).await;
        renamed.unwrap_or_else(|e| panic!("renaming {from} to {to} of {}: {e}", self.load.shard));
        self.load.history.answered(self.lane, issued, durability == Durability::Sync);
    }

    async fn sync(self) {
        let issued = self.load.history.now();
        self.client.sync(self.id).await.unwrap_or_else(|e| panic!("syncing {}: {e}", self.load.shard));
        self.load.history.synced(issued);
    }
}

fn mounted_lane(
    folder: &Path,
    load: &ShardLoad,
    lane: usize,
    seed: u64,
    count: &dyn Fn() -> u64,
    progress: &Progress,
) {
    let (history, name) = (&load.history, load.history.lane_name(lane).to_owned());
    let mut random =
        fastrand::Rng::with_seed(seed ^ (lane as u64 + 1) << 16 ^ u64::from(number_of(&load.shard)) << 32);
    let base = folder.join(&name);
    fs::create_dir(&base).unwrap_or_else(|e| panic!("mkdir {}: {e}", base.display()));
    let lane = MountedLane { folder, history, lane };
    let mut number = 0;
    while !progress.stopped() {
        let names = history.names(lane.lane);
        let some = (!names.is_empty()).then(|| names[random.usize(..names.len().max(1))].clone());
        number += 1;
        let fresh = format!("{name}/n{number}");
        match (random.u8(..12), some) {
            (0..3, _) if names.len() < NAMES_MAX => {
                lane.create(&fresh);
                let bytes = content(&mut random, WRITE_MAX);
                lane.write(&fresh, 0, bytes, 0);
            }
            (0..5, Some(gone)) if names.len() >= NAMES_MAX || random.u8(..4) == 0 => lane.remove(&gone),
            (5, Some(from)) => {
                let to = names[random.usize(..names.len())].clone();
                lane.rename(&from, if to == from { &fresh } else { &to });
            }
            (6, Some(file)) => lane.truncate(&file, random.usize(..100_000)),
            (7, Some(file)) => lane.sync(&file),
            (8, Some(_)) => lane.sync(&name),
            (kind, Some(file)) => {
                let offset = random.usize(..40) * PAGE;
                let flags = if kind == 9 { libc::O_DSYNC } else { 0 };
                lane.write(&file, offset, content(&mut random, WRITE_MAX), flags);
            }
            (_, None) => lane.create(&fresh),
        }
        count();
        if random.u8(..4) == 0 {
            std::thread::sleep(Duration::from_micros(random.u64(..4_000)));
        }
    }
}

/// Each call is one operation of the shard.
struct MountedLane<'a> {
    folder: &'a Path,
    history: &'a History,
    lane: usize,
}

impl MountedLane<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Does what is not refused by the history; what fails fails the test.
    fn change(&self, change: Change, durable: bool, work: impl FnOnce() -> std::io::Result<()>) {
        let told = format!("{change:.60?}");
        let Some(issued) = self.history.issue(self.lane, change) else { return };
        work().unwrap_or_else(|e| panic!("{}: {told}: {e}", self.folder.display()));
        self.history.answered(self.lane, issued, durable);
    }

    fn create(&self, name: &str) {
        self.change(Change::Put(vec![(name.to_owned(), Vec::new())]), false, || {
            File::create_new(self.path(name)).map(drop)
        });
    }

    fn write(&self, name: &str, offset: usize, bytes: Vec<u8>, flags: i32) {
        let path = self.path(name);
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&path);
        let file = file.unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        self.change(Change::Write(name.to_owned(), offset, bytes.clone()), flags != 0, || {
            let written = file.write_at(&bytes, offset as u64)?;
            assert_eq!(written, bytes.len(), "{}: a short write", path.display());
            Ok(())
        });
    }

    fn truncate(&self, name: &str, length: usize) {
        let path = self.path(name);
        let file = OpenOptions::new().write(true).open(&path);
        let file = file.unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        self.change(Change::Truncate(name.to_owned(), length), false, || file.set_len(length as u64));
    }

    fn rename(&self, from: &str, to: &str) {
        self.change(Change::Rename(from.to_owned(), to.to_owned()), false, || {
            fs::rename(self.path(from), self.path(to))
        });
    }

    fn remove(&self, name: &str) {
        self.change(Change::Remove(name.to_owned()), false, || fs::remove_file(self.path(name)));
    }

    /// Of a file or a folder.
    fn sync(&self, name: &str) {
        let path = self.path(name);
        let file = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        let issued = self.history.now();
        file.sync_all().unwrap_or_else(|e| panic!("fsync {}: {e}", path.display()));
        self.history.synced(issued);
    }
}

/// A number for a name.
fn number_of(name: &str) -> u32 {
    name.bytes().fold(0, |sum, byte| sum.rotate_left(5) ^ u32::from(byte))
}
