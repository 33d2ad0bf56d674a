//! Publishes views of shards for backups to read, as the primary of their volumes.
//!
//! A round makes views of some shards of one volume: a checkpoint of each that has changed (hard links, and what was in memory), one
//! sync of the file system and one checkpoint of its journal, one transaction that announces them. Shards are published while
//! backups say that they are read there, and when they are closed; nobody else pays.
//!
//! Invariants: a view is announced only if the volume is this process's under the epoch that its name tells, and after its files
//! are in place; a view's files are deleted only if nobody needs them (`cluster/pins.rs`); one round a volume at a time, and none
//! after [`Publisher::stop`].

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{Epoch, Error, Reason, Result, ShardId, VolumeId, clock};

use super::Catalog;
use super::serving::{Served, blocking};
use crate::cluster::pins;
use crate::cluster::records::views::{Pinned, ViewName, ViewRecord, view_key};
use crate::cluster::records::{self, FORMAT, ShardRecord, StateWord};
use crate::cluster::store::{Demand, Revision, StoreError, Txn};
use crate::cluster::view::Kept;
use crate::volume::views::view_dir;
use decide::{INTEREST_TERM, Interest, disposable, is_current, pause};
use folders::{found, make_folder, remove};

mod decide;
mod folders;

/// Shards of one round: a transaction has a bounded number of conditions, two for each.
const ROUND_SHARDS_MAX: usize = 60;
/// Shards of a volume in which somebody is interested.
const INTEREST_MAX: usize = 1024;
/// Views of one shard that are there at a time: a reader that keeps older ones keeps their space, so no more are made.
const VIEWS_MAX: usize = 8;
/// With less room for growth than this no view is made: it keeps what would be freed.
const ROOM_MIN_BYTES: u64 = 128 << 20;
/// How long our own announcement takes to show at most.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long a stop waits for the round that is under way.
const STOP_WAIT_MAX: Duration = Duration::from_secs(10);
/// How often is looked for views that nobody needs any more.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// How long a deletion waits for those who read the shard on backups.
const RELEASE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause between looks.
const RELEASE_PAUSE: Duration = Duration::from_millis(100);

/// The views of one volume.
#[derive(Default)]
pub(super) struct Publisher {
    interest: Mutex<BTreeMap<ShardId, Interest>>,
    round: tokio::sync::Mutex<Round>,
    stopped: AtomicBool,
}

/// What rounds know.
#[derive(Default)]
struct Round {
    /// Of the last view that was tried.
    number: u64,
    /// The views whose folders are there; `None`: not looked yet.
    there: Option<BTreeMap<ShardId, BTreeSet<ViewName>>>,
    /// Views that may have been announced: the store did not say.
    doubtful: HashSet<Pinned>,
    /// The revision of the last announcement.
    announced: Revision,
    swept: Option<Instant>,
}

/// A shard that is part of a round.
struct Made {
    record: ViewRecord,
    /// What the announcement replaces.
    before: Demand,
    shard: Kept<ShardRecord>,
    fresh: bool,
}

impl Publisher {
    /// No round begins any more; waits for the one under way.
    pub(super) async fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        if tokio::time::timeout(STOP_WAIT_MAX, self.round.lock()).await.is_err() {
            tracing::warn!("a view is still being published while its volume is given up");
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Notes that shards are read on backups. Answers those for which there was room.
    fn note(&self, shards: &[ShardId], pause: Duration, now: Instant) -> Vec<ShardId> {
        let mut interest = self.interest.lock();
        let fits = |shard: &&ShardId| interest.len() < INTEREST_MAX || interest.contains_key(*shard);
        let noted: Vec<ShardId> = shards.iter().filter(fits).take(INTEREST_MAX).copied().collect();
        for shard in &noted {
            let new = Interest { until: now + INTEREST_TERM, pause, begun: None };
            let entry = interest.entry(*shard).or_insert(new);
            *entry = entry.renewed(pause, now);
        }
        noted
    }

    /// The shards that are due, which are taken for begun.
    fn take_due(&self, now: Instant) -> Vec<ShardId> {
        let mut interest = self.interest.lock();
        interest.retain(|_, interest| interest.until > now);
        let due = interest.iter_mut().filter(|(_, interest)| interest.is_due(now)).take(ROUND_SHARDS_MAX);
        due.map(|(shard, interest)| {
            interest.begun = Some(now);
            *shard
        })
        .collect()
    }

    fn begun(&self, shard: ShardId, now: Instant) {
        if let Some(interest) = self.interest.lock().get_mut(&shard) {
            interest.begun = Some(now);
        }
    }

    /// Nobody reads a shard that is not there.
    fn forget(&self, shard: ShardId) {
        self.interest.lock().remove(&shard);
    }

    fn is_wanted(&self, shard: ShardId) -> bool {
        self.interest.lock().contains_key(&shard)
    }
}

impl Catalog {
    /// Publishes views of shards that are read on backups, unless there are young ones, and keeps doing so while they are read. Answers
    /// the shards of which there is a young view.
    pub async fn publish_views(
        self: &Arc<Self>,
        volume: &VolumeId,
        epoch: Option<Epoch>,
        shards: &[ShardId],
        max_age: Duration,
    ) -> Result<Vec<ShardId>> {
        let every = self.tunable().publish_every;
        if every.is_zero() {
            return Err(Error::new(
                Reason::Unsupported,
                format!("{} publishes no views: it runs with --publish-every 0", self.parts.node_id),
            ));
        }
        let location = self.parts.view.location(volume);
        let served = self.serving.get(volume).filter(|served| {
            served.epoch == location.epoch && epoch.is_none_or(|epoch| epoch == served.epoch)
        });
        let Some(served) = served else {
            let message = format!("volume {volume} is not served here");
            return Err(Error::new(Reason::NotPrimary, message).with_location(location));
        };
        let now = clock::monotonic();
        let pause = pause(every, max_age);
        let wanted = served.publisher.note(shards, pause, now);
        let this = self.clone();
        // A caller that goes away does not cut it off.
        let round = tokio::spawn(async move {
            let mut young = Vec::new();
            for some in wanted.chunks(ROUND_SHARDS_MAX) {
                young.extend(this.publish(&served, some, pause).await?);
            }
            Ok(young)
        });
        round.await.map_err(|e| Error::internal(format!("publishing: {e}")))?
    }

    /// What is due, of all volumes; and what nobody needs any more goes.
    pub(super) fn publish_due(self: &Arc<Self>) {
        for served in self.serving.all() {
            // One that is at it takes up what is due when it comes by next.
            if served.publisher.round.try_lock().is_err() {
                continue;
            }
            let this = self.clone();
            tokio::spawn(async move {
                let due = served.publisher.take_due(clock::monotonic());
                if !due.is_empty()
                    && let Err(error) = this.publish(&served, &due, Duration::ZERO).await
                {
                    tracing::warn!(volume = %served.id, %error, "publishing views");
                }
                if let Err(error) = this.tidy(&served).await {
                    tracing::debug!(volume = %served.id, %error, "tidying views up");
                }
            });
        }
    }

    /// Publishes the last view of a closed shard; what fails is done by a later pass.
    pub(super) async fn publish_last(&self, shard: ShardId) {
        let Some(kept) = self.parts.view.shard(shard) else { return };
        let Some(served) = self.serving.get(&kept.record.volume) else { return };
        let volume = self.parts.view.volume(&served.id);
        let done = self.parts.view.view_of(shard).is_some_and(|view| view.record.last);
        if done
            || self.tunable().publish_every.is_zero()
            || volume.is_none_or(|volume| volume.record.backups.is_empty())
        {
            return;
        }
        if let Err(error) = self.publish(&served, &[shard], Duration::ZERO).await {
            tracing::warn!(%shard, %error, "publishing the last view of a closed shard: later");
        }
    }

    /// The closed shards of a volume whose last view is missing.
    pub(super) async fn publish_missing(&self, volume: &VolumeId) {
        let closed = |record: &ShardRecord| record.volume == *volume && record.state == StateWord::ReadOnly;
        for kept in self.parts.view.shards(closed) {
            if self.stop.is_cancelled() {
                return;
            }
            self.publish_last(kept.record.id).await;
        }
    }

    /// One round: views of these shards that are true now, unless there is one that was within `young`. Answers the shards that have
    /// such a view now.
    async fn publish(
        &self,
        served: &Arc<Served>,
        shards: &[ShardId],
        young: Duration,
    ) -> Result<Vec<ShardId>> {
        let mut round = served.publisher.round.lock().await;
        let begun = clock::monotonic();
        let gone = || Error::unavailable(format!("volume {} is being given up", served.id));
        if served.publisher.is_stopped() {
            return Err(gone());
        }
        let view = &self.parts.view;
        let volume = view.volume(&served.id).filter(|kept| kept.record.epoch == served.epoch);
        let volume = volume.ok_or_else(gone)?;
        self.look(served, &mut round).await?;
        let (mut done, mut made) = (Vec::new(), Vec::new());
        // Before any shard is looked at: what was acknowledged by then is in the views.
        let seen = view.revision();
        for shard in shards.iter().take(ROUND_SHARDS_MAX) {
            if served.publisher.is_stopped() {
                return Err(gone());
            }
            if !young.is_zero() && self.age_of_view(*shard).is_some_and(|age| age < young) {
                done.push(*shard);
                continue;
            }
            // Backups say until they see its deletion that they read it.
            if view
                .shard(*shard)
                .is_none_or(|kept| kept.record.volume != served.id || kept.record.state == StateWord::Deleted)
            {
                served.publisher.forget(*shard);
                continue;
            }
            // It is being deleted, or rolled back: what becomes of it shows later.
            if self.fenced.lock().contains(shard) {
                continue;
            }
            // The next one is due after this one, not after who says that there is a young one.
            served.publisher.begun(*shard, clock::monotonic());
            match self.make_view(served, *shard, seen, &mut round).await {
                Ok(one) => made.push(one),
                Err(error) => {
                    self.views.figures.publish_failures.fetch_add(1, Ordering::Relaxed);
                    match error.reason() {
                        // They pass, and are asked for again every second.
                        Reason::VolumeFull | Reason::Busy => {
                            tracing::debug!(%shard, %error, "a view cannot be made yet");
                        }
                        _other => tracing::warn!(%shard, %error, "a view cannot be made"),
                    }
                }
            }
        }
        if made.is_empty() {
            return Ok(done);
        }
        if made.iter().any(|one| one.fresh) {
            let (name, root) = (served.provider.clone(), served.root.clone());
            let providers = self.parts.providers.clone();
            blocking(move || providers.get(&name)?.settle(&root)).await?;
        }
        // A sync of a file system that was fenced may have lied.
        served.prove().await?;
        let revision = self.announce(served, &volume, &made, &mut round).await?;
        tracing::debug!(volume = %served.id, shards = made.len(), ms = begun.elapsed().as_millis() as u64, "published");
        done.extend(made.iter().map(|one| one.record.shard));
        view.wait_for(revision, SHOWN_WAIT_MAX).await?;
        self.sweep(served, &mut round).await?;
        Ok(done)
    }

    /// How long ago the view of a shard that is announced was true; `None`: there is none, or it is long ago.
    fn age_of_view(&self, shard: ShardId) -> Option<Duration> {
        let record = self.parts.view.view_of(shard)?.record;
        if record.last {
            return Some(Duration::ZERO);
        }
        Some(clock::boot().since(self.parts.lease.before(record.true_at())?))
    }

    /// A view of one shard, announced or not: the files of one, or that the one there is true still.
    async fn make_view(
        &self,
        served: &Arc<Served>,
        id: ShardId,
        seen: Revision,
        round: &mut Round,
    ) -> Result<Made> {
        let view = &self.parts.view;
        let kept = view.shard(id).filter(|kept| {
            kept.record.volume == served.id
                && matches!(kept.record.state, StateWord::Active | StateWord::ReadOnly)
        });
        let kept = kept.filter(|_| !self.fenced.lock().contains(&id));
        let kept = kept.ok_or_else(|| Error::not_found(format!("shard {id} is not on this volume")))?;
        let announced = view.view_of(id);
        let before = announced.as_ref().map_or(Demand::Absent, |old| Demand::Modified(old.modified));
        let dir = served.shard_dir(id);
        let shard = self.parts.manager.open(id, &dir, served.room()).await?;
        let closed = shard.usage().state == ShardState::ReadOnly;
        let sequence = shard.sequence();
        if let Some(old) = announced.filter(|old| is_current(Some(&old.record), sequence, closed)) {
            let record = ViewRecord { true_at: seen.get(), ..(*old.record).clone() };
            return Ok(Made { record, before, shard: kept, fresh: false });
        }
        if served.room.growth_bytes() < ROOM_MIN_BYTES {
            return Err(Error::new(Reason::VolumeFull, "the volume has too little room for views"));
        }
        let there = round.there.get_or_insert_default().entry(id).or_default();
        if there.len() >= VIEWS_MAX {
            return Err(Error::new(
                Reason::Busy,
                format!(
                    "{VIEWS_MAX} views of shard {id} are in use by backups: no more are made until one is left"
                ),
            ));
        }
        round.number += 1;
        let name = ViewName::new(served.epoch, round.number);
        there.insert(name);
        make_folder(&dir).await?;
        shard.checkpoint(view_dir(&dir, name)).await?;
        self.views.figures.published.fetch_add(1, Ordering::Relaxed);
        let record = ViewRecord {
            v: FORMAT,
            shard: id,
            volume: served.id.clone(),
            name,
            sequence,
            true_at: seen.get(),
            last: closed,
        };
        Ok(Made { record, before, shard: kept, fresh: true })
    }

    async fn announce(
        &self,
        served: &Served,
        volume: &Kept<records::VolumeRecord>,
        made: &[Made],
        round: &mut Round,
    ) -> Result<Revision> {
        let mut txn = Txn::new().when(records::volume_key(&served.id), Demand::Modified(volume.modified));
        for one in made {
            let key = view_key(&served.id, one.record.shard);
            txn = txn
                .when(key.clone(), one.before.clone())
                .when(records::shard_key(one.record.shard), Demand::Modified(one.shard.modified))
                .put(key, records::encode(&one.record));
        }
        let fresh = || {
            let fresh = made.iter().filter(|one| one.fresh);
            fresh.map(|one| Pinned { shard: one.record.shard, name: one.record.name })
        };
        match self.parts.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {
                // What was in doubt demanded the record that this one has replaced.
                round.doubtful.retain(|view| made.iter().all(|one| one.record.shard != view.shard));
                round.announced = answer.revision;
                Ok(answer.revision)
            }
            Ok(_) => Err(Error::unavailable("a record has changed meanwhile: the views are made anew")),
            Err(StoreError::OutcomeUnknown(why)) => {
                round.doubtful.extend(fresh());
                Err(Error::unavailable(format!("whether the views were announced is not known: {why}")))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Looks once which folders of views there are: those of earlier epochs, and what a crash left half-made.
    async fn look(&self, served: &Arc<Served>, round: &mut Round) -> Result<()> {
        if round.there.is_some() {
            return Ok(());
        }
        let root = served.root.clone();
        round.there = Some(blocking(move || found(&root)).await?);
        // Whoever reads them says so soon; until then they stay.
        let old = self.parts.view.views_on(&served.id);
        let old: Vec<ShardId> =
            old.iter().filter(|kept| !kept.record.last).map(|kept| kept.record.shard).collect();
        let every = pause(self.tunable().publish_every, Duration::ZERO);
        served.publisher.note(&old, every, clock::monotonic());
        Ok(())
    }

    /// Takes back announcements of what nobody reads any more, and deletes files that nobody needs.
    async fn tidy(&self, served: &Arc<Served>) -> Result<()> {
        let Ok(mut round) = served.publisher.round.try_lock() else { return Ok(()) };
        if served.publisher.is_stopped()
            || round.swept.is_some_and(|swept| swept.elapsed() < SWEEP_INTERVAL)
            || !self.parts.lease.succeeded()
        {
            return Ok(());
        }
        self.look(served, &mut round).await?;
        let unwanted: Vec<Kept<ViewRecord>> = self
            .parts
            .view
            .views_on(&served.id)
            .into_iter()
            .filter(|kept| !kept.record.last && !served.publisher.is_wanted(kept.record.shard))
            .collect();
        self.withdraw(served, &unwanted).await?;
        pins::break_abandoned(&*self.parts.store, &self.parts.view, &served.id).await?;
        self.sweep(served, &mut round).await?;
        round.swept = Some(clock::monotonic());
        Ok(())
    }

    /// Takes announcements back.
    async fn withdraw(&self, served: &Served, views: &[Kept<ViewRecord>]) -> Result<()> {
        let Some(volume) =
            self.parts.view.volume(&served.id).filter(|kept| kept.record.epoch == served.epoch)
        else {
            return Ok(());
        };
        for some in views.chunks(ROUND_SHARDS_MAX) {
            let mut txn = Txn::new().when(records::volume_key(&served.id), Demand::Modified(volume.modified));
            for kept in some {
                let key = view_key(&served.id, kept.record.shard);
                txn = txn.when(key.clone(), Demand::Modified(kept.modified)).delete(key);
            }
            let answer = self.parts.store.txn(txn).await?;
            if answer.succeeded {
                self.parts.view.wait_for(answer.revision, SHOWN_WAIT_MAX).await?;
            }
        }
        Ok(())
    }

    /// Deletes the files of views that nobody needs.
    async fn sweep(&self, served: &Arc<Served>, round: &mut Round) -> Result<()> {
        let view = &self.parts.view;
        if view.revision() < round.announced {
            return Ok(());
        }
        let Some(there) = &mut round.there else { return Ok(()) };
        let pinned: HashSet<Pinned> =
            view.pins_on(&served.id).iter().flat_map(|kept| kept.record.views.clone()).collect();
        for (shard, names) in there.iter_mut() {
            let announced = view.view_of(*shard).map(|kept| kept.record.name);
            for name in disposable(*shard, names, announced, &pinned, &round.doubtful) {
                let folder = view_dir(&served.shard_dir(*shard), name);
                blocking(move || remove(&folder)).await?;
                names.remove(&name);
                tracing::debug!(%shard, view = %name, "removed a view");
            }
        }
        there.retain(|_, names| !names.is_empty());
        Ok(())
    }

    /// Takes the views of a shard that is to be deleted from those who read them. Whether that is done: if not, it is to be
    /// tried later.
    pub(super) async fn release_views(&self, served: &Arc<Served>, shard: ShardId) -> bool {
        served.publisher.forget(shard);
        let begun = clock::monotonic();
        loop {
            let view = &self.parts.view;
            let announced: Vec<Kept<ViewRecord>> = view.view_of(shard).into_iter().collect();
            if let Err(error) = self.withdraw(served, &announced).await {
                tracing::debug!(%shard, %error, "taking back a view");
            }
            let used = |pin: &Kept<_>| {
                let pin: &crate::cluster::records::views::PinRecord = &pin.record;
                pin.views.iter().any(|view| view.shard == shard)
            };
            if view.view_of(shard).is_none() && !view.pins_on(&served.id).iter().any(used) {
                return true;
            }
            if begun.elapsed() >= RELEASE_WAIT_MAX || self.stop.is_cancelled() {
                tracing::info!(%shard, "a deleted shard is still read on a backup: its bytes go later");
                return false;
            }
            // What fails is tried again.
            let _ = pins::break_abandoned(&*self.parts.store, view, &served.id).await;
            tokio::time::sleep(RELEASE_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests;
