//! Nodes, volumes, space and checks.

use super::{missing, state_from_wire, state_to_wire, time_from_wire, time_to_wire};
use crate::types::cluster::{
    CheckItem, CheckSummary, DamagedShard, NewVolume, NodeInfo, NodeStatus, ShardStat, Stray, Takeover,
    VolumeInfo, VolumeStatus,
};
use crate::types::{Epoch, NodeId, Result, ShardId, VolumeId};
use crate::wire;

/// A shard's space.
pub fn shard_stat_to_wire(s: &ShardStat) -> wire::StatShardReply {
    wire::StatShardReply {
        total_bytes: s.total_bytes,
        free_bytes: s.free_bytes,
        available_bytes: s.available_bytes,
        inodes_used: s.inodes_used,
        state: state_to_wire(s.state).into(),
        used_bytes: s.used_bytes,
    }
}

/// A shard's space.
pub fn shard_stat_from_wire(s: wire::StatShardReply) -> Result<ShardStat> {
    Ok(ShardStat {
        total_bytes: s.total_bytes,
        free_bytes: s.free_bytes,
        available_bytes: s.available_bytes,
        inodes_used: s.inodes_used,
        used_bytes: s.used_bytes,
        state: state_from_wire(s.state)?,
    })
}

/// A node.
pub fn node_info_to_wire(n: &NodeInfo) -> wire::Node {
    wire::Node {
        id: n.id.as_str().to_owned(),
        endpoints: n.endpoints.clone(),
        http_address: n.http_address.clone(),
        version: n.version.clone(),
        alive: n.alive,
        heartbeat: n.heartbeat,
        started: Some(time_to_wire(n.started)),
        draining: n.draining,
        dead: n.dead,
    }
}

/// A node.
pub fn node_info_from_wire(n: wire::Node) -> Result<NodeInfo> {
    Ok(NodeInfo {
        id: NodeId::new(n.id)?,
        endpoints: n.endpoints,
        http_address: n.http_address,
        version: n.version,
        alive: n.alive,
        heartbeat: n.heartbeat,
        started: time_from_wire(n.started.unwrap_or_default())?,
        draining: n.draining,
        dead: n.dead,
    })
}

/// A volume that is to be added.
pub fn new_volume_from_wire(v: wire::AddVolumeRequest) -> Result<NewVolume> {
    Ok(NewVolume {
        id: VolumeId::new(v.volume_id)?,
        provider: v.provider,
        source: v.source,
        size_bytes: v.size_bytes,
        nodes: v.nodes.into_iter().map(NodeId::new).collect::<Result<_>>()?,
        allow_unfenced: v.allow_unfenced,
        iops: v.iops,
        kms_key: (v.encrypted || !v.kms_key.is_empty()).then_some(v.kms_key),
    })
}

/// A volume that is to be added.
pub fn new_volume_to_wire(v: &NewVolume) -> wire::AddVolumeRequest {
    wire::AddVolumeRequest {
        volume_id: v.id.as_str().to_owned(),
        provider: v.provider.clone(),
        source: v.source.clone(),
        size_bytes: v.size_bytes,
        nodes: v.nodes.iter().map(|node| node.as_str().to_owned()).collect(),
        allow_unfenced: v.allow_unfenced,
        iops: v.iops,
        encrypted: v.kms_key.is_some(),
        kms_key: v.kms_key.clone().unwrap_or_default(),
    }
}

/// A volume.
pub fn volume_info_to_wire(v: &VolumeInfo) -> wire::Volume {
    wire::Volume {
        id: v.id.as_str().to_owned(),
        provider: v.provider.clone(),
        source: v.source.clone(),
        size_bytes: v.size_bytes,
        primary: v.primary.as_ref().map(|n| n.as_str().to_owned()).unwrap_or_default(),
        backups: v.backups.iter().map(|n| n.as_str().to_owned()).collect(),
        epoch: v.epoch.get(),
        shards: v.shards,
        target: v.target.as_ref().map(|n| n.as_str().to_owned()).unwrap_or_default(),
        leaving: v.leaving,
        iops: v.iops,
    }
}

/// A volume.
pub fn volume_info_from_wire(v: wire::Volume) -> Result<VolumeInfo> {
    Ok(VolumeInfo {
        id: VolumeId::new(v.id)?,
        provider: v.provider,
        source: v.source,
        size_bytes: v.size_bytes,
        primary: if v.primary.is_empty() { None } else { Some(NodeId::new(v.primary)?) },
        backups: v.backups.into_iter().map(NodeId::new).collect::<Result<_>>()?,
        epoch: Epoch::new(v.epoch).ok_or_else(|| missing("the volume's epoch"))?,
        shards: v.shards,
        target: if v.target.is_empty() { None } else { Some(NodeId::new(v.target)?) },
        leaving: v.leaving,
        iops: v.iops,
    })
}

/// What the records do not account for.
pub fn stray_to_wire(s: &Stray) -> wire::Stray {
    wire::Stray {
        volume_id: s.volume.clone(),
        disk: s.disk.clone(),
        machine: s.machine.clone(),
        gib: s.gib,
        why: s.why.clone(),
        since: s.since.map(time_to_wire),
    }
}

/// What the records do not account for.
pub fn stray_from_wire(s: wire::Stray) -> Result<Stray> {
    Ok(Stray {
        volume: s.volume_id,
        disk: s.disk,
        machine: s.machine,
        gib: s.gib,
        why: s.why,
        since: s.since.map(time_from_wire).transpose()?,
    })
}

/// A node's own view.
pub fn node_status_to_wire(s: &NodeStatus) -> wire::NodeStatus {
    wire::NodeStatus {
        node_id: s.id.as_str().to_owned(),
        version: s.version.clone(),
        uptime_ms: s.uptime_ms,
        volumes: s
            .volumes
            .iter()
            .map(|v| wire::VolumeStatus {
                volume_id: v.id.as_str().to_owned(),
                provider: v.provider.clone(),
                total_bytes: v.total_bytes,
                free_bytes: v.free_bytes,
                shards: v.shards,
                epoch: v.epoch.get(),
                source: v.source.clone(),
                mount_point: v.mount_point.clone(),
                trouble: v.trouble.clone(),
                takeover: v.takeover.map(|t| wire::Takeover {
                    begun_ns: t.begun_ns,
                    elected_ns: t.elected_ns,
                    fenced_ns: t.fenced_ns,
                    mounted_ns: t.mounted_ns,
                    opened_ns: t.opened_ns,
                }),
            })
            .collect(),
        open_shards: s.open_shards,
        open_shards_max: s.open_shards_max,
        block_cache_used_bytes: s.block_cache_used_bytes,
        block_cache_capacity_bytes: s.block_cache_capacity_bytes,
        write_buffer_used_bytes: s.write_buffer_used_bytes,
        store_reachable: s.store_reachable,
        cluster_id: s.cluster_id.clone(),
        damaged_shards: s
            .damaged_shards
            .iter()
            .map(|d| wire::DamagedShard { shard_id: d.id.get(), error: d.error.clone() })
            .collect(),
        views: Some(super::view_figures_to_wire(&s.views)),
    }
}

/// A node's own view.
pub fn node_status_from_wire(s: wire::NodeStatus) -> Result<NodeStatus> {
    Ok(NodeStatus {
        id: NodeId::new(s.node_id)?,
        version: s.version,
        uptime_ms: s.uptime_ms,
        volumes: s
            .volumes
            .into_iter()
            .map(|v| {
                Ok(VolumeStatus {
                    id: VolumeId::new(v.volume_id)?,
                    provider: v.provider,
                    total_bytes: v.total_bytes,
                    free_bytes: v.free_bytes,
                    shards: v.shards,
                    epoch: Epoch::new(v.epoch).ok_or_else(|| missing("the volume's epoch"))?,
                    source: v.source,
                    mount_point: v.mount_point,
                    trouble: v.trouble,
                    takeover: v.takeover.map(|t| Takeover {
                        begun_ns: t.begun_ns,
                        elected_ns: t.elected_ns,
                        fenced_ns: t.fenced_ns,
                        mounted_ns: t.mounted_ns,
                        opened_ns: t.opened_ns,
                    }),
                })
            })
            .collect::<Result<_>>()?,
        open_shards: s.open_shards,
        open_shards_max: s.open_shards_max,
        block_cache_used_bytes: s.block_cache_used_bytes,
        block_cache_capacity_bytes: s.block_cache_capacity_bytes,
        write_buffer_used_bytes: s.write_buffer_used_bytes,
        store_reachable: s.store_reachable,
        cluster_id: s.cluster_id,
        damaged_shards: s
            .damaged_shards
            .into_iter()
            .map(|d| Ok(DamagedShard { id: ShardId::new(d.shard_id)?, error: d.error }))
            .collect::<Result<_>>()?,
        views: super::view_figures_from_wire(s.views.unwrap_or_default()),
    })
}

/// An item of an fsck.
pub fn check_item_to_wire(item: &CheckItem) -> wire::CheckReply {
    use wire::check_reply::Part;
    wire::CheckReply {
        part: Some(match item {
            CheckItem::Finding { kind, detail } => {
                Part::Finding(wire::CheckFinding { kind: kind.clone(), detail: detail.clone() })
            }
            CheckItem::Summary(s) => Part::Summary(check_summary_to_wire(s)),
        }),
    }
}

/// The end of an fsck.
pub fn check_summary_to_wire(s: &CheckSummary) -> wire::CheckSummary {
    wire::CheckSummary {
        inodes: s.inodes,
        dirents: s.dirents,
        chunks: s.chunks,
        bytes: s.bytes,
        findings: s.findings,
    }
}

/// The end of an fsck.
pub fn check_summary_from_wire(s: wire::CheckSummary) -> CheckSummary {
    CheckSummary {
        inodes: s.inodes,
        dirents: s.dirents,
        chunks: s.chunks,
        bytes: s.bytes,
        findings: s.findings,
    }
}

/// An item of an fsck.
pub fn check_item_from_wire(reply: wire::CheckReply) -> Result<CheckItem> {
    use wire::check_reply::Part;
    Ok(match reply.part.ok_or_else(|| missing("the check's item"))? {
        Part::Finding(f) => CheckItem::Finding { kind: f.kind, detail: f.detail },
        Part::Summary(s) => CheckItem::Summary(check_summary_from_wire(s)),
    })
}
