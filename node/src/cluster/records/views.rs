//! Which views of shards there are, and who reads from which.
//!
//! A [`ViewRecord`] says what backups may open; its writer is the primary of the volume. A [`PinRecord`] says what a backup has
//! open, or is about to; its writer is that backup. What one of them relies on of the other stands in a transaction's
//! conditions: see `cluster/pins.rs`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Epoch, Error, NodeId, ShardId, VolumeId};

use super::{PREFIX, Revision};

/// Before every [`ViewRecord`]'s key.
pub const VIEWS: &str = "shardfs/views/";
/// Before every [`PinRecord`]'s key.
pub const PINS: &str = "shardfs/pins/";

/// What a view's folder is called: unique for its shard, because every process serves under an epoch of its own and counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ViewName {
    epoch: Epoch,
    number: u64,
}

impl ViewName {
    /// The view of this number, published under this epoch.
    pub fn new(epoch: Epoch, number: u64) -> ViewName {
        ViewName { epoch, number }
    }
}

impl fmt::Display for ViewName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.number)
    }
}

impl FromStr for ViewName {
    type Err = Error;

    fn from_str(text: &str) -> Result<ViewName, Error> {
        let parsed = text.split_once('-').and_then(|(epoch, number)| {
            Some(ViewName { epoch: Epoch::new(epoch.parse().ok()?)?, number: number.parse().ok()? })
        });
        // What is written otherwise would be another folder.
        parsed
            .filter(|name| name.to_string() == text)
            .ok_or_else(|| Error::corrupt(format!("{text:?} is no view's name")))
    }
}

impl Serialize for ViewName {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ViewName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<ViewName, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The view of a shard that backups may open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ViewRecord {
    /// Format.
    pub v: u32,
    /// The shard.
    pub shard: ShardId,
    /// Its volume.
    pub volume: VolumeId,
    /// The view's folder.
    pub name: ViewName,
    /// The shard's operations up to this one are in it; it may have more.
    pub sequence: u64,
    /// A revision of the store that its primary had seen before it looked at the shard: whatever had been acknowledged by then
    /// is in the view.
    pub true_at: u64,
    /// The shard is closed: there is none after this.
    #[serde(default)]
    pub last: bool,
}

impl ViewRecord {
    /// See [`ViewRecord::true_at`].
    pub fn true_at(&self) -> Revision {
        Revision::new(self.true_at)
    }
}

/// A view that a backup uses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Pinned {
    /// The shard.
    pub shard: ShardId,
    /// The view.
    pub name: ViewName,
}

/// What a backup uses of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PinRecord {
    /// Format.
    pub v: u32,
    /// The volume.
    pub volume: VolumeId,
    /// The backup.
    pub node: NodeId,
    /// The process of it: [`NodeRecord::incarnation`](super::NodeRecord::incarnation).
    pub incarnation: String,
    /// The views.
    pub views: Vec<Pinned>,
}

/// Before the keys of a volume's views.
pub fn views_prefix(volume: &VolumeId) -> String {
    format!("{VIEWS}{volume}/")
}

/// The key of a shard's [`ViewRecord`].
pub fn view_key(volume: &VolumeId, shard: ShardId) -> String {
    format!("{VIEWS}{volume}/{:010}", shard.get())
}

/// The key of a backup's [`PinRecord`].
pub fn pin_key(volume: &VolumeId, node: &NodeId) -> String {
    format!("{PINS}{volume}/{node}")
}

const _: () = assert!(PREFIX.len() < VIEWS.len() && PREFIX.len() < PINS.len());

#[cfg(test)]
mod tests {
    use super::super::{FORMAT, decode, encode};
    use super::*;

    #[test]
    fn views_and_pins_have_these_records() {
        let view = ViewRecord {
            v: FORMAT,
            shard: ShardId::new(7).unwrap(),
            volume: VolumeId::new("vol-1").unwrap(),
            name: ViewName::new(Epoch::new(3).unwrap(), 17),
            sequence: 5,
            true_at: 99,
            last: false,
        };
        let golden =
            r#"{"v":1,"shard":7,"volume":"vol-1","name":"3-17","sequence":5,"true_at":99,"last":false}"#;
        assert_eq!(encode(&view), golden);
        assert_eq!(decode::<ViewRecord>(b"k", golden.as_bytes()).unwrap(), view);
        let pin = PinRecord {
            v: FORMAT,
            volume: view.volume.clone(),
            node: NodeId::new("node-2").unwrap(),
            incarnation: "x".into(),
            views: vec![Pinned { shard: view.shard, name: view.name }],
        };
        let golden = r#"{"v":1,"volume":"vol-1","node":"node-2","incarnation":"x","views":[{"shard":7,"name":"3-17"}]}"#;
        assert_eq!(encode(&pin), golden);
        assert_eq!(decode::<PinRecord>(b"k", golden.as_bytes()).unwrap(), pin);
    }

    #[test]
    fn a_name_is_one_folder() {
        assert_eq!("3-17".parse::<ViewName>().unwrap().to_string(), "3-17");
        for bad in ["", "3", "3-", "-1", "03-1", "3-01", "3-1/..", "3-1.tmp", "0-1", "3-1-1"] {
            assert!(bad.parse::<ViewName>().is_err(), "{bad}");
        }
    }
}
