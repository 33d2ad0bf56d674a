//! Which volumes this node serves: it attaches those that the records give it, and lets go of others.
//!
//! Invariants: a volume that cannot be attached stops no other; it is tried again with growing pauses and its
//! trouble is told. A volume is let go of only after its shards are closed.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::cluster::VolumeStatus;
use shardfs_proto::types::{Error, Reason, Result, ShardId, VolumeId, clock};
use tokio_util::sync::CancellationToken;

use super::Catalog;
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{Demand, Txn};
use crate::cluster::view::Kept;
use crate::shard::Room;
use crate::volume::room::VolumeRoom;
use crate::volume::{self, Attached, VolumeSpec};

/// How often volumes are looked after when nothing changes.
const TEND_INTERVAL: Duration = Duration::from_secs(1);
/// How often what was left half-done is looked for.
const RESUME_INTERVAL: Duration = Duration::from_secs(30);
/// Pauses between attempts to attach.
const ATTACH_PAUSE_MIN: Duration = Duration::from_millis(250);
/// See [`ATTACH_PAUSE_MIN`].
const ATTACH_PAUSE_MAX: Duration = Duration::from_secs(15);

/// A volume that is attached.
pub struct Served {
    /// The volume.
    pub id: VolumeId,
    root: PathBuf,
    device: String,
    spec: VolumeSpec,
    provider: String,
    room: Arc<VolumeRoom>,
    attached: Mutex<Option<Attached>>,
}

impl Served {
    /// A shard's folder on it.
    pub fn shard_dir(&self, id: ShardId) -> PathBuf {
        self.root.join(format!("shard-{id}"))
    }

    /// Its room, as shards ask for it.
    pub fn room(&self) -> Arc<dyn Room> {
        Arc::new(ShardRoom(self.room.clone()))
    }
}

struct ShardRoom(Arc<VolumeRoom>);

impl Room for ShardRoom {
    fn growth_bytes(&self) -> u64 {
        self.0.growth_bytes()
    }

    fn wrote(&self, bytes: u64) {
        self.0.wrote(bytes);
    }

    fn unflushed(&self, before: u64, now: u64) {
        self.0.unflushed(before, now);
    }

    fn look_again(&self) {
        self.0.look_again();
    }

    fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    fn free_bytes(&self) -> u64 {
        self.0.free_bytes()
    }
}

struct Trouble {
    message: String,
    attempts: u32,
    again: Instant,
}

/// What is attached, and what is not and why.
#[derive(Default)]
pub(super) struct Serving {
    served: Mutex<BTreeMap<VolumeId, Arc<Served>>>,
    troubles: Mutex<HashMap<VolumeId, Trouble>>,
    /// The first round of attaching is over.
    settled: CancellationToken,
}

impl Serving {
    pub(super) fn get(&self, id: &VolumeId) -> Option<Arc<Served>> {
        self.served.lock().get(id).cloned()
    }

    pub(super) fn trouble(&self, id: &VolumeId) -> Option<String> {
        self.troubles.lock().get(id).map(|trouble| trouble.message.clone())
    }

    fn all(&self) -> Vec<Arc<Served>> {
        self.served.lock().values().cloned().collect()
    }
}

impl Catalog {
    /// Attaches what the records give this node, looks after it, and lets go of the rest; until
    /// [`Catalog::shutdown`]. The view has been read once.
    pub async fn run(self: Arc<Self>) {
        let mut changes = self.parts.view.subscribe();
        let mut resumed: Option<Instant> = None;
        loop {
            changes.borrow_and_update();
            let attached = self.reconcile().await;
            self.serving.settled.cancel();
            let due = resumed.is_none_or(|when| when.elapsed() >= RESUME_INTERVAL);
            if due {
                resumed = Some(clock::monotonic());
            }
            for served in self.serving.all() {
                if due || attached.contains(&served.id) {
                    let this = self.clone();
                    tokio::spawn(async move { this.resume(&served.id).await });
                }
            }
            self.tend().await;
            tokio::select! {
                _ = self.stop.cancelled() => return,
                _ = tokio::time::sleep(TEND_INTERVAL) => {}
                _ = self.volumes_changed(&mut changes) => {}
            }
        }
    }

    /// Waits until every volume of this node was attached or found not to be usable.
    pub async fn settled(&self) {
        self.serving.settled.cancelled().await;
    }

    /// Ends when the records give this node other volumes than it has.
    async fn volumes_changed(
        &self,
        changes: &mut tokio::sync::watch::Receiver<crate::cluster::store::Revision>,
    ) {
        loop {
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
            let wanted: Vec<VolumeId> =
                self.wanted().into_iter().map(|kept| kept.record.id.clone()).collect();
            let troubles = self.serving.troubles.lock();
            let served = self.serving.served.lock();
            if wanted.iter().any(|id| !served.contains_key(id) && !troubles.contains_key(id))
                || served.keys().any(|id| !wanted.contains(id))
            {
                return;
            }
        }
    }

    fn wanted(&self) -> Vec<Kept<VolumeRecord>> {
        let mine = |kept: &Kept<VolumeRecord>| kept.record.primary.as_ref() == Some(&self.parts.node_id);
        self.parts.view.volumes().into_iter().filter(mine).collect()
    }

    /// One round of attaching and letting go; answers what was attached.
    async fn reconcile(self: &Arc<Self>) -> Vec<VolumeId> {
        let wanted = self.wanted();
        for served in self.serving.all() {
            if !wanted.iter().any(|kept| kept.record.id == served.id) {
                tracing::info!(volume = %served.id, "another node serves it now: letting go");
                self.let_go(&served).await;
            }
        }
        self.serving.troubles.lock().retain(|id, _| wanted.iter().any(|kept| kept.record.id == *id));
        let now = clock::monotonic();
        let due = |kept: &Kept<VolumeRecord>| {
            let id = &kept.record.id;
            self.serving.get(id).is_none()
                && self.serving.troubles.lock().get(id).is_none_or(|t| t.again <= now)
        };
        let attaching: Vec<_> = wanted
            .into_iter()
            .filter(due)
            .map(|kept| {
                let this = self.clone();
                async move { this.attach(&kept).await.then(|| kept.record.id.clone()) }
            })
            .collect();
        futures::future::join_all(attaching).await.into_iter().flatten().collect()
    }

    async fn attach(&self, kept: &Kept<VolumeRecord>) -> bool {
        let record = kept.record.clone();
        let spec = VolumeSpec {
            id: record.id.clone(),
            cluster_id: self.parts.cluster_id.clone(),
            source: PathBuf::from(&record.source),
            size_bytes: record.size_bytes,
            formatted: record.formatted,
            mount_point: self.parts.data_dir.join("volumes").join(record.id.as_str()),
            allow_unfenced: false,
        };
        let name = record.provider.clone();
        let work = {
            let spec = spec.clone();
            move || -> Result<Attached> {
                let provider = volume::provider(&name)?;
                provider.create(&spec)?;
                provider.attach(&spec)
            }
        };
        let begun = clock::monotonic();
        let outcome = tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|e| Err(Error::internal(format!("attaching a volume: {e}"))));
        match outcome {
            Ok(attached) => {
                tracing::info!(volume = %record.id, device = %attached.device, root = %attached.root.display(),
                    ms = begun.elapsed().as_millis() as u64, "volume attached");
                let served = Served {
                    id: record.id.clone(),
                    root: attached.root.clone(),
                    device: attached.device.clone(),
                    spec,
                    provider: record.provider.clone(),
                    room: Arc::new(VolumeRoom::new(attached.root.clone())),
                    attached: Mutex::new(Some(attached)),
                };
                self.serving.troubles.lock().remove(&record.id);
                self.serving.served.lock().insert(record.id.clone(), Arc::new(served));
                true
            }
            Err(error) => {
                self.note_trouble(&record.id, &error);
                false
            }
        }
    }

    fn note_trouble(&self, id: &VolumeId, error: &Error) {
        let mut troubles = self.serving.troubles.lock();
        let attempts = troubles.get(id).map_or(1, |trouble| trouble.attempts.saturating_add(1));
        let pause = ATTACH_PAUSE_MIN.saturating_mul(1 << attempts.min(10)).min(ATTACH_PAUSE_MAX);
        // The same trouble again is no news.
        if troubles.get(id).is_none_or(|trouble| trouble.message != error.message()) {
            tracing::error!(volume = %id, %error, "a volume cannot be attached; it is tried again");
        }
        let trouble =
            Trouble { message: error.message().to_owned(), attempts, again: clock::monotonic() + pause };
        troubles.insert(id.clone(), trouble);
    }

    /// Ballasts, and the note that a volume has been in use.
    async fn tend(self: &Arc<Self>) {
        for served in self.serving.all() {
            let room = served.room.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || room.tend()).await {
                tracing::error!(volume = %served.id, %error, "looking after a volume's room");
            }
        }
        for kept in self.wanted() {
            if !kept.record.formatted
                && self.serving.get(&kept.record.id).is_some()
                && self.parts.pulse.succeeded()
            {
                let record = VolumeRecord { formatted: true, ..(*kept.record).clone() };
                let key = records::volume_key(&record.id);
                let txn = Txn::new()
                    .when(key.clone(), Demand::Modified(kept.modified))
                    .put(key, records::encode(&record));
                // Whatever becomes of it, the next round looks again.
                match self.parts.store.txn(txn).await {
                    Ok(answer) => drop(self.parts.view.wait_for(answer.revision, TEND_INTERVAL).await),
                    Err(error) => {
                        tracing::warn!(volume = %record.id, %error, "noting that a volume is in use: later")
                    }
                }
            }
        }
    }

    /// Closes a volume's shards and detaches it.
    async fn let_go(&self, served: &Arc<Served>) {
        self.serving.served.lock().remove(&served.id);
        for kept in self.parts.view.shards(|record| record.volume == served.id) {
            if let Err(error) = self.parts.manager.close(kept.record.id).await {
                tracing::error!(shard = %kept.record.id, %error, "closing a shard");
            }
        }
        if let Err(error) = detach(served).await {
            self.note_trouble(&served.id, &error);
        }
    }

    /// Stops changes, closes all shards, detaches all volumes. What cannot be detached is logged; the next
    /// start cleans it up.
    pub async fn shutdown(&self) -> Result<()> {
        self.stop.cancel();
        // Changes under way hold a permit each; with all of them none is left.
        let all = u32::try_from(super::CHANGES_MAX).unwrap_or(u32::MAX);
        let waited = tokio::time::timeout(super::SHOWN_WAIT_MAX, self.changes.acquire_many(all)).await;
        if waited.is_err() {
            tracing::warn!("stopping while shards are being changed; the next start finishes it");
        }
        let closed = self.parts.manager.close_all().await;
        for served in self.serving.all() {
            self.serving.served.lock().remove(&served.id);
            if let Err(error) = detach(&served).await {
                tracing::error!(volume = %served.id, %error, "detaching a volume; the next start cleans up");
            }
        }
        closed
    }

    /// The served volume with the most room, then the fewest shards.
    pub(super) fn most_room(&self) -> Result<Arc<Served>> {
        let served = self.serving.all();
        if served.is_empty() {
            let troubles: Vec<String> =
                self.serving.troubles.lock().iter().map(|(id, t)| format!("{id}: {}", t.message)).collect();
            return Err(Error::unavailable(if troubles.is_empty() {
                format!("{} serves no volume: ask another node", self.parts.node_id)
            } else {
                format!("{} serves no volume at the moment ({})", self.parts.node_id, troubles.join("; "))
            }));
        }
        let best = served
            .into_iter()
            .map(|served| {
                (
                    served.room.growth_bytes(),
                    std::cmp::Reverse(self.parts.view.shard_count(&served.id)),
                    served,
                )
            })
            .max_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
        match best {
            Some((growth, _, served)) if growth > 0 => Ok(served),
            _ => Err(Error::new(
                Reason::VolumeFull,
                format!(
                    "the volumes of {} have no room for another shard: delete something",
                    self.parts.node_id
                ),
            )),
        }
    }

    pub(super) fn volume_statuses(&self) -> Vec<VolumeStatus> {
        let status = |kept: Kept<VolumeRecord>| {
            let record = &kept.record;
            let served = self.serving.get(&record.id);
            let trouble = match (&served, self.serving.trouble(&record.id)) {
                (Some(_), None) => String::new(),
                (_, Some(trouble)) => trouble,
                (None, None) => "not attached yet".into(),
            };
            VolumeStatus {
                id: record.id.clone(),
                provider: served.as_ref().map_or(&record.provider, |s| &s.provider).clone(),
                total_bytes: served.as_ref().map_or(0, |s| s.room.total_bytes()),
                free_bytes: served.as_ref().map_or(0, |s| s.room.free_bytes()),
                shards: self.parts.view.shard_count(&record.id),
                epoch: record.epoch,
                source: served.as_ref().map_or(&record.source, |s| &s.device).clone(),
                mount_point: served.as_ref().map_or_else(String::new, |s| s.root.display().to_string()),
                trouble,
            }
        };
        self.wanted().into_iter().map(status).collect()
    }
}

async fn detach(served: &Arc<Served>) -> Result<()> {
    let served = served.clone();
    let work = move || -> Result<()> {
        let Some(attached) = served.attached.lock().take() else { return Ok(()) };
        volume::provider(&served.provider)?.detach(&served.spec, attached)
    };
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("detaching: {e}"))))
}
