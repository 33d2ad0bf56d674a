//! The view against a real embedded store.

use super::*;
use crate::cluster::bootstrap;
use crate::cluster::embedded::EmbeddedStore;
use crate::cluster::embedded_server::serve;
use crate::cluster::heartbeat::{self, Heart};
use crate::cluster::lease::Lease;
use crate::cluster::records::{FORMAT, encode, node_key, shard_key, volume_key};
use crate::cluster::store::Txn;
use crate::net::ListenAddr;

const PATIENCE: Duration = Duration::from_secs(90);

fn node(id: &str) -> NodeRecord {
    NodeRecord {
        v: FORMAT,
        id: NodeId::new(id).unwrap(),
        endpoints: vec![format!("unix:/{id}")],
        http: String::new(),
        version: "1".into(),
        started: clock::now(),
        incarnation: bootstrap::random_id(),
        instance_id: String::new(),
        region: String::new(),
        cloud: false,
    }
}

fn volume(id: &str, primary: &str) -> VolumeRecord {
    VolumeRecord {
        v: FORMAT,
        id: VolumeId::new(id).unwrap(),
        provider: "dir".into(),
        source: "/x".into(),
        size_bytes: 0,
        iops: 0,
        primary: Some(NodeId::new(primary).unwrap()),
        backups: Vec::new(),
        epoch: Epoch::FIRST,
        holder: String::new(),
        target: None,
        formatted: true,
        allow_unfenced: false,
        predecessors: Vec::new(),
        handed_over: false,
        unmounted: false,
        leaving: false,
        retired: false,
        delete_content: false,
    }
}

fn shard(id: u64, name: &str, state: StateWord) -> ShardRecord {
    ShardRecord {
        v: FORMAT,
        id: ShardId::new(id).unwrap(),
        name: ShardName::new(name).unwrap(),
        owner: ClientId::new("me").unwrap(),
        volume: VolumeId::new("vol-1").unwrap(),
        state,
        limit_bytes: None,
        created: clock::now(),
        request_id: format!("r{id}"),
        mode: 0o755,
        uid: 0,
        gid: 0,
        purged: false,
        snapshot_of: None,
        copy_of: None,
        rollback: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn follows_renames_deletions_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("meta.redb"), dir.path().join("meta.sock"));
    let mut server = serve(file.clone(), ListenAddr::Unix(socket.clone())).await.unwrap();
    let store: Arc<dyn MetaStore> =
        Arc::new(EmbeddedStore::new(&format!("unix:{}", socket.display())).unwrap());
    let view = View::new();
    let stop = CancellationToken::new();
    let running = tokio::spawn(view.clone().run(store.clone(), stop.clone()));

    let cluster = bootstrap::ensure_cluster_id(&*store).await.unwrap();
    assert_eq!(bootstrap::ensure_cluster_id(&*store).await.unwrap(), cluster);
    let (n1, v1) = (node("node-1"), volume("vol-1", "node-1"));
    let put_shard = |record: &ShardRecord| Txn::new().put(shard_key(record.id), encode(record));
    let txn = Txn::new().put(node_key(&n1.id), encode(&n1)).put(volume_key(&v1.id), encode(&v1));
    store.txn(txn).await.unwrap();
    let revision = store.txn(put_shard(&shard(1, "a", StateWord::Active))).await.unwrap().revision;
    view.wait_for(revision, PATIENCE).await.unwrap();
    let owner = ClientId::new("me").unwrap();
    let name = |name: &str| ShardName::new(name).unwrap();
    assert_eq!(view.cluster_id(), cluster);
    assert_eq!(view.shard_by_name(&owner, &name("a")).unwrap().modified, revision);
    assert_eq!(view.location(&v1.id).endpoints, ["unix:/node-1"]);
    assert_eq!(view.shard_count(&v1.id), 1);

    // One gives its name up and another takes it, in one revision and in this order or the other.
    let swap = Txn::new()
        .put(shard_key(ShardId::new(2).unwrap()), encode(&shard(2, "a", StateWord::Active)))
        .put(shard_key(ShardId::new(1).unwrap()), encode(&shard(1, "b", StateWord::Active)));
    let revision = store.txn(swap).await.unwrap().revision;
    view.wait_for(revision, PATIENCE).await.unwrap();
    assert_eq!(view.shard_by_name(&owner, &name("a")).unwrap().record.id.get(), 2);
    assert_eq!(view.shard_by_name(&owner, &name("b")).unwrap().record.id.get(), 1);

    // What happens while nobody can listen is there afterwards.
    server.kill().await.unwrap();
    server = serve(file.clone(), ListenAddr::Unix(socket.clone())).await.unwrap();
    let revision = store.txn(put_shard(&shard(1, "b", StateWord::Deleted))).await.unwrap().revision;
    view.wait_for(revision, PATIENCE).await.unwrap();
    assert!(view.shard_by_name(&owner, &name("b")).is_none());
    assert_eq!(view.shard(ShardId::new(1).unwrap()).unwrap().record.state, StateWord::Deleted);
    assert_eq!(view.shard_count(&v1.id), 1);

    // A record that cannot be read hides no other.
    let broken = Txn::new()
        .put(shard_key(ShardId::new(2).unwrap()), "no JSON")
        .put(shard_key(ShardId::new(3).unwrap()), encode(&shard(3, "c", StateWord::Active)));
    let revision = store.txn(broken).await.unwrap().revision;
    view.wait_for(revision, PATIENCE).await.unwrap();
    assert!(view.shard(ShardId::new(2).unwrap()).is_none());
    assert!(view.shard_by_name(&owner, &name("c")).is_some());
    view.catch_up(&*store, PATIENCE).await.unwrap();

    stop.cancel();
    running.await.unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_seen_and_an_absent_store_is_not_blamed_on_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("meta.redb"), dir.path().join("meta.sock"));
    let server = serve(file.clone(), ListenAddr::Unix(socket.clone())).await.unwrap();
    let store: Arc<dyn MetaStore> =
        Arc::new(EmbeddedStore::new(&format!("unix:{}", socket.display())).unwrap());
    let view = View::new();
    let stop = CancellationToken::new();
    tokio::spawn(view.clone().run(store.clone(), stop.clone()));
    let start = async |id: &str| {
        let record = node(id);
        let registered = heartbeat::register(&*store, &record).await.unwrap();
        let (lease, replaced, stop) =
            (Arc::new(Lease::default()), CancellationToken::new(), CancellationToken::new());
        let heart = Heart {
            store: store.clone(),
            id: record.id,
            registered,
            view: view.clone(),
            lease: lease.clone(),
            replaced: replaced.clone(),
        };
        (tokio::spawn(heart.run(stop.clone())), lease, replaced, stop)
    };
    let (silent, heart_of_silent, ..) = start("silent").await;
    let (_, lease, ..) = start("steady").await;
    let (_, _, _, leaves) = start("leaver").await;
    let (_, _, replaced, _) = start("twice").await;
    let alive = || {
        let alive = view.node_infos().into_iter().filter(|n| n.alive);
        alive.map(|n| n.id.to_string()).collect::<Vec<_>>()
    };
    let becomes = async |expected: &[&str]| {
        let reached = async {
            while alive() != expected {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{:?}", alive()));
    };
    becomes(&["leaver", "silent", "steady", "twice"]).await;
    assert!(lease.succeeded());
    leaves.cancel();
    becomes(&["silent", "steady", "twice"]).await;
    // The same id again: the first process hears that it is no longer the node.
    let _second = start("twice").await;
    tokio::time::timeout(PATIENCE, replaced.cancelled()).await.unwrap();
    // Right after a heartbeat: silence counts from there.
    let beats = heart_of_silent.counter();
    while heart_of_silent.counter() == beats {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let killed = clock::monotonic();
    silent.abort();
    becomes(&["steady", "twice"]).await;
    assert!(killed.elapsed() >= SILENCE_MAX - Duration::from_millis(300), "{:?}", killed.elapsed());
    // Nobody can beat while the store is away; nobody is called dead for it.
    server.kill().await.unwrap();
    tokio::time::sleep(SILENCE_MAX + Duration::from_millis(500)).await;
    assert_eq!(alive(), ["steady", "twice"]);
    assert!(!lease.succeeded());
    let _server = serve(file.clone(), ListenAddr::Unix(socket.clone())).await.unwrap();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(alive(), ["steady", "twice"]);
    }
    assert!(lease.succeeded());
    stop.cancel();
}

#[test]
fn a_record_under_anothers_key_is_left_out() {
    let mut state = State::default();
    let kv = |key: &str, value: Bytes| KeyValue {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value,
        created: Revision::new(1),
        modified: Revision::new(1),
        version: 1,
        lease: None,
    };
    let (n, v) = (node("node-1"), volume("vol-1", "node-1"));
    let (s, stray) = (shard(1, "a", StateWord::Active), shard(1, "b", StateWord::Active));
    let id = s.id;
    let own = [
        kv(&node_key(&n.id), encode(&n)),
        kv(&volume_key(&v.id), encode(&v)),
        kv(&shard_key(id), encode(&s)),
    ];
    own.iter().for_each(|kv| state.put(kv));
    let mut other = v.clone();
    other.primary = None;
    for (key, value) in [
        ("shardfs/nodes/node-2", encode(&node("node-1"))),
        ("shardfs/volumes/zzz", encode(&other)),
        ("shardfs/shards/0000000002", encode(&stray)),
        // The same number, written otherwise.
        ("shardfs/shards/1", encode(&stray)),
    ] {
        state.put(&kv(key, value));
        state.delete(&Bytes::copy_from_slice(key.as_bytes()));
        assert_eq!(state.nodes.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["node-1"], "{key}");
        assert_eq!(*state.nodes[&n.id].record, n, "{key}");
        assert_eq!(state.volumes.len(), 1, "{key}");
        assert_eq!(*state.volumes[&v.id].record, v, "{key}");
        assert_eq!(state.shards.len(), 1, "{key}");
        assert_eq!(*state.shards[&id].record, s, "{key}");
        assert_eq!(state.shard_counts[&v.id], 1, "{key}");
        assert_eq!(state.names[&s.owner].len(), 1, "{key}");
    }
    // Its own key's deletion takes it away.
    state.delete(&Bytes::from(volume_key(&v.id)));
    assert!(state.volumes.is_empty());
}
