//! Backups of volumes.

use super::cluster::{check_summary_from_wire, check_summary_to_wire};
use super::{missing, time_from_wire, time_to_wire, volume_info_from_wire, volume_info_to_wire};
use crate::types::backups::{
    BackupInfo, BackupSchedule, BackupState, RestoreTo, Restored, RestoredShard, VerifyItem,
};
use crate::types::{ClientId, NodeId, Result, ShardId, ShardName, VolumeId};
use crate::wire;

/// A backup.
pub fn volume_backup_to_wire(b: &BackupInfo) -> wire::VolumeBackup {
    let state = match b.state {
        BackupState::Making => wire::BackupState::Making,
        BackupState::Done => wire::BackupState::Done,
        BackupState::Failed => wire::BackupState::Failed,
        BackupState::Deleting => wire::BackupState::Deleting,
    };
    wire::VolumeBackup {
        id: b.id.clone(),
        volume_id: b.volume.as_str().to_owned(),
        provider: b.provider.clone(),
        image: b.image.clone(),
        begun: Some(time_to_wire(b.begun)),
        bytes: b.bytes,
        shards: b.shards,
        state: state.into(),
        why: b.why.clone(),
        scheduled: b.scheduled,
    }
}

/// A backup.
pub fn volume_backup_from_wire(b: wire::VolumeBackup) -> Result<BackupInfo> {
    let state = match b.state() {
        wire::BackupState::Making => BackupState::Making,
        wire::BackupState::Done => BackupState::Done,
        wire::BackupState::Failed => BackupState::Failed,
        wire::BackupState::Deleting => BackupState::Deleting,
        wire::BackupState::Unspecified => return Err(missing("the backup's state")),
    };
    Ok(BackupInfo {
        id: b.id,
        volume: VolumeId::new(b.volume_id)?,
        provider: b.provider,
        image: b.image,
        begun: time_from_wire(b.begun.unwrap_or_default())?,
        bytes: b.bytes,
        shards: b.shards,
        state,
        why: b.why,
        scheduled: b.scheduled,
    })
}

/// What is to be restored, and where to.
pub fn restore_to_wire(backup: &str, to: &RestoreTo) -> wire::RestoreBackupRequest {
    let backup_id = backup.to_owned();
    match to {
        RestoreTo::InPlace { drop_missing } => wire::RestoreBackupRequest {
            backup_id,
            in_place: true,
            drop_missing: *drop_missing,
            ..wire::RestoreBackupRequest::default()
        },
        RestoreTo::NewVolume { volume, nodes, source, name_suffix } => wire::RestoreBackupRequest {
            backup_id,
            in_place: false,
            volume_id: volume.as_str().to_owned(),
            nodes: nodes.iter().map(|node| node.as_str().to_owned()).collect(),
            source: source.clone(),
            name_suffix: name_suffix.clone(),
            drop_missing: false,
        },
    }
}

/// What is to be restored, and where to.
pub fn restore_from_wire(r: wire::RestoreBackupRequest) -> Result<(String, RestoreTo)> {
    let to = if r.in_place {
        RestoreTo::InPlace { drop_missing: r.drop_missing }
    } else {
        RestoreTo::NewVolume {
            volume: VolumeId::new(r.volume_id)?,
            nodes: r.nodes.into_iter().map(NodeId::new).collect::<Result<_>>()?,
            source: r.source,
            name_suffix: r.name_suffix,
        }
    };
    Ok((r.backup_id, to))
}

fn shard_to_wire(s: &RestoredShard) -> wire::RestoredShard {
    wire::RestoredShard {
        old_id: s.old.get(),
        shard_id: s.id.get(),
        name: s.name.as_str().to_owned(),
        owner: s.owner.as_str().to_owned(),
        snapshot_of: s.snapshot_of.map_or(0, ShardId::get),
    }
}

fn shard_from_wire(s: wire::RestoredShard) -> Result<RestoredShard> {
    Ok(RestoredShard {
        old: ShardId::new(s.old_id)?,
        id: ShardId::new(s.shard_id)?,
        name: ShardName::new(s.name)?,
        owner: ClientId::new(s.owner)?,
        snapshot_of: shard_or_none(s.snapshot_of)?,
    })
}

fn shard_or_none(id: u64) -> Result<Option<ShardId>> {
    if id == 0 { Ok(None) } else { ShardId::new(id).map(Some) }
}

/// What became of a restore.
pub fn restored_to_wire(r: &Restored) -> wire::RestoreBackupReply {
    wire::RestoreBackupReply {
        volume: Some(volume_info_to_wire(&r.volume)),
        shards: r.shards.iter().map(shard_to_wire).collect(),
        missing: r.missing.iter().map(shard_to_wire).collect(),
        set_aside: r.set_aside.clone(),
    }
}

/// What became of a restore.
pub fn restored_from_wire(r: wire::RestoreBackupReply) -> Result<Restored> {
    Ok(Restored {
        volume: volume_info_from_wire(r.volume.ok_or_else(|| missing("the restored volume"))?)?,
        shards: r.shards.into_iter().map(shard_from_wire).collect::<Result<_>>()?,
        missing: r.missing.into_iter().map(shard_from_wire).collect::<Result<_>>()?,
        set_aside: r.set_aside,
    })
}

/// Something that is said of a backup.
pub fn verify_item_to_wire(item: &VerifyItem) -> wire::VerifyBackupReply {
    use wire::verify_backup_reply::Part;
    let finding =
        |kind: &str, detail: &str| wire::CheckFinding { kind: kind.to_owned(), detail: detail.to_owned() };
    wire::VerifyBackupReply {
        part: Some(match item {
            VerifyItem::Step(step) => Part::Step(step.clone()),
            VerifyItem::Finding { kind, detail } => Part::Finding(finding(kind, detail)),
            VerifyItem::Shard { id, name, owner, snapshot_of, findings, summary } => {
                Part::Shard(wire::VerifiedShard {
                    shard_id: id.get(),
                    name: name.as_str().to_owned(),
                    owner: owner.as_str().to_owned(),
                    snapshot_of: snapshot_of.map_or(0, ShardId::get),
                    findings: findings.iter().map(|(kind, detail)| finding(kind, detail)).collect(),
                    summary: Some(check_summary_to_wire(summary)),
                })
            }
            VerifyItem::Summary { shards, bytes, findings } => {
                Part::Summary(wire::VerifySummary { shards: *shards, bytes: *bytes, findings: *findings })
            }
        }),
    }
}

/// Something that is said of a backup.
pub fn verify_item_from_wire(reply: wire::VerifyBackupReply) -> Result<VerifyItem> {
    use wire::verify_backup_reply::Part;
    Ok(match reply.part.ok_or_else(|| missing("the item"))? {
        Part::Step(step) => VerifyItem::Step(step),
        Part::Finding(f) => VerifyItem::Finding { kind: f.kind, detail: f.detail },
        Part::Shard(s) => VerifyItem::Shard {
            id: ShardId::new(s.shard_id)?,
            name: ShardName::new(s.name)?,
            owner: ClientId::new(s.owner)?,
            snapshot_of: shard_or_none(s.snapshot_of)?,
            findings: s.findings.into_iter().map(|f| (f.kind, f.detail)).collect(),
            summary: check_summary_from_wire(s.summary.unwrap_or_default()),
        },
        Part::Summary(s) => VerifyItem::Summary { shards: s.shards, bytes: s.bytes, findings: s.findings },
    })
}

/// A schedule.
pub fn schedule_to_wire(s: &BackupSchedule) -> wire::BackupSchedule {
    wire::BackupSchedule {
        volume_id: s.volume.as_str().to_owned(),
        every_seconds: s.every_s,
        keep: s.keep,
        last: s.last.map(time_to_wire),
    }
}

/// A schedule.
pub fn schedule_from_wire(s: wire::BackupSchedule) -> Result<BackupSchedule> {
    Ok(BackupSchedule {
        volume: VolumeId::new(s.volume_id)?,
        every_s: s.every_seconds,
        keep: s.keep,
        last: s.last.map(time_from_wire).transpose()?,
    })
}
