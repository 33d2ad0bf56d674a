//! Keeps up what is open of other nodes' shards: says to their primaries what is read here, opens what they announce, retires what was
//! superseded with its last reader.
//!
//! Order, each step repeatable: pin, see the pin in the own copy of the records, mount, open; and back: close, unmount, detach,
//! unpin. Nothing here is on a call's path.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::clock::{self, BootTime};
use shardfs_proto::types::limits::PUBLISH_SHARDS_MAX;
use shardfs_proto::types::{ClientId, Error, Result, ShardId, VolumeId};

use super::{Catalog, Entry, Opened, READ_TERM};
use crate::catalog::serving::blocking;
use crate::cluster::pins;
use crate::cluster::records::VolumeRecord;
use crate::cluster::records::views::{Pinned, ViewRecord};
use crate::cluster::store::Revision;
use crate::cluster::view::Kept;
use crate::volume::leftovers;
use crate::volume::views::{ViewMount, view_dir};

/// How often is looked when nobody wakes.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long an own pin takes to show at most.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(2);
/// Views that are open at a time, superseded ones with readers included.
const OPEN_MAX: usize = 256;
/// Mounts of one volume at a time; each has a device.
const MOUNTS_MAX: usize = 8;
/// Views that are opened in one step: a transaction has a bounded number of conditions.
const STEP_MAX: usize = 64;
/// Pause before a view that could not be opened is tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(1);
/// Pause before a primary that refused, or did not answer, is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often a primary is told that a shard is still read here: well within its patience.
const ASK_INTERVAL: Duration = Duration::from_secs(10);
/// A stream that reads from a superseded view ends after so long, and its client goes on elsewhere: what it reads keeps space.
const READERS_PATIENCE: Duration = Duration::from_secs(60);
/// Pause before a mount that could not be taken away is tried again.
const RETIRE_AGAIN: Duration = Duration::from_secs(5);
/// How long readers may take to leave at a shutdown.
const LEAVE_WAIT_MAX: Duration = Duration::from_secs(5);

/// A volume, readable as it was at a revision.
pub(super) struct Mounted {
    volume: VolumeId,
    root: PathBuf,
    /// What had been announced by then is in it.
    revision: Revision,
    mount: Mutex<ViewMount>,
    /// Until when it is not tried to take it away, because that has failed.
    retire_after: Mutex<BootTime>,
}

/// What only the keeper knows.
#[derive(Default)]
pub(super) struct Keeper {
    /// Volumes of which nothing of an earlier process is left.
    cleaned: HashSet<VolumeId>,
    /// An earlier process's pins are gone.
    unpinned: bool,
    /// Superseded, and perhaps still read.
    retiring: Vec<Arc<Opened>>,
    mounts: Vec<Arc<Mounted>>,
    /// Names of mount points.
    count: u64,
    /// Volumes whose primary is being asked.
    asking: Arc<Mutex<HashSet<VolumeId>>>,
    /// For asking primaries.
    client: Option<Client>,
}

impl Catalog {
    /// Keeps views up until the node stops.
    pub(in crate::catalog) async fn keep_views(self: Arc<Self>) {
        while !self.stop.is_cancelled() {
            self.keep_views_once().await;
            tokio::select! {
                _ = self.stop.cancelled() => {}
                _ = self.views.wake.notified() => {}
                _ = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    /// Closes all views, and takes away what they lie on.
    pub(in crate::catalog) async fn drop_views(&self) {
        let mut keeper = self.views.keeper.lock().await;
        let all: Vec<Arc<Entry>> = self.views.shards.write().drain().map(|(_, entry)| entry).collect();
        for entry in all {
            keeper.retiring.extend(entry.state.lock().open.take());
        }
        let begun = clock::monotonic();
        loop {
            self.retire(&mut keeper).await;
            if keeper.mounts.is_empty() && keeper.retiring.is_empty() {
                return;
            }
            if begun.elapsed() > LEAVE_WAIT_MAX {
                tracing::warn!("views are still being read; the next start cleans up");
                return;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn keep_views_once(self: &Arc<Self>) {
        let mut keeper = self.views.keeper.lock().await;
        let keeper = &mut *keeper;
        self.clean_views(keeper).await;
        if !keeper.unpinned {
            // An earlier process of this node may still count on its pins.
            return;
        }
        let now = clock::boot();
        self.drop_unneeded(keeper, now);
        let mut to_open: BTreeMap<VolumeId, Vec<Kept<ViewRecord>>> = BTreeMap::new();
        let mut to_ask: BTreeMap<VolumeId, (Vec<ShardId>, Duration)> = BTreeMap::new();
        for (shard, entry) in self.views.entries() {
            let Some(volume) = self.parts.view.shard(shard).map(|kept| kept.record.volume.clone()) else {
                continue;
            };
            if !self.backs_up(&volume) || !keeper.cleaned.contains(&volume) {
                continue;
            }
            let announced = self.parts.view.view_of(shard);
            let mut state = entry.state.lock();
            if now.since(state.last_read) >= READ_TERM {
                continue;
            }
            let open = state.open.clone();
            if let Some(record) = &announced
                && open.as_ref().is_none_or(|open| open.pin.name != record.record.name)
                && state.open_after <= now
            {
                to_open.entry(volume.clone()).or_default().push(record.clone());
            }
            // The last view of a closed shard is there for good.
            if announced.as_ref().is_some_and(|kept| kept.record.last) {
                continue;
            }
            let wanted = state.wanted.map_or(Duration::MAX, |(wanted, _)| wanted);
            let age = open.and_then(|open| open.age(&self.parts.view, &self.parts.lease, now));
            let since = state.asked.map_or(Duration::MAX, |asked| now.since(asked));
            let lacking = age.is_none_or(|age| age > wanted);
            if since >= ASK_INTERVAL || (lacking && since >= ASK_AGAIN) {
                state.asked = Some(now);
                let ask = to_ask.entry(volume).or_insert((Vec::new(), Duration::MAX));
                ask.0.push(shard);
                // Half of it: the other half is what passes until the next view is open.
                ask.1 = ask.1.min(wanted / 2);
            }
        }
        for (volume, (shards, max_age)) in to_ask {
            self.ask(keeper, volume, shards, max_age);
        }
        for (volume, records) in to_open {
            for some in records.chunks(STEP_MAX) {
                if let Err(error) = self.open_views(keeper, &volume, some).await {
                    tracing::debug!(%volume, %error, "opening views");
                    self.refuse_open(some.iter().map(|kept| kept.record.shard), &error);
                }
            }
        }
        self.retire(keeper).await;
    }

    /// Takes away what an earlier process of this node has left.
    async fn clean_views(&self, keeper: &mut Keeper) {
        for kept in self.parts.view.volumes() {
            let record = &kept.record;
            let mine = record.backups.contains(&self.parts.node_id)
                || record.primary.as_ref() == Some(&self.parts.node_id);
            if !mine || keeper.cleaned.contains(&record.id) {
                continue;
            }
            let (spec, name, folder) =
                (self.spec_of(record), record.provider.clone(), self.views_folder(&record.id));
            let providers = self.parts.providers.clone();
            match blocking(move || providers.get(&name)?.clean_views(&spec, &folder)).await {
                Ok(()) => drop(keeper.cleaned.insert(record.id.clone())),
                Err(error) => {
                    tracing::debug!(volume = %record.id, %error, "taking old views away: later");
                }
            }
        }
        if !keeper.unpinned && clock::boot() >= self.parts.alone_from && self.parts.lease.is_held() {
            let dropped = pins::drop_stale(&*self.parts.store, &self.parts.view, &self.parts.record).await;
            keeper.unpinned = dropped.is_ok();
        }
    }

    /// Takes away what an earlier process of this node has left of views of a volume that it is no node of; whether there was anything.
    pub(in crate::catalog) async fn take_away_views(&self, volume: &VolumeId) -> Result<bool> {
        // Nothing is opened meanwhile; and what this process may have opened is the keeper's.
        let keeper = self.views.keeper.lock().await;
        if keeper.cleaned.contains(volume) {
            return Ok(false);
        }
        let (cluster_id, folder) = (self.parts.cluster_id.clone(), self.views_folder(volume));
        let volume = volume.clone();
        blocking(move || leftovers::take_away_views(&cluster_id, &volume, &folder)).await
    }

    fn views_folder(&self, volume: &VolumeId) -> PathBuf {
        self.parts.data_dir.join("views").join(volume.as_str())
    }

    /// Lets no read find what is not needed, or not to be used, any more.
    fn drop_unneeded(&self, keeper: &mut Keeper, now: BootTime) {
        let mut idle = Vec::new();
        for (shard, entry) in self.views.entries() {
            let mut state = entry.state.lock();
            let read = now.since(state.last_read) < READ_TERM;
            if let Some(open) = &state.open {
                let announced = self.parts.view.view_of(shard).is_some();
                let pinned = self.is_pinned(&open.volume, &open.pin);
                if !pinned && !open.lost.swap(true, Ordering::AcqRel) {
                    tracing::warn!(%shard, view = %open.pin.name, "the hold on a view was lost");
                }
                let lost = open.lost.load(Ordering::Acquire);
                if lost || !announced || !read || !self.backs_up(&open.volume) {
                    if lost {
                        let error = Error::unavailable("its view was lost");
                        state.refused = Some((error, now + OPEN_AGAIN));
                        state.open_after = now + OPEN_AGAIN;
                    }
                    keeper.retiring.extend(state.open.take());
                }
            }
            if !read && state.open.is_none() {
                idle.push(shard);
            }
        }
        if !idle.is_empty() {
            let mut shards = self.views.shards.write();
            // One that a call has in its hands is noted again by it.
            idle.iter().for_each(|shard| drop(shards.remove(shard)));
        }
    }

    /// Notes why a primary makes no view of shards.
    fn refuse(&self, shards: impl Iterator<Item = ShardId>, error: &Error) {
        let until = clock::boot() + ASK_AGAIN;
        for shard in shards {
            if let Some(entry) = self.views.shards.read().get(&shard) {
                entry.state.lock().refused = Some((error.clone(), until));
            }
        }
        self.views.tell();
    }

    /// Notes why views could not be opened.
    fn refuse_open(&self, shards: impl Iterator<Item = ShardId>, error: &Error) {
        let until = clock::boot() + OPEN_AGAIN;
        for shard in shards {
            if let Some(entry) = self.views.shards.read().get(&shard) {
                let mut state = entry.state.lock();
                state.refused = Some((error.clone(), until));
                state.open_after = until;
            }
        }
        self.views.tell();
    }

    /// Opens views of one volume that are announced.
    async fn open_views(
        self: &Arc<Self>,
        keeper: &mut Keeper,
        volume: &VolumeId,
        records: &[Kept<ViewRecord>],
    ) -> Result<()> {
        let Some(kept) = self.parts.view.volume(volume) else { return Ok(()) };
        self.make_place(keeper, volume, records.len())?;
        let fresh: Vec<Pinned> =
            records.iter().map(|kept| Pinned { shard: kept.record.shard, name: kept.record.name }).collect();
        let mut views = self.used(keeper, volume);
        views.extend(&fresh);
        let (store, view) = (&*self.parts.store, &*self.parts.view);
        let pinned =
            pins::pin(store, view, &self.parts.record, volume, views.into_iter().collect(), records).await?;
        // Else something has changed: the next look tells what.
        let Some(revision) = pinned else { return Ok(()) };
        view.wait_for(revision, SHOWN_WAIT_MAX).await?;
        let mount = self.mount(keeper, &kept.record, records).await?;
        for kept in records {
            let record = &kept.record;
            let pin = Pinned { shard: record.shard, name: record.name };
            let dir = view_dir(&mount.root.join(format!("shard-{}", record.shard)), record.name);
            match self.parts.manager.open_published(record.shard, dir, Box::new(mount.clone())).await {
                Ok(opened) => {
                    let true_at = (record.true_at(), self.parts.lease.before(record.true_at()));
                    let opened = Opened {
                        pin,
                        volume: volume.clone(),
                        view: Arc::new(opened),
                        last: record.last,
                        mount: mount.clone(),
                        true_at: Mutex::new(true_at),
                        lost: false.into(),
                        wanted_back: Arc::default(),
                        superseded: Mutex::default(),
                    };
                    self.show(keeper, Arc::new(opened));
                }
                Err(error) => {
                    self.views.figures.refused_unreadable.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(shard = %record.shard, view = %record.name, %error, "a view cannot be opened");
                    self.refuse_open(std::iter::once(record.shard), &error);
                }
            }
        }
        self.views.tell();
        Ok(())
    }

    /// Lets reads find a view, in the place of an earlier one.
    fn show(&self, keeper: &mut Keeper, opened: Arc<Opened>) {
        self.views.figures.opened.fetch_add(1, Ordering::Relaxed);
        let Some(entry) = self.views.entry(opened.pin.shard) else {
            keeper.retiring.push(opened);
            return;
        };
        let mut state = entry.state.lock();
        state.refused = None;
        tracing::debug!(shard = %opened.pin.shard, view = %opened.pin.name, sequence = opened.view.sequence(), "opened a view");
        keeper.retiring.extend(state.open.replace(opened));
    }

    /// Closes the longest unread views until there is a place for so many more.
    fn make_place(&self, keeper: &mut Keeper, volume: &VolumeId, more: usize) -> Result<()> {
        let mut open: Vec<(BootTime, Arc<Entry>)> = Vec::new();
        for (_, entry) in self.views.entries() {
            let state = entry.state.lock();
            if state.open.is_some() {
                let read = state.last_read;
                drop(state);
                open.push((read, entry));
            }
        }
        open.sort_unstable_by_key(|(read, _)| *read);
        let surplus = (open.len() + keeper.retiring.len() + more).saturating_sub(OPEN_MAX);
        for (_, entry) in open.iter().take(surplus) {
            keeper.retiring.extend(entry.state.lock().open.take());
        }
        let of_volume: Vec<&Arc<Mounted>> = keeper.mounts.iter().filter(|m| m.volume == *volume).collect();
        if of_volume.len() >= MOUNTS_MAX
            && let Some(oldest) = of_volume.into_iter().min_by_key(|mount| mount.revision).cloned()
        {
            // What is on the oldest comes back on the newest.
            for (_, entry) in &open {
                let mut state = entry.state.lock();
                if state.open.as_ref().is_some_and(|open| Arc::ptr_eq(&open.mount, &oldest)) {
                    keeper.retiring.extend(state.open.take());
                }
            }
            return Err(Error::unavailable("as many views are open as may be"));
        }
        Ok(())
    }

    /// What is used of a volume, and is held by a pin still.
    fn used(&self, keeper: &Keeper, volume: &VolumeId) -> BTreeSet<Pinned> {
        let open = self.views.open();
        let used = open
            .iter()
            .chain(&keeper.retiring)
            .filter(|opened| opened.volume == *volume && self.is_pinned(volume, &opened.pin));
        used.map(|opened| opened.pin).collect()
    }

    /// The volume as it was when these were announced, or later.
    async fn mount(
        &self,
        keeper: &mut Keeper,
        record: &VolumeRecord,
        records: &[Kept<ViewRecord>],
    ) -> Result<Arc<Mounted>> {
        let announced = records.iter().map(|kept| kept.modified).max().unwrap_or_default();
        let there = keeper.mounts.iter().find(|m| m.volume == record.id && m.revision >= announced);
        if let Some(mount) = there {
            return Ok(mount.clone());
        }
        // Before the device is made: what is announced by now is in place on it.
        let revision = self.parts.view.revision();
        keeper.count += 1;
        let at = self.views_folder(&record.id).join(keeper.count.to_string());
        let (spec, name) = (self.spec_of(record), record.provider.clone());
        let providers = self.parts.providers.clone();
        let mount = blocking(move || providers.get(&name)?.open_view(&spec, &at)).await?;
        let mounted = Arc::new(Mounted {
            volume: record.id.clone(),
            root: mount.root().to_owned(),
            revision,
            mount: Mutex::new(mount),
            retire_after: Mutex::default(),
        });
        keeper.mounts.push(mounted.clone());
        Ok(mounted)
    }

    /// Closes what nobody reads any more, with what it lies on, and lets go of its files.
    async fn retire(&self, keeper: &mut Keeper) {
        let now = clock::boot();
        for opened in &keeper.retiring {
            let since = *opened.superseded.lock().get_or_insert(now);
            if now.since(since) >= READERS_PATIENCE {
                opened.wanted_back.store(true, Ordering::Release);
            }
        }
        let (idle, read): (Vec<_>, Vec<_>) = std::mem::take(&mut keeper.retiring)
            .into_iter()
            .partition(|opened| Arc::strong_count(opened) == 1 && Arc::strong_count(&opened.view) == 1);
        keeper.retiring = read;
        if !idle.is_empty() {
            let close = move || {
                drop(idle);
                Ok(())
            };
            if let Err(error) = blocking(close).await {
                tracing::error!(%error, "closing views");
            }
        }
        let mut kept = Vec::new();
        for mount in std::mem::take(&mut keeper.mounts) {
            if Arc::strong_count(&mount) > 1 || *mount.retire_after.lock() > clock::boot() {
                kept.push(mount);
                continue;
            }
            let retiring = mount.clone();
            match blocking(move || retiring.mount.lock().retire()).await {
                Ok(retired) => {
                    let figures = &self.views.figures;
                    if let Some(sectors) = retired.sectors_written {
                        figures.devices_retired.fetch_add(1, Ordering::Relaxed);
                        figures.sectors_written.fetch_add(sectors, Ordering::Relaxed);
                        if sectors != 0 {
                            tracing::error!(volume = %mount.volume, sectors, "a view's device was written to");
                        }
                    }
                }
                Err(error) => {
                    // Somebody looks into it, or has copied all mounts into a mount namespace.
                    tracing::warn!(volume = %mount.volume, %error, "a view cannot be unmounted yet");
                    *mount.retire_after.lock() = clock::boot() + RETIRE_AGAIN;
                    kept.push(mount);
                }
            }
        }
        keeper.mounts = kept;
        self.unpin(keeper).await;
    }

    /// Lets go of what is no longer used.
    async fn unpin(&self, keeper: &Keeper) {
        for kept in self.parts.view.pins_of(&self.parts.node_id) {
            let record = &kept.record;
            if record.incarnation != self.parts.record.incarnation {
                continue;
            }
            let used = self.used(keeper, &record.volume);
            let left: Vec<Pinned> = record.views.iter().filter(|view| used.contains(view)).copied().collect();
            if left.len() == record.views.len() {
                continue;
            }
            let (store, view) = (&*self.parts.store, &*self.parts.view);
            match pins::pin(store, view, &self.parts.record, &record.volume, left, &[]).await {
                // The next pin demands this record.
                Ok(Some(revision)) => drop(view.wait_for(revision, SHOWN_WAIT_MAX).await),
                Ok(None) => {}
                Err(error) => tracing::debug!(volume = %record.volume, %error, "letting go of views: later"),
            }
        }
    }

    /// Tells the primary of a volume what is read here, in the background.
    fn ask(self: &Arc<Self>, keeper: &mut Keeper, volume: VolumeId, shards: Vec<ShardId>, max_age: Duration) {
        if !keeper.asking.lock().insert(volume.clone()) {
            return;
        }
        let asking = keeper.asking.clone();
        let client = self.asker(keeper);
        let this = self.clone();
        tokio::spawn(async move {
            let endpoints = this.parts.view.location(&volume).endpoints;
            for some in shards.chunks(PUBLISH_SHARDS_MAX) {
                let published = async {
                    let client = client.clone()?;
                    client.publish_views(&endpoints, &volume, some, max_age).await
                };
                match published.await {
                    Ok(young) => {
                        tracing::debug!(%volume, wanted = some.len(), young = young.len(), "asked for views");
                        let missing = some.iter().copied().filter(|shard| !young.contains(shard));
                        let error = Error::unavailable("its primary could make no view");
                        this.refuse(missing, &error);
                    }
                    Err(error) => {
                        tracing::debug!(%volume, %error, "asking for views");
                        this.refuse(some.iter().copied(), &error);
                    }
                }
            }
            asking.lock().remove(&volume);
            this.views.wake.notify_one();
        });
    }

    fn asker(&self, keeper: &mut Keeper) -> Result<Client> {
        if let Some(client) = &keeper.client {
            return Ok(client.clone());
        }
        let client = Client::new(ClientConfig {
            // Each call names whom it asks.
            endpoints: self.parts.record.endpoints.clone(),
            client_id: ClientId::new("shardfs-node")?,
            deadline: ASK_INTERVAL,
            label: self.parts.node_id.to_string(),
        })?;
        Ok(keeper.client.insert(client).clone())
    }
}
