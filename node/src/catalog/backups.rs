//! Backups of volumes: each an image of the whole volume at one moment, with a manifest on it of the shards that it holds.
//!
//! The order: a record that says that it is being made, and where; the shards' memory is written to their files and the journal is put in
//! place, so that whoever restores it has little to replay; the manifest; the image; the record says that it is done. Nothing is frozen, see
//! [`volume::images`](crate::volume::images). Everything that was acknowledged as durable before the call is in it, and of everything
//! that was written meanwhile a prefix of each shard's order.
//!
//! Invariants: while the manifest and the image are made, no shard of the volume is closed, deleted, rolled back or renamed, so every shard
//! that the manifest names is in the image; a backup counts only if the volume was this node's after the image was taken; what a crash
//! leaves is found by its record, is listed as failed, and goes with `backup delete` or when its schedule has a later one.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use shardfs_proto::types::backups::{BackupInfo, BackupSchedule, BackupState};
use shardfs_proto::types::{Error, Reason, Result, ShardId, VolumeId, clock};

use super::serving::{Served, blocking};
use super::{Catalog, StateWord};
use crate::cluster::plan::Health;
use crate::cluster::records::backups::{
    BACKUPS, BackupRecord, BackupWord, SCHEDULES, ScheduleRecord, backup_key, backups_of, check_id, new_id,
    schedule_key,
};
use crate::cluster::records::{self, FORMAT, ShardRecord};
use crate::cluster::store::{Demand, KeyRange, Revision, StoreError, Txn, get, range_all};
use crate::cluster::view::Kept;
use crate::volume::images::{self, Image};
use crate::volume::{AWS, VolumeSpec};
use manifest::Manifest;
use schedule::{Due, EVERY_S_MIN, KEEP_MAX, Seen, due};

mod in_place;
mod manifest;
mod restore;
mod schedule;
mod verify;

/// How long the shards' changes are waited for that are under way.
const LOCKS_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long taking an image may last.
const IMAGE_WAIT_MAX: Duration = Duration::from_secs(180);
/// How often a transaction whose outcome is not known is looked at again.
const SETTLE_ATTEMPTS_MAX: usize = 8;
/// Pause between two looks.
const SETTLE_PAUSE: Duration = Duration::from_millis(200);

/// What a node has under way of backups.
#[derive(Default)]
pub(super) struct Backups {
    /// One is taken at a time.
    taking: tokio::sync::Mutex<()>,
    /// One image is laid down at a time, at one place.
    copying: tokio::sync::Mutex<()>,
    /// What is due is being done.
    round: AtomicBool,
    /// Backups that this process is taking: what it has noted of others may be out of date.
    making: parking_lot::Mutex<HashSet<String>>,
    /// Keys of records that say of backups that this process takes them, and it has stopped without a word.
    abandoned: parking_lot::Mutex<HashSet<String>>,
}

/// A backup is being taken for as long as this lives.
struct Making<'a> {
    backups: &'a Backups,
    id: String,
    key: String,
    /// Its record tells what became of it.
    is_told: bool,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if !self.is_told {
            self.backups.abandoned.lock().insert(self.key.clone());
        }
        self.backups.making.lock().remove(&self.id);
    }
}

/// The round is over when this goes, whatever became of it.
struct Round(Arc<Catalog>);

impl Drop for Round {
    fn drop(&mut self) {
        self.0.backups.round.store(false, Ordering::Release);
    }
}

impl Catalog {
    /// Takes a backup of a volume that this node serves.
    pub async fn create_backup(self: &Arc<Self>, volume: &VolumeId) -> Result<BackupInfo> {
        self.refresh().await?;
        self.back_up(volume, false).await
    }

    async fn back_up(self: &Arc<Self>, volume: &VolumeId, scheduled: bool) -> Result<BackupInfo> {
        let served = self.served_volume(volume)?;
        let this = self.clone();
        self.to_the_end(async move {
            let _one = this.backups.taking.lock().await;
            this.take_backup(&served, scheduled).await
        })
        .await
    }

    async fn take_backup(self: &Arc<Self>, served: &Arc<Served>, scheduled: bool) -> Result<BackupInfo> {
        let volume = self.kept(&served.id)?.record;
        let spec = self.spec_of(&volume);
        let begun = clock::now();
        let id = new_id(begun, fastrand::u64(..));
        let place = {
            let provider = self.parts.providers.get(&served.provider)?;
            provider
                .images()
                .and_then(|images| images.image_place(&spec, &id, self.parts.backup_dir.as_deref()))
        };
        let record = BackupRecord {
            v: FORMAT,
            id,
            volume: volume.id.clone(),
            provider: volume.provider.clone(),
            image: place.map_err(|e| e.context(format!("volume {}", volume.id)))?,
            source: volume.source.clone(),
            begun,
            bytes: volume.size_bytes,
            shards: 0,
            state: BackupWord::Making,
            why: String::new(),
            scheduled,
            node: self.parts.node_id.clone(),
            incarnation: self.parts.record.incarnation.clone(),
        };
        let key = backup_key(&record.volume, &record.id);
        self.backups.making.lock().insert(record.id.clone());
        let mut making =
            Making { backups: &self.backups, id: record.id.clone(), key: key.clone(), is_told: false };
        let noted = self.note(&key, &record, Demand::Absent).await?;
        fail::fail_point!("backup::noted", |_| Err(Error::unavailable("failpoint")));
        let taken = self.take_image(served, spec, &record).await;
        fail::fail_point!("backup::taken", |_| Err(Error::unavailable("failpoint")));
        let outcome = match &taken {
            Ok((image, shards)) => {
                BackupRecord { image: image.clone(), shards: *shards, state: BackupWord::Done, ..record }
            }
            Err(error) => {
                BackupRecord { state: BackupWord::Failed, why: error.message().to_owned(), ..record }
            }
        };
        match self.note(&key, &outcome, Demand::Modified(noted)).await {
            Ok(_) => making.is_told = true,
            // It was deleted meanwhile: somebody took this process for dead.
            Err(error) if error.reason() == Reason::VersionMismatch => {
                making.is_told = true;
                self.drop_image(&outcome).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        taken.map_err(|e| e.context(format!("volume {}: no backup was taken", outcome.volume)))?;
        tracing::info!(volume = %outcome.volume, backup = outcome.id, image = outcome.image, shards = outcome.shards,
            ms = begun_ms(begun), "backed up");
        Ok(self.backup_info(&outcome))
    }

    /// Where the image is, and how many shards are in it.
    async fn take_image(
        &self,
        served: &Arc<Served>,
        spec: VolumeSpec,
        record: &BackupRecord,
    ) -> Result<(String, u32)> {
        // While calls are answered; whoever opens the image has less to replay.
        self.flush_volume(served).await;
        let locks = self.lock_shards(&served.id);
        let locks = tokio::time::timeout(LOCKS_WAIT_MAX, locks).await.map_err(|_| {
            Error::unavailable("a shard of it is being changed for long: try again").with_retry_after_ms(500)
        })?;
        let shards = self.shards_in_use(&served.id);
        let count = u32::try_from(shards.len()).unwrap_or(u32::MAX);
        let manifest = Manifest::of(record, &self.parts.cluster_id, shards.iter().map(|kept| &*kept.record));
        let (providers, name) = (self.parts.providers.clone(), served.provider.clone());
        let (image, root) = (self.image_of(record), served.root.clone());
        let taking = blocking(move || {
            manifest.write(&root)?;
            let provider = providers.get(&name)?;
            if let Err(error) = provider.settle(&root) {
                tracing::debug!(%error, "the journal is not put in place before the backup: it is replayed");
            }
            provider.images()?.back_up(&spec, &image)
        });
        let place = tokio::time::timeout(IMAGE_WAIT_MAX, taking).await.unwrap_or_else(|_| {
            Err(Error::unavailable(format!("it is not there after {} s", IMAGE_WAIT_MAX.as_secs())))
        })?;
        drop(locks);
        // Else the manifest may be a deposed node's.
        served.prove().await?;
        let ours = self.parts.view.volume(&served.id).is_some_and(|kept| {
            kept.record.epoch == served.epoch && kept.record.primary.as_ref() == Some(&self.parts.node_id)
        });
        if !ours {
            return Err(Error::unavailable(format!("volume {} has moved meanwhile", served.id)));
        }
        Ok((place, count))
    }

    /// The shards of a volume that are in use.
    fn shards_in_use(&self, volume: &VolumeId) -> Vec<Kept<ShardRecord>> {
        self.parts.view.shards(|record| {
            record.volume == *volume && matches!(record.state, StateWord::Active | StateWord::ReadOnly)
        })
    }

    /// Has no shard of a volume change, those left out that come meanwhile. In the order of ids, as everybody locks them.
    async fn lock_shards(&self, volume: &VolumeId) -> Vec<tokio::sync::OwnedMutexGuard<()>> {
        let ids: Vec<ShardId> = self.shards_in_use(volume).iter().map(|kept| kept.record.id).collect();
        let mut locks = Vec::with_capacity(ids.len());
        for id in ids {
            locks.push(self.locks.lock(id).await);
        }
        locks
    }

    /// The backups of a volume or of all, oldest first.
    pub async fn list_backups(&self, volume: Option<&VolumeId>) -> Result<Vec<BackupInfo>> {
        // By an old copy, who takes one would be taken for dead.
        self.refresh().await?;
        let mut infos: Vec<BackupInfo> =
            self.backup_records(volume).await?.iter().map(|(record, _)| self.backup_info(record)).collect();
        infos.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(infos)
    }

    async fn backup_records(&self, volume: Option<&VolumeId>) -> Result<Vec<(BackupRecord, Revision)>> {
        let prefix = volume.map_or_else(|| BACKUPS.to_owned(), backups_of);
        let kvs = range_all(&*self.parts.store, KeyRange::prefix(prefix)).await?.kvs;
        kvs.iter().map(|kv| Ok((records::decode(&kv.key, &kv.value)?, kv.modified))).collect()
    }

    async fn find_backup(&self, id: &str) -> Result<Option<(BackupRecord, Revision)>> {
        check_id(id)?;
        let mut found = self.backup_records(None).await?;
        found.retain(|(record, _)| record.id == id);
        if let [(one, _), (other, _), ..] = &found[..] {
            return Err(Error::invalid(format!(
                "{id} is a backup of {} and one of {}, by chance: one of them has to go with its volume's schedule first",
                one.volume, other.volume
            )));
        }
        Ok(found.pop())
    }

    /// A backup that can be used.
    async fn usable_backup(&self, id: &str) -> Result<BackupRecord> {
        self.refresh().await?;
        let found = self.find_backup(id).await?;
        let (record, _) = found.ok_or_else(|| Error::not_found(format!("there is no backup {id}")))?;
        match self.backup_info(&record) {
            BackupInfo { state: BackupState::Done, .. } => Ok(record),
            BackupInfo { state, why, .. } => {
                let why = if why.is_empty() { why } else { format!(" ({why})") };
                Err(Error::invalid(format!("the backup {id} cannot be used: it is {}{why}", state.as_str())))
            }
        }
    }

    /// Whether the process that takes a backup may be at it still.
    fn is_being_made(&self, record: &BackupRecord) -> bool {
        if record.incarnation == self.parts.record.incarnation {
            return record.state == BackupWord::Making && self.backups.making.lock().contains(&record.id);
        }
        let same = |kept: &Kept<records::NodeRecord>| kept.record.incarnation == record.incarnation;
        record.state == BackupWord::Making
            && self.parts.view.node(&record.node).as_ref().is_some_and(same)
            && !matches!(self.parts.view.health(&record.node), Health::Dead(_) | Health::Absent)
    }

    fn backup_info(&self, record: &BackupRecord) -> BackupInfo {
        let (state, why) = match record.state {
            BackupWord::Making if self.is_being_made(record) => (BackupState::Making, String::new()),
            BackupWord::Making => (BackupState::Failed, format!("{} ended while it was taken", record.node)),
            BackupWord::Done => (BackupState::Done, String::new()),
            BackupWord::Failed => (BackupState::Failed, record.why.clone()),
            BackupWord::Deleting => (BackupState::Deleting, String::new()),
        };
        BackupInfo {
            id: record.id.clone(),
            volume: record.volume.clone(),
            provider: record.provider.clone(),
            image: record.image.clone(),
            begun: record.begun,
            bytes: record.bytes,
            shards: record.shards,
            state,
            why,
            scheduled: record.scheduled,
        }
    }

    fn image_of(&self, record: &BackupRecord) -> Image {
        Image {
            backup: record.id.clone(),
            volume: record.volume.clone(),
            cluster_id: self.parts.cluster_id.clone(),
            place: record.image.clone(),
        }
    }

    /// Fails unless this node reaches a backup's image, and it looks like one; says which node has it. Changes nothing.
    async fn check_image(&self, record: &BackupRecord) -> Result<()> {
        if record.provider == AWS {
            return Ok(());
        }
        let image = PathBuf::from(&record.image);
        if blocking(move || images::check_image_there(&image)).await? {
            return Ok(());
        }
        let (id, image, maker, me) = (&record.id, &record.image, &record.node, &self.parts.node_id);
        Err(Error::not_found(if maker == me {
            format!("the image of the backup {id} is gone: there is no {image} on {me}. Nothing was changed")
        } else {
            format!(
                "the image of the backup {id} is not on this node: there is no {image} on {me}. {maker} has taken it: restore or verify it where that file is (into a new volume with `--nodes {maker}`), or bring it here under this name. Nothing was changed"
            )
        }))
    }

    /// Whether a backup's image is there, or this is a node from which it would be seen.
    async fn reaches_image(&self, record: &BackupRecord) -> Result<bool> {
        let me = &self.parts.node_id;
        let is_of_volume =
            self.parts.view.volume(&record.volume).is_none_or(|kept| {
                kept.record.primary.as_ref() == Some(me) || kept.record.backups.contains(me)
            });
        if record.provider == AWS || record.node == *me || is_of_volume {
            return Ok(true);
        }
        let image = PathBuf::from(&record.image);
        blocking(move || Ok(image.exists())).await
    }

    async fn drop_image(&self, record: &BackupRecord) -> Result<()> {
        let (providers, name, image) =
            (self.parts.providers.clone(), record.provider.clone(), self.image_of(record));
        blocking(move || providers.get(&name)?.images()?.drop_image(&image)).await
    }

    /// Deletes a backup with its image; one that has gone is none any more.
    pub async fn delete_backup(self: &Arc<Self>, id: &str) -> Result<()> {
        self.refresh().await?;
        let Some((record, modified)) = self.find_backup(id).await? else { return Ok(()) };
        self.delete_found(record, modified).await
    }

    async fn delete_found(self: &Arc<Self>, record: BackupRecord, modified: Revision) -> Result<()> {
        let id = &record.id;
        if self.is_being_made(&record) {
            return Err(Error::invalid(format!(
                "the backup {id} is being taken by {}: wait for it",
                record.node
            )));
        }
        // Else its record would go, and the image stay where nobody finds it.
        if !self.reaches_image(&record).await? {
            return Err(Error::invalid(format!(
                "the image {} of the backup {id} is not on {}, which is no node of volume {}: ask {}, which has taken it, or a node of the volume",
                record.image, self.parts.node_id, record.volume, record.node
            )));
        }
        let this = self.clone();
        self.to_the_end(async move {
            let key = backup_key(&record.volume, &record.id);
            let doomed = BackupRecord { state: BackupWord::Deleting, ..record };
            let modified = this.note(&key, &doomed, Demand::Modified(modified)).await?;
            fail::fail_point!("backup::delete::noted", |_| Err(Error::unavailable("failpoint")));
            this.drop_image(&doomed).await.map_err(|e| e.context(format!("the backup {}", doomed.id)))?;
            let gone = Txn::new().when(key.clone(), Demand::Modified(modified)).delete(key);
            this.parts.store.txn(gone).await?;
            tracing::info!(volume = %doomed.volume, backup = doomed.id, "a backup is deleted");
            Ok(())
        })
        .await
    }

    /// Has backups of a volume taken again and again; `every_s` 0: no more are.
    pub async fn set_backup_schedule(&self, volume: &VolumeId, every_s: u64, keep: u32) -> Result<()> {
        self.refresh().await?;
        let key = schedule_key(volume);
        if every_s == 0 {
            self.parts.store.txn(Txn::new().delete(key)).await?;
            return Ok(());
        }
        if every_s < EVERY_S_MIN || !(1..=KEEP_MAX).contains(&keep) {
            return Err(Error::invalid(format!(
                "a schedule has {EVERY_S_MIN} s at least between two backups, and keeps 1 to {KEEP_MAX} of them"
            )));
        }
        let kept = self.kept(volume)?;
        self.parts
            .providers
            .get(&kept.record.provider)?
            .images()
            .map_err(|e| e.context(format!("volume {volume}")))?;
        let last = match get(&*self.parts.store, key.clone()).await?.1 {
            Some(kv) => records::decode::<ScheduleRecord>(&kv.key, &kv.value)?.last,
            None => None,
        };
        let schedule = ScheduleRecord { v: FORMAT, volume: volume.clone(), every_s, keep, last };
        self.parts.store.txn(Txn::new().put(key, records::encode(&schedule))).await?;
        Ok(())
    }

    /// All schedules, in order of their volumes.
    pub async fn backup_schedules(&self) -> Result<Vec<BackupSchedule>> {
        let shown = |(schedule, _): (ScheduleRecord, Revision)| BackupSchedule {
            volume: schedule.volume,
            every_s: schedule.every_s,
            keep: schedule.keep,
            last: schedule.last,
        };
        Ok(self.schedule_records().await?.into_iter().map(shown).collect())
    }

    async fn schedule_records(&self) -> Result<Vec<(ScheduleRecord, Revision)>> {
        let kvs = range_all(&*self.parts.store, KeyRange::prefix(SCHEDULES)).await?.kvs;
        kvs.iter().map(|kv| Ok((records::decode(&kv.key, &kv.value)?, kv.modified))).collect()
    }

    /// Begins what is due on the volumes of this node, unless that is being done.
    pub(super) fn back_up_due(self: &Arc<Self>) {
        if (self.serving.all().is_empty() && self.backups.abandoned.lock().is_empty())
            || !self.parts.lease.succeeded()
            || self.backups.round.swap(true, Ordering::AcqRel)
        {
            return;
        }
        let round = Round(self.clone());
        tokio::spawn(async move {
            if let Err(error) = round.0.back_up_round().await {
                tracing::warn!(%error, "backups that are due: later");
            }
        });
    }

    /// Has the records say that the backups have failed that this process has stopped to take: by their word it would be at them for as long
    /// as it lives, and no schedule would take another one.
    async fn give_up_abandoned(&self) -> Result<()> {
        let abandoned: Vec<String> = self.backups.abandoned.lock().iter().cloned().collect();
        for key in abandoned {
            if let Some(kv) = get(&*self.parts.store, key.clone()).await?.1 {
                let record: BackupRecord = records::decode(&kv.key, &kv.value)?;
                if record.state == BackupWord::Making && record.incarnation == self.parts.record.incarnation {
                    let why = format!("{} stopped while it was taken: see its log", record.node);
                    let failed = BackupRecord { state: BackupWord::Failed, why, ..record };
                    self.note(&key, &failed, Demand::Modified(kv.modified)).await?;
                }
            }
            self.backups.abandoned.lock().remove(&key);
        }
        Ok(())
    }

    async fn back_up_round(self: &Arc<Self>) -> Result<()> {
        self.give_up_abandoned().await?;
        for (schedule, modified) in self.schedule_records().await? {
            // Whoever serves it goes on with it.
            if self.serving.get(&schedule.volume).is_none() || self.stop.is_cancelled() {
                continue;
            }
            let records = self.backup_records(Some(&schedule.volume)).await?;
            let seen: Vec<Seen<'_>> = records
                .iter()
                .map(|(record, _)| Seen { record, being_made: self.is_being_made(record) })
                .collect();
            for action in due(clock::now(), &schedule, &seen) {
                let done = match &action {
                    Due::Take => self.take_scheduled(&schedule, modified).await,
                    Due::Remove(id) => {
                        let found = self.backup_records(Some(&schedule.volume)).await?;
                        match found.into_iter().find(|(record, _)| record.id == *id) {
                            Some((record, modified)) => self.delete_found(record, modified).await,
                            None => Ok(()),
                        }
                    }
                };
                if let Err(error) = done {
                    tracing::error!(volume = %schedule.volume, ?action, %error, "a schedule of backups");
                }
            }
        }
        Ok(())
    }

    async fn take_scheduled(self: &Arc<Self>, schedule: &ScheduleRecord, modified: Revision) -> Result<()> {
        // First: one that fails is not tried all the time, and of two who think that they serve the volume one takes it.
        let begun = ScheduleRecord { last: Some(clock::now()), ..schedule.clone() };
        self.note(&schedule_key(&schedule.volume), &begun, Demand::Modified(modified)).await?;
        self.back_up(&schedule.volume, true).await.map(drop)
    }

    /// Writes a record on a condition; its outcome is known when this returns. The revision that it has then.
    ///
    /// # Errors
    /// `VersionMismatch` if the condition does not hold.
    async fn note<T: Serialize>(&self, key: &str, record: &T, demand: Demand) -> Result<Revision> {
        let value = records::encode(record);
        let txn = Txn::new().when(key.to_owned(), demand).put(key.to_owned(), value.clone());
        let settled = self.settled_txn(txn, key, &value).await?;
        settled.ok_or_else(|| {
            Error::new(
                Reason::VersionMismatch,
                format!("the record {key} was changed by somebody else meanwhile"),
            )
        })
    }

    /// Makes a transaction, which puts this value at this key, until its outcome is known; `None`: its conditions do not hold.
    async fn settled_txn(&self, txn: Txn, key: &str, value: &bytes::Bytes) -> Result<Option<Revision>> {
        let mut unknown = None;
        for _ in 0..SETTLE_ATTEMPTS_MAX {
            match self.parts.store.txn(txn.clone()).await {
                Ok(answer) if answer.succeeded => return Ok(Some(answer.revision)),
                Ok(_) => {
                    // If an earlier attempt was made after all, its own value is there.
                    let there = get(&*self.parts.store, key.to_owned()).await?.1;
                    let own = there.filter(|kv| unknown.is_some() && kv.value == *value);
                    return Ok(own.map(|kv| kv.modified));
                }
                Err(error @ StoreError::OutcomeUnknown(_)) => unknown = Some(error),
                Err(error) if unknown.is_none() => return Err(error.into()),
                Err(error) => unknown = Some(error),
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
        let last = unknown.unwrap_or_else(|| StoreError::Unavailable("it does not settle".into()));
        Err(Error::from(last).context(format!("writing {key}")))
    }
}

fn begun_ms(begun: shardfs_proto::types::Timestamp) -> i64 {
    let now = clock::now();
    (now.seconds() - begun.seconds()) * 1000 + (i64::from(now.nanos()) - i64::from(begun.nanos())) / 1_000_000
}

#[cfg(test)]
#[cfg(feature = "failpoints")]
mod failpoints;
#[cfg(test)]
mod tests;
