//! Backups of volumes as people and programs see them.

use super::attr::Timestamp;
use super::cluster::{CheckSummary, VolumeInfo};
use super::ids::{ClientId, NodeId, ShardId, VolumeId};
use super::name::ShardName;

/// How a backup is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackupState {
    /// Being made.
    Making,
    /// There.
    Done,
    /// Of no use.
    Failed,
    /// Being deleted.
    Deleting,
}

impl BackupState {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            BackupState::Making => "making",
            BackupState::Done => "done",
            BackupState::Failed => "failed",
            BackupState::Deleting => "deleting",
        }
    }
}

/// An image of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupInfo {
    /// Its id, which begins with the moment in UTC.
    pub id: String,
    /// The volume that it is of.
    pub volume: VolumeId,
    /// That volume's kind.
    pub provider: String,
    /// Where the image is; empty: not known yet.
    pub image: String,
    /// When it was begun.
    pub begun: Timestamp,
    /// Bytes of the volume.
    pub bytes: u64,
    /// Shards and snapshots in it.
    pub shards: u32,
    /// How it is.
    pub state: BackupState,
    /// Of one that failed: why.
    pub why: String,
    /// A schedule has it taken, and deletes it.
    pub scheduled: bool,
}

/// Where a backup is to be restored to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RestoreTo {
    /// Where it was: its volume, under the ids that its shards had.
    InPlace {
        /// Shards that were made since are deleted.
        drop_missing: bool,
    },
    /// A volume that is not there yet, under ids that are new.
    NewVolume {
        /// Its id.
        volume: VolumeId,
        /// Its nodes; the first one makes and serves it.
        nodes: Vec<NodeId>,
        /// Its backing file; empty: beside that of the backup's volume.
        source: String,
        /// What is put behind the names of its shards; empty: a default.
        name_suffix: String,
    },
}

/// A shard of a restored volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestoredShard {
    /// Its id when the backup was taken.
    pub old: ShardId,
    /// Its id.
    pub id: ShardId,
    /// Its name.
    pub name: ShardName,
    /// Whose it is.
    pub owner: ClientId,
    /// It is a snapshot of this shard.
    pub snapshot_of: Option<ShardId>,
}

/// What became of a restore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restored {
    /// The volume.
    pub volume: VolumeInfo,
    /// What is on it.
    pub shards: Vec<RestoredShard>,
    /// What is not, and might be expected there.
    pub missing: Vec<RestoredShard>,
    /// Where the backing file is that was there before; empty: nowhere.
    pub set_aside: String,
}

/// Something that is said of a backup while it is verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VerifyItem {
    /// What is being done now.
    Step(String),
    /// What is wrong with the image or its filesystem: a short word, and what exactly.
    Finding {
        /// A short word.
        kind: String,
        /// What exactly.
        detail: String,
    },
    /// A shard was looked at.
    Shard {
        /// Its id.
        id: ShardId,
        /// Its name.
        name: ShardName,
        /// Whose it is.
        owner: ClientId,
        /// It is a snapshot of this shard.
        snapshot_of: Option<ShardId>,
        /// Some of what is wrong.
        findings: Vec<(String, String)>,
        /// How much there is, and how much of it is wrong.
        summary: CheckSummary,
    },
    /// The end.
    Summary {
        /// Shards that were looked at.
        shards: u32,
        /// Bytes in them.
        bytes: u64,
        /// Everything that was found.
        findings: u64,
    },
}

/// Backups that are taken again and again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupSchedule {
    /// Of which volume.
    pub volume: VolumeId,
    /// Seconds between two.
    pub every_s: u64,
    /// How many are kept.
    pub keep: u32,
    /// When the last attempt began.
    pub last: Option<Timestamp>,
}
