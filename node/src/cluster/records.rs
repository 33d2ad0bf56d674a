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
//! | `making/{volume id}` | [`MakingRecord`] |
//! | `backups/{volume}/{id}` | [`backups::BackupRecord`] |
//! | `backup-schedules/{volume}` | [`backups::ScheduleRecord`] |
//! | `restoring/{volume}` | [`backups::RestoringRecord`] |
//! | `provisioning` | [`provisioning::ProvisioningRecord`] |
//! | `shards/{id, 10 digits}` | [`ShardRecord`] |
//! | `names/{owner}/{name}` | the shard's id in decimal |
//! | `snapshots/{shard, 10 digits}/{name}` | the id of the shard's snapshot of that name, in decimal |
//! | `requests/{owner}/{request id}` | the id of the shard that the request made, in decimal |
//! | `next-shard-id` | the next shard id in decimal |
//! | `views/{volume}/{shard, 10 digits}` | [`views::ViewRecord`] |
//! | `pins/{volume}/{node}` | [`views::PinRecord`] |
//!
//! Every record has a format version `v`. Fields that a program does not know are kept out of its sight and are
//! no error, so that a newer version may add some; a greater `v` is refused. A field that must not be overlooked comes with a greater
//! `v`, in the records that say it and no others: so an earlier version goes on with the rest. Formats are numbered over all kinds of
//! records. A shard's record, name and request change in one transaction.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Epoch, Error, NodeId, Result, ShardId, ShardName, Timestamp, VolumeId};

use super::store::{Revision, VOLATILE_PREFIX};
use crate::volume::cloud::DiskSize;

pub mod backups;
pub mod provisioning;
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
/// Before every [`MakingRecord`]'s key.
pub const MAKING: &str = "shardfs/making/";
/// Before every [`ShardRecord`]'s key.
pub const SHARDS: &str = "shardfs/shards/";
/// The key of the counter of shard ids.
pub const NEXT_SHARD_ID: &str = "shardfs/next-shard-id";

const _: () = assert!(HEARTBEATS.len() == VOLATILE_PREFIX.len(), "heartbeats are what is volatile");

/// Predecessors that a volume's record keeps: winners in a row that may all have failed before their fence.
pub const PREDECESSORS_MAX: usize = 8;

/// The format of what this program writes, of shards excepted: [`ShardRecord::with_format`].
pub const FORMAT: u32 = 1;
/// The format of a shard's record that versions before 0.2 would misread.
const FORMAT_OF_COPIES: u32 = 2;
/// The newest format that this program knows.
pub const FORMAT_MAX: u32 = FORMAT_OF_COPIES;

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
    /// It uses volumes of kind `aws`.
    #[serde(default)]
    pub cloud: bool,
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
    /// `loop`, `device`, `dir` or `aws`.
    pub provider: String,
    /// The backing file, device or folder. Of a device what it is called on nodes that were not told another path. Of `aws` the disk's id.
    pub source: String,
    /// Bytes of a backing file or disk; 0 for others.
    #[serde(default)]
    pub size_bytes: u64,
    /// Of `aws`: reads and writes a second that its disk is to have; 0: as it has them.
    #[serde(default)]
    pub iops: u32,
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
    /// It is to be taken out of the cluster: it gets no shards.
    #[serde(default)]
    pub leaving: bool,
    /// It leaves, and has no shards: nobody stands by for it, its primary lets go of it and then removes this record.
    #[serde(default)]
    pub retired: bool,
    /// What it holds goes with it, as far as its kind can do that.
    #[serde(default)]
    pub delete_content: bool,
}

impl VolumeRecord {
    /// The predecessors of the next primary.
    pub fn predecessors_of_next(&self) -> Vec<Predecessor> {
        let last = self.primary.iter().map(|node| Predecessor { node: node.clone(), epoch: self.epoch });
        last.chain(self.predecessors.iter().cloned()).take(PREDECESSORS_MAX).collect()
    }
}

/// A disk that is being made for a volume: written before the cloud is asked, deleted after the volume's record was written. So whoever
/// goes on with what was cut off asks for the same disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MakingRecord {
    /// Format.
    pub v: u32,
    /// The volume.
    pub volume: VolumeId,
    /// [`NewDisk::token`](crate::volume::cloud::NewDisk).
    pub token: String,
    /// How large it is to be.
    pub size: DiskSize,
    /// How it is encrypted.
    #[serde(default)]
    pub kms_key: Option<String>,
    /// When it was begun.
    pub since: Timestamp,
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
    /// It is a snapshot of this shard: its name is one of that shard's, not of the owner's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_of: Option<ShardId>,
    /// It was made with the content of this shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<ShardId>,
    /// The last time that its content was replaced with that of a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
}

/// A rollback of a shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rollback {
    /// To this snapshot of the shard's.
    pub snapshot: ShardId,
    /// The request that asked for it: one that comes again is answered. Also written beside the content that it brought.
    pub request_id: String,
    /// The content is the snapshot's. Else it is not known which of the two it is, and leftovers may lie beside it.
    pub done: bool,
}

impl ShardRecord {
    /// The key that reserves its name.
    pub fn name_key(&self) -> String {
        match self.snapshot_of {
            Some(shard) => snapshot_key(shard, &self.name),
            None => name_key(&self.owner, &self.name),
        }
    }

    /// The record as it is written. Versions before 0.2 would take a snapshot for a shard of its owner's of that name, and make a copy that was
    /// cut off as an empty shard: of those they see that the record is newer than they are. They serve all others, clones included.
    pub fn with_format(self) -> ShardRecord {
        let half_made_copy = self.copy_of.is_some() && self.state == StateWord::Creating;
        let v = if self.snapshot_of.is_some() || half_made_copy { FORMAT_OF_COPIES } else { FORMAT };
        ShardRecord { v, ..self }
    }

    /// Whether a rollback was begun, and how it ended was not noted.
    pub fn is_rolling_back(&self) -> bool {
        self.rollback.as_ref().is_some_and(|rollback| !rollback.done)
    }
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

pub(crate) mod name_as_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use shardfs_proto::types::ShardName;

    pub(crate) fn serialize<S: Serializer>(name: &ShardName, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(name.as_str())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ShardName, D::Error> {
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

/// The key of a [`MakingRecord`].
pub fn making_key(volume: &VolumeId) -> String {
    format!("{MAKING}{volume}")
}

/// The key under which it stands in words why what a volume was made of was left when it was deleted; until one of this name leaves
/// the next time.
pub fn left_key(volume: &VolumeId) -> String {
    format!("{PREFIX}left/{volume}")
}

/// The key of a shard's record.
pub fn shard_key(id: ShardId) -> String {
    format!("{SHARDS}{:010}", id.get())
}

/// The key that reserves a shard's name.
pub fn name_key(owner: &ClientId, name: &ShardName) -> String {
    format!("{PREFIX}names/{owner}/{name}")
}

/// The key that reserves the name of a shard's snapshot.
pub fn snapshot_key(shard: ShardId, name: &ShardName) -> String {
    format!("{PREFIX}snapshots/{:010}/{name}", shard.get())
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
    if format.v > FORMAT_MAX {
        return Err(Error::new(
            shardfs_proto::types::Reason::Unsupported,
            format!(
                "the metadata store's record {} has format {}, this program knows {FORMAT_MAX}: update it",
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
mod tests;
