//! Disks of the cloud behind volumes of kind `aws`: made, given other IOPS, and found when nobody accounts for them.
//!
//! Invariants: a disk is asked for only after the store holds a record of what is being made, under a token of its own: whoever goes
//! on with what was cut off gets the same disk. Nothing is ever deleted or detached because it was found: only on request, and
//! only what is looked at once more and is a stray still.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardfs_proto::types::cluster::{NewVolume, Stray, VolumeInfo};
use shardfs_proto::types::{Error, NodeId, Reason, Result, Timestamp, VolumeId, clock};

use super::Catalog;
use super::serving::blocking;
use crate::cluster::bootstrap;
use crate::cluster::records::backups::{RESTORING, RestoringRecord};
use crate::cluster::records::{self, FORMAT, MAKING, MakingRecord, VolumeRecord};
use crate::cluster::store::{Demand, KeyRange, StoreError, Txn, get, range_all};
use crate::volume::cloud::{
    self, Attachment, Cloud, DISK_IOPS, DISK_IOPS_PER_GIB_MAX, Disk, DiskId, DiskSize, DiskState, NewDisk,
};
use crate::volume::{AWS, GIB};

/// IOPS of a disk for which none are asked: what a GiB gets, and at least.
const IOPS_PER_GIB_DEFAULT: u64 = 10;
/// How often what is to be made is noted, while others add and remove the volume.
const NOTE_ATTEMPTS_MAX: usize = 8;
/// See [`IOPS_PER_GIB_DEFAULT`].
const IOPS_DEFAULT_MIN: u64 = 3_000;

/// A disk that is there for a volume.
pub(super) struct FoundDisk {
    pub(super) id: DiskId,
    pub(super) size_bytes: u64,
    pub(super) iops: u32,
}

impl Catalog {
    pub(super) fn cloud(&self) -> Result<Arc<dyn Cloud>> {
        Ok(self.parts.providers.ebs()?.cloud().clone())
    }

    /// The disk of a volume that is to be added: the one that it names, or one that is made.
    pub(super) async fn disk_for(&self, new: &NewVolume) -> Result<FoundDisk> {
        let cloud = self.cloud()?;
        let machines = self.machines_of(&new.nodes)?;
        let checking = cloud.clone();
        blocking(move || checking.check_machines(&machines))
            .await
            .map_err(|e| e.context(format!("volume {}", new.id)))?;
        if !new.source.is_empty() {
            return self.named_disk(new).await;
        }
        // Added before: its disk is there.
        if let Some(kept) = self.parts.view.volume(&new.id)
            && kept.record.provider == AWS
        {
            return found_before(new, &kept.record);
        }
        let making = match self.begin_making(new).await? {
            Begun::Making(making) => making,
            Begun::Added(record) => return found_before(new, &record),
        };
        let (cluster_id, token) = (self.parts.cluster_id.clone(), making.token.clone());
        let disk = NewDisk {
            cluster_id,
            volume: new.id.clone(),
            token,
            size: making.size,
            kms_key: making.kms_key.clone(),
            from: None,
        };
        tracing::info!(volume = %new.id, gib = disk.size.gib, iops = disk.size.iops, "making a disk");
        let (asked, asking) = (disk.clone(), cloud.clone());
        match blocking(move || asking.create(&asked)).await {
            Ok(id) => Ok(FoundDisk { id, size_bytes: u64::from(disk.size.gib) * GIB, iops: disk.size.iops }),
            Err(error) => {
                // What was refused left nothing, so that other values may be asked for, and what EC2 has dropped needs another token; of what
                // else failed there may be a disk.
                if matches!(
                    error.reason(),
                    Reason::InvalidArgument | Reason::NotPermitted | Reason::Unsupported | Reason::NotFound
                ) && self.disks_made(&making).await.is_ok_and(|disks| disks.is_empty())
                {
                    self.forget_making(&new.id).await?;
                    return Err(error.context(format!("volume {}", new.id)));
                }
                Err(error.context(format!(
                    "volume {}: its disk is not there yet; the same command goes on, `shardfs volume delete {}` gives it up",
                    new.id, new.id
                )))
            }
        }
    }

    /// A disk that somebody has made.
    async fn named_disk(&self, new: &NewVolume) -> Result<FoundDisk> {
        let (cloud, id) = (self.cloud()?, DiskId::new(new.source.clone())?);
        let asked = id.clone();
        let disk = blocking(move || cloud.disk(&asked)).await?;
        let refused = |why: String| Err(Error::invalid(format!("volume {}: {id} {why}", new.id)));
        let Some(disk) = disk else {
            return Err(Error::not_found(format!("volume {}: there is no disk {id}", new.id)));
        };
        if !disk.cluster_id.is_empty() && disk.cluster_id != self.parts.cluster_id {
            return refused(format!("belongs to the cluster {}, by its tags", disk.cluster_id));
        }
        if !disk.volume.is_empty() && disk.volume != new.id.as_str() {
            return refused(format!("is of the volume {}, by its tags", disk.volume));
        }
        if !disk.multi_attach {
            return refused("cannot be attached to several machines: enable Multi-Attach (io2) first".into());
        }
        if disk.zone != self.cloud()?.machine().zone {
            return refused(format!(
                "is in {}, the nodes are in {}",
                disk.zone,
                self.cloud()?.machine().zone
            ));
        }
        let size_bytes = u64::from(disk.size.gib) * GIB;
        if new.size_bytes != 0 && new.size_bytes != size_bytes {
            return refused(format!("has {size_bytes} bytes, not {}: leave --size away", new.size_bytes));
        }
        if new.iops != 0 || new.kms_key.is_some() {
            return refused("is there already: IOPS and keys are of disks that are made (`shardfs volume iops` changes it)".into());
        }
        Ok(FoundDisk { id, size_bytes, iops: disk.size.iops })
    }

    /// The machines of nodes.
    fn machines_of(&self, nodes: &[NodeId]) -> Result<Vec<String>> {
        let machine = |node: &NodeId| {
            let kept = self.parts.view.node(node).filter(|kept| !kept.record.instance_id.is_empty());
            kept.map(|kept| kept.record.instance_id.clone()).ok_or_else(|| {
                Error::invalid(format!(
                    "it is not known on which machine of the cloud {node} runs: start it with --aws-cluster, or with --instance-id"
                ))
            })
        };
        nodes.iter().map(machine).collect()
    }

    /// Notes what is to be made, unless that was noted before, or the volume is there.
    async fn begin_making(&self, new: &NewVolume) -> Result<Begun> {
        let size = size_of(new)?;
        let fresh = MakingRecord {
            v: FORMAT,
            volume: new.id.clone(),
            token: bootstrap::random_id(),
            size,
            kms_key: new.kms_key.clone(),
            since: clock::now(),
        };
        let key = records::making_key(&new.id);
        let volume_key = records::volume_key(&new.id);
        let mut noted = None;
        for _ in 0..NOTE_ATTEMPTS_MAX {
            let store = &*self.parts.store;
            if let (_, Some(kv)) = get(store, volume_key.clone()).await? {
                let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
                return Ok(Begun::Added(Box::new(record)));
            }
            if let (_, Some(kv)) = get(store, key.clone()).await? {
                noted = Some(records::decode::<MakingRecord>(&kv.key, &kv.value)?);
                break;
            }
            let txn = Txn::new()
                .when(volume_key.clone(), Demand::Absent)
                .when(key.clone(), Demand::Absent)
                .put(key.clone(), records::encode(&fresh));
            match store.txn(txn).await {
                // The next round reads what is there.
                Ok(_) | Err(StoreError::OutcomeUnknown(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let kept = noted.ok_or_else(|| {
            Error::unavailable(format!("volume {} is being added and removed: try again", new.id))
        })?;
        if (kept.size, &kept.kms_key) != (size, &fresh.kms_key) {
            return Err(Error::new(
                Reason::AlreadyExists,
                format!(
                    "volume {} is being made with other values ({} GiB, {} IOPS): repeat these, or give it up first (`shardfs volume \
                     delete {}`)",
                    new.id, kept.size.gib, kept.size.iops, new.id
                ),
            ));
        }
        Ok(Begun::Making(kept))
    }

    /// Nothing is being made for a volume any more.
    pub(super) async fn forget_making(&self, volume: &VolumeId) -> Result<()> {
        let txn = Txn::new().delete(records::making_key(volume));
        self.parts.store.txn(txn).await?;
        Ok(())
    }

    pub(super) async fn makings(&self) -> Result<BTreeMap<VolumeId, MakingRecord>> {
        let kvs = range_all(&*self.parts.store, KeyRange::prefix(MAKING)).await?.kvs;
        let decoded = kvs.iter().map(|kv| records::decode::<MakingRecord>(&kv.key, &kv.value));
        decoded.map(|making| making.map(|making| (making.volume.clone(), making))).collect()
    }

    pub(super) async fn disks_tagged(&self, volume: &VolumeId) -> Result<Vec<Disk>> {
        let (cloud, cluster_id) = (self.cloud()?, self.parts.cluster_id.clone());
        let mut disks = blocking(move || cloud.disks(&cluster_id)).await?;
        disks.retain(|disk| disk.volume == volume.as_str());
        Ok(disks)
    }

    /// The disks that this making has made: others of the name may hold what is dear to somebody.
    async fn disks_made(&self, making: &MakingRecord) -> Result<Vec<Disk>> {
        let mut disks = self.disks_tagged(&making.volume).await?;
        disks.retain(|disk| is_of(disk, making));
        Ok(disks)
    }

    /// Gives up a volume whose making was cut off, with what was made of it; whether there is one.
    pub(super) async fn remove_half_made(&self, volume: &VolumeId) -> Result<bool> {
        let makings = self.makings().await?;
        let Some(making) = makings.get(volume) else { return Ok(false) };
        for disk in self.disks_made(making).await? {
            let cloud = self.cloud()?;
            tracing::info!(%volume, disk = %disk.id, "deleting the disk of a volume that was not made");
            blocking(move || cloud.delete(&disk.id)).await?;
        }
        self.forget_making(volume).await?;
        Ok(true)
    }

    /// Gives a volume's disk other IOPS.
    pub async fn set_iops(&self, volume: &VolumeId, iops: u32) -> Result<VolumeInfo> {
        self.refresh().await?;
        let kept = self.kept(volume)?;
        let record = &kept.record;
        if record.provider != AWS {
            return Err(Error::invalid(format!(
                "volume {volume} is of kind `{}`: only disks of a cloud (kind `aws`) have IOPS that can be set",
                record.provider
            )));
        }
        let (cloud, id) = (self.cloud()?, DiskId::new(record.source.clone())?);
        blocking(move || {
            let disk =
                cloud.disk(&id)?.ok_or_else(|| Error::corrupt(format!("there is no disk {id} any more")))?;
            let size = DiskSize { gib: disk.size.gib, iops };
            cloud::check_size(size)?;
            cloud.modify(&id, size)
        })
        .await
        .map_err(|e| e.context(format!("volume {volume}")))?;
        self.change_volume(volume, |record, _| Ok(std::mem::replace(&mut record.iops, iops) != iops)).await?;
        self.info_of(volume)
    }

    /// What the cloud has of this cluster and the records do not account for.
    pub async fn strays(&self) -> Result<Vec<Stray>> {
        let cloud = self.cloud()?;
        // The records last: what is added meanwhile has one.
        let cluster_id = self.parts.cluster_id.clone();
        let asking = cloud.clone();
        let mut disks = blocking(move || asking.disks(&cluster_id)).await?;
        let makings = self.makings().await?;
        self.refresh().await?;
        let volumes = self.parts.view.volumes();
        // Those that were made by hand have no tags of this cluster.
        let untagged: Vec<DiskId> = volumes
            .iter()
            .filter(|kept| kept.record.provider == AWS)
            .filter_map(|kept| DiskId::new(kept.record.source.clone()).ok())
            .filter(|id| disks.iter().all(|disk| disk.id != *id))
            .collect();
        let asking = cloud.clone();
        let more =
            blocking(move || untagged.iter().map(|id| asking.disk(id)).collect::<Result<Vec<_>>>()).await?;
        disks.extend(more.into_iter().flatten());
        let machines: BTreeSet<String> =
            disks.iter().flat_map(|disk| &disk.attachments).map(|a| a.machine.clone()).collect();
        let machines: Vec<String> = machines.into_iter().collect();
        let running = blocking(move || cloud.machines(&machines)).await?;
        let running: BTreeSet<String> = running.into_iter().filter(|m| m.running).map(|m| m.id).collect();
        let records: Vec<&VolumeRecord> = volumes.iter().map(|kept| &*kept.record).collect();
        let restores = self.disks_of_restores().await?;
        let mut strays = find_strays(&disks, &makings, &records, &restores, &running, |node| {
            self.parts.view.node(node).map(|kept| kept.record.instance_id.clone())
        });
        strays.sort_by(|a, b| (&a.volume, &a.disk, &a.machine).cmp(&(&b.volume, &b.disk, &b.machine)));
        Ok(strays)
    }

    /// Disks on which volumes are being restored.
    async fn disks_of_restores(&self) -> Result<BTreeMap<String, VolumeId>> {
        let kvs = range_all(&*self.parts.store, KeyRange::prefix(RESTORING)).await?.kvs;
        let decoded = kvs.iter().map(|kv| records::decode::<RestoringRecord>(&kv.key, &kv.value));
        let under_way = decoded.filter(|record| record.as_ref().map_or(true, |record| !record.done));
        under_way.map(|record| record.map(|record| (record.source, record.volume))).collect()
    }

    /// Fails if the disk of a volume is not certainly its own, to be deleted with it.
    pub(super) async fn check_deletable(&self, volume: &VolumeId) -> Result<()> {
        let Some(kept) = self.parts.view.volume(volume).filter(|kept| kept.record.provider == AWS) else {
            return Ok(());
        };
        let record = &kept.record;
        let keep = format!("`shardfs volume delete {volume} --keep` leaves it");
        if let Some(other) = self.other_with_source(record) {
            return Err(Error::invalid(format!(
                "volume {volume}: its disk {} is that of volume {other} as well: {keep}",
                record.source
            )));
        }
        // Once it was served, its content was made or found to be the volume's.
        if record.formatted || record.retired {
            return Ok(());
        }
        let (cloud, id) = (self.cloud()?, DiskId::new(record.source.clone())?);
        let disk = blocking(move || cloud.disk(&id)).await?;
        match disk {
            Some(disk) if disk.cluster_id != self.parts.cluster_id || disk.volume != volume.as_str() => {
                Err(Error::invalid(format!(
                    "volume {volume}: the disk {} was not made for it, by its tags, and was never in use: what is on it is not deleted; {keep}",
                    disk.id
                )))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Another volume that is the same disk, which should not be.
    pub(super) fn other_with_source(&self, record: &VolumeRecord) -> Option<VolumeId> {
        let volumes = self.parts.view.volumes();
        let mut others = volumes.iter().map(|kept| &kept.record).filter(|other| other.id != record.id);
        others
            .find(|other| other.provider == AWS && record.provider == AWS && other.source == record.source)
            .map(|other| other.id.clone())
    }

    /// Removes something that [`Catalog::strays`] lists.
    pub async fn remove_stray(&self, volume: &str, disk: &str, machine: &str, force: bool) -> Result<()> {
        if disk.is_empty() {
            let volume = VolumeId::new(volume)?;
            self.refresh().await?;
            if self.parts.view.volume(&volume).is_some() {
                return Err(Error::invalid(format!(
                    "{volume} is a volume of the cluster: see `shardfs volume delete`"
                )));
            }
            return self.remove_half_made(&volume).await.map(drop);
        }
        let id = DiskId::new(disk)?;
        let is_it = |stray: &Stray| stray.disk == disk && stray.machine == machine;
        if !self.strays().await?.iter().any(is_it) {
            let (cloud, asked) = (self.cloud()?, id.clone());
            let there = blocking(move || cloud.disk(&asked)).await?;
            return match there {
                Some(disk) if machine.is_empty() || disk.attachments.iter().any(|a| a.machine == machine) => {
                    let what = if machine.is_empty() { String::new() } else { format!(" on {machine}") };
                    Err(Error::invalid(format!("{id}{what} is no stray of this cluster: it is left alone")))
                }
                // It has gone.
                Some(_) | None => Ok(()),
            };
        }
        let (cloud, machine) = (self.cloud()?, machine.to_owned());
        tracing::warn!(disk = %id, machine, force, "removing a stray, as was asked");
        blocking(
            move || {
                if machine.is_empty() { cloud.delete(&id) } else { cloud.detach(&id, &machine, force) }
            },
        )
        .await
    }
}

/// What [`Catalog::begin_making`] found.
enum Begun {
    /// It is being made.
    Making(MakingRecord),
    /// It was added before.
    Added(Box<VolumeRecord>),
}

/// The disk of a volume that was added before.
fn found_before(new: &NewVolume, record: &VolumeRecord) -> Result<FoundDisk> {
    if record.provider != AWS {
        return Err(Error::new(
            Reason::AlreadyExists,
            format!("volume {} is there already, of kind `{}`: choose another id", new.id, record.provider),
        ));
    }
    let wanted = size_of(new)?;
    Ok(FoundDisk {
        id: DiskId::new(record.source.clone())?,
        size_bytes: u64::from(wanted.gib) * GIB,
        iops: record.iops,
    })
}

/// What a disk that is to be made should be.
pub(super) fn size_of(new: &NewVolume) -> Result<DiskSize> {
    crate::volume::check_spec(&new.id, AWS, new.size_bytes)?;
    let too_large = || Error::invalid(format!("volume {}: {} bytes are too many", new.id, new.size_bytes));
    let gib = u32::try_from(new.size_bytes / GIB).map_err(|_| too_large())?;
    let iops = match new.iops {
        0 => {
            let wanted = (u64::from(gib) * IOPS_PER_GIB_DEFAULT).max(IOPS_DEFAULT_MIN);
            u32::try_from(wanted)
                .unwrap_or(u32::MAX)
                .min(gib.saturating_mul(DISK_IOPS_PER_GIB_MAX))
                .min(*DISK_IOPS.end())
        }
        iops => iops,
    };
    let size = DiskSize { gib, iops };
    cloud::check_size(size).map_err(|e| e.context(format!("volume {}", new.id)))?;
    Ok(size)
}

/// Whether a disk was made by this making, and not by another one of the name.
fn is_of(disk: &Disk, making: &MakingRecord) -> bool {
    disk.volume == making.volume.as_str() && disk.token == making.token
}

fn find_strays(
    disks: &[Disk],
    makings: &BTreeMap<VolumeId, MakingRecord>,
    volumes: &[&VolumeRecord],
    restores: &BTreeMap<String, VolumeId>,
    running: &BTreeSet<String>,
    machine_of: impl Fn(&NodeId) -> Option<String>,
) -> Vec<Stray> {
    let mut strays = Vec::new();
    let half_made: Vec<&MakingRecord> =
        makings.values().filter(|making| volumes.iter().all(|record| record.id != making.volume)).collect();
    for making in &half_made {
        if disks.iter().all(|disk| !is_of(disk, making)) {
            strays.push(Stray {
                volume: making.volume.to_string(),
                disk: String::new(),
                machine: String::new(),
                gib: making.size.gib,
                why: "its making was cut off before a disk was there".into(),
                since: Some(making.since),
            });
        }
    }
    for disk in disks {
        let stray = |machine: &str, why: String, since: Option<Timestamp>| Stray {
            volume: disk.volume.clone(),
            disk: disk.id.to_string(),
            machine: machine.to_owned(),
            gib: disk.size.gib,
            why,
            since,
        };
        let owner = volumes.iter().find(|record| record.provider == AWS && record.source == disk.id.as_str());
        let Some(record) = owner else {
            let restoring = restores.get(disk.id.as_str());
            let why = match (restoring, half_made.iter().any(|making| is_of(disk, making)), disk.state) {
                (Some(volume), _, _) => format!(
                    "{volume} is being restored on it, or that was cut off (`shardfs volume delete {volume}` gives it up)"
                ),
                (None, true, _) => "its making was cut off before the volume was added".to_owned(),
                (None, false, DiskState::Failed) => {
                    "the cloud says that it failed, and it is of no volume".to_owned()
                }
                (None, false, _) => "it is of no volume of the cluster".to_owned(),
            };
            strays.push(stray("", why, Some(disk.created)));
            for Attachment { machine, .. } in &disk.attachments {
                strays.push(stray(machine, format!("{machine} has it, and it is of no volume"), None));
            }
            continue;
        };
        let nodes: BTreeMap<String, &NodeId> = record
            .primary
            .iter()
            .chain(&record.backups)
            .filter_map(|node| machine_of(node).map(|machine| (machine, node)))
            .collect();
        for Attachment { machine, .. } in &disk.attachments {
            let why = match (nodes.get(machine), running.contains(machine)) {
                (Some(_), true) => continue,
                (Some(node), false) => format!("{machine}, of {node}, does not run"),
                (None, true) => format!("{machine} is of no node of {}", record.id),
                (None, false) => format!("{machine} is of no node of {}, and does not run", record.id),
            };
            strays.push(stray(machine, why, None));
        }
    }
    strays
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::Epoch;

    use super::*;
    use crate::volume::cloud::AttachmentState;

    fn disk(id: u8, volume: &str, machines: &[&str]) -> Disk {
        Disk {
            id: DiskId::new(format!("vol-{id:017x}")).unwrap(),
            state: DiskState::Ready,
            size: DiskSize { gib: 8, iops: 3000 },
            zone: "z".into(),
            multi_attach: true,
            encrypted: true,
            created: clock::now(),
            cluster_id: "c".into(),
            volume: volume.into(),
            token: "t".into(),
            attachments: machines
                .iter()
                .map(|m| Attachment { machine: (*m).to_owned(), state: AttachmentState::Attached })
                .collect(),
        }
    }

    fn record(id: &str, source: &Disk, nodes: &[&str]) -> VolumeRecord {
        let json = serde_json::json!({
            "v": 1, "id": id, "provider": AWS, "source": source.id, "primary": nodes[0], "backups": &nodes[1..],
            "epoch": Epoch::FIRST,
        });
        serde_json::from_value(json).unwrap()
    }

    fn making(id: &str) -> (VolumeId, MakingRecord) {
        let id = VolumeId::new(id).unwrap();
        let record = MakingRecord {
            v: FORMAT,
            volume: id.clone(),
            token: "t".into(),
            size: DiskSize { gib: 8, iops: 3000 },
            kms_key: None,
            since: clock::now(),
        };
        (id, record)
    }

    #[test]
    fn what_nobody_accounts_for_is_found() {
        let disks = [
            disk(1, "vol-1", &["i-1", "i-2", "i-9"]),
            disk(2, "vol-2", &["i-1", "i-3"]),
            disk(3, "vol-3", &[]),
            disk(4, "vol-4", &[]),
            // Of the name of what is being made, and of another making.
            Disk { token: "another".into(), ..disk(5, "vol-4", &[]) },
        ];
        let volumes = [record("vol-1", &disks[0], &["a", "b"]), record("vol-2", &disks[1], &["a", "c"])];
        let makings = BTreeMap::from([making("vol-4"), making("vol-5"), making("vol-1")]);
        let running = BTreeSet::from(["i-1".to_owned(), "i-2".to_owned(), "i-9".to_owned()]);
        let machine_of = |node: &NodeId| {
            Some(match node.as_str() {
                "a" => "i-1".to_owned(),
                "b" => "i-2".to_owned(),
                _ => "i-3".to_owned(),
            })
        };
        let strays =
            find_strays(&disks, &makings, &volumes.each_ref(), &BTreeMap::new(), &running, machine_of);
        let said: Vec<String> =
            strays.iter().map(|s| format!("{} {} {}", s.volume, s.machine, s.why)).collect();
        assert_eq!(
            said,
            [
                "vol-5  its making was cut off before a disk was there",
                "vol-1 i-9 i-9 is of no node of vol-1",
                "vol-2 i-3 i-3, of c, does not run",
                "vol-3  it is of no volume of the cluster",
                "vol-4  its making was cut off before the volume was added",
                "vol-4  it is of no volume of the cluster",
            ]
        );
    }

    #[test]
    fn a_disk_gets_iops_that_it_may_have() {
        let new = |gib: u64, iops| NewVolume {
            id: VolumeId::new("vol-1").unwrap(),
            provider: AWS.into(),
            source: String::new(),
            size_bytes: gib * GIB,
            nodes: Vec::new(),
            allow_unfenced: false,
            iops,
            kms_key: None,
        };
        assert_eq!(size_of(&new(100, 0)).unwrap().iops, 3_000);
        assert_eq!(size_of(&new(1000, 0)).unwrap().iops, 10_000);
        assert_eq!(size_of(&new(65_536, 0)).unwrap().iops, 256_000);
        assert_eq!(size_of(&new(100, 500)).unwrap().iops, 500);
        for wrong in [new(3, 0), new(65_537, 0), new(0, 0), new(100, 99), new(100, 256_001), new(4, 4_001)] {
            assert_eq!(size_of(&wrong).unwrap_err().reason(), Reason::InvalidArgument, "{wrong:?}");
        }
    }
}
