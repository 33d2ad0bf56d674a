//! How deep directories lie, and may come to lie by renames.
//!
//! A directory is made at most [`DEPTH_MAX`] deep. One that is moved takes what is below it along; how deep that goes is not
//! counted out, for it may be any number of directories. Each directory notes a bound instead (`InodeRecord::height_bound`): at
//! most so many directories lie below each other in it. A rename that by these bounds might lead deeper than
//! [`MOVED_DEPTH_MAX`] is refused.
//!
//! Invariants: no directory has more below each other than its bound; none lies deeper than [`MOVED_DEPTH_MAX`]. So whatever
//! gives a directory another one raises the bounds of all above that are too low, a walk up a path. A bound never falls but when a
//! directory without directories is moved.

use shardfs_proto::types::limits::{DEPTH_MAX, MOVED_DEPTH_MAX};
use shardfs_proto::types::{Error, InodeNo, Reason, Result};

use super::Apply;
use crate::shard::records::InodeRecord;

impl Apply<'_, '_> {
    /// The directories from one up to the root, itself first.
    pub(super) fn ancestors(&mut self, from: InodeNo) -> Result<Vec<InodeNo>> {
        let mut path = vec![from];
        let mut at = from;
        while at != InodeNo::ROOT {
            let record = self.inode(at)?;
            at = record
                .parent
                .ok_or_else(|| Error::corrupt(format!("inode {at}: a directory without a parent")))?;
            path.push(at);
            // Shards of before heights were noted may have directories that lie deeper than allowed.
            if path.len() as u64 > self.txn.counters().inodes {
                return Err(Error::corrupt(format!("directory {from} is its own ancestor")));
            }
        }
        Ok(path)
    }

    /// Fails if a directory lies too deep to hold another; the bound on the height of one that is made there.
    pub(super) fn check_depth(&mut self, parent: InodeNo) -> Result<usize> {
        let path = self.ancestors(parent)?;
        let height = height_at(parent, path.len())?;
        self.raise_heights(&path, 0)?;
        Ok(height)
    }

    /// The same for a directory of this record that comes from `old_parent`.
    pub(super) fn check_move(
        &mut self,
        moved: (InodeNo, &InodeRecord),
        old_parent: InodeNo,
        new_parent: InodeNo,
    ) -> Result<usize> {
        let path = self.ancestors(new_parent)?;
        if path.contains(&moved.0) {
            return Err(Error::invalid(format!("directory {} cannot move into itself", moved.0)));
        }
        let depth = path.len();
        let fresh = height_at(new_parent, depth)?;
        if moved.1.nlink <= 2 {
            self.raise_heights(&path, 0)?;
            return Ok(fresh);
        }
        let old_depth = self.ancestors(old_parent)?.len();
        let height = moved.1.height_bound().min(MOVED_DEPTH_MAX.saturating_sub(old_depth));
        if depth + height > MOVED_DEPTH_MAX {
            return Err(Error::new(
                Reason::NameTooLong,
                format!(
                    "directory {} may hold {height} directories below each other: in directory {new_parent} they would be more \
                     than {MOVED_DEPTH_MAX} deep, the limit",
                    moved.0
                ),
            ));
        }
        self.raise_heights(&path, height)?;
        Ok(height)
    }

    /// Notes in a path of directories, the innermost first, that its first one gets another of this height.
    pub(super) fn raise_heights(&mut self, path: &[InodeNo], height: usize) -> Result<()> {
        for (above, ino) in path.iter().enumerate() {
            let record = self.inode(*ino)?;
            let wanted = height + 1 + above;
            // The root is never moved.
            if *ino != InodeNo::ROOT && record.height_bound() < wanted {
                let mut record = InodeRecord::clone(&record);
                record.set_height_bound(wanted);
                self.txn.put_inode(*ino, record)?;
            }
        }
        Ok(())
    }
}

/// The bound on the height of a directory that is made at a depth, in one that may be too deep.
fn height_at(parent: InodeNo, depth: usize) -> Result<usize> {
    DEPTH_MAX.checked_sub(depth).ok_or_else(|| {
        Error::new(
            Reason::NameTooLong,
            format!("directory {parent} has {DEPTH_MAX} directories above it, the limit"),
        )
    })
}
