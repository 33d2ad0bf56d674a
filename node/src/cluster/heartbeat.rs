//! How a node shows that it lives: its record, and a counter that grows every 250 ms.
//!
//! The counter says nothing about time; observers (see `view`) time its silence by their own clock. A node
//! whose record was replaced by another process under the same id stops: two processes must not act as one node.
//!
//! Invariant: a heartbeat renews the lease only if it was made in the knowledge of every volume that was taken from the
//! node: each names the node's count of depositions, and one that grew is taken up only when this node's copy of the records
//! shows the change that it came with.

use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::{Error, NodeId, Result, clock};
use tokio_util::sync::CancellationToken;

use super::lease::Lease;
use super::records::{self, NodeRecord};
use super::store::{Demand, MetaStore, Revision, StoreError, Txn, TxnAnswer, get};
use super::view::View;

/// How often the counter grows.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// How long one heartbeat is waited for; the next one carries a greater number anyway.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often registering is tried.
const REGISTER_ATTEMPTS_MAX: usize = 8;

/// What a process may say in the node's name.
#[derive(Clone, Debug)]
pub struct Registered {
    /// The revision of its record.
    pub revision: Revision,
    counter: u64,
}

/// Writes the node's record and its first heartbeat, and takes the record of an earlier process's death away. From then
/// on this process is the node.
pub async fn register(store: &dyn MetaStore, record: &NodeRecord) -> Result<Registered> {
    let (node_key, beat_key) = (records::node_key(&record.id), records::heartbeat_key(&record.id));
    let value = records::encode(record);
    for _ in 0..REGISTER_ATTEMPTS_MAX {
        if let (_, Some(kv)) = get(store, node_key.clone()).await?
            && kv.value == value
        {
            let counter = read_counter(store, &beat_key).await?;
            return Ok(Registered { revision: kv.modified, counter });
        }
        let counter = read_counter(store, &beat_key).await? + 1;
        let txn = Txn::new()
            .put(node_key.clone(), value.clone())
            .put(beat_key.clone(), counter.to_string())
            .delete(records::death_key(&record.id));
        match store.txn(txn).await {
            Ok(answer) => return Ok(Registered { revision: answer.revision, counter }),
            // The next round reads whether it is there.
            Err(StoreError::OutcomeUnknown(why)) => tracing::warn!(why, "registering the node: once more"),
            Err(error) => return Err(Error::from(error).context("registering the node")),
        }
    }
    Err(Error::unavailable("registering the node: the metadata store keeps not answering"))
}

async fn read_counter(store: &dyn MetaStore, key: &str) -> Result<u64> {
    match get(store, key.to_owned()).await?.1 {
        Some(kv) => records::decode_number(key.as_bytes(), &kv.value),
        None => Ok(0),
    }
}

/// Beats; see [`Heart::run`].
pub struct Heart {
    /// Where.
    pub store: Arc<dyn MetaStore>,
    /// For whom.
    pub id: NodeId,
    /// What [`register`] answered.
    pub registered: Registered,
    /// The copy of the records, which somebody runs.
    pub view: Arc<View>,
    /// What is renewed.
    pub lease: Arc<Lease>,
    /// Cancelled if another process registered under the same id.
    pub replaced: CancellationToken,
}

impl Heart {
    /// Beats until `stop`; then takes the heartbeat away, so that everybody knows at once.
    pub async fn run(self, stop: CancellationToken) {
        let (node_key, beat_key) = (records::node_key(&self.id), records::heartbeat_key(&self.id));
        let deposition_key = records::deposition_key(&self.id);
        let mut counter = self.registered.counter;
        let mut depositions = Demand::Absent;
        let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self.lease.note_round();
            counter += 1;
            let txn = Txn::new()
                .when(node_key.clone(), Demand::Modified(self.registered.revision))
                .when(deposition_key.clone(), depositions.clone())
                .put(beat_key.clone(), counter.to_string())
                .or_read(node_key.clone())
                .or_read(deposition_key.clone());
            // The term begins here, whenever the answer comes.
            let begun = clock::boot();
            let outcome = tokio::select! {
                _ = stop.cancelled() => break,
                outcome = tokio::time::timeout(HEARTBEAT_TIMEOUT, self.store.txn(txn)) => outcome,
            };
            match outcome {
                Ok(Ok(answer)) if answer.succeeded => {
                    if !self.lease.succeeded() {
                        tracing::info!("the metadata store takes heartbeats");
                    }
                    self.lease.note_beat(answer.revision, begun);
                    self.lease.renew(begun, counter);
                }
                Ok(Ok(answer)) => {
                    if !self.is_registered(&answer) {
                        tracing::error!(node = %self.id, "another process registered as this node: stopping");
                        self.replaced.cancel();
                        return;
                    }
                    if let Some(seen) = self.take_up(answer).await {
                        depositions = seen;
                        ticks.reset_immediately();
                    }
                }
                Ok(Err(error)) => {
                    if self.lease.missed() {
                        tracing::warn!(%error, "heartbeat failed");
                    }
                }
                Err(_) => {
                    if self.lease.missed() {
                        tracing::warn!("heartbeat failed: no answer within {HEARTBEAT_TIMEOUT:?}");
                    }
                }
            }
        }
        let txn = Txn::new().when(node_key, Demand::Modified(self.registered.revision)).delete(beat_key);
        // If it does not arrive, silence tells the same a little later.
        let _ = tokio::time::timeout(HEARTBEAT_TIMEOUT, self.store.txn(txn)).await;
    }

    fn is_registered(&self, refused: &TxnAnswer) -> bool {
        let record = refused.results.first().and_then(|found| found.first());
        record.is_some_and(|kv| kv.modified == self.registered.revision)
    }

    /// What the next heartbeat demands of the depositions, once the copy of the records shows what was lost.
    async fn take_up(&self, refused: TxnAnswer) -> Option<Demand> {
        let seen = match refused.results.get(1).and_then(|found| found.first()) {
            Some(kv) => Demand::Modified(kv.modified),
            None => Demand::Absent,
        };
        // Without it the lease stays as it is, and the next heartbeat is refused as well.
        self.view.wait_for(refused.revision, HEARTBEAT_TIMEOUT).await.ok()?;
        Some(seen)
    }
}
