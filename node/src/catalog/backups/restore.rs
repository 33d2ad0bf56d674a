//! Makes a new volume of a backup, with shards under new ids, beside the one that it is of.
//!
//! The order: a record of what is being made, with a range of shard ids that is given once; a copy of the image is laid down under a name that
//! is no volume's and mounted where no volume is; each folder of a shard gets its new id, and what belongs to no shard of the manifest goes; the
//! copy is named as the new volume, in its identity file, label and UUID; it gets its name; the shards' records; the volume's record at last,
//! with which nodes begin to serve it. Cut off anywhere and repeated, it begins with a fresh copy and comes to the same: the manifest does not
//! change, and old ids are mapped to new ones by their order.
//!
//! A shard whose name is taken gets a number behind its name. Sessions are not restored: a shard is adopted as a clone is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shardfs_proto::types::backups::{RestoreTo, Restored, RestoredShard};
use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, ShardId, ShardName, VolumeId, clock};

use super::manifest::{Entry, Manifest};
use crate::catalog::make::origin;
use crate::catalog::serving::blocking;
use crate::catalog::{Catalog, SHOWN_WAIT_MAX, StateWord};
use crate::cluster::bootstrap::{self, random_id};
use crate::cluster::records::backups::{BackupRecord, RestoringRecord, restoring_key};
use crate::cluster::records::{
    self, FORMAT, NEXT_SHARD_ID, ShardRecord, VolumeRecord, request_key, shard_key,
};
use crate::cluster::store::{Demand, Revision, Txn, get};
use crate::shard::{CopyInit, rehome};
use crate::volume::cloud::{DiskId, DiskSize, NewDisk, SnapshotId};
use crate::volume::images::{self, Image, Images, PrivateMount};
use crate::volume::views::views_dir;
use crate::volume::{AWS, GIB, VolumeSpec};

/// What is put behind the names of restored shards unless the caller says.
const SUFFIX_DEFAULT: &str = ".restored";
/// Bytes of a shard's name.
const NAME_BYTES_MAX: usize = 255;
/// Numbers that are tried behind a name that is taken.
const NAMES_TRIED_MAX: usize = 1000;
/// How often ids are asked for while others make shards.
const ID_ATTEMPTS_MAX: usize = 64;
/// IOPS of a disk that is made of an image, which the smallest may have; `shardfs volume iops` gives it others.
pub(super) const IOPS_OF_RESTORED: u32 = 3_000;
/// How far ids of an image may be above those that the records have given, which may be older than the image.
const IDS_AHEAD_MAX: u64 = 100_000;

/// A restore that is under way, with the revision of its record.
pub(super) struct UnderWay {
    pub(super) record: RestoringRecord,
    pub(super) modified: Revision,
}

/// A shard of the manifest under its new id.
struct Moved {
    entry: Entry,
    record: ShardRecord,
}

impl Catalog {
    /// Makes a volume of a backup. Repeated with the same values it goes on with what was cut off.
    pub async fn restore_backup(self: &Arc<Self>, id: &str, to: RestoreTo) -> Result<Restored> {
        let backup = self.usable_backup(id).await?;
        let this = self.clone();
        self.to_the_end(async move {
            let _one = this.backups.copying.lock().await;
            let restored = match to {
                RestoreTo::InPlace { drop_missing } => this.restore_in_place(&backup, drop_missing).await,
                RestoreTo::NewVolume { volume, nodes, source, name_suffix } => {
                    this.restore_anew(&backup, volume, nodes, source, name_suffix).await
                }
            };
            if restored.is_err() {
                let at = this.image_mount("restore");
                if let Err(worse) = blocking(move || images::clean(&at)).await {
                    tracing::warn!(error = %worse, "after a restore that failed");
                }
            }
            restored.map_err(|e| e.context(format!("restoring the backup {}", backup.id)))
        })
        .await
    }

    async fn restore_anew(
        &self,
        backup: &BackupRecord,
        volume: VolumeId,
        nodes: Vec<NodeId>,
        source: String,
        name_suffix: String,
    ) -> Result<Restored> {
        self.refresh().await?;
        let (first, _) = self.checked_nodes(&nodes)?;
        self.check_versions_of(&nodes, "nothing is restored there")?;
        if *first != self.parts.node_id {
            return Err(Error::invalid(format!(
                "ask {first} for this: it is the first of the volume's nodes"
            )));
        }
        let source = match (backup.provider.as_str(), source) {
            (AWS, source) if !source.is_empty() => {
                return Err(Error::invalid("a disk is made of the image: leave --source away"));
            }
            (AWS, source) => source,
            (_, source) if source.is_empty() => beside(&backup.source, &volume),
            (_, source) if !source.starts_with('/') => {
                return Err(Error::invalid(format!("the source {source:?} is no absolute path")));
            }
            (_, source) => source,
        };
        let name_suffix = if name_suffix.is_empty() { SUFFIX_DEFAULT.to_owned() } else { name_suffix };
        ShardName::new(format!("x{name_suffix}")).map_err(|e| e.context("--suffix"))?;
        let wanted = RestoringRecord {
            v: FORMAT,
            volume: volume.clone(),
            backup: backup.id.clone(),
            in_place: false,
            nodes,
            source,
            name_suffix,
            first_id: None,
            ids: 0,
            attempt: random_id(),
            token: random_id(),
            node: self.parts.node_id.clone(),
            since: clock::now(),
            set_aside: None,
            done: false,
        };
        let mut under_way = self.begin_restore(backup, wanted).await?;
        if under_way.record.done {
            return self.restored(&under_way.record, Vec::new());
        }
        fail::fail_point!("restore::noted", |_| Err(Error::unavailable("failpoint")));
        if backup.provider == AWS && under_way.record.source.is_empty() {
            let token = under_way.record.token.clone();
            let disk = self.disk_of_image(backup, &volume, token, backup.bytes).await?;
            let with_disk = RestoringRecord { source: disk.to_string(), ..under_way.record };
            under_way = self.note_restore(with_disk, Demand::Modified(under_way.modified)).await?;
        }
        let spec = self.restored_spec(backup, &under_way.record, &volume);
        let under_way = self.take_place(backup, &spec, under_way).await?;
        let attempt = under_way.record.attempt.clone();
        let (bare, mounted) = self.lay_down(backup, &spec, &attempt).await?;
        // It becomes another volume: first it is to be the one that was backed up.
        images::check_identity(mounted.root(), &VolumeSpec { id: backup.volume.clone(), ..spec.clone() })?;
        let manifest = Manifest::read(mounted.root(), backup, &self.parts.cluster_id)?;
        let (under_way, moved) = self.give_ids(under_way, &volume, manifest).await?;
        fail::fail_point!("restore::laid", |_| Err(Error::unavailable("failpoint")));
        let naming = spec.clone();
        let (moved, missing) = blocking(move || {
            let sorted = rehome_all(mounted.root(), moved)?;
            images::identify(mounted.root(), &naming)?;
            images::sync(mounted.root())?;
            mounted.close()?;
            images::relabel(&bare, &naming)?;
            Ok(sorted)
        })
        .await?;
        fail::fail_point!("restore::made", |_| Err(Error::unavailable("failpoint")));
        let (providers, name, placing) =
            (self.parts.providers.clone(), backup.provider.clone(), spec.clone());
        blocking(move || providers.get(&name)?.images()?.put_in_place(&placing, &attempt, None)).await?;
        for shard in &moved {
            self.reserve_restored(&under_way, shard).await?;
        }
        fail::fail_point!("restore::shards", |_| Err(Error::unavailable("failpoint")));
        let done = self.add_restored(backup, &under_way).await?;
        tracing::info!(%volume, backup = backup.id, shards = moved.len(), "a volume is restored");
        self.restored(&done, missing)
    }

    /// Notes what is to be made, or finds that it was noted before.
    async fn begin_restore(&self, backup: &BackupRecord, wanted: RestoringRecord) -> Result<UnderWay> {
        let volume = &wanted.volume;
        let there = self.parts.view.volume(volume).is_some();
        let kept = self.restoring(volume).await?;
        let same = |kept: &RestoringRecord| {
            (&kept.backup, &kept.nodes, &kept.name_suffix)
                == (&wanted.backup, &wanted.nodes, &wanted.name_suffix)
                && !kept.in_place
                && (kept.source == wanted.source || backup.provider == AWS)
        };
        match kept {
            Some(kept) if same(&kept.record) && (there || !kept.record.done) => {
                if !kept.record.done && backup.provider == AWS && kept.record.node != self.parts.node_id {
                    return Err(Error::invalid(format!(
                        "{} has begun this, and may have the disk attached: start it, and name it first",
                        kept.record.node
                    )));
                }
                if kept.record.done {
                    return Ok(kept);
                }
                self.check_image(backup).await?;
                // From here on an earlier attempt that was stopped changes nothing more.
                let claimed = RestoringRecord { attempt: random_id(), ..kept.record };
                self.note_restore(claimed, Demand::Modified(kept.modified)).await
            }
            Some(kept) if !kept.record.done => Err(Error::new(
                Reason::AlreadyExists,
                format!(
                    "volume {volume} is being restored from the backup {} with other values: repeat those, or give it up first \
                         (`shardfs volume delete {volume}`)",
                    kept.record.backup
                ),
            )),
            _ if there => Err(Error::new(
                Reason::AlreadyExists,
                format!("there is a volume {volume} already: choose another id"),
            )),
            kept => {
                if backup.provider != AWS && Path::new(&wanted.source).exists() {
                    return Err(Error::new(
                        Reason::AlreadyExists,
                        format!("{} is there already: give another --source", wanted.source),
                    ));
                }
                self.check_image(backup).await?;
                bootstrap::refuse_shared_source(&*self.parts.store, &definition(backup, &wanted)).await?;
                let demand = kept.map_or(Demand::Absent, |kept| Demand::Modified(kept.modified));
                self.note_restore(wanted, demand).await
            }
        }
    }

    /// Whether a restore in place of a volume was begun, and has not ended.
    pub(in crate::catalog) async fn is_restored_in_place(&self, volume: &VolumeId) -> Result<bool> {
        let noted = self.restoring(volume).await?;
        Ok(noted.is_some_and(|noted| noted.record.in_place && !noted.record.done))
    }

    pub(super) async fn restoring(&self, volume: &VolumeId) -> Result<Option<UnderWay>> {
        let kv = get(&*self.parts.store, restoring_key(volume)).await?.1;
        kv.map(|kv| Ok(UnderWay { record: records::decode(&kv.key, &kv.value)?, modified: kv.modified }))
            .transpose()
    }

    pub(super) async fn note_restore(&self, record: RestoringRecord, demand: Demand) -> Result<UnderWay> {
        let modified = self.note(&restoring_key(&record.volume), &record, demand).await?;
        Ok(UnderWay { record, modified })
    }

    /// A volume whose content is that of an image, as its provider knows it.
    pub(super) fn restored_spec(
        &self,
        backup: &BackupRecord,
        restoring: &RestoringRecord,
        volume: &VolumeId,
    ) -> VolumeSpec {
        VolumeSpec {
            id: volume.clone(),
            cluster_id: self.parts.cluster_id.clone(),
            source: PathBuf::from(&restoring.source),
            size_bytes: backup.bytes,
            formatted: true,
            mount_point: self.parts.data_dir.join("volumes").join(volume.as_str()),
            allow_unfenced: false,
        }
    }

    /// A disk with the content of a backup, of `bytes` at least.
    pub(super) async fn disk_of_image(
        &self,
        backup: &BackupRecord,
        volume: &VolumeId,
        token: String,
        bytes: u64,
    ) -> Result<DiskId> {
        let gib = u32::try_from(bytes.max(backup.bytes).div_ceil(GIB))
            .map_err(|_| Error::invalid(format!("{bytes} bytes are too many for a disk")))?;
        let new = NewDisk {
            cluster_id: self.parts.cluster_id.clone(),
            volume: volume.clone(),
            token,
            size: DiskSize { gib, iops: IOPS_OF_RESTORED },
            kms_key: None,
            from: Some(SnapshotId::new(backup.image.clone())?),
        };
        let cloud = self.cloud()?;
        blocking(move || cloud.create(&new)).await
    }

    /// Makes the place where this attempt lays the image down, and takes away those of the attempts before, which change nothing from here on.
    ///
    /// Its claim is noted once more when the place is there: so whoever claims the restore later finds the place, and takes it away. Nothing
    /// else makes one. However late an attempt goes on that another one has followed, it has nowhere to lay anything down, and nothing to
    /// put in place.
    pub(super) async fn take_place(
        &self,
        backup: &BackupRecord,
        spec: &VolumeSpec,
        under_way: UnderWay,
    ) -> Result<UnderWay> {
        let attempt = under_way.record.attempt.clone();
        let placing = |step: fn(&dyn Images, &VolumeSpec, &str) -> Result<()>| {
            let (providers, name) = (self.parts.providers.clone(), backup.provider.clone());
            let (spec, attempt) = (spec.clone(), attempt.clone());
            blocking(move || step(providers.get(&name)?.images()?, &spec, &attempt))
        };
        placing(|images, spec, attempt| images.make_place(spec, attempt)).await?;
        fail::fail_point!("restore::place", |_| Err(Error::unavailable("failpoint")));
        match self.note_restore(under_way.record, Demand::Modified(under_way.modified)).await {
            Ok(under_way) => {
                placing(|images, spec, attempt| images.drop_places(spec, Some(attempt))).await?;
                Ok(under_way)
            }
            Err(error) => {
                if let Err(worse) = placing(|images, spec, attempt| images.drop_place(spec, attempt)).await {
                    tracing::warn!(error = %worse, "after a restore that another one has followed");
                }
                Err(error)
            }
        }
    }

    /// Lays an image down and mounts it where no volume is. What it lies in is needed when it is unmounted.
    pub(super) async fn lay_down(
        &self,
        backup: &BackupRecord,
        spec: &VolumeSpec,
        attempt: &str,
    ) -> Result<(PathBuf, PrivateMount)> {
        let (providers, name) = (self.parts.providers.clone(), backup.provider.clone());
        let (spec, attempt) = (spec.clone(), attempt.to_owned());
        let (image, at): (Image, _) = (self.image_of(backup), self.image_mount("restore"));
        blocking(move || {
            // A process of this node that was killed may have something there.
            images::clean(&at)?;
            let bare = providers.get(&name)?.images()?.lay_down(&spec, &image, &attempt)?;
            let mounted = PrivateMount::open(&bare, &at)?;
            Ok((bare, mounted))
        })
        .await
    }

    /// Gives the shards of a manifest new ids, once: above all that this cluster has given, and above the old ones, which may be of another
    /// state of the metadata store.
    async fn give_ids(
        &self,
        mut under_way: UnderWay,
        volume: &VolumeId,
        manifest: Manifest,
    ) -> Result<(UnderWay, Vec<Moved>)> {
        let count = manifest.shards.len() as u64;
        let above = manifest.shards.last().map_or(0, |last| last.id.get());
        let mut attempts = 0;
        let first = loop {
            if let Some(first) = under_way.record.first_id {
                break first;
            }
            attempts += 1;
            let next = get(&*self.parts.store, NEXT_SHARD_ID).await?.1;
            let (number, demand) = match next {
                Some(kv) => (records::decode_number(&kv.key, &kv.value)?, Demand::Modified(kv.modified)),
                None => (1, Demand::Absent),
            };
            if above > number + IDS_AHEAD_MAX {
                return Err(Error::corrupt(format!(
                    "the manifest names the shard {above}, and this cluster has given {number} ids: it is another one's, or damaged"
                )));
            }
            let first = number.max(above + 1);
            // The last one must be an id as well.
            ShardId::new(first + count).map_err(|_| {
                Error::new(Reason::IdsExhausted, format!("{count} shard ids more than this cluster has left"))
            })?;
            let record = RestoringRecord {
                first_id: Some(ShardId::new(first)?),
                ids: count,
                ..under_way.record.clone()
            };
            let (key, value) = (restoring_key(volume), records::encode(&record));
            let txn = Txn::new()
                .when(NEXT_SHARD_ID, demand)
                .when(key.clone(), Demand::Modified(under_way.modified))
                .put(NEXT_SHARD_ID, (first + count).to_string())
                .put(key.clone(), value.clone());
            match self.settled_txn(txn, &key, &value).await? {
                Some(modified) => under_way = UnderWay { record, modified },
                None if attempts >= ID_ATTEMPTS_MAX => {
                    return Err(Error::new(Reason::Busy, "many shards are being made at once: try again")
                        .with_retry_after_ms(100));
                }
                // Others make shards, or somebody else is at this restore.
                None => {
                    let now = self
                        .restoring(volume)
                        .await?
                        .filter(|now| now.record.attempt == under_way.record.attempt);
                    under_way = now.ok_or_else(|| {
                        Error::unavailable("the restore was given up, or begun anew, meanwhile")
                    })?;
                }
            }
        };
        if under_way.record.ids != count {
            return Err(Error::corrupt("the image has another number of shards than before"));
        }
        let ids: BTreeMap<ShardId, ShardId> = manifest
            .shards
            .iter()
            .zip(first.get()..)
            .map(|(entry, id)| Ok((entry.id, ShardId::new(id)?)))
            .collect::<Result<_>>()?;
        let moved = |entry: Entry| {
            let record = ShardRecord {
                v: FORMAT,
                id: ids[&entry.id],
                name: entry.name.clone(),
                owner: entry.owner.clone(),
                volume: volume.clone(),
                state: entry.state,
                limit_bytes: entry.limit_bytes,
                created: entry.created,
                request_id: restore_request(&manifest.backup, entry.id, ids[&entry.id]),
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                purged: false,
                snapshot_of: entry.snapshot_of.and_then(|of| ids.get(&of).copied()),
                copy_of: None,
                rollback: None,
            }
            .with_format();
            Moved { entry, record }
        };
        Ok((under_way, manifest.shards.into_iter().map(moved).collect()))
    }

    /// Writes the record of a shard, unless it is there.
    async fn reserve_restored(&self, under_way: &UnderWay, shard: &Moved) -> Result<()> {
        let key = shard_key(shard.record.id);
        for attempt in 0..NAMES_TRIED_MAX {
            if get(&*self.parts.store, key.clone()).await?.1.is_some() {
                return Ok(());
            }
            let name = match shard.record.snapshot_of {
                // One of its shard's own names.
                Some(_) => shard.record.name.clone(),
                None => restored_name(&shard.record.name, &under_way.record.name_suffix, attempt)?,
            };
            let record = ShardRecord { name, ..shard.record.clone() };
            let (name_key, request_key) = (record.name_key(), request_key(&record.owner, &record.request_id));
            let value = records::encode(&record);
            let txn = Txn::new()
                .when(restoring_key(&record.volume), Demand::Modified(under_way.modified))
                .when(key.clone(), Demand::Absent)
                .when(name_key.clone(), Demand::Absent)
                .put(key.clone(), value.clone())
                .put(name_key, record.id.to_string())
                .put(request_key, record.id.to_string());
            if self.settled_txn(txn, &key, &value).await?.is_some() {
                return Ok(());
            }
            let now = self.restoring(&record.volume).await?;
            if now.is_none_or(|now| now.modified != under_way.modified) {
                return Err(Error::unavailable(
                    "the restore was given up, or is being made by somebody else",
                ));
            }
        }
        Err(Error::new(
            Reason::ShardExists,
            format!(
                "{NAMES_TRIED_MAX} shards are named like {:?}: give another --suffix",
                shard.record.name.as_str()
            ),
        ))
    }

    /// Adds the volume to the cluster: from then on it is served.
    async fn add_restored(&self, backup: &BackupRecord, under_way: &UnderWay) -> Result<RestoringRecord> {
        let spec = definition(backup, &under_way.record);
        let volume = VolumeRecord {
            v: FORMAT,
            id: spec.id.clone(),
            provider: spec.provider,
            source: spec.source,
            size_bytes: spec.size_bytes,
            iops: spec.iops,
            primary: Some(spec.primary),
            backups: spec.backups,
            epoch: Epoch::FIRST,
            holder: String::new(),
            target: None,
            // It is never made anew.
            formatted: true,
            allow_unfenced: spec.allow_unfenced,
            predecessors: Vec::new(),
            handed_over: false,
            unmounted: false,
            leaving: false,
            retired: false,
            delete_content: false,
        };
        let done = RestoringRecord { done: true, ..under_way.record.clone() };
        let (volume_key, key, value) =
            (records::volume_key(&spec.id), restoring_key(&spec.id), records::encode(&done));
        let txn = Txn::new()
            .when(volume_key.clone(), Demand::Absent)
            .when(key.clone(), Demand::Modified(under_way.modified))
            .put(volume_key, records::encode(&volume))
            .put(key.clone(), value.clone());
        let added = self.settled_txn(txn, &key, &value).await?;
        let revision = added.ok_or_else(|| {
            Error::new(Reason::AlreadyExists, format!("volume {} was added, or given up, meanwhile", spec.id))
        })?;
        self.parts.view.wait_for(revision, SHOWN_WAIT_MAX).await?;
        Ok(done)
    }

    /// The answer: a volume that is in the records, with what is on it.
    fn restored(&self, done: &RestoringRecord, missing: Vec<RestoredShard>) -> Result<Restored> {
        let first = done.first_id.map_or(0, ShardId::get);
        let ours = |record: &ShardRecord| {
            record.volume == done.volume
                && record.state != StateWord::Deleted
                && (first..first + done.ids).contains(&record.id.get())
        };
        let shards = self.parts.view.shards(ours).into_iter().map(|kept| {
            let record = &kept.record;
            RestoredShard {
                old: old_id(&record.request_id).unwrap_or(record.id),
                id: record.id,
                name: record.name.clone(),
                owner: record.owner.clone(),
                snapshot_of: record.snapshot_of,
            }
        });
        Ok(Restored {
            volume: self.info_of(&done.volume)?,
            shards: shards.collect(),
            missing,
            set_aside: String::new(),
        })
    }

    /// Gives up a volume that is being made of a backup, with what was made of it; whether there is one.
    pub(in crate::catalog) async fn give_up_restore(&self, volume: &VolumeId) -> Result<bool> {
        let Some(UnderWay { record, modified }) = self.restoring(volume).await? else { return Ok(false) };
        if record.done || record.in_place {
            return Ok(false);
        }
        // Whoever is at it still finds that he is not wanted.
        let given_up = RestoringRecord { attempt: random_id(), token: random_id(), ..record.clone() };
        let UnderWay { modified, .. } = self.note_restore(given_up, Demand::Modified(modified)).await?;
        let first = record.first_id.map_or(0, ShardId::get);
        for id in first..first + record.ids {
            let Some(kv) = get(&*self.parts.store, shard_key(ShardId::new(id)?)).await?.1 else { continue };
            let shard: ShardRecord = records::decode(&kv.key, &kv.value)?;
            if shard.volume != *volume {
                continue;
            }
            let txn = Txn::new()
                .when(shard_key(shard.id), Demand::Modified(kv.modified))
                .delete(shard_key(shard.id))
                .delete(shard.name_key())
                .delete(request_key(&shard.owner, &shard.request_id));
            self.parts.store.txn(txn).await?;
        }
        let provider = if record.source.starts_with('/') { "loop" } else { AWS };
        if !record.source.is_empty() {
            let spec = VolumeSpec {
                id: volume.clone(),
                cluster_id: self.parts.cluster_id.clone(),
                source: PathBuf::from(&record.source),
                size_bytes: 0,
                formatted: true,
                mount_point: self.parts.data_dir.join("volumes").join(volume.as_str()),
                allow_unfenced: false,
            };
            let (providers, at) = (self.parts.providers.clone(), self.image_mount("restore"));
            let _one = self.backups.copying.try_lock().map_err(|_| {
                Error::new(Reason::Busy, "this node is at it, or at another backup: try again")
            })?;
            blocking(move || {
                images::clean(&at)?;
                providers.get(provider)?.images()?.discard(&spec)
            })
            .await?;
        }
        let key = restoring_key(volume);
        let txn = Txn::new().when(key.clone(), Demand::Modified(modified)).delete(key);
        self.parts.store.txn(txn).await?;
        tracing::info!(%volume, backup = record.backup, "a restore is given up");
        Ok(true)
    }
}

/// The request that a restored shard's record names: it tells which shard it was.
fn restore_request(backup: &str, old: ShardId, new: ShardId) -> String {
    format!("restore-{backup}-{old}-{new}")
}

/// See [`restore_request`].
fn old_id(request_id: &str) -> Option<ShardId> {
    let old = request_id.strip_prefix("restore-")?.rsplit('-').nth(1)?;
    ShardId::new(old.parse().ok()?).ok()
}

/// What a new volume of a backup is.
fn definition(backup: &BackupRecord, restoring: &RestoringRecord) -> bootstrap::VolumeSpec {
    let (first, others) = restoring.nodes.split_first().map_or((&restoring.node, &[][..]), |split| split);
    bootstrap::VolumeSpec {
        id: restoring.volume.clone(),
        provider: backup.provider.clone(),
        source: restoring.source.clone(),
        size_bytes: backup.bytes,
        iops: if backup.provider == AWS { IOPS_OF_RESTORED } else { 0 },
        primary: first.clone(),
        backups: others.to_vec(),
        allow_unfenced: false,
    }
}

/// A backing file beside another one.
fn beside(source: &str, volume: &VolumeId) -> String {
    Path::new(source).with_file_name(format!("{volume}.img")).display().to_string()
}

/// A name with something behind it, and a number if it was tried before; cut off so that it is a name.
fn restored_name(name: &ShardName, suffix: &str, attempt: usize) -> Result<ShardName> {
    let suffix = if attempt == 0 { suffix.to_owned() } else { format!("{suffix}-{}", attempt + 1) };
    let mut end = name.as_str().len().min(NAME_BYTES_MAX.saturating_sub(suffix.len()));
    while !name.as_str().is_char_boundary(end) {
        end -= 1;
    }
    ShardName::new(format!("{}{suffix}", &name.as_str()[..end]))
}

/// Gives every shard's folder its new id, and removes all others. Answers the shards that are there, and those that are not.
fn rehome_all(root: &Path, shards: Vec<Moved>) -> Result<(Vec<Moved>, Vec<RestoredShard>)> {
    let dir = |id: ShardId| root.join(format!("shard-{id}"));
    let (mut moved, mut missing) = (Vec::new(), Vec::new());
    for shard in shards {
        let record = &shard.record;
        let old = dir(shard.entry.id);
        shard.entry.check(&old)?;
        // Nobody reads them, and they keep room.
        remove_folder(&views_dir(&old))?;
        let init = CopyInit {
            id: record.id,
            owner: record.owner.clone(),
            state: record.state.into(),
            limit_bytes: record.limit_bytes,
            created: record.created,
        };
        if rehome(&old, &dir(record.id), &init, &origin(record))? {
            moved.push(shard);
        } else {
            missing.push(RestoredShard {
                old: shard.entry.id,
                id: record.id,
                name: record.name.clone(),
                owner: record.owner.clone(),
                snapshot_of: record.snapshot_of,
            });
        }
    }
    let kept: BTreeSet<String> = moved.iter().map(|shard| format!("shard-{}", shard.record.id)).collect();
    remove_others(root, |name| kept.contains(name))?;
    Ok((moved, missing))
}

/// Removes the folders of shards at a volume's root, but those that are to be kept by their name.
pub(super) fn remove_others(root: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(format!("listing {}: {e}", root.display()));
    for entry in std::fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("shard-") && !keep(&name) {
            remove_folder(&entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}: {e}", folder.display())))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restored_names_are_names() {
        let name = |text: &str| ShardName::new(text).unwrap();
        assert_eq!(restored_name(&name("photos"), ".restored", 0).unwrap(), name("photos.restored"));
        assert_eq!(restored_name(&name("photos"), ".restored", 1).unwrap(), name("photos.restored-2"));
        let long = restored_name(&name(&"ä".repeat(127)), ".restored", 0).unwrap();
        assert!(long.as_str().ends_with("ä.restored") && long.as_str().len() <= NAME_BYTES_MAX);
        let ids = [7, 4711].map(|id| ShardId::new(id).unwrap());
        assert_eq!(
            old_id(&restore_request("20261129T195900Z-1f3a5c7e9b2d4f60", ids[0], ids[1])),
            Some(ids[0])
        );
        assert_eq!(old_id("auto-7-8"), None);
        assert_eq!(beside("/srv/vol-1.img", &VolumeId::new("vol-9").unwrap()), "/srv/vol-9.img");
    }
}
