//! Views of a volume: what a backup reads while the primary writes.
//!
//! A [`ViewMount`] makes the volume readable as it is at one moment, at a place of this node's own. What was published before that
//! moment ([`VolumeProvider::settle`](super::VolumeProvider::settle)) is whole in it; what is published later needs
//! another one. It writes nothing to the volume, and that is counted.
//!
//! Invariants: it is retired only by who made it, after its last reader; what a killed process left is taken away before the
//! next one is made.

use std::path::{Path, PathBuf};

use shardfs_proto::types::Result;

/// What a view's device has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retired {
    /// Sectors that were written to it: 0, or something is wrong. `None`: there was no device.
    pub sectors_written: Option<u64>,
}

type Retire = Box<dyn FnMut() -> Result<Retired> + Send>;

/// A volume, readable as it was when this was made. Has to be retired.
pub struct ViewMount {
    root: PathBuf,
    retire: Retire,
}

impl ViewMount {
    /// Readable at `root`, until `retire`, which may be repeated if it fails.
    pub(super) fn new(root: PathBuf, retire: impl FnMut() -> Result<Retired> + Send + 'static) -> ViewMount {
        ViewMount { root, retire: Box::new(retire) }
    }

    /// The folder that holds the shards.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes it away. No file of it is open. Blocks; if it fails, it may be repeated.
    pub fn retire(&mut self) -> Result<Retired> {
        (self.retire)()
    }
}

impl std::fmt::Debug for ViewMount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ViewMount").field("root", &self.root).finish_non_exhaustive()
    }
}

/// The folder of a view of a shard.
pub fn view_dir(shard_dir: &Path, name: impl std::fmt::Display) -> PathBuf {
    views_dir(shard_dir).join(name.to_string())
}

/// The folder of a shard's views.
pub fn views_dir(shard_dir: &Path) -> PathBuf {
    shard_dir.join("views")
}
