//! Whether the kernel's pages of a file are still good when the file is opened again.
//!
//! They are if the file's version is the one that it had when it was opened last: at that time the kernel
//! had no older pages (or was told to drop them), and any change since, by anyone, has raised the version.
//! A version counts a shard's operations and never returns to an earlier value.

use std::collections::HashMap;

use parking_lot::Mutex;
use shardfs_proto::types::{GlobalInode, Version};

/// Files whose version is remembered; when there are more, all are forgotten, which costs reading again.
const FILES_MAX: usize = 65_536;

/// See the module's comment.
#[derive(Default)]
pub struct Pages {
    opened_at: Mutex<HashMap<GlobalInode, Version>>,
}

impl Pages {
    /// Whether the kernel may keep the pages of a file that is being opened with this version.
    pub fn keep(&self, ino: GlobalInode, version: Version) -> bool {
        let mut opened_at = self.opened_at.lock();
        if opened_at.len() >= FILES_MAX && !opened_at.contains_key(&ino) {
            opened_at.clear();
        }
        opened_at.insert(ino, version) == Some(version)
    }

    /// The kernel's pages are not what the file holds.
    pub fn forget(&self, ino: GlobalInode) {
        self.opened_at.lock().remove(&ino);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_while_the_version_stays() {
        let pages = Pages::default();
        let ino = GlobalInode::outside(100);
        assert!(!pages.keep(ino, Version::new(1)));
        assert!(pages.keep(ino, Version::new(1)));
        assert!(!pages.keep(ino, Version::new(2)));
        assert!(pages.keep(ino, Version::new(2)));
        pages.forget(ino);
        assert!(!pages.keep(ino, Version::new(2)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let pages = Pages::default();
        for n in 1..=(FILES_MAX as u64 + 1) {
            pages.keep(GlobalInode::outside(n), Version::new(1));
        }
        assert!(pages.opened_at.lock().len() <= FILES_MAX);
    }
}
