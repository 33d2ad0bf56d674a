//! Elections against a real embedded store, with real heartbeats.

use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::clock;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::cluster::bootstrap::{self, VolumeSpec};
use crate::cluster::embedded::EmbeddedStore;
use crate::cluster::embedded_server::{Handle, serve};
use crate::cluster::heartbeat::{self, Heart};
use crate::cluster::lease::{self, Lease};
use crate::cluster::records::{DeathRecord, FORMAT};
use crate::net::ListenAddr;

pub(in crate::cluster) const PATIENCE: Duration = Duration::from_secs(90);

pub(in crate::cluster) struct World {
    dir: tempfile::TempDir,
    server: Handle,
}

pub(in crate::cluster) struct Member {
    pub(in crate::cluster) store: Arc<dyn MetaStore>,
    pub(in crate::cluster) view: Arc<View>,
    pub(in crate::cluster) record: NodeRecord,
    pub(in crate::cluster) lease: Arc<Lease>,
    heart: tokio::task::JoinHandle<()>,
    replaced: CancellationToken,
    stop: CancellationToken,
}

fn node(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

impl World {
    pub(in crate::cluster) async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path().join("meta.redb"), ListenAddr::Unix(dir.path().join("meta.sock")))
            .await
            .unwrap();
        let world = World { dir, server };
        let store = world.store();
        bootstrap::ensure_cluster_id(&*store).await.unwrap();
        let spec = VolumeSpec {
            id: VolumeId::new("vol-1").unwrap(),
            provider: "dir".into(),
            source: world.dir.path().join("vol-1").to_str().unwrap().into(),
            size_bytes: 0,
            iops: 0,
            primary: node("a"),
            backups: vec![node("b"), node("c")],
            allow_unfenced: false,
        };
        bootstrap::ensure_volume(&*store, &spec).await.unwrap();
        world
    }

    fn store(&self) -> Arc<dyn MetaStore> {
        Arc::new(EmbeddedStore::new(&self.server.address().to_string()).unwrap())
    }

    pub(in crate::cluster) async fn member(&self, id: &str) -> Member {
        let store = self.store();
        let record = NodeRecord {
            v: FORMAT,
            id: node(id),
            endpoints: vec![format!("unix:/{id}")],
            http: String::new(),
            version: "1".into(),
            started: clock::now(),
            incarnation: bootstrap::random_id(),
            instance_id: String::new(),
            region: String::new(),
            cloud: false,
        };
        let (view, lease) = (View::new(), Arc::new(Lease::default()));
        let (stop, replaced) = (CancellationToken::new(), CancellationToken::new());
        let heart = tokio::spawn(async {});
        let mut member = Member { store, view, record, lease, heart, replaced, stop };
        member.beat().await;
        tokio::spawn(member.view.clone().run(member.store.clone(), member.stop.clone()));
        until("it holds its lease", || member.lease.is_held()).await;
        member
    }
}

impl Member {
    /// Its heart beats, again if it was stopped; it is the same process.
    pub(in crate::cluster) async fn beat(&mut self) {
        let heart = Heart {
            store: self.store.clone(),
            id: self.record.id.clone(),
            registered: heartbeat::register(&*self.store, &self.record).await.unwrap(),
            view: self.view.clone(),
            lease: self.lease.clone(),
            replaced: self.replaced.clone(),
        };
        self.heart = tokio::spawn(heart.run(self.stop.clone()));
    }

    /// It hangs: no heartbeats, nothing else of it ends.
    pub(in crate::cluster) fn hang(&self) {
        self.heart.abort();
    }

    fn volume(&self) -> Kept<VolumeRecord> {
        self.view.volume(&VolumeId::new("vol-1").unwrap()).unwrap()
    }

    async fn elect(&self) -> Outcome {
        elect(&*self.store, &self.view, &self.record, &self.volume()).await.unwrap()
    }

    async fn sees(&self, id: &str, what: &str, is: impl Fn(Health) -> bool) {
        until(&format!("{} sees {id} {what}", self.record.id), || is(self.view.health(&node(id)))).await;
    }
}

pub(in crate::cluster) async fn until(what: &str, is: impl Fn() -> bool) {
    let reached = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("not so in time: {what}"));
}

fn predecessors(record: &VolumeRecord) -> Vec<String> {
    record.predecessors.iter().map(|past| format!("{} {}", past.node, past.epoch)).collect()
}

fn won(outcome: Outcome) -> (Revision, Epoch) {
    match outcome {
        Outcome::Won(revision, epoch) => (revision, epoch),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_primary_loses_its_volume_only_after_its_lease() {
    let world = World::new().await;
    let (a, b) = (world.member("a").await, world.member("b").await);
    let (_, epoch) = won(a.elect().await);
    assert_eq!(epoch.get(), 2, "a process begins an epoch of its own");
    b.sees("a", "alive", |h| h == Health::Alive).await;
    assert_eq!(b.elect().await, Outcome::Overtaken, "from one that lives nothing is taken");
    // It hangs: no heartbeats, nothing else of it ends.
    a.hang();
    b.sees("a", "silent", |h| matches!(h, Health::Silent(_))).await;
    assert!(!a.lease.is_held(), "who is taken for silent has no lease");
    let (revision, epoch) = won(b.elect().await);
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    let record = b.volume().record;
    assert_eq!((record.primary.clone(), record.epoch), (Some(node("b")), epoch));
    assert_eq!(record.backups, [node("c"), node("a")]);
    assert_eq!(record.holder, b.record.incarnation);
    assert_eq!(predecessors(&record), ["a 2", "a 1"], "what a fence needs to know");
    assert!(!record.handed_over);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_was_not_seen_makes_an_election_fail() {
    let world = World::new().await;
    let (a, b) = (world.member("a").await, world.member("b").await);
    a.hang();
    b.sees("a", "silent", |h| matches!(h, Health::Silent(_))).await;
    // Its heart beats again, and b has not heard of it: its copy stands still.
    let known = b.volume();
    b.stop.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let beat = Txn::new().put(records::heartbeat_key(&node("a")), "1000000");
    a.store.txn(beat).await.unwrap();
    let outcome = elect(&*b.store, &b.view, &b.record, &known).await.unwrap();
    assert_eq!(outcome, Outcome::Overtaken);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loser_renews_its_lease_only_in_the_knowledge_of_its_loss() {
    let world = World::new().await;
    let (a, b) = (world.member("a").await, world.member("b").await);
    // What an election writes, while the heart of the loser beats.
    let taken = VolumeRecord {
        primary: Some(node("b")),
        backups: vec![node("a")],
        epoch: Epoch::new(9).unwrap(),
        ..(*b.volume().record).clone()
    };
    let txn = Txn::new()
        .put(records::volume_key(&taken.id), records::encode(&taken))
        .put(records::deposition_key(&node("a")), "vol-1 9");
    let before = a.lease.counter();
    b.store.txn(txn).await.unwrap();
    until("it beats on", || a.lease.counter() > before + 2).await;
    assert_eq!(a.volume().record.primary, Some(node("b")));
    assert!(a.lease.is_held() && !a.replaced.is_cancelled());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_that_was_seen_ends_a_lease_at_once() {
    // A machine that stands still meanwhile may take longer than a lease for anything.
    const ATTEMPTS: u32 = 5;
    let mut attempt = 0;
    let (world, a, b, record) = loop {
        let world = World::new().await;
        let (a, b) = (world.member("a").await, world.member("b").await);
        b.sees("a", "alive", |h| h == Health::Alive).await;
        a.hang();
        let killed = clock::monotonic();
        let incarnation = a.record.incarnation.clone();
        let record = DeathRecord { v: FORMAT, incarnation, how: "killed".into() };
        a.store.txn(Txn::new().put(records::death_key(&node("a")), records::encode(&record))).await.unwrap();
        b.sees("a", "dead", |h| matches!(h, Health::Dead(_))).await;
        attempt += 1;
        match killed.elapsed() {
            took if took < lease::TERM => break (world, a, b, record),
            took => assert!(attempt < ATTEMPTS, "{took:?}"),
        }
    };
    assert!(!b.view.node_infos().iter().any(|n| n.id == node("a") && n.alive));
    won(b.elect().await);
    // A death of an earlier process says nothing about this one.
    let again = world.member("a").await;
    b.sees("a", "alive", |h| h == Health::Alive).await;
    let late = DeathRecord { incarnation: a.record.incarnation.clone(), ..record };
    let late = Txn::new().put(records::death_key(&node("a")), records::encode(&late));
    let revision = again.store.txn(late).await.unwrap().revision;
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    b.sees("a", "alive", |h| {
        assert!(!matches!(h, Health::Dead(_)), "{h:?}");
        h == Health::Alive
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_given_to_those_who_stand_by() {
    let world = World::new().await;
    let (a, b) = (world.member("a").await, world.member("b").await);
    let (revision, _) = won(a.elect().await);
    a.view.wait_for(revision, PATIENCE).await.unwrap();
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    let give = |to: &'static str| {
        let (store, view, volume) = (a.store.clone(), a.view.clone(), a.volume());
        async move { hand_over(&*store, &view, &node("a"), &volume, &node(to), true).await.unwrap() }
    };
    assert_eq!(give("c").await, Outcome::Overtaken, "c never registered");
    assert_eq!(give("z").await, Outcome::Overtaken);
    let (revision, epoch) = won(give("b").await);
    assert_eq!(epoch.get(), 3);
    assert_eq!(give("b").await, Outcome::Overtaken, "what was known is old");
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    let record = b.volume().record;
    assert_eq!(record.holder, b.record.incarnation);
    assert_eq!(predecessors(&record), ["a 2", "a 1"]);
    assert!(record.handed_over && record.unmounted, "nothing of a is under way");
    // A later process of b begins an epoch of its own: nobody handed that over.
    let (revision, _) = won(b.elect().await);
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    assert_eq!(predecessors(&b.volume().record), ["b 3", "a 2", "a 1"]);
    let record = b.volume().record;
    assert!(!record.handed_over && !record.unmounted);
    // What b has never mounted it gives away too; but those before it may not have ended.
    let given = hand_over(&*b.store, &b.view, &node("b"), &b.volume(), &node("a"), false).await.unwrap();
    let (revision, _) = won(given);
    a.view.wait_for(revision, PATIENCE).await.unwrap();
    let record = a.volume().record;
    assert!(record.handed_over && !record.unmounted);
    let back = hand_over(&*a.store, &a.view, &node("a"), &a.volume(), &node("b"), true).await.unwrap();
    b.view.wait_for(won(back).0, PATIENCE).await.unwrap();

    let volume = VolumeId::new("vol-1").unwrap();
    let target = async |to: &str| set_target(&*b.store, &b.view, &volume, Some(&node(to))).await;
    assert!(target("z").await.unwrap_err().message().contains("does not stand by"));
    assert!(target("c").await.unwrap_err().message().contains("not alive"));
    b.sees("a", "alive", |h| h == Health::Alive).await;
    let revision = target("a").await.unwrap();
    b.view.wait_for(revision, PATIENCE).await.unwrap();
    assert_eq!(b.volume().record.target, Some(node("a")));
}
