//! Cluster state as JSON for the virtual files: pretty-printed, one object or array, a newline at the end.

use serde_json::{Value, json};
use shardfs_proto::types::Timestamp;
use shardfs_proto::types::cluster::{NodeInfo, NodeStatus, ShardInfo, VolumeInfo};

/// Pretty-printed, with a newline at the end.
pub(super) fn text(value: &Value) -> String {
    format!("{value:#}\n")
}

/// RFC 3339 in UTC, to the millisecond.
pub(super) fn time(at: Timestamp) -> String {
    let days = at.seconds().div_euclid(86_400);
    let second = at.seconds().rem_euclid(86_400);
    // Days to a civil date, with years that begin in March so that the leap day is their last.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = at.nanos() / 1_000_000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

pub(super) fn nodes(nodes: &[NodeInfo]) -> Value {
    let node = |n: &NodeInfo| {
        json!({
            "id": n.id.as_str(),
            "alive": n.alive,
            "endpoints": n.endpoints,
            "http_address": n.http_address,
            "version": n.version,
            "heartbeat": n.heartbeat,
            "started": time(n.started),
        })
    };
    nodes.iter().map(node).collect()
}

pub(super) fn volumes(volumes: &[VolumeInfo]) -> Value {
    let volume = |v: &VolumeInfo| {
        json!({
            "id": v.id.as_str(),
            "provider": v.provider,
            "source": v.source,
            "size_bytes": v.size_bytes,
            "primary": v.primary.as_ref().map(|node| node.as_str()),
            "backups": v.backups.iter().map(|node| node.as_str()).collect::<Vec<_>>(),
            "epoch": v.epoch.get(),
            "shards": v.shards,
        })
    };
    volumes.iter().map(volume).collect()
}

pub(super) fn shards(shards: &[ShardInfo]) -> Value {
    let shard = |s: &ShardInfo| {
        json!({
            "id": s.id.get(),
            "name": s.name.as_str(),
            "owner": s.owner.as_str(),
            "state": s.state.as_str(),
            "limit_bytes": s.limit_bytes,
            "created": time(s.created),
            "volume": s.location.volume.as_str(),
            "node": s.location.node.as_ref().map(|node| node.as_str()),
            "epoch": s.location.epoch.get(),
        })
    };
    shards.iter().map(shard).collect()
}

pub(super) fn node_status(status: &NodeStatus) -> Value {
    let volumes: Vec<Value> = status
        .volumes
        .iter()
        .map(|v| {
            json!({
                "id": v.id.as_str(),
                "provider": v.provider,
                "total_bytes": v.total_bytes,
                "free_bytes": v.free_bytes,
                "shards": v.shards,
                "epoch": v.epoch.get(),
                "source": v.source,
                "mount_point": v.mount_point,
                "trouble": v.trouble,
            })
        })
        .collect();
    let damaged: Vec<Value> =
        status.damaged_shards.iter().map(|d| json!({ "id": d.id.get(), "error": d.error })).collect();
    json!({
        "id": status.id.as_str(),
        "version": status.version,
        "cluster_id": status.cluster_id,
        "uptime_ms": status.uptime_ms,
        "volumes": volumes,
        "open_shards": status.open_shards,
        "open_shards_max": status.open_shards_max,
        "block_cache_used_bytes": status.block_cache_used_bytes,
        "block_cache_capacity_bytes": status.block_cache_capacity_bytes,
        "write_buffer_used_bytes": status.write_buffer_used_bytes,
        "store_reachable": status.store_reachable,
        "damaged_shards": damaged,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::{Epoch, Location, NodeId, ShardId, ShardName, VolumeId, op::ShardState};

    #[test]
    fn times_are_civil() {
        let at = |seconds, nanos| time(Timestamp::new(seconds, nanos).unwrap());
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400, 0), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_795_228_202, 123_456_789), "2026-11-21T02:30:02.123Z");
        assert_eq!(at(-1, 999_000_000), "1969-12-31T23:59:59.999Z");
        assert_eq!(at(4_107_542_399, 0), "2100-02-28T23:59:59.000Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn a_shard_is_rendered_whole_and_parses_again() {
        let info = ShardInfo {
            id: ShardId::new(7).unwrap(),
            name: ShardName::new("ph\"otos").unwrap(),
            owner: shardfs_proto::types::ClientId::new("default").unwrap(),
            state: ShardState::ReadOnly,
            limit_bytes: None,
            created: Timestamp::new(0, 0).unwrap(),
            location: Location {
                volume: VolumeId::new("vol-1").unwrap(),
                node: Some(NodeId::new("node-1").unwrap()),
                endpoints: vec!["unix:/x".into()],
                epoch: Epoch::FIRST,
                backups: Vec::new(),
            },
            used_bytes: None,
            inodes: None,
            snapshot_of: None,
        };
        let rendered = text(&shards(&[info]));
        assert!(rendered.ends_with("]\n") && rendered.contains("\n  {\n"), "{rendered}");
        let parsed: Value = serde_json::from_str(&rendered).unwrap();
        assert_eq!(parsed[0]["name"], "ph\"otos");
        assert_eq!(parsed[0]["state"], "read-only");
        assert_eq!(parsed[0]["limit_bytes"], Value::Null);
        assert_eq!(parsed[0]["node"], "node-1");
        assert_eq!(text(&shards(&[])), "[]\n");
    }
}
