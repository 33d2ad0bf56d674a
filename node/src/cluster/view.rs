//! A watched copy of the cluster's records in memory, so that no file operation calls the metadata store.
//!
//! Invariants: the copy is that of one revision (`revision()`), which never goes back; it is replaced as a
//! whole after a gap in the watch. A record that cannot be read is logged and left out; it
//! hides no other. Silence of a node is counted only while the watch itself was heard.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::RwLock;
use shardfs_proto::types::cluster::{NodeInfo, ShardInfo, VolumeInfo};
use shardfs_proto::types::error::Location;
use shardfs_proto::types::{ClientId, Epoch, Error, NodeId, Result, ShardId, ShardName, VolumeId, clock};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::records::{
    self, CLUSTER_KEY, ClusterRecord, HEARTBEATS, NODES, NodeRecord, PREFIX, SHARDS, ShardRecord, StateWord,
    VOLUMES, VolumeRecord,
};
use super::store::{Event, KeyRange, KeyValue, MetaStore, Revision, StoreError, get, range_all};

/// Silence after which a node counts as not alive.
pub const SILENCE_MAX: Duration = Duration::from_secs(3);
/// A pause of the watch that is longer is our own trouble, not the nodes' silence. The store sends
/// something every second.
const WATCH_PAUSE_MAX: Duration = Duration::from_millis(1500);
/// Pause before the copy is made anew.
const RESYNC_PAUSE: Duration = Duration::from_millis(200);

/// The copy. Shared.
pub struct View {
    state: RwLock<State>,
    revision: watch::Sender<Revision>,
}

/// A record and the revision that changed it last.
#[derive(Clone, Debug)]
pub struct Kept<T> {
    /// The record.
    pub record: Arc<T>,
    /// What a compare-and-set names.
    pub modified: Revision,
}

struct Beat {
    counter: u64,
    seen: Instant,
}

#[derive(Default)]
struct State {
    cluster_id: String,
    nodes: BTreeMap<NodeId, Kept<NodeRecord>>,
    beats: HashMap<NodeId, Beat>,
    volumes: BTreeMap<VolumeId, Kept<VolumeRecord>>,
    shards: BTreeMap<ShardId, Kept<ShardRecord>>,
    /// Shards that are not deleted.
    names: HashMap<ClientId, BTreeMap<ShardName, ShardId>>,
    /// Shards that are not deleted.
    shard_counts: HashMap<VolumeId, u32>,
    heard: Option<Instant>,
}

impl View {
    /// Empty, at revision 0.
    pub fn new() -> Arc<View> {
        Arc::new(View { state: RwLock::default(), revision: watch::Sender::new(Revision::default()) })
    }

    /// Keeps the copy up to date until `stop`.
    pub async fn run(self: Arc<Self>, store: Arc<dyn MetaStore>, stop: CancellationToken) {
        loop {
            let ended = tokio::select! {
                _ = stop.cancelled() => return,
                ended = self.follow(&*store) => ended,
            };
            match ended {
                StoreError::Compacted => {
                    tracing::info!("the metadata store no longer has what was missed: reading all anew")
                }
                error => tracing::warn!(%error, "following the metadata store: once more"),
            }
            tokio::select! {
                _ = stop.cancelled() => return,
                _ = tokio::time::sleep(RESYNC_PAUSE) => {}
            }
        }
    }

    /// Reads everything, then follows; answers why it could not go on.
    async fn follow(&self, store: &dyn MetaStore) -> StoreError {
        let everything = KeyRange::prefix(PREFIX);
        let whole = match range_all(store, everything.clone()).await {
            Ok(whole) => whole,
            Err(error) => return error,
        };
        // Pages may be of several revisions; the copy is shown when the watch has passed the last.
        let mut fresh = Some(State::default());
        if let Some(state) = &mut fresh {
            for kv in &whole.kvs {
                state.put(kv);
            }
        }
        if whole.first == whole.last
            && let Some(state) = fresh.take()
        {
            self.replace(state, whole.last);
        }
        let mut batches = store.watch(everything, whole.first.next());
        loop {
            let batch = match batches.next().await {
                Some(Ok(batch)) => batch,
                Some(Err(error)) => return error,
                None => return StoreError::Unavailable("the watch ended".into()),
            };
            match &mut fresh {
                Some(state) => {
                    batch.events.iter().for_each(|event| state.apply(event));
                    if batch.revision >= whole.last
                        && let Some(state) = fresh.take()
                    {
                        self.replace(state, batch.revision);
                    }
                }
                None => {
                    let mut state = self.state.write();
                    state.hear();
                    batch.events.iter().for_each(|event| state.apply(event));
                    drop(state);
                    self.advance(batch.revision);
                }
            }
        }
    }

    fn replace(&self, mut fresh: State, revision: Revision) {
        let mut state = self.state.write();
        let now = clock::monotonic();
        for (node, beat) in &mut fresh.beats {
            // A counter that stood still while nobody listened says nothing: its time begins anew. One that
            // stood still while it was heard keeps its silence.
            if let Some(old) = state.beats.get(node)
                && old.counter == beat.counter
                && let Some(heard) = state.heard
            {
                let silence = heard.saturating_duration_since(old.seen);
                beat.seen = now.checked_sub(silence).unwrap_or(now);
            }
        }
        fresh.heard = Some(now);
        *state = fresh;
        drop(state);
        self.advance(revision);
    }

    fn advance(&self, revision: Revision) {
        self.revision.send_if_modified(|current| {
            let later = revision > *current;
            if later {
                *current = revision;
            }
            later
        });
    }

    /// The revision that the copy is of.
    pub fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    /// Tells of every change of the copy.
    pub fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// Waits until the copy shows a revision.
    pub async fn wait_for(&self, revision: Revision, at_most: Duration) -> Result<()> {
        let mut changes = self.revision.subscribe();
        match tokio::time::timeout(at_most, changes.wait_for(|r| *r >= revision)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::unavailable(
                "this node's copy of the cluster's records is behind the metadata store: try again in a moment",
            )),
        }
    }

    /// Waits until the copy shows everything that the store had when this was called.
    pub async fn catch_up(&self, store: &dyn MetaStore, at_most: Duration) -> Result<()> {
        let begun = clock::monotonic();
        let read = tokio::time::timeout(at_most, get(store, CLUSTER_KEY)).await;
        let (revision, _) = read.map_err(|_| Error::unavailable("the metadata store does not answer"))??;
        self.wait_for(revision, at_most.saturating_sub(begun.elapsed())).await
    }

    /// The cluster's id; empty before it is known.
    pub fn cluster_id(&self) -> String {
        self.state.read().cluster_id.clone()
    }

    /// A shard's record, by id.
    pub fn shard(&self, id: ShardId) -> Option<Kept<ShardRecord>> {
        self.state.read().shards.get(&id).cloned()
    }

    /// A shard's record, by its owner and name.
    pub fn shard_by_name(&self, owner: &ClientId, name: &ShardName) -> Option<Kept<ShardRecord>> {
        let state = self.state.read();
        let id = state.names.get(owner)?.get(name)?;
        state.shards.get(id).cloned()
    }

    /// The records that `keep` chooses, in order of id.
    pub fn shards(&self, keep: impl Fn(&ShardRecord) -> bool) -> Vec<Kept<ShardRecord>> {
        self.state.read().shards.values().filter(|kept| keep(&kept.record)).cloned().collect()
    }

    /// A volume's record.
    pub fn volume(&self, id: &VolumeId) -> Option<Kept<VolumeRecord>> {
        self.state.read().volumes.get(id).cloned()
    }

    /// The records of all volumes, in order of id.
    pub fn volumes(&self) -> Vec<Kept<VolumeRecord>> {
        self.state.read().volumes.values().cloned().collect()
    }

    /// Shards of a volume that are not deleted.
    pub fn shard_count(&self, volume: &VolumeId) -> u32 {
        self.state.read().shard_counts.get(volume).copied().unwrap_or(0)
    }

    /// Where a volume is served.
    pub fn location(&self, volume: &VolumeId) -> Location {
        let state = self.state.read();
        let record = state.volumes.get(volume).map(|kept| &kept.record);
        let node = record.and_then(|r| r.primary.clone());
        let endpoints = node.as_ref().and_then(|n| state.nodes.get(n)).map(|n| n.record.endpoints.clone());
        Location {
            volume: volume.clone(),
            endpoints: endpoints.unwrap_or_default(),
            epoch: record.map_or(Epoch::FIRST, |r| r.epoch),
            node,
        }
    }

    /// A record as people see it, without usage.
    pub fn shard_info(&self, record: &ShardRecord) -> ShardInfo {
        ShardInfo {
            id: record.id,
            name: record.name.clone(),
            owner: record.owner.clone(),
            state: record.state.into(),
            limit_bytes: record.limit_bytes,
            created: record.created,
            location: self.location(&record.volume),
            used_bytes: None,
            inodes: None,
        }
    }

    /// All nodes, in order of id.
    pub fn node_infos(&self) -> Vec<NodeInfo> {
        let state = self.state.read();
        let info = |kept: &Kept<NodeRecord>| {
            let record = &kept.record;
            let beat = state.beats.get(&record.id);
            NodeInfo {
                id: record.id.clone(),
                endpoints: record.endpoints.clone(),
                http_address: record.http.clone(),
                version: record.version.clone(),
                alive: beat.is_some_and(|beat| state.silence(beat) < SILENCE_MAX),
                heartbeat: beat.map_or(0, |beat| beat.counter),
                started: record.started,
            }
        };
        state.nodes.values().map(info).collect()
    }

    /// All volumes, in order of id.
    pub fn volume_infos(&self) -> Vec<VolumeInfo> {
        let state = self.state.read();
        let info = |kept: &Kept<VolumeRecord>| {
            let record = &kept.record;
            VolumeInfo {
                id: record.id.clone(),
                provider: record.provider.clone(),
                source: record.source.clone(),
                size_bytes: record.size_bytes,
                primary: record.primary.clone(),
                backups: record.backups.clone(),
                epoch: record.epoch,
                shards: state.shard_counts.get(&record.id).copied().unwrap_or(0),
            }
        };
        state.volumes.values().map(info).collect()
    }
}

impl State {
    /// Something arrived. What we did not hear does not count as the nodes' silence.
    fn hear(&mut self) {
        let now = clock::monotonic();
        if let Some(heard) = self.heard.replace(now) {
            let pause = now.saturating_duration_since(heard);
            if pause > WATCH_PAUSE_MAX {
                self.beats.values_mut().for_each(|beat| beat.seen += pause);
            }
        }
    }

    /// How long a counter has stood still while it was listened to.
    fn silence(&self, beat: &Beat) -> Duration {
        self.heard.unwrap_or(beat.seen).saturating_duration_since(beat.seen)
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Put(kv) => self.put(kv),
            Event::Delete(key) => self.delete(key),
        }
    }

    fn put(&mut self, kv: &KeyValue) {
        if let Err(error) = self.try_put(kv) {
            tracing::error!(%error, "a record of the metadata store is left out");
            self.delete(&kv.key);
        }
    }

    fn try_put(&mut self, kv: &KeyValue) -> Result<()> {
        let Ok(key) = std::str::from_utf8(&kv.key) else { return Ok(()) };
        if key == CLUSTER_KEY {
            self.cluster_id = records::decode::<ClusterRecord>(&kv.key, &kv.value)?.id;
        } else if let Some(id) = key.strip_prefix(HEARTBEATS) {
            let counter = records::decode_number(&kv.key, &kv.value)?;
            self.beats.insert(NodeId::new(id)?, Beat { counter, seen: clock::monotonic() });
        } else if key.starts_with(NODES) {
            let record: NodeRecord = records::decode(&kv.key, &kv.value)?;
            self.nodes.insert(record.id.clone(), keep(record, kv));
        } else if key.starts_with(VOLUMES) {
            let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
            self.volumes.insert(record.id.clone(), keep(record, kv));
        } else if key.starts_with(SHARDS) {
            let record: ShardRecord = records::decode(&kv.key, &kv.value)?;
            self.forget_shard(record.id);
            if record.state != StateWord::Deleted {
                self.names.entry(record.owner.clone()).or_default().insert(record.name.clone(), record.id);
                *self.shard_counts.entry(record.volume.clone()).or_default() += 1;
            }
            self.shards.insert(record.id, keep(record, kv));
        }
        // Names, requests and the id counter are read where they are changed, in the store itself.
        Ok(())
    }

    fn delete(&mut self, key: &Bytes) {
        let Ok(key) = std::str::from_utf8(key) else { return };
        if let Some(id) = key.strip_prefix(HEARTBEATS) {
            self.beats.retain(|node, _| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(NODES) {
            self.nodes.retain(|node, _| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(VOLUMES) {
            self.volumes.retain(|volume, _| volume.as_str() != id);
        } else if let Some(id) = key.strip_prefix(SHARDS).and_then(|id| id.parse().ok())
            && let Ok(id) = ShardId::new(id)
        {
            self.forget_shard(id);
        }
    }

    fn forget_shard(&mut self, id: ShardId) {
        let Some(old) = self.shards.remove(&id) else { return };
        if old.record.state == StateWord::Deleted {
            return;
        }
        if let Some(count) = self.shard_counts.get_mut(&old.record.volume) {
            *count -= 1;
        }
        if let Some(names) = self.names.get_mut(&old.record.owner) {
            // A rename in the same revision may have given the name to another shard already.
            if names.get(&old.record.name) == Some(&id) {
                names.remove(&old.record.name);
            }
            if names.is_empty() {
                self.names.remove(&old.record.owner);
            }
        }
    }
}

fn keep<T>(record: T, kv: &KeyValue) -> Kept<T> {
    Kept { record: Arc::new(record), modified: kv.modified }
}

#[cfg(test)]
mod tests;
