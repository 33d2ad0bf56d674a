//! Who may answer a read, and of which view of a shard an answer is.

use std::time::Duration;

use super::ids::NodeId;

/// Who may answer a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadFrom {
    /// The primary; of a closed shard every node that has the volume.
    #[default]
    Primary,
    /// A backup too, from a view of at most this age.
    Backup {
        /// What was acknowledged longer ago than this is in every answer.
        max_staleness: Duration,
    },
}

impl ReadFrom {
    /// Whether backups are asked first.
    pub fn prefers_backup(self) -> bool {
        matches!(self, ReadFrom::Backup { .. })
    }
}

/// Of which view an answer is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ViewLabel {
    /// The last of the shard's operations that is in it.
    pub sequence: u64,
    /// What was acknowledged so long before, or longer, is in it.
    pub age: Duration,
    /// Who answered.
    pub node: NodeId,
    /// The shard is closed: this is its state for good.
    pub last: bool,
}

/// Reads from backups, since a node's process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ViewFigures {
    /// Views published as a primary.
    pub published: u64,
    /// Attempts that failed.
    pub publish_failures: u64,
    /// Views opened as a backup.
    pub opened: u64,
    /// Views open now.
    pub open: u32,
    /// Answers from views.
    pub answers: u64,
    /// Reads sent to the primary because there was no view that was young enough.
    pub refused_stale: u64,
    /// Because the node's lease, or its hold on the view, had ended.
    pub refused_lost: u64,
    /// Because the view could not be read.
    pub refused_unreadable: u64,
    /// Devices of views that were retired.
    pub devices_retired: u64,
    /// Sectors that were written to them.
    pub sectors_written: u64,
}
