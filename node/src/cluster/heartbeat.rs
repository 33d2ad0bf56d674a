//! How a node shows that it lives: its record, and a counter that grows every 250 ms.
//!
//! The counter says nothing about time; observers (see `view`) time its silence by their own clock. A node
//! whose record was replaced by another process under the same id stops: two processes must not act as one node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardfs_proto::types::{Error, NodeId, Result};
use tokio_util::sync::CancellationToken;

use super::records::{self, NodeRecord};
use super::store::{Demand, MetaStore, Revision, StoreError, Txn, get};

/// How often the counter grows.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// How long one heartbeat is waited for; the next one carries a greater number anyway.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often registering is tried.
const REGISTER_ATTEMPTS_MAX: usize = 8;

/// What the heartbeat task knows.
#[derive(Default)]
pub struct Pulse {
    counter: AtomicU64,
    succeeded: AtomicBool,
}

impl Pulse {
    /// The counter's last value.
    pub fn counter(&self) -> u64 {
        self.counter.load(Ordering::Relaxed)
    }

    /// Whether the last heartbeat reached the store.
    pub fn succeeded(&self) -> bool {
        self.succeeded.load(Ordering::Relaxed)
    }
}

/// Writes the node's record and its first heartbeat. From then on this process is the node. Answers the
/// revision of the record and the counter.
pub async fn register(store: &dyn MetaStore, record: &NodeRecord) -> Result<(Revision, u64)> {
    let (node_key, beat_key) = (records::node_key(&record.id), records::heartbeat_key(&record.id));
    let value = records::encode(record);
    for _ in 0..REGISTER_ATTEMPTS_MAX {
        if let (_, Some(kv)) = get(store, node_key.clone()).await?
            && kv.value == value
        {
            let counter = read_counter(store, &beat_key).await?;
            return Ok((kv.modified, counter));
        }
        let counter = read_counter(store, &beat_key).await? + 1;
        let txn = Txn::new().put(node_key.clone(), value.clone()).put(beat_key.clone(), counter.to_string());
        match store.txn(txn).await {
            Ok(answer) => return Ok((answer.revision, counter)),
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

/// Beats until `stop`; then takes the heartbeat away, so that everybody knows at once. If another process
/// registered under the same id, `replaced` is cancelled.
pub async fn run(
    store: Arc<dyn MetaStore>,
    id: NodeId,
    registered: (Revision, u64),
    pulse: Arc<Pulse>,
    replaced: CancellationToken,
    stop: CancellationToken,
) {
    let (revision, mut counter) = registered;
    let (node_key, beat_key) = (records::node_key(&id), records::heartbeat_key(&id));
    pulse.counter.store(counter, Ordering::Relaxed);
    pulse.succeeded.store(true, Ordering::Relaxed);
    let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        counter += 1;
        let txn = Txn::new()
            .when(node_key.clone(), Demand::Modified(revision))
            .put(beat_key.clone(), counter.to_string())
            .or_read(node_key.clone());
        let outcome = tokio::select! {
            _ = stop.cancelled() => break,
            outcome = tokio::time::timeout(HEARTBEAT_TIMEOUT, store.txn(txn)) => outcome,
        };
        let succeeded = matches!(outcome, Ok(Ok(_)));
        if succeeded != pulse.succeeded.swap(succeeded, Ordering::Relaxed) {
            match &outcome {
                Ok(Ok(_)) => tracing::info!("the metadata store answers again"),
                Ok(Err(error)) => tracing::warn!(%error, "heartbeat failed"),
                Err(_) => tracing::warn!("heartbeat failed: no answer within {HEARTBEAT_TIMEOUT:?}"),
            }
        }
        match outcome {
            Ok(Ok(answer)) if answer.succeeded => pulse.counter.store(counter, Ordering::Relaxed),
            Ok(Ok(_)) => {
                tracing::error!(node = %id, "another process registered as this node: stopping");
                replaced.cancel();
                return;
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
    let txn = Txn::new().when(node_key, Demand::Modified(revision)).delete(beat_key);
    // If it does not arrive, silence tells the same a little later.
    let _ = tokio::time::timeout(HEARTBEAT_TIMEOUT, store.txn(txn)).await;
}
