//! Puts a backup where it was: the same volume, whose backing was destroyed, with the ids that its shards have.
//!
//! The order: in one transaction the volume's record names no nodes any more, under a later epoch, and what was announced of its shards goes; so
//! whoever stands by lets go of it, and nobody takes it. A copy of the image is laid down beside what is there, and looked at; it takes the name of
//! the backing, and what was there gets another name: whoever has that open still, killed or stopped, has nothing of the new one. Shards' records
//! are made to agree. In one transaction the volume's record names its nodes again, under a later epoch still. Cut off anywhere it is repeated;
//! until then nobody serves the volume. Of two attempts the one that claimed later goes on, see `take_place`.
//!
//! Who asks a volume to be restored in place accepts what was written since to be lost. So it is done only to one that is not served: by the node
//! that its record gives it to, which knows, or when that node's lease is over.

use std::collections::BTreeSet;
use std::sync::Arc;

use shardfs_proto::types::backups::{Restored, RestoredShard};
use shardfs_proto::types::{Error, NodeId, Reason, Result, ShardId, clock};

use super::manifest::{Manifest, check_folder};
use super::restore::{IOPS_OF_RESTORED, UnderWay, remove_others};
use crate::catalog::make::origin;
use crate::catalog::serving::blocking;
use crate::catalog::{Catalog, SHOWN_WAIT_MAX, StateWord};
use crate::cluster::bootstrap::random_id;
use crate::cluster::elect;
use crate::cluster::records::backups::{BackupRecord, RestoringRecord, restoring_key, views_of};
use crate::cluster::records::{self, FORMAT, ShardRecord, VolumeRecord, deposition_key, volume_key};
use crate::cluster::store::{Demand, KeyRange, Op, Txn, get};
use crate::volume::images;
use crate::volume::{AWS, VolumeSpec};

/// How often the volume's record is looked at anew while nodes try to take it.
const ATTEMPTS_MAX: usize = 16;

impl Catalog {
    pub(super) async fn restore_in_place(
        self: &Arc<Self>,
        backup: &BackupRecord,
        drop_missing: bool,
    ) -> Result<Restored> {
        self.refresh().await?;
        // Before the volume is taken from anybody.
        self.check_image(backup).await?;
        let mut under_way = self.take_from_nodes(backup).await?;
        fail::fail_point!("restore::taken", |_| Err(Error::unavailable("failpoint")));
        let (volume, size_bytes) = {
            let kept = self.kept(&backup.volume)?;
            (kept.record.id.clone(), kept.record.size_bytes)
        };
        if backup.provider == AWS && under_way.record.source.is_empty() {
            let token = under_way.record.token.clone();
            let disk = self.disk_of_image(backup, &volume, token, size_bytes).await?;
            let with_disk = RestoringRecord { source: disk.to_string(), ..under_way.record };
            under_way = self.note_restore(with_disk, Demand::Modified(under_way.modified)).await?;
        }
        let spec = self.restored_spec(backup, &under_way.record, &volume);
        under_way = self.take_place(backup, &spec, under_way).await?;
        let (_, mounted) = self.lay_down(backup, &spec, &under_way.record.attempt).await?;
        images::check_identity(mounted.root(), &spec)?;
        let manifest = Manifest::read(mounted.root(), backup, &self.parts.cluster_id)?;
        self.parts.view.catch_up(&*self.parts.store, SHOWN_WAIT_MAX).await?;
        // Their records say what is to be there; those that have lost their bytes since, or are in no record, would come back.
        let shards = self.parts.view.shards(|record| record.volume == volume && !record.purged);
        let present = blocking(move || {
            let mut present = BTreeSet::new();
            for record in shards.iter().map(|kept| &kept.record) {
                let dir = mounted.root().join(folder(record.id));
                if dir.is_dir() {
                    // Else a shard would be given to whoever has its id by now.
                    check_folder(&dir, record.id, &origin(record))?;
                    present.insert(record.id);
                }
            }
            let names: BTreeSet<String> = shards.iter().map(|kept| folder(kept.record.id)).collect();
            remove_others(mounted.root(), |name| names.contains(name))?;
            images::sync(mounted.root())?;
            mounted.close()?;
            Ok(present)
        })
        .await?;
        fail::fail_point!("restore::laid", |_| Err(Error::unavailable("failpoint")));
        let set_aside = self.swap_image(backup, &spec, &under_way.record).await?;
        let set_aside = match under_way.record.set_aside.clone() {
            Some(first) => first,
            None => {
                let placed = RestoringRecord { set_aside: Some(set_aside.clone()), ..under_way.record };
                under_way = self.note_restore(placed, Demand::Modified(under_way.modified)).await?;
                set_aside
            }
        };
        fail::fail_point!("restore::made", |_| Err(Error::unavailable("failpoint")));
        let missing = self.settle_shards(&manifest, &present, drop_missing, &under_way).await?;
        self.give_back(backup, under_way).await?;
        tracing::warn!(%volume, backup = backup.id, shards = present.len(), missing = missing.len(), set_aside,
            "a volume is restored in place, as was asked");
        let shards = self.shards_in_use(&volume).into_iter().filter(|kept| present.contains(&kept.record.id));
        Ok(Restored {
            volume: self.info_of(&volume)?,
            shards: shards.map(|kept| same_shard(&kept.record)).collect(),
            missing,
            set_aside,
        })
    }

    /// Has no node serve the volume, nor stand by for it, and notes which did.
    async fn take_from_nodes(&self, backup: &BackupRecord) -> Result<UnderWay> {
        let (volume, view, me) = (&backup.volume, &self.parts.view, &self.parts.node_id);
        let (key, restoring) = (volume_key(volume), restoring_key(volume));
        for _ in 0..ATTEMPTS_MAX {
            let (_, Some(kv)) = get(&*self.parts.store, key.clone()).await? else {
                return Err(Error::not_found(format!(
                    "there is no volume {volume} any more: restore it as a new one (`--volume {volume} --nodes ...`)"
                )));
            };
            let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
            if record.provider != backup.provider || record.retired {
                return Err(Error::invalid(format!(
                    "volume {volume} is of another kind by now, or leaves: restore the backup as a new volume"
                )));
            }
            let noted = self.restoring(volume).await?;
            // If it has nodes again, somebody has given it to them since: it may be in use.
            let is_taken = record.primary.is_none() && record.backups.is_empty();
            let begun =
                noted.as_ref().filter(|noted| noted.record.in_place && !noted.record.done && is_taken);
            if let Some(UnderWay { record: noted, modified }) = begun {
                if noted.backup == backup.id && (backup.provider != AWS || noted.node == *me) {
                    // From here on an earlier attempt that was stopped changes nothing more.
                    let claimed = RestoringRecord { attempt: random_id(), node: me.clone(), ..noted.clone() };
                    return self.note_restore(claimed, Demand::Modified(*modified)).await;
                }
                // With another one, or after another node, which may have a disk: anew.
                let anew = self.in_place_record(backup, &record, noted.nodes.clone());
                return self.note_restore(anew, Demand::Modified(*modified)).await;
            }
            let mut txn = Txn::new();
            match &record.primary {
                Some(primary) if primary == me && self.serving.get(volume).is_some() => {
                    return Err(Error::invalid(format!(
                        "volume {volume} is served by {me}: in place, what was written since the backup would be lost. Restore it as a \
                         new volume (`--volume`, `--nodes`), beside this one"
                    )));
                }
                Some(primary) if primary == me => {}
                Some(primary) => {
                    txn = elect::lease_is_over(view, primary, txn)
                        .ok_or_else(|| {
                            Error::new(
                                Reason::NotPrimary,
                                format!("volume {volume} is {primary}'s by its record: ask that node"),
                            )
                            .with_location(view.location(volume))
                            .with_retry_after_ms(100)
                        })?
                        .put(deposition_key(primary), format!("{volume} restored"));
                }
                None => {}
            }
            let nodes: Vec<_> = record.primary.iter().chain(&record.backups).cloned().collect();
            let fresh = self.in_place_record(backup, &record, nodes);
            let taken = VolumeRecord {
                primary: None,
                backups: Vec::new(),
                target: None,
                epoch: record.epoch.next(),
                holder: String::new(),
                predecessors: record.predecessors_of_next(),
                handed_over: false,
                unmounted: false,
                ..record
            };
            let demand = noted.map_or(Demand::Absent, |noted| Demand::Modified(noted.modified));
            let value = records::encode(&fresh);
            txn = txn
                .when(key.clone(), Demand::Modified(kv.modified))
                .when(restoring.clone(), demand)
                .put(key.clone(), records::encode(&taken))
                .put(restoring.clone(), value.clone());
            // Backups read no view of before: those that the image has are others.
            txn.success.push(Op::Delete(KeyRange::prefix(views_of(volume))));
            if let Some(modified) = self.settled_txn(txn, &restoring, &value).await? {
                view.wait_for(modified, SHOWN_WAIT_MAX).await?;
                return Ok(UnderWay { record: fresh, modified });
            }
            // Its nodes try to take it, and change its record.
        }
        Err(Error::unavailable(format!("the record of volume {volume} keeps changing: try again")))
    }

    fn in_place_record(
        &self,
        backup: &BackupRecord,
        volume: &VolumeRecord,
        nodes: Vec<NodeId>,
    ) -> RestoringRecord {
        RestoringRecord {
            v: FORMAT,
            volume: backup.volume.clone(),
            backup: backup.id.clone(),
            in_place: true,
            nodes,
            // A disk is another one than before.
            source: if backup.provider == AWS { String::new() } else { volume.source.clone() },
            name_suffix: String::new(),
            first_id: None,
            ids: 0,
            attempt: random_id(),
            token: random_id(),
            node: self.parts.node_id.clone(),
            since: clock::now(),
            set_aside: None,
            done: false,
        }
    }

    /// Makes what was laid down the volume's backing; answers where the last one is now.
    async fn swap_image(
        &self,
        backup: &BackupRecord,
        spec: &VolumeSpec,
        restoring: &RestoringRecord,
    ) -> Result<String> {
        let (providers, name) = (self.parts.providers.clone(), backup.provider.clone());
        let (spec, attempt) = (spec.clone(), restoring.attempt.clone());
        let aside = format!("replaced-{}", backup.id);
        let was_swapped = restoring.set_aside.is_some();
        let set_aside = blocking(move || {
            let images = providers.get(&name)?.images()?;
            // What is there is the copy of an attempt that was cut off, which nobody has served.
            if was_swapped {
                match images.put_in_place(&spec, &attempt, None) {
                    Err(error) if error.reason() == Reason::AlreadyExists => {}
                    swapped => return swapped,
                }
            }
            images.put_in_place(&spec, &attempt, Some(&aside))
        });
        Ok(match set_aside.await? {
            Some(path) => path.display().to_string(),
            None if backup.provider == AWS => self.kept(&backup.volume)?.record.source.clone(),
            None => String::new(),
        })
    }

    /// Makes the shards' records say what the image has: of what was closed since it is open again. Answers those of which there is nothing.
    async fn settle_shards(
        self: &Arc<Self>,
        manifest: &Manifest,
        present: &BTreeSet<ShardId>,
        drop_missing: bool,
        under_way: &UnderWay,
    ) -> Result<Vec<RestoredShard>> {
        // Only for as long as nobody else has begun it anew.
        let ours = || Txn::new().when(restoring_key(&manifest.volume), Demand::Modified(under_way.modified));
        let mut missing = Vec::new();
        for kept in self.shards_in_use(&manifest.volume) {
            let record = &kept.record;
            if !present.contains(&record.id) {
                missing.push(same_shard(record));
                if drop_missing {
                    let gone = ShardRecord { state: StateWord::Deleted, purged: true, ..(**record).clone() };
                    self.commit(&kept, &gone, ours().delete(record.name_key())).await?;
                }
                continue;
            }
            let was_open =
                |id| manifest.shards.iter().any(|entry| entry.id == id && entry.state == StateWord::Active);
            if record.state == StateWord::ReadOnly && record.snapshot_of.is_none() && was_open(record.id) {
                let open = ShardRecord { state: StateWord::Active, ..(**record).clone() };
                self.commit(&kept, &open, ours()).await?;
            }
        }
        Ok(missing)
    }

    /// Has the volume's nodes serve it again.
    async fn give_back(&self, backup: &BackupRecord, under_way: UnderWay) -> Result<()> {
        let volume = &backup.volume;
        let (key, restoring) = (volume_key(volume), restoring_key(volume));
        let me = &self.parts.node_id;
        let mut nodes = under_way.record.nodes.clone();
        // Whoever has just had it in its hands, if it is one of them.
        nodes.sort_by_key(|node| node != me);
        let done = RestoringRecord { done: true, ..under_way.record };
        for _ in 0..ATTEMPTS_MAX {
            let (_, Some(kv)) = get(&*self.parts.store, key.clone()).await? else {
                return Err(Error::not_found(format!(
                    "volume {volume} was taken out of the cluster meanwhile"
                )));
            };
            let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
            if record.primary.is_some() || !record.backups.is_empty() {
                return Err(Error::invalid(format!(
                    "volume {volume} was given to nodes while it was restored: look at it (`shardfs volume show {volume}`), and repeat this if \
                     it is not in use"
                )));
            }
            let given = VolumeRecord {
                primary: nodes.first().cloned(),
                backups: nodes.iter().skip(1).cloned().collect(),
                source: done.source.clone(),
                size_bytes: record.size_bytes.max(backup.bytes),
                iops: if record.source == done.source { record.iops } else { IOPS_OF_RESTORED },
                epoch: record.epoch.next(),
                holder: String::new(),
                formatted: true,
                ..record
            };
            let value = records::encode(&done);
            let txn = Txn::new()
                .when(key.clone(), Demand::Modified(kv.modified))
                .when(restoring.clone(), Demand::Modified(under_way.modified))
                .put(key.clone(), records::encode(&given))
                .put(restoring.clone(), value.clone());
            if let Some(revision) = self.settled_txn(txn, &restoring, &value).await? {
                return self.parts.view.wait_for(revision, SHOWN_WAIT_MAX).await;
            }
        }
        Err(Error::unavailable(format!("the record of volume {volume} keeps changing: try again")))
    }
}

/// The name of a shard's folder.
fn folder(id: ShardId) -> String {
    format!("shard-{id}")
}

fn same_shard(record: &ShardRecord) -> RestoredShard {
    RestoredShard {
        old: record.id,
        id: record.id,
        name: record.name.clone(),
        owner: record.owner.clone(),
        snapshot_of: record.snapshot_of,
    }
}
