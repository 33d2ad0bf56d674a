//! The life of a volume: added, given to other nodes, made larger, taken out of the cluster. Where it is served is decided by `roles`.
//!
//! Invariants: every change is one compare-and-set of the volume's record, and repeating one is harmless; a volume leaves only
//! without shards: its record says that it leaves, from when on it gets none; then they are counted; only then its record says that it is
//! retired, which is what its nodes act on.

use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::cluster::{NewVolume, VolumeInfo};
use shardfs_proto::types::{Error, NodeId, Reason, Result, VolumeId};

use super::serving::{Served, blocking};
use super::{Catalog, StateWord};
use crate::cluster::bootstrap::{self, VolumeSpec};
use crate::cluster::elect;
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{Demand, Revision, StoreError, Txn, get};
use crate::cluster::view::Kept;
use crate::volume::{AWS, GIB, LOOP_BYTES_MAX};

/// Nodes of a volume: what devices are attached to at once (16 instances on EBS).
const VOLUME_NODES_MAX: usize = 16;
/// How long a change takes to show at most.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks whether a volume has left.
const LEFT_LOOK_PAUSE: Duration = Duration::from_millis(20);
/// How long a caller waits for a volume to grow; it goes on.
const GROW_WAIT_MAX: Duration = Duration::from_secs(300);

impl Catalog {
    /// Adds a volume to the cluster: its nodes find its record, and the first of them makes it.
    pub async fn add_volume(&self, new: NewVolume) -> Result<VolumeInfo> {
        let (store, view) = (&*self.parts.store, &self.parts.view);
        let (primary, backups) = self.checked_nodes(&new.nodes)?;
        let disk = match new.provider.as_str() {
            AWS => Some(self.disk_for(&new).await?),
            _ if new.iops != 0 || new.kms_key.is_some() => {
                return Err(Error::invalid(format!(
                    "volume {}: IOPS and keys are of volumes of kind `aws` only, not of kind `{}`",
                    new.id, new.provider
                )));
            }
            _ => None,
        };
        let (source, size_bytes, iops) = disk.map_or((new.source, new.size_bytes, 0), |disk| {
            (disk.id.to_string(), disk.size_bytes, disk.iops)
        });
        let spec = VolumeSpec {
            id: new.id.clone(),
            provider: new.provider,
            source,
            size_bytes,
            iops,
            primary: primary.clone(),
            backups: backups.to_vec(),
            allow_unfenced: new.allow_unfenced,
        };
        bootstrap::ensure_volume(store, &spec).await?;
        let (revision, _) = get(store, records::volume_key(&new.id)).await?;
        view.wait_for(revision, SHOWN_WAIT_MAX).await?;
        self.info_of(&new.id)
    }

    /// The first of a volume's nodes and the others, which are all there.
    pub(super) fn checked_nodes<'a>(&self, nodes: &'a [NodeId]) -> Result<(&'a NodeId, &'a [NodeId])> {
        for (at, node) in nodes.iter().enumerate() {
            if self.parts.view.node(node).is_none() {
                return Err(Error::not_found(format!(
                    "there is no node {node}: start it first, or mend its name"
                )));
            }
            if nodes[..at].contains(node) {
                return Err(Error::invalid(format!("node {node} is named twice")));
            }
        }
        nodes
            .split_first()
            .filter(|_| nodes.len() <= VOLUME_NODES_MAX)
            .ok_or_else(|| Error::invalid(format!("a volume has 1 to {VOLUME_NODES_MAX} nodes")))
    }

    /// Has a node stand by for a volume.
    pub async fn attach_volume(&self, volume: &VolumeId, node: &NodeId) -> Result<VolumeInfo> {
        self.refresh().await?;
        if self.parts.view.node(node).is_none() {
            return Err(Error::not_found(format!(
                "there is no node {node}: start it first, or mend its name"
            )));
        }
        if self.is_restored_in_place(volume).await? {
            return Err(Error::invalid(format!(
                "volume {volume} is being restored in place, or that was cut off: repeat it (`shardfs backup restore BACKUP --in-place`), with \
                 another backup if that one is of no use"
            )));
        }
        self.change_volume(volume, |record, _| {
            if record.primary.as_ref() == Some(node) || record.backups.contains(node) {
                return Ok(false);
            }
            if record.backups.len() + 1 >= VOLUME_NODES_MAX {
                return Err(Error::invalid(format!(
                    "volume {volume} has {VOLUME_NODES_MAX} nodes, the most: detach one first"
                )));
            }
            record.backups.push(node.clone());
            Ok(true)
        })
        .await?;
        self.info_of(volume)
    }

    /// Has a node stand by for a volume no more.
    pub async fn detach_volume(&self, volume: &VolumeId, node: &NodeId) -> Result<VolumeInfo> {
        self.refresh().await?;
        self.change_volume(volume, |record, _| {
            if record.primary.as_ref() == Some(node) {
                return Err(Error::invalid(match record.backups.first() {
                    Some(other) => format!(
                        "{node} serves volume {volume}: give it to another node first (`shardfs volume promote {volume} {other}`)"
                    ),
                    None => format!("{node} serves volume {volume}, and no other node stands by for it"),
                }));
            }
            let there = record.backups.contains(node);
            // One of its nodes may have gone for good; a name that is neither is a mistake.
            if !there && self.parts.view.node(node).is_none() {
                return Err(Error::not_found(format!("there is no node {node}: mend its name")));
            }
            record.backups.retain(|backup| backup != node);
            if record.target.as_ref() == Some(node) {
                record.target = None;
            }
            Ok(there)
        })
        .await?;
        self.info_of(volume)
    }

    /// Makes a volume that this node serves larger, while it is used. `size_bytes`: of a backing file; a device has the size that
    /// it has.
    pub async fn grow_volume(self: &Arc<Self>, volume: &VolumeId, size_bytes: u64) -> Result<VolumeInfo> {
        self.refresh().await?;
        let kept = self.kept(volume)?;
        let served = self.served_volume(volume)?;
        check_growth(&kept.record, size_bytes)?;
        // First the intent: whoever takes the volume over meanwhile knows how large it is to be.
        if kept.record.size_bytes < size_bytes {
            self.change_volume(volume, |record, _| {
                let larger = record.size_bytes < size_bytes;
                record.size_bytes = record.size_bytes.max(size_bytes);
                Ok(larger)
            })
            .await?;
        }
        let this = self.clone();
        let growing = self.to_the_end(async move { this.grow_to(&served, size_bytes).await });
        tokio::time::timeout(GROW_WAIT_MAX, growing).await.unwrap_or_else(|_| {
            Err(Error::unavailable(format!(
                "volume {volume} has not grown yet: its device is slow, or hangs"
            )))
        })?;
        self.info_of(volume)
    }

    /// A volume that this node serves.
    pub(super) fn served_volume(&self, volume: &VolumeId) -> Result<Arc<Served>> {
        self.kept(volume)?;
        let (mine, epoch) = self.parts.view.is_primary(volume, &self.parts.node_id);
        if !mine {
            return Err(Error::new(
                Reason::NotPrimary,
                format!("volume {volume} is served by another node: ask that one"),
            )
            .with_location(self.parts.view.location(volume)));
        }
        self.serving.get(volume).filter(|served| served.epoch == epoch).ok_or_else(|| {
            Error::unavailable(format!("volume {volume} is being taken over")).with_retry_after_ms(50)
        })
    }

    /// Step by step, as long as this node serves it: it is not unmounted during one.
    async fn grow_to(&self, served: &Arc<Served>, size_bytes: u64) -> Result<()> {
        // Not under the lock: a cloud takes minutes, in which the volume may have to move.
        let working = served.clone();
        blocking(move || working.enlarge_below(size_bytes)).await?;
        let mut grown = false;
        while !grown {
            let _growing = served.growing.lock().await;
            if !self.serving.get(&served.id).is_some_and(|now| Arc::ptr_eq(&now, served)) {
                return Err(Error::unavailable(format!("volume {} has moved meanwhile", served.id))
                    .with_retry_after_ms(50));
            }
            let working = served.clone();
            grown = blocking(move || working.grow(size_bytes)).await?;
        }
        // What was enlarged may be another node's by now, which finds it enlarged.
        served.prove().await?;
        tracing::info!(volume = %served.id, bytes = served.room.total_bytes(), "grown");
        Ok(())
    }

    /// Takes a volume without shards out of the cluster; waits until it has gone. `delete_content`: with what it is made of; answers
    /// why that was left, if it was.
    pub async fn remove_volume(
        self: &Arc<Self>,
        volume: &VolumeId,
        delete_content: bool,
        at_most: Duration,
    ) -> Result<Option<String>> {
        self.refresh().await?;
        if self.parts.view.volume(volume).is_none()
            && (self.remove_half_made(volume).await? | self.give_up_restore(volume).await?)
        {
            return Ok(None);
        }
        // An earlier version takes one that leaves for one that is known to be empty.
        self.check_versions(volume, "the volume is not taken out of the cluster")?;
        if delete_content {
            self.check_deletable(volume).await?;
        }
        let leaves =
            self.change_volume(volume, |record, _| Ok(!std::mem::replace(&mut record.leaving, true))).await?;
        // From here on it gets no others, for as long as its record is this one.
        if let Err(refusal) = self.check_unused(volume) {
            self.keep_volume(volume).await?;
            return Err(refusal);
        }
        self.change_volume(volume, |record, modified| {
            if record.retired {
                return Ok(false);
            }
            if modified != leaves {
                return Err(Error::unavailable(format!("volume {volume} was changed meanwhile: try again")));
            }
            record.retired = true;
            record.delete_content = delete_content;
            record.backups = Vec::new();
            record.target = None;
            Ok(true)
        })
        .await?;
        let left = async {
            while let Some(kept) = self.parts.view.volume(volume) {
                self.remove_if_abandoned(&kept).await?;
                tokio::time::sleep(LEFT_LOOK_PAUSE).await;
            }
            Ok(())
        };
        tokio::time::timeout(at_most, left).await.unwrap_or_else(|_| {
            let why =
                self.serving.trouble(volume).map_or_else(String::new, |trouble| format!(" ({trouble})"));
            Err(Error::unavailable(format!(
                "volume {volume} has not left within {:.0} s; it does when its node can let go of it{why}",
                at_most.as_secs_f64()
            )))
        })?;
        let (_, note) = get(&*self.parts.store, records::left_key(volume)).await?;
        Ok(note.map(|note| String::from_utf8_lossy(&note.value).into_owned()))
    }

    /// Fails if there are shards on a volume.
    pub(super) fn check_unused(&self, volume: &VolumeId) -> Result<()> {
        let there = self.parts.view.shards(|record| record.volume == *volume && !record.purged);
        let mut living = there.iter().filter(|kept| kept.record.state != StateWord::Deleted);
        if let Some(kept) = living.next() {
            let (first, others) = (&kept.record, living.count());
            let others = if others > 0 { format!(", and {others} others") } else { String::new() };
            return Err(Error::new(
                Reason::ShardNotEmpty,
                format!(
                    "volume {volume} holds shard {:?} (id {}){others}: delete what is on it first",
                    first.name.as_str(),
                    first.id
                ),
            ));
        }
        if !there.is_empty() {
            return Err(Error::unavailable(format!(
                "the files of {} deleted shards are being removed from volume {volume}: try again",
                there.len()
            ))
            .with_retry_after_ms(500));
        }
        Ok(())
    }

    /// Takes back that a volume leaves.
    async fn keep_volume(&self, volume: &VolumeId) -> Result<Revision> {
        self.change_volume(volume, |record, _| {
            // It was found without shards since, and may have been deleted.
            let leaves = record.leaving && !record.retired;
            record.leaving &= record.retired;
            Ok(leaves)
        })
        .await
    }

    /// Removes the record of a volume that leaves and whose primary's lease is over: there is nobody else to do it. Should that
    /// process come back, it lets go of what is in no record.
    async fn remove_if_abandoned(&self, kept: &Kept<VolumeRecord>) -> Result<()> {
        let record = &kept.record;
        if !record.retired {
            return Ok(());
        }
        let mut txn = Txn::new();
        if let Some(primary) = &record.primary {
            if *primary == self.parts.node_id {
                return Ok(());
            }
            match elect::lease_is_over(&self.parts.view, primary, txn) {
                Some(over) => {
                    txn = over.put(records::deposition_key(primary), format!("{} removed", record.id))
                }
                None => return Ok(()),
            }
        }
        let key = records::volume_key(&record.id);
        let txn = txn
            .when(key.clone(), Demand::Modified(kept.modified))
            .delete(key)
            .delete(records::backups::schedule_key(&record.id))
            .delete(records::making_key(&record.id))
            .delete(records::backups::restoring_key(&record.id));
        let txn = match record.delete_content {
            true => txn
                .put(records::left_key(&record.id), "its node is away, and only that would have deleted it"),
            false => txn.delete(records::left_key(&record.id)),
        };
        match self.parts.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {
                let what = if record.delete_content { "what it is made of stays where it is" } else { "" };
                tracing::warn!(volume = %record.id, primary = ?record.primary, what, "taken out of the cluster without its node");
                self.parts.view.wait_for(answer.revision, SHOWN_WAIT_MAX).await
            }
            // It is looked again.
            Ok(_) | Err(StoreError::OutcomeUnknown(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Changes a volume's record, see [`elect::change_volume`], and waits until it shows. The revision that the record has then.
    pub(super) async fn change_volume(
        &self,
        volume: &VolumeId,
        change: impl Fn(&mut VolumeRecord, Revision) -> Result<bool>,
    ) -> Result<Revision> {
        let modified = elect::change_volume(&*self.parts.store, volume, change).await?;
        self.parts.view.wait_for(modified, SHOWN_WAIT_MAX).await?;
        Ok(modified)
    }

    pub(super) fn kept(&self, volume: &VolumeId) -> Result<Kept<VolumeRecord>> {
        let there = self.parts.view.volume(volume);
        there.ok_or_else(|| Error::not_found(format!("there is no volume {volume}")))
    }

    pub(super) fn info_of(&self, volume: &VolumeId) -> Result<VolumeInfo> {
        let infos = self.parts.view.volume_infos();
        let info = infos.into_iter().find(|info| info.id == *volume);
        info.ok_or_else(|| Error::not_found("the volume has gone"))
    }
}

/// Fails unless a volume can be given this size.
fn check_growth(record: &VolumeRecord, size_bytes: u64) -> Result<()> {
    let (id, now) = (&record.id, record.size_bytes);
    match record.provider.as_str() {
        "loop" if size_bytes == 0 => Err(Error::invalid(format!(
            "volume {id}: how large is it to be? It has {now} bytes: give --size, such as 200GiB"
        ))),
        "loop" if size_bytes < now => Err(Error::invalid(format!(
            "volume {id} has {now} bytes, and cannot be made smaller ({size_bytes}): volumes only grow"
        ))),
        "loop" if size_bytes > LOOP_BYTES_MAX => Err(Error::invalid(format!(
            "volume {id}: a loop volume has {} TiB at most, not {size_bytes} bytes",
            LOOP_BYTES_MAX >> 40
        ))),
        "loop" => Ok(()),
        AWS if size_bytes < now || !size_bytes.is_multiple_of(GIB) => Err(Error::invalid(format!(
            "volume {id} has {now} bytes: give --size, a whole number of GiB and not less, such as 200GiB; volumes only grow"
        ))),
        AWS => Ok(()),
        _ if size_bytes != 0 => Err(Error::invalid(format!(
            "volume {id} is as large as what is below it: enlarge that, and give no size here"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_only_grow() {
        let record = |provider: &str, size_bytes| -> VolumeRecord {
            let json = serde_json::json!({
                "v": 1, "id": "vol-1", "provider": provider, "source": "/x", "size_bytes": size_bytes, "primary": null, "epoch": 1,
            });
            serde_json::from_value(json).unwrap()
        };
        let gib = 1u64 << 30;
        assert!(check_growth(&record("loop", gib), 2 * gib).is_ok());
        // Once more: what was cut off goes on.
        assert!(check_growth(&record("loop", gib), gib).is_ok());
        for size in [0, gib / 2, LOOP_BYTES_MAX + 1] {
            assert_eq!(
                check_growth(&record("loop", gib), size).unwrap_err().reason(),
                Reason::InvalidArgument
            );
        }
        assert!(check_growth(&record(AWS, 8 * gib), 8 * gib).is_ok());
        for size in [0, 7 * gib, 8 * gib + 1] {
            assert!(check_growth(&record(AWS, 8 * gib), size).is_err(), "{size}");
        }
        for kind in ["device", "dir"] {
            assert!(check_growth(&record(kind, 0), 0).is_ok());
            assert_eq!(check_growth(&record(kind, 0), gib).unwrap_err().reason(), Reason::InvalidArgument);
        }
    }
}
