//! A view of a shard that somebody else published, open for reading.
//!
//! Invariants: nothing is written, neither to the view nor beside it; all files of the view are open from the beginning, so that
//! their names are not needed any more; what it shows never changes.

use std::any::Any;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use shardfs_proto::types::{Error, Result, ShardId};

use super::ReadView;
use super::handle::read_head;
use super::records::Header;
use super::rocks::{RocksShared, open_published};
use super::store::Reader;

/// Files of one view: a shard of some TiB has as many.
const FILES_MAX: usize = 65_536;

/// A view of a shard, open.
pub struct PublishedView {
    // Dropped in this order: the database, its files, what they lie on.
    reader: Arc<dyn Reader>,
    header: Arc<Header>,
    sequence: u64,
    _files: Vec<File>,
    _keeps: Box<dyn Any + Send + Sync>,
}

impl PublishedView {
    /// Opens the view in a folder; `keeps` lives as long as it. Blocks.
    pub(super) fn open(
        shared: &RocksShared,
        id: ShardId,
        dir: &Path,
        keeps: Box<dyn Any + Send + Sync>,
    ) -> Result<PublishedView> {
        let files = open_all(dir).map_err(|e| e.with_shard(id))?;
        let reader = open_published(shared, id, dir)?;
        let (header, counters) = read_head(&*reader, id)?;
        Ok(PublishedView {
            reader,
            header: Arc::new(header),
            sequence: counters.op_seq,
            _files: files,
            _keeps: keeps,
        })
    }

    /// The last of the shard's operations that is in it.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// What reads go through. Keeps the view open.
    pub fn read_view(self: &Arc<Self>) -> ReadView {
        ReadView::new(Arc::clone(&self.reader), Arc::clone(&self.header), Some(self.clone()))
    }
}

fn open_all(dir: &Path) -> Result<Vec<File>> {
    let failed = |what: &Path, e: std::io::Error| Error::io(format!("opening {}: {e}", what.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let path = entry.map_err(|e| failed(dir, e))?.path();
        if files.len() == FILES_MAX {
            return Err(Error::io(format!("{} has more than {FILES_MAX} files", dir.display())));
        }
        files.push(File::open(&path).map_err(|e| failed(&path, e))?);
    }
    Ok(files)
}
