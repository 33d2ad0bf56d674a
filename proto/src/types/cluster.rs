//! Shards, nodes and volumes as people and programs see them.

use super::attr::Timestamp;
use super::error::Location;
use super::ids::{ClientId, Epoch, NodeId, ShardId, VolumeId};
use super::name::ShardName;
use super::op::ShardState;
use super::reads::ViewFigures;

/// A shard, by id or, among the caller's, by name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Selector {
    /// By id.
    Id(ShardId),
    /// By name.
    Name(ShardName),
}

/// What a new shard should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewShard {
    /// Its name among the owner's shards.
    pub name: ShardName,
    /// Limit on its logical bytes; `None`: the cluster's default.
    pub limit_bytes: Option<u64>,
    /// Permission bits of the root directory.
    pub mode: u32,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
    /// Makes a retry safe: 1..=64 bytes, or empty.
    pub request_id: String,
}

/// What a clone should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CloneShard {
    /// The shard or snapshot whose content it gets.
    pub source: Selector,
    /// Its name among the owner's shards.
    pub name: ShardName,
    /// Limit on its logical bytes; `None`: as the source's.
    pub limit_bytes: Option<u64>,
    /// Makes a retry safe: 1..=64 bytes, or empty.
    pub request_id: String,
}

/// A shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardInfo {
    /// Its id.
    pub id: ShardId,
    /// Its name.
    pub name: ShardName,
    /// The client id that owns it.
    pub owner: ClientId,
    /// Its state.
    pub state: ShardState,
    /// Limit on its logical bytes; `None`: only the volume's room.
    pub limit_bytes: Option<u64>,
    /// When it was made.
    pub created: Timestamp,
    /// Where it is served.
    pub location: Location,
    /// Logical bytes in use; only from the primary.
    pub used_bytes: Option<u64>,
    /// Inodes in use; only from the primary.
    pub inodes: Option<u64>,
    /// The shard that this is a snapshot of; `None`: it is none.
    pub snapshot_of: Option<ShardId>,
}

/// Space of a shard, for statfs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardStat {
    /// The limit, or the volume's room.
    pub total_bytes: u64,
    /// What of it is not used.
    pub free_bytes: u64,
    /// What may still be written.
    pub available_bytes: u64,
    /// Inodes in use.
    pub inodes_used: u64,
    /// Logical bytes in use.
    pub used_bytes: u64,
    /// The shard's state.
    pub state: ShardState,
}

/// A node, as the metadata store knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Its id.
    pub id: NodeId,
    /// Its gRPC addresses, preferred first.
    pub endpoints: Vec<String>,
    /// Its HTTP address; empty: none.
    pub http_address: String,
    /// Its version.
    pub version: String,
    /// Whether its heartbeat was seen to grow lately.
    pub alive: bool,
    /// Its heartbeat counter.
    pub heartbeat: u64,
    /// When its process started.
    pub started: Timestamp,
    /// It is to serve nothing.
    pub draining: bool,
    /// Its process was seen to end.
    pub dead: bool,
}

/// A volume that is to be added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewVolume {
    /// Its id.
    pub id: VolumeId,
    /// `loop`, `device`, `dir` or `aws`.
    pub provider: String,
    /// The backing file, device or folder; an absolute path that its nodes know. Of kind `aws`: the id of a disk; empty: one is made.
    pub source: String,
    /// Bytes of a backing file or disk that is to be made; 0 for others.
    pub size_bytes: u64,
    /// The nodes that attach it; the first one serves it at first.
    pub nodes: Vec<NodeId>,
    /// It is served even if its device has no working fence.
    pub allow_unfenced: bool,
    /// Of a disk that is to be made: reads and writes a second; 0: a default.
    pub iops: u32,
    /// Of a disk that is to be made: it is encrypted with this key; empty: with the account's default key.
    pub kms_key: Option<String>,
}

/// Something of the cluster in its cloud that the records do not account for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stray {
    /// The volume, by the disk's tags, or whose making was cut off.
    pub volume: String,
    /// The cloud's id of the disk; empty: none was made, as far as is known.
    pub disk: String,
    /// A machine that has the disk and should not; empty: the disk itself is what strays.
    pub machine: String,
    /// GiB of the disk.
    pub gib: u32,
    /// Why, for people.
    pub why: String,
    /// When it began.
    pub since: Option<Timestamp>,
}

/// A volume, as the metadata store knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeInfo {
    /// Its id.
    pub id: VolumeId,
    /// `loop`, `device` or `dir`.
    pub provider: String,
    /// The backing file, device or folder.
    pub source: String,
    /// Its size; 0: as large as what it lies on.
    pub size_bytes: u64,
    /// The node that serves it, if any.
    pub primary: Option<NodeId>,
    /// Nodes that stand by.
    pub backups: Vec<NodeId>,
    /// Grows at every promotion.
    pub epoch: Epoch,
    /// Shards on it.
    pub shards: u32,
    /// Where an operator wants it.
    pub target: Option<NodeId>,
    /// It is being taken out of the cluster.
    pub leaving: bool,
    /// Of kind `aws`: reads and writes a second that its disk is made for; 0: not known.
    pub iops: u32,
}

/// One volume as the node that serves it sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeStatus {
    /// Its id.
    pub id: VolumeId,
    /// `loop` or `dir`.
    pub provider: String,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes by which its shards may still grow.
    pub free_bytes: u64,
    /// Shards on it.
    pub shards: u32,
    /// The epoch under which it is served.
    pub epoch: Epoch,
    /// Device or folder.
    pub source: String,
    /// Where it is mounted on the node.
    pub mount_point: String,
    /// Empty: in order. Else what is wrong.
    pub trouble: String,
    /// How the node came to serve it; `None` while it does not.
    pub takeover: Option<Takeover>,
}

/// When what happened as a node took a volume: nanoseconds since 1970 by its clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Takeover {
    /// The election began, or, for one that was handed over, the node learned of it.
    pub begun_ns: u64,
    /// The records say that it is this node's.
    pub elected_ns: u64,
    /// Nobody else can write to it any more.
    pub fenced_ns: u64,
    /// It is mounted, and calls are answered.
    pub mounted_ns: u64,
    /// The first of its shards was open; 0: none yet.
    pub opened_ns: u64,
}

/// A node, as it sees itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeStatus {
    /// Its id.
    pub id: NodeId,
    /// Its version.
    pub version: String,
    /// Milliseconds since its process started.
    pub uptime_ms: u64,
    /// The volumes it serves.
    pub volumes: Vec<VolumeStatus>,
    /// Shards open.
    pub open_shards: u32,
    /// Shards that may be open.
    pub open_shards_max: u32,
    /// Block cache in use, bytes.
    pub block_cache_used_bytes: u64,
    /// Block cache, bytes.
    pub block_cache_capacity_bytes: u64,
    /// Write buffers in use, bytes.
    pub write_buffer_used_bytes: u64,
    /// Whether its last call to the metadata store succeeded.
    pub store_reachable: bool,
    /// The cluster's id.
    pub cluster_id: String,
    /// Shards of which damage was found since its process started.
    pub damaged_shards: Vec<DamagedShard>,
    /// Reads from backups.
    pub views: ViewFigures,
}

/// A shard of which damage was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DamagedShard {
    /// Which.
    pub id: ShardId,
    /// What the first error said.
    pub error: String,
}

/// One item of an fsck's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckItem {
    /// Something is wrong.
    Finding {
        /// A short word of a closed set.
        kind: String,
        /// What, and where.
        detail: String,
    },
    /// The last item.
    Summary(CheckSummary),
}

/// What an fsck went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CheckSummary {
    /// Inode records.
    pub inodes: u64,
    /// Directory entries.
    pub dirents: u64,
    /// Chunks.
    pub chunks: u64,
    /// Logical bytes.
    pub bytes: u64,
    /// Findings.
    pub findings: u64,
}
