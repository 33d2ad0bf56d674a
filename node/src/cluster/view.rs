//! A watched copy of the cluster's records in memory, so that no file operation calls the metadata store.
//!
//! Invariants: the copy is that of one revision (`revision()`), which never goes back; it is replaced as a
//! whole after a gap in the watch. A record that cannot be read, or lies under a key that is not its own, is logged
//! and left out; it hides no other. Silence of a node is counted only while the watch itself was heard (see `lease`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::RwLock;
use shardfs_proto::types::clock::{self, BootTime};
use shardfs_proto::types::cluster::{NodeInfo, ShardInfo, VolumeInfo};
use shardfs_proto::types::{ClientId, Epoch, Error, NodeId, Result, ShardId, ShardName, VolumeId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::lease;
use super::plan::Health;
use super::records::{
    self, CLUSTER_KEY, ClusterRecord, DEATHS, DRAINS, DeathRecord, HEARTBEATS, NODES, NodeRecord, PREFIX,
    SHARDS, STOPPING, ShardRecord, StateWord, VOLUMES, VolumeRecord,
};
use super::store::{Event, KeyRange, KeyValue, MetaStore, Revision, StoreError, get, range_all};

mod places;
mod published;

/// Silence after which people are told that a node is not alive: longer than a lease, so that a hiccup is no news.
pub const SILENCE_MAX: Duration = Duration::from_secs(3);
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
    /// What an election names.
    modified: Revision,
    seen: BootTime,
    /// It has grown since it is listened to.
    grew: bool,
}

struct Death {
    incarnation: String,
    /// What an election names.
    modified: Revision,
    seen: BootTime,
}

#[derive(Default)]
struct State {
    cluster_id: String,
    nodes: BTreeMap<NodeId, Kept<NodeRecord>>,
    beats: HashMap<NodeId, Beat>,
    deaths: HashMap<NodeId, Death>,
    drains: BTreeSet<NodeId>,
    stopping: bool,
    volumes: BTreeMap<VolumeId, Kept<VolumeRecord>>,
    shards: BTreeMap<ShardId, Kept<ShardRecord>>,
    published: published::Published,
    /// Shards that are not deleted, snapshots excepted.
    names: HashMap<ClientId, BTreeMap<ShardName, ShardId>>,
    /// Snapshots that are not deleted, by the shard that they are of.
    snapshots: HashMap<ShardId, BTreeMap<ShardName, ShardId>>,
    /// Shards that are not deleted.
    shard_counts: HashMap<VolumeId, u32>,
    heard: Option<BootTime>,
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
        let now = clock::boot();
        for (node, beat) in &mut fresh.beats {
            // A counter that stood still while nobody listened says nothing: its time begins anew. One that
            // stood still while it was heard keeps its silence.
            if let Some(old) = state.beats.get(node)
                && old.counter == beat.counter
                && let Some(heard) = state.heard
            {
                beat.seen = now - heard.since(old.seen);
                beat.grew = old.grew;
            }
        }
        for (node, death) in &mut fresh.deaths {
            if let Some(old) = state.deaths.get(node)
                && old.incarnation == death.incarnation
            {
                death.seen = old.seen;
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

    /// The record of a shard's snapshot, by its name.
    pub fn snapshot_by_name(&self, shard: ShardId, name: &ShardName) -> Option<Kept<ShardRecord>> {
        let state = self.state.read();
        let id = state.snapshots.get(&shard)?.get(name)?;
        state.shards.get(id).cloned()
    }

    /// The records of a shard's snapshots, in order of name.
    pub fn snapshots_of(&self, shard: ShardId) -> Vec<Kept<ShardRecord>> {
        let state = self.state.read();
        let ids = state.snapshots.get(&shard).into_iter().flat_map(|names| names.values());
        ids.filter_map(|id| state.shards.get(id).cloned()).collect()
    }

    /// The records that `keep` chooses, in order of id.
    pub fn shards(&self, keep: impl Fn(&ShardRecord) -> bool) -> Vec<Kept<ShardRecord>> {
        self.state.read().shards.values().filter(|kept| keep(&kept.record)).cloned().collect()
    }

    /// A volume's record.
    pub fn volume(&self, id: &VolumeId) -> Option<Kept<VolumeRecord>> {
        self.state.read().volumes.get(id).cloned()
    }

    /// A volume's epoch.
    pub fn volume_epoch(&self, id: &VolumeId) -> Option<Epoch> {
        self.state.read().volumes.get(id).map(|kept| kept.record.epoch)
    }

    /// The records of all volumes, in order of id.
    pub fn volumes(&self) -> Vec<Kept<VolumeRecord>> {
        self.state.read().volumes.values().cloned().collect()
    }

    /// Shards of a volume that are not deleted.
    pub fn shard_count(&self, volume: &VolumeId) -> u32 {
        self.state.read().shard_counts.get(volume).copied().unwrap_or(0)
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
            snapshot_of: record.snapshot_of,
        }
    }

    /// How all nodes are.
    pub fn healths(&self) -> BTreeMap<NodeId, Health> {
        let (state, now) = (self.state.read(), clock::boot());
        state.nodes.keys().map(|id| (id.clone(), state.health(id, now))).collect()
    }

    /// How a node is.
    pub fn health(&self, id: &NodeId) -> Health {
        self.state.read().health(id, clock::boot())
    }

    /// A node's record.
    pub fn node(&self, id: &NodeId) -> Option<Kept<NodeRecord>> {
        self.state.read().nodes.get(id).cloned()
    }

    /// The revision of the record of a node's death; `None`: there is none.
    pub fn death_revision(&self, id: &NodeId) -> Option<Revision> {
        self.state.read().deaths.get(id).map(|death| death.modified)
    }

    /// The revision of the heartbeat of a node that was seen last; `None`: it has none.
    pub fn heartbeat_revision(&self, id: &NodeId) -> Option<Revision> {
        self.state.read().beats.get(id).map(|beat| beat.modified)
    }

    /// Whether the whole cluster is being stopped.
    pub fn stopping(&self) -> bool {
        self.state.read().stopping
    }

    /// Nodes that are to serve nothing.
    pub fn draining(&self) -> Vec<NodeId> {
        self.state.read().drains.iter().cloned().collect()
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
                alive: !state.is_dead(record) && beat.is_some_and(|beat| state.silence(beat) < SILENCE_MAX),
                heartbeat: beat.map_or(0, |beat| beat.counter),
                started: record.started,
                draining: state.drains.contains(&record.id),
                dead: state.is_dead(record),
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
                target: record.target.clone(),
                leaving: record.leaving,
                iops: record.iops,
            }
        };
        state.volumes.values().map(info).collect()
    }
}

impl State {
    /// Something arrived. What we did not hear does not count as the nodes' silence.
    fn hear(&mut self) {
        let now = clock::boot();
        if let Some(heard) = self.heard.replace(now) {
            let pause = now.since(heard);
            if pause > lease::HEARING_GAP_MAX {
                self.beats.values_mut().for_each(|beat| beat.seen += pause);
            }
        }
    }

    /// How long a counter has stood still while it was listened to.
    fn silence(&self, beat: &Beat) -> Duration {
        self.heard.unwrap_or(beat.seen).since(beat.seen)
    }

    /// Whether the process that wrote this record was seen to end.
    fn is_dead(&self, record: &NodeRecord) -> bool {
        self.deaths.get(&record.id).is_some_and(|death| death.incarnation == record.incarnation)
    }

    fn health(&self, id: &NodeId, now: BootTime) -> Health {
        let Some(kept) = self.nodes.get(id) else { return Health::Absent };
        if let Some(death) = self.deaths.get(id)
            && death.incarnation == kept.record.incarnation
        {
            return Health::Dead(now.since(death.seen));
        }
        let Some(beat) = self.beats.get(id) else { return Health::Absent };
        if self.heard.is_none_or(|heard| now.since(heard) > lease::HEARING_GAP_MAX) {
            return Health::Unknown;
        }
        match self.silence(beat).checked_sub(lease::SILENCE_MAX) {
            Some(over) => Health::Silent(over),
            None if beat.grew => Health::Alive,
            None => Health::Unknown,
        }
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
        } else if key == STOPPING {
            self.stopping = true;
        } else if let Some(id) = key.strip_prefix(HEARTBEATS) {
            let counter = records::decode_number(&kv.key, &kv.value)?;
            let id = NodeId::new(id)?;
            let grew = self.beats.get(&id).is_some_and(|beat| beat.counter != counter);
            self.beats.insert(id, Beat { counter, modified: kv.modified, seen: clock::boot(), grew });
        } else if let Some(id) = key.strip_prefix(DEATHS) {
            let record: DeathRecord = records::decode(&kv.key, &kv.value)?;
            let death = Death { incarnation: record.incarnation, modified: kv.modified, seen: clock::boot() };
            self.deaths.insert(NodeId::new(id)?, death);
        } else if let Some(id) = key.strip_prefix(DRAINS) {
            self.drains.insert(NodeId::new(id)?);
        } else if key.starts_with(NODES) {
            let record: NodeRecord = records::decode(&kv.key, &kv.value)?;
            check_key(kv, &records::node_key(&record.id))?;
            self.nodes.insert(record.id.clone(), keep(record, kv));
        } else if key.starts_with(VOLUMES) {
            let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
            check_key(kv, &records::volume_key(&record.id))?;
            self.volumes.insert(record.id.clone(), keep(record, kv));
        } else if key.starts_with(SHARDS) {
            let record: ShardRecord = records::decode(&kv.key, &kv.value)?;
            check_key(kv, &records::shard_key(record.id))?;
            self.forget_shard(record.id);
            if record.state != StateWord::Deleted {
                let names = match record.snapshot_of {
                    Some(shard) => self.snapshots.entry(shard).or_default(),
                    None => self.names.entry(record.owner.clone()).or_default(),
                };
                names.insert(record.name.clone(), record.id);
                *self.shard_counts.entry(record.volume.clone()).or_default() += 1;
            }
            self.shards.insert(record.id, keep(record, kv));
        } else {
            self.published.put(key, kv)?;
        }
        // Names, requests and the id counter are read where they are changed, in the store itself.
        Ok(())
    }

    fn delete(&mut self, key: &Bytes) {
        let Ok(key) = std::str::from_utf8(key) else { return };
        if self.published.delete(key) {
            return;
        }
        if key == STOPPING {
            self.stopping = false;
        } else if let Some(id) = key.strip_prefix(HEARTBEATS) {
            self.beats.retain(|node, _| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(DEATHS) {
            self.deaths.retain(|node, _| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(DRAINS) {
            self.drains.retain(|node| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(NODES) {
            self.nodes.retain(|node, _| node.as_str() != id);
        } else if let Some(id) = key.strip_prefix(VOLUMES) {
            self.volumes.retain(|volume, _| volume.as_str() != id);
        } else if let Some(id) = key.strip_prefix(SHARDS).and_then(|id| id.parse().ok())
            && let Ok(id) = ShardId::new(id)
            // The number can be written in other ways, which are nobody's key.
            && key == records::shard_key(id)
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
        match old.record.snapshot_of {
            Some(shard) => forget_name(&mut self.snapshots, &shard, &old.record),
            None => forget_name(&mut self.names, &old.record.owner, &old.record),
        }
    }
}

fn forget_name<K: Eq + std::hash::Hash>(
    all: &mut HashMap<K, BTreeMap<ShardName, ShardId>>,
    whose: &K,
    record: &ShardRecord,
) {
    let Some(names) = all.get_mut(whose) else { return };
    // A rename in the same revision may have given the name to another shard already.
    if names.get(&record.name) == Some(&record.id) {
        names.remove(&record.name);
    }
    if names.is_empty() {
        all.remove(whose);
    }
}

/// Fails unless a record lies under its own key: under another one it would take the place of the one that belongs there, and
/// outlive it.
fn check_key(kv: &KeyValue, own: &str) -> Result<()> {
    if kv.key == own {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "the metadata store's key {} holds the record that belongs under {own}: delete that key",
        kv.key.escape_ascii()
    )))
}

fn keep<T>(record: T, kv: &KeyValue) -> Kept<T> {
    Kept { record: Arc::new(record), modified: kv.modified }
}

#[cfg(test)]
mod tests;
