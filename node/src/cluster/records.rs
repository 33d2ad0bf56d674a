//! What is kept in the metadata store: keys and JSON records.
//!
//! | key (after `shardfs/`) | record |
//! |---|---|
//! | `cluster` | [`ClusterRecord`] |
//! | `nodes/{id}` | [`NodeRecord`] |
//! | `heartbeats/{id}` | a counter in decimal |
//! | `depositions/{id}` | the last volume that was taken from the node, and its new epoch, for people; each one changes it |
//! | `deaths/{id}` | [`DeathRecord`] |
//! | `drains/{id}` | empty: the node is to serve nothing |
//! | `stopping` | empty: the whole cluster is being stopped, so volumes stay where they are |
//! | `volumes/{id}` | [`VolumeRecord`] |
//! | `shards/{id, 10 digits}` | [`ShardRecord`] |
//! | `names/{owner}/{name}` | the shard's id in decimal |
//! | `requests/{owner}/{request id}` | the id of the shard that the request made, in decimal |
//! | `next-shard-id` | the next shard id in decimal |
//! | `views/{volume}/{shard, 10 digits}` | [`views::ViewRecord`] |
//! | `pins/{volume}/{node}` | [`views::PinRecord`] |
//!
//! Every record has a format version `v`. Fields that a program does not know are kept out of its sight and are
//! no error, so that a newer version may add some; a greater `v` is refused. A shard's record, name and request
//! change in one transaction.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Epoch, Error, NodeId, Result, ShardId, ShardName, Timestamp, VolumeId};

use super::store::{Revision, VOLATILE_PREFIX};

pub mod views;

/// Before every key, so that a cluster may share an etcd with others.
pub const PREFIX: &str = "shardfs/";
/// The key of the [`ClusterRecord`].
pub const CLUSTER_KEY: &str = "shardfs/cluster";
/// Before every [`NodeRecord`]'s key.
pub const NODES: &str = "shardfs/nodes/";
/// Before every heartbeat's key.
pub const HEARTBEATS: &str = "shardfs/heartbeats/";
/// Before every deposition's key.
pub const DEPOSITIONS: &str = "shardfs/depositions/";
/// Before every [`DeathRecord`]'s key.
pub const DEATHS: &str = "shardfs/deaths/";
/// Before the keys of nodes that are to serve nothing.
pub const DRAINS: &str = "shardfs/drains/";
/// The key that says that the whole cluster is being stopped.
pub const STOPPING: &str = "shardfs/stopping";
/// Before every [`VolumeRecord`]'s key.
pub const VOLUMES: &str = "shardfs/volumes/";
/// Before every [`ShardRecord`]'s key.
pub const SHARDS: &str = "shardfs/shards/";
/// The key of the counter of shard ids.
pub const NEXT_SHARD_ID: &str = "shardfs/next-shard-id";

const _: () = assert!(HEARTBEATS.len() == VOLATILE_PREFIX.len(), "heartbeats are what is volatile");

/// Predecessors that a volume's record keeps: winners in a row that may all have failed before their fence.
pub const PREDECESSORS_MAX: usize = 8;

/// The format that this program writes.
pub const FORMAT: u32 = 1;

/// The cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Format.
    pub v: u32,
    /// Its id: random, made with the cluster.
    pub id: String,
}

/// A node, written by itself when it starts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Format.
    pub v: u32,
    /// Its id.
    pub id: NodeId,
    /// Its gRPC addresses, preferred first.
    pub endpoints: Vec<String>,
    /// Its HTTP address; empty: none.
    #[serde(default)]
    pub http: String,
    /// Its version.
    pub version: String,
    /// When its process started.
    pub started: Timestamp,
    /// Random, another one for every start.
    #[serde(default)]
    pub incarnation: String,
    /// The machine as its cloud calls it; empty: unknown.
    #[serde(default)]
    pub instance_id: String,
    /// The region; empty: unknown.
    #[serde(default)]
    pub region: String,
}

/// A process that was seen to end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeathRecord {
    /// Format.
    pub v: u32,
    /// [`NodeRecord::incarnation`] of the process.
    pub incarnation: String,
    /// How it ended, for people.
    #[serde(default)]
    pub how: String,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Format.
    pub v: u32,
    /// Its id.
    pub id: VolumeId,
    /// `loop`, `device` or `dir`.
    pub provider: String,
    /// The backing file, device or folder. Of a device what it is called on nodes that were not told another path.
    pub source: String,
    /// Bytes of a backing file; 0 for a folder.
    #[serde(default)]
    pub size_bytes: u64,
    /// The node that serves it.
    pub primary: Option<NodeId>,
    /// Nodes that stand by.
    #[serde(default)]
    pub backups: Vec<NodeId>,
    /// Grows at every promotion.
    pub epoch: Epoch,
    /// [`NodeRecord::incarnation`] of the process to which the epoch was given; empty: to none yet. A later process of
    /// the primary begins an epoch of its own.
    #[serde(default)]
    pub holder: String,
    /// Where an operator wants it served.
    #[serde(default)]
    pub target: Option<NodeId>,
    /// It has been attached once: from then on it is never formatted or made anew.
    #[serde(default)]
    pub formatted: bool,
    /// It is served even if its device has no working fence.
    #[serde(default)]
    pub allow_unfenced: bool,
    /// Who had it under earlier epochs, latest first, [`PREDECESSORS_MAX`] at most: by their keys a device is taken that
    /// does not tell who holds it.
    #[serde(default)]
    pub predecessors: Vec<Predecessor>,
    /// The latest of them gave it away; else it was taken.
    #[serde(default)]
    pub handed_over: bool,
    /// It had mounted the volume under its epoch, and unmounted it before it gave it away: nothing of it is under way, nor
    /// of those before it.
    #[serde(default)]
    pub unmounted: bool,
}

impl VolumeRecord {
    /// The predecessors of the next primary.
    pub fn predecessors_of_next(&self) -> Vec<Predecessor> {
        let last = self.primary.iter().map(|node| Predecessor { node: node.clone(), epoch: self.epoch });
        last.chain(self.predecessors.iter().cloned()).take(PREDECESSORS_MAX).collect()
    }
}

/// Who had a volume under an earlier epoch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Predecessor {
    /// The node.
    pub node: NodeId,
    /// The epoch.
    pub epoch: Epoch,
}

/// A shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Format.
    pub v: u32,
    /// Its id.
    pub id: ShardId,
    /// Its name; of a deleted one the last it had.
    #[serde(with = "name_as_text")]
    pub name: ShardName,
    /// The client id that owns it.
    pub owner: ClientId,
    /// Its volume, for life.
    pub volume: VolumeId,
    /// Its state.
    pub state: StateWord,
    /// Limit on its logical bytes.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    /// When it was made.
    pub created: Timestamp,
    /// The request that made it.
    pub request_id: String,
    /// Permission bits of its root directory when it was made.
    pub mode: u32,
    /// Owner of its root directory when it was made.
    pub uid: u32,
    /// Group of its root directory when it was made.
    pub gid: u32,
    /// Of a deleted one: its bytes are gone.
    #[serde(default)]
    pub purged: bool,
}

/// [`ShardState`] as the records spell it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateWord {
    /// See [`ShardState::Creating`].
    Creating,
    /// See [`ShardState::Active`].
    Active,
    /// See [`ShardState::ReadOnly`].
    ReadOnly,
    /// See [`ShardState::Deleted`].
    Deleted,
}

impl From<StateWord> for ShardState {
    fn from(word: StateWord) -> ShardState {
        match word {
            StateWord::Creating => ShardState::Creating,
            StateWord::Active => ShardState::Active,
            StateWord::ReadOnly => ShardState::ReadOnly,
            StateWord::Deleted => ShardState::Deleted,
        }
    }
}

mod name_as_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use shardfs_proto::types::ShardName;

    pub(super) fn serialize<S: Serializer>(name: &ShardName, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(name.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ShardName, D::Error> {
        ShardName::new(String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// The key of a node's record.
pub fn node_key(id: &NodeId) -> String {
    format!("{NODES}{id}")
}

/// The key of a node's heartbeat.
pub fn heartbeat_key(id: &NodeId) -> String {
    format!("{HEARTBEATS}{id}")
}

/// The key of a node's depositions.
pub fn deposition_key(id: &NodeId) -> String {
    format!("{DEPOSITIONS}{id}")
}

/// The key of a node's [`DeathRecord`].
pub fn death_key(id: &NodeId) -> String {
    format!("{DEATHS}{id}")
}

/// The key that says that a node is to serve nothing.
pub fn drain_key(id: &NodeId) -> String {
    format!("{DRAINS}{id}")
}

/// The key of a volume's record.
pub fn volume_key(id: &VolumeId) -> String {
    format!("{VOLUMES}{id}")
}

/// The key of a shard's record.
pub fn shard_key(id: ShardId) -> String {
    format!("{SHARDS}{:010}", id.get())
}

/// The key that reserves a shard's name.
pub fn name_key(owner: &ClientId, name: &ShardName) -> String {
    format!("{PREFIX}names/{owner}/{name}")
}

/// The key that remembers which shard a request made.
pub fn request_key(owner: &ClientId, request_id: &str) -> String {
    format!("{PREFIX}requests/{owner}/{request_id}")
}

/// A record's bytes.
pub fn encode<T: Serialize>(record: &T) -> Bytes {
    serde_json::to_vec(record).expect("records are plain data").into()
}

/// A record from its bytes; `key` for the error.
pub fn decode<T: DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Format {
        v: u32,
    }
    let corrupt = |e: &dyn std::fmt::Display| {
        Error::corrupt(format!("the metadata store's record {} is damaged: {e}", key.escape_ascii()))
    };
    let format: Format = serde_json::from_slice(value).map_err(|e| corrupt(&e))?;
    if format.v > FORMAT {
        return Err(Error::new(
            shardfs_proto::types::Reason::Unsupported,
            format!(
                "the metadata store's record {} has format {}, this program knows {FORMAT}: update it",
                key.escape_ascii(),
                format.v
            ),
        ));
    }
    serde_json::from_slice(value).map_err(|e| corrupt(&e))
}

/// A number in decimal from its bytes.
pub fn decode_number(key: &[u8], value: &[u8]) -> Result<u64> {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
        Error::corrupt(format!("the metadata store's key {} holds no number", key.escape_ascii()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard() -> ShardRecord {
        ShardRecord {
            v: FORMAT,
            id: ShardId::new(7).unwrap(),
            name: ShardName::new("a b").unwrap(),
            owner: ClientId::new("me").unwrap(),
            volume: VolumeId::new("vol-1").unwrap(),
            state: StateWord::ReadOnly,
            limit_bytes: None,
            created: Timestamp::new(5, 6).unwrap(),
            request_id: "r".into(),
            mode: 0o755,
            uid: 1,
            gid: 2,
            purged: false,
        }
    }

    #[test]
    fn a_shard_has_this_record() {
        let golden = concat!(
            r#"{"v":1,"id":7,"name":"a b","owner":"me","volume":"vol-1","state":"read-only","limit_bytes":null,"#,
            r#""created":{"seconds":5,"nanos":6},"request_id":"r","mode":493,"uid":1,"gid":2,"purged":false}"#
        );
        assert_eq!(encode(&shard()), golden);
        assert_eq!(decode::<ShardRecord>(b"k", golden.as_bytes()).unwrap(), shard());
    }

    #[test]
    fn unknown_fields_pass_and_newer_formats_do_not() {
        let more = String::from_utf8(encode(&shard()).to_vec())
            .unwrap()
            .replace(r#""v":1"#, r#""v":1,"later":true"#);
        assert_eq!(decode::<ShardRecord>(b"k", more.as_bytes()).unwrap(), shard());
        let newer = more.replace(r#""v":1"#, r#""v":2"#);
        assert!(decode::<ShardRecord>(b"k", newer.as_bytes()).is_err());
        assert!(decode::<ShardRecord>(b"k", b"{}").is_err());
        assert!(decode::<ShardRecord>(b"k", b"\xff").is_err());
    }

    #[test]
    fn volumes_of_before_have_no_predecessors_and_need_a_fence() {
        let before =
            br#"{"v":1,"id":"vol-1","provider":"loop","source":"/x","size_bytes":7,"primary":"a","epoch":3}"#;
        let mut record: VolumeRecord = decode(b"k", before).unwrap();
        assert!(!record.allow_unfenced && !record.handed_over && !record.unmounted);
        assert!(record.predecessors.is_empty());
        for epoch in 4..20 {
            record.predecessors = record.predecessors_of_next();
            record.epoch = Epoch::new(epoch).unwrap();
        }
        assert_eq!(record.predecessors.len(), PREDECESSORS_MAX);
        let latest = Predecessor { node: NodeId::new("a").unwrap(), epoch: Epoch::new(18).unwrap() };
        assert_eq!(record.predecessors[0], latest);
        record.primary = None;
        assert_eq!(record.predecessors_of_next(), record.predecessors);
    }

    #[test]
    fn keys_sort_as_ids_and_heartbeats_are_volatile() {
        assert!(shard_key(ShardId::new(9).unwrap()) < shard_key(ShardId::new(10).unwrap()));
        assert_eq!(HEARTBEATS.as_bytes(), VOLATILE_PREFIX);
    }
}
