//! Files that this mount made a moment ago, and that therefore have no capabilities.
//!
//! Before the first write to a file the kernel asks for its `security.capability`, and then remembers that there
//! is none for as long as it knows the file, whatever other clients do. For a file that was made just now, the
//! answer is known here, which spares every new file a call.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::{GlobalInode, clock};

/// From making a file to its first write; longer ones ask the node.
const AGE_MAX: Duration = Duration::from_secs(1);
/// Files remembered; when there are more, all are forgotten.
const FILES_MAX: usize = 4096;

/// See the module's comment.
#[derive(Default)]
pub struct Newborn {
    made: Mutex<HashMap<GlobalInode, Instant>>,
}

impl Newborn {
    /// This mount made the file.
    pub fn made(&self, ino: GlobalInode) {
        let mut made = self.made.lock();
        if made.len() >= FILES_MAX {
            made.clear();
        }
        made.insert(ino, clock::monotonic());
    }

    /// Whether the file is known to have no extended attributes. Answers once: the kernel asks once.
    pub fn is_bare(&self, ino: GlobalInode) -> bool {
        let made = self.made.lock().remove(&ino);
        made.is_some_and(|at| clock::monotonic().duration_since(at) < AGE_MAX)
    }

    /// Somebody gives it an extended attribute.
    pub fn forget(&self, ino: GlobalInode) {
        self.made.lock().remove(&ino);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_bare_once_and_until_it_gets_an_attribute() {
        let newborn = Newborn::default();
        let ino = GlobalInode::outside(100);
        assert!(!newborn.is_bare(ino));
        newborn.made(ino);
        assert!(newborn.is_bare(ino));
        assert!(!newborn.is_bare(ino));
        newborn.made(ino);
        newborn.forget(ino);
        assert!(!newborn.is_bare(ino));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let newborn = Newborn::default();
        for n in 1..=(FILES_MAX as u64 + 1) {
            newborn.made(GlobalInode::outside(n));
        }
        assert!(newborn.made.lock().len() <= FILES_MAX);
    }
}
