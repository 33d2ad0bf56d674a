//! The views and pins of the copy.

use std::collections::BTreeMap;

use bytes::Bytes;
use shardfs_proto::types::{NodeId, Result, ShardId, VolumeId};

use super::{Kept, View, keep};
use crate::cluster::records;
use crate::cluster::records::views::{PINS, PinRecord, VIEWS, ViewRecord};
use crate::cluster::store::KeyValue;

#[derive(Default)]
pub(super) struct Published {
    /// A shard stays on its volume.
    views: BTreeMap<ShardId, (Bytes, Kept<ViewRecord>)>,
    pins: BTreeMap<Bytes, Kept<PinRecord>>,
}

impl Published {
    /// Whether the key was one of these.
    pub(super) fn put(&mut self, key: &str, kv: &KeyValue) -> Result<bool> {
        if key.starts_with(VIEWS) {
            let record: ViewRecord = records::decode(&kv.key, &kv.value)?;
            self.views.insert(record.shard, (kv.key.clone(), keep(record, kv)));
        } else if key.starts_with(PINS) {
            let record: PinRecord = records::decode(&kv.key, &kv.value)?;
            self.pins.insert(kv.key.clone(), keep(record, kv));
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// Whether the key was one of these.
    pub(super) fn delete(&mut self, key: &str) -> bool {
        if key.starts_with(VIEWS) {
            self.views.retain(|_, (at, _)| at != key);
        } else if key.starts_with(PINS) {
            self.pins.remove(key.as_bytes());
        } else {
            return false;
        }
        true
    }
}

impl View {
    /// The view of a shard that backups may open.
    pub fn view_of(&self, shard: ShardId) -> Option<Kept<ViewRecord>> {
        self.state.read().published.views.get(&shard).map(|(_, kept)| kept.clone())
    }

    /// The views of a volume's shards.
    pub fn views_on(&self, volume: &VolumeId) -> Vec<Kept<ViewRecord>> {
        let state = self.state.read();
        let on = |(_, kept): &&(Bytes, Kept<ViewRecord>)| kept.record.volume == *volume;
        state.published.views.values().filter(on).map(|(_, kept)| kept.clone()).collect()
    }

    /// What backups use of a volume.
    pub fn pins_on(&self, volume: &VolumeId) -> Vec<Kept<PinRecord>> {
        let state = self.state.read();
        state.published.pins.values().filter(|kept| kept.record.volume == *volume).cloned().collect()
    }

    /// What a node uses, of whichever volume.
    pub fn pins_of(&self, node: &NodeId) -> Vec<Kept<PinRecord>> {
        let state = self.state.read();
        state.published.pins.values().filter(|kept| kept.record.node == *node).cloned().collect()
    }

    /// What a node uses of a volume.
    pub fn pin(&self, volume: &VolumeId, node: &NodeId) -> Option<Kept<PinRecord>> {
        let key = records::views::pin_key(volume, node);
        self.state.read().published.pins.get(key.as_bytes()).cloned()
    }
}
