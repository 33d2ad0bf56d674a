//! The volumes that this node serves: how one is taken, spoken for and let go of. `roles` says when.
//!
//! Invariants: a volume that cannot be used stops no other; it is tried again with growing pauses and its
//! trouble is told. A volume is let go of only after its shards are closed. An answer about a volume is given only if
//! this node's lease was held at a moment after it was made, or a write that began after the question reached the device.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::cluster::{Takeover as TakeoverTimes, VolumeStatus};
use shardfs_proto::types::{Epoch, Error, Reason, Result, ShardId, VolumeId, clock};
use tokio_util::sync::CancellationToken;

use super::Catalog;
use super::barrier::Barrier;
use super::publish::Publisher;
use super::shard_room::ShardRoom;
use crate::cluster::lease::Lease;
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{Demand, Txn};
use crate::cluster::view::{Kept, View};
use crate::shard::Room;
use crate::volume::fence::{self, FenceKey, FenceKind, Takeover};
use crate::volume::room::VolumeRoom;
use crate::volume::{self, Attached, Place, Providers, Standby, VolumeSpec};

mod leaving;

/// Looks, a second apart, after which a device that has completed nothing is given up: so that callers, who wait for a minute, are
/// still there when a backup has the volume.
const DEVICE_LOOKS_MAX: u32 = 10;
/// How long it may take to attach a volume, or to fence and mount it.
const TAKE_WAIT_MAX: Duration = Duration::from_secs(30);
/// The same where a cloud has to attach a disk first: longer than it takes to say why it does not.
const CLOUD_TAKE_WAIT_MAX: Duration = Duration::from_secs(100);
/// The same for one that is made first.
const MAKE_WAIT_MAX: Duration = Duration::from_secs(180);
/// How long a fence may take before it is tried again.
const FENCE_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long the note that a volume is in use is waited for.
const NOTE_WAIT_MAX: Duration = Duration::from_secs(1);
/// Pauses between attempts to attach.
const ATTACH_PAUSE_MIN: Duration = Duration::from_millis(250);
/// See [`ATTACH_PAUSE_MIN`].
const ATTACH_PAUSE_MAX: Duration = Duration::from_secs(15);

/// How long it may take to attach a volume of this kind.
fn take_wait_max(provider: &str) -> Duration {
    if provider == volume::AWS { CLOUD_TAKE_WAIT_MAX } else { TAKE_WAIT_MAX }
}

/// A volume that is mounted for writing.
pub struct Served {
    /// The volume.
    pub id: VolumeId,
    /// Under which it is served.
    pub epoch: Epoch,
    pub(super) root: PathBuf,
    device: String,
    spec: VolumeSpec,
    pub(super) provider: String,
    providers: Providers,
    /// The volume's fence keeps a deposed node from writing: so a write proves that this one is not deposed.
    refuses_deposed: bool,
    pub(super) room: Arc<VolumeRoom>,
    pub(super) publisher: Publisher,
    barrier: Arc<Barrier>,
    lease: Arc<Lease>,
    view: Arc<View>,
    attached: Mutex<Option<Attached>>,
    takeover: TakeoverTimes,
    /// When the first of its shards was open.
    opened_ns: AtomicU64,
    /// Its room is being looked after.
    tending: AtomicBool,
    /// Held while it is made larger by a step: it is not unmounted meanwhile.
    pub(super) growing: tokio::sync::Mutex<()>,
}

impl Served {
    /// Makes what it lies on larger; see [`volume::VolumeProvider::enlarge_below`]. Blocks.
    pub(super) fn enlarge_below(&self, size_bytes: u64) -> Result<()> {
        let spec = VolumeSpec { size_bytes, ..self.spec.clone() };
        self.providers.get(&self.provider)?.enlarge_below(&spec)
    }

    /// Makes it larger by one step; see [`volume::VolumeProvider::grow`]. Blocks.
    pub(super) fn grow(&self, size_bytes: u64) -> Result<bool> {
        let spec = VolumeSpec { size_bytes, ..self.spec.clone() };
        let place = Place { root: self.root.clone(), device: PathBuf::from(&self.device) };
        let grown = self.providers.get(&self.provider)?.grow(&spec, &place);
        self.room.look_again();
        grown
    }

    /// A shard's folder on it.
    pub fn shard_dir(&self, id: ShardId) -> PathBuf {
        self.root.join(format!("shard-{id}"))
    }

    /// Its room, as shards ask for it.
    pub fn room(&self) -> Arc<dyn Room> {
        Arc::new(ShardRoom {
            id: self.id.clone(),
            epoch: self.epoch,
            room: self.room.clone(),
            lease: self.lease.clone(),
            view: self.view.clone(),
            barrier: self.refuses_deposed.then(|| self.barrier.clone()),
        })
    }

    /// A shard of it is open.
    pub(super) fn note_open(&self) {
        if self.opened_ns.load(Ordering::Relaxed) == 0 {
            // Of several at once one counts.
            let _ = self.opened_ns.compare_exchange(0, now_ns(), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn takeover(&self) -> TakeoverTimes {
        TakeoverTimes { opened_ns: self.opened_ns.load(Ordering::Relaxed), ..self.takeover }
    }

    /// What is behind an error of a shard's files: that the volume is no longer this node's, if that is so.
    async fn behind(&self, error: Error) -> Error {
        let proof = if self.refuses_deposed {
            self.barrier.pass().await
        } else {
            self.room().confirm().map_or(Ok(()), |_| {
                Err(Error::unavailable(format!("volume {} may be another node's by now", self.id)))
            })
        };
        match (proof, error.shard()) {
            (Ok(()), _) => error,
            (Err(lost), Some(shard)) => lost.with_shard(shard).with_retry_after_ms(20),
            (Err(lost), None) => lost.with_retry_after_ms(20),
        }
    }

    /// Fails unless what was written and synced before is on a volume that was this node's.
    pub(super) async fn prove(&self) -> Result<()> {
        if self.refuses_deposed {
            return self.barrier.pass().await;
        }
        // Nothing keeps a deposed node from writing to it; the record that is written next tells.
        match self.lease.is_held() {
            true => Ok(()),
            false => Err(Error::unavailable("this node does not reach the metadata store")),
        }
    }

    /// Why the volume can no longer be written, if that is so.
    pub(super) fn lost(&self) -> Option<Error> {
        self.barrier.failed()
    }
}

/// A volume that is stood by for, with what is needed to let go of it when its record has gone.
struct StoodBy {
    provider: String,
    spec: VolumeSpec,
    standby: Standby,
}

impl StoodBy {
    fn of(served: &Served, standby: Standby) -> StoodBy {
        StoodBy { provider: served.provider.clone(), spec: served.spec.clone(), standby }
    }
}

struct Trouble {
    message: String,
    attempts: u32,
    again: Instant,
}

/// Takes a volume out of those on which something is under way.
struct Ended {
    under_way: Arc<Mutex<HashSet<VolumeId>>>,
    volume: VolumeId,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.under_way.lock().remove(&self.volume);
    }
}

/// What is attached, and what is not and why.
#[derive(Default)]
pub(super) struct Serving {
    served: Mutex<BTreeMap<VolumeId, Arc<Served>>>,
    troubles: Mutex<HashMap<VolumeId, Trouble>>,
    /// Elections that were won, until the volume is served: when they began and when they were won.
    won: Mutex<HashMap<VolumeId, (u64, u64)>>,
    /// Volumes that this node stands by for.
    standbys: Mutex<BTreeMap<VolumeId, StoodBy>>,
    /// Volumes that were let go of when this process began to end, with shards of theirs in use: what keeps others away from them
    /// is kept until it has ended.
    withheld: Mutex<Vec<Arc<Served>>>,
    /// Volumes that are being let go of: their devices are watched still.
    leaving: Mutex<Vec<Arc<Served>>>,
    /// Epochs under which this node serves volumes no more: they failed, or were perhaps given away.
    failed: Mutex<HashMap<VolumeId, Epoch>>,
    /// Volumes on which blocking work is under way, also such as nobody waits for any more.
    under_way: Arc<Mutex<HashSet<VolumeId>>>,
    /// The first round of attaching is over.
    settled: CancellationToken,
}

impl Serving {
    pub(super) fn get(&self, id: &VolumeId) -> Option<Arc<Served>> {
        self.served.lock().get(id).cloned()
    }

    pub(super) fn remove_trouble(&self, id: &VolumeId) {
        self.troubles.lock().remove(id);
    }

    /// Attempts that failed, and whether it is too early for the next.
    pub(super) fn attempts(&self, id: &VolumeId) -> Option<(u32, bool)> {
        let troubles = self.troubles.lock();
        troubles.get(id).map(|trouble| (trouble.attempts, trouble.again > clock::monotonic()))
    }

    /// A volume became this node's: what is to be tried again is tried now. `afresh`: what failed before counts for
    /// nothing.
    pub(super) fn hurry(&self, id: &VolumeId, afresh: bool) {
        let mut troubles = self.troubles.lock();
        if afresh {
            troubles.remove(id);
        } else if let Some(trouble) = troubles.get_mut(id) {
            trouble.again = clock::monotonic();
        }
    }

    /// Whether this node stands by for a volume.
    pub(super) fn stands_by(&self, id: &VolumeId) -> bool {
        self.standbys.lock().contains_key(id)
    }

    /// As what it stands by for a volume.
    pub(super) fn stood_by(&self, id: &VolumeId) -> Option<(String, VolumeSpec)> {
        self.standbys.lock().get(id).map(|stood| (stood.provider.clone(), stood.spec.clone()))
    }

    /// Whether a volume is not to be served by this node under this epoch again.
    pub(super) fn has_failed(&self, id: &VolumeId, epoch: Epoch) -> bool {
        self.failed.lock().get(id) == Some(&epoch)
    }

    /// A volume is not to be served by this node under this epoch again.
    pub(super) fn note_failed(&self, id: &VolumeId, epoch: Epoch) {
        self.failed.lock().insert(id.clone(), epoch);
    }

    /// Volumes that this node stands by for.
    pub(super) fn standing_by(&self) -> Vec<VolumeId> {
        self.standbys.lock().keys().cloned().collect()
    }

    /// Notes an election that was won just now.
    pub(super) fn note_won(&self, id: &VolumeId, begun_ns: u64) {
        self.won.lock().insert(id.clone(), (begun_ns, now_ns()));
    }

    pub(super) fn settle(&self) {
        self.settled.cancel();
    }

    pub(super) fn trouble(&self, id: &VolumeId) -> Option<String> {
        self.troubles.lock().get(id).map(|trouble| trouble.message.clone())
    }

    pub(super) fn all(&self) -> Vec<Arc<Served>> {
        self.served.lock().values().cloned().collect()
    }
}

impl Catalog {
    pub(super) fn spec_of(&self, record: &VolumeRecord) -> VolumeSpec {
        VolumeSpec {
            id: record.id.clone(),
            cluster_id: self.parts.cluster_id.clone(),
            source: self.source_of(record),
            size_bytes: record.size_bytes,
            formatted: record.formatted,
            mount_point: self.parts.data_dir.join("volumes").join(record.id.as_str()),
            allow_unfenced: record.allow_unfenced,
        }
    }

    /// Where this node finds it.
    fn source_of(&self, record: &VolumeRecord) -> PathBuf {
        let own = self.parts.devices.get(&record.id).filter(|_| record.provider == volume::DEVICE);
        own.cloned().unwrap_or_else(|| PathBuf::from(&record.source))
    }

    /// Attaches a volume without mounting it.
    pub(super) async fn stand_by(&self, record: &VolumeRecord) -> Result<()> {
        let (spec, name) = (self.spec_of(record), record.provider.clone());
        self.drop_leftovers(&record.id).await?;
        let (kept_spec, provider) = (spec.clone(), name.clone());
        let providers = self.parts.providers.clone();
        let standby = self
            .work(&record.id, take_wait_max(&name), move || {
                let provider = providers.get(&name)?;
                // Its first primary makes it.
                if !provider.describe(&spec)?.exists && !spec.formatted {
                    let (id, source) = (&spec.id, spec.source.display());
                    return Err(Error::unavailable(format!(
                        "volume {id} is not made yet: {source} is not there"
                    )));
                }
                provider.attach_backup(&spec)
            })
            .await?;
        tracing::info!(volume = %record.id, device = %standby.device().display(), "standing by");
        self.serving
            .standbys
            .lock()
            .insert(record.id.clone(), StoodBy { provider, spec: kept_spec, standby });
        Ok(())
    }

    /// Closes what is open still of the shards of a volume that is to be attached: somebody did not leave when it was let go of.
    async fn drop_leftovers(&self, id: &VolumeId) -> Result<()> {
        let of_it = |shard| self.parts.view.shard(shard).is_some_and(|kept| kept.record.volume == *id);
        self.parts.manager.abandon_all(of_it).await
    }

    /// Does blocking work on a volume, and waits for it for so long at most: a device may hang. Nothing else is begun on a volume
    /// while something of before has not ended.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        id: &VolumeId,
        at_most: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let under_way = self.serving.under_way.clone();
        if !under_way.lock().insert(id.clone()) {
            return Err(Error::unavailable(format!(
                "volume {id}: what was begun on it before has not ended: its device hangs"
            )));
        }
        let volume = id.clone();
        let working = blocking(move || {
            // Also if it panics.
            let ended = Ended { under_way, volume };
            let outcome = work();
            drop(ended);
            outcome
        });
        tokio::time::timeout(at_most, working).await.unwrap_or_else(|_| {
            Err(Error::unavailable(format!(
                "volume {id}: its device has not answered within {} s",
                at_most.as_secs()
            )))
        })
    }

    /// Fences a volume, mounts it, and serves it under its record's epoch, which was given to this process.
    pub(super) async fn take(&self, kept: &Kept<VolumeRecord>) -> Result<()> {
        let record = kept.record.clone();
        let spec = self.spec_of(&record);
        let takeover = self.takeover(&record)?;
        self.drop_leftovers(&record.id).await?;
        let standby = self.serving.standbys.lock().remove(&record.id).map(|stood| stood.standby);
        let begun = clock::monotonic();
        let at_most = match (record.formatted, standby.is_some()) {
            (false, _) => MAKE_WAIT_MAX,
            (true, true) => TAKE_WAIT_MAX,
            (true, false) => take_wait_max(&record.provider),
        };
        let won = self.serving.won.lock().remove(&record.id);
        let (begun_ns, elected_ns) = won.unwrap_or_else(|| (now_ns(), now_ns()));
        let (name, work_spec) = (record.provider.clone(), spec.clone());
        let providers = self.parts.providers.clone();
        let (attached, fence, fenced_ns, how) = self
            .work(&record.id, at_most, move || {
                let provider = providers.get(&name)?;
                fence::required(provider.fence(), &work_spec).or_else(|error| {
                    // One that is not there yet has nobody to be fenced from.
                    if provider.describe(&work_spec).is_ok_and(|seen| seen.exists) {
                        Err(error)
                    } else {
                        Ok(FenceKind::None)
                    }
                })?;
                provider.create(&work_spec)?;
                let standby = match standby {
                    Some(standby) => standby,
                    None => provider.attach_backup(&work_spec)?,
                };
                let fenced = provider.fence().acquire(&work_spec, &takeover)?;
                let (fenced_ns, how) = (now_ns(), fenced.to_string());
                let fence = (fenced.kind(), fenced.took().as_millis() as u64);
                Ok((provider.promote(&work_spec, standby, fenced)?, fence, fenced_ns, how))
            })
            .await?;
        let (kind, fenced_ms) = fence;
        tracing::info!(volume = %record.id, epoch = %record.epoch, device = %attached.device,
            root = %attached.root.display(), fence = kind.as_str(), ms = begun.elapsed().as_millis() as u64, fenced_ms, "serving the volume");
        tracing::debug!(volume = %record.id, how, "fenced");
        let served = Served {
            id: record.id.clone(),
            epoch: record.epoch,
            root: attached.root.clone(),
            device: attached.device.clone(),
            spec,
            provider: record.provider.clone(),
            providers: self.parts.providers.clone(),
            refuses_deposed: matches!(kind, FenceKind::Reservation | FenceKind::Shutdown),
            room: Arc::new(VolumeRoom::new(attached.root.clone())),
            publisher: Publisher::default(),
            barrier: Barrier::new(attached.witness()?),
            lease: self.parts.lease.clone(),
            view: self.parts.view.clone(),
            attached: Mutex::new(Some(attached)),
            takeover: TakeoverTimes { begun_ns, elected_ns, fenced_ns, mounted_ns: now_ns(), opened_ns: 0 },
            opened_ns: AtomicU64::new(0),
            tending: AtomicBool::new(false),
            growing: tokio::sync::Mutex::default(),
        };
        self.serving.troubles.lock().remove(&record.id);
        self.serving.served.lock().insert(record.id.clone(), Arc::new(served));
        Ok(())
    }

    /// The error to answer instead of one that says that a shard's files cannot be read or written. Those of a volume that was
    /// fenced cannot: its callers go to where it is served now.
    pub async fn behind(&self, error: Error) -> Error {
        if !matches!(error.reason(), Reason::Io | Reason::Corrupt) {
            return error;
        }
        let Some(shard) = error.shard() else { return error };
        let Some(kept) = self.parts.view.shard(shard) else { return error };
        match self.serving.get(&kept.record.volume) {
            Some(served) => served.behind(error).await,
            None => Error::unavailable(format!(
                "volume {} is no longer served by this node ({})",
                kept.record.volume,
                error.message()
            ))
            .with_shard(shard)
            .with_retry_after_ms(20),
        }
    }

    /// What its fence needs to know.
    fn takeover(&self, record: &VolumeRecord) -> Result<Takeover> {
        let predecessors = record.predecessors.iter().map(|past| FenceKey::new(&past.node, past.epoch));
        Ok(Takeover {
            predecessors: predecessors.collect::<Result<_>>()?,
            handed_over: record.handed_over && record.unmounted,
            ..Takeover::new(FenceKey::new(&self.parts.node_id, record.epoch)?, FENCE_WAIT_MAX)
        })
    }

    /// Waits until every volume of this node was attached or found not to be usable.
    pub async fn settled(&self) {
        self.serving.settled.cancelled().await;
    }

    fn wanted(&self) -> Vec<Kept<VolumeRecord>> {
        let mine = |kept: &Kept<VolumeRecord>| kept.record.primary.as_ref() == Some(&self.parts.node_id);
        self.parts.view.volumes().into_iter().filter(mine).collect()
    }

    pub(super) fn note_trouble(&self, id: &VolumeId, error: &Error) {
        let mut troubles = self.serving.troubles.lock();
        let attempts = troubles.get(id).map_or(1, |trouble| trouble.attempts.saturating_add(1));
        let pause = ATTACH_PAUSE_MIN.saturating_mul(1 << attempts.min(10)).min(ATTACH_PAUSE_MAX);
        // The same trouble again is no news.
        if troubles.get(id).is_none_or(|trouble| trouble.message != error.message()) {
            match error.reason() {
                Reason::Unavailable => {
                    tracing::info!(volume = %id, %error, "a volume cannot be used yet; it is tried again")
                }
                _ => tracing::error!(volume = %id, %error, "a volume cannot be used; it is tried again"),
            }
        }
        let trouble =
            Trouble { message: error.message().to_owned(), attempts, again: clock::monotonic() + pause };
        troubles.insert(id.clone(), trouble);
    }

    /// Ballasts, and the note that a volume has been in use.
    pub(super) async fn tend(self: &Arc<Self>) {
        let leaving = self.serving.leaving.lock().clone();
        for served in self.serving.all().iter().chain(&leaving) {
            // A device that failed, hangs, or was taken, is noticed although nobody asks.
            if served.refuses_deposed {
                served.barrier.look(DEVICE_LOOKS_MAX);
                let barrier = served.barrier.clone();
                tokio::spawn(async move { drop(barrier.pass().await) });
            }
        }
        for served in self.serving.all() {
            // One that hangs keeps no other waiting.
            if !served.tending.swap(true, Ordering::AcqRel) {
                tokio::task::spawn_blocking(move || {
                    let tended = catch_unwind(AssertUnwindSafe(|| served.room.tend()));
                    served.tending.store(false, Ordering::Release);
                    if tended.is_err() {
                        tracing::error!(volume = %served.id, "looking after a volume's room failed");
                    }
                });
            }
        }
        for kept in self.wanted() {
            if !kept.record.formatted
                && self.serving.get(&kept.record.id).is_some()
                && self.parts.lease.succeeded()
            {
                let record = VolumeRecord { formatted: true, ..(*kept.record).clone() };
                let key = records::volume_key(&record.id);
                let txn = Txn::new()
                    .when(key.clone(), Demand::Modified(kept.modified))
                    .put(key, records::encode(&record));
                // Whatever becomes of it, the next round looks again.
                match self.parts.store.txn(txn).await {
                    Ok(answer) => drop(self.parts.view.wait_for(answer.revision, NOTE_WAIT_MAX).await),
                    Err(error) => {
                        tracing::warn!(volume = %record.id, %error, "noting that a volume is in use: later")
                    }
                }
            }
        }
    }

    /// The served volume with the most room, then the fewest shards.
    pub(super) fn most_room(&self) -> Result<Arc<Served>> {
        let leaves = |id: &VolumeId| self.parts.view.volume(id).is_none_or(|kept| kept.record.leaving);
        let served: Vec<Arc<Served>> =
            self.serving.all().into_iter().filter(|served| !leaves(&served.id)).collect();
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
                (None, None) if record.formatted => "it is being taken over".into(),
                (None, None) => "it is being made".into(),
            };
            VolumeStatus {
                id: record.id.clone(),
                provider: served.as_ref().map_or(&record.provider, |s| &s.provider).clone(),
                total_bytes: served.as_ref().map_or(0, |s| s.room.total_bytes()),
                free_bytes: served.as_ref().map_or(0, |s| s.room.growth_bytes()),
                shards: self.parts.view.shard_count(&record.id),
                epoch: record.epoch,
                source: served.as_ref().map_or(&record.source, |s| &s.device).clone(),
                mount_point: served.as_ref().map_or_else(String::new, |s| s.root.display().to_string()),
                trouble,
                takeover: served.as_ref().map(|s| s.takeover()),
            }
        };
        self.wanted().into_iter().map(status).collect()
    }
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    let now = clock::now();
    u64::try_from(now.seconds()).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(now.nanos())
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::internal(format!("attaching or detaching a volume: {e}"))))
}
