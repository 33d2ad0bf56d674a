//! Where volumes are served, and who stands by.

use shardfs_proto::types::clock;
use shardfs_proto::types::error::{Backup, Location};
use shardfs_proto::types::{Epoch, NodeId, VolumeId};

use super::{Health, State, View};

impl View {
    /// Where a volume is served.
    pub fn location(&self, volume: &VolumeId) -> Location {
        let state = self.state.read();
        let record = state.volumes.get(volume).map(|kept| &kept.record);
        let node = record.and_then(|r| r.primary.clone());
        let endpoints = node.as_ref().and_then(|n| state.nodes.get(n)).map(|n| n.record.endpoints.clone());
        Location {
            volume: volume.clone(),
            endpoints: endpoints.unwrap_or_default(),
            epoch: record.map_or(Epoch::FIRST, |r| r.epoch),
            backups: record.map(|r| state.living(&r.backups)).unwrap_or_default(),
            node,
        }
    }

    /// Whether a node is a volume's primary, and the volume's epoch.
    pub fn is_primary(&self, volume: &VolumeId, node: &NodeId) -> (bool, Epoch) {
        let state = self.state.read();
        let record = state.volumes.get(volume).map(|kept| &kept.record);
        let is = record.is_some_and(|record| record.primary.as_ref() == Some(node));
        (is, record.map_or(Epoch::FIRST, |record| record.epoch))
    }
}

impl State {
    /// Those of some nodes that live, with their addresses.
    fn living(&self, nodes: &[NodeId]) -> Vec<Backup> {
        let now = clock::boot();
        let living = nodes.iter().filter(|id| self.health(id, now) == Health::Alive);
        living
            .filter_map(|id| {
                let record = &self.nodes.get(id)?.record;
                Some(Backup { node: id.clone(), endpoints: record.endpoints.clone() })
            })
            .collect()
    }
}
