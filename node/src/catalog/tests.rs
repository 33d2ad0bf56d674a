//! The catalog over a real store, real volumes (`dir`) and real shards; crashes are catalogs that are dropped,
//! and records as a crash leaves them.

use std::sync::atomic::{AtomicU64, Ordering};

use shardfs_proto::types::cluster::NewShard;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{Key, ShardName, VolumeId};
use tokio::task::JoinHandle;

use super::*;
use crate::cluster::bootstrap::{self, VolumeSpec};
use crate::cluster::embedded::EmbeddedStore;
use crate::cluster::embedded_server::{Handle, serve};
use crate::cluster::heartbeat::{self, Heart};
use crate::cluster::records::{self, NEXT_SHARD_ID, NodeRecord, name_key, request_key, shard_key};
use crate::cluster::store::{KeyRange, Txn, get};
use crate::net::ListenAddr;
use crate::shard::{Mutation, ShardSettings};
use crate::volume::Providers;

mod copies;
mod disk;
mod late;

pub(super) const PATIENCE: Duration = Duration::from_secs(90);

/// A store that outlives the nodes.
pub(super) struct Bench {
    /// On which its loop volumes lie; unmounted before the folder goes.
    disk: Option<disk::Disk>,
    dir: tempfile::TempDir,
    _server: Handle,
    address: String,
    cluster_id: String,
}

/// A node's catalog, running.
pub(super) struct TestNode {
    pub(super) catalog: Arc<Catalog>,
    tasks: Vec<JoinHandle<()>>,
    stop: CancellationToken,
}

impl Bench {
    pub(super) async fn new(volumes: &[(&str, &str)]) -> Bench {
        Self::make(volumes, &[]).await
    }

    /// With one volume that others stand by for.
    pub(super) async fn with_backups(volume: &str, node: &str, backups: &[&str]) -> Bench {
        Self::make(&[(volume, node)], backups).await
    }

    async fn make(volumes: &[(&str, &str)], backups: &[&str]) -> Bench {
        Self::make_in(tempfile::tempdir().unwrap(), None, volumes, backups).await
    }

    async fn make_in(
        dir: tempfile::TempDir,
        disk: Option<disk::Disk>,
        volumes: &[(&str, &str)],
        backups: &[&str],
    ) -> Bench {
        let (provider, ending, size_bytes) = match disk {
            Some(_) => ("loop", ".img", disk::VOLUME_BYTES),
            None => ("dir", "", 0),
        };
        let socket = dir.path().join("meta.sock");
        let server = serve(dir.path().join("meta.redb"), ListenAddr::Unix(socket)).await.unwrap();
        let address = server.address().to_string();
        let store = EmbeddedStore::new(&address).unwrap();
        let cluster_id = bootstrap::ensure_cluster_id(&store).await.unwrap();
        for (volume, node) in volumes {
            let spec = VolumeSpec {
                id: VolumeId::new(*volume).unwrap(),
                provider: provider.into(),
                source: dir.path().join(format!("backing/{volume}{ending}")).to_str().unwrap().to_owned(),
                size_bytes,
                iops: 0,
                primary: NodeId::new(*node).unwrap(),
                backups: backups.iter().map(|id| NodeId::new(*id).unwrap()).collect(),
                allow_unfenced: false,
            };
            bootstrap::ensure_volume(&store, &spec).await.unwrap();
            bootstrap::ensure_volume(&store, &spec).await.unwrap();
        }
        Bench { disk, dir, _server: server, address, cluster_id }
    }

    pub(super) fn store(&self) -> EmbeddedStore {
        EmbeddedStore::new(&self.address).unwrap()
    }

    pub(super) async fn node(&self, id: &str) -> TestNode {
        self.node_on(id, Arc::new(self.store())).await
    }

    /// One that reaches the records in a way of its own.
    pub(super) async fn node_on(&self, id: &str, store: Arc<dyn MetaStore>) -> TestNode {
        self.node_with(id, store, Providers::default()).await
    }

    /// One whose machine is of a cloud.
    pub(super) async fn node_in_cloud(&self, id: &str, providers: Providers) -> TestNode {
        self.node_with(id, Arc::new(self.store()), providers).await
    }

    async fn node_with(&self, id: &str, store: Arc<dyn MetaStore>, providers: Providers) -> TestNode {
        let cloud = providers.ebs().is_ok();
        let view = View::new();
        let stop = CancellationToken::new();
        let mut tasks = vec![tokio::spawn(view.clone().run(store.clone(), stop.clone()))];
        let (revision, _) = get(&*store, "shardfs/cluster").await.unwrap();
        view.wait_for(revision, PATIENCE).await.unwrap();
        let record = NodeRecord {
            v: records::FORMAT,
            id: NodeId::new(id).unwrap(),
            endpoints: vec![format!("unix:/{id}")],
            http: String::new(),
            version: "1".into(),
            started: clock::now(),
            incarnation: bootstrap::random_id(),
            instance_id: if cloud { format!("i-{id}") } else { String::new() },
            region: String::new(),
            cloud,
        };
        let registered = heartbeat::register(&*store, &record).await.unwrap();
        let lease = Arc::new(Lease::default());
        let heart = Heart {
            store: store.clone(),
            id: record.id.clone(),
            registered,
            view: view.clone(),
            lease: lease.clone(),
            replaced: CancellationToken::new(),
        };
        tasks.push(tokio::spawn(heart.run(stop.clone())));
        eventually("it beats", async || lease.succeeded()).await;
        let catalog = Catalog::new(CatalogParts {
            node_id: NodeId::new(id).unwrap(),
            data_dir: self.dir.path().join(id),
            devices: Default::default(),
            providers,
            backup_dir: None,
            cluster_id: self.cluster_id.clone(),
            chunk_bytes: crate::shard::chunk::CHUNK_BYTES,
            tunable: Tunable { limit_bytes_default: Some(1 << 30), publish_every: Duration::from_secs(1) },
            store,
            view,
            lease,
            record,
            alone_from: clock::boot(),
            manager: ShardManager::new(ShardSettings {
                block_cache_bytes: 8 << 20,
                write_buffer_bytes: 8 << 20,
                open_shards_max: 16,
                ..ShardSettings::default()
            }),
        });
        tasks.push(tokio::spawn(catalog.clone().run()));
        tokio::time::timeout(PATIENCE, catalog.settled()).await.unwrap();
        TestNode { catalog, tasks, stop }
    }

    /// A shard's folder, seen past the node.
    pub(super) fn shard_dir(&self, volume: &str, id: ShardId) -> PathBuf {
        self.dir.path().join("backing").join(volume).join(format!("shard-{id}"))
    }
}

impl TestNode {
    pub(super) async fn end(self) {
        self.catalog.shutdown().await.unwrap();
        self.stop.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

pub(super) fn me() -> ClientId {
    ClientId::new("me").unwrap()
}

pub(super) fn name(text: &str) -> ShardName {
    ShardName::new(text).unwrap()
}

pub(super) fn new(shard: &str) -> NewShard {
    static REQUEST: AtomicU64 = AtomicU64::new(1);
    let request_id = format!("request-{}", REQUEST.fetch_add(1, Ordering::Relaxed));
    NewShard { name: name(shard), limit_bytes: None, mode: 0o750, uid: 1, gid: 2, request_id }
}

pub(super) fn by_id(id: ShardId) -> Selector {
    Selector::Id(id)
}

pub(super) fn reason<T>(outcome: Result<T>) -> Reason {
    match outcome {
        Ok(_) => panic!("succeeded"),
        Err(error) => error.reason(),
    }
}

pub(super) async fn put(shard: &Shard, key: &str) -> Result<()> {
    use shardfs_proto::types::op::{Durability, Operation, PutItem, PutOptions};
    let item = PutItem {
        key: Key::new(key.to_owned())?,
        value: bytes::Bytes::from_static(b"value"),
        options: PutOptions::default(),
    };
    let operation = Operation::PutValue { item };
    let mutation = Mutation { session: None, sequence: None, durability: Durability::Sync, operation };
    shard.mutate(mutation).await.map(drop)
}

pub(super) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let reached = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, reached).await.is_ok(), "{what}: not within {PATIENCE:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shards_whole_life() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let catalog = &node.catalog;
    let request = new("photos");
    let info = catalog.new_shard(&me(), request.clone()).await.unwrap();
    assert_eq!(
        (info.state, info.limit_bytes, info.name.as_str()),
        (ShardState::Active, Some(1 << 30), "photos")
    );
    assert!(bench.shard_dir("vol-1", info.id).is_dir());
    // Visible at once, here; a retry answers the same; another request does not get the name.
    let local = catalog.local_shard(&me(), &Selector::Name(name("photos")), None).unwrap();
    assert_eq!(local.id, info.id);
    assert_eq!(catalog.new_shard(&me(), request.clone()).await.unwrap().id, info.id);
    assert_eq!(reason(catalog.new_shard(&me(), new("photos")).await), Reason::ShardExists);
    let other = ClientId::new("other").unwrap();
    assert!(catalog.new_shard(&other, new("photos")).await.unwrap().id > info.id);
    // Owner and epoch.
    assert_eq!(reason(catalog.local_shard(&other, &by_id(info.id), None)), Reason::WrongOwner);
    let epoch = info.location.epoch;
    assert!(catalog.local_shard(&me(), &by_id(info.id), Some(epoch)).is_ok());
    let stale = catalog.local_shard(&me(), &by_id(info.id), Some(epoch.next())).err().unwrap();
    assert_eq!(stale.reason(), Reason::StaleEpoch);
    assert_eq!(stale.location().unwrap().epoch, epoch);
    // Rename, also back and onto a name that is taken.
    let renamed = catalog.rename_shard(&me(), &by_id(info.id), name("pictures")).await.unwrap();
    assert_eq!(renamed.name.as_str(), "pictures");
    assert_eq!(
        reason(catalog.get_shard(&me(), &Selector::Name(name("photos"))).await),
        Reason::ShardNotFound
    );
    let second = catalog.new_shard(&me(), new("photos")).await.unwrap();
    let clash = catalog.rename_shard(&me(), &by_id(info.id), name("photos")).await;
    assert_eq!(reason(clash), Reason::ShardExists);
    // A retry of the first request still finds its shard.
    assert_eq!(catalog.new_shard(&me(), request).await.unwrap().id, info.id);
    // Close.
    let shard = catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
    put(&shard, "a/b").await.unwrap();
    drop(shard);
    for _ in 0..2 {
        assert_eq!(catalog.close_shard(&me(), &by_id(info.id)).await.unwrap().state, ShardState::ReadOnly);
    }
    let shard = catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
    assert_eq!(reason(put(&shard, "c").await), Reason::ShardReadOnly);
    drop(shard);
    // Delete.
    assert_eq!(reason(catalog.delete_shard(&me(), &by_id(info.id), true).await), Reason::ShardNotEmpty);
    assert!(catalog.open_shard(&me(), &by_id(info.id), None).await.is_ok());
    let gone = catalog.delete_shard(&me(), &by_id(info.id), false).await.unwrap();
    assert_eq!(gone.state, ShardState::Deleted);
    assert_eq!(reason(catalog.open_shard(&me(), &by_id(info.id), None).await), Reason::ShardDeleted);
    assert_eq!(reason(catalog.delete_shard(&me(), &by_id(info.id), false).await), Reason::ShardDeleted);
    let dir = bench.shard_dir("vol-1", info.id);
    eventually("the bytes go", async || !dir.exists()).await;
    assert!(catalog.new_shard(&me(), new("pictures")).await.unwrap().id > second.id);
    let names = |infos: Vec<ShardInfo>| infos.iter().map(|i| i.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(catalog.list_shards(&me(), false).await.unwrap()), ["photos", "pictures"]);
    assert_eq!(catalog.list_shards(&me(), true).await.unwrap().len(), 3);
    assert_eq!(catalog.list_all_shards(false).await.unwrap().len(), 3);
    let status = catalog.status().await.unwrap();
    assert_eq!((status.volumes.len(), status.volumes[0].trouble.as_str()), (1, ""));
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_node_says_where_and_knows_at_once() {
    let bench = Bench::new(&[("vol-1", "node-1"), ("vol-2", "node-2")]).await;
    let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    for round in 0..10 {
        let label = format!("s{round}");
        let request = new(&label);
        let info = one.catalog.new_shard(&me(), request.clone()).await.unwrap();
        assert_eq!(info.location.volume.as_str(), "vol-1");
        let seen = two.catalog.get_shard(&me(), &Selector::Name(name(&label))).await.unwrap();
        assert_eq!(seen.id, info.id);
        let elsewhere = two.catalog.open_shard(&me(), &by_id(info.id), None).await.err().unwrap();
        assert_eq!(elsewhere.reason(), Reason::NotPrimary);
        assert_eq!(elsewhere.location().unwrap().node, Some(NodeId::new("node-1").unwrap()));
        // The same request through the other node.
        assert_eq!(two.catalog.new_shard(&me(), request).await.unwrap().id, info.id);
        one.catalog.delete_shard(&me(), &by_id(info.id), true).await.unwrap();
        assert!(two.catalog.list_shards(&me(), false).await.unwrap().is_empty());
    }
    one.end().await;
    two.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ids_are_unique_under_concurrency() {
    let bench = Bench::new(&[("vol-1", "node-1"), ("vol-2", "node-1"), ("vol-3", "node-2")]).await;
    let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    let making = (0..12).map(|i| {
        let catalog = if i % 3 == 0 { two.catalog.clone() } else { one.catalog.clone() };
        // Pairs compete for one name.
        tokio::spawn(async move { catalog.new_shard(&me(), new(&format!("s{}", i / 2))).await })
    });
    let mut ids = Vec::new();
    for made in futures::future::join_all(making).await {
        match made.unwrap() {
            Ok(info) => ids.push(info.id),
            Err(error) => assert_eq!(error.reason(), Reason::ShardExists, "{error}"),
        }
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6);
    let per_volume = |v: &str| one.catalog.parts.view.shard_count(&VolumeId::new(v).unwrap());
    eventually("all are seen", async || per_volume("vol-1") + per_volume("vol-2") + per_volume("vol-3") == 6)
        .await;
    one.end().await;
    two.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn deleting_if_empty_loses_no_acknowledged_write() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..8 {
        let info = node.catalog.new_shard(&me(), new(&format!("s{round}"))).await.unwrap();
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let (catalog, id, pause) = (node.catalog.clone(), info.id, random.u64(0..3000));
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_micros(pause)).await;
                    let shard = catalog.open_shard(&me(), &by_id(id), None).await?;
                    put(&shard, &format!("k{writer}")).await
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_micros(random.u64(0..3000))).await;
        let deleted = node.catalog.delete_shard(&me(), &by_id(info.id), true).await;
        let mut written = 0;
        for writer in writers {
            written += usize::from(writer.await.unwrap().is_ok());
        }
        match deleted {
            Ok(_) => assert_eq!(written, 0, "an acknowledged write went with the shard"),
            Err(error) => {
                assert_eq!(error.reason(), Reason::ShardNotEmpty, "{error}");
                assert!(written > 0);
            }
        }
    }
    node.end().await;
}

/// The records of a shard as a crash leaves them.
async fn leave(store: &EmbeddedStore, id: u64, label: &str, state: StateWord) -> ShardRecord {
    let record = ShardRecord {
        v: records::FORMAT,
        id: ShardId::new(id).unwrap(),
        name: name(label),
        owner: me(),
        volume: VolumeId::new("vol-1").unwrap(),
        state,
        limit_bytes: None,
        created: clock::now(),
        request_id: format!("left-{id}"),
        mode: 0o755,
        uid: 0,
        gid: 0,
        purged: false,
        snapshot_of: None,
        copy_of: None,
        rollback: None,
    };
    let mut txn = Txn::new()
        .put(NEXT_SHARD_ID, (id + 1).to_string())
        .put(request_key(&me(), &record.request_id), id.to_string())
        .put(shard_key(record.id), records::encode(&record));
    if state != StateWord::Deleted {
        txn = txn.put(name_key(&me(), &record.name), id.to_string());
    }
    store.txn(txn).await.unwrap();
    record
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_finished() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let store = bench.store();
    // Killed after the reservation.
    let creating = leave(&store, 1, "creating", StateWord::Creating).await;
    let node = bench.node("node-1").await;
    eventually("it is made", async || {
        node.catalog.open_shard(&me(), &by_id(creating.id), None).await.is_ok()
    })
    .await;
    // The caller's retry finds it.
    let mut request = new("creating");
    request.request_id = creating.request_id.clone();
    assert_eq!(node.catalog.new_shard(&me(), request).await.unwrap().id, creating.id);
    let info = node.catalog.new_shard(&me(), new("doomed")).await.unwrap();
    node.end().await;
    // Killed after the record said `deleted`, with the bytes still there.
    let (_, kv) = get(&store, shard_key(info.id)).await.unwrap();
    let mut record: ShardRecord = records::decode(b"", &kv.unwrap().value).unwrap();
    record.state = StateWord::Deleted;
    let txn =
        Txn::new().put(shard_key(info.id), records::encode(&record)).delete(name_key(&me(), &record.name));
    store.txn(txn).await.unwrap();
    let dir = bench.shard_dir("vol-1", info.id);
    assert!(dir.is_dir());
    let node = bench.node("node-1").await;
    eventually("its bytes go", async || !dir.exists()).await;
    eventually("that is noted", async || {
        node.catalog.parts.view.shard(info.id).is_some_and(|kept| kept.record.purged)
    })
    .await;
    // Ids go on; the other shard is untouched.
    assert!(node.catalog.new_shard(&me(), new("next")).await.unwrap().id > info.id);
    assert!(node.catalog.open_shard(&me(), &by_id(creating.id), None).await.is_ok());
    // Killed after the bytes were sealed: the record catches up when the call is repeated.
    let sealed = node.catalog.new_shard(&me(), new("sealed")).await.unwrap();
    let shard = node.catalog.open_shard(&me(), &by_id(sealed.id), None).await.unwrap();
    shard.set_read_only().await.unwrap();
    drop(shard);
    eventually("the record follows", async || {
        // Any use of the shard shows it.
        node.catalog.open_shard(&me(), &by_id(sealed.id), None).await.unwrap();
        node.catalog.parts.view.shard(sealed.id).unwrap().record.state == StateWord::ReadOnly
    })
    .await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_store_gives_no_shard_away() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let node = bench.node("node-1").await;
    let mut old = Vec::new();
    for n in 1..=3 {
        let info = node.catalog.new_shard(&me(), new(&format!("old-{n}"))).await.unwrap();
        let shard = node.catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
        put(&shard, "theirs").await.unwrap();
        old.push(info.id);
    }
    node.end().await;
    // The store is that of before the shards.
    let store = bench.store();
    let shards = KeyRange::prefix(records::SHARDS);
    let mut txn = Txn::new().delete(NEXT_SHARD_ID);
    for kv in store.range(shards, 0).await.unwrap().kvs {
        let record: ShardRecord = records::decode(&kv.key, &kv.value).unwrap();
        txn = txn
            .delete(shard_key(record.id))
            .delete(name_key(&me(), &record.name))
            .delete(request_key(&me(), &record.request_id));
    }
    store.txn(txn).await.unwrap();
    // One whose reservation a crash has left.
    leave(&store, old[0].get(), "left", StateWord::Creating).await;
    let node = bench.node("node-1").await;
    eventually("it is taken back", async || node.catalog.parts.view.shard(old[0]).is_none()).await;
    let info = node.catalog.new_shard(&me(), new("mine")).await.unwrap();
    assert!(info.id > old[2], "{}", info.id);
    let shard = node.catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
    assert_eq!(shard.usage().inodes, 1);
    drop(shard);
    for id in old {
        assert!(bench.shard_dir("vol-1", id).join("CURRENT").is_file(), "{id} is left alone");
    }
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_tombstones_go() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let store = bench.store();
    let surplus = 5;
    for id in 1..=(resume::TOMBSTONES_MAX + surplus) as u64 {
        let mut record = leave(&store, id, "gone", StateWord::Deleted).await;
        record.purged = true;
        store.txn(Txn::new().put(shard_key(record.id), records::encode(&record))).await.unwrap();
    }
    let node = bench.node("node-1").await;
    let keys = async |prefix: &'static str| {
        crate::cluster::store::range_all(&store, KeyRange::prefix(prefix)).await.unwrap().kvs.len()
    };
    eventually("they go", async || keys("shardfs/shards/").await == resume::TOMBSTONES_MAX).await;
    assert_eq!(keys("shardfs/requests/").await, resume::TOMBSTONES_MAX);
    assert_eq!(
        reason(node.catalog.get_shard(&me(), &by_id(ShardId::new(1).unwrap())).await),
        Reason::ShardNotFound
    );
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_trouble_stops_no_other() {
    let bench = Bench::new(&[("bad", "node-1"), ("good", "node-1")]).await;
    let bad = bench.dir.path().join("backing/bad");
    std::fs::create_dir_all(bad.parent().unwrap()).unwrap();
    std::fs::write(&bad, "a file where a folder belongs").unwrap();
    let node = bench.node("node-1").await;
    let info = node.catalog.new_shard(&me(), new("s")).await.unwrap();
    assert_eq!(info.location.volume.as_str(), "good");
    let status = node.catalog.status().await.unwrap();
    assert!(!status.volumes[0].trouble.is_empty() && status.volumes[1].trouble.is_empty(), "{status:?}");
    std::fs::remove_file(&bad).unwrap();
    eventually("it is attached", async || {
        node.catalog.status().await.unwrap().volumes.iter().all(|v| v.trouble.is_empty())
    })
    .await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_of_ids_is_told() {
    let bench = Bench::new(&[("vol-1", "node-1")]).await;
    let last = ShardId::MAX.get();
    bench.store().txn(Txn::new().put(NEXT_SHARD_ID, last.to_string())).await.unwrap();
    let node = bench.node("node-1").await;
    assert_eq!(node.catalog.new_shard(&me(), new("last")).await.unwrap().id, ShardId::MAX);
    assert_eq!(reason(node.catalog.new_shard(&me(), new("one more")).await), Reason::IdsExhausted);
    node.end().await;
}
