//! Transactions whose outcome is not known, and those that come after the volume has moved.

use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::*;
use crate::cluster::records::VolumeRecord;
use crate::cluster::store::{
    LeaseId, Op, RangeAnswer, Revision, StoreError, StoreResult, TxnAnswer, WatchStream,
};

/// What becomes of the next transaction that puts a certain text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It is not made yet, and its caller hears that nobody knows.
    Lost,
    /// It is made, and its caller hears that nobody knows.
    Unheard,
    /// It is made when the test says so, and its caller waits.
    Delayed,
}

/// A store whose answers get lost when the test wants it.
struct LateStore {
    inner: EmbeddedStore,
    next: Mutex<Option<(&'static str, Fate)>>,
    lost: Mutex<Option<Txn>>,
    caught: Semaphore,
    may_go: Semaphore,
}

impl LateStore {
    fn new(bench: &Bench) -> Arc<LateStore> {
        Arc::new(LateStore {
            inner: bench.store(),
            next: Mutex::default(),
            lost: Mutex::default(),
            caught: Semaphore::new(0),
            may_go: Semaphore::new(0),
        })
    }

    fn arm(&self, text: &'static str, fate: Fate) {
        *self.next.lock() = Some((text, fate));
    }

    /// The transaction was met.
    async fn caught(&self) {
        tokio::time::timeout(PATIENCE, self.caught.acquire()).await.expect("it came").unwrap().forget();
    }

    fn fate(&self, txn: &Txn) -> Option<Fate> {
        let puts = |text: &str| {
            txn.success.iter().any(|op| match op {
                Op::Put { value, .. } => String::from_utf8_lossy(value).contains(text),
                Op::Delete(_) | Op::Range(_) => false,
            })
        };
        let mut next = self.next.lock();
        let fate = next.filter(|(text, _)| puts(text)).map(|(_, fate)| fate);
        if fate.is_some() {
            *next = None;
        }
        fate
    }
}

impl MetaStore for LateStore {
    fn range(&self, range: KeyRange, limit: usize) -> BoxFuture<'_, StoreResult<RangeAnswer>> {
        self.inner.range(range, limit)
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, StoreResult<TxnAnswer>> {
        let Some(fate) = self.fate(&txn) else { return self.inner.txn(txn) };
        self.caught.add_permits(1);
        Box::pin(async move {
            match fate {
                Fate::Lost => *self.lost.lock() = Some(txn),
                Fate::Unheard => drop(self.inner.txn(txn).await),
                Fate::Delayed => {
                    self.may_go.acquire().await.expect("nobody closes it").forget();
                    return self.inner.txn(txn).await;
                }
            }
            Err(StoreError::OutcomeUnknown("its answer was lost, in a test".into()))
        })
    }

    fn watch(&self, range: KeyRange, from: Revision) -> WatchStream {
        self.inner.watch(range, from)
    }

    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, StoreResult<LeaseId>> {
        self.inner.lease_grant(ttl)
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        self.inner.lease_keep_alive(lease)
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        self.inner.lease_revoke(lease)
    }

    fn reachable(&self) -> bool {
        self.inner.reachable()
    }
}

fn vol() -> VolumeId {
    VolumeId::new("vol-1").unwrap()
}

fn node_id(id: &str) -> NodeId {
    NodeId::new(id).unwrap()
}

/// Two nodes, the first of which serves the volume through a store whose answers can get lost; the second stands by.
async fn two_nodes(bench: &Bench) -> (Arc<LateStore>, TestNode, TestNode) {
    let store = LateStore::new(bench);
    let one = bench.node_on("node-1", store.clone()).await;
    let two = bench.node("node-2").await;
    eventually("node-1 serves", async || one.catalog.serving.get(&vol()).is_some()).await;
    eventually("node-2 stands by", async || two.catalog.serving.stands_by(&vol())).await;
    eventually("the volume is in use", async || record(&one).formatted).await;
    (store, one, two)
}

fn record(node: &TestNode) -> Arc<VolumeRecord> {
    node.catalog.parts.view.volume(&vol()).unwrap().record
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_perhaps_given_away_is_not_served_under_its_epoch() {
    for fate in [Fate::Lost, Fate::Unheard] {
        let bench = Bench::with_backups("vol-1", "node-1", &["node-2"]).await;
        let (store, one, two) = two_nodes(&bench).await;
        let info = one.catalog.new_shard(&me(), new("s")).await.unwrap();
        let shard = one.catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
        put(&shard, "k").await.unwrap();
        drop(shard);
        let before = record(&one).epoch;

        store.arm(r#""handed_over":true"#, fate);
        let moved = one.catalog.promote(&vol(), &node_id("node-2"), PATIENCE).await.unwrap();
        assert_eq!(moved.epoch, before.next(), "{fate:?}: one of the two hand-overs came true");
        eventually("node-2 serves", async || two.catalog.serving.get(&vol()).is_some()).await;
        // The one whose answer was lost came after an unmount; the one after it said that it cannot know.
        assert_eq!(
            record(&two).unmounted,
            fate == Fate::Unheard,
            "{fate:?}: it was mounted again in between"
        );
        let lost = store.lost.lock().take();
        if let Some(late) = lost {
            assert!(!store.inner.txn(late).await.unwrap().succeeded, "it came true after all");
        }
        let shard = two.catalog.open_shard(&me(), &by_id(info.id), None).await.unwrap();
        put(&shard, "l").await.unwrap();
        drop(shard);
        one.end().await;
        two.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_found_empty_is_not_deleted_after_the_volume_has_moved() {
    let bench = Bench::with_backups("vol-1", "node-1", &["node-2"]).await;
    let (store, one, two) = two_nodes(&bench).await;
    let info = one.catalog.new_shard(&me(), new("s")).await.unwrap();
    let id = info.id;

    // node-1 finds the shard empty, and takes its time to say so.
    store.arm(r#""state":"deleted""#, Fate::Delayed);
    let catalog = one.catalog.clone();
    let deleting = tokio::spawn(async move { catalog.delete_shard(&me(), &by_id(id), true).await });
    store.caught().await;
    one.catalog.promote(&vol(), &node_id("node-2"), PATIENCE).await.unwrap();
    eventually("node-2 serves", async || two.catalog.serving.get(&vol()).is_some()).await;
    let shard = two.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
    put(&shard, "acknowledged").await.unwrap();
    drop(shard);

    store.may_go.add_permits(1);
    let refused = deleting.await.unwrap();
    assert_eq!(reason(refused), Reason::Unavailable, "the shard is not empty any more");
    let there = two.catalog.get_shard(&me(), &by_id(id)).await.unwrap();
    assert_eq!(there.state, ShardState::Active);
    one.end().await;
    two.end().await;
}
